"""Symbolic integers by number: each computed once, and by as few nodes as it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.dims import Size
from graphopt.shape_rules.shape_facts import Dims

INT64 = ir.DataType.INT64
# From here on, Shape gives a part of a shape.
FIRST_OPSET_WITH_PARTS_OF_SHAPES = 15
# Chains of shape arithmetic are shorter than this; what hangs on more nodes is no such chain.
CHAIN_LIMIT = 64
Entries = tuple[Size, ...]
Key = tuple[ir.DataType, tuple[int, ...], Entries]


def sweep(node: ir.Node, ctx: Context) -> None:
    """Erase a node if nothing reads it, and then whatever only it was computed from."""
    left = [node]
    while left:
        node = left.pop()
        if node.graph is None or walk.is_read(node):
            continue
        before = [producer for value in walk.values_read(node) if (producer := value.producer()) is not None]
        ctx.rewriter.erase(node)
        left += before


@dataclass
class Scope:
    """What a graph can read at a point: its own values so far, and those of the graphs around it.

    Attributes:
        numbers: The first value that holds some symbolic integers.
        slices: The first value some neighbouring dimensions belong to, from which of them on, and how many it has.
        shapes: The shapes looked at.
        names: What the graph calls its own: behind such a name, it cannot see a value of a graph around it.
    """

    outer: Scope | None = None
    names: frozenset[str] = frozenset()
    numbers: dict[Key, ir.Value] = field(default_factory=dict)
    slices: dict[Entries, tuple[ir.Value, int, int]] = field(default_factory=dict)
    shapes: set[Dims] = field(default_factory=set)

    def number(self, key: Key) -> ir.Value | None:
        """Return a value that holds these integers."""
        found = self.numbers.get(key)
        if found is not None and _is_there(found):
            return found
        there = self.outer.number(key) if self.outer is not None else None
        return there if there is not None and there.name not in self.names else None

    def slice(self, entries: Entries) -> tuple[ir.Value, int, int] | None:
        """Return a value with these neighbouring dimensions."""
        found = self.slices.get(entries)
        if found is not None and _is_there(found[0]):
            return found
        there = self.outer.slice(entries) if self.outer is not None else None
        return there if there is not None and there[0].name not in self.names else None

    def define(self, value: ir.Value) -> None:
        """Add a value."""
        key = key_of(value)
        if key is not None and self.number(key) is None:
            self.numbers[key] = value
        dims = shapes.dims_of(value)
        if dims is None or dims in self.shapes or all(isinstance(dim, int) for dim in dims):
            return
        self.shapes.add(dims)
        for start in range(len(dims)):
            for end in range(start + 1, len(dims) + 1):
                whole = end - start == len(dims)
                known = self.slices.get(dims[start:end])
                if known is None or (whole and known[2] > end):
                    self.slices[dims[start:end]] = (value, start, len(dims))


def _own_names(graph: ir.Graph) -> frozenset[str]:
    defined = [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
    return frozenset(value.name or "" for value in defined)


def _is_there(value: ir.Value) -> bool:
    """Return whether a value is still computed: what nothing read any more may be gone."""
    producer = value.producer()
    return producer is None or producer.graph is not None


def key_of(value: ir.Value) -> Key | None:
    """Return what two values share if their symbolic integers are the same, or None where there are none."""
    contents = shapes.contents(value)
    if contents is None or value.dtype is None or contents.known is not None:
        return None
    return value.dtype, contents.shape, contents.entries


class Numbering:
    """Goes through a model in order, and lets what comes later read what is there already."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self.model, self.ctx = model, ctx
        self.has_parts = walk.opset(model) >= FIRST_OPSET_WITH_PARTS_OF_SHAPES

    def run(self) -> None:
        """Go through the main graph and those nested in it; the bodies of functions know no shapes."""
        self._graph(self.model.graph, Scope())

    def _graph(self, graph: ir.Graph, scope: Scope) -> None:
        for value in graph.inputs:
            scope.define(value)
        for node in list(graph):
            if node.graph is None:
                continue
            for inner in walk.subgraphs(node):
                self._graph(inner, Scope(scope, _own_names(inner)))
            for value in node.outputs:
                if value.uses() and not value.is_graph_output():
                    self._value(node, value, scope)
            if node.graph is not None:
                for value in node.outputs:
                    scope.define(value)

    def _value(self, node: ir.Node, value: ir.Value, scope: Scope) -> None:
        key = key_of(value)
        if key is None:
            return
        same = scope.number(key)
        if same is not None:
            self._replace("same-integers", node, value, same)
            return
        dtype, shape, entries = key
        if dtype is not INT64 or len(shape) != 1 or walk.is_onnx_op(node, "Shape"):
            return
        if self._can_be_read(entries, scope) and _count_of_chain(node, set()) > 1:
            with self.ctx.rewriter.edit("part-of-shape", node):
                self._replace("part-of-shape", node, value, self._read(entries, scope, node))
        else:
            self._shorten(node, value, entries, scope)

    def _replace(self, kind: str, node: ir.Node, value: ir.Value, new: ir.Value) -> None:
        producer = new.producer()
        with self.ctx.rewriter.edit(kind, node):
            if not self.ctx.agrees(kind, [node], [value], [new], [producer] if producer is not None else []):
                return
            self.ctx.rewriter.replace(value, new)
            sweep(node, self.ctx)

    # Parts of shapes

    def _can_be_read(self, entries: Entries, scope: Scope) -> bool:
        found = scope.slice(entries)
        return found is not None and (self.has_parts or found[2] == len(entries))

    def _read(self, entries: Entries, scope: Scope, node: ir.Node) -> ir.Value:
        """Return the dimensions of a value, by a new Shape before a node."""
        found = scope.slice(entries)
        assert found is not None, "asked for before"
        value, start, rank = found
        end = start + len(entries)
        attributes = {"start": start or None, "end": end if end < rank else None}
        made = self.ctx.rewriter.make("Shape", [value], attributes, sources=[node])
        self.ctx.rewriter.insert(made, before=node)
        scope.define(made.outputs[0])
        return made.outputs[0]

    # Pieces

    def _shorten(self, node: ir.Node, value: ir.Value, entries: Entries, scope: Scope) -> None:
        """Put integers together from longer pieces, if fewer nodes are left then."""
        pieces = self._pieces(entries, scope)
        if pieces is None or len(pieces) < 2:
            return
        kept = {producer for piece in pieces if isinstance(piece, ir.Value) and (producer := piece.producer())}
        new = 1 + sum(isinstance(piece, tuple) and not _is_known(piece) for piece in pieces)
        if new >= _count_of_chain(node, kept):
            return
        with self.ctx.rewriter.edit("fewer-pieces", node):
            inputs = [self._made(piece, scope, node, value) for piece in pieces]
            made = self.ctx.rewriter.make("Concat", inputs, {"axis": 0}, sources=[node])
            self.ctx.rewriter.insert(made, before=node)
            self._replace("fewer-pieces", node, value, made.outputs[0])
            scope.define(made.outputs[0])

    def _pieces(self, entries: Entries, scope: Scope) -> list[ir.Value | Entries] | None:
        """Cut integers into numbers, tensors that are there, and parts of shapes, each as long as can be."""
        pieces: list[ir.Value | Entries] = []
        place = 0
        while place < len(entries):
            length, piece = self._longest(entries[place:], scope)
            if piece is None:
                return None
            pieces.append(piece)
            place += length
        return pieces

    def _longest(self, entries: Entries, scope: Scope) -> tuple[int, ir.Value | Entries | None]:
        numbers = next((i for i, entry in enumerate(entries) if not isinstance(entry, int)), len(entries))
        if numbers:
            return numbers, entries[:numbers]
        for length in range(len(entries), 0, -1):
            part = entries[:length]
            there = scope.number((INT64, (length,), part))
            if there is not None:
                return length, there
            if self._can_be_read(part, scope):
                return length, part
        return 0, None

    def _made(self, piece: ir.Value | Entries, scope: Scope, node: ir.Node, value: ir.Value) -> ir.Value:
        if isinstance(piece, ir.Value):
            return piece
        if _is_known(piece):
            return self.ctx.rewriter.const(np.array(piece, np.int64), f"{value.name}_piece", near=node)
        return self._read(piece, scope, node)


def _is_known(entries: Sequence[Size]) -> bool:
    return all(isinstance(entry, int) for entry in entries)


def _count_of_chain(node: ir.Node, kept: set[ir.Node]) -> int:
    """Return how many nodes go with a node: itself, and what is computed for it alone, but for some that stay."""
    going = {node}
    left = [node]
    while left and len(going) < CHAIN_LIMIT:
        for value in left.pop().inputs:
            producer = value.producer() if value is not None else None
            if producer is None or producer in going or producer in kept:
                continue
            outputs = producer.outputs
            if all(not one.is_graph_output() and all(use.node in going for use in one.uses()) for one in outputs):
                going.add(producer)
                left.append(producer)
    return len(going)
