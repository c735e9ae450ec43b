"""Static quantization: Q and DQ placed where the target then computes in integers, and nowhere else."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.ranges import Range, RangeMethod
from graphopt.statistics import Statistic
from graphopt.target import IntegerScheme

from ..analyses.integer_candidates import Unit
from ..analyses.integer_units import IntegerUnits
from ..analyses.linear_layers import linear_layers
from ..analyses.selection import Selection
from ..analyses.shared_scales import shared_spans
from .coded_floats import CodedLayers
from .integer_weights import release
from .quant_plan import StaticPlan
from .quant_preparation import rewrite_means
from .static_formats import ActivationGrid, activation_grid, dtype_of, encode, is_float, limits
from .static_weights import Rounding, StaticWeights, missing_channels

_RULE = "quant-static"
_CODES_OF_FLOATS = 1 << 16
# The first version of Pad that pads codes.
_FIRST_PAD_OF_CODES = 13


def quantize_static(
    model: ir.Model,
    ctx: Context,
    selection: Selection,
    plan: StaticPlan,
    rounding: Rounding,
    coded: CodedLayers | None = None,
) -> None:
    """Lower what pays on the target to codes, by ranges observed on the calibration data.

    Args:
        model: The model, changed in place.
        ctx: Target, data and rewriter.
        selection: Nodes that may run in integers.
        plan: Formats, what shares a scale, and how ranges are read off the data.
        rounding: Opens what decides the codes of the weights, which is asked for one after the other in graph order.
        coded: Weights that are constants only for now, and are made of codes.
    """
    units = rewrite_means(model, ctx, plan, selection)
    layers = [unit.layer for unit in units.units if unit.layer is not None]
    # A calibration that is kept shall do for all targets, which may have other layers in integers.
    seen = [*layers, *linear_layers(model)] if ctx.calibration.folder is not None else layers
    grids = _grids(units, ctx, plan, rounding.requests(seen, model.graph))
    with rounding.open(ctx, layers) as rounder:
        weights = StaticWeights(ctx, plan, rounder, coded if coded is not None else CodedLayers(ctx))
        lowering = _Lowering(ctx, plan, units, grids, weights)
        for unit in units.units:
            lowering.lower(unit)
    lowering.drop_unread()
    weights.decode()
    _summarise(units, lowering, plan, rounding.solver, ctx)
    if plan.scheme.remark and any(layer.node.op_type == "MatMul" for layer in layers):
        ctx.note(plan.scheme.remark)


def _grids(
    units: IntegerUnits, ctx: Context, plan: StaticPlan, also: Mapping[ir.Value, Sequence[Statistic[Any]]]
) -> dict[ir.Value, ActivationGrid]:
    """Return the grid of each value in integers, by what was observed of it and of those that share its scale.

    What else will be asked for is observed in the same run.
    """
    values = units.values()
    constants = {value: tensor.numpy() for value in values if (tensor := walk.constant_tensor(value)) is not None}
    varying = [value for value in values if value not in constants]
    elsewhere = _read_elsewhere(ctx) if ctx.calibration.folder is not None else []
    if also or elsewhere:
        wanted = dict.fromkeys((*varying, *elsewhere))
        ctx.statistics({value: [plan.method.statistic(), *also.get(value, [])] for value in wanted})
    spans = {value: _span_of(array) for value, array in constants.items()}
    if varying:
        spans.update(_observed(varying, ctx, plan.scheme, plan.method))
    return {value: activation_grid(span, plan.scheme) for value, span in shared_spans(units, spans).items()}


def _read_elsewhere(ctx: Context) -> list[ir.Value]:
    """Return what other targets may have in integers."""
    layers = [layer for layer in linear_layers(ctx.model) if layer.node.graph is ctx.model.graph]
    values = (value for layer in layers for value in (layer.input, *layer.node.outputs))
    return [value for value in values if walk.constant_tensor(value) is None]


def _observed(
    values: list[ir.Value], ctx: Context, scheme: IntegerScheme, method: RangeMethod
) -> dict[ir.Value, Range]:
    """Return the range of each value by itself."""
    lowest, highest = limits(scheme.activation)
    # Float codes are the finer the nearer to zero: clipping spares them next to no error of rounding, as of 16 bits.
    codes = _CODES_OF_FLOATS if is_float(scheme.activation) else int(highest - lowest) + 1
    observed = ctx.ranges(values, method, codes=codes, symmetric=scheme.activation_symmetric)
    return {value: observed[value.name or ""] for value in values}


def _span_of(array: Array) -> Range:
    return Range(min(float(array.min(initial=0)), 0.0), max(float(array.max(initial=0)), 0.0))


class _Lowering:
    """Puts units into integers one by one; the model is valid and computes the same after each.

    Args:
        ctx: Where edits are made.
        plan: Formats.
        units: What runs in integers.
        grids: Grid of each value in integers.
        weights: Weights stored so far.
    """

    def __init__(
        self,
        ctx: Context,
        plan: StaticPlan,
        units: IntegerUnits,
        grids: dict[ir.Value, ActivationGrid],
        weights: StaticWeights,
    ) -> None:
        self.ctx, self.scheme, self.units, self.grids, self.weights = ctx, plan.scheme, units, grids, weights
        self.widened = 0
        # Of each original value: its integers, and the float value dequantized from them.
        self._integers: dict[ir.Value, ir.Value] = {}
        self._floats: dict[ir.Value, ir.Value] = {}
        self._wide: dict[tuple[ir.Value, int], ir.Value] = {}
        self._constants: dict[tuple[str, float], ir.Value] = {}

    def lower(self, unit: Unit) -> None:
        """Put one unit into integers, as one edit."""
        with self.ctx.rewriter.edit(_RULE, unit.node):
            for index, value in unit.inputs:
                self._quantize_input(unit, index, value)
            if unit.layer is not None:
                self._lower_weights(unit)
            if unit.on_integers:
                self._lower_move(unit)
            elif self.units.quantizes_output(unit):
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
            release(self.ctx.rewriter, value)

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
        keeps_tail = unit.tail is None or self.scheme.activation_symmetric or is_float(self.scheme.activation)
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
        return dtype_of(self.scheme.activation)

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
        return encode(array / own.scale + np.float32(own.zero_point), self.scheme.activation)

    def _lower_weights(self, unit: Unit) -> None:
        assert unit.layer is not None, "asked for where there is one"
        layer, missing = unit.layer, missing_channels(unit.layer, self.scheme)
        if walk.opset(self.ctx.model) < _FIRST_PAD_OF_CODES:
            missing = 0
        value = layer.input
        self.weights.lower(layer, unit.adder, self._floats[value], self.grids[value].scale, missing)
        if missing:
            self.widened += 1
            self.ctx.rewriter.set_input(layer.node, 0, self._with_channels(value, missing, layer.node))

    def _with_channels(self, value: ir.Value, missing: int, node: ir.Node) -> ir.Value:
        """Return a value dequantized from its integers and so many channels of zeros."""
        if (value, missing) not in self._wide:
            rewriter = self.ctx.rewriter
            # How much before and how much behind each of the axes N, C, H and W.
            ends = np.array([0, 0, 0, 0, 0, missing, 0, 0])
            scale, zero_point = self._parameters(value)
            inputs = [self._integers[value], rewriter.const(ends, "more_channels"), zero_point]
            pad = rewriter.make("Pad", inputs, sources=[node], name="pad")
            codes = rewriter.insert(pad, before=node).outputs[0]
            made = rewriter.make("DequantizeLinear", [codes, scale, zero_point], sources=[node], name="dq")
            self._wide[value, missing] = rewriter.insert(made, before=node).outputs[0]
        return self._wide[value, missing]


def _summarise(units: IntegerUnits, lowering: _Lowering, plan: StaticPlan, solver: str, ctx: Context) -> None:
    done = Counter(unit.node.op_type for unit in units.units)
    left = units.left
    if not done:
        ctx.note("found nothing that would run in integers: the model is unchanged" + _left_text(left.items()))
        return
    totals = Counter(done)
    for (operator, _), count in left.items():
        totals[operator] += count
    parts = [f"{count} of {totals[operator]} {operator}" for operator, count in done.most_common()]
    how = f"ranges by `{plan.method}`, weights by `{'rtn' if is_float(plan.scheme.weight) else solver}`"
    ctx.note(
        f"{', '.join(parts)} in integers; {how}{_left_text(left.items())}",
        integers=dict(done),
        left=sum(left.values()),
        stored=_formats(units),
    )
    raised = lowering.weights.raised
    if raised:
        ctx.note(f"{raised} channels took a larger weight scale, so that their bias fits int32", raised=raised)
    if lowering.widened:
        ctx.note(
            f"{lowering.widened} Conv read channels of zeros beside their own, which lets a faster kernel take them",
            widened=lowering.widened,
        )


def _formats(units: IntegerUnits) -> dict[str, int]:
    """Return how many weights are stored in which format."""
    weights = {unit.layer.weight for unit in units.units if unit.layer is not None}
    return {units.scheme.weight: len(weights)} if weights else {}


def _left_text(left: Iterable[tuple[tuple[str, str], int]]) -> str:
    parts = [f"{count} {operator} ({reason})" for (operator, reason), count in left]
    return f"; left: {', '.join(parts)}" if parts else ""
