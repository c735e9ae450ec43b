"""What runtimes put together around a product before they look for integer kernels: its bias, and what scales it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from graphopt import walk
from graphopt.explaining.codes import only_reader
from graphopt.shapes import dims_of, static_shape


def bias_of(adder: ir.Node | None, product: ir.Node) -> Iterator[ir.Value]:
    """Yield what an Add gives a product, if there is one."""
    if adder is not None:
        yield from (value for value in adder.inputs if value is not None and value is not product.outputs[0])


def fits_gemm(node: ir.Node, bias: ir.Value) -> bool:
    """Return whether a MatMul and what is added to it have the shapes of a Gemm."""
    left, right, added = dims_of(node.inputs[0]), dims_of(node.inputs[1]), _shape_of(bias)
    if left is None or right is None or added is None or len(right) != 2:
        return False
    if len(left) != 2 and (static_shape(node.inputs[0]) is None or _projects_attention(node)):
        return False
    columns = right[1]
    if len(added) == 1:
        return added[0] == columns
    if len(left) != 2 or len(added) != 2:
        return False
    return (added[0] == 1 and added[1] == columns) or (added[0] == left[0] and added[1] in (1, columns))


def _shape_of(value: ir.Value) -> Sequence[object] | None:
    tensor = walk.constant_tensor(value)
    return walk.dims(tensor) if tensor is not None else dims_of(value)


def _projects_attention(node: ir.Node) -> bool:
    """Return whether a MatMul reads the heads of an attention put side by side."""
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    for op in ("Reshape", "Transpose", "MatMul", "Softmax"):
        if maker is None or not walk.is_onnx_op(maker, op):
            return False
        source = maker.inputs[0]
        maker = source.producer() if source is not None else None
    return True


def dynamic_kernel(node: ir.Node) -> str:
    """Return what a MatMulInteger becomes, by what makes its input and what scales its result."""
    reader = node
    for op in ("Cast", "Mul"):
        following = only_reader(reader.outputs[0])
        if following is None or not walk.is_onnx_op(following, op):
            return "MatMulInteger"
        reader = following
    source = node.inputs[0].producer() if node.inputs[0] is not None else None
    alone = source is not None and source.op_type == "DynamicQuantizeLinear" and len(source.outputs[0].uses()) == 1
    return "DynamicQuantizeMatMul" if alone else "MatMulIntegerToFloat"
