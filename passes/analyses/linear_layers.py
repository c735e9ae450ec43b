"""Linear layers: every operator that computes y = W x with a constant W, seen in one way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array

LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_CONVOLUTIONS = ("Conv", "ConvTranspose")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class LinearLayer:
    """One linear layer.

    Attributes:
        node: The operator.
        input: The activation x.
        weight: The constant W, as the operator reads it.
        weight_index: Which input of the node is the weight.
        output_axis: Axis of the weight that runs over output channels (within a group, for ConvTranspose).
        bias: The bias input, constant or not, or None.
    """

    node: ir.Node
    input: ir.Value
    weight: ir.Value
    weight_index: int
    output_axis: int
    bias: ir.Value | None

    @property
    def dims(self) -> tuple[int, ...]:
        """Shape of the weight."""
        return walk.dims(self._tensor())

    @property
    def channels(self) -> int:
        """Input channels of each output: what N:M patterns run along."""
        dims = list(self.dims)
        dims.pop(self.output_axis)
        return dims[0] if self.node.op_type in _CONVOLUTIONS else math.prod(dims)

    def matrix(self) -> Array:
        """Return W as [outputs, inputs], read-only; of a convolution, inputs are kernel positions × channels."""
        outputs_first = np.moveaxis(self._tensor().numpy(), self.output_axis, 0)
        if self.node.op_type in _CONVOLUTIONS:
            outputs_first = np.moveaxis(outputs_first, 1, -1)
        matrix = outputs_first.reshape(outputs_first.shape[0], -1)
        matrix.flags.writeable = False  # it may be the model's own memory, which only the Rewriter changes
        return matrix

    def in_layout(self, matrix: Array) -> Array:
        """Return an array [outputs, inputs] of any dtype, ordered as `matrix` gives it, in the weight's layout."""
        dims = list(self.dims)
        outputs = dims.pop(self.output_axis)
        if self.node.op_type in _CONVOLUTIONS:
            channels, *kernel = dims
            outputs_first = np.moveaxis(matrix.reshape(outputs, *kernel, channels), -1, 1)
        else:
            outputs_first = matrix.reshape(outputs, *dims)
        return np.ascontiguousarray(np.moveaxis(outputs_first, 0, self.output_axis))

    def from_matrix(self, matrix: Array) -> Array:
        """Return a matrix like `matrix`'s result in the layout and dtype of the weight."""
        return self.in_layout(matrix).astype(self._tensor().dtype.numpy(), copy=False)

    def now(self) -> LinearLayer:
        """Return the layer as its operator is by now: it may read another value than it did."""
        return as_linear_layer(self.node) or self

    def _tensor(self) -> ir.TensorProtocol:
        tensor = walk.constant_tensor(self.weight)
        assert tensor is not None, "a linear layer has a constant weight"
        return tensor


def linear_layers(model: ir.Model) -> list[LinearLayer]:
    """Return the linear layers of every graph of the model, nested ones and functions included."""
    return [layer for node in walk.every_node(model) if (layer := as_linear_layer(node)) is not None]


def as_linear_layer(node: ir.Node) -> LinearLayer | None:
    """Return a node as a linear layer, or None where it is none."""
    if not walk.is_onnx_op(node, *LINEAR_OPS) or len(node.inputs) < 2 or walk.has_references(node):
        return None
    # y = x W is the rule; MatMul and Gemm may hold the constant on the left, y = W x.
    for index in (1, 0) if node.op_type in ("MatMul", "Gemm") else (1,):
        weight, other = node.inputs[index], node.inputs[1 - index]
        tensor = walk.constant_tensor(weight)
        usable = tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) >= 2
        if usable and weight is not None and other is not None and walk.constant_tensor(other) is None:
            axis = _output_axis(node, index, len(tensor.shape))  # type: ignore[union-attr]
            bias = node.inputs[2] if len(node.inputs) > 2 else None
            return LinearLayer(node, other, weight, index, axis, bias)
    return None


def _output_axis(node: ir.Node, weight_index: int, rank: int) -> int:
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose":
            return 1
        case "Gemm":
            transposed = node.attributes.get_int("transB" if weight_index == 1 else "transA", 0)
            return int(transposed == 0) if weight_index == 1 else int(transposed == 1)
        case _:
            return rank - 1 if weight_index == 1 else rank - 2


def is_lookup(node: ir.Node) -> bool:
    """Return whether a node looks rows up in a table."""
    return walk.is_onnx_op(node, "Gather") and node.attributes.get_int("axis", 0) == 0


def readers_elsewhere(layer: LinearLayer, layers: Sequence[LinearLayer]) -> list[ir.Node]:
    """Return the nodes that read the layer's weight and are not linear layers reading it the same way."""
    same = {other.node for other in layers if other.weight is layer.weight and other.output_axis == layer.output_axis}
    return [use.node for use in layer.weight.uses() if use.node not in same]


def has_channel_bias(layer: LinearLayer) -> bool:
    """Return whether a layer has a constant bias of one number for each output."""
    tensor, weight = walk.constant_tensor(layer.bias), walk.constant_tensor(layer.weight)
    if tensor is None or weight is None:
        return False
    shape, outputs = walk.dims(tensor), walk.dims(weight)[layer.output_axis]
    # A Gemm adds any shape that broadcasts to [rows, outputs]: [M, 1] is one number for each row, also where M = N.
    return bool(shape) and shape[-1] == outputs and tensor.size == outputs
