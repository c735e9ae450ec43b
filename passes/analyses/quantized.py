"""Whether a model holds integers where it once held floats."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import walk

_QUANTIZED_OPS = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "MatMulInteger",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)
_STORED_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4})


def first_quantized(model: ir.Model) -> ir.Node | None:
    """Return the first node that quantizes, computes in integers, or reads weights stored as integers."""
    return next((node for node in walk.every_node(model) if _is_quantized(node)), None)


def _is_quantized(node: ir.Node) -> bool:
    return node.op_type in _QUANTIZED_OPS or reads_stored_integers(node)


def reads_stored_integers(node: ir.Node) -> bool:
    """Return whether a node turns a weight stored as integers back into floats: Cast(integers)."""
    if not walk.is_onnx_op(node, "Cast"):
        return False
    tensor = walk.constant_tensor(node.inputs[0])
    return tensor is not None and tensor.dtype in _STORED_INTEGERS and len(walk.dims(tensor)) > 1
