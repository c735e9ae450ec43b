"""Raising: what exporters took apart, put back as the one operator it was."""
