"""Which place each node of two graphs has in one drawing of both.

Both sides share one layout, in which a node and its partner have one slot: the two can be moved together, and what was
removed or added is a gap on the other side, as in a comparison of texts.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Set
from dataclasses import dataclass, field
from typing import TypeVar

import onnx_ir as ir

from graphopt import walk
from graphopt.fragment import values_read
from graphopt.graph_view.layout import Edge, Layout, layered
from graphopt.graph_view.pairs import AnyGraph, Pairs, shown_nodes

# What a node of the drawing stands for: a node of the model, or a value named by its kind.
Key = ir.Node | tuple[str, str]
Slots = dict[Key, int]
INPUT, OUTPUT, CAPTURED = "input", "output", "captured"
# After so many steps a way is given up: it would be none that a reader sees.
_LONGEST_LOOK = 64
_Item = TypeVar("_Item", bound=Hashable)


@dataclass
class Side:
    """One of the two graphs of a page: what is drawn of it, in order, and the values between."""

    graph: AnyGraph | None
    keys: list[Key] = field(default_factory=list)
    captured: dict[str, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.graph is None:
            return
        nodes = shown_nodes(self.graph)
        inside = {value for node in nodes for value in node.outputs}
        free = [value for value in self.graph.inputs if not value.is_initializer()]
        inside.update(free)
        read = [value for node in nodes for value in values_read(node)]
        for value in [*read, *self.graph.outputs]:
            if value not in inside and walk.constant_tensor(value) is None and not value.is_initializer():
                self.captured.setdefault(value.name or "", value)
        self.keys = [*((INPUT, value.name or "") for value in free), *((CAPTURED, name) for name in self.captured)]
        self.keys += nodes
        # A value may be an output twice.
        self.keys += dict.fromkeys((OUTPUT, value.name or "") for value in self.graph.outputs)

    def reads(self, key: Key) -> list[ir.Value | None]:
        """Return what something drawn reads."""
        if isinstance(key, ir.Node):
            return list(key.inputs)
        if key[0] != OUTPUT or self.graph is None:
            return []
        return [next(value for value in self.graph.outputs if (value.name or "") == key[1])]

    def makes(self, key: Key) -> list[ir.Value]:
        """Return what something drawn makes."""
        if isinstance(key, ir.Node):
            return list(key.outputs)
        if key[0] == CAPTURED:
            return [self.captured[key[1]]]
        if key[0] == OUTPUT or self.graph is None:
            return []
        return [next(value for value in self.graph.inputs if (value.name or "") == key[1])]

    def edges(self) -> list[tuple[Key, Key]]:
        """Return which drawn thing reads which."""
        maker = {value: key for key in self.keys for value in self.makes(key)}
        return [(maker[value], key) for key in self.keys for value in self.all_read(key) if value in maker]

    def all_read(self, key: Key) -> list[ir.Value]:
        """Return what something drawn reads, what its nested graphs capture included."""
        return list(dict.fromkeys([*(value for value in self.reads(key) if value is not None), *self.captures(key)]))

    def captures(self, key: Key) -> list[ir.Value]:
        """Return what the graphs nested in something drawn read from around it, but for what it reads itself."""
        if not isinstance(key, ir.Node) or not any(walk.subgraphs(key)):
            return []
        return [value for value in dict.fromkeys(values_read(key)) if value not in key.inputs]


def assign_slots(before: Side, after: Side, pairs: Pairs) -> tuple[Slots, Slots]:
    """Give what is drawn a slot, partners the same one, in an order that keeps to both sides'."""
    shared = _partners(before, after, pairs)
    shared |= _stand_ins(before, after, shared)
    old: Slots = {}
    new: Slots = {}
    waiting = iter(before.keys)
    made = 0
    for key in after.keys:
        partner = shared.get(key)
        while partner is not None and partner not in old:
            old[next(waiting)] = made
            made += 1
        if partner is not None:
            new[key] = old[partner]
        else:
            new[key], made = made, made + 1
    for key in waiting:
        old[key], made = made, made + 1
    return old, new


