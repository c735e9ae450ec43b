"""Weights read through a DequantizeLinear, as the solvers see them: codes, scales, and the floats they stand for."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.rewriter import Rewriter

from ..analyses.linear_layers import LinearLayer
from ..solvers.grid import FULL_RANGE_BITS, REDUCED_RANGE_BITS, Grid, GridWeight
from .compared_layers import ComparedLayer

# Bits and sign of the codes that solvers know.
_CODES = {
    ir.DataType.INT2: (2, True),
    ir.DataType.UINT2: (2, False),
    ir.DataType.INT4: (4, True),
    ir.DataType.UINT4: (4, False),
    ir.DataType.INT8: (8, True),
    ir.DataType.UINT8: (8, False),
}


@dataclass(frozen=True, eq=False)
class DequantizedWeight:
    """The weight of a layer.

    Attributes:
        layer: The layer as it is now, its weight the codes.
        stored: Codes and scales, on the grid they keep to.
        target: What they should stand for, float32 [outputs, inputs].
    """

    layer: LinearLayer
    stored: GridWeight
    target: Array

    def store(self, codes: Array, rewriter: Rewriter) -> None:
        """Put other codes [outputs, inputs] in the place of the present ones."""
        tensor = walk.constant_tensor(self.layer.weight)
        assert tensor is not None, "codes are constant"
        rewriter.set_weight(self.layer.weight, self.layer.in_layout(codes).astype(tensor.dtype.numpy()))


def dequantized_weight(layer: ComparedLayer) -> DequantizedWeight | str:
    """Return the weight of a layer that reads it through a DequantizeLinear, or why there is none."""
    before, node = layer.before, layer.node
    read, value = node.inputs[1 - before.weight_index], node.inputs[before.weight_index]
    dequantize = value.producer() if value is not None else None
    if dequantize is None or not walk.is_onnx_op(dequantize, "DequantizeLinear"):
        return "their weight is read through no DequantizeLinear"
    codes, tensor = dequantize.inputs[0], walk.constant_tensor(dequantize.inputs[0])
    if codes is None or read is None or tensor is None or tensor.dtype not in _CODES:
        return "the codes of their weight are no constant integers"
    if len(codes.uses()) > 1 or codes.is_graph_output():
        return "the codes of their weight are read by others too"
    original = walk.constant_tensor(before.weight)
    assert original is not None, "a linear layer has a constant weight"
    if len(tensor.shape) != len(original.shape):
        return "their weight is laid out in another way than before"
    own = replace(before, node=node, input=read, weight=codes, bias=None)
    stored, target = _stored(own, dequantize, tensor), _target(layer, own)
    if isinstance(stored, str):
        return stored
    if target is None:
        return "their weight is laid out in another way than before"
    return DequantizedWeight(own, stored, target)


def _stored(layer: LinearLayer, dequantize: ir.Node, tensor: ir.TensorProtocol) -> GridWeight | str:
    """Return what is stored; its grid holds no code beyond what the kernel the codes were made for may take."""
    bits, signed = _CODES[tensor.dtype]
    codes = layer.matrix().astype(np.int8 if signed else np.uint8)
    block = dequantize.attributes.get_int("block_size", 0) or None
    constants = [_per_block(layer, dequantize, value, block) for value in list(dequantize.inputs)[1:]]
    scales, zeros = constants[0], constants[1] if len(constants) > 1 else None
    if scales is None or (len(constants) > 1 and zeros is None):
        return "the scales of their weight are laid out in another way than by outputs or blocks"
    if signed and zeros is not None and zeros.any():
        return "the codes of their weight have signs and zero points"
    if bits == FULL_RANGE_BITS and signed and not (np.abs(codes.astype(np.int16)) >> REDUCED_RANGE_BITS - 1).any():
        bits = REDUCED_RANGE_BITS
    lowest = -(1 << bits - 1)
    narrow = not signed or int(codes.min(initial=0)) > lowest
    grid = Grid(bits, signed, block, narrow=narrow, tensor=scales.size == 1 and len(codes) > 1)
    if not signed:
        zeros = np.zeros(scales.shape, np.uint8) if zeros is None else zeros.astype(np.uint8)
    return GridWeight(grid, codes, scales.astype(np.float32), None if signed else zeros, 0.0)


def _per_block(layer: LinearLayer, dequantize: ir.Node, value: ir.Value | None, block: int | None) -> Array | None:
    """Return scales or zero points as [outputs, blocks], [1, 1] for one; None where they are laid out otherwise."""
    tensor = walk.constant_tensor(value)
    if value is None or tensor is None:
        return None
    array = tensor.numpy()
    if array.dtype.kind not in "fiu":
        array = array.astype(np.float32)  # of types numpy does not know
    codes = walk.constant_tensor(layer.weight)
    assert codes is not None, "codes are constant"
    axis = dequantize.attributes.get_int("axis", 1) % len(codes.shape)
    if array.size == 1 and block is None:
        return array.reshape(1, 1)
    if block is None:
        return array.reshape(-1, 1) if array.ndim == 1 and axis == layer.output_axis else None
    inner = 1 if layer.node.op_type.startswith("Conv") else 1 - layer.output_axis
    if axis != inner or axis == layer.output_axis or layer.channels % block or array.ndim != len(codes.shape):
        return None
    return replace(layer, weight=value).matrix().astype(array.dtype)


def _target(layer: ComparedLayer, now: LinearLayer) -> Array | None:
    """Return W as the codes should say it, with input channels of zeros where the layer was given more of them."""
    before = layer.before
    matrix = before.matrix().astype(np.float32)
    matrix *= np.float32(
        before.node.attributes.get_float("alpha", 1.0) / now.node.attributes.get_float("alpha", 1.0)
        if now.node.op_type == "Gemm"
        else 1.0
    )
    wanted = now.matrix().shape
    if matrix.shape == wanted:
        return matrix
    if now.node.op_type != "Conv" or len(matrix) != wanted[0]:
        return None
    # Channels run fastest, so that those added lie behind each position of the kernel.
    positions = matrix.shape[1] // before.channels
    more = now.channels - before.channels
    if more < 0 or wanted[1] != positions * now.channels:
        return None
    return np.pad(matrix.reshape(len(matrix), positions, -1), ((0, 0), (0, 0), (0, more))).reshape(len(matrix), -1)
