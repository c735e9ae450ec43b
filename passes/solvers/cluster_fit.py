"""Tables and scales that lose least of the weights themselves, each weighed by what an error of it costs."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from graphopt.backend import Array

from .clustered_weight import Clustering, decoded, looked_up, places
from .codebook import spread
from .kmeans import kmeans
from .kmeans_vectors import kmeans_vectors, nearest_vectors
from .rows import by_rows

# Rounds of tables and scales, each lowering the error; some three settle most of it.
_ROUNDS = 12
# Up to so many entries several starts are tried, and the best tables looked for once more when scales are settled; more
# are about as good.
_FEW_ENTRIES = 32
# Of more weights than this, the table is found for some, a thousand for each of 256 entries; then scales and codes of
# all are, in so many rounds.
_MANY, _SOME, _ROUNDS_OF_ALL = 1 << 20, 1 << 18, 3
# A round that lowers the error by less than this share of it is the last.
_SETTLED = 1e-4
# Numbers compared at once where every output has a table of its own.
_COMPARED = 1 << 24
# A share of exact zeros from which an entry is worth holding at 0, where entries are many.
MANY_ZEROS = 0.1
_TINY = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Fit:
    """A weight as tables, codes and scales, filled up to whole vectors.

    Attributes:
        tables: float32 [tables, entries, vector].
        codes: uint8 [outputs, codes].
        scales: float32 [outputs, blocks] or None.
        block: Inputs that share a scale, or 0.
        rows: Outputs that share a table.
        zeros: Which codes stand for what stays zero, bool [outputs, codes]; None where zeros are not held.
    """

    tables: Array
    codes: Array
    scales: Array | None
    block: int
    rows: int
    zeros: Array | None

    def values(self) -> Array:
        """Return what the codes stand for, float32 [outputs, codes × vector]."""
        return decoded(self.tables, self.codes, self.rows, self.scales, self.block)

    def spread_scales(self, inputs: int) -> Array:
        """Return a scale for each weight, [outputs, inputs]; [1, 1] where there are none."""
        return np.ones((1, 1), np.float32) if self.scales is None else spread(self.scales, self.block, inputs)


def fitted(matrix: Array, costs: Array, clustering: Clustering) -> Fit:
    """Return tables, scales and codes of little Σ cost · difference².

    With one table and no scales that is k-means, exact for single numbers (`kmeans`). Scales start from the root mean
    square of each block, and from its largest magnitude; tables and scales are then fitted in turn, each the best
    there is for the other and the codes, and codes are the nearest ones.

    Args:
        matrix: float32 [outputs, inputs], whole vectors.
        costs: What an error of each weight costs, float32 likewise, none negative.
        clustering: How it is clustered.
    """
    zeros = _held_zeros(matrix, clustering)
    rows, block = clustering.rows_of(len(matrix)), clustering.block_of(matrix.shape[1])
    if not matrix.size:
        shape = max(-(-len(matrix) // rows), 1), clustering.entries, clustering.vector
        scales = np.ones((len(matrix), 1), np.float32) if block else None
        return Fit(np.zeros(shape, np.float32), np.zeros(matrix.shape, np.uint8), scales, block, rows, None)
    if not block:
        return _with_tables(matrix, costs, None, 0, rows, zeros, clustering)
    if matrix.size > _MANY and rows == len(matrix):
        return _fitted_to_some(matrix, costs, block, zeros, clustering)
    starts = [_root_mean_squares(matrix, costs, block=block)]
    if clustering.entries <= _FEW_ENTRIES:
        starts.append(_largest(matrix, costs, block=block))
    tried = [_with_tables(matrix, costs, rounded(_positive(one)), block, rows, zeros, clustering) for one in starts]
    best = min(tried, key=lambda one: _error(matrix, costs, one))
    return _alternated(matrix, costs, best, clustering)


def _fitted_to_some(matrix: Array, costs: Array, block: int, zeros: Array | None, clustering: Clustering) -> Fit:
    """Return a fit whose table is found for some of the outputs, evenly spaced, and the scales and codes of all."""
    step = -(-matrix.size // _SOME)
    own = costs if len(costs) == 1 else costs[::step]
    some = fitted(matrix[::step], own, replace(clustering, rows=0, zeros=zeros is not None))
    assert some.scales is not None, "there are scales"
    starts = [
        _positive(np.concatenate(by_rows(scales_of, matrix, costs, block=block)))
        for scales_of in (_root_mean_squares, _largest)
    ]
    # What the scales of some are most nearly a multiple of, those of all begin with.
    ratios = [np.log(some.scales / one[::step]) for one in starts]
    nearest = int(np.argmin([ratio.std() for ratio in ratios]))
    scales = starts[nearest] * np.exp(np.median(ratios[nearest])).astype(np.float32)
    zeros = None if some.zeros is None else zeros
    scales = rounded(np.concatenate(by_rows(_scales_for, matrix, costs, scales, zeros, fit=some)))
    codes = np.concatenate(by_rows(_codes_for, matrix, costs, scales, zeros, fit=some))
    return Fit(some.tables, codes, scales, some.block, len(matrix), zeros)


def _scales_for(matrix: Array, costs: Array, scales: Array, zeros: Array | None, *, fit: Fit) -> Array:
    """Return the scales that rows settle on in some rounds, with the table of a fit."""
    for _ in range(_ROUNDS_OF_ALL):
        codes = _codes_for(matrix, costs, scales, zeros, fit=fit)
        scales = _fitted_scales(matrix, costs, replace(fit, codes=codes, scales=scales, zeros=zeros))
    return scales


def _codes_for(matrix: Array, costs: Array, scales: Array, zeros: Array | None, *, fit: Fit) -> Array:
    """Return the nearest codes of rows, with the table of a fit."""
    return _recoded(matrix, costs, replace(fit, scales=scales, rows=len(matrix), zeros=zeros)).codes


def rounded(scales: Array) -> Array:
    """Return scales as float16 says them, where it says all of them to its full precision; else as they are."""
    half = scales.astype(np.float16).astype(np.float32)
    return half if np.all(np.abs(half - scales) <= scales * np.float32(2.0**-11)) else scales


def _held_zeros(matrix: Array, clustering: Clustering) -> Array | None:
    """Return which codes stay zero, or None where zeros are not held."""
    if clustering.zeros is False:
        return None
    zeros = (matrix == 0).reshape(len(matrix), matrix.shape[1] // clustering.vector, clustering.vector).all(axis=2)
    share = float(zeros.mean()) if zeros.size else 0.0
    many = share >= max(MANY_ZEROS, 1 / clustering.entries)
    return zeros if many or (clustering.zeros and share > 0) else None


def _root_mean_squares(matrix: Array, costs: Array, *, block: int) -> Array:
    starts = np.arange(0, matrix.shape[1], block)
    squares = np.add.reduceat(costs * matrix * matrix, starts, axis=1)
    weights = np.maximum(np.add.reduceat(np.broadcast_to(costs, matrix.shape), starts, axis=1), _TINY)
    return np.sqrt(squares / weights)


def _largest(matrix: Array, _: Array, *, block: int) -> Array:
    return np.maximum.reduceat(np.abs(matrix), np.arange(0, matrix.shape[1], block), axis=1)


def _positive(scales: Array) -> Array:
    """Return scales with 1 as the largest, and for those that say nothing."""
    top = float(scales.max(initial=0.0)) or 1.0
    relative = scales / np.float32(top)
    return np.where(relative > _TINY * 1e6, relative, np.float32(1.0)).astype(np.float32)


def _alternated(matrix: Array, costs: Array, start: Fit, clustering: Clustering) -> Fit:
    """Return a fit of less error: scales, tables and codes in turn, then once more the best tables there are."""
    best, least = start, _error(matrix, costs, start)
    found = start
    for _ in range(_ROUNDS):
        found = replace(found, scales=rounded(_positive(_fitted_scales(matrix, costs, found))))
        found = _recoded(matrix, costs, _with_means(matrix, costs, found))
        error = _error(matrix, costs, found)
        settled = error > least * (1 - _SETTLED)
        best, least = (found, error) if error < least else (best, least)
        if settled:
            break
    if clustering.vector > 1 or clustering.entries > _FEW_ENTRIES:
        return best
    assert best.scales is not None, "there are scales"
    found = _with_tables(matrix, costs, best.scales, best.block, best.rows, best.zeros, clustering)
    return found if _error(matrix, costs, found) < least else best


def _with_means(matrix: Array, costs: Array, fit: Fit) -> Fit:
    """Return a fit with the mean of what has a code as its entry, for the present scales."""
    each = fit.spread_scales(matrix.shape[1])
    vector, shape = fit.tables.shape[2], (-1, fit.tables.shape[2])
    flat = places(fit.codes, fit.rows, fit.tables.shape[1]).reshape(-1)
    along = (costs * each * matrix).reshape(shape)
    power = np.broadcast_to(costs * each * each, matrix.shape).reshape(shape)
    tables = fit.tables.reshape(-1, vector).copy()
    for number in range(vector):
        weight = np.bincount(flat, power[:, number], len(tables))
        total = np.bincount(flat, along[:, number], len(tables))
        np.divide(total, weight, out=tables[:, number], where=weight > 0, casting="same_kind")
    if fit.zeros is not None:
        tables[zero_codes(fit)[:: fit.rows] + np.arange(len(fit.tables)) * fit.tables.shape[1]] = 0
    return in_order(replace(fit, tables=tables.reshape(fit.tables.shape)))


def _recoded(matrix: Array, costs: Array, fit: Fit) -> Fit:
    """Return a fit with the nearest codes."""
    each = fit.spread_scales(matrix.shape[1])
    return replace(fit, codes=_nearest(matrix / each, np.broadcast_to(costs * each * each, matrix.shape), fit))


def _error(matrix: Array, costs: Array, fit: Fit) -> float:
    difference = matrix - fit.values()
    return float(np.sum(costs * difference * difference, dtype=np.float64))


def _fitted_scales(matrix: Array, costs: Array, fit: Fit) -> Array:
    """Return the best scales for what the codes stand for; of a block of zeros, the present one."""
    assert fit.scales is not None, "there are scales"
    starts = np.arange(0, matrix.shape[1], fit.block)
    values = looked_up(fit.tables, fit.codes, fit.rows)
    weighed = costs * values
    along = np.add.reduceat(weighed * matrix, starts, axis=1)
    power = np.add.reduceat(weighed * values, starts, axis=1)
    found = np.divide(along, power, out=np.zeros_like(along), where=power > _TINY)
    return np.where(found > 0, found, fit.scales)


def _with_tables(
    matrix: Array,
    costs: Array,
    scales: Array | None,
    block: int,
    rows: int,
    zeros: Array | None,
    clustering: Clustering,
) -> Fit:
    """Return the best tables for given scales, and the nearest codes."""
    fit = Fit(np.zeros((0, 0, 0), np.float32), np.zeros((len(matrix), 0), np.uint8), scales, block, rows, zeros)
    each = fit.spread_scales(matrix.shape[1])
    normal, weights = matrix / each, np.broadcast_to(costs * each * each, matrix.shape)
    vector, entries = clustering.vector, clustering.entries
    parts = [slice(at, at + rows) for at in range(0, len(matrix), rows)]
    tables = []
    for part in parts:
        points, own = normal[part].reshape(-1, vector), weights[part].reshape(-1, vector)
        if zeros is not None:
            counted = ~zeros[part].reshape(-1)
            points, own = points[counted], own[counted]
        tables.append(_table(points, own, entries, zero=zeros is not None))
    fit = replace(fit, tables=np.stack(tables))
    return replace(fit, codes=_nearest(normal, weights, fit))


def _table(points: Array, weights: Array, entries: int, *, zero: bool) -> Array:
    """Return a table of so many entries; where fewer are needed, the last one is repeated."""
    vector = points.shape[1]
    if not len(points):
        return np.zeros((entries, vector), np.float32)
    if vector == 1:
        found = kmeans(points, weights, entries, zero=zero).astype(np.float32)[:, None]
    else:
        found = kmeans_vectors(points, weights, entries, zero=zero)
    return np.concatenate([found, np.repeat(found[-1:], entries - len(found), axis=0)])


def _nearest(normal: Array, weights: Array, fit: Fit) -> Array:
    """Return the codes of the entries nearest to weights over their scales, uint8 [outputs, codes]."""
    vector = fit.tables.shape[2]
    if vector == 1:
        codes = nearest_scalars(normal, fit.tables[:, :, 0], fit.rows)
    else:
        codes = np.empty((len(normal), normal.shape[1] // vector), np.uint8)
        for place, table in enumerate(fit.tables):
            part = slice(place * fit.rows, (place + 1) * fit.rows)
            found, _ = nearest_vectors(normal[part].reshape(-1, vector), weights[part].reshape(-1, vector), table)
            codes[part] = found.reshape(-1, codes.shape[1])
    return codes if fit.zeros is None else np.where(fit.zeros, zero_codes(fit)[:, None], codes)


def zero_codes(fit: Fit) -> Array:
    """Return the code of each output that stands for 0, uint8 [outputs]."""
    outputs = len(fit.zeros) if fit.zeros is not None else len(fit.codes)
    smallest = np.abs(fit.tables).sum(axis=2).argmin(axis=1).astype(np.uint8)
    return np.asarray(smallest[np.arange(outputs) // fit.rows])


def nearest_scalars(normal: Array, tables: Array, rows: int) -> Array:
    """Return the codes nearest to numbers [outputs, numbers], of tables [tables, entries] that rise."""
    borders = (tables[:, 1:] + tables[:, :-1]) / 2
    if len(tables) == 1:
        return np.searchsorted(borders[0], normal).astype(np.uint8)
    codes = np.empty(normal.shape, np.uint8)
    own = borders[np.arange(len(normal)) // rows]
    step = max(_COMPARED // max(normal.shape[1] * borders.shape[1], 1), 1)
    for start in range(0, len(normal), step):
        part = slice(start, start + step)
        codes[part] = (normal[part, :, None] > own[part, None, :]).sum(axis=2)
    return codes


def in_order(fit: Fit) -> Fit:
    """Return the same with scalars of each table rising."""
    if fit.tables.shape[2] > 1:
        return fit
    order = np.argsort(fit.tables[:, :, 0], axis=1, kind="stable")
    if np.array_equal(order, np.broadcast_to(np.arange(order.shape[1]), order.shape)):
        return fit
    tables = np.take_along_axis(fit.tables, order[:, :, None], axis=1)
    ranks = np.argsort(order, axis=1).astype(np.uint8)
    codes = ranks.reshape(-1)[places(fit.codes, fit.rows, order.shape[1])]
    return Fit(tables, codes, fit.scales, fit.block, fit.rows, fit.zeros)
