"""What a viewer shows of two models' graphs, as plain data: nodes, values, weights, and where each node is drawn."""

from __future__ import annotations

import re
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.graph_view.pairs import GraphPair, Pairs
from graphopt.graph_view.slots import Key, Side, Slots, assign_slots, lay_out
from graphopt.graph_view.tensor_glance import glance
from graphopt.model_diff import show_attribute
from graphopt.provenance import origins

Facts = dict[str, Any]
_UNKNOWN_SIZE = re.compile(r"\?[0-9a-f]+")


def graph_facts(pairs: Pairs) -> list[Facts]:
    """Return what is shown of each graph, the main graph first; all of it JSON values.

    Keys of a graph: `title`, `parent` and `holder` (which graph it is nested in, and the name of the node that holds
    it; else null), `x` and `row` of each slot, `bends` (of edges between slots, `"3,17"`: rows below the start, and x),
    `far` (such edges that are not drawn), and the sides `before` and `after`, null or with `nodes` and `values`. Keys
    of a node: `slot`, `kind` (`node`, `input`, `output` or `captured`), `status`, `op`, `domain`, `name`, `attributes`,
    `changes`, `inputs`, `outputs` and `captures` (indices of values, null where left out), `partner` (a node on the
    other side, or null), `related` (graph and node of others there that share an origin), `graphs` (those nested in it,
    and a function it calls), `origins`. Keys of a value: `name`, `type`, `shape`, and `constant` or null.
    """
    atlas = _Atlas(pairs)
    return [atlas.page(index) for index in range(len(pairs.graphs))]


class _Atlas:
    """All pages of two models: what is on each, and the way from one to another."""

    def __init__(self, pairs: Pairs) -> None:
        self._pairs = pairs
        self._sides = [(Side(pair.before), Side(pair.after)) for pair in pairs.graphs]
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
        sides = self._sides[index]
        slots = assign_slots(*sides, self._pairs)
        return {
            "title": pair.title,
            "parent": pair.parent,
            "holder": _holder(pair),
            **_drawn(sides, slots),
            "before": self._side(index, slots[0], is_after=False),
            "after": self._side(index, slots[1], is_after=True),
        }

    def _side(self, index: int, slots: dict[Key, int], *, is_after: bool) -> Facts | None:
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
            "partner": where[partner][1] if partner is not None else None,
            "related": [list(where[other]) for other in related if other in where and other is not partner],
            "graphs": self._nested.get(node, []) + ([called] if called is not None else []),
            "origins": sorted(origins(node)),
        }

    def _port(self, key: tuple[str, str], index: int, other: Side, *, is_after: bool) -> Facts:
        there = other.keys.index(key) if key in other.keys else None
        alone = "added" if is_after else "removed"
        changes = [] if there is None else self._port_changes(key, index)
        return {
            "kind": key[0],
            "status": alone if there is None else "changed" if changes else "kept",
            "op": key[0],
            "name": key[1],
            "changes": changes,
            "partner": there,
            "related": [],
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


def _drawn(sides: tuple[Side, Side], slots: tuple[Slots, Slots]) -> Facts:
    """Return where each slot is, and how the edges between them go."""
    layout = lay_out(sides, slots)
    return {
        "x": layout.x,
        "row": layout.rows,
        "bends": {f"{start},{end}": line for (start, end), line in layout.bends.items()},
        "far": [list(edge) for edge in sorted(layout.far)],
    }


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
