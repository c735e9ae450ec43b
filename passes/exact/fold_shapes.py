"""Shape folding: what is known of shapes, symbolic sizes included, is not computed again."""

from __future__ import annotations

from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.options import opt

from .shape_numbers import Numbering, sweep
from .shape_operands import as_constant


@dataclass(frozen=True)
class FoldShapes(Pass):
    """Make constants of known shapes and sizes, and compute each symbolic one once, by few nodes."""

    limit: int = opt(128, help="elements of the largest tensor of integers to fold", low=1)

    name = "fold-shapes"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "known-integers": "integers that follow from what is known of shapes are constants",
        "constant-operand": "a shape operand that copies or completes the shape of the data is a constant",
        "same-integers": "integer tensors with equal symbolic elements are one",
        "part-of-shape": "integers that are neighbouring dimensions of a tensor x are Shape(x, start, end)",
        "fewer-pieces": "integers are the Concat of numbers and neighbouring dimensions, where that takes fewer nodes",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Infer, fold, and go on until nothing changes: a constant operand may make other shapes known."""
        while True:
            edits = ctx.rewriter.edits
            contradiction = ctx.analyse(shapes.infer_shapes)
            self._fold(model.graph, ctx, _read_in_vain(model))
            Numbering(model, ctx).run()
            if ctx.rewriter.edits == edits:
                break
        if contradiction is not None:
            ctx.left(contradiction)

    def _fold(self, graph: ir.Graph, ctx: Context, kept: Container[ir.Value]) -> None:
        """Fold a graph and those nested in it from its end, so that what only led to a constant is gone by then."""
        for node in reversed(list(graph)):
            if node.graph is None:
                continue
            for inner in walk.subgraphs(node):
                self._fold(inner, ctx, kept)
            if walk.has_references(node) or not walk.is_read(node) or any(value in kept for value in node.outputs):
                continue
            known = self._known_outputs(node)
            if known is not None:
                with ctx.rewriter.edit("known-integers", node):
                    _substitute(node, known, ctx)
            else:
                as_constant(node, ctx)

    def _known_outputs(self, node: ir.Node) -> dict[ir.Value, np.ndarray[tuple[int, ...], np.dtype[np.int64]]] | None:
        """Return what each output holds that is read, or None where one of them is not known."""
        if node.op_type == "Constant" or not node.inputs or _names_an_output(node):
            return None
        known = {}
        for value in node.outputs:
            if not value.uses() and not value.is_graph_output():
                continue
            contents = shapes.contents(value)
            numbers = contents.known if contents is not None and contents.array.size <= self.limit else None
            if contents is None or numbers is None or value.dtype is None:
                return None
            known[value] = np.array(numbers, value.dtype.numpy()).reshape(contents.shape)
        return known


def _read_in_vain(model: ir.Model) -> set[ir.Value]:
    """Return what is computed or read in branches that never run.

    Folding it would let a runtime see what is wrong with them, and refuse the model before it is dissolved.
    """
    return {
        value
        for graph in shapes.impossible_graphs(model)
        for inner in walk.graphs_within(graph)
        for node in inner
        for value in (*node.inputs, *node.outputs)
        if value is not None
    }


def _names_an_output(node: ir.Node) -> bool:
    """Return whether a node is there to give a constant the name of a graph output: that is as folded as can be."""
    return walk.is_onnx_op(node, "Identity") and node.outputs[0].is_graph_output()


def _substitute(
    node: ir.Node, known: Mapping[ir.Value, np.ndarray[tuple[int, ...], np.dtype[np.int64]]], ctx: Context
) -> None:
    made = [ctx.rewriter.make_const(numbers, f"{value.name}_folded") for value, numbers in known.items()]
    if not ctx.agrees("known-integers", [node], list(known), made):
        return
    for value, constant in zip(known, made, strict=True):
        ctx.rewriter.adopt(constant, near=node)
        ctx.rewriter.replace(value, constant)
    sweep(node, ctx)
