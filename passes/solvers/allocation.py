"""How much of each layer or group to take away, so that a model costs what was asked for and loses least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from graphopt.backend import Array

# Prices tried between one that meets the budget and one that does not: the last two differ by a millionth.
_HALVINGS = 40
# Of one price, sweeps over all items; each lowers what is minimised, and two or three settle it.
_MOST_SWEEPS = 20
# The first price tried, in errors for all that can be saved, and what it is multiplied by until the budget holds.
_FIRST_PRICE, _PRICE_STEP, _MOST_STEPS = 1e-9, 4.0, 60
# Looks at an item's costs that an exchange of two items may take: a few seconds where costs are bilinear.
_MOST_LOOKS = 20_000
# Exchanges until no better one is found, at the most.
_MOST_EXCHANGES = 200
# A budget is a sum in floating point: this share of it above is rounding, not excess.
_SLACK = 1e-9


class Cost(Protocol):
    """What a choice of levels costs, such as MACs; never more at a higher level of an item."""

    def __call__(self, levels: Sequence[int]) -> float:
        """Return what all items cost together at these levels."""

    def along(self, item: int, levels: Sequence[int]) -> Array:
        """Return what all items cost together at each level of one item, the others where they are: [levels]."""


@dataclass(frozen=True)
class Separable:
    """Costs that add up.

    Attributes:
        costs: Of each item, what it costs at each of its levels.
    """

    costs: Sequence[Array]

    def __call__(self, levels: Sequence[int]) -> float:
        """Return what all items cost together at these levels."""
        return float(sum(costs[level] for costs, level in zip(self.costs, levels, strict=True)))

    def along(self, item: int, levels: Sequence[int]) -> Array:
        """Return what all items cost together at each level of one item, the others where they are: [levels]."""
        own = np.asarray(self.costs[item], np.float64)
        return np.asarray(own + (self(levels) - own[levels[item]]))


@dataclass(frozen=True)
class Allocation:
    """A level for each item.

    Attributes:
        levels: Of each item, the index into its curve; 0 leaves it as it is.
        error: The sum of the items' errors there.
        cost: What that costs.
        holds: Whether the budget holds; if not, this is the least that can be had.
    """

    levels: tuple[int, ...]
    error: float
    cost: float
    holds: bool = True


def allocate(errors: Sequence[Array], cost: Cost, budget: float) -> Allocation:
    """Return the levels with the least summed error that cost no more than a budget.

    With a price on each unit of cost, items can be settled one by one: each goes to the level of least error + price ×
    cost. Of costs that add up that is one sweep; of the MACs of channels, which are bilinear in the widths on both
    sides of a layer, sweeps are repeated until nothing moves. The price is halved in on until the budget holds just so
    (Everett, Generalized Lagrange multiplier method, 1963; Shoham and Gersho, Efficient bit allocation for an
    arbitrary set of quantizers, 1988). That reaches the lower convex hull of what can be had; what is left of the
    budget is then spent by moving single items, and pairs of items against each other, as long as that pays.

    Args:
        errors: Of each item, the error it adds at each of its levels, from 0, where it is as it was, to the most that
            may be taken away; in one unit, finite. Curves need be neither convex nor monotone.
        cost: What levels cost.
        budget: The most that all of them may cost.
    """
    curves = [np.asarray(one, np.float64) for one in errors]
    whole, least = [0] * len(curves), [len(one) - 1 for one in curves]
    ceiling = budget + _SLACK * abs(budget)
    if cost(least) > ceiling:
        return _as_allocation(curves, cost, least, holds=False)
    found = _by_price(curves, cost, ceiling, whole, least)
    for _ in range(_MOST_EXCHANGES):
        better = _raised(curves, cost, ceiling, found) or _exchanged(curves, cost, ceiling, found)
        if better is None:
            break
        found = better
    return _as_allocation(curves, cost, found)


def allocate_evenly(shares: Sequence[Array], cost: Cost, budget: float) -> Allocation:
    """Return the levels that take about the same share of every item and cost no more than a budget.

    Args:
        shares: Of each item, the share of it that is gone at each of its levels, rising from 0.
        cost: What levels cost.
        budget: The most that all of them may cost.
    """
    curves = [np.asarray(one, np.float64) for one in shares]
    ceiling = budget + _SLACK * abs(budget)
    ratios = np.unique(np.concatenate([np.zeros(1), *curves]))

    def at(ratio: float) -> list[int]:
        return [int(np.searchsorted(one, ratio + _SLACK, side="right")) - 1 for one in curves]

    low, high = 0, len(ratios) - 1
    if cost(at(ratios[high])) > ceiling:
        return _as_allocation(curves, cost, at(ratios[high]), holds=False)
    while low < high:
        middle = (low + high) // 2
        if cost(at(ratios[middle])) <= ceiling:
            high = middle
        else:
            low = middle + 1
    return _as_allocation(curves, cost, at(ratios[high]))


def allowed_widths(size: int, multiple: int = 1, least: int = 1) -> list[int]:
    """Return the widths a group of channels may have, the present one first, then every smaller multiple.

    Args:
        size: How many channels there are.
        multiple: What widths must be a multiple of, apart from the present one.
        least: The fewest channels that must be left.
    """
    first = (size - 1) // multiple * multiple
    return [size, *(width for width in range(first, 0, -multiple) if width >= least)]


def _as_allocation(curves: Sequence[Array], cost: Cost, levels: Sequence[int], *, holds: bool = True) -> Allocation:
    error = float(sum(one[level] for one, level in zip(curves, levels, strict=True)))
    return Allocation(tuple(levels), error, cost(levels), holds)


def _error(curves: Sequence[Array], levels: Sequence[int]) -> float:
    return float(sum(one[level] for one, level in zip(curves, levels, strict=True)))


def _by_price(
    curves: Sequence[Array], cost: Cost, ceiling: float, whole: Sequence[int], least: Sequence[int]
) -> list[int]:
    """Return the levels of the lowest price at which the budget holds."""
    free = _settled(curves, cost, 0.0, whole)
    if cost(free) <= ceiling:
        return free
    saved = max(cost(whole) - cost(least), np.finfo(np.float64).tiny)
    scale = max(float(sum(one.max() for one in curves)), np.finfo(np.float64).tiny) / saved
    low, high, best, start = 0.0, _FIRST_PRICE * scale, list(least), free
    for _ in range(_MOST_STEPS):
        start = _settled(curves, cost, high, start)
        if cost(start) <= ceiling:
            best = start
            break
        low, high = high, high * _PRICE_STEP
    for _ in range(_HALVINGS):
        price = (low + high) / 2
        # From both sides: what two neighbours settle at may hang on where they were.
        tries = [_settled(curves, cost, price, one) for one in (best, start)]
        held = [one for one in tries if cost(one) <= ceiling]
        if held:
            high, best = price, min([best, *held], key=lambda one: _error(curves, one))
        else:
            low, start = price, tries[0]
    return best


def _settled(curves: Sequence[Array], cost: Cost, price: float, start: Sequence[int]) -> list[int]:
    """Return levels at which no item by itself lowers error + price × cost; of equals, the cheapest."""
    levels = list(start)
    for _ in range(_MOST_SWEEPS):
        before = list(levels)
        for item, curve in enumerate(curves):
            total = curve + price * cost.along(item, levels)
            levels[item] = len(total) - 1 - int(np.argmin(total[::-1]))
        if levels == before:
            break
    return levels


def _raised(curves: Sequence[Array], cost: Cost, ceiling: float, levels: Sequence[int]) -> list[int] | None:
    """Return levels with one item moved so that the error is less and the budget holds, or None."""
    best, found = 0.0, None
    for item, curve in enumerate(curves):
        gains = np.where(cost.along(item, levels) <= ceiling, curve[levels[item]] - curve, -np.inf)
        level = int(np.argmax(gains))
        if gains[level] > best:
            best, found = float(gains[level]), (item, level)
    return _moved(levels, found) if found is not None else None


def _exchanged(curves: Sequence[Array], cost: Cost, ceiling: float, levels: Sequence[int]) -> list[int] | None:
    """Return levels with one item taken down and another up so that the error is less and the budget holds, or None."""
    reach = max(1, _MOST_LOOKS // max(len(curves) ** 2, 1))
    best, found = 0.0, None
    for item, curve in enumerate(curves):
        for level in range(levels[item] + 1, min(len(curve), levels[item] + 1 + reach)):
            lower = _moved(levels, (item, level))
            lost = curve[level] - curve[levels[item]]
            for other, raised in enumerate(curves):
                if other == item or raised[levels[other]] - raised.min() <= lost + best:
                    continue
                own = raised[levels[other]] - raised
                gains = np.where(cost.along(other, lower) <= ceiling, own - lost, -np.inf)
                place = int(np.argmax(gains))
                if gains[place] > best:
                    best, found = float(gains[place]), _moved(lower, (other, place))
    return found


def _moved(levels: Sequence[int], move: tuple[int, int]) -> list[int]:
    item, level = move
    return [*levels[:item], level, *levels[item + 1 :]]