def _partners(before: Side, after: Side, pairs: Pairs) -> dict[Key, Key]:
    ports = set(before.keys)
    found: dict[Key, Key] = {}
    for key in after.keys:
        partner = pairs.before.get(key) if isinstance(key, ir.Node) else key if key in ports else None
        if partner is not None:
            found[key] = partner
    return found


def _stand_ins(before: Side, after: Side, partners: Mapping[Key, Key]) -> dict[Key, Key]:
    """Return what was removed and leaves its slot to something added: both are between the same two partners."""
    maker = {value: key for key in after.keys for value in after.makes(key)}
    ends = _ends(before.edges())
    taken = set(partners.values())
    free = {key for key in before.keys if key not in taken}
    found: dict[Key, Key] = {}
    for key in after.keys:
        if key not in partners:
            continue
        for value in after.all_read(key):
            chain: list[Key] = []
            above = maker.get(value)
            while above is not None and above not in partners and above not in found and len(chain) < _LONGEST_LOOK:
                chain.append(above)
                above = next((maker[read] for read in after.all_read(above) if read in maker), None)
            if above is None or above not in partners or not chain:
                continue
            way = _way(partners[above], partners[key], ends, free)
            found.update(zip(reversed(chain), way, strict=False))
            free.difference_update(way)
    return found


def lay_out(sides: tuple[Side, Side], slots: tuple[Slots, Slots]) -> Layout:
    """Return one layout of the slots of both sides, and how the edges of both go between them."""
    edges = [
        {(places[start], places[end]) for start, end in side.edges()} for side, places in zip(sides, slots, strict=True)
    ]
    taken = [set(places.values()) for places in slots]
    # What goes straight on the one side where the other has more in between goes where that would be.
    detours = {
        **_detours(edges[1] - edges[0], edges[0], taken[0] - taken[1]),
        **_detours(edges[0] - edges[1], edges[1], taken[1] - taken[0]),
    }
    layout = layered(len(taken[0] | taken[1]), (edges[0] | edges[1]) - detours.keys(), taken[0] & taken[1])
    bends = {edge: line for edge, line in layout.bends.items() if line}
    for (start, end), path in detours.items():
        bends[start, end] = [(layout.rows[slot] - layout.rows[start], layout.x[slot]) for slot in path]
    return Layout(layout.rows, layout.x, bends, layout.far)


def _detours(edges: Set[Edge], others: Set[Edge], free: Set[int]) -> dict[Edge, list[int]]:
    """Return, of each edge that has one, a way by other edges over slots that are free on its own side."""
    ends = _ends(sorted(others))
    ways = ((edge, _way(*edge, ends, free)) for edge in sorted(edges))
    return {edge: way for edge, way in ways if way}


def _ends(edges: Iterable[tuple[_Item, _Item]]) -> dict[_Item, list[_Item]]:
    ends: dict[_Item, list[_Item]] = {}
    for start, end in edges:
        ends.setdefault(start, []).append(end)
    return ends


def _way(start: _Item, end: _Item, ends: Mapping[_Item, list[_Item]], free: Set[_Item]) -> list[_Item]:
    """Return what is on a shortest way between two, both left out; [] where there is none, or none soon."""
    came_from: dict[_Item, _Item] = {}
    frontier = [slot for slot in ends.get(start, ()) if slot in free]
    came_from.update(dict.fromkeys(frontier, start))
    for slot in frontier:
        if len(frontier) > _LONGEST_LOOK:
            break
        for reached in ends.get(slot, ()):
            if reached == end:
                way = [slot]
                while came_from[way[-1]] != start:
                    way.append(came_from[way[-1]])
                return way[::-1]
            if reached in free and reached not in came_from:
                came_from[reached] = slot
                frontier.append(reached)
    return []
