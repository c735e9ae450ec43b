"""Common subexpressions: nodes that compute the same from the same, computed once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass

from ..analyses.sameness import Keys


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merge nodes that have equal operators, attributes and inputs."""

    name = "common-subexpressions"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "merge": "nodes with equal operators, attributes, nested graphs and inputs have equal outputs",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Merge in order; a nested graph may use what the graphs around it have computed before."""
        keys = Keys.of(model)
        _Merger(ctx, keys, walk.opset(model)).visit(model.graph)
        for function in model.functions.values():
            _Merger(ctx, keys, walk.imported(function.opset_imports)).visit(function)


@dataclass
class _Merger:
    """Visits a graph and those nested in it, and knows the first node of each key that is visible from there."""

    ctx: Context
    keys: Keys
    opset: int
    first: dict[Hashable, ir.Node] = field(default_factory=dict)

    def visit(self, graph: ir.Graph | ir.Function) -> None:
        seen: list[Hashable] = []
        for node in list(graph):
            for inner in walk.subgraphs(node):
                self.visit(inner)
            key = self.keys.of_node(node, self.opset)
            if key is None:
                continue
            same = self.first.setdefault(key, node)
            if same is node:
                seen.append(key)
            else:
                self._merge(node, same)
        for key in seen:
            del self.first[key]

    def _merge(self, node: ir.Node, same: ir.Node) -> None:
        if not all(_may_replace(old, new) for old, new in zip(node.outputs, same.outputs, strict=True)):
            return
        if not self.ctx.agrees("merge", [node], node.outputs, same.outputs, made=[same]):
            return
        with self.ctx.rewriter.edit("merge", node, same):
            for old, new in zip(node.outputs, same.outputs, strict=True):
                self.ctx.rewriter.replace(old, new)
            self.ctx.rewriter.erase(node)


def _may_replace(old: ir.Value, new: ir.Value) -> bool:
    """Return whether a value may stand for another, and is the graph output the other may be."""
    if old.dtype is not None and new.dtype is not None and old.dtype != new.dtype:
        return False
    # What is an output already, or comes from another graph, cannot become one without an Identity.
    return not old.is_graph_output() or (new.graph is old.graph and not new.is_graph_output())
