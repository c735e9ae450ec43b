"""What of a model trains, and what of it stays as it is."""
