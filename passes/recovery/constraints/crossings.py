"""Where values go that pass into functions and out of them, and out of the branches of an If."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir

from graphopt import walk

Use: TypeAlias = tuple[tuple[ir.Node, ...], ir.Node, int]
"""Calls and branches gone through, the node that reads a value, and at which of its inputs."""
Crossed: TypeAlias = tuple[ir.Node, ir.Value]
"""A call or an If, and what a value is called behind it."""


@dataclass(frozen=True, eq=False)
class Crossings:
    """The calls and branches of a model.

    Attributes:
        functions: The model's functions.
        runners: Graph of a function to the nodes that call it; branch of an If to that.
        holders: Nested graph to the node that it is an attribute of.
        inputs: The model's inputs.
    """

    functions: Mapping[ir.OperatorIdentifier, ir.Function]
    runners: Mapping[ir.Graph, list[ir.Node]]
    holders: Mapping[ir.Graph, ir.Node]
    inputs: frozenset[ir.Value]

    def uses(self, value: ir.Value, crossed: set[Crossed]) -> Iterator[Use]:
        """Yield what reads a value, in whatever function or behind whatever branch.

        Args:
            value: The value.
            crossed: What it was by another name already, and by which call or branch: none is gone through again. Added
                to.
        """
        for use in value.uses():
            function = self.functions.get(use.node.op_identifier())
            if function is None:
                yield (), use.node, use.idx
            elif use.idx < len(function.inputs):
                yield from self._beyond(use.node, function.inputs[use.idx], crossed)
        for node, given in self._given_back(value):
            yield from self._beyond(node, given, crossed)

    def arguments(self, value: ir.Value) -> Iterator[ir.Value]:
        """Yield what an input of a function is, call by call; nothing of any other value."""
        if not value.is_graph_input() or value.graph is None:
            return
        for node in self.runners.get(value.graph, ()):
            pairs = zip(value.graph.inputs, node.inputs, strict=False)
            yield from (given for inner, given in pairs if inner is value and given is not None)

    def holding(self, graph: ir.Graph | ir.Function | None) -> Iterator[ir.Node]:
        """Yield the nodes whose nested graphs a graph is, or is in, from the inside to the outside."""
        while graph is not None and (holder := self.holders.get(walk.body(graph))) is not None:
            yield holder
            graph = holder.graph

    def calling(self, graph: ir.Graph | ir.Function | None) -> Iterator[ir.Node]:
        """Yield the calls that a graph of a function runs in, and what holds these; one may come several times."""
        for holder in self.holding(graph):
            graph = holder.graph
        for call in self.runners.get(walk.body(graph), ()) if graph is not None else ():
            yield from (call, *self.holding(call.graph))
            yield from self.calling(call.graph)

    def _beyond(self, node: ir.Node, value: ir.Value, crossed: set[Crossed]) -> Iterator[Use]:
        if (node, value) not in crossed:
            crossed.add((node, value))
            yield from (((node, *through), reader, index) for through, reader, index in self.uses(value, crossed))

    def _given_back(self, value: ir.Value) -> Iterator[tuple[ir.Node, ir.Value]]:
        """Yield the nodes that return a value as one of theirs, and that."""
        if not value.is_graph_output() or value.graph is None:
            return
        for node in self.runners.get(value.graph, ()):
            yield from (
                (node, given) for given, inner in zip(node.outputs, value.graph.outputs, strict=False) if inner is value
            )


def crossings_of(model: ir.Model) -> Crossings:
    """Return the calls and branches of a model."""
    runners: dict[ir.Graph, list[ir.Node]] = {}
    holders: dict[ir.Graph, ir.Node] = {}
    for node in walk.every_node(model):
        function, nested = model.functions.get(node.op_identifier()), list(walk.subgraphs(node))
        holders.update(dict.fromkeys(nested, node))
        ran = [function.graph] if function is not None else nested if node.op_type == "If" else []
        for graph in ran:
            runners.setdefault(graph, []).append(node)
    return Crossings(model.functions, runners, holders, frozenset(model.graph.inputs))
