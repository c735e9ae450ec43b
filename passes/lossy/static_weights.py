"""Weights and biases of static quantization: rounded by whom the plan names, stored as the target reads them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.statistics import Statistic
from graphopt.target import IntegerScheme

from ..analyses.finite_weights import refuse_not_finite
from ..analyses.linear_layers import LinearLayer, has_channel_bias
from ..solvers import grid
from ..solvers.grid import LARGEST_BIAS_CODE, Grid, GridWeight
from ..solvers.scale_search import mse
from .coded_floats import CodedLayers
from .integer_weights import release, takes_channel_scales, weight_tensor
from .quant_plan import StaticPlan
from .static_formats import dtype_of, encode, is_float, limits

_RULE = "coded-integers"
# Kernels that read channels in groups take no fewer outputs than this; others are not worth more channels.
_LEAST_OUTPUTS = 16


@dataclass(frozen=True, eq=False)
class WeightTask:
    """A weight to be rounded, and what its layer reads.

    Attributes:
        layer: The layer; ``layer.input`` is the value it read in the float model, known there by the same name.
        quantized_input: What it reads in the model as far as that is in integers: all before it is, nothing behind.
        grid: What the codes may be.
        factor: What the weight is multiplied by before it is rounded.
        bias: float32 [outputs], or None where the layer has no constant bias.
        least_scales: float32 [outputs], or None; no scale may be smaller, or the bias would overflow.
        given: Codes and scales that are settled, so that only the bias is left to correct; or None.
    """

    layer: LinearLayer
    quantized_input: ir.Value
    grid: Grid
    factor: float = 1.0
    bias: Array | None = None
    least_scales: Array | None = None
    given: GridWeight | None = None

    def matrix(self) -> Array:
        """Return the floats to be rounded, [outputs, inputs]."""
        matrix = self.layer.matrix()
        return matrix if self.factor == 1.0 else matrix * np.float32(self.factor)


@dataclass(frozen=True, eq=False)
class RoundedWeight:
    """What a rounder answers.

    Attributes:
        weight: Codes [outputs, inputs] on the task's grid, scales no smaller than the least ones.
        bias: float32 [outputs], or None: the task's, or one that makes up for what rounding does to the mean. Where
            the task has none, so has the answer.
    """

    weight: GridWeight
    bias: Array | None


Rounder = Callable[[WeightTask], RoundedWeight]


@dataclass(frozen=True, eq=False)
class Rounding:
    """A way to round.

    Attributes:
        solver: Its name.
        open: Opens a rounder for layers of a model that is about to be lowered, and closes it when that is done.
        requests: Returns the statistics it will ask of layers of a graph, so that they are observed with all others.
    """

    solver: str
    open: Callable[[Context, Iterable[LinearLayer]], AbstractContextManager[Rounder]]
    requests: Callable[[Iterable[LinearLayer], ir.Graph], Mapping[ir.Value, Sequence[Statistic[Any]]]]


def nearest(task: WeightTask) -> RoundedWeight:
    """Round each weight to the nearest point of its grid."""
    if task.given is not None:
        return RoundedWeight(task.given, task.bias)
    return RoundedWeight(grid.round_to_nearest(task.matrix(), task.grid, least_scales=task.least_scales), task.bias)


def searched(task: WeightTask) -> RoundedWeight:
    """Round to the scales that lose least of the weight itself."""
    if task.given is not None:
        return RoundedWeight(task.given, task.bias)
    return RoundedWeight(mse(task.matrix(), task.grid, least_scales=task.least_scales), task.bias)


def without_data(solver: str, rounder: Rounder) -> Rounding:
    """Return a way to open a rounder that looks at nothing but the weight."""
    return Rounding(solver, lambda ctx, layers: nullcontext(rounder), lambda layers, graph: {})


def weight_grid(scheme: IntegerScheme, group: str | int, layer: LinearLayer) -> Grid:
    """Return the grid of a layer's weight; one scale for all of it where its kernel takes no more."""
    if is_float(scheme.weight):
        return Grid(tensor=group == "tensor" or not takes_channel_scales(layer))
    bits = int(scheme.weight.removeprefix("u").removeprefix("int"))
    symmetric = not scheme.weight.startswith("u")
    if scheme.reduce_range and bits == grid.FULL_RANGE_BITS:
        bits = grid.REDUCED_RANGE_BITS
    if isinstance(group, int):
        return Grid(bits, symmetric, block=group if layer.channels % group == 0 else None)
    return Grid(bits, symmetric, tensor=group == "tensor" or not takes_channel_scales(layer))


