"""The search for few items that still fail: a window first, then delta debugging."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

Items = Sequence[int]
Fails = Callable[[Items], bool]


def fewest(items: Items, fails: Fails) -> list[int]:
    """Return items that still fail, such that none of them can be left out by itself.

    What fails is most often a short stretch of a long list; halves find it in a few tries, and delta debugging
    (Zeller and Hildebrandt, Simplifying and Isolating Failure-Inducing Input, 2002) what is needed of it.

    Args:
        items: Items that fail together, in order.
        fails: Whether some of them do; it is asked once for the same items. They need not do so monotonously.
    """
    asked: dict[tuple[int, ...], bool] = {}

    def ask(some: Items) -> bool:
        key = tuple(some)
        if key not in asked:
            asked[key] = bool(key) and fails(some)
        return asked[key]

    return _minimal(_window(_half_of_half(list(items), ask), ask), ask)


def _half_of_half(items: list[int], fails: Fails) -> list[int]:
    """Return a half of a list that fails, and a half of that, for as long as there is one: large models take long."""
    while len(items) > 1:
        middle = len(items) // 2
        half = next((half for half in (items[:middle], items[middle:]) if fails(half)), None)
        if half is None:
            return items
        items = half
    return items


def _window(items: list[int], fails: Fails) -> list[int]:
    """Return a stretch of a list that fails, the end cut first, then the beginning."""
    end = _least(len(items), lambda count: fails(items[:count]))
    items = items[:end]
    length = _least(len(items), lambda count: fails(items[-count:]))
    return items[-length:]


def _least(most: int, fails: Callable[[int], bool]) -> int:
    """Return a count that fails, next to one that does not, found by halves; ``most`` is known to fail."""
    good, bad = 0, most
    while bad - good > 1:
        middle = (good + bad) // 2
        if fails(middle):
            bad = middle
        else:
            good = middle
    return bad


def _minimal(items: list[int], fails: Fails) -> list[int]:
    parts = 2
    while len(items) > 1:
        pieces = _pieces(items, parts)
        smaller = next((piece for piece in pieces if fails(piece)), None) if parts <= len(items) else None
        if smaller is not None:
            items, parts = smaller, 2
            continue
        rests = ([item for item in items if item not in piece] for piece in map(frozenset, pieces))
        smaller = next((rest for rest in rests if fails(rest)), None)
        if smaller is not None:
            items, parts = smaller, max(parts - 1, 2)
        elif parts >= len(items):
            break
        else:
            parts = min(2 * parts, len(items))
    return items


def _pieces(items: list[int], count: int) -> list[list[int]]:
    bounds = [round(len(items) * index / count) for index in range(count + 1)]
    return [items[low:high] for low, high in itertools.pairwise(bounds) if high > low]
