"""Quantized operators."""

from __future__ import annotations

from .operators import Table

OPERATORS: Table = {}
CONTRIB: Table = {}
