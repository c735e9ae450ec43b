"""One weight for several layers: the one that changes the outputs of all of them least, and what that costs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .objective import DAMPING

# Times what is to be saved that one weight may save: beyond, another model is made than was asked for.
_MOST_SAVED = 4
# Of many pools, each is compared with so many whose weights are nearest; the others are looked at when these are gone.
_NEIGHBOURS = 4


@dataclass(frozen=True, eq=False)
class Pool:
    """Layers that share a weight: Σ aᵢ tr((Wᵢ−W) Hᵢ (Wᵢ−W)ᵀ) as the quadratic in W that it is.

    All of the sum that hangs on W is tr((W−Ŵ) A (W−Ŵ)ᵀ), A = Σ aᵢ Hᵢ and Ŵ = (Σ aᵢ Wᵢ Hᵢ) A⁻¹ where it is least. So two
    pools together are again one, and what it costs to put them together is what Ward (Hierarchical Grouping to Optimize
    an Objective Function, 1963) merges clusters by, in the metric of H.

    Attributes:
        weight: Ŵ, float32 or float64 [groups, outputs, inputs].
        moment: A, float64 [groups, inputs, inputs], positive definite; or its diagonal, [groups, inputs].
    """

    weight: Array
    moment: Array

    def scaled(self, share: float) -> Pool:
        """Return the pool with its error counted so many times."""
        return Pool(self.weight, self.moment * share)

    def error_at(self, weight: Array) -> float:
        """Return how much larger the error is at another weight, [groups, outputs, inputs], than at its own."""
        difference = weight.astype(np.float64) - self.weight
        return float(np.sum(_times(difference, self.moment) * difference))

    def join(self, other: Pool) -> tuple[Pool, float]:
        """Return both pools as one, and by how much the summed error grows."""
        together = self.moment + other.moment
        difference = other.weight.astype(np.float64) - self.weight
        # Ŵ from the own weight on, so that what is the same in both does not lose its digits.
        step = _over(_times(difference, other.moment), together)
        cost = float(np.sum(_times(step, self.moment) * difference))
        return Pool((self.weight + step).astype(self.weight.dtype), together), max(cost, 0.0)

    def quick_cost(self, other: Pool) -> float:
        """Return what it costs to put both together if no inputs went together: exact for diagonals, else about."""
        own, its = _diagonal(self.moment), _diagonal(other.moment)
        squares = np.square(other.weight - self.weight).sum(axis=1, dtype=np.float64)
        return float(np.sum(squares * (own * its / (own + its))))


def pool_of(weight: Array, second_moment: Array | None) -> Pool:
    """Return a single layer as a pool, the inputs that data never excite damped.

    Args:
        weight: W, of any float dtype, [groups, outputs, inputs].
        second_moment: H, [groups, inputs, inputs], or its diagonal [groups, inputs]; None stands for the identity.
    """
    weight = weight if weight.dtype == np.float64 else weight.astype(np.float32, copy=False)
    if second_moment is None:
        return Pool(weight, np.ones((len(weight), weight.shape[2])))
    moment = second_moment.astype(np.float64)
    mean = _diagonal(moment).mean(axis=1, keepdims=True)
    floor = DAMPING * np.where(mean > np.finfo(np.float32).tiny, mean, 1.0)
    if moment.ndim == 2:
        return Pool(weight, moment + floor)
    places = np.arange(moment.shape[1])
    moment[:, places, places] += floor
    return Pool(weight, moment)


def shrunk(second_moment: Array, rows: int) -> Array:
    """Return a second moment, float64, with what goes together in few rows by chance taken back.

    With fewer rows than inputs any two layers could be given a weight that suits these rows, and no others. So
    what is off the diagonal is scaled by 1 − λ, λ the share of it that is noise (Schäfer and Strimmer, A Shrinkage
    Approach to Large-Scale Covariance Matrix Estimation, 2005, with the variances that normal inputs would have).

    Args:
        second_moment: H, [groups, inputs, inputs].
        rows: How many rows it is the mean of.
    """
    moment = second_moment.astype(np.float64)
    scale = np.sqrt(np.maximum(_diagonal(moment), 0.0))
    norm = scale[:, :, None] * scale[:, None, :]
    squares = np.square(np.divide(moment, norm, out=np.zeros_like(moment), where=norm > 0))
    places = np.arange(moment.shape[1])
    squares[:, places, places] = 0.0
    noise = np.sum(np.square(1 - squares), axis=(1, 2)) - moment.shape[1]
    all_of_it = np.sum(squares, axis=(1, 2)) * max(rows - 1, 1)
    share = np.divide(noise, all_of_it, out=np.ones_like(noise), where=all_of_it > 0).clip(0.0, 1.0)
    diagonal = _diagonal(moment).copy()
    moment *= 1 - share[:, None, None]
    moment[:, places, places] = diagonal
    return moment


@dataclass(frozen=True, eq=False)
class Merge:
    """Two pools of a class put together.

    Attributes:
        members: The pools given that are one now, by place.
        pool: What they are together.
        saved: How many numbers less are stored.
    """

    members: tuple[int, ...]
    pool: Pool
    saved: int


def merges(classes: Sequence[Sequence[int]], pools: Sequence[Pool], save: float) -> Iterator[Merge]:
    """Yield pools put together two by two, each time those that cost least for what they save.

    Args:
        classes: Places of pools that can be put together with one another.
        pools: All pools, those of a class of one shape.
        save: How many numbers are to be saved; what is saved beyond does not count, and weights that alone save
            more than four times as much are left.
    """
    fitting = [places for places in classes if pools[places[0]].weight.size <= _MOST_SAVED * save]
    searches = [_Search({(place,): pools[place] for place in places}) for places in fitting]
    while save > 0:
        offers = [(cost / min(search.size, save), index, pair) for index, search in enumerate(searches)
                  for pair, cost in search.costs().items()]  # fmt: skip
        if not offers:
            return
        _, index, pair = min(offers)
        merge = searches[index].merge(pair)
        save -= merge.saved
        yield merge


Members = tuple[int, ...]


class _Search:
    """Pools of one class, and what it costs to put two of them together."""

    def __init__(self, pools: dict[Members, Pool]) -> None:
        self._pools = pools
        self._costs: dict[tuple[Members, Members], float] = {}
        self.size = next(iter(pools.values())).weight.size
        for members in pools:
            self._compare(members)

    def costs(self) -> dict[tuple[Members, Members], float]:
        """Return what pairs cost; of a class of two pools and more never empty."""
        if not self._costs and len(self._pools) > 1:
            for members in self._pools:
                self._compare(members)
        return self._costs

    def merge(self, pair: tuple[Members, Members]) -> Merge:
        """Put a pair together."""
        first, second = (self._pools.pop(members) for members in pair)
        gone = set(pair)
        self._costs = {other: cost for other, cost in self._costs.items() if not gone & set(other)}
        members = tuple(sorted(pair[0] + pair[1]))
        joined, _ = first.join(second)
        self._pools[members] = joined
        self._compare(members)
        return Merge(members, joined, self.size)

    def _compare(self, members: Members) -> None:
        """Look at what a pool costs with those nearest to it."""
        own = self._pools[members]
        others = [other for other in self._pools if other != members]
        if len(others) > _NEIGHBOURS:
            others = sorted(others, key=lambda other: own.quick_cost(self._pools[other]))[:_NEIGHBOURS]
        for other in others:
            pair = min(members, other), max(members, other)
            if pair not in self._costs:
                self._costs[pair] = own.join(self._pools[other])[1]


def _diagonal(moment: Array) -> Array:
    return moment if moment.ndim == 2 else np.diagonal(moment, axis1=1, axis2=2)


def _times(matrix: Array, moment: Array) -> Array:
    """Return X A of [groups, outputs, inputs]."""
    found: Array = matrix * moment[:, None] if moment.ndim == 2 else matrix @ moment
    return found


def _over(matrix: Array, moment: Array) -> Array:
    """Return X A⁻¹ of [groups, outputs, inputs], A symmetric."""
    if moment.ndim == 2:
        return np.asarray(matrix / moment[:, None])
    return np.swapaxes(np.linalg.solve(moment, np.swapaxes(matrix, 1, 2)), 1, 2)
