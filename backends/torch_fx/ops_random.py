"""Operators: random."""

from __future__ import annotations

from .operators import Table

OPERATORS: Table = {}
