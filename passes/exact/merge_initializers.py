"""Duplicate initializers: constants of equal content, stored once."""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass

from ..analyses.tensor_content import equal_tensors


@dataclass(frozen=True)
class MergeInitializers(Pass):
    """Merge initializers that hold the same, those of nested graphs with those of the main graph."""

    name = "merge-initializers"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "merge": "initializers of equal dtype, shape and bytes are the same",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Merge all there are."""
        merge_equal(model, ctx)


def merge_equal(model: ir.Model, ctx: Context) -> list[ir.TensorProtocol]:
    """Merge group by group; a tensor whose dtype and shape no other one has is never looked at.

    Returns:
        The tensors that went.
    """
    gone: list[ir.TensorProtocol] = []
    for values in equal_initializers(model):
        gone += merge_values(values, model, ctx)
    return gone


def equal_initializers(model: ir.Model) -> Iterator[list[ir.Value]]:
    """Yield the initializers that hold the same, each once, where one can stand for the others."""
    for values in _candidates(model):
        tensors = [value.const_value for value in values if value.const_value is not None]
        for group in equal_tensors(tensors):
            yield [values[index] for index in group]


def _candidates(model: ir.Model) -> Iterator[list[ir.Value]]:
    """Yield the constants of each dtype and shape that more than one has, those of the main graph first."""
    groups: dict[Hashable, list[ir.Value]] = {}
    for scope, graph in scopes(model):
        for value in walk.body(graph).initializers.values():
            tensor = walk.constant_tensor(value)
            if tensor is not None and (value.uses() or value.is_graph_output()):
                groups.setdefault((scope, tensor.dtype, walk.dims(tensor)), []).append(value)
    for values in groups.values():
        if len(values) > 1 and not all(value.is_graph_output() for value in values):
            yield values


def scopes(model: ir.Model) -> Iterator[tuple[Hashable, ir.Graph | ir.Function]]:
    """Yield every graph with what it may share initializers with: the main graph's tree, in a function only itself."""
    for graph in walk.graphs_within(model.graph):
        yield None, graph
    for function in model.functions.values():
        for graph in walk.graphs_within(function):
            yield id(graph), graph


def merge_values(values: Sequence[ir.Value], model: ir.Model, ctx: Context) -> list[ir.TensorProtocol]:
    """Let one of some equal initializers stand for the others, and return the tensors that went."""
    kept = _kept(values, model)
    gone: list[ir.TensorProtocol] = []
    for value in values:
        if value is kept or value.is_graph_output():
            continue
        if kept is None:
            kept = value  # the first that may leave its graph for the main one
            continue
        with ctx.rewriter.edit("merge", *value.consumers()):
            if kept.graph is not model.graph and kept.graph is not value.graph:
                ctx.rewriter.lift(kept, near=kept.consumers()[0])
            ctx.rewriter.replace(value, kept)
            ctx.rewriter.remove_initializer(value)
        gone += [value.const_value] if value.const_value is not None else []
    return gone


def _kept(values: Sequence[ir.Value], model: ir.Model) -> ir.Value | None:
    """Return the initializer to keep: a graph output must stay; else the first one that all can read as it is."""
    around = [value for value in values if value.graph is model.graph]
    if not around and len({value.graph for value in values}) == 1:
        around = list(values)
    return next((value for value in around if value.is_graph_output()), around[0] if around else None)
