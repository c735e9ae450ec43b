"""GPTQ: weights rounded column by column, each rounding error made up for by the columns still to come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt.backend import Array

from .grid import Grid, GridWeight, finish, raised_to
from .objective import DAMPING, by_group, importance, output_error
from .scale_search import searched

# Columns after which the rest of the matrix is updated, by one matrix product.
_COLUMNS = 128
# A second moment that is still not positive definite is damped ten times as much, at most this often.
_ATTEMPTS = 6


def gptq(
    weight: Array,
    grid: Grid,
    second_moment: Array,
    *,
    damping: float = DAMPING,
    by_importance: bool = True,
    least_scales: Array | None = None,
) -> GridWeight:
    """Round column by column, spreading each error over the columns left so that the layer's output changes least.

    This is OPTQ (Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers,
    2023), with scales that lose least (`scale_search.mse`) instead of the spanning ones. Never worse, by the predicted
    error, than rounding to nearest with the same scales.

    Args:
        weight: [outputs, inputs], finite floats.
        grid: The grid.
        second_moment: H = E[x xᵀ], [inputs, inputs] or [groups, inputs, inputs].
        damping: Share of the mean of H's diagonal that is added to the diagonal.
        by_importance: Whether inputs with the largest E[x²] are rounded first, while most columns are left to make up
            for it; scales are then those of the weight as it came. Else columns go in order, and the scales of a block
            are searched when the sweep reaches it.
        least_scales: As `round_to_nearest` takes it.
    """
    matrix = weight.astype(np.float32, copy=False)
    scales, zero_points = searched(matrix, grid, importance(second_moment, len(matrix)))
    scales, raised = raised_to(matrix, scales, least_scales)
    nearest = finish(matrix, grid, scales, zero_points, second_moment, raised)
    grouped = by_group(matrix, second_moment)
    moments = second_moment.reshape(len(grouped), *second_moment.shape[-2:])
    swept_scales = np.repeat(scales, len(matrix), axis=0) if len(scales) < len(matrix) else scales.copy()
    swept_zeros = None if zero_points is None else np.broadcast_to(zero_points, swept_scales.shape).copy()
    codes = np.empty(matrix.shape, grid.dtype)
    outputs = grouped.shape[1]
    for group, (rows, moment) in enumerate(zip(grouped, moments, strict=True)):
        part = slice(group * outputs, (group + 1) * outputs)
        sweep = _Sweep(grid, swept_scales[part], None if swept_zeros is None else swept_zeros[part])
        codes[part] = sweep.run(rows, moment, damping, by_importance=by_importance)
    if len(scales) == len(matrix):
        scales, zero_points = swept_scales, swept_zeros
    error = output_error(matrix - grid.decode(codes, scales, zero_points), second_moment)
    if error > nearest.error:  # where few columns are left, or H is all noise, nothing makes up for the last errors
        return nearest
    stored = None if zero_points is None else zero_points.astype(np.uint8)
    return replace(nearest, codes=codes, scales=scales, zero_points=stored, error=error)


class _Sweep:
    """The sweep over the columns of one group.

    Args:
        grid: The grid.
        scales: float32 [outputs, blocks]; those of a block are replaced when columns go in order.
        zero_points: The same, or None.
    """

    def __init__(self, grid: Grid, scales: Array, zero_points: Array | None) -> None:
        self.grid, self.scales, self.zero_points = grid, scales, zero_points

    def run(self, rows: Array, second_moment: Array, damping: float, *, by_importance: bool) -> Array:
        """Return the codes of rows [outputs, inputs]."""
        inputs = rows.shape[1]
        order = np.arange(inputs)
        if by_importance:
            order = np.argsort(-np.diagonal(second_moment), kind="stable")
        factor = inverse_factor(second_moment[np.ix_(order, order)], damping)
        block = self.grid.block or inputs
        cost = 1.0 / np.square(np.diagonal(factor))[None]  # what an error of each column costs in the end
        searches = not by_importance and self.grid.block is not None
        # Whole blocks at a time, so that a block's columns are up to date when its scales are searched.
        step = max(_COLUMNS // block, 1) * block if searches else _COLUMNS
        left = np.ascontiguousarray(rows.T[order])  # by columns: what a step touches lies together
        codes = np.empty((inputs, len(rows)), self.grid.dtype)
        for start in range(0, inputs, step):
            end = min(start + step, inputs)
            errors = np.empty((end - start, len(rows)), np.float32)
            for column in range(start, end):
                if searches and column % block == 0:
                    self._search(left[column : column + block].T, cost[:, column : column + block], column // block)
                code, value = self._round(left[column], order[column] // block)
                codes[order[column]] = code
                error = (left[column] - value) / factor[column, column]
                left[column + 1 : end] -= factor[column, column + 1 : end, None] * error
                errors[column - start] = error
            left[end:] -= factor[start:end, end:].T @ errors
        return codes.T

    def _search(self, columns: Array, cost: Array, block: int) -> None:
        scales, zero_points = searched(columns, replace(self.grid, block=None), cost)
        self.scales[:, block] = scales[:, 0]
        if self.zero_points is not None and zero_points is not None:
            self.zero_points[:, block] = zero_points[:, 0]

    def _round(self, column: Array, block: int) -> tuple[Array, Array]:
        """Return codes and values of one column."""
        scales = self.scales[:, block]
        zero_points = np.float32(0) if self.zero_points is None else self.zero_points[:, block]
        codes = np.clip(np.rint(column / scales + zero_points), self.grid.lowest, self.grid.highest)
        return codes.astype(self.grid.dtype), (codes - zero_points) * scales


def inverse_factor(second_moment: Array, damping: float) -> Array:
    """Return the upper triangular U, float32, with (H + damping)⁻¹ = Uᵀ U.

    Row j of U, over its first number, is what the columns after j take of an error made in column j, the columns
    before j being settled.

    Args:
        second_moment: H, [inputs, inputs], symmetric, no eigenvalue below zero but for rounding.
        damping: Share of the mean of the diagonal that is added to it; more, where that is not enough.
    """
    moment = second_moment.astype(np.float64)
    mean = float(np.diagonal(moment).mean()) or 1.0
    identity = np.eye(len(moment))
    for attempt in range(_ATTEMPTS):
        try:
            # With rows and columns reversed, H = L Lᵀ turns into R Rᵀ with an upper R, whose inverse is U.
            lower = np.linalg.cholesky((moment + damping * 10.0**attempt * mean * identity)[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        return np.ascontiguousarray(np.linalg.inv(lower[::-1, ::-1]), np.float32)
    return np.eye(len(moment), dtype=np.float32)
