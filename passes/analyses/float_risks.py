"""Which nodes lose too much, or overflow, in a half format: what is known of operators, without any data."""

from __future__ import annotations

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt import walk

from .linear_layers import as_linear_layer
from .number_formats import dtype_of, is_float

# Squares, powers and exponentials leave the range of float16 (x² does beyond 255), and sums of many numbers do, or
# lose the small ones. Operators that stand for such a chain as a whole (LayerNormalization, Softmax) compute in float32
# inside and are not here.
_OUT_OF_RANGE = frozenset({"Exp", "Log", "Pow", "ReduceProd", "Mod"})
_SUMS = frozenset(
    {
        "CumSum",
        "LRN",
        "LpNormalization",
        "LpPool",
        "MeanVarianceNormalization",
        "ReduceL1",
        "ReduceL2",
        "ReduceLogSum",
        "ReduceLogSumExp",
        "ReduceMean",
        "ReduceSum",
        "ReduceSumSquare",
    }
)
_WHOLE = frozenset({ir.DataType.BOOL, ir.DataType.INT8, ir.DataType.UINT8})
_WAVES = ("Cos", "Sin")


def format_limits(dtype: ir.DataType) -> np.finfo[np.floating] | ml_dtypes.finfo:
    """Return the limits of a float format."""
    return ml_dtypes.finfo(dtype.numpy())


def risks(model: ir.Model) -> dict[ir.Node, str]:
    """Return the nodes that are better computed in float32, and why.

    These are squares, exponentials and sums; and positions, which are whole numbers beyond what half formats tell apart
    (2,048 in float16, 256 in bfloat16), up to the sines and cosines made of them.
    """
    found = {node: why for node in walk.every_node(model) if (why := _risk(node)) is not None}
    for node in _made_of_positions(model):
        found.setdefault(node, "computes with whole numbers")
    return found


def _risk(node: ir.Node) -> str | None:
    if node.domain not in walk.ONNX_DOMAINS:
        return None
    if node.op_type in _OUT_OF_RANGE or _is_square(node):
        return "powers and exponentials leave the range"
    if node.op_type in _SUMS:
        return "sums of many numbers"
    if (
        node.op_type == "Cast"
        and is_float(node.inputs[0])
        and dtype_of(node.outputs[0]) not in (ir.DataType.BOOL, None)
    ):
        return "computes with whole numbers" if _is_integer(node.outputs[0]) else None
    return None


def _is_square(node: ir.Node) -> bool:
    return node.op_type == "Mul" and len(node.inputs) == 2 and node.inputs[0] is node.inputs[1]


def _is_integer(value: ir.Value | None) -> bool:
    dtype = dtype_of(value) if value is not None else None
    return dtype is not None and dtype.is_integer() and dtype not in _WHOLE


def _made_of_positions(model: ir.Model) -> Iterator[ir.Node]:
    """Yield the nodes that compute with whole numbers alone, from where these become floats on."""
    positions: set[ir.Value] = set()
    for node in walk.every_node(model):
        if walk.is_onnx_op(node, "Cast", "Range") and is_float(node.outputs[0]):
            starts = node.op_type == "Range" or _is_integer(node.inputs[0])
        else:
            starts = False
        if not starts and not _goes_on(node, positions):
            continue
        yield node
        if not walk.is_onnx_op(node, *_WAVES):
            positions.update(value for value in node.outputs if is_float(value))


def _goes_on(node: ir.Node, positions: set[ir.Value]) -> bool:
    """Return whether all floats a node reads are whole numbers or made of them, constants aside."""
    read = [value for value in node.inputs if is_float(value) and walk.constant_tensor(value) is None]
    if not read or not positions.issuperset(read):
        return False
    layer = as_linear_layer(node)
    # By a matrix with one row, an outer product: frequencies times positions. Any other is the first layer of a net.
    return layer is None or layer.channels == 1