@dataclass(frozen=True, eq=False)
class _Stored:
    """A weight as constants: codes, scales in the order DequantizeLinear reads them, and how it reads them."""

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    attributes: dict[str, int]
    per_output: Array


class StaticWeights:
    """Puts the weights and biases of linear layers into codes, once for all layers that read one.

    Args:
        ctx: Where edits are made.
        plan: Formats.
        rounder: Decides the codes.
        coded: Weights that the model makes of codes, and will make of the same ones then.
    """

    def __init__(self, ctx: Context, plan: StaticPlan, rounder: Rounder, coded: CodedLayers) -> None:
        self.ctx, self.plan, self.scheme, self.rounder, self.coded = ctx, plan, plan.scheme, rounder, coded
        self.raised = 0
        self._decoded: dict[ir.Value, tuple[LinearLayer, GridWeight]] = {}
        self._stored: dict[tuple[ir.Value, int, int, Grid], _Stored] = {}

    def lower(
        self,
        layer: LinearLayer,
        adder: ir.Node | None,
        quantized_input: ir.Value,
        in_scale: np.float32,
        more_channels: int = 0,
    ) -> None:
        """Let a layer, whose input is quantized already, read its weight and bias from codes.

        Args:
            layer: The layer; its weight is float32.
            adder: The Add that gives a MatMul its bias, or None.
            quantized_input: What the layer reads, quantized, without more channels.
            in_scale: Scale of what the layer reads.
            more_channels: How many input channels of zeros its input was given.

        Raises:
            PassError: The weight or the bias holds NaN or infinity.
        """
        node = layer.node
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        bias = self._bias_of(layer, beta)
        if bias is not None:
            refuse_not_finite(bias, f"bias of {walk.label(node)}")
        own = weight_grid(self.scheme, self.plan.group, layer)
        # Sums of products with several scales are of no grid that a bias could be on.
        in_integers = bias is not None and self.scheme.bias == "int32" and own.block is None
        least = np.abs(bias) / np.float32(in_scale * LARGEST_BIAS_CODE) if in_integers and bias is not None else None
        is_plain = alpha == 1.0 and not more_channels and not is_float(self.scheme.weight)
        given = self.coded.given(layer, own, least) if is_plain else None
        task = WeightTask(layer, quantized_input, own, alpha, bias, least, given)
        stored, corrected = self._store(task, more_channels)
        self._read_weight(layer, stored)
        if in_integers and corrected is not None:
            self._read_bias(layer, stored, corrected, in_scale, adder)
        elif corrected is not None and corrected is not bias:
            self._read_float_bias(layer, corrected, adder)
        if alpha != 1.0:
            self.ctx.rewriter.set_attribute(node, "alpha", None)
        if beta != 1.0 and (in_integers or corrected is not bias):
            self.ctx.rewriter.set_attribute(node, "beta", None)
        release(self.ctx.rewriter, layer.weight)
        release(self.ctx.rewriter, layer.bias)

    def decode(self) -> None:
        """Make weights of their codes in the model, where these were there before, in place of storing them."""
        for stored, (layer, found) in self._decoded.items():
            readers = [use.node for use in stored.uses()]
            with self.ctx.rewriter.edit(_RULE, *readers):
                self.ctx.rewriter.replace(stored, self.coded.integers(layer, found))
                release(self.ctx.rewriter, stored)

    def _bias_of(self, layer: LinearLayer, beta: float) -> Array | None:
        """Return a constant bias of one number for each output as float32 [outputs]."""
        tensor = walk.constant_tensor(layer.bias)
        if tensor is None or not has_channel_bias(layer):
            return None
        return tensor.numpy().reshape(-1).astype(np.float32) * np.float32(beta)

    def _store(self, task: WeightTask, more_channels: int) -> tuple[_Stored, Array | None]:
        """Return the constants of a weight, made now or for a layer before, and the bias that goes with them."""
        layer, least = task.layer, task.least_scales
        key = (layer.weight, layer.output_axis, more_channels, task.grid)
        known = self._stored.get(key)
        if known is not None and task.factor == 1.0 and (least is None or bool((known.per_output >= least).all())):
            return known, task.bias
        refuse_not_finite(layer.matrix(), f"weight `{layer.weight.name}`")
        bias = task.bias
        if is_float(self.scheme.weight):
            stored = self._store_floats(task)
        else:
            answer = self.rounder(task)
            self.raised += answer.weight.raised
            stored, bias = self._store_codes(layer, answer.weight, more_channels), answer.bias
            if task.given is not None:
                self._decoded[stored.codes] = layer, task.given
            if self.ctx.forecast is not None:
                self.ctx.forecast.weight(layer.node, answer.weight.values() / np.float32(task.factor))
        if task.factor == 1.0:
            self._stored[key] = stored
        return stored, bias

    def _store_codes(self, layer: LinearLayer, found: GridWeight, more_channels: int) -> _Stored:
        codes = layer.in_layout(found.codes)
        if more_channels:
            codes = np.pad(codes, [(0, 0), (0, more_channels)] + [(0, 0)] * (codes.ndim - 2))
        zero_points = None if found.zero_points is None else self._laid_out(layer, found.zero_points, found.grid)
        scales = self._laid_out(layer, found.scales, found.grid)
        if zero_points is None and layer.node.op_type in ("Gemm", "MatMul"):
            # ONNX Runtime fuses a Conv without it, but no Gemm, which it also makes of MatMul and Add.
            zero_points = np.zeros_like(scales, np.int8)
        return self._constants(
            layer, codes, scales, zero_points, found.grid, found.scales.reshape(len(found.scales), -1)
        )

    def _store_floats(self, task: WeightTask) -> _Stored:
        """Store a weight as floats of 8 bits: the largest of each output, or of all, becomes the largest code."""
        layer, matrix = task.layer, task.matrix()
        magnitude = np.abs(matrix).max(axis=1, initial=0.0, keepdims=True)
        if task.grid.tensor:
            magnitude = magnitude.max(initial=0.0, keepdims=True)
        scales = grid.positive(magnitude / np.float32(limits(self.scheme.weight)[1]))
        floats = encode(matrix / scales, self.scheme.weight)
        if self.ctx.forecast is not None:
            self.ctx.forecast.weight(layer.node, floats.astype(np.float32) * scales / np.float32(task.factor))
        codes = layer.in_layout(floats)
        return self._constants(layer, codes, self._laid_out(layer, scales, task.grid), None, task.grid, scales)

    def _laid_out(self, layer: LinearLayer, per_block: Array, own: Grid) -> Array:
        """Return scales or zero points as DequantizeLinear reads them: one, one per output, or one per block."""
        if own.block is None:
            return per_block.reshape(()) if own.tensor else per_block.reshape(-1)
        spread = layer.in_layout(np.repeat(per_block, own.block, axis=1))
        return np.ascontiguousarray(np.take(spread, range(0, layer.channels, own.block), axis=_blocked_axis(layer)))

    def _constants(
        self,
        layer: LinearLayer,
        codes: Array,
        scales: Array,
        zero_points: Array | None,
        own: Grid,
        per_output: Array,
    ) -> _Stored:
        rewriter, dtype = self.ctx.rewriter, dtype_of(self.scheme.weight).numpy()
        attributes = {} if own.tensor else {"axis": layer.output_axis}
        if own.block is not None:
            attributes = {"axis": _blocked_axis(layer), "block_size": own.block}
        return _Stored(
            rewriter.const(codes.astype(dtype, copy=False), f"{layer.weight.name}_q", near=layer.node),
            rewriter.const(ir.tensor(scales.astype(np.float32)), "scales", near=layer.node),
            rewriter.const(ir.tensor(zero_points.astype(dtype)), "weight_zero") if zero_points is not None else None,
            attributes,
            per_output.min(axis=1) if own.block is not None else per_output.reshape(-1),
        )

    def _read_weight(self, layer: LinearLayer, stored: _Stored) -> None:
        inputs = [stored.codes, stored.scales, *([stored.zero_points] if stored.zero_points is not None else [])]
        value = self._dequantized(layer, inputs, stored.attributes, "w")
        self.ctx.rewriter.set_input(layer.node, layer.weight_index, value)

    def _read_bias(
        self, layer: LinearLayer, stored: _Stored, bias: Array, in_scale: np.float32, adder: ir.Node | None
    ) -> None:
        """Store the bias as int32 on the grid of the sums of products, the only one the kernels take."""
        scales = np.asarray(in_scale * stored.per_output, np.float32)
        codes = np.rint(bias.astype(np.float64) / scales).astype(np.int32)
        per_channel = bool(stored.attributes)
        content = ir.tensor(scales if per_channel else scales.reshape(()))
        inputs = [self.ctx.rewriter.const(codes, "bias"), self.ctx.rewriter.const(content, "bias_scale")]
        value = self._dequantized(layer, inputs, {"axis": 0} if per_channel else {}, "b")
        self._set_bias(layer, value, adder)

    def _read_float_bias(self, layer: LinearLayer, bias: Array, adder: ir.Node | None) -> None:
        self._set_bias(layer, self.ctx.rewriter.const(bias.astype(np.float32), "bias", near=layer.node), adder)

    def _set_bias(self, layer: LinearLayer, value: ir.Value, adder: ir.Node | None) -> None:
        if adder is None:
            self.ctx.rewriter.set_input(layer.node, 2, value)
        else:
            self.ctx.rewriter.set_input(adder, list(adder.inputs).index(layer.bias), value)

    def _dequantized(
        self, layer: LinearLayer, inputs: list[ir.Value], attributes: dict[str, int], name: str
    ) -> ir.Value:
        rewriter = self.ctx.rewriter
        node = rewriter.make("DequantizeLinear", inputs, attributes, sources=[layer.node], name=name)
        rewriter.insert(node, before=layer.node)
        return node.outputs[0]


def missing_channels(layer: LinearLayer, scheme: IntegerScheme) -> int:
    """Return how many channels of zeros make a convolution one that the target's fast kernel takes.

    ONNX Runtime on x86 reads channels four at a time; at 3 it copies each window out first, which takes 2.4 to 2.7
    times as long as the whole convolution does at 4.
    """
    short = -layer.channels % scheme.channel_multiple
    if layer.node.op_type != "Conv" or layer.node.attributes.get_int("group", 1) != 1 or scheme.weight != "int8":
        return 0
    outputs, _, *kernel = walk.dims(weight_tensor(layer))
    return short if len(kernel) == 2 and math.prod(kernel) > 1 and outputs >= _LEAST_OUTPUTS else 0


def _blocked_axis(layer: LinearLayer) -> int:
    """Return the axis blocks run along: of a matrix the one that is not the outputs', of a Conv its channels."""
    return 1 if layer.node.op_type == "Conv" else 1 - layer.output_axis
