"""Dead code: nodes, outputs, carried values, initializers and functions nothing reads."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass

from .unread_ports import leave_out_unread, narrow


@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove nodes, their outputs, initializers and functions that no output depends on."""

    name = "dead-code"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "erase": "a node whose outputs nothing reads has no effect",
        "optional-output": "an optional output nothing reads need not be computed",
        "if-output": "an output of an If that nothing reads need not be computed by its branches",
        "loop-value": "what a Loop or Scan carries for its own sake, or collects for nobody, has no effect",
        "remove-initializer": "a constant nothing reads has no effect",
        "remove-function": "a function nothing calls has no effect",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Remove what is dead, readers before what they read."""
        _sweep(model.graph, ctx, walk.opset(model))
        for function in model.functions.values():
            _sweep(function, ctx, walk.imported(function.opset_imports))
        for value in list(walk.initializers(model)):
            # An initializer that is also an input is part of the signature, read or not.
            if not (value.uses() or value.is_graph_output() or value.is_graph_input()):
                ctx.rewriter.remove_initializer(value)
        called = walk.called_functions(model)
        for key in [key for key in model.functions if key not in called]:
            ctx.rewriter.remove_function(key)


def _sweep(graph: ir.Graph | ir.Function, ctx: Context, opset: int) -> None:
    """Visit nodes from last to first, nested ones before what they may capture."""
    for node in reversed(list(graph)):
        if not walk.is_read(node):
            ctx.rewriter.erase(node)
            continue
        leave_out_unread(node, ctx)
        left = narrow(node, ctx, opset, lambda body: _sweep(body, ctx, opset))
        for inner in walk.subgraphs(left):
            _sweep(inner, ctx, opset)
