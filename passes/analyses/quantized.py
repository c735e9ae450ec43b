"""Whether a model holds integers where it once held floats, and where these become floats again."""

from __future__ import annotations

from collections.abc import Container

import onnx_ir as ir

from graphopt import walk
from graphopt.errors import PassError

QUANTIZED_OPS = frozenset(
    {
        "ConvInteger",
        "DequantizeLinear",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
        "GatherBlockQuantized",
        "MatMulInteger",
        "MatMulBnb4",
        "MatMulIntegerToFloat",
        "MatMulNBits",
        "QGemm",
        "QLinearConv",
        "QLinearMatMul",
        "QuantizeLinear",
    }
)
_STORED_INTEGERS = frozenset({ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT4, ir.DataType.UINT4})


def first_quantized(model: ir.Model, besides: Container[ir.Node] = ()) -> ir.Node | None:
    """Return the first node that quantizes, computes in integers, or reads weights stored as integers."""
    return next((node for node in walk.every_node(model) if _is_quantized(node) and node not in besides), None)


def refuse_quantized(model: ir.Model, name: str, hint: str = "start from the float model") -> None:
    """Refuse a model that is quantized already.

    Args:
        model: A model that a pass is to change the float weights of.
        name: The pass.
        hint: What the user may do.

    Raises:
        PassError: It is quantized.
    """
    node = first_quantized(model)
    if node is not None:
        raise PassError(
            f"pass `{name}` finds the model already quantized (`{walk.label(node)}` is {node.op_type})", hint=hint
        )


def refuse_to_prune_quantized(model: ir.Model, name: str) -> None:
    """Refuse, as `refuse_quantized` does, with the right order of passes for one that prunes."""
    refuse_quantized(model, name, f"prune first, then quantize: `--passes {name},quant`")


def _is_quantized(node: ir.Node) -> bool:
    return node.op_type in QUANTIZED_OPS or reads_stored_integers(node)


def reads_stored_integers(node: ir.Node) -> bool:
    """Return whether a node turns a weight stored as integers back into floats: Cast(integers)."""
    if not walk.is_onnx_op(node, "Cast"):
        return False
    tensor = walk.constant_tensor(node.inputs[0])
    return tensor is not None and tensor.dtype in _STORED_INTEGERS and len(walk.dims(tensor)) > 1


def is_rescaled_product(value: ir.Value) -> bool:
    """Return whether a value is an integer product as floats: Mul(Cast(MatMulInteger(...)), scale), or as good as it.

    A runtime that computes all of it in one kernel adds a bias behind it there, at no cost.
    """
    if is_dequantized_product(value):
        return True
    rescale = value.producer()
    if rescale is None or not walk.is_onnx_op(rescale, "Mul"):
        return False
    casts = [one.producer() for one in rescale.inputs if one is not None]
    return any(_casts_a_total(cast) for cast in casts if cast is not None)


def is_dequantized_product(value: ir.Value) -> bool:
    """Return whether a value is a MatMul of two values dequantized for it."""
    product = value.producer()
    if product is None or not walk.is_onnx_op(product, "MatMul"):
        return False
    makers = [factor.producer() for factor in product.inputs if factor is not None]
    return all(maker is not None and walk.is_onnx_op(maker, "DequantizeLinear") for maker in makers)


def _casts_a_total(node: ir.Node) -> bool:
    if not walk.is_onnx_op(node, "Cast") or node.inputs[0] is None:
        return False
    product = node.inputs[0].producer()
    return product is not None and walk.is_onnx_op(product, "MatMulInteger")
