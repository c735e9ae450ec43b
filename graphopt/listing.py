"""What a plug-in's inspection of a model tells: tables for people, the same as values for programs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Sheet:
    """One table.

    Attributes:
        columns: Headers.
        rows: Texts, one for each column.
        numbers: Which of the columns hold numbers.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: Sequence[str] = ()


@dataclass(frozen=True)
class Listing:
    """What an inspection found.

    An inspection is a function that takes a model with inferred shapes, in canonical form or as it is stored, which is
    a copy of its own, and returns this. A plug-in names it in its table ``INSPECTIONS``.

    Attributes:
        sheets: What people read, one below the other.
        values: The same for programs, as JSON knows it.
        remarks: Lines below the tables.
    """

    sheets: Sequence[Sheet]
    values: dict[str, Any] = field(default_factory=dict)
    remarks: Sequence[str] = ()
