"""Weights as the numbers they stand for, however a layer stores and reads them."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.explaining.advice import made_of_constants
from graphopt.fragment import fragment, nodes_between

# Operators whose inputs are codes with their scale and zero point beside them: place of the codes, scale, zero point.
_CODES_WITH_SCALES = {
    "QLinearConv": (3, 4, 5),
    "QLinearMatMul": (3, 4, 5),
    "QGemm": (3, 4, 5),
    "MatMulIntegerToFloat": (1, 3, 5),
    "DynamicQuantizeMatMul": (1, 2, 3),
}
# Operators that leave the scale to a Mul behind them: place of the codes, and of their zero point.
_CODES_ALONE = {"MatMulInteger": (1, 3), "ConvInteger": (1, 3)}
_BLOCKS = "MatMulNBits"
# The scale is multiplied in at most so many nodes further down.
_FARTHEST = 4
_LARGEST_IDENTITY = 1 << 24


def weight_values(node: ir.Node, value: ir.Value, model: ir.Model, backend: Backend) -> Array:
    """Return a weight of a layer as float32 numbers, in the shape it is stored in.

    Args:
        node: The layer.
        value: The weight as the layer reads it: a constant, or made of constants.
        model: The model they are in; not changed.
        backend: Runs what decodes it.

    Raises:
        BackendError: The runtime does not run that.
        ValueError: It is of codes whose meaning cannot be told.
    """
    if node.op_type == _BLOCKS:
        return _by_identity(node, model, backend)
    tensor = walk.constant_tensor(value)
    if tensor is None:
        return _computed(value, model, backend)
    stored = np.asarray(tensor.numpy())
    if tensor.dtype.is_floating_point():
        return stored.astype(np.float32, copy=False)
    if node.op_type in _CODES_WITH_SCALES:
        codes, scale, zero = _CODES_WITH_SCALES[node.op_type]
        return _scaled(node, stored, _constant(node, scale), _constant(node, zero), value is node.inputs[codes])
    if node.op_type in _CODES_ALONE:
        codes, zero = _CODES_ALONE[node.op_type]
        return _scaled(node, stored, _scale_behind(node, stored), _constant(node, zero), value is node.inputs[codes])
    raise ValueError(f"{node.op_type} reads codes in {str(tensor.dtype).lower()} itself")


def _computed(value: ir.Value, model: ir.Model, backend: Backend) -> Array:
    """Return a value that is made of constants alone, as the runtime makes it."""
    nodes = nodes_between([value], set(model.graph))
    decoder = fragment(nodes, [value], [], model.opset_imports, model.functions)
    with backend.open(decoder, optimize=False) as session:
        return np.asarray(session.run({})["out0"], dtype=np.float32)


def _by_identity(node: ir.Node, model: ir.Model, backend: Backend) -> Array:
    """Return the weight of a product that reads blocks of codes: what it makes of the identity."""
    size, read = node.attributes.get_int("K", 0), node.inputs[0]
    if read is None or not size or size * size > _LARGEST_IDENTITY:
        raise ValueError(f"{node.op_type} of {size} inputs")
    dtype = read.dtype or ir.DataType.FLOAT
    product = fragment([node], [node.outputs[0]], [read], model.opset_imports, model.functions)
    product.graph.inputs[0].type = ir.TensorType(dtype)
    product.graph.inputs[0].shape = ir.Shape([size, size])
    with backend.open(product, optimize=False) as session:
        return np.asarray(session.run({"in0": np.eye(size, dtype=dtype.numpy())})["out0"], dtype=np.float32)


def _constant(node: ir.Node, index: int) -> Array | None:
    tensor = walk.constant_tensor(node.inputs[index]) if index < len(node.inputs) else None
    return np.asarray(tensor.numpy()) if tensor is not None else None


def _scaled(node: ir.Node, codes: Array, scale: Array | None, zero: Array | None, is_weight: bool) -> Array:
    if scale is None or not is_weight:
        raise ValueError(f"the scale that {node.op_type} reads its codes with is not to be found")
    axis = 0 if "Conv" in node.op_type else codes.ndim - 1
    shape = [-1 if one == axis else 1 for one in range(codes.ndim)]
    numbers = codes.astype(np.float32)
    if zero is not None:
        numbers -= zero.astype(np.float32).reshape(shape if zero.size > 1 else ())
    return numbers * np.asarray(scale, np.float32).reshape(shape if scale.size > 1 else ())


def _scale_behind(node: ir.Node, codes: Array) -> Array | None:
    """Return the constant that what an integer product gives is multiplied by."""
    channels = codes.shape[0] if "Conv" in node.op_type else codes.shape[-1]
    for value in _factors_behind(node):
        tensor = walk.constant_tensor(value)
        if tensor is not None and tensor.dtype.is_floating_point() and tensor.size in (1, channels):
            return np.asarray(tensor.numpy()).reshape(-1)
    return None


def _factors_behind(node: ir.Node) -> Iterator[ir.Value | None]:
    """Yield what is multiplied into a product behind it, a product of two scales as its factors."""
    value = node.outputs[0]
    for _ in range(_FARTHEST):
        reader = next((use.node for use in value.uses()), None)
        if reader is None or not walk.is_onnx_op(reader, "Cast", "Mul"):
            return
        for factor in reader.inputs if reader.op_type == "Mul" else ():
            maker = factor.producer() if factor is not None and factor is not value else None
            if maker is not None and maker.op_type == "Mul" and not made_of_constants(factor):
                yield from maker.inputs
            elif factor is not value:
                yield factor
        value = reader.outputs[0]
