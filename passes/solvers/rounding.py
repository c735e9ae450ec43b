"""Rounding by coordinate descent: codes changed one column after the other until no change helps."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt.backend import Array

from .grid import GridWeight
from .objective import DAMPING, by_group, output_error

# Sweeps over all columns; few codes still move after the third.
_SWEEPS = 8


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
    scales = np.broadcast_to(start.grid.spread(start.scales, inputs), matrix.shape)
    for group, moment in enumerate(moments):
        part = slice(group * outputs, (group + 1) * outputs)
        mean = np.float32(np.diagonal(moment).mean()) or np.float32(1)
        damped = moment.astype(np.float32) + np.float32(damping) * mean * np.eye(inputs, dtype=np.float32)
        values = start.grid.decode(start.codes, start.scales, start.zero_points)[part]
        _sweep(codes[part], values - matrix[part], scales[part], damped, start)
    found = replace(start, codes=codes)
    error = output_error(matrix - found.values(), second_moment)
    before = output_error(matrix - start.values(), second_moment)
    return replace(found, error=error) if error <= before else replace(start, error=before)


def _sweep(codes: Array, difference: Array, scales: Array, moment: Array, start: GridWeight) -> None:
    """Change codes [outputs, inputs] in place; the difference is Ŵ − W."""
    gradient = difference @ moment
    diagonal = np.diagonal(moment)
    for _ in range(_SWEEPS):
        moved = False
        for column in range(codes.shape[1]):
            steps = np.rint(-gradient[:, column] / (diagonal[column] * scales[:, column]))
            wanted = np.clip(codes[:, column] + steps, start.grid.lowest, start.grid.highest)
            change = wanted - codes[:, column]
            rows = np.flatnonzero(change)
            if not len(rows):
                continue
            moved = True
            codes[rows, column] = wanted[rows].astype(codes.dtype)
            shift = (change[rows] * scales[rows, column]).astype(np.float32)
            gradient[rows] += shift[:, None] * moment[column]
        if not moved:
            return
