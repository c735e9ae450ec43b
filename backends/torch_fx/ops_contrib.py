"""Operators of com.microsoft."""

from __future__ import annotations

from .operators import Table

CONTRIB: Table = {}
