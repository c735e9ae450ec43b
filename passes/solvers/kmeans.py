"""Weighted k-means of numbers, solved exactly: the values that stand for many with the least squared error."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

# So many distinct numbers are solved as they are. Of more, neighbours are taken together, half of the borders between
# them at equal counts and half at equal steps, so that neither the many nor the far ones are seen too coarsely.
EXACT = 4096
# Of more numbers than this, runs of neighbours are taken for their means from the start: some 65,000 of them.
_MANY, _SUMMED = 1 << 20, 1 << 15
# Steps of Lloyd's method from there: on a line it settles long before.
_MOST_STEPS = 500


@dataclass(frozen=True)
class _Points:
    """Numbers in rising order, with sums over all before each: what any run of them costs is told by its ends.

    Attributes:
        values: float64 [points], around a middle and scaled to magnitudes up to 1.
        zero: Where the number 0 lies on that scale.
        sums: float64 [3, points + 1], of weights, weights × values and weights × values².
    """

    values: Array
    zero: float
    sums: Array

    def means(self, starts: Array, ends: Array) -> Array:
        """Return the weighted mean of runs; NaN of empty ones."""
        weight, first, _ = self.sums[:, ends] - self.sums[:, starts]
        return np.asarray(np.divide(first, weight, out=np.full(len(weight), np.nan), where=weight > 0))


def kmeans(points: Array, weights: Array | None, entries: int, *, zero: bool = False) -> Array:
    """Return the values, rising, whose nearest one stands for each point with the least Σ weight · difference².

    Runs of the sorted points are chosen by dynamic programming (Wang and Song, Ckmeans.1d.dp: Optimal k-means
    Clustering in One Dimension by Dynamic Programming, 2011), each step of it by divide and conquer, as the best
    starts of runs rise with their ends (Grønlund et al., Fast Exact k-Means, k-Medians and Bregman Divergence
    Clustering in 1D, 2017). That is the global minimum where there are no more than `EXACT` distinct points. Of more,
    it is the minimum among runs that end between bins, and Lloyd's method takes it to the nearest minimum among all:
    what is lost is of the order of a bin's width, squared. Of more than a million points, bins are all that is seen.

    Args:
        points: Finite floats, any shape.
        weights: What an error of each point costs, of the same shape, none negative; None for ones.
        entries: How many values, at least 1. With fewer distinct points, these are returned.
        zero: Whether one of the values is to be exactly 0.

    Returns:
        float64, [entries] or fewer.
    """
    if points.size > _MANY:
        flat, costs = _summed(points.reshape(-1), None if weights is None else weights.reshape(-1))
    else:
        flat = points.astype(np.float64).reshape(-1)
        costs = np.ones(flat.size) if weights is None else weights.astype(np.float64).reshape(-1)
    counted = costs > 0
    if counted.any() and not counted.all():
        flat, costs = flat[counted], costs[counted]
    elif not counted.any():
        costs = np.ones(flat.size)
    distinct, costs = _merged(flat, costs)
    needed = len(distinct) + int(zero and not (distinct == 0).any())
    if needed <= entries:
        return np.union1d(distinct, [0.0]) if zero else distinct
    if zero and entries == 1:
        return np.zeros(1)
    middle = float(np.average(distinct, weights=costs))
    reach = max(float(np.abs(distinct - middle).max()), np.finfo(np.float64).tiny)
    values = (distinct - middle) / reach
    costs = costs / costs.max()
    powers = np.stack([costs, costs * values, costs * values * values])
    sums = np.concatenate([np.zeros((3, 1)), np.cumsum(powers, axis=1)], axis=1)
    held = _Points(values, -middle / reach, sums)
    borders, at_zero = _best_runs(held, _cuts(values), entries, zero=zero)
    found, place = _lloyd(held, borders, at_zero)
    found = found * reach + middle
    if place is not None:
        found[place] = 0.0
    return np.unique(found)


def _summed(points: Array, weights: Array | None) -> tuple[Array, Array]:
    """Return the means of runs of many points, and the weight of each run; half of these by count, half by steps."""
    some = np.sort(points[:: max(points.size // _SUMMED, 1)].astype(np.float64))
    edges = np.union1d(some, np.linspace(float(points.min()), float(points.max()), _SUMMED))
    weight, first = np.zeros(len(edges) + 1), np.zeros(len(edges) + 1)
    for start in range(0, points.size, _MANY):
        own = points[start : start + _MANY].astype(np.float64)
        counts = np.ones(own.size) if weights is None else weights[start : start + _MANY].astype(np.float64)
        runs = np.searchsorted(edges, own)
        weight += np.bincount(runs, counts, len(weight))
        first += np.bincount(runs, counts * own, len(weight))
    known = weight > 0
    if not known.any():
        return edges, np.ones(len(edges))
    return first[known] / weight[known], weight[known]


def _merged(points: Array, weights: Array) -> tuple[Array, Array]:
    """Return distinct points, rising, with the sums of their weights."""
    order = np.argsort(points, kind="stable")
    points, weights = points[order], weights[order]
    starts = np.flatnonzero(np.concatenate([[True], points[1:] != points[:-1]])) if len(points) else np.zeros(0, int)
    return points[starts], np.add.reduceat(weights, starts) if len(starts) else weights


def _cuts(values: Array) -> Array:
    """Return the places among sorted values where runs may end, from 0 to their count."""
    count = len(values)
    if count <= EXACT:
        return np.arange(count + 1)
    by_count = np.linspace(0, count, EXACT // 2 + 1).astype(np.int64)
    by_step = np.searchsorted(values, np.linspace(values[0], values[-1], EXACT // 2 + 1)[1:-1])
    return np.union1d(by_count, by_step)


def _best_runs(points: _Points, cuts: Array, entries: int, *, zero: bool) -> tuple[Array, int | None]:
    """Return the borders [entries + 1] of the runs that cost least, and which of them 0 stands for."""
    sums = points.sums[:, cuts]
    # What the runs up to each cut cost at least; and, with one of them standing for 0, the same.
    free, with_zero = _run_costs(sums, np.zeros(len(cuts), np.int64), np.arange(len(cuts))), _around(sums, points.zero)
    at_zero = with_zero
    starts, zero_starts, is_zero = [], [], []
    for _ in range(entries - 1):
        longer, start = _one_more(free, sums)
        if zero:
            kept, zero_start = _one_more(with_zero, sums)
            best = np.minimum.accumulate(free - at_zero)
            ended = best + at_zero
            begin = np.maximum.accumulate(np.where(free - at_zero <= best, np.arange(len(cuts)), 0))
            is_zero.append(ended < kept)
            zero_starts.append(np.where(is_zero[-1], begin, zero_start))
            with_zero = np.minimum(ended, kept)
        starts.append(start)
        free = longer
    return _traced(cuts, starts, zero_starts, is_zero, zero=zero)


def _traced(
    cuts: Array, starts: list[Array], zero_starts: list[Array], is_zero: list[Array], *, zero: bool
) -> tuple[Array, int | None]:
    """Return the borders that the steps of `_best_runs` came from, and the run that 0 stands for."""
    end, at_zero = len(cuts) - 1, None
    borders = [end]
    for step in reversed(range(len(starts))):
        if zero and at_zero is None:
            if is_zero[step][end]:
                at_zero = step + 1
            end = int(zero_starts[step][end])
        else:
            end = int(starts[step][end])
        borders.append(end)
    borders.append(0)
    if zero and at_zero is None:
        at_zero = 0
    return cuts[np.array(borders[::-1])], at_zero


def _run_costs(sums: Array, starts: Array, ends: Array) -> Array:
    """Return Σ w (x − mean)² of runs between cuts."""
    weight, first, second = sums[:, ends] - sums[:, starts]
    square = np.divide(first * first, weight, out=np.zeros(len(weight)), where=weight > 0)
    return np.asarray(np.maximum(second - square, 0.0))


def _around(sums: Array, place: float) -> Array:
    """Return Σ w (x − place)² of all before each cut."""
    return np.asarray(sums[2] - 2 * place * sums[1] + place * place * sums[0])


def _one_more(before: Array, sums: Array) -> tuple[Array, Array]:
    """Return what the points up to each cut cost with one run more, and where that run starts."""
    count = len(before)
    least, start = before.copy(), np.zeros(count, np.int64)
    least[0] = before[0]
    stride = 1 << (count - 1).bit_length()
    while stride >= 1:
        ends = np.arange(stride, count, 2 * stride)
        if len(ends):
            low = start[ends - stride]
            high = np.where(ends + stride < count, start[np.minimum(ends + stride, count - 1)], ends)
            least[ends], start[ends] = _least(before, sums, ends, low, np.maximum(np.minimum(high, ends), low))
        stride //= 2
    return least, start


def _least(before: Array, sums: Array, ends: Array, low: Array, high: Array) -> tuple[Array, Array]:
    """Return the least of before[start] + the run from start to each end, and that start, which is in low … high."""
    counts = high - low + 1
    firsts = np.cumsum(counts) - counts
    tried = np.arange(int(counts.sum())) + np.repeat(low - firsts, counts)
    totals = before[tried] + _run_costs(sums, tried, np.repeat(ends, counts))
    least = np.minimum.reduceat(totals, firsts)
    places = np.flatnonzero(totals == np.repeat(least, counts))
    return least, tried[places[np.searchsorted(places, firsts)]]


def _lloyd(points: _Points, borders: Array, at_zero: int | None) -> tuple[Array, int | None]:
    """Return the values that Lloyd's method settles on, and which is 0; empty runs keep the value they had."""
    centers = np.zeros(0)
    for _ in range(_MOST_STEPS):
        means = points.means(borders[:-1], borders[1:])
        if at_zero is not None:
            means[at_zero] = points.zero
        centers = np.where(np.isnan(means), centers if len(centers) else _filled(means), means)
        if at_zero is not None:  # an empty run for 0 may lie among runs on one side of it
            order = np.argsort(centers, kind="stable")
            centers, at_zero = centers[order], int(np.flatnonzero(order == at_zero)[0])
        inner = np.searchsorted(points.values, (centers[1:] + centers[:-1]) / 2)
        moved = np.concatenate([[0], inner, [len(points.values)]])
        if np.array_equal(moved, borders):
            break
        borders = moved
    return centers, at_zero


def _filled(means: Array) -> Array:
    """Return means with those of empty runs taken from the run before, or behind."""
    known = np.flatnonzero(~np.isnan(means))
    return means[known[np.maximum(np.searchsorted(known, np.arange(len(means)), side="right") - 1, 0)]]
