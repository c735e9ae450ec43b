"""Recovery: a changed model trained until it does again what the original did."""
