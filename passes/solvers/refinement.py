"""Refinement: codes and scales of a solution moved, one at a time, as long as the layer's output comes nearer."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt.backend import Array

from .grid import SMALLEST_SCALE, GridWeight
from .objective import DAMPING, by_group, output_error
from .rounding import levels_of, swept

# Rounds of scales and codes. The first gives most of it, a third next to nothing.
_ROUNDS = 2
# Numbers held at a time while scales are fitted.
_ELEMENTS = 1 << 24
# A fitted scale further from the present one than this share of it is noise of a system that says little about it.
_FURTHEST = 0.5
# Share of the mean of a system's diagonal that holds scales to where they are.
_HOLD = 1e-4


def refine(weight: Array, found: GridWeight, second_moment: Array, *, damping: float = DAMPING) -> GridWeight:
    """Return a solution at least as good, from one that a solver found.

    In turn, the scales of each output are fitted to its codes, all at once, by the normal equations of the objective;
    and each code is moved to the best there is while all others stay. That is coordinate descent on tr(Δ H Δᵀ), as in
    Behdin et al., QuantEase: Optimization-based Quantization for Language Models, 2023; the scales are this project's.

    Args:
        weight: [outputs, inputs], finite floats.
        found: The solution to begin with, of this weight.
        second_moment: H = E[x xᵀ], [inputs, inputs] or [groups, inputs, inputs].
        damping: Share of the mean of H's diagonal that is added to the diagonal.
    """
    matrix = weight.astype(np.float32, copy=False)
    grouped = by_group(matrix, second_moment)
    moments = np.asarray(second_moment, np.float32).reshape(len(grouped), *second_moment.shape[-2:])
    outputs = grouped.shape[1]
    codes, scales = found.codes.copy(), found.scales.copy()
    for group, (rows, moment) in enumerate(zip(grouped, moments, strict=True)):
        part = slice(group * outputs, (group + 1) * outputs)
        mean = np.diagonal(moment).mean() or np.float32(1)
        damped = moment + np.float32(damping) * mean * np.eye(len(moment), dtype=np.float32)
        own = slice(None) if found.grid.tensor else part
        zeros = None if found.zero_points is None else found.zero_points[own]
        start = replace(found, codes=codes[part], scales=scales[own], zero_points=zeros)
        better = _refined(rows, start, damped)
        codes[part] = better.codes
        if not found.grid.tensor:
            scales[part] = better.scales
    error = output_error(matrix - found.grid.decode(codes, scales, found.zero_points), second_moment)
    return replace(found, codes=codes, scales=scales, error=error) if error < found.error else found


def _refined(rows: Array, found: GridWeight, moment: Array) -> GridWeight:
    for _ in range(_ROUNDS):
        if not found.grid.tensor:
            found = replace(found, scales=_fitted(rows, found, moment))
        found = replace(found, codes=swept(rows, found, moment))
    return found


def _fitted(rows: Array, found: GridWeight, moment: Array) -> Array:
    """Return the scales of the least error for the present codes; of an output that gains nothing, the present ones."""
    levels = levels_of(found)
    outputs, inputs = levels.shape
    blocks, block = found.scales.shape[1], found.grid.block or inputs
    scales = found.scales.copy()
    step = max(_ELEMENTS // (blocks * inputs), 1)
    starts = np.arange(0, inputs, block)
    for first in range(0, outputs, step):
        part = slice(first, first + step)
        own = levels[part]
        # products[o, b] = (levels of block b) H, for every output o
        products = np.stack([own[:, at : at + block] @ moment[at : at + block] for at in starts], axis=1)
        system = np.add.reduceat(products * own[:, None], starts, axis=2)
        wanted = np.einsum("obi,oi->ob", products, rows[part])
        hold = np.float32(_HOLD) * np.einsum("obb->o", system)[:, None] / blocks + np.float32(SMALLEST_SCALE)
        system += hold[..., None] * np.eye(blocks, dtype=np.float32)
        solved = np.linalg.solve(system, (wanted + hold * scales[part])[..., None])[..., 0]
        near = np.abs(solved - scales[part]) < _FURTHEST * np.abs(scales[part])
        scales[part] = np.where(near, solved, scales[part])
    better = _costs(rows, levels, scales, found, moment) < _costs(rows, levels, found.scales, found, moment)
    return np.where(better[:, None], scales, found.scales)


def _costs(rows: Array, levels: Array, scales: Array, found: GridWeight, moment: Array) -> Array:
    """Return the error of each output."""
    difference = rows - levels * found.grid.spread(scales, levels.shape[1])
    costs: Array = np.einsum("oi,oi->o", difference @ moment, difference)
    return costs
