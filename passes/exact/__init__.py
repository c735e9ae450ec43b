"""Passes that keep the function."""
