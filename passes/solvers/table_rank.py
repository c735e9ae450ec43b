"""The rank solver for tables: rows that count by how often they are looked up, a few of them in memory."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from graphopt.backend import Array

from .rank import Factors, Spectrum

# Numbers of a table brought to float64 at once, 32 MB.
_AT_ONCE = 4 << 20
# Directions of the columns that hold less than this share of the most are rounding, not content.
_NO_CONTENT = 1e-13


class TableSpectrum:
    """What a table E is worth, direction by direction, to those who look rows up, and to those who multiply by it.

    The factors of rank r minimise tr(D (E−Ê) H (E−Ê)ᵀ), that is |D^½ (E−Ê) H^½|², D diagonal: the best rank of D^½ E on
    H, as `Spectrum` has it. With D^½ E = Q R only R is decomposed, found from Eᵀ D E by its square root; and as
    Ê = E R⁻¹ U Uᵀ R, each row of the left factor is the row of E in fewer numbers, whatever its own weight is: a row of
    weight zero keeps what it has in common with the others.

    Args:
        table: E, [rows, width], finite.
        rows: D, [rows], none below zero; None where all count the same.
        columns: H, [width, width]; None for the identity.

    Attributes:
        errors: float64 [width + 1]: what is lost at every rank, from all of it at rank 0 to nothing.
    """

    def __init__(self, table: Array, rows: Array | None = None, columns: Array | None = None) -> None:
        self._table = table
        moment = np.zeros((table.shape[1], table.shape[1]))
        for part, wide in _parts(table):
            counted = wide if rows is None else wide * rows[part, None]
            moment += counted.T @ wide
        values, vectors = np.linalg.eigh(moment)
        has_content = values > _NO_CONTENT * values.max(initial=0.0)
        lengths = np.sqrt(values[has_content])
        self._root = lengths[:, None] * vectors[:, has_content].T
        self._inverse = vectors[:, has_content] / lengths
        self._spectrum = Spectrum(self._root, columns) if len(lengths) else None
        missing = np.zeros(table.shape[1] + 1 - len(lengths))
        self.errors: Array = missing if self._spectrum is None else np.append(self._spectrum.errors, missing[1:])

    def factors(self, rank: int) -> Factors:
        """Return the best factors of a rank: left float32 [rows, rank], right float64 [rank, width]."""
        if self._spectrum is None:
            return Factors(np.zeros((len(self._table), 0), np.float32), np.zeros((0, self._table.shape[1])), 0.0)
        found = self._spectrum.factors(rank)
        change = self._inverse @ found.left
        left = np.empty((len(self._table), found.rank), np.float32)
        for part, wide in _parts(self._table):
            left[part] = wide @ change
        return Factors(left, found.right, found.error)


def _parts(table: Array) -> Iterator[tuple[slice, Array]]:
    step = max(1, _AT_ONCE // max(table.shape[1], 1))
    for start in range(0, len(table), step):
        part = slice(start, start + step)
        yield part, table[part].astype(np.float64)
