"""Dead code: nodes, initializers and functions nothing reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass


@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove nodes, initializers and functions that no output depends on."""

    name = "dead-code"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "erase": "a node whose outputs nothing reads has no effect",
        "remove-initializer": "a constant nothing reads has no effect",
        "remove-function": "a function nothing calls has no effect",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Remove what is dead, readers before what they read."""
        for graph in list(walk.every_graph(model)):
            _erase_dead_nodes(graph, ctx)
        for value in list(walk.initializers(model)):
            # An initializer that is also an input is part of the signature, read or not.
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                ctx.rewriter.remove_initializer(value)
        _remove_dead_functions(model, ctx)


def _erase_dead_nodes(graph: ir.Graph | ir.Function, ctx: Context) -> None:
    for node in reversed(list(graph)):
        if not walk.is_read(node):
            ctx.rewriter.erase(node)


def _remove_dead_functions(model: ir.Model, ctx: Context) -> None:
    called: set[ir.OperatorIdentifier] = set()
    frontier = list(walk.graphs_within(model.graph))
    while frontier:
        for node in frontier.pop():
            key = node.op_identifier()
            if key in model.functions and key not in called:
                called.add(key)
                frontier.extend(walk.graphs_within(model.functions[key]))
    for key in set(model.functions) - called:
        ctx.rewriter.remove_function(key)
