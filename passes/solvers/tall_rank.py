"""The rank solver for what has many rows, tables and stacked weights: a few of them at a time in memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from graphopt.backend import Array

from .rank import Factors, Spectrum

# Numbers brought to float64 at once, 32 MB.
_AT_ONCE = 4 << 20
# Directions of the columns that hold less than this share of the most are rounding, not content.
_NO_CONTENT = 1e-13


class TallSpectrum:
    """What matrices stacked upon each other, W, are worth direction by direction, where rows count by weights.

    The factors of rank r minimise tr(D (W−Ŵ) H (W−Ŵ)ᵀ), that is |D^½ (W−Ŵ) H^½|², D diagonal: the best rank of D^½ W on
    H, as `Spectrum` has it. With D^½ W = Q R only R is decomposed, found from Wᵀ D W by its square root; and as
    Ŵ = W R⁻¹ U Uᵀ R, each row of the left factor is the row of W in fewer numbers, whatever its own weight is: a row of
    weight zero keeps what it has in common with the others.

    Args:
        blocks: The matrices, [rows of each, width], finite.
        rows: D, of each block one number for each of its rows, or one for all; none below zero. None where all count
            the same.
        columns: H, [width, width]; None for the identity.

    Attributes:
        errors: float64 [width + 1]: what is lost at every rank, from all of it at rank 0 to nothing.
        columns: H as it was given.
    """

    def __init__(
        self, blocks: Sequence[Array], rows: Sequence[Array | float] | None = None, columns: Array | None = None
    ) -> None:
        self._blocks, self.columns, width = blocks, columns, blocks[0].shape[1]
        values, vectors = np.linalg.eigh(_row_moment(blocks, rows))
        has_content = values > _NO_CONTENT * values.max(initial=0.0)
        lengths = np.sqrt(values[has_content])
        root = lengths[:, None] * vectors[:, has_content].T
        self._inverse = vectors[:, has_content] / lengths
        self._spectrum = Spectrum(root, columns) if len(lengths) else None
        self.errors: Array = np.zeros(width + 1)
        if self._spectrum is not None:
            self.errors[: len(self._spectrum.errors)] = self._spectrum.errors

    def shares_lost(self, ranks: Sequence[int], rows: Sequence[Array | float]) -> Array:
        """Return what factors of some ranks lose where rows count otherwise than they were found for, float64 [ranks].

        That is a share of all there is to lose then; it tells what rows not seen so far will lose.

        Args:
            ranks: The ranks.
            rows: How rows count, as it was taken.
        """
        moment, width = _row_moment(self._blocks, rows), self._blocks[0].shape[1]
        columns = np.eye(width) if self.columns is None else self.columns.astype(np.float64)
        whole = float(np.vdot(moment, columns))
        if self._spectrum is None or whole <= 0:
            return np.zeros(len(ranks))
        lost = []
        for rank in ranks:
            found = self._spectrum.factors(rank)
            rest = np.eye(width) - self._inverse @ (found.left @ found.right)
            lost.append(float(np.vdot(moment @ rest, rest @ columns)) / whole)
        return np.maximum(lost, 0.0)

    def factors(self, rank: int) -> Factors:
        """Return the best factors of a rank: left float32 [rows of all, rank], right float64 [rank, width]."""
        count, width = sum(len(block) for block in self._blocks), self._blocks[0].shape[1]
        if self._spectrum is None:  # there is nothing but zeros
            return Factors(np.zeros((count, rank), np.float32), np.zeros((rank, width)), 0.0)
        found = self._spectrum.factors(rank)
        change = self._inverse @ found.left
        left = np.empty((count, found.rank), np.float32)
        start = 0
        for block in self._blocks:
            own = left[start : start + len(block)]
            for part, wide in _parts(block):
                own[part] = wide @ change
            start += len(block)
        return Factors(left, found.right, found.error)


def _row_moment(blocks: Sequence[Array], rows: Sequence[Array | float] | None) -> Array:
    """Return Wᵀ D W, float64 [width, width]."""
    found = np.zeros((blocks[0].shape[1], blocks[0].shape[1]))
    for block, counts in zip(blocks, rows or [1.0] * len(blocks), strict=True):
        each = np.broadcast_to(np.asarray(counts, np.float64), len(block))
        for part, wide in _parts(block):
            found += wide.T @ (wide * each[part, None])
    return (found + found.T) / 2


def _parts(block: Array) -> Iterator[tuple[slice, Array]]:
    step = max(1, _AT_ONCE // max(block.shape[1], 1))
    for start in range(0, len(block), step):
        part = slice(start, start + step)
        yield part, block[part].astype(np.float64)
