"""Rounding by coordinate descent: codes changed one column after the other until no change helps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt.backend import Array

from .grid import Grid, GridWeight
from .objective import DAMPING, by_group, output_error

# Sweeps over all columns; few codes still move after the third.
_SWEEPS = 8
# Columns after which the gradient of all others is updated, by one matrix product.
_COLUMNS = 128
# Up to this share of the outputs it pays to pick them out.
_FEW = 0.25


def descend(weight: Array, start: GridWeight, second_moment: Array, *, damping: float = DAMPING) -> GridWeight:
    """Improve codes until no single one can be changed for the better; scales and zero points stay.

    Which way to round is a quadratic problem over codes (Nagel et al., Up or Down? Adaptive Rounding for Post-Training
    Quantization, 2020, equation 13). Coordinate descent solves it one input at a time, for all outputs at once: with
    the others fixed, the best code is the one nearest to the minimum of a parabola. So the error never grows.

    Args:
        weight: [outputs, inputs], finite floats.
        start: Codes to begin with: those of `gptq`, or rounded to nearest.
        second_moment: H = E[x xᵀ], [inputs, inputs] or [groups, inputs, inputs].
        damping: Share of the mean of H's diagonal that is added to the diagonal.

    Returns:
        The codes, and the error tr((W−Ŵ) H (W−Ŵ)ᵀ) they make, which is no larger than that of the start.
    """
    matrix = weight.astype(np.float32, copy=False)
    codes = start.codes.copy()
    grouped = by_group(matrix, second_moment)
    moments = second_moment.reshape(len(grouped), *second_moment.shape[-2:])
    outputs, inputs = grouped.shape[1:]
    for group, (rows, moment) in enumerate(zip(grouped, moments, strict=True)):
        part = slice(group * outputs, (group + 1) * outputs)
        mean = np.float32(np.diagonal(moment).mean()) or np.float32(1)
        damped = moment.astype(np.float32) + np.float32(damping) * mean * np.eye(inputs, dtype=np.float32)
        codes[part] = swept(rows, _part_of(start, part), damped, sweeps=_SWEEPS)
    found = replace(start, codes=codes)
    error = output_error(matrix - found.values(), second_moment)
    before = output_error(matrix - start.values(), second_moment)
    return replace(found, error=error) if error <= before else replace(start, error=before)


def _part_of(start: GridWeight, part: slice) -> GridWeight:
    """Return the rows of a solution that a slice takes; what all outputs share stays."""
    own = slice(None) if start.grid.tensor else part
    zeros = None if start.zero_points is None else start.zero_points[own]
    return replace(start, codes=start.codes[part], scales=start.scales[own], zero_points=zeros)


def swept(rows: Array, found: GridWeight, moment: Array, *, sweeps: int = 1) -> Array:
    """Return codes, each in turn the best while the others stay; by columns, those of the largest inputs first.

    Args:
        rows: W, float32 [outputs, inputs], of one group.
        found: Codes to begin with, and their scales.
        moment: H, float32 [inputs, inputs]; no number on its diagonal is zero.
        sweeps: The most sweeps over all columns; none follows one that changed nothing.
    """
    grid, inputs = found.grid, rows.shape[1]
    order = np.argsort(-np.diagonal(moment), kind="stable")
    permuted = moment[np.ix_(order, order)]
    levels = np.ascontiguousarray(levels_of(found).T[order])
    pruned = rows.T[order] == 0  # stays zero, once it is
    scales = np.broadcast_to(grid.spread(found.scales, inputs), rows.shape).T[order]
    zeros = np.zeros_like(levels)
    if found.zero_points is not None:
        zeros = np.broadcast_to(grid.spread(found.zero_points, inputs), rows.shape).T[order].astype(np.float32)
    # gradient[j] = (Δ H)ⱼ of every output, kept up to date
    gradient = permuted @ (rows.T[order] - levels * scales)
    for left in reversed(range(sweeps)):
        if not _sweep(levels, gradient, scales, zeros, pruned, permuted, grid, again=left > 0):
            break
    codes = np.empty_like(found.codes)
    codes[:, order] = (levels + zeros).T.astype(grid.dtype)
    return codes


def _sweep(
    levels: Array,
    gradient: Array,
    scales: Array,
    zeros: Array,
    pruned: Array,
    moment: Array,
    grid: Grid,
    *,
    again: bool,
) -> bool:
    """Move levels [inputs, outputs] in place, and return whether any moved; the gradient too, for the next sweep."""
    inputs, any_moved = len(levels), False
    for start in range(0, inputs, _COLUMNS):
        end = min(start + _COLUMNS, inputs)
        local, moved = gradient[start:end], np.zeros((end - start, levels.shape[1]), np.float32)
        for column in range(start, end):
            scale = scales[column]
            best = levels[column] + local[column - start] / (moment[column, column] * scale)
            best = np.clip(np.rint(best), grid.lowest - zeros[column], grid.highest - zeros[column])
            np.copyto(best, levels[column], where=pruned[column] & (levels[column] == 0))
            change = best - levels[column]
            outputs = _some_or_all(change)
            if outputs is None:
                continue
            moved[column - start] = change * scale
            levels[column] = best
            local[:, outputs] -= moment[start:end, column, None] * moved[column - start, outputs]
        outputs = _some_or_all(np.any(moved, axis=0, keepdims=True)[0])
        if outputs is None:
            continue
        any_moved = True
        for part in (slice(0, start if again else 0), slice(end, None)):
            gradient[part, outputs] -= moment[part, start:end] @ moved[:, outputs]
    return any_moved


def _some_or_all(moves: Array) -> Array | slice | None:
    """Return which outputs move: their places where they are few, else all; None for none."""
    places = np.flatnonzero(moves)
    if not len(places):
        return None
    return places if len(places) < len(moves) * _FEW else slice(None)


def levels_of(found: GridWeight) -> Array:
    """Return codes − zero points, float32 [outputs, inputs]."""
    return found.grid.decode(found.codes, np.ones_like(found.scales), found.zero_points)
