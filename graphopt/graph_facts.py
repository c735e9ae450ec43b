"""What a viewer shows of two models' graphs, as plain data: nodes, values, weights, and where each node is drawn.

Both sides of a graph share one layout, in which a node and its partner have one place: the two can be moved together,
and what was removed or added is a gap on the other side, as in a comparison of texts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.fragment import values_read
from graphopt.graph_layout import Edge, layered
from graphopt.graph_pairs import AnyGraph, GraphPair, Pairs, shown_nodes
from graphopt.model_diff import show_attribute
from graphopt.provenance import origins
from graphopt.tensor_glance import glance

Facts = dict[str, Any]
# What a node of the drawing stands for: a node of the model, or a value named by its kind.
_Key = ir.Node | tuple[str, str]
# After so many slots a way around is given up: it would be none that a reader sees.
_LONGEST_LOOK = 64
_UNKNOWN_SIZE = re.compile(r"\?[0-9a-f]+")
_INPUT, _OUTPUT, _CAPTURED = "input", "output", "captured"


def graph_facts(pairs: Pairs) -> list[Facts]:
    """Return what is shown of each graph, the main graph first; all of it JSON values.

    Keys of a graph: `title`, `parent` and `holder` (which graph it is nested in, and the name of the node that holds
    it; else null), `x` and `row` of each slot, `bends` (of edges between slots, `"3,17"`: rows below the start, and x),
    `far` (such edges that are not drawn), and the sides `before` and `after`, null or with `nodes` and `values`. Keys
    of a node: `slot`, `kind` (`node`, `input`, `output` or `captured`), `status`, `op`, `domain`, `name`, `attributes`,
    `changes`, `inputs`, `outputs` and `captures` (indices of values, null where left out), `related` (graph and node on
    the other side), `graphs` (those nested in it, and a function it calls), `origins`. Keys of a value: `name`, `type`,
    `shape`, and `constant` or null.
    """
    atlas = _Atlas(pairs)
    return [atlas.page(index) for index in range(len(pairs.graphs))]


@dataclass
class _Side:
    """One of the two graphs of a page: what is drawn of it, in order, and the values between."""

    graph: AnyGraph | None
    keys: list[_Key] = field(default_factory=list)
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
        self.keys = [*((_INPUT, value.name or "") for value in free), *((_CAPTURED, name) for name in self.captured)]
        self.keys += nodes
        self.keys += [(_OUTPUT, value.name or "") for value in self.graph.outputs]

    def reads(self, key: _Key) -> list[ir.Value | None]:
        """Return what something drawn reads."""
        if isinstance(key, ir.Node):
            return list(key.inputs)
        if key[0] != _OUTPUT or self.graph is None:
            return []
        return [next(value for value in self.graph.outputs if (value.name or "") == key[1])]

    def makes(self, key: _Key) -> list[ir.Value]:
        """Return what something drawn makes."""
        if isinstance(key, ir.Node):
            return list(key.outputs)
        if key[0] == _CAPTURED:
            return [self.captured[key[1]]]
        if key[0] == _OUTPUT or self.graph is None:
            return []
        return [next(value for value in self.graph.inputs if (value.name or "") == key[1])]

    def edges(self) -> list[tuple[_Key, _Key]]:
        """Return which drawn thing reads which."""
        maker = {value: key for key in self.keys for value in self.makes(key)}
        return [(maker[value], key) for key in self.keys for value in self.all_read(key) if value in maker]

    def all_read(self, key: _Key) -> list[ir.Value]:
        """Return what something drawn reads, what its nested graphs capture included."""
        return list(dict.fromkeys([*(value for value in self.reads(key) if value is not None), *self.captures(key)]))

    def captures(self, key: _Key) -> list[ir.Value]:
        """Return what the graphs nested in something drawn read from around it, but for what it reads itself."""
        if not isinstance(key, ir.Node) or not any(walk.subgraphs(key)):
            return []
        return [value for value in dict.fromkeys(values_read(key)) if value not in key.inputs]


class _Atlas:
    """All pages of two models: what is on each, and the way from one to another."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._sides = [(_Side(pair.before), _Side(pair.after)) for pair in pairs.graphs]
        self._where = [self._index_nodes(side) for side in (0, 1)]
        self._glances: dict[int, tuple[ir.TensorProtocol, Facts]] = {}
        self._nested: dict[ir.Node, list[int]] = {}
        self._functions: dict[str, int] = {}
        for index, pair in enumerate(pairs.graphs):
            for holder in (pair.holder_before, pair.holder_after):
                if holder is not None:
                    self._nested.setdefault(holder, []).append(index)
            if pair.parent is None and pair.title:
                self._functions[pair.title] = index

    def _index_nodes(self, side: int) -> dict[ir.Node, tuple[int, int]]:
        return {
            key: (page, index)
            for page, sides in enumerate(self._sides)
            for index, key in enumerate(sides[side].keys)
            if isinstance(key, ir.Node)
        }

    def page(self, index: int) -> Facts:
        """Return the facts of a pair of graphs."""
        pair = self._pairs.graphs[index]
        slots = self._slots(index)
        return {
            "title": pair.title,
            "parent": pair.parent,
            "holder": _holder(pair),
            **self._layout(index, slots),
            "before": self._side(index, slots[0], is_after=False),
            "after": self._side(index, slots[1], is_after=True),
        }

    def _slots(self, index: int) -> tuple[dict[_Key, int], dict[_Key, int]]:
        """Give what is drawn a slot, partners the same one, in an order that keeps to both sides'."""
        before, after = self._sides[index]
        old: dict[_Key, int] = {}
        new: dict[_Key, int] = {}
        waiting = iter(before.keys)
        made = 0
        for key in after.keys:
            partner = self._partner(key, before)
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

    def _partner(self, key: _Key, before: _Side) -> _Key | None:
        if isinstance(key, ir.Node):
            return self._pairs.before.get(key)
        return key if key in before.keys else None

    def _layout(self, index: int, slots: tuple[dict[_Key, int], dict[_Key, int]]) -> Facts:
        edges = [
            {(places[start], places[end]) for start, end in side.edges()}
            for side, places in zip(self._sides[index], slots, strict=True)
        ]
        taken = [set(places.values()) for places in slots]
        # What goes straight on the one side where the other has more in between goes where that would be.
        detours = {
            **_detours(edges[1] - edges[0], edges[0], taken[0] - taken[1]),
            **_detours(edges[0] - edges[1], edges[1], taken[1] - taken[0]),
        }
        layout = layered(len(taken[0] | taken[1]), (edges[0] | edges[1]) - detours.keys(), taken[0] & taken[1])
        bends = {edge: line for edge, line in layout.bends.items() if line}
        bends |= {
            edge: [(layout.rows[slot] - layout.rows[edge[0]], layout.x[slot]) for slot in path]
            for edge, path in detours.items()
        }
        return {
            "x": layout.x,
            "row": layout.rows,
            "bends": {f"{start},{end}": line for (start, end), line in bends.items()},
            "far": [list(edge) for edge in sorted(layout.far)],
        }

    def _side(self, index: int, slots: dict[_Key, int], *, is_after: bool) -> Facts | None:
        side = self._sides[index][is_after]
        if side.graph is None:
            return None
        values = _Values(self)
        other = self._sides[index][not is_after]
        nodes = []
        for key in side.keys:
            facts = {
                "slot": slots[key],
                "inputs": [values.index(value) for value in side.reads(key)],
                "outputs": [values.index(value) if value.name else None for value in side.makes(key)],
            }
            if isinstance(key, ir.Node):
                facts["captures"] = [values.index(value) for value in side.captures(key)]
                facts |= self._node(key, is_after=is_after)
            else:
                facts |= self._port(key, index, other, is_after=is_after)
            nodes.append(facts)
        return {"nodes": nodes, "values": values.facts}

    def _node(self, node: ir.Node, *, is_after: bool) -> Facts:
        pairs = self._pairs
        partner = (pairs.before if is_after else pairs.after).get(node)
        related = (pairs.made_from if is_after else pairs.became).get(node, [])
        others = dict.fromkeys([*([partner] if partner is not None else []), *related])
        where = self._where[not is_after]
        called = self._functions.get(f"{node.domain}::{node.op_type}")
        return {
            "kind": "node",
            "status": pairs.status(node, is_after=is_after),
            "op": node.op_type,
            "domain": "" if node.domain in walk.ONNX_DOMAINS else node.domain,
            "name": node.name or "",
            "attributes": [
                [name, show_attribute(attribute)]
                for name, attribute in node.attributes.items()
                if not _holds_graphs(attribute)
            ],
            "changes": pairs.changes.get(node if is_after or partner is None else partner, []),
            "related": [list(where[other]) for other in others if other in where],
            "graphs": self._nested.get(node, []) + ([called] if called is not None else []),
            "origins": sorted(origins(node)),
        }

    def _port(self, key: tuple[str, str], index: int, other: _Side, *, is_after: bool) -> Facts:
        there = other.keys.index(key) if key in other.keys else None
        alone = "added" if is_after else "removed"
        changes = [] if there is None else self._port_changes(key, index)
        return {
            "kind": key[0],
            "status": alone if there is None else "changed" if changes else "kept",
            "op": key[0],
            "name": key[1],
            "changes": changes,
            "related": [] if there is None else [[index, there]],
        }

    def _port_changes(self, key: tuple[str, str], index: int) -> list[str]:
        texts = []
        for side in self._sides[index]:
            values = side.reads(key) or side.makes(key)
            texts.append(" ".join(_type(values[0])) if values[0] is not None else "")
        return [] if texts[0] == texts[1] else [f"{texts[0]} → {texts[1]}"]

    def glance(self, tensor: ir.TensorProtocol) -> Facts:
        """Return what a tensor holds; looked at once, however many nodes and sides read it."""
        if id(tensor) not in self._glances:
            # The tensor is kept along, so that no other takes its id.
            self._glances[id(tensor)] = (tensor, glance(tensor))
        return self._glances[id(tensor)][1]


