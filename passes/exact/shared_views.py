"""A constant as a view of another one: who may read it so, what that costs, and how it is done."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.rewriter import Rewriter

from ..analyses.quantized import QUANTIZED_OPS
from ..analyses.tensor_symmetries import View
from .transposes import absorb_transposes

# About what the node of a view takes in the file: names, operator, attributes or a shape.
NODE_BYTES = 128
# Since then Reshape reads its shape, and Mul broadcasts.
_FIRST_OPSET = 7
# Operators that look rows up: where a table is read so and multiplied by, the table is what stays.
_LOOKUPS = ("Gather", "GatherElements", "GatherND")
_LAYERS = ("Conv", "ConvTranspose", "MatMul", "LSTM", "GRU", "RNN")
# Input from which on these read sizes, axes or indices, which must be known when the model is loaded.
_READ_BY_VALUE = {
    "ConstantOfShape": 0, "Expand": 1, "OneHot": 1, "Pad": 1, "Range": 0, "Reshape": 1, "Resize": 1, "Slice": 1,
    "Split": 1, "Squeeze": 1, "Tile": 1, "TopK": 1, "Unsqueeze": 1, "Upsample": 1,
}  # fmt: skip
_SCALED = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})


def obstacle(value: ir.Value, model: ir.Model) -> str | None:
    """Return why an initializer must stay as it is stored, or None."""
    if value.is_graph_output():
        return "is an output"
    if min([walk.opset(model), *(walk.imported(one.opset_imports) for one in model.functions.values())]) < _FIRST_OPSET:
        return f"belongs to an old model: views need opset {_FIRST_OPSET}"
    for use in value.uses():
        if use.node.op_type in QUANTIZED_OPS:
            return "is part of a quantized layer, which runtimes look for as it is"
        if use.node.domain not in walk.ONNX_DOMAINS:
            return "is read by an operator that may want it stored"
        if use.idx >= _READ_BY_VALUE.get(use.node.op_type, len(use.node.inputs)):
            return "says sizes or indices"
    return None


def unfit(view: View, dtype: ir.DataType) -> str | None:
    """Return why a runtime would compute a view anew in every run, or None."""
    if view.factor != 1 and dtype not in _SCALED:
        return f"is another one {view}, which runtimes do not compute at load in {dtype.name.lower()}"
    return None


def reluctance(value: ir.Value) -> int:
    """Return how much a constant is worth keeping as it is among its views.

    Tables that rows are looked up in the most, then weights of layers, which other passes know by their constants; a
    Gemm reads either layout.
    """
    return max((_reluctance(use.node) for use in value.uses()), default=0)


def _reluctance(reader: ir.Node) -> int:
    if walk.is_onnx_op(reader, *_LOOKUPS):
        return 3
    if walk.is_onnx_op(reader, *_LAYERS):
        return 2
    return 0 if walk.is_onnx_op(reader, "Gemm") else 1


def is_view_of_shared(node: ir.Node) -> bool:
    """Return whether a node gives what this file makes: a view of a constant that something else reads too.

    To fold it would store the constant twice.
    """
    steps = 0
    while True:
        source = node.inputs[0] if node.inputs else None
        if source is None or not _is_step(node):
            return False
        steps += 1
        producer = source.producer()
        if producer is None or not _is_step(producer):
            break
        node = producer
    tensor = walk.constant_tensor(source)
    if tensor is None or tensor.nbytes <= steps * NODE_BYTES:
        return False
    return source.is_graph_output() or any(use.node is not node for use in source.uses())


def _is_step(node: ir.Node) -> bool:
    if walk.is_onnx_op(node, "Mul"):
        factor = walk.constant_tensor(node.inputs[1])
        return factor is not None and factor.size == 1
    return walk.is_onnx_op(node, "Transpose", "Reshape", "Neg")


def read_as_view(value: ir.Value, source: ir.Value, view: View, ctx: Context) -> None:
    """Let the readers of an initializer read a view of another one, and remove it.

    A Gemm takes a transposition in. All others read one and the same view, computed in the graph that holds the source.

    Args:
        value: The initializer to remove.
        source: The other one, whose graph is that of ``value`` or around it.
        view: How it is read.
        ctx: Where edits go.
    """
    home, name = source.graph, value.name
    assert home is not None, "an initializer belongs to a graph"
    is_free = value.graph is home
    anchor = _first_reader(value, home)
    readers = list(dict.fromkeys(use.node for use in value.uses()))
    made = _made(source, view, anchor, f"{name}_view", ctx.rewriter)
    for node in made:
        ctx.rewriter.insert(node, before=anchor)
    ctx.rewriter.replace(value, made[-1].outputs[0])
    ctx.rewriter.remove_initializer(value)
    if is_free:
        made[-1].outputs[0].name = name
    for reader in readers:
        if made[-1].graph is not None and reader.graph is home:
            absorb_transposes(reader, ctx)


def _made(source: ir.Value, view: View, anchor: ir.Node, name: str, rewriter: Rewriter) -> Sequence[ir.Node]:
    """Return the nodes that compute a view, in order."""
    steps: list[tuple[str, list[ir.Value], dict[str, list[int]]]] = []
    if view.before is not None:
        steps.append(("Reshape", [_shape(view.before, name, anchor, rewriter)], {}))
    if view.perm is not None:
        steps.append(("Transpose", [], {"perm": list(view.perm)}))
    if view.after is not None:
        steps.append(("Reshape", [_shape(view.after, name, anchor, rewriter)], {}))
    if view.factor == -1:
        steps.append(("Neg", [], {}))
    elif view.factor != 1:
        assert source.dtype is not None, "the dtype of an initializer is known"
        factor = np.array(view.factor, source.dtype.numpy())
        steps.append(("Mul", [rewriter.const(factor, f"{name}_factor", near=anchor)], {}))
    made: list[ir.Node] = []
    for op_type, operands, attributes in steps:
        read = made[-1].outputs[0] if made else source
        made.append(rewriter.make(op_type, [read, *operands], attributes, sources=[anchor], name=name))
    return made


def _shape(dims: Sequence[int], name: str, anchor: ir.Node, rewriter: Rewriter) -> ir.Value:
    return rewriter.const(np.array(dims, np.int64), f"{name}_shape", near=anchor)


def _first_reader(value: ir.Value, home: ir.Graph) -> ir.Node:
    """Return the first node of a graph that reads a value, itself or in a graph nested in it."""
    readers = {use.node for use in value.uses()}
    return next(node for node in home if node in readers or not readers.isdisjoint(walk.nodes_within(node)))
