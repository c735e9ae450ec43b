"""Weighted k-means of short vectors: seeded far apart, then moved as long as the squared error falls."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array

# Vectors that seeding and most steps look at: some hundred for each of 256 entries.
_LOOKED_AT = 1 << 15
# Steps on those, and on all vectors from there; each lowers the error.
_STEPS, _STEPS_OF_ALL = 50, 3
# Seeds tried where that is quick, in distances from all points to all entries.
_MOST_STARTS, _WORK = 8, 1 << 20
# A step that lowers the error by less than this share of it is the last.
_SETTLED = 1e-5
# Distances held at once, 16 MB.
_DISTANCES = 1 << 22
_SEED = 0


def kmeans_vectors(points: Array, weights: Array, entries: int, *, zero: bool = False) -> Array:
    """Return vectors, the nearest of which stands for each point with little Σ weight · difference².

    Seeded by k-means++ (Arthur and Vassilvitskii, 2007), each draw the best of some, from a fixed seed; then Lloyd's
    method with a weight for each number. What no point is nearest to is put where the error is largest.

    Args:
        points: float32 [points, numbers], finite.
        weights: What an error of each number costs, likewise, none negative.
        entries: How many vectors, at least 1. With fewer distinct points, these are returned.
        zero: Whether the first one is to be exactly 0.

    Returns:
        float32, [entries] or fewer.
    """
    distinct = np.unique(points[: 64 * entries] if len(points) > 64 * entries else points, axis=0)
    if len(distinct) <= entries:
        distinct = np.unique(points, axis=0)
    held = np.zeros((int(zero), points.shape[1]), np.float32)
    if len(distinct) + len(held) <= entries:
        return np.concatenate([held, distinct])
    random = np.random.default_rng(_SEED)
    some, costs = points, weights
    if len(points) > _LOOKED_AT:
        chosen = np.sort(random.choice(len(points), _LOOKED_AT, replace=False))
        some, costs = points[chosen], weights[chosen]
    starts = int(np.clip(_WORK // (len(some) * entries), 1, _MOST_STARTS))
    seeds = [_seeded(some, costs, entries, held, random) for _ in range(starts)]
    found, _ = min((_moved(some, costs, one, len(held), _STEPS) for one in seeds), key=lambda one: one[1])
    return found if some is points else _moved(points, weights, found, len(held), _STEPS_OF_ALL)[0]


def nearest_vectors(points: Array, weights: Array, centers: Array) -> tuple[Array, Array]:
    """Return which center is nearest to each point, and Σ weight · difference² of each: [points].

    Args:
        points: float32 [points, numbers].
        weights: What an error of each number costs, likewise.
        centers: float32 [centers, numbers].
    """
    # Σ w (x − c)² without what is the same for all centers; as one product.
    turned = np.concatenate([-2 * centers, centers * centers], axis=1).T
    codes, least = np.empty(len(points), np.int64), np.empty(len(points), np.float32)
    step = max(_DISTANCES // max(len(centers), 1), 1)
    for start in range(0, len(points), step):
        part = slice(start, start + step)
        costs = weights[part]
        distances = np.concatenate([costs * points[part], costs], axis=1) @ turned
        codes[part] = distances.argmin(axis=1)
        least[part] = np.einsum("nd,nd->n", costs, np.square(points[part] - centers[codes[part]]))
    return codes, least


def _seeded(points: Array, weights: Array, entries: int, held: Array, random: np.random.Generator) -> Array:
    centers = list(held)
    distance = np.einsum("nd,nd->n", weights, np.square(points)).astype(np.float64)
    if not centers:
        total = np.maximum(weights.sum(axis=0), np.finfo(np.float32).tiny)
        middle = (weights * points).sum(axis=0) / total
        distance = np.einsum("nd,nd->n", weights, np.square(points - middle)).astype(np.float64)
        first = int(np.argmin(distance))
        centers, distance = [points[first]], _to(points, weights, points[first])
    tried = 2 + int(np.log(entries))
    while len(centers) < entries and distance.any():
        draws = np.searchsorted(np.cumsum(distance), random.random(tried) * distance.sum())
        nearer = [np.minimum(distance, _to(points, weights, points[at])) for at in np.minimum(draws, len(points) - 1)]
        best = int(np.argmin([one.sum() for one in nearer]))
        centers.append(points[min(int(draws[best]), len(points) - 1)])
        distance = nearer[best]
    return np.stack(centers)


def _to(points: Array, weights: Array, center: Array) -> Array:
    found: Array = np.einsum("nd,nd->n", weights, np.square(points - center)).astype(np.float64)
    return found


def _moved(points: Array, weights: Array, centers: Array, held: int, steps: int) -> tuple[Array, float]:
    """Return centers after steps of Lloyd's method, the first ones held where they are, and the error with them."""
    best, least = centers, np.inf
    for _ in range(steps):
        codes, costs = nearest_vectors(points, weights, centers)
        total = float(costs.sum(dtype=np.float64))
        if total < least:
            best, settled, least = centers, least - total < _SETTLED * total, total
        else:
            settled = True
        if settled:
            break
        centers = _means(points, weights, codes, costs, centers)
        centers[:held] = 0
    return best, least


def _means(points: Array, weights: Array, codes: Array, costs: Array, centers: Array) -> Array:
    """Return the mean of the points of each center; of none, the points that are furthest from theirs."""
    count = len(centers)
    means = centers.copy()
    for axis in range(points.shape[1]):
        weight = np.bincount(codes, weights[:, axis], count)
        total = np.bincount(codes, weights[:, axis] * points[:, axis], count)
        np.divide(total, weight, out=means[:, axis], where=weight > 0, casting="same_kind")
    empty = np.flatnonzero(np.bincount(codes, minlength=count) == 0)
    means[empty] = points[np.argsort(-costs, kind="stable")[: len(empty)]]
    return means
