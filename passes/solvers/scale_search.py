"""The search for the scale, and zero point, that loses least in each block."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt.backend import Array

from .grid import INT8, Grid, GridWeight, blocked, finish, positive, raised_to, reaching
from .objective import importance
from .rows import by_rows

# Shares of the spanning range that are tried: with few bits it pays to cut off extremes, with 8 hardly.
_LEAST_SHARE = {2: 0.3, 3: 0.35, 4: 0.5, 5: 0.6, 6: 0.7, 7: 0.8, 8: 0.8}
_SHARES = 24
_REFINEMENTS = 3


def mse(
    weight: Array, grid: Grid = INT8, *, second_moment: Array | None = None, least_scales: Array | None = None
) -> GridWeight:
    """Round to the grid whose scales (and zero points) lose least, block by block.

    Scales below the spanning one are tried, which cut off extremes for a finer grid; the best is then refined by least
    squares. Each input's error counts by its E[x²], where H is known.

    Args:
        weight: [outputs, inputs], finite floats.
        grid: The grid.
        second_moment: H as `output_error` takes it.
        least_scales: As `round_to_nearest` takes it.
    """
    matrix = weight.astype(np.float32, copy=False)
    scales, zero_points = searched(matrix, grid, importance(second_moment, len(matrix)))
    scales, raised = raised_to(matrix, scales, least_scales)
    return finish(matrix, grid, scales, zero_points, second_moment, raised)


def searched(matrix: Array, grid: Grid, weights: Array | None = None) -> tuple[Array, Array | None]:
    """Return the scales, and zero points if the grid has any, that make the least squared error in each block.

    Args:
        matrix: float32 [outputs, inputs].
        grid: The grid.
        weights: float32 [1 or outputs, inputs]: what each squared error counts; all alike by default.
    """
    if grid.tensor:
        whole = replace(grid, tensor=False)
        every = None if weights is None else np.broadcast_to(weights, matrix.shape).reshape(1, -1)
        return best_scales(matrix.reshape(1, -1), every, grid=whole)
    parts = by_rows(best_scales, matrix, weights, grid=grid)
    zero_points = [part[1] for part in parts if part[1] is not None]
    return np.concatenate([part[0] for part in parts]), np.concatenate(zero_points) if zero_points else None


def best_scales(matrix: Array, weights: Array | None = None, *, grid: Grid) -> tuple[Array, Array | None]:
    """Return the scales and zero points [outputs, blocks] of the least weighted squared error in each block.

    Args:
        matrix: float32 [outputs, inputs].
        weights: float32 [1 or outputs, inputs], what each squared error counts; None for all alike.
        grid: The grid; without ``tensor``.
    """
    cut = blocked(matrix, grid)
    counts = None if weights is None else blocked(weights, grid)
    low, high = cut.min(axis=-1, initial=0.0), cut.max(axis=-1, initial=0.0)
    best = _Best(cut, counts, grid)
    # The scale that reaches the extreme by the highest code is larger than the spanning one, by the lowest.
    most = grid.lowest / -grid.highest if grid.mirrored else 1.0
    for share in np.linspace(most, _LEAST_SHARE[grid.bits], _SHARES, dtype=np.float32):
        scales, zero_points = reaching(low * share, high * share, grid)
        best.offer(scales, zero_points)
        if zero_points is not None:
            best.offer(scales, np.minimum(zero_points + 1, np.float32(grid.highest)))
            best.offer(scales, np.maximum(zero_points - 1, np.float32(0)))
        elif grid.mirrored:
            best.offer(-scales, None)
    for _ in range(_REFINEMENTS):
        best.refine()
    return best.scales, best.zero_points


class _Best:
    """The best scales found so far, block by block.

    Args:
        cut: The matrix as [outputs, blocks, block].
        counts: What each squared error counts, [1 or outputs, blocks, block], or None.
        grid: The grid.
    """

    def __init__(self, cut: Array, counts: Array | None, grid: Grid) -> None:
        self.cut, self.counts, self.grid = cut, counts, grid
        self.errors = np.full(cut.shape[:2], np.inf, np.float32)
        self.scales = np.ones(cut.shape[:2], np.float32)
        self.zero_points: Array | None = None if grid.symmetric else np.zeros(cut.shape[:2], np.float32)

    def offer(self, scales: Array, zero_points: Array | None) -> None:
        """Take scales and zero points over where they lose less than those so far."""
        difference = self._levels(scales, zero_points)
        difference *= scales[..., None]
        difference -= self.cut
        errors = self._weighted(difference, difference)
        better = errors < self.errors
        np.copyto(self.errors, errors, where=better)
        np.copyto(self.scales, scales, where=better)
        if self.zero_points is not None and zero_points is not None:
            np.copyto(self.zero_points, zero_points, where=better)

    def refine(self) -> None:
        """Offer the scales that are best for the present codes, and zero points beside the present ones."""
        for shift in (0,) if self.zero_points is None else (0, -1, 1):
            zero_points = self.zero_points
            if zero_points is not None:
                zero_points = np.clip(zero_points + np.float32(shift), 0, self.grid.highest)
            levels = self._levels(self.scales, zero_points)
            square = self._weighted(levels, levels)
            fitted = self._weighted(levels, self.cut) / np.where(square > 0, square, np.float32(1.0))
            usable = (square > 0) & (fitted * self.scales > 0)
            magnitude = positive(np.abs(np.where(usable, fitted, self.scales)))
            self.offer(np.copysign(magnitude, self.scales), zero_points)

    def _levels(self, scales: Array, zero_points: Array | None) -> Array:
        """Return codes − zero points of the nearest grid values, as floats."""
        lowest, highest = self.grid.lowest, self.grid.highest
        levels = self.cut * (np.float32(1.0) / scales)[..., None]
        np.rint(levels, out=levels)
        if zero_points is None:
            return np.clip(levels, lowest, highest, out=levels)
        return np.clip(levels, (lowest - zero_points)[..., None], (highest - zero_points)[..., None], out=levels)

    def _weighted(self, one: Array, other: Array) -> Array:
        if self.counts is None:
            total: Array = np.einsum("obi,obi->ob", one, other)
        else:
            total = np.einsum("obi,obi,obi->ob", one, other, np.broadcast_to(self.counts, one.shape))
        return total
