"""GPTQ: weights rounded column by column, each rounding error made up for by the columns still to come."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt.backend import Array

from .grid import Grid, GridWeight, finish, raised_to
from .objective import DAMPING, by_group, importance, output_error
from .scale_search import searched

# Columns after which the errors so far are carried over to all columns left, by one matrix product.
_COLUMNS = 64
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
    2023), with scales that lose least (`scale_search.mse`) instead of the spanning ones, written as the equivalent LDLQ
    (Chee et al., QuIP: 2-Bit Quantization of Large Language Models With Guarantees, 2023), which needs no inverse of
    H. Never worse, by the predicted error, than rounding to nearest with the same scales.

    Args:
        weight: [outputs, inputs], finite floats.
        grid: The grid.
        second_moment: H = E[x xᵀ], [inputs, inputs] or [groups, inputs, inputs]. Or [blocks, inputs of a block, inputs
            of a block], where H is taken for zero between blocks of consecutive inputs; the grid has no blocks then.
        damping: Share of the mean of H's diagonal that is added to the diagonal.
        by_importance: Whether inputs with the largest E[x²] are rounded first, while most columns are left to make up
            for it; scales are then those of the weight as it came. Else columns go in order, and the scales of a block
            are searched when the sweep reaches it.
        least_scales: As `round_to_nearest` takes it.
    """
    matrix = weight.astype(np.float32, copy=False)
    outputs, inputs = matrix.shape
    blocks = inputs // max(second_moment.shape[-1], 1)
    if blocks > 1:
        seen = np.diagonal(second_moment, axis1=-2, axis2=-1).reshape(1, -1)
        scales, zero_points = searched(matrix, grid, _damped(seen))
    else:
        scales, zero_points = searched(matrix, grid, importance(second_moment, outputs))
    scales, raised = raised_to(matrix, scales, least_scales)
    if blocks <= 1:
        return replace(_swept(matrix, grid, scales, zero_points, second_moment, damping, by_importance), raised=raised)
    # What one block of inputs adds to an output, the other blocks know nothing of: so many outputs of their own.
    apart = matrix.reshape(outputs, blocks, -1).transpose(1, 0, 2).reshape(blocks * outputs, -1)
    repeated = [None if one is None or len(one) == 1 else np.tile(one, (blocks, 1)) for one in (scales, zero_points)]
    own = [one if many is None else many for one, many in zip((scales, zero_points), repeated, strict=True)]
    assert own[0] is not None, "there are scales"
    found = _swept(apart, grid, own[0], own[1], second_moment, damping, by_importance=True)
    codes = found.codes.reshape(blocks, outputs, -1).transpose(1, 0, 2).reshape(outputs, inputs)
    stored = None if zero_points is None else zero_points.astype(np.uint8)
    return replace(found, codes=codes, scales=scales, zero_points=stored, raised=raised)


def _damped(squares: Array) -> Array:
    """Return E[x²] of all inputs, [1, inputs], as `importance` counts them."""
    mean = squares.mean(axis=-1, keepdims=True)
    return np.asarray(squares + np.float32(DAMPING) * mean, np.float32)


def _swept(
    matrix: Array,
    grid: Grid,
    scales: Array,
    zero_points: Array | None,
    second_moment: Array,
    damping: float,
    by_importance: bool,
) -> GridWeight:
    """Return the codes the sweep finds, or the nearest ones where those are better."""
    nearest = finish(matrix, grid, scales, zero_points, second_moment)
    grouped = by_group(matrix, second_moment)
    groups, outputs, _ = grouped.shape
    moments = second_moment.reshape(groups, *second_moment.shape[-2:])
    each = np.repeat(scales, len(matrix), axis=0) if len(scales) < len(matrix) else scales.copy()
    zeros = None if zero_points is None else np.broadcast_to(zero_points, each.shape).copy()
    grouped_zeros = None if zeros is None else zeros.reshape(groups, outputs, -1)
    sweep = _Sweep(grid, each.reshape(groups, outputs, -1), grouped_zeros)
    codes = sweep.run(grouped, moments, damping, by_importance=by_importance).reshape(matrix.shape)
    if len(scales) == len(matrix):
        scales, zero_points = each, zeros
    error = output_error(matrix - grid.decode(codes, scales, zero_points), second_moment)
    if error > nearest.error:  # where few columns are left, or H is all noise, nothing makes up for the last errors
        return nearest
    stored = None if zero_points is None else zero_points.astype(np.uint8)
    return replace(nearest, codes=codes, scales=scales, zero_points=stored, error=error)


