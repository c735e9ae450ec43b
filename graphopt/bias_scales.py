"""Biases in int32 and the two scales whose product theirs is: one cannot move without the others."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk

# Scales that were multiplied in another precision still are a product.
_TOLERANCE = 1e-5
_PLACE_OF_BIAS = {"Conv": 2, "ConvTranspose": 2, "Gemm": 2}
_VIEWS = ("Cast", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze")


@dataclass(frozen=True, eq=False)
class BiasScale:
    """The scale of int32 biases, and what it is made of.

    Attributes:
        scale: The constant.
        factors: Scale of what the layer reads, and of its weight; None where they are not found, or where the layers
            that read the constant have different ones.
        involved: The constant, and all scales that any of these layers reads.
    """

    scale: ir.Value
    factors: tuple[ir.Value, ir.Value] | None
    involved: frozenset[ir.Value]


def bias_scales(model: ir.Model) -> Mapping[ir.Value, BiasScale]:
    """Return the scales of all biases stored in int32, by the constant."""
    found: dict[ir.Value, BiasScale] = {}
    for node in walk.every_node(model):
        if not walk.is_onnx_op(node, "DequantizeLinear") or len(node.inputs) < 2:
            continue
        codes, scale = walk.constant_tensor(node.inputs[0]), node.inputs[1]
        if codes is None or codes.dtype != ir.DataType.INT32 or scale is None or walk.constant_tensor(scale) is None:
            continue
        for factors in _factors_of(node):
            known = found.get(scale)
            agrees = known is None or (known.factors is not None and factors == known.factors)
            product = factors if agrees and factors is not None and _is_product(scale, factors) else None
            involved = frozenset((scale, *(factors or ())))
            found[scale] = BiasScale(scale, product, involved | (known.involved if known is not None else frozenset()))
        found.setdefault(scale, BiasScale(scale, None, frozenset((scale,))))
    return found


def _factors_of(dequantize: ir.Node) -> Iterator[tuple[ir.Value, ir.Value] | None]:
    """Yield the scales of the products that each reader adds a bias to."""
    for use in dequantize.outputs[0].uses():
        layer = _layer_of(use.node, use.idx)
        scales = [_scale_of(value) for value in list(layer.inputs)[:2]] if layer is not None else []
        first, second = scales if len(scales) == 2 else (None, None)
        yield None if first is None or second is None else (first, second)


def _layer_of(reader: ir.Node, index: int) -> ir.Node | None:
    """Return the layer whose products a bias is added to: its reader, or what is before the Add that reads it."""
    if _PLACE_OF_BIAS.get(reader.op_type) == index:
        return reader
    if not walk.is_onnx_op(reader, "Add"):
        return None
    other = reader.inputs[1 - index]
    producer = other.producer() if other is not None else None
    return producer if producer is not None and producer.op_type in ("MatMul", *_PLACE_OF_BIAS) else None


def _scale_of(value: ir.Value | None) -> ir.Value | None:
    """Return the constant that codes are multiplied by where a value is dequantized."""
    while value is not None:
        node = value.producer()
        if node is None:
            return None
        if walk.is_onnx_op(node, "DequantizeLinear"):
            scale = node.inputs[1]
            return scale if walk.constant_tensor(scale) is not None else None
        if not walk.is_onnx_op(node, *_VIEWS):
            return None
        value = node.inputs[0]
    return None


def _is_product(scale: ir.Value, factors: tuple[ir.Value, ir.Value]) -> bool:
    arrays = [_array(value) for value in (scale, *factors)]
    # Half floats hold few products of others, and none of small ones.
    if any(array.dtype != np.float32 for array in arrays):
        return False
    own, first, second = (array.astype(np.float64).reshape(-1) for array in arrays)
    if len({array.size for array in (first, second)} | {1}) > 2 or own.size != max(first.size, second.size):
        return False
    return bool(np.allclose(own, first * second, rtol=_TOLERANCE, atol=0.0))


def _array(value: ir.Value) -> np.ndarray[tuple[int, ...], np.dtype[np.generic]]:
    tensor = walk.constant_tensor(value)
    assert tensor is not None, "a scale is constant"
    return np.asarray(tensor.numpy())
