"""Sequences taken apart where they were put together: exporters write lists of tensors where a tensor will do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass

from .arguments import counted, integers, optional_input
from .split_slices import insert_split, make_split

# A Split of more pieces than this is larger than the loop it was written for.
MOST_PIECES = 1024


@dataclass(frozen=True)
class Sequences(Pass):
    """Replace elements of known sequences by what they are, and sequences of pieces by a Split."""

    name = "sequences"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "element": "SequenceAt(SequenceConstruct(x0, x1, ...), i) = xi",
        "concat": "ConcatFromSequence(SequenceConstruct(x0, x1, ...)) = Concat(x0, x1, ...)",
        "split": "SequenceAt(SplitToSequence(x), i) = output i of Split(x)",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Visit each node once; what makes a sequence precedes what reads it."""
        opset = walk.opset(model)
        for graph in list(walk.every_graph(model)):
            for node in list(graph):
                if walk.is_onnx_op(node, "SequenceAt"):
                    _take_element(node, ctx)
                elif walk.is_onnx_op(node, "ConcatFromSequence"):
                    _concatenate(node, ctx)
                elif walk.is_onnx_op(node, "SplitToSequence"):
                    _split(node, opset, ctx)


def _take_element(node: ir.Node, ctx: Context) -> None:
    elements = _elements(node.inputs[0])
    index = integers(node.inputs[1])
    if elements is None or index is None or not -len(elements) <= index[0] < len(elements):
        return
    element = elements[index[0]]
    if element is None:
        return
    with ctx.rewriter.edit("element", node):
        if not ctx.agrees("element", _with_sequence(node), node.outputs, [element]):
            return
        ctx.rewriter.replace(node.outputs[0], element)
        ctx.rewriter.erase(node)


def _concatenate(node: ir.Node, ctx: Context) -> None:
    elements = _elements(node.inputs[0])
    if elements is None or node.attributes.get_int("new_axis", 0) != 0:
        return
    with ctx.rewriter.edit("concat", node):
        axis = {"axis": node.attributes["axis"].as_int()}
        concat = ctx.rewriter.make("Concat", elements, axis, sources=[node], name=node.name)
        if not ctx.agrees("concat", _with_sequence(node), node.outputs, concat.outputs, [concat]):
            return
        ctx.rewriter.insert(concat, before=node)
        ctx.rewriter.replace(node.outputs[0], concat.outputs[0])
        ctx.rewriter.erase(node)


def _with_sequence(node: ir.Node) -> list[ir.Node]:
    """Return a node and what constructs the sequence it reads."""
    producer = node.inputs[0].producer() if node.inputs[0] is not None else None
    return [producer, node] if producer is not None else [node]


def _elements(value: ir.Value | None) -> tuple[ir.Value | None, ...] | None:
    """Return what a sequence was constructed from, or None."""
    producer = value.producer() if value is not None else None
    if producer is None or not walk.is_onnx_op(producer, "SequenceConstruct"):
        return None
    return tuple(producer.inputs)


def _split(node: ir.Node, opset: int, ctx: Context) -> None:
    """Make a Split of a SplitToSequence whose pieces are only read one by one."""
    sequence = node.outputs[0]
    readers = [use.node for use in sequence.uses()]
    sizes = _sizes(node)
    if not readers or sequence.is_graph_output() or sizes is None or len(sizes) > MOST_PIECES:
        return
    indices = [integers(reader.inputs[1]) if walk.is_onnx_op(reader, "SequenceAt") else None for reader in readers]
    if any(index is None or not -len(sizes) <= index[0] < len(sizes) for index in indices):
        ctx.left("not split: what reads the sequence may read any piece of it", node)
        return
    if any(reader.graph is not node.graph for reader in readers):
        ctx.left("not split: a nested graph reads the sequence", node)
        return
    with ctx.rewriter.edit("split", node, *readers):
        split = make_split(node.inputs[0], node.attributes.get_int("axis", 0), sizes, opset, [node], ctx)
        pieces = [split.outputs[index[0]] for index in indices if index is not None]
        if not ctx.agrees("split", [node, *readers], [reader.outputs[0] for reader in readers], pieces, [split]):
            return
        insert_split(split, node, ctx)
        for reader, piece in zip(readers, pieces, strict=True):
            ctx.rewriter.replace(reader.outputs[0], piece)
            ctx.rewriter.erase(reader)
        ctx.rewriter.erase(node)


def _sizes(node: ir.Node) -> list[int] | None:
    """Return the sizes of the pieces, or None where they vary, or the pieces lose their axis."""
    x, split = node.inputs[0], optional_input(node, 1)
    # What an output is declared to be may be false, and runtimes run it all the same.
    dims = shapes.dims_of(x)
    axis = counted((node.attributes.get_int("axis", 0),), len(dims)) if dims is not None else None
    if dims is None or axis is None:
        return None
    size = dims[axis[0]]
    given = integers(split)
    if split is None:
        keeps_axis = node.attributes.get_int("keepdims", 1) == 1
        return [1] * size if isinstance(size, int) and keeps_axis else None
    if given is None or split.shape is None:
        return None
    if len(split.shape) == 1:
        return list(given)
    if not isinstance(size, int) or given[0] <= 0:
        return None
    return [min(given[0], size - start) for start in range(0, size, given[0])]
