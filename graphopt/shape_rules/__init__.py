"""One function per operator: dtypes, dimensions and small contents of its outputs."""
