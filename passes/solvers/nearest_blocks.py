"""Rounding to nearest in blocks at the speed of memory: each number is fetched once, in the order it is stored."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np

from graphopt.backend import Array

from .objective import sum_of_squares
from .rows import ELEMENTS

if TYPE_CHECKING:
    from .grid import Grid

Reaching = Callable[[Array, Array, "Grid"], tuple[Array, Array | None]]


def nearest_in_blocks(matrix: Array, grid: Grid, reaching: Reaching) -> tuple[Array, Array, Array | None, float]:
    """Return codes [outputs, inputs], scales and zero points [outputs, blocks], and the sum of squared errors.

    Weights of products are stored with outputs running fastest, tables with inputs; codes come in the same order, so
    that nothing is read or written across memory.

    Args:
        matrix: float32 [outputs, inputs], inputs a multiple of the block; contiguous either way. Where it holds NaN
            or infinity, the error is not finite.
        grid: A grid with blocks.
        reaching: Gives scales and zero points for the extremes of blocks.
    """
    block = grid.block or matrix.shape[1]
    outputs_fastest = not matrix.flags.c_contiguous
    stored = matrix.T if outputs_fastest else matrix
    # [blocks, block, outputs] or [outputs, blocks, block]
    shape = (-1, block, stored.shape[1]) if outputs_fastest else (stored.shape[0], -1, block)
    cut = stored.reshape(shape)
    axis = 1 if outputs_fastest else 2
    codes = np.empty(cut.shape, grid.dtype)
    per_block = (cut.shape[0], 1, cut.shape[2]) if outputs_fastest else (*cut.shape[:2], 1)
    scales = np.empty(per_block, np.float32)
    zeros = None if grid.symmetric else np.empty(per_block, np.float32)
    step = max(ELEMENTS // (cut.shape[1] * cut.shape[2]), 1)
    starts = range(0, len(cut), step)

    def work(own: range) -> float:
        levels = np.empty((min(step, len(cut)), *cut.shape[1:]), np.float32)
        error = 0.0
        for start in own:
            part = slice(start, start + step)
            with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity make the error what they are
                error += _round(cut[part], levels, axis, grid, reaching, codes[part], scales[part], zeros, part)
        return error

    threads = min(len(starts), os.cpu_count() or 1)
    if threads > 1:
        with ThreadPoolExecutor(threads) as pool:
            error = sum(pool.map(work, [starts[place::threads] for place in range(threads)]))
    else:
        error = work(starts)
    if outputs_fastest:
        flat = None if zeros is None else np.ascontiguousarray(zeros[:, 0].T)
        return codes.reshape(stored.shape).T, np.ascontiguousarray(scales[:, 0].T), flat, error
    return codes.reshape(stored.shape), scales[..., 0], None if zeros is None else zeros[..., 0], error


def _round(
    cut: Array,
    buffer: Array,
    axis: int,
    grid: Grid,
    reaching: Reaching,
    codes: Array,
    scales: Array,
    zeros: Array | None,
    part: slice,
) -> float:
    """Round one part into the arrays given, and return its squared error."""
    low, high = (extreme(axis=axis, keepdims=True, initial=0.0) for extreme in (cut.min, cut.max))
    own, shift = reaching(low, high, grid)
    scales[...] = own
    levels = np.divide(cut, own, out=buffer[: len(cut)])
    if zeros is not None and shift is not None:
        zeros[part] = shift
        levels += shift
    np.rint(levels, out=levels)
    np.maximum(levels, np.float32(grid.lowest), out=levels)
    np.minimum(levels, np.float32(grid.highest), out=levels)
    np.copyto(codes, levels, casting="unsafe")
    if shift is not None:
        levels -= shift
    levels *= own
    levels -= cut
    return sum_of_squares(levels.reshape(-1))
