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
    """

    def __init__(
        self, blocks: Sequence[Array], rows: Sequence[Array | float] | None = None, columns: Array | None = None
    ) -> None:
        self._blocks, width = blocks, blocks[0].shape[1]
        moment = np.zeros((width, width))
        for block, counts in zip(blocks, rows or [1.0] * len(blocks), strict=True):
            each = np.broadcast_to(np.asarray(counts, np.float64), len(block))
            for part, wide in _parts(block):
                moment += wide.T @ (wide * each[part, None])
        values, vectors = np.linalg.eigh((moment + moment.T) / 2)
        has_content = values > _NO_CONTENT * values.max(initial=0.0)
        lengths = np.sqrt(values[has_content])
        root = lengths[:, None] * vectors[:, has_content].T
        self._inverse = vectors[:, has_content] / lengths
        self._spectrum = Spectrum(root, columns) if len(lengths) else None
        self.errors: Array = np.zeros(width + 1)
        if self._spectrum is not None:
            self.errors[: len(self._spectrum.errors)] = self._spectrum.errors

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


def _parts(block: Array) -> Iterator[tuple[slice, Array]]:
    step = max(1, _AT_ONCE // max(block.shape[1], 1))
    for start in range(0, len(block), step):
        part = slice(start, start + step)
        yield part, block[part].astype(np.float64)