class _Sweep:
    """The sweep over the columns, of all groups at once.

    Args:
        grid: The grid.
        scales: float32 [groups, outputs, blocks]; those of a block are replaced when columns go in order.
        zero_points: The same, or None.
    """

    def __init__(self, grid: Grid, scales: Array, zero_points: Array | None) -> None:
        self.grid, self.scales, self.zero_points = grid, scales, zero_points

    def run(self, rows: Array, second_moments: Array, damping: float, *, by_importance: bool) -> Array:
        """Return the codes of rows [groups, outputs, inputs]."""
        groups, outputs, inputs = rows.shape
        order = np.broadcast_to(np.arange(inputs), (groups, inputs))
        if by_importance:
            order = np.argsort(-np.diagonal(second_moments, axis1=1, axis2=2), axis=1, kind="stable")
        factors = np.stack(
            [upper_factor(h[np.ix_(at, at)], damping) for h, at in zip(second_moments, order, strict=True)]
        )
        ends = np.diagonal(factors, axis1=1, axis2=2).copy()
        feedback = factors / ends[:, None]  # how much of an earlier column's error each column makes up for
        block = self.grid.block or inputs
        searches = not by_importance and self.grid.block is not None
        # A block at a time, so that a block's columns are up to date when its scales are searched.
        step = block if searches else _COLUMNS
        # By columns: what a step touches lies together.
        wanted = np.take_along_axis(rows.transpose(0, 2, 1), order[:, :, None], axis=1)
        codes = np.empty((groups, inputs, outputs), self.grid.dtype)
        every = np.arange(groups)
        left = wanted.copy()
        for start in range(0, inputs, step):
            end = min(start + step, inputs)
            if searches:
                self._search(left[:, start:end], np.square(ends[:, start:end]), start // block)
            errors = np.empty((groups, end - start, outputs), np.float32)
            for place, column in enumerate(range(start, end)):
                target = left[:, column]
                if place:
                    target = target + (feedback[:, None, start:column, column] @ errors[:, :place])[:, 0]
                # What was pruned stays zero, and makes up for nothing.
                target = np.where(wanted[:, column] == 0, np.float32(0), target)
                code, value = self._round(target, order[:, column] // block)
                codes[every, order[:, column]] = code
                np.subtract(wanted[:, column], value, out=errors[:, place])
            if end < inputs:
                left[:, end:] += feedback[:, start:end, end:].transpose(0, 2, 1) @ errors
        return codes.transpose(0, 2, 1)

    def _search(self, columns: Array, cost: Array, block: int) -> None:
        for group, (own, counts) in enumerate(zip(columns, cost, strict=True)):
            scales, zero_points = searched(np.ascontiguousarray(own.T), replace(self.grid, block=None), counts[None])
            self.scales[group, :, block] = scales[:, 0]
            if self.zero_points is not None and zero_points is not None:
                self.zero_points[group, :, block] = zero_points[:, 0]

    def _round(self, column: Array, blocks: Array) -> tuple[Array, Array]:
        """Return codes and values of one column of each group, [groups, outputs]."""
        every = np.arange(len(column))
        scales = self.scales[every, :, blocks]
        levels = column / scales
        if self.zero_points is None:
            np.rint(levels, out=levels)
            np.clip(levels, self.grid.lowest, self.grid.highest, out=levels)
            return levels.astype(self.grid.dtype), levels * scales
        zero_points = self.zero_points[every, :, blocks]
        levels = np.clip(np.rint(levels + zero_points), self.grid.lowest, self.grid.highest)
        return levels.astype(self.grid.dtype), (levels - zero_points) * scales


def upper_factor(second_moment: Array, damping: float) -> Array:
    """Return the upper triangular R, float32, with H + damping = R Rᵀ.

    The error of a row e of differences is |e R|²: column j of R, over its last number, is how much of the errors of the
    columns before j column j can make up for.

    Args:
        second_moment: H, [inputs, inputs], symmetric, no eigenvalue below zero but for rounding.
        damping: Share of the mean of the diagonal that is added to it; more, where that is not enough.
    """
    moment = second_moment.astype(np.float64)
    mean = float(np.diagonal(moment).mean()) or 1.0
    for attempt in range(_ATTEMPTS):
        damped = moment.copy()
        damped.reshape(-1)[:: len(moment) + 1] += damping * 10.0**attempt * mean
        try:
            # With rows and columns reversed, the lower triangular factor turns into an upper one.
            lower = np.linalg.cholesky(damped[::-1, ::-1])
        except np.linalg.LinAlgError:
            continue
        return np.ascontiguousarray(lower[::-1, ::-1], np.float32)
    return np.eye(len(moment), dtype=np.float32)


def inverse_factor(second_moment: Array, damping: float) -> Array:
    """Return the upper triangular U, float32, with (H + damping)⁻¹ = Uᵀ U.

    Row j of U, over its first number, is what the columns after j take of an error made in column j, the columns
    before j being settled.

    Args:
        second_moment: As `upper_factor` takes it.
        damping: Likewise.
    """
    return np.asarray(np.linalg.inv(upper_factor(second_moment, damping).astype(np.float64)), np.float32)
