"""Loop-invariant code: what every iteration computes alike, computed once before."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.dims import Size, at_least

# Elementwise operators of one input that give a result whatever they are given.
_NEVER_FAIL = frozenset(
    {
        "Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "BitwiseNot", "Ceil", "Celu", "Cos", "Cosh",
        "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish", "Identity", "IsInf", "IsNaN", "LeakyRelu",
        "Log", "Mish", "Neg", "Not", "Reciprocal", "Relu", "Round", "Selu", "Shape", "Sigmoid", "Sign", "Sin",
        "Sinh", "Size", "Softplus", "Softsign", "Sqrt", "Tan", "Tanh", "ThresholdedRelu",
    }
)  # fmt: skip
# Those of several inputs fail only where these do not broadcast.
_BROADCAST = frozenset(
    {
        "Add", "And", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Equal", "Greater", "GreaterOrEqual", "Less",
        "LessOrEqual", "Max", "Mean", "Min", "Mul", "Or", "Sub", "Sum", "Where", "Xor",
    }
)  # fmt: skip
# These fail on whole numbers too: there is no result of a division by zero.
_BROADCAST_FLOATS = frozenset({"Div", "Pow"})
# Before opset 7 operands broadcast in another way, before opset 9 a Scan had a batch axis.
_FIRST_OPSET_WITH_BROADCASTING, _FIRST_OPSET_WITH_PLAIN_SCAN = 7, 9


@dataclass(frozen=True)
class Hoist(Pass):
    """Move what a Loop or Scan computes anew in every iteration, of the same values, to before it."""

    name = "hoist"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "hoist": "what a body computes of outer values alone is the same in every iteration",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Visit inner bodies before outer ones, so that a node leaves all the bodies it may."""
        _visit(model.graph, ctx, walk.opset(model))
        for function in model.functions.values():
            _visit(function, ctx, walk.imported(function.opset_imports))


def _visit(graph: ir.Graph | ir.Function, ctx: Context, opset: int) -> None:
    for node in list(graph):
        for inner in walk.subgraphs(node):
            _visit(inner, ctx, opset)
        is_scan = walk.is_onnx_op(node, "Scan") and opset >= _FIRST_OPSET_WITH_PLAIN_SCAN
        if (is_scan or walk.is_onnx_op(node, "Loop")) and not walk.has_references(node):
            _empty(node, node.attributes["body"].as_graph(), ctx, opset)


def _empty(node: ir.Node, body: ir.Graph, ctx: Context, opset: int) -> None:
    """Move the invariant nodes of a body, in order, to before the Loop or Scan."""
    runs = _scan_runs(node) if node.op_type == "Scan" else _loop_runs(node)
    for inner in list(body):
        if not _is_pure(inner, ctx.model) or not all(_is_outer(value, body) for value in inner.inputs):
            continue
        # A body may never be run; what can fail must not be run in its stead.
        if not runs and not _cannot_fail(inner, opset):
            continue
        with ctx.rewriter.edit("hoist", inner, node):
            for value in dict.fromkeys(value for value in inner.inputs if value is not None):
                producer = value.producer()
                if value.is_initializer() and value.graph is body:
                    ctx.rewriter.lift(value, near=node)
                elif producer is not None and producer.graph is body:
                    ctx.rewriter.move(producer, before=node)
            ctx.rewriter.move(inner, before=node)


def _is_pure(node: ir.Node, model: ir.Model) -> bool:
    """Return whether a node may be moved at all; a Constant is, once something that reads it is moved."""
    if node.domain not in walk.ONNX_DOMAINS or node.op_identifier() in model.functions or not node.inputs:
        return False
    if walk.is_random(node) or any(True for _ in walk.subgraphs(node)):
        return False
    return not any(value.is_graph_output() for value in node.outputs)


def _is_outer(value: ir.Value | None, body: ir.Graph) -> bool:
    """Return whether a value comes from around a body, or is a constant in it that can be taken along."""
    if value is None or value.graph is not body:
        return True
    return walk.constant_tensor(value) is not None and not value.is_graph_output()


def _loop_runs(node: ir.Node) -> bool:
    """Return whether a Loop surely goes round at least once."""
    limit, condition = (*node.inputs[:2], None, None)[:2]
    most, starts = walk.constant_tensor(limit), walk.constant_tensor(condition)
    enough = limit is None or (most is not None and most.size == 1 and int(most.numpy().reshape(-1)[0]) > 0)
    return enough and (condition is None or (starts is not None and bool(starts.numpy().all())))


def _scan_runs(node: ir.Node) -> bool:
    """Return whether a Scan surely has an element."""
    elements = node.attributes["num_scan_inputs"].as_int()
    axes = node.attributes.get("scan_input_axes")
    pairs = zip(node.inputs[len(node.inputs) - elements :], axes.as_ints() if axes else [0] * elements, strict=False)
    for value, axis in pairs:
        dims = shapes.dims_of(value)
        if dims is not None and -len(dims) <= axis < len(dims):
            size = dims[axis]
            if isinstance(size, int) and size > 0:
                return True
    return False


def _cannot_fail(node: ir.Node, opset: int) -> bool:
    """Return whether a node gives a result whatever the numbers are."""
    first = node.inputs[0]
    dtype = first.dtype if first is not None else None
    if node.op_type in _NEVER_FAIL:
        return True
    if node.op_type == "Cast":
        return dtype is not None and dtype != ir.DataType.STRING  # not every text is a number
    dims = [shapes.dims_of(value) for value in node.inputs if value is not None]
    known = [one for one in dims if one is not None]
    if len(known) < len(dims):
        return False
    if node.op_type in _BROADCAST_FLOATS and (dtype is None or not dtype.is_floating_point()):
        return False
    if node.op_type in _BROADCAST or node.op_type in _BROADCAST_FLOATS:
        return opset >= _FIRST_OPSET_WITH_BROADCASTING and _broadcast(known)
    if node.op_type == "MatMul":
        return min(map(len, known)) > 1 and known[0][-1] == known[1][-2] and _can_multiply(known)
    return False


def _can_multiply(known: Sequence[Sequence[Size]]) -> bool:
    """Return whether a runtime surely multiplies matrices that fit: ONNX Runtime refuses some stacks of none."""
    sizes = [size for one in known for size in one]
    return all(at_least(size, 1) for size in sizes) and _broadcast([one[:-2] for one in known])


def _broadcast(dims: Sequence[Sequence[object]]) -> bool:
    """Return whether shapes surely broadcast: on each axis, sizes other than 1 are the same one."""
    rank = max(map(len, dims))
    aligned = [(1,) * (rank - len(one)) + tuple(one) for one in dims]
    return all(len({size for size in sizes if size != 1}) <= 1 for sizes in zip(*aligned, strict=True))
