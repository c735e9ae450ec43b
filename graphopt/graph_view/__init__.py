"""The graph before and after, drawn for a browser."""
