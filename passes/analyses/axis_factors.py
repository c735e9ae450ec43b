"""Factors that the axes of two shapes share: what a Reshape does to each axis, symbolic sizes included."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from graphopt import dims as d
from graphopt.dims import Dim, Size


@dataclass(frozen=True)
class Factors:
    """Axes of two shapes as products of factors, outermost first.

    Attributes:
        sizes: The factors; none is 1.
        of_inputs: For each axis of the first shape, the factors it is made of: () for an axis of 1, None where its
            factors are not shared with the other shape.
        of_outputs: Likewise of the second.
    """

    sizes: Sequence[Size]
    of_inputs: Sequence[tuple[int, ...] | None]
    of_outputs: Sequence[tuple[int, ...] | None]


def shared_factors(inputs: Sequence[Size], outputs: Sequence[Size]) -> Factors:
    """Return the coarsest factors of which the axes of both shapes are made.

    Both shapes are taken to hold equally many elements in the same order. Then equal products of leading axes are the
    same stretch of elements, and so are those of trailing axes: the walk begins at the front, and where a size hides
    what it is made of, goes on from behind.

    Args:
        inputs: The shape before.
        outputs: The shape behind.
    """
    walk = _Walk(_long_axes(inputs), _long_axes(outputs))
    walk.advance(behind=False)
    walk.advance(behind=True)
    walk.give_up_the_rest()
    return Factors(walk.sizes, walk.first.of_axes(len(inputs)), walk.second.of_axes(len(outputs)))


def _long_axes(dims: Sequence[Size]) -> _Side:
    axes = [axis for axis, size in enumerate(dims) if size != 1]
    return _Side(axes, [dims[axis] for axis in axes])


@dataclass(eq=False)
class _Side:
    """One shape without its axes of 1, and how far its factors are known.

    Attributes:
        axes: Its axes.
        rest: Of each, what is not yet divided into factors; 1 where all of it is.
    """

    axes: list[int]
    rest: list[Size]
    front: dict[int, list[int]] = field(default_factory=dict)
    back: dict[int, list[int]] = field(default_factory=dict)

    def current(self, behind: bool) -> int | None:
        """Return the place of the next axis that is not wholly divided, or None."""
        places = reversed(range(len(self.rest))) if behind else range(len(self.rest))
        return next((place for place in places if self.rest[place] != 1), None)

    def take(self, place: int, factor: int, left: Size, behind: bool) -> None:
        """Note a factor of an axis, and what is left of it."""
        (self.back if behind else self.front).setdefault(place, []).append(factor)
        self.rest[place] = left

    def factors(self, place: int) -> tuple[int, ...]:
        """Return the factors of an axis found so far, outermost first."""
        return (*self.front.get(place, ()), *reversed(self.back.get(place, [])))

    def of_axes(self, rank: int) -> tuple[tuple[int, ...] | None, ...]:
        """Return the factors of all axes, of those of 1 too."""
        found: dict[int, tuple[int, ...] | None] = {
            axis: self.factors(place) if self.rest[place] == 1 else None for place, axis in enumerate(self.axes)
        }
        return tuple(found.get(axis, ()) for axis in range(rank))


class _Walk:
    def __init__(self, first: _Side, second: _Side) -> None:
        self.first, self.second = first, second
        self.sizes: list[Size] = []

    def advance(self, behind: bool) -> None:
        """Divide axes from one end, as long as one side's next axis divides the other's."""
        while True:
            here, there = self.first.current(behind), self.second.current(behind)
            if here is None or there is None:
                return
            a, b = self.first.rest[here], self.second.rest[there]
            factor = a if _quotient(b, a) is not None else b
            left, other = _quotient(a, factor), _quotient(b, factor)
            if left is None or other is None:
                return
            self.first.take(here, len(self.sizes), left, behind)
            self.second.take(there, len(self.sizes), other, behind)
            self.sizes.append(factor)

    def give_up_the_rest(self) -> None:
        """Leave no axis with factors that another axis, not divided to its end, also holds."""
        open_factors: set[int] = set()
        changed = True
        while changed:
            changed = False
            for side in (self.first, self.second):
                for place, rest in enumerate(side.rest):
                    factors = side.factors(place)
                    if rest != 1 and not open_factors.issuperset(factors):
                        open_factors.update(factors)
                        changed = True
                    elif rest == 1 and not open_factors.isdisjoint(factors):
                        side.rest[place] = d.unknown()
                        changed = True


def _quotient(a: Size, b: Size) -> Size | None:
    """Return a / b where that is exact and more than nothing, else None."""
    if a == b:
        return 1
    if a == 0 or b == 0 or (isinstance(a, int) and isinstance(b, Dim)):
        return None
    return d.divide_exactly(a, b)
