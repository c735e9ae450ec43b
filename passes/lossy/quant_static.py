"""Static quantization: Q and DQ placed where the target then computes in integers, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.statistics import Range, RangeMethod
from graphopt.target import IntegerScheme

from ..analyses.integer_units import IntegerUnits, Unit, integer_units
from ..analyses.linear_layers import LinearLayer
from ..analyses.selection import Selection
from ..analyses.shared_scales import shared_spans
from ..solvers import grid
from .integer_weights import StoredWeight, WeightStore

_RULE = "quant-static"
# Bias codes keep to half of int32, so that adding them to the sum of products cannot overflow.
_LARGEST_BIAS_CODE = 2.0**30
_CODES = {"uint8": (0, 255), "int8": (-128, 127)}


@dataclass(frozen=True)
class ActivationGrid:
    """The integer grid of an activation: x = (code − zero_point) * scale; zero is on it exactly."""

    scale: np.float32
    zero_point: int


def activation_grid(span: Range, scheme: IntegerScheme) -> ActivationGrid:
    """Return the grid that covers a range.

    Symmetric grids leave out the lowest code. A range that holds only zero gets the scale 1.
    """
    low, high = _CODES[scheme.activation]
    if scheme.activation_symmetric:
        scale = max(-span.low, span.high) / high
        return ActivationGrid(_usable(scale), 0)
    scale = (span.high - span.low) / (high - low)
    zero_point = round(low - span.low / scale) if scale > 0 else low
    return ActivationGrid(_usable(scale), int(np.clip(zero_point, low, high)))


def _usable(scale: float) -> np.float32:
    return np.float32(max(scale, grid.SMALLEST_SCALE)) if scale > 0 else np.float32(1.0)


def quantize_static(
    model: ir.Model,
    ctx: Context,
    selection: Selection,
    method: RangeMethod,
    *,
    scheme: IntegerScheme,
    per_channel: bool,
) -> None:
    """Lower what pays on the target to integers, by ranges observed on the calibration data.

    Args:
        model: The model, changed in place.
        ctx: Target, data and rewriter.
        selection: Nodes that may run in integers.
        method: How ranges are read off the data.
        scheme: The target's integer scheme.
        per_channel: Whether weights have a scale for each output channel.
    """
    units = integer_units(model, ctx.target, scheme, selection)
    grids = _grids(units, ctx, method, scheme)
    bits = grid.REDUCED_RANGE_BITS if scheme.reduce_range else grid.FULL_RANGE_BITS
    lowering = _Lowering(ctx, scheme, units, grids, WeightStore(ctx, per_channel, bits))
    for unit in units.units:
        lowering.lower(unit)
    lowering.drop_unread()
    _summarise(units, lowering, ctx)


def _grids(
    units: IntegerUnits, ctx: Context, method: RangeMethod, scheme: IntegerScheme
) -> dict[ir.Value, ActivationGrid]:
    """Return the grid of each value in integers, by what was observed of it and of those that share its scale."""
    values = units.values()
    constants = {value: tensor.numpy() for value in values if (tensor := walk.constant_tensor(value)) is not None}
    varying = [value for value in values if value not in constants]
    observed = ctx.ranges(varying, method) if varying else {}
    spans = {value: _span_of(array) for value, array in constants.items()}
    spans.update((value, observed[value.name or ""]) for value in varying)
    return {value: activation_grid(span, scheme) for value, span in shared_spans(units, spans).items()}


def _span_of(array: Array) -> Range:
    return Range(min(float(array.min(initial=0)), 0.0), max(float(array.max(initial=0)), 0.0))


class _Lowering:
    """Puts units into integers one by one; the model is valid and computes the same after each.

    Args:
        ctx: Where edits are made.
        scheme: The target's integer scheme.
        units: What runs in integers.
        grids: Grid of each value in integers.
        weights: Weights stored so far.
    """

    def __init__(
        self,
        ctx: Context,
        scheme: IntegerScheme,
        units: IntegerUnits,
        grids: dict[ir.Value, ActivationGrid],
        weights: WeightStore,
    ) -> None:
        self.ctx, self.scheme, self.units, self.grids, self.weights = ctx, scheme, units, grids, weights
        self.raised = 0
        # Of each original value: its integers, and the float value dequantized from them.
        self._integers: dict[ir.Value, ir.Value] = {}
        self._floats: dict[ir.Value, ir.Value] = {}
        self._constants: dict[tuple[str, float], ir.Value] = {}

    def lower(self, unit: Unit) -> None:
        """Put one unit into integers, as one edit."""
        with self.ctx.rewriter.edit(_RULE, unit.node):
            for index, value in unit.inputs:
                self._quantize_input(unit, index, value)
            if unit.layer is not None:
                self._lower_weights(unit.layer, unit.adder)
            if unit.on_integers:
                self._lower_move(unit)
            elif self.units.quantizes_output(unit, self.scheme):
                self._quantize_output(unit)

    def drop_unread(self) -> None:
        """Erase each DequantizeLinear that in the end nothing reads."""
        for value in self._floats.values():
            node = value.producer()
            if node is not None and not value.uses() and not value.is_graph_output():
                self.ctx.rewriter.erase(node)

    def _quantize_input(self, unit: Unit, index: int, value: ir.Value) -> None:
        if value not in self._floats:
            self._enter(value, unit.node)
        source = self._integers[value] if unit.on_integers else self._floats[value]
        if unit.node.inputs[index] is not source:
            self.ctx.rewriter.set_input(unit.node, index, source)
            self.weights.release(value)

    def _enter(self, value: ir.Value, before: ir.Node) -> None:
        """Quantize a value made in float, for readers in integers alone; others go on reading the float."""
        tensor = walk.constant_tensor(value)
        rewriter = self.ctx.rewriter
        if tensor is not None:
            self._integers[value] = rewriter.const(self._codes(value, tensor.numpy()), f"{value.name}_q", near=before)
        else:
            node = rewriter.make("QuantizeLinear", [value, *self._parameters(value)], sources=[before], name="q")
            self._integers[value] = rewriter.insert(node, before=before).outputs[0]
        node = self._dequantize(value, before)
        rewriter.insert(node, before=before)
        self._floats[value] = node.outputs[0]

    def _quantize_output(self, unit: Unit) -> None:
        """Quantize what a unit makes, for every reader: floats are dequantized from it."""
        rewriter = self.ctx.rewriter
        # An asymmetric grid clips by itself what the Relu or Clip would; a symmetric one needs it in front.
        keeps_tail = unit.tail is None or self.scheme.activation_symmetric
        made_by = unit.outputs if keeps_tail else unit.core.outputs
        for value, made in zip(unit.outputs, made_by, strict=True):
            producer = made.producer()
            assert producer is not None, "a unit makes its output"
            quantize = rewriter.make("QuantizeLinear", [made, *self._parameters(value)], sources=[producer], name="q")
            rewriter.insert_after(quantize, producer)
            self._integers[value] = quantize.outputs[0]
            self._leave(value, quantize)
            rewriter.set_input(quantize, 0, made)
        if unit.tail is not None and not keeps_tail:
            rewriter.erase(unit.tail)

    def _lower_move(self, unit: Unit) -> None:
        """Let a node that moves values of any dtype move the integers themselves."""
        source = unit.inputs[0][1]
        node = unit.node
        if node.op_type == "Pad" and node.attributes.get_string("mode", "constant") == "constant":
            # The padding is zero, which as an integer is the zero point.
            self.ctx.rewriter.set_input(node, 2, self._parameters(source)[1])
        for value in unit.node.outputs:
            self._integers[value] = value
            self._leave(value, node)
            value.type = ir.TensorType(self._dtype)

    def _leave(self, value: ir.Value, after: ir.Node) -> None:
        """Let readers of a float value read what is dequantized from its integers."""
        rewriter = self.ctx.rewriter
        node = self._dequantize(value, after)
        rewriter.insert_after(node, after)
        rewriter.replace(value, node.outputs[0])
        # Where the integers are the value itself, the way out of them is no reader to redirect.
        rewriter.set_input(node, 0, self._integers[value])
        self._floats[value] = node.outputs[0]

    def _dequantize(self, value: ir.Value, source: ir.Node) -> ir.Node:
        inputs = [self._integers[value], *self._parameters(value)]
        return self.ctx.rewriter.make("DequantizeLinear", inputs, sources=[source], name="dq")

    @property
    def _dtype(self) -> ir.DataType:
        return ir.DataType.UINT8 if self.scheme.activation == "uint8" else ir.DataType.INT8

    def _parameters(self, value: ir.Value) -> list[ir.Value]:
        """Return the constants for scale and zero point of a value; equal ones are one constant."""
        own = self.grids[value]
        return [
            self._constant("scale", float(own.scale), np.float32),
            self._constant("zero", own.zero_point, self._dtype.numpy()),
        ]

    def _constant(self, base: str, number: float, dtype: np.typing.DTypeLike) -> ir.Value:
        key = (base, number)
        if key not in self._constants:
            self._constants[key] = self.ctx.rewriter.const(ir.tensor(np.array(number, dtype)), base)
        return self._constants[key]

    def _codes(self, value: ir.Value, array: Array) -> Array:
        own = self.grids[value]
        low, high = _CODES[self.scheme.activation]
        codes: Array = np.clip(np.rint(array / own.scale) + own.zero_point, low, high).astype(self._dtype.numpy())
        return codes

    def _lower_weights(self, layer: LinearLayer, adder: ir.Node | None) -> None:
        node, weight, bias = layer.node, layer.weight, layer.bias
        alpha, beta = node.attributes.get_float("alpha", 1.0), node.attributes.get_float("beta", 1.0)
        in_scale = self.grids[layer.input].scale
        offsets = self._bias_of(layer, beta)
        least = np.abs(offsets) / np.float32(in_scale * _LARGEST_BIAS_CODE) if offsets is not None else None
        stored = self.weights.store(layer, factor=alpha, least_scales=least)
        self.raised += stored.solution.raised
        self._read_weight(layer, stored)
        if offsets is not None:
            self._read_bias(layer, stored, offsets, in_scale, adder)
        if alpha != 1.0:
            self.ctx.rewriter.set_attribute(node, "alpha", None)
        if beta != 1.0 and offsets is not None:
            self.ctx.rewriter.set_attribute(node, "beta", None)
        self.weights.release(weight)
        self.weights.release(bias)

    def _bias_of(self, layer: LinearLayer, beta: float) -> Array | None:
        """Return the bias as float32 [outputs] where the scheme wants it in integers."""
        tensor = walk.constant_tensor(layer.bias)
        if tensor is None or self.scheme.bias != "int32":
            return None
        return tensor.numpy().reshape(-1).astype(np.float32) * np.float32(beta)

    def _read_weight(self, layer: LinearLayer, stored: StoredWeight) -> None:
        rewriter = self.ctx.rewriter
        inputs = [stored.codes, self.weights.scales(stored, layer.node)]
        if layer.node.op_type in ("Gemm", "MatMul"):
            # ONNX Runtime fuses a Conv without it, but no Gemm, which it also makes of MatMul and Add.
            inputs.append(rewriter.const(ir.tensor(np.zeros_like(stored.scales, np.int8)), "weight_zero"))
        axis = layer.output_axis if stored.per_channel else None
        node = rewriter.make("DequantizeLinear", inputs, {"axis": axis}, sources=[layer.node], name="w")
        rewriter.insert(node, before=layer.node)
        rewriter.set_input(layer.node, layer.weight_index, node.outputs[0])

    def _read_bias(
        self, layer: LinearLayer, stored: StoredWeight, offsets: Array, in_scale: np.float32, adder: ir.Node | None
    ) -> None:
        """Store the bias as int32 on the grid of the sums of products, the only one the kernels take."""
        rewriter = self.ctx.rewriter
        scales = np.asarray(in_scale * stored.scales, np.float32)
        codes = np.rint(offsets.astype(np.float64) / scales).astype(np.int32)
        inputs = [rewriter.const(codes, "bias"), rewriter.const(ir.tensor(scales), "bias_scale")]
        axis = 0 if stored.per_channel else None
        node = rewriter.make("DequantizeLinear", inputs, {"axis": axis}, sources=[layer.node], name="b")
        rewriter.insert(node, before=layer.node)
        if adder is None:
            rewriter.set_input(layer.node, 2, node.outputs[0])
        else:
            rewriter.set_input(adder, list(adder.inputs).index(layer.bias), node.outputs[0])


def _summarise(units: IntegerUnits, lowering: _Lowering, ctx: Context) -> None:
    done = Counter(unit.node.op_type for unit in units.units)
    left = units.left
    if not done:
        ctx.note("found nothing that would run in integers: the model is unchanged" + _left_text(left.items()))
        return
    totals = Counter(done)
    for (operator, _), count in left.items():
        totals[operator] += count
    parts = [f"{count} of {totals[operator]} {operator}" for operator, count in done.most_common()]
    ctx.note(f"{', '.join(parts)} in integers{_left_text(left.items())}", integers=dict(done), left=sum(left.values()))
    if lowering.raised:
        ctx.note(
            f"{lowering.raised} channels took a larger weight scale, so that their bias fits int32",
            raised=lowering.raised,
        )


def _left_text(left: Iterable[tuple[tuple[str, str], int]]) -> str:
    parts = [f"{count} {operator} ({reason})" for (operator, reason), count in left]
    return f"; left: {', '.join(parts)}" if parts else ""
