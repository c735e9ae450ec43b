"""Tables and scales fitted to codes that are settled: the objective is quadratic in either."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt.backend import Array

from .cluster_fit import Fit, in_order, rounded, zero_codes
from .cluster_sweep import Problem
from .clustered_weight import places

# Steps of conjugate gradients; with 16 entries they are nearly there.
_STEPS = 8
# A residual that small a share of the first one tells no more in float32.
_SETTLED = 1e-5
# Share of the mean of the system's diagonal added to it: entries that hardly any weight has stay where they are.
_RIDGE = 1e-6
_TINY = float(np.finfo(np.float32).tiny)


def refitted_tables(problem: Problem, fit: Fit, values: Array) -> tuple[Fit, Array]:
    """Return the tables of the least error for the present codes and scales, and what the codes stand for then.

    The normal equations of all entries together, by conjugate gradients: a step is one product with H. Entries that
    zeros are held at stay.

    Args:
        problem: What is to be come near to.
        fit: Tables, scales and codes.
        values: What the codes stand for, [outputs, inputs], weights kept apart included.
    """
    system = _Tables(problem, fit)
    residual = system.gathered(problem.times_moments(problem.weight.reshape(values.shape) - values))
    preconditioner = system.diagonal()
    preconditioner += _RIDGE * preconditioner.mean() + _TINY
    step_to = np.zeros_like(residual)
    scaled = residual / preconditioner
    direction, size = scaled, float(np.vdot(residual, scaled))
    enough = _SETTLED**2 * size
    for _ in range(_STEPS):
        if size <= enough:
            break
        image = system.gathered(problem.times_moments(system.spread(direction))) + _RIDGE * direction
        length = size / max(float(np.vdot(direction, image)), _TINY)
        step_to = step_to + length * direction
        residual = residual - length * image
        scaled = residual / preconditioner
        before, size = size, float(np.vdot(residual, scaled))
        direction = scaled + size / max(before, _TINY) * direction
    found = replace(fit, tables=(fit.tables + step_to.reshape(fit.tables.shape)).astype(np.float32))
    return in_order(found), system.with_free(found.values(), values)


class _Tables:
    """What tables are to a weight: a linear map from entries to weights, and its transpose.

    Args:
        problem: What is to be come near to.
        fit: Tables, scales and codes.
    """

    def __init__(self, problem: Problem, fit: Fit) -> None:
        self._problem, self._fit = problem, fit
        self._vector = fit.tables.shape[2]
        self._shape = (fit.tables.shape[0] * fit.tables.shape[1], self._vector)
        self._places = places(fit.codes, fit.rows, fit.tables.shape[1]).astype(np.intp)
        inputs = problem.weight.shape[2]
        self._factors = np.broadcast_to(fit.spread_scales(inputs), (len(fit.codes), inputs))
        self._free = None if problem.free is None else problem.free.reshape(self._factors.shape)
        held = np.zeros(self._shape[0], bool)
        if fit.zeros is not None:
            held[zero_codes(fit)[:: fit.rows] + np.arange(len(fit.tables)) * fit.tables.shape[1]] = True
        self._held = held

    def spread(self, entries: Array) -> Array:
        """Return what entries are as a weight, float32 [outputs, inputs]."""
        found = entries.astype(np.float32)[self._places].reshape(self._factors.shape) * self._factors
        return found if self._free is None else np.where(self._free, np.float32(0), found)

    def gathered(self, weight: Array) -> Array:
        """Return a number for each of a weight's as one for each entry, summed: float64 [entries, vector]."""
        scaled = weight * self._factors
        if self._free is not None:
            scaled[self._free] = 0
        return self._sums(scaled)

    def diagonal(self) -> Array:
        """Return what each entry costs where nothing hangs together."""
        costs = np.diagonal(self._problem.moments, axis1=1, axis2=2)[:, None]
        each = (np.square(self._factors).reshape(self._problem.weight.shape) * costs).reshape(self._factors.shape)
        if self._free is not None:
            each = np.where(self._free, np.float32(0), each)
        return self._sums(each)

    def with_free(self, values: Array, before: Array) -> Array:
        """Return values with weights kept apart as they were."""
        return values if self._free is None else np.where(self._free, before, values)

    def _sums(self, weight: Array) -> Array:
        flat, numbers = self._places.reshape(-1), weight.reshape(-1, self._vector)
        sums = np.stack([np.bincount(flat, one, self._shape[0]) for one in numbers.T], axis=1)
        sums[self._held] = 0
        return sums


def refitted_scales(problem: Problem, fit: Fit, values: Array) -> tuple[Fit, Array]:
    """Return scales of less error for the present codes and tables, and what the codes stand for then.

    Each block's in turn is the best there is while the others stay; with one block for an output that is the minimum.

    Args:
        problem: What is to be come near to.
        fit: Tables, scales and codes.
        values: What the codes stand for, [outputs, inputs], weights kept apart included.
    """
    if fit.scales is None:
        return fit, values
    inputs = values.shape[1]
    numbers = values / fit.spread_scales(inputs)
    if problem.free is not None:
        numbers = np.where(problem.free.reshape(numbers.shape), np.float32(0), numbers)
    numbers = numbers.reshape(problem.weight.shape)
    difference = problem.weight - values.reshape(problem.weight.shape)
    scales = fit.scales.copy()
    for block in range(scales.shape[1]):
        part = slice(block * fit.block, (block + 1) * fit.block)
        products = numbers[:, :, part] @ problem.moments[:, part]
        power = np.einsum("goi,goi->go", products[:, :, part], numbers[:, :, part]).reshape(-1)
        along = np.einsum("goi,goi->go", products, difference).reshape(-1)
        by = np.divide(along, power, out=np.zeros_like(along), where=power > _TINY)
        by = np.where(scales[:, block] + by > 0, by, np.float32(0))
        scales[:, block] += by
        difference[:, :, part] -= by.reshape(*numbers.shape[:2], 1) * numbers[:, :, part]
    found = replace(fit, scales=rounded(scales))
    free = None if problem.free is None else problem.free.reshape(values.shape)
    return found, found.values() if free is None else np.where(free, values, found.values())
