"""Weights stored as integers: rounded once, shared by all layers that read them, the float copy let go."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.rewriter import Rewriter

from ..analyses.finite_weights import finite_matrix
from ..analyses.linear_layers import LinearLayer
from ..solvers import grid

# The first version in which one DequantizeLinear may have a scale for each channel.
PER_CHANNEL_OPSET = 13


@dataclass(frozen=True, eq=False)
class StoredWeight:
    """A weight in integers.

    Attributes:
        codes: Constant, int8, shaped like the weight.
        scales: float32, [outputs], or a scalar where all outputs share one.
        per_channel: Whether each output has a scale of its own.
        solution: The solver's answer.
    """

    codes: ir.Value
    scales: Array
    per_channel: bool
    solution: grid.GridWeight


@dataclass
class WeightStore:
    """The weights a pass has stored as integers so far.

    Attributes:
        ctx: Where constants are put.
        per_channel: Whether each output channel has a scale, where the operator allows it.
        bits: Bits of a code.
    """

    ctx: Context
    per_channel: bool
    bits: int = grid.FULL_RANGE_BITS
    _stored: dict[tuple[ir.Value, int, bool], StoredWeight] = field(default_factory=dict)
    _scales: dict[tuple[StoredWeight, tuple[int, ...]], ir.Value] = field(default_factory=dict)

    def store(
        self, layer: LinearLayer, *, factor: float = 1.0, transposed: bool = False, least_scales: Array | None = None
    ) -> StoredWeight:
        """Return the integers of a layer's weight, made now or shared with a layer that read it before.

        Args:
            layer: The layer; its weight is float32.
            factor: What the weight is multiplied by.
            transposed: Whether the integers are stored with the two axes of the weight exchanged.
            least_scales: float32 [outputs]; no scale may be smaller.

        Raises:
            PassError: The weight holds NaN or infinity.
        """
        key = (layer.weight, layer.output_axis, transposed)
        known = self._stored.get(key)
        if known is not None and factor == 1.0 and _reaches(known, least_scales):
            return known
        stored = self._make(layer, factor, transposed, least_scales)
        if factor == 1.0:
            self._stored[key] = stored
        return stored

    def scales(self, stored: StoredWeight, near: ir.Node, shape: tuple[int, ...] = (-1,)) -> ir.Value:
        """Return the constant that holds the scales of a weight, in a shape; the one made before, if any."""
        key = (stored, shape)
        if key not in self._scales:
            array = stored.scales.reshape(shape) if stored.per_channel else stored.scales
            self._scales[key] = self.ctx.rewriter.const(ir.tensor(array), "scales", near=near)
        return self._scales[key]

    def _make(self, layer: LinearLayer, factor: float, transposed: bool, least_scales: Array | None) -> StoredWeight:
        matrix = finite_matrix(layer)
        per_channel = self.per_channel and takes_channel_scales(layer)
        if factor != 1.0:
            matrix = matrix * np.float32(factor)
        points = grid.Grid(self.bits, tensor=not per_channel)
        solution = grid.round_to_nearest(matrix, points, least_scales=least_scales)
        if self.ctx.forecast is not None:
            self.ctx.forecast.weight(layer.node, solution.values() / np.float32(factor))
        codes = layer.in_layout(solution.codes)
        scales = solution.scales.reshape(-1 if per_channel else ())
        rewriter = self.ctx.rewriter
        return StoredWeight(
            rewriter.const(codes.T if transposed else codes, f"{layer.weight.name}_q", near=layer.node),
            scales,
            per_channel,
            solution,
        )

    def release(self, constant: ir.Value | None) -> None:
        """Remove a constant nothing reads any more; what is no constant stays."""
        release(self.ctx.rewriter, constant)


def release(rewriter: Rewriter, constant: ir.Value | None) -> None:
    """Remove a constant nothing reads any more; what is no constant stays."""
    if (
        constant is None
        or walk.constant_tensor(constant) is None
        or constant.uses()
        or constant.is_graph_output()
        or constant.is_graph_input()
    ):
        return
    producer = constant.producer()
    if producer is not None:
        rewriter.erase(producer)
    elif constant.graph is not None and constant.name in constant.graph.initializers:
        rewriter.remove_initializer(constant)


def weight_tensor(layer: LinearLayer) -> ir.TensorProtocol:
    """Return the tensor of a layer's weight; unlike the value that holds it, it always knows dtype and shape."""
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"
    return tensor


def takes_channel_scales(layer: LinearLayer) -> bool:
    """Return whether the integer kernels of an operator take a scale for each output channel."""
    if layer.node.op_type == "ConvTranspose":
        return layer.node.attributes.get_int("group", 1) == 1
    return layer.node.op_type != "MatMul" or len(weight_tensor(layer).shape) == 2


def _reaches(stored: StoredWeight, least_scales: Array | None) -> bool:
    return least_scales is None or bool((stored.scales >= least_scales).all())
