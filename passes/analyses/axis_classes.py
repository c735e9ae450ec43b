"""Elements of axes that can only go together, from what the rules say: axes first, on a graph, then elements."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import networkx as nx
import numpy as np

from graphopt.backend import Array

from .axis_ties import Axis, Emit, Freeze, Layout, Side, Split, Tie, length_of

_ALL_OF_AN_AXIS = "it is all there is of an axis"


@dataclass(frozen=True, eq=False)
class ElementClasses:
    """Axes that hang together, and their elements by what can only go together.

    Attributes:
        axes: The axes, in the order in which rules named them.
        numbers: For each axis, int64 [length]: the class of each element. Axes whose elements are the same share it.
        frozen: For each class, what keeps it, or None.
    """

    axes: Sequence[Axis]
    numbers: Mapping[Axis, Array]
    frozen: Sequence[Freeze | None]


def element_classes(emit: Emit, layout: Layout) -> list[ElementClasses]:
    """Return all axes the rules named, made-up ones too, by what hangs together, in the order they were named."""
    alike = _Alike(emit)
    ties = [tie for tie in emit.ties if not _is_identity(tie)]
    before = _components(alike, ties, emit.freezes)
    chosen, frozen = _choose_sides(emit.splits, alike, _wholly_frozen(before, alike), layout)
    freezes = sorted([*emit.freezes, *frozen], key=lambda freeze: freeze.turn)
    return _components(alike, [*ties, *chosen], freezes) if emit.splits else before


class _Alike:
    """Axes that are the same element for element, as one: the first of them stands for all."""

    def __init__(self, emit: Emit) -> None:
        graph = nx.Graph()
        graph.add_nodes_from(_named(emit))
        graph.add_edges_from((tie.a, tie.b) for tie in emit.ties if _is_identity(tie))
        self.order: dict[Axis, int] = {axis: turn for turn, axis in enumerate(graph.nodes)}
        self.first: dict[Axis, Axis] = {}
        self.members: dict[Axis, list[Axis]] = {}
        self._collect(graph)
        while alike_parts := list(_equal_parts(emit.splits, self.first)):
            graph.add_edges_from(alike_parts)
            self._collect(graph)

    def _collect(self, graph: nx.Graph) -> None:
        self.members.clear()
        for axes in nx.connected_components(graph):
            members = sorted(axes, key=self.order.__getitem__)
            self.members[members[0]] = members
            self.first.update(dict.fromkeys(members, members[0]))


def _equal_parts(splits: Sequence[Split], first: Mapping[Axis, Axis]) -> Iterable[tuple[Axis, Axis]]:
    """Yield parts that are the same, not known as such: what is the same, split into as many elements at two places."""
    known: dict[tuple[Axis, tuple[int, ...]], Split] = {}
    for split in splits:
        lengths = tuple(_static(part) for part in split.parts)
        like = known.setdefault((first[split.whole], lengths), split)
        yield from ((a, b) for a, b in zip(like.parts, split.parts, strict=True) if first[a] != first[b])


def _named(emit: Emit) -> Iterable[Axis]:
    for tie in emit.ties:
        yield from (tie.a, tie.b)
    for split in emit.splits:
        yield from (split.whole, *split.parts)
    for freeze in emit.freezes:
        yield freeze.axis


def _is_identity(tie: Tie) -> bool:
    return tie.index_a is None and tie.index_b is None


# Sides of splits


def _choose_sides(
    splits: Sequence[Split], alike: _Alike, frozen: set[Axis], layout: Layout
) -> tuple[list[Tie], list[Freeze]]:
    """Return the ties between each whole and the part that is cut, and the freezes of the other parts.

    A part cut at one place is cut at the next, too: a shuffle that splits channels, swaps the parts and merges them
    cuts the outer part once and the inner part once.
    """
    ties: list[Tie] = []
    freezes: list[Freeze] = []
    cut: set[Axis] = set()
    _hold(splits, alike, frozen)
    for split in splits:
        lengths = [_static(part) for part in split.parts]
        open_parts = [
            index
            for index, part in enumerate(split.parts)
            if lengths[index] > 1 and alike.first[part] not in frozen and alike.first[split.whole] not in frozen
        ]
        preferred = [index for index in open_parts if alike.first[split.parts[index]] in cut] or open_parts
        side = _side(split, layout)
        chosen = (preferred[0] if side is Side.MAJOR else preferred[-1]) if preferred else None
        for index, part in enumerate(split.parts):
            if index != chosen and lengths[index] > 1:
                reason = "another part of the axis it is split from or merged into is cut"
                if chosen is None:
                    reason = "the axis it is split from or merged into cannot shrink"
                freezes.append(Freeze(part, reason, None, split.node, split.turn))
                frozen.add(alike.first[part])
        if chosen is None:
            reason = "the axes it is split into or merged from cannot shrink"
            freezes.append(Freeze(split.whole, reason, None, split.node, split.turn))
            frozen.add(alike.first[split.whole])
            continue
        cut.add(alike.first[split.parts[chosen]])
        ties.append(Tie(split.whole, split.parts[chosen], None, _number_of_part(lengths, chosen)))
    return ties, freezes


def _side(split: Split, layout: Layout) -> Side:
    match split.kind:
        case "splits":
            return layout.splits
        case "convolutions":
            return layout.convolutions
        case "heads":
            return Side.MAJOR


def _hold(splits: Sequence[Split], alike: _Alike, frozen: set[Axis]) -> None:
    """Add to frozen axes the parts of those that are split, and what has no other parts, wherever it is split."""
    known = -1
    while len(frozen) > known:
        known = len(frozen)
        for split in splits:
            parts = {alike.first[part] for part in split.parts if _static(part) > 1}
            if alike.first[split.whole] in frozen:
                frozen |= parts
            elif parts <= frozen:
                frozen.add(alike.first[split.whole])


def _number_of_part(lengths: Sequence[int], part: int) -> Array:
    """Return, for each element of the whole, its number along one part."""
    inner, outer = int(np.prod(lengths[part + 1 :])), int(np.prod(lengths[:part]))
    return np.tile(np.repeat(np.arange(lengths[part]), inner), outer)


def _wholly_frozen(components: Iterable[ElementClasses], alike: _Alike) -> set[Axis]:
    found: set[Axis] = set()
    for component in components:
        kept = np.array([freeze is not None for freeze in component.frozen])
        firsts = {alike.first[axis] for axis in component.axes}
        found |= {axis for axis in firsts if kept[component.numbers[axis]].all()}
    return found


# Elements


def _components(alike: _Alike, ties: Sequence[Tie], freezes: Sequence[Freeze]) -> list[ElementClasses]:
    graph = nx.Graph()
    graph.add_nodes_from(alike.members)
    graph.add_edges_from((alike.first[tie.a], alike.first[tie.b]) for tie in ties)
    ties_of: dict[Axis, list[Tie]] = defaultdict(list)
    freezes_of: dict[Axis, list[Freeze]] = defaultdict(list)
    for tie in ties:
        ties_of[alike.first[tie.a]].append(tie)
    for freeze in freezes:
        freezes_of[alike.first[freeze.axis]].append(freeze)
    components = sorted(
        (sorted(axes, key=alike.order.__getitem__) for axes in nx.connected_components(graph)),
        key=lambda axes: alike.order[axes[0]],
    )
    return [
        _classes(
            axes,
            alike,
            [tie for axis in axes for tie in ties_of[axis]],
            sorted((freeze for axis in axes for freeze in freezes_of[axis]), key=lambda freeze: freeze.turn),
        )
        for axes in components
    ]


def _classes(firsts: Sequence[Axis], alike: _Alike, ties: Sequence[Tie], freezes: Sequence[Freeze]) -> ElementClasses:
    lengths = [_static(axis) for axis in firsts]
    starts = dict(zip(firsts, np.concatenate(([0], np.cumsum(lengths)[:-1])).tolist(), strict=True))
    pairs = [
        (_elements(tie.a, tie.index_a, alike, starts), _elements(tie.b, tie.index_b, alike, starts)) for tie in ties
    ]
    roots = _united(sum(lengths), pairs)
    _, numbers = np.unique(roots, return_inverse=True)
    frozen: list[Freeze | None] = [None] * (int(numbers.max()) + 1 if numbers.size else 0)
    for freeze in reversed(freezes):
        for number in np.unique(numbers[_elements(freeze.axis, freeze.elements, alike, starts)]):
            frozen[number] = freeze
    by_axis: dict[Axis, Array] = {}
    for first, length in zip(firsts, lengths, strict=True):
        own = numbers[starts[first] : starts[first] + length]
        if length and (own == own[0]).all() and frozen[own[0]] is None:
            frozen[own[0]] = Freeze(first, _ALL_OF_AN_AXIS, None, None, 0)
        by_axis.update(dict.fromkeys(alike.members[first], own))
    axes = sorted(by_axis, key=alike.order.__getitem__)
    return ElementClasses(axes, by_axis, frozen)


def _elements(axis: Axis, index: Array | None, alike: _Alike, starts: Mapping[Axis, int]) -> Array:
    start = starts[alike.first[axis]]
    return start + (np.arange(_static(axis)) if index is None else index)


def _united(count: int, pairs: Sequence[tuple[Array, Array]]) -> Array:
    """Return for each of so many elements the smallest that it is linked to, by hooking and pointer jumping.

    Shiloach and Vishkin, An O(log n) parallel connectivity algorithm, 1982.
    """
    least = np.arange(count)
    if not pairs:
        return least
    first, second = (np.concatenate([pair[side] for pair in pairs]) for side in (0, 1))
    while True:
        a, b = least[first], least[second]
        apart = a != b
        if not apart.any():
            return least
        first, second, a, b = first[apart], second[apart], a[apart], b[apart]
        np.minimum.at(least, np.maximum(a, b), np.minimum(a, b))
        while (shorter := least[least]).tobytes() != least.tobytes():
            least = shorter


def _static(axis: Axis) -> int:
    length = length_of(axis)
    assert length is not None, "rules name axes of known length only"
    return length