def _detours(edges: set[Edge], others: set[Edge], free: set[int]) -> dict[Edge, list[int]]:
    """Return, of each edge that has one, a way by other edges over slots that are free on its own side."""
    ends: dict[int, list[int]] = {}
    for start, end in sorted(others):
        ends.setdefault(start, []).append(end)
    ways = ((edge, _way(*edge, ends, free)) for edge in sorted(edges))
    return {edge: way for edge, way in ways if way}


def _way(start: int, end: int, ends: dict[int, list[int]], free: set[int]) -> list[int]:
    """Return the slots of a shortest way between two, both left out; [] where there is none, or none soon."""
    came_from: dict[int, int] = {}
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


class _Values:
    """The values of one side, numbered as they are met."""

    def __init__(self, atlas: _Atlas) -> None:
        self.facts: list[Facts] = []
        self._atlas = atlas
        self._numbers: dict[ir.Value, int] = {}

    def index(self, value: ir.Value | None) -> int | None:
        """Return the number of a value, None for one left out."""
        if value is None:
            return None
        if value not in self._numbers:
            self._numbers[value] = len(self.facts)
            tensor = walk.constant_tensor(value) or (value.const_value if value.is_initializer() else None)
            kind, shape = _type(value) if tensor is None else (str(tensor.dtype).lower(), _shape(tensor.shape))
            constant = None if tensor is None else self._atlas.glance(tensor)
            self.facts.append({"name": value.name or "", "type": kind, "shape": shape, "constant": constant})
        return self._numbers[value]


def _holder(pair: GraphPair) -> str | None:
    holder = pair.holder_after or pair.holder_before
    return None if holder is None else walk.label(holder)


def _holds_graphs(attribute: ir.Attr) -> bool:
    return attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)


def _type(value: ir.Value) -> tuple[str, str]:
    """Return the dtype and shape of a value as people write them, "" where unknown."""
    kind = str(value.dtype).lower() if isinstance(value.type, ir.TensorType) else str(value.type or "").lower()
    return kind, "" if value.shape is None else _shape(value.shape)


def _shape(shape: ir.ShapeProtocol) -> str:
    return "×".join(map(_dim, shape)) or "scalar"


def _dim(dim: int | ir.SymbolicDimProtocol) -> str:
    # What inference computes is written with a sign in front, so that no file's name is taken for it, and sizes that
    # nothing is known of have numbers that differ from run to run.
    return str(dim) if isinstance(dim, int) else _UNKNOWN_SIZE.sub("?", (dim.value or "?").removeprefix("="))
