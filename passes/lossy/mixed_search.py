"""The search for the fewest layers that must be raised: where to start, how far to go, what can be taken back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

# Rung of each layer that is not on the lowest one, by its index.
Raised = Mapping[int, int]


@dataclass(frozen=True)
class Move:
    """One layer raised by one rung.

    Attributes:
        layer: Index of the layer.
        rung: The rung it is raised to.
        gain: The error that this is expected to save.
        cost: What it costs: one layer kept, or bytes.
    """

    layer: int
    rung: int
    gain: float
    cost: float

    @property
    def worth(self) -> float:
        """Error saved by what it costs."""
        return self.gain / self.cost if self.cost > 0 else float("inf")


class OutOfTrials(Exception):
    """The search may try no more; what holds so far is the answer."""


def in_order(moves: Sequence[Move]) -> list[Move]:
    """Return moves by worth, a layer's own rungs in order: the greedy path of a convex allocation.

    Each prefix is then the best allocation of what it costs, if errors of layers add up (Shoham and Gersho, Efficient
    bit allocation for an arbitrary set of quantizers, 1988).
    """
    by_layer: dict[int, list[Move]] = {}
    for move in sorted(moves, key=lambda one: one.rung):
        by_layer.setdefault(move.layer, []).append(move)
    path: list[Move] = []
    while by_layer:
        # A step that is worth less than the one behind it is taken for the sake of both.
        layer = max(by_layer, key=lambda one: (_best_worth(by_layer[one]), -one))
        path.append(by_layer[layer].pop(0))
        if not by_layer[layer]:
            del by_layer[layer]
    return path


def _best_worth(steps: Sequence[Move]) -> float:
    gain = cost = best = 0.0
    for step in steps:
        gain, cost = gain + step.gain, cost + step.cost
        best = max(best, gain / cost if cost > 0 else float("inf"))
    return best


def after(path: Sequence[Move], count: int) -> dict[int, int]:
    """Return the rung of each raised layer after the first moves of a path."""
    return {move.layer: move.rung for move in path[:count]}


def fewest(path: Sequence[Move], holds: Callable[[Raised], bool]) -> dict[int, int] | None:
    """Return the raised layers of the shortest prefix of a path that holds, none of them needlessly; None if none does.

    Raising more is taken to help, as it does but for noise; what is returned has been tried in any case. Prefixes are
    doubled until one holds, then halved between; afterwards each layer, the least worthy first, goes back as far
    down as still holds.

    Args:
        path: Moves as `in_order` gives them.
        holds: Tries an allocation; may raise `OutOfTrials`, and then the best so far is returned.
    """
    try:
        count = _shortest(len(path), lambda number: holds(after(path, number)))
    except _Interrupted as interrupted:
        return after(path, interrupted.count) if interrupted.count is not None else None
    return None if count is None else _without_needless(path, after(path, count), holds)


class _Interrupted(Exception):
    """The search for a prefix ended early; `count` moves hold, if any are known to."""

    def __init__(self, count: int | None) -> None:
        super().__init__()
        self.count = count


def _shortest(length: int, holds: Callable[[int], bool]) -> int | None:
    """Return the fewest moves that hold, if more of them hold wherever fewer do."""
    low, high, known = 0, 1, None
    try:
        while not holds(min(high, length)):
            if high >= length:
                return None
            low, high = high, 2 * high
        known = high = min(high, length)
        while high - low > 1:
            middle = (low + high) // 2
            if holds(middle):
                known = high = middle
            else:
                low = middle
    except OutOfTrials:
        raise _Interrupted(known) from None
    return high


def _without_needless(path: Sequence[Move], raised: dict[int, int], holds: Callable[[Raised], bool]) -> dict[int, int]:
    """Take layers back down, one by one, as far as what is left still holds."""
    last = {move.layer: position for position, move in enumerate(path)}
    # A single layer has been tried without: that is the prefix before it.
    candidates = sorted(raised, key=lambda layer: last[layer], reverse=True)
    try:
        for layer in candidates:
            for rung in range(raised[layer]):
                lower = {**raised, layer: rung} if rung else {one: raised[one] for one in raised if one != layer}
                if holds(lower):
                    raised = lower
                    break
    except OutOfTrials:
        pass
    return raised
