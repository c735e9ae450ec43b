"""GPTQ: weights rounded column by column, each rounding error made up for by the columns still to come."""

from __future__ import annotations

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
    2023), with scales that lose least (`searched`) instead of the spanning ones.

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
    weights = importance(second_moment, len(matrix))
    scales, zero_points = searched(matrix, grid, weights)
    scales, raised = raised_to(matrix, scales, least_scales)
    grouped = by_group(matrix, second_moment)
    moments = np.asarray(second_moment, np.float32).reshape(len(grouped), *second_moment.shape[-2:])
    order = _orders(moments, by_importance=by_importance)
    codes = np.empty(grouped.shape, grid.dtype)
    outputs = grouped.shape[1]
    follow = not by_importance and grid.block is not None
    for group, (rows, moment) in enumerate(zip(grouped, moments, strict=True)):
        part = slice(None) if len(scales) == 1 else slice(group * outputs, (group + 1) * outputs)
        zeros = None if zero_points is None else zero_points[part]
        sweep = _Sweep(grid, scales[part], zeros, weights if follow else None)
        codes[group] = sweep.run(rows, moment, order[group], damping)
    flat = codes.reshape(matrix.shape)
    difference = matrix - grid.decode(flat, scales, zero_points)
    stored = None if zero_points is None else zero_points.astype(np.uint8)
    solution = GridWeight(grid, flat, scales, stored, output_error(difference, second_moment), raised)
    nearest = finish(matrix, grid, *_settled(matrix, grid, weights, least_scales), second_moment, raised)
    # On tiny layers the sweep may end worse than it began: its last columns have nothing left to make up for them.
    return solution if solution.error <= nearest.error else nearest
