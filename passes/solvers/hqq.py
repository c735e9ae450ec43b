"""HQQ: zero points found without data, for a norm that lets few weights err much."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array

from .grid import Grid, GridWeight, blocked, finish, spanning
from .rows import by_rows

# Of the paper: the norm |·|^p of the error, the weight β of the split, its growth κ, and the number of iterations.
_NORM = 0.7
_WEIGHT, _GROWTH = 10.0, 1.01
_ITERATIONS = 20
# Errors below this share of a step count as none, and keep the threshold finite.
_SMALLEST_STEP = 1e-6


def hqq(weight: Array, grid: Grid, *, second_moment: Array | None = None) -> GridWeight:
    """Move zero points and scales until the lᵖ norm of the error, p < 1, is least.

    Half-quadratic quantization (Badri and Shaji, Half-Quadratic Quantization of Large Machine Learning Models, 2023):
    the error is split into a sparse part, by shrinkage, and a rest that the grid takes up in closed form. Errors are
    counted in steps of the grid, so that the split does not depend on how large weights are. Zero points stay whole
    numbers, as runtimes store them, for which they alone would hardly move: scales are fitted as well. What is kept is
    the best iterate of each block.

    Args:
        weight: [outputs, inputs], finite floats.
        grid: The grid; one scale for a whole tensor is left as it spans it.
        second_moment: H as `output_error` takes it; only the error that is predicted depends on it.
    """
    matrix = weight.astype(np.float32, copy=False)
    scales, zero_points = spanning(matrix, grid)
    if not grid.tensor:
        parts = by_rows(_halved, matrix, scales, zero_points, grid=grid)
        scales = np.concatenate([part[0] for part in parts])
        zero_points = None if zero_points is None else np.concatenate([part[1] for part in parts])
    return finish(matrix, grid, scales, zero_points, second_moment)


def _halved(matrix: Array, scales: Array, zero_points: Array | None, *, grid: Grid) -> tuple[Array, Array]:
    """Return scales and zero points (zeros on a symmetric grid) after the iterations, the best of each block."""
    cut = blocked(matrix, grid)
    zeros = np.zeros_like(scales) if zero_points is None else zero_points
    best_scales, best_zeros = scales, zeros
    least = np.full(scales.shape, np.inf, np.float32)
    weight = _WEIGHT
    for _ in range(_ITERATIONS):
        steps = cut / scales[..., None]
        codes = np.clip(np.rint(steps + zeros[..., None]), grid.lowest, grid.highest)
        error = steps - (codes - zeros[..., None])
        loss = np.sum(np.abs(error) ** np.float32(_NORM), axis=-1) * np.abs(scales) ** np.float32(_NORM)
        better = loss < least
        least = np.where(better, loss, least)
        best_scales, best_zeros = np.where(better, scales, best_scales), np.where(better, zeros, best_zeros)
        rest = steps - _shrunk(error, weight)
        if zero_points is not None:
            moved = np.rint(np.mean(codes - rest, axis=-1))
            zeros = np.clip(moved, grid.lowest, grid.highest).astype(np.float32)
        scales = _fitted(codes - zeros[..., None], rest, scales)
        weight *= _GROWTH
    return best_scales, best_zeros


def _fitted(levels: Array, steps: Array, scales: Array) -> Array:
    """Return the scales with which levels come nearest to weights given in steps of the present scales."""
    square = np.sum(levels * levels, axis=-1)
    ratio = np.sum(levels * steps, axis=-1) / np.where(square > 0, square, np.float32(1))
    return np.where((square > 0) & (ratio > 0), scales * ratio, scales)


def _shrunk(error: Array, weight: float) -> Array:
    """Return the sparse part of an error: the generalised soft threshold of the paper."""
    magnitude = np.abs(error)
    threshold = np.power(np.maximum(magnitude, np.float32(_SMALLEST_STEP)), np.float32(_NORM - 1)) / np.float32(weight)
    return np.sign(error) * np.maximum(magnitude - threshold, np.float32(0))
