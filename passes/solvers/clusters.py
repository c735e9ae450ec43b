"""Clusters: a weight told by a few learned values, so that its layer's output changes least."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from graphopt.backend import Array

from .cluster_fit import Fit, fitted
from .cluster_refit import refitted_scales, refitted_tables
from .cluster_sweep import Problem, descended, swept
from .clustered_weight import ClusteredWeight, Clustering
from .objective import by_group, importance, output_error

__all__ = ["ClusteredWeight", "Clustering", "clustered"]

# Rounds of tables, scales and codes; the first three give most of it.
_ROUNDS = 6
# A round that lowers the error by less than this share of it is the last.
_SETTLED = 2e-3


def clustered(weight: Array, clustering: Clustering, second_moment: Array | None = None) -> ClusteredWeight:
    """Return tables, scales and codes of little tr((W−Ŵ) H (W−Ŵ)ᵀ).

    Weights are first seen one by one, each error costing what its input's E[x²] says (`cluster_fit`): k-means. With H
    codes are then given in a sweep that makes up for errors (`swept`), and tables, scales and codes moved in turn as
    long as the error falls. Never worse, by the predicted error, than the k-means it starts from.

    Args:
        weight: W, [outputs, inputs], finite floats.
        clustering: How it is clustered.
        second_moment: H = E[x xᵀ], [inputs, inputs] or [groups, inputs, inputs]; None stands for the identity.
    """
    matrix = weight.astype(np.float32, copy=False)
    unit = _unit(matrix)
    filled = _filled(matrix / np.float32(unit) if unit != 1 else matrix, clustering.vector)
    moments = None if second_moment is None else _filled_moments(second_moment, clustering.vector)
    costs = _costs(filled, matrix.shape[1], moments)
    fit, free = _with_outliers(filled, costs, matrix.shape[1], clustering)
    values = filled
    if moments is not None and clustering.compensated and filled.size:
        start = fit.values() if free is None else np.where(free, filled, fit.values())
        problem = Problem(by_group(filled, moments), moments.reshape(-1, *moments.shape[-2:]), free)
        fit, values = _improved(problem, fit, start)
    exact = np.zeros(0, np.float32) if free is None else values[free] * np.float32(unit)
    del filled, values
    return _finished(matrix, fit, free, exact, unit, clustering, second_moment)


def _unit(matrix: Array) -> float:
    """Return a power of two that weights are divided by to be about 1."""
    largest = float(np.abs(matrix).max(initial=0.0))
    if not largest > np.finfo(np.float32).tiny:
        return 1.0
    return float(2.0 ** np.clip(np.floor(np.log2(largest)), -120, 120))


def _filled(matrix: Array, vector: int) -> Array:
    missing = -matrix.shape[1] % vector
    return np.pad(matrix, ((0, 0), (0, missing))) if missing else matrix


def _filled_moments(second_moment: Array, vector: int) -> Array:
    missing = -second_moment.shape[-1] % vector
    moments = second_moment.astype(np.float32, copy=False)
    width = [(0, 0)] * (moments.ndim - 2) + [(0, missing)] * 2
    return np.pad(moments, width) if missing else moments


def _costs(filled: Array, inputs: int, moments: Array | None) -> Array:
    """Return what an error of each weight costs, [1 or outputs, inputs]; nothing where only filled up."""
    seen = importance(moments, len(filled))
    if seen is None or not float(seen.max(initial=0.0)) > 0:
        seen = np.ones((1, filled.shape[1]), np.float32)
    costs = seen / np.float32(seen.max(initial=0.0) or 1.0)
    costs[:, inputs:] = 0
    return costs


def _with_outliers(filled: Array, costs: Array, inputs: int, clustering: Clustering) -> tuple[Fit, Array | None]:
    """Return the k-means of what is not kept apart, and what is, bool [outputs, inputs]; None for nothing.

    Kept apart is what costs most in the k-means of all, or what would cost most as 0, whichever leaves less error.
    """
    fit = fitted(filled, costs, clustering)
    count = round(clustering.outliers * len(filled) * inputs)
    if not count:
        return fit, None
    rest = replace(clustering, zeros=fit.zeros is not None)
    found: list[tuple[float, Fit, Array]] = []
    for difference in (filled - fit.values(), filled / fit.spread_scales(filled.shape[1])):
        free = _costliest(costs * difference * difference, count, inputs)
        if free.any():
            own = np.where(free, np.float32(0), costs)
            left = fitted(np.where(free, np.float32(0), filled), own, rest)
            lost = float(np.sum(own * np.square(filled - left.values()), dtype=np.float64))
            found.append((lost, left, free))
    return min(found, key=lambda one: one[0])[1:] if found else (fit, None)


def _costliest(lost: Array, count: int, inputs: int) -> Array:
    """Return where so many of the largest numbers above 0 are, in columns that are inputs."""
    own = np.ascontiguousarray(lost[:, :inputs]).reshape(-1)
    chosen = np.argpartition(-own, min(count, own.size) - 1)[:count]
    free = np.zeros(own.size, bool)
    free[chosen] = own[chosen] > 0
    return np.pad(free.reshape(len(lost), inputs), ((0, 0), (0, lost.shape[1] - inputs)))


def _improved(problem: Problem, fit: Fit, values: Array) -> tuple[Fit, Array]:
    """Return a solution at least as good as the given one."""
    best, least = (fit, values), _error(problem, values)
    codes, found = swept(problem, fit)
    error = _error(problem, found)
    if error < least:
        best, least = (replace(fit, codes=codes), found), error
    for _ in range(_ROUNDS):
        moved, found = refitted_tables(problem, *best)
        moved, found = refitted_scales(problem, moved, found)
        codes, found = descended(problem, moved, found)
        error = _error(problem, found)
        settled = error > least * (1 - _SETTLED)
        if error < least:
            best, least = (replace(moved, codes=codes), found), error
        if settled:
            break
    return best


def _error(problem: Problem, values: Array) -> float:
    return output_error(problem.weight.reshape(values.shape) - values, problem.moments)


def _finished(
    matrix: Array,
    fit: Fit,
    free: Array | None,
    exact: Array,
    unit: float,
    clustering: Clustering,
    second_moment: Array | None,
) -> ClusteredWeight:
    inputs = matrix.shape[1]
    positions = np.zeros(0, np.int64) if free is None else np.flatnonzero(free[:, :inputs]).astype(np.int64)
    tables = fit.tables * np.float32(unit)
    found = ClusteredWeight(
        fit.codes, tables, fit.rows, fit.scales, fit.block, inputs, positions, exact, clustering.bits, 0.0
    )
    values = found.values()
    return replace(found, error=output_error(np.subtract(matrix, values, out=values), second_moment))
