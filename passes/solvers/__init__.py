"""Solvers of the one objective: (weight, constraint) -> (weight, predicted error)."""
