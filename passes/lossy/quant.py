"""Quantization: weights and activations in few bits, laid out as the target computes with them."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.errors import PassError, UsageError
from graphopt.options import opt
from graphopt.ranges import RangeMethod
from graphopt.report import show_bytes
from graphopt.target import IntegerScheme

from ..analyses.forecast import forecasting
from ..analyses.linear_layers import LinearLayer, as_linear_layer, linear_layers
from ..analyses.quantized import first_quantized, refuse_quantized
from ..analyses.selection import Selection, select
from ..exact.opset import Opset
from ..solvers import grid
from .coded_floats import CodedLayers, coded_as_floats, decoding_nodes
from .integer_weights import PER_CHANNEL_OPSET, WeightStore, weight_tensor
from .layer_rounding import rounding_of
from .quant_blocks import quantize_blocks
from .quant_dynamic import FIRST_OPSET as FIRST_DYNAMIC_OPSET
from .quant_dynamic import as_product, quantize_dynamic
from .quant_plan import Group, StaticPlan, parse_group, refuse_words_of_other_modes, static_scheme
from .quant_preparation import in_opset
from .quant_static import quantize_static
from .quant_weights import quantize_weights
from .static_formats import is_float
from .weight_plan import SOLVERS_WITH_DATA, weight_plan

Mode = Literal["static", "dynamic", "weights"]

# Share of the values inside a range, in percent, where the rarest are cut off.
_USUAL_PERCENTILE = 99.999
# Stands in for the positions a layer is computed at where shapes are dynamic; only the proportion matters.
_ASSUMED_POSITIONS = 64
_RECURRENT_OPS = ("LSTM", "GRU", "RNN")


@dataclass(frozen=True)
class Quant(Pass):
    """Store and compute in integers of few bits: static, dynamic or weights only, as the target runs fast."""

    mode: Literal["auto", "static", "dynamic", "weights"] = opt(
        "auto", help="ranges from data (static), taken at run time (dynamic), or weights stored only (weights)"
    )
    activations: Literal["uint8", "int8", "uint16", "int16", "float8e4m3fn", "float8e5m2"] | None = opt(
        None, help="format of activations (static); by default the target's own"
    )
    weights: Literal["int8", "uint8", "int4", "uint4", "int2", "uint2", "float8e4m3fn", "float8e5m2"] | None = opt(
        None, help="format of weights; by default the target's own; unsigned ones have zero points"
    )
    symmetric: bool | None = opt(None, help="whether the zero point of activations is fixed; by default as the target")
    group: str | None = opt(
        None,
        help="what shares a weight scale: tensor, channel, or so many inputs (16 to 256); by default as the target",
    )
    solver: Literal["auto", "rtn", "mse", "gptq", "awq", "hqq"] = opt(
        "auto", help="how weights are rounded; `ada-round`, a pass of its own, goes on from there"
    )
    ranges: str = opt(
        "auto",
        help="how activation ranges are read off the data: auto, minmax, average, p99.99, kl, mse or sqnr",
    )
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")

    name = "quant"
    guarantee = Guarantee.LOSSY

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form, as a BatchNorm belongs to its layer's weights; data by the mode."""
        match self.mode:
            case "static":
                return frozenset({Need.CANONICAL, Need.CALIBRATION})
            case "auto" | "dynamic":
                return frozenset({Need.CANONICAL, Need.CALIBRATION_OPTIONAL})
            case "weights" if self.solver in SOLVERS_WITH_DATA:
                return frozenset({Need.CANONICAL, Need.CALIBRATION})
            case "weights" if self.solver == "auto":
                return frozenset({Need.CANONICAL, Need.CALIBRATION_OPTIONAL})
            case _:
                return frozenset({Need.CANONICAL})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Quantize what the mode and the selection name.

        Raises:
            PassError: The model is quantized already, is not float32, or cannot be brought to an operator set that
                says what is asked; or the target has nothing for the mode.
            UsageError: A glob matches nothing, an option is of another mode, or the target has no kernels for formats
                that were asked for; says which it has.
        """
        selection = select(model, self.include, self.exclude, where=f"pass `{self.name}`")
        _refuse_quantized(model, ctx)
        if self.mode != "weights":  # which stores float16 as it does float32
            _refuse_other_floats(model)
        self.lower(model, ctx, selection)

    def lower(self, model: ir.Model, ctx: Context, selection: Selection) -> None:
        """Quantize what is selected of a float model.

        Raises:
            PassError: As for `run`.
            UsageError: As for `run`.
        """
        with coded_as_floats(model, ctx, may_compute=self.mode in ("auto", "static")) as coded:
            mode = self._lower(model, ctx, selection, coded)
            coded.note(mode)

    def _lower(self, model: ir.Model, ctx: Context, selection: Selection, coded: CodedLayers) -> Mode:
        """Quantize, and return in which mode."""
        group = parse_group(self.group)
        mode = self._choose(model, ctx) if self.mode == "auto" else self.mode
        of_static = {"activations": self.activations, "symmetric": self.symmetric, "ranges": self.ranges}
        refuse_words_of_other_modes(mode, of_static)
        if mode != "static":
            coded.restore()
        with forecasting(ctx, model, [layer for layer in linear_layers(model) if selection.allows(layer.node)]):
            match mode:
                case "static":
                    self._run_static(model, ctx, selection, group, coded)
                case "dynamic":
                    self._run_dynamic(model, ctx, selection, group)
                case "weights":
                    self._run_weights(model, ctx, selection, group)
        _note_recurrent(model, ctx, selection)
        return mode

    def _choose(self, model: ir.Model, ctx: Context) -> Mode:
        """Choose a mode from the data, the target and where the work is, and say why."""
        if not any(as_linear_layer(node) or as_product(node) for node in walk.every_node(model)):
            reason = "no convolution or matrix product has a constant weight, so that there is nothing to compute"
            ctx.note(f"chose `mode=weights`: {reason} in integers", mode="weights", convolution_share=0.0)
            return "weights"
        share = _convolution_share(model)
        in_convolutions = f"{share:.0%} of the multiplications are in convolutions"
        static, dynamic = ctx.target.static is not None, bool(ctx.target.dynamic_ops)
        mode: Mode = "weights"
        nested = _nested_share(model)
        kernels = {scheme.weight for scheme in (ctx.target.static, *ctx.target.alternatives) if scheme is not None}
        if self.weights is not None and self.weights not in kernels:
            reason = f"`{ctx.target.name}` only stores weights as {self.weights}"
        elif share >= 0.5 and nested > 0.5:
            reason = f"{nested:.0%} of the multiplications are inside subgraphs or functions, out of sight of the data"
        elif share >= 0.5 and ctx.data is None:
            reason = f"{in_convolutions}, whose activation ranges need calibration data, and none was given"
        elif share >= 0.5 and static:
            mode, reason = "static", f"{in_convolutions}, and there is calibration data"
        elif share < 0.5 and dynamic and walk.opset(model) >= FIRST_DYNAMIC_OPSET:
            mode, reason = "dynamic", f"{1 - share:.0%} of the multiplications are in matrix products"
        else:
            reason = f"`{ctx.target.name}` gains nothing from integer arithmetic on this model"
        ctx.note(f"chose `mode={mode}`: {reason}", mode=mode, convolution_share=share)
        return mode

    def _run_static(
        self, model: ir.Model, ctx: Context, selection: Selection, group: Group | None, coded: CodedLayers
    ) -> None:
        rounding = rounding_of(self.solver)
        scheme, group = static_scheme(ctx.target, self.activations, self.weights, self.symmetric, group)
        _refuse_rounding_of_floats(scheme, self.solver)
        plan = in_opset(model, ctx, StaticPlan(scheme, group, self._range_method(model)))
        quantize_static(model, ctx, selection, plan, rounding, coded)
        _note_nested(model, ctx)

    def _range_method(self, model: ir.Model) -> RangeMethod:
        """Cut off the rarest values of convolutional networks, but none of transformers.

        Measured: KL to float32 of SqueezeNet 0.0104 by min-max and 0.0073 at 99.999 %, ResNet-20 and MobileNet alike
        by both; MiniLM loses 0.002 Spearman, as transformers hold what matters in few very large values.
        """
        if self.ranges != "auto":
            return RangeMethod.parse(self.ranges)
        if _convolution_share(model) >= 0.5:
            return RangeMethod("percentile", _USUAL_PERCENTILE)
        return RangeMethod()

    def _run_dynamic(self, model: ir.Model, ctx: Context, selection: Selection, group: Group | None) -> None:
        if not ctx.target.dynamic_ops:
            raise PassError(
                f"pass `quant:mode=dynamic` gains nothing on target `{ctx.target.name}`",
                hint="use `quant:mode=weights`",
            )
        _require_opset(model, FIRST_DYNAMIC_OPSET, "dynamic")
        self._refuse_other_formats("dynamic", group)
        # What is left, embeddings above all, is stored in integers too; a tied table is stored once for both.
        scheme = ctx.target.static
        bits = grid.REDUCED_RANGE_BITS if scheme is not None and scheme.reduce_range else grid.FULL_RANGE_BITS
        weights = WeightStore(ctx, group != "tensor", bits)
        in_float = quantize_dynamic(model, ctx, selection, weights)
        quantize_weights(model, ctx, selection, weights, is_rest=True, in_float=in_float)

    def _run_weights(self, model: ir.Model, ctx: Context, selection: Selection, group: Group | None) -> None:
        plan = weight_plan(ctx.target, self.weights, group, self.solver)
        instead_of: tuple[str, dict[ir.Value, str]] | None = None
        if plan is not None:
            if walk.opset(model) < plan.opset:
                Opset(to=plan.opset).run(model, ctx)
            instead_of = plan.asked, quantize_blocks(model, ctx, selection, plan)
        # What blocks do not suit, convolutions above all, is stored as int8 with a scale for each channel.
        store = WeightStore(ctx, group != "tensor")
        is_rest = plan is not None and first_quantized(model) is not None
        quantize_weights(model, ctx, selection, store, is_rest=is_rest, instead_of=instead_of)

    def _refuse_other_formats(self, mode: Mode, group: Group | None) -> None:
        if self.weights not in (None, "int8") or isinstance(group, int) or self.solver not in ("auto", "rtn"):
            raise UsageError(
                f"pass `quant:mode={mode}` stores weights as int8, one scale per channel or tensor, rounded to nearest",
                hint="leave out `weights`, `group` and `solver`",
            )


def _refuse_rounding_of_floats(scheme: IntegerScheme, solver: str) -> None:
    """Raise an error where a solver was asked for that knows no floats of 8 bits."""
    if is_float(scheme.weight) and solver not in ("auto", "rtn"):
        raise UsageError(
            f"pass `quant:mode=static:weights={scheme.weight}` rounds to nearest: `solver={solver}` knows no floats",
            hint="leave `solver` out, or use integer weights",
        )


def _refuse_quantized(model: ir.Model, ctx: Context) -> None:
    """Raise an error where no layer is left in float; of a model quantized in part, say that the rest is kept."""
    decoding = decoding_nodes(model)
    node = first_quantized(model, decoding)
    if node is None:
        return
    if not linear_layers(model) and not decoding:
        refuse_quantized(model, "quant")
    ctx.note(f"kept what is quantized already (`{walk.label(node)}` is {node.op_type}, the first of it)")


def _refuse_other_floats(model: ir.Model) -> None:
    """Raise an error where no linear layer is float32 but some are of another float dtype."""
    dtypes = Counter(weight_tensor(layer).dtype for layer in linear_layers(model))
    if dtypes and ir.DataType.FLOAT not in dtypes:
        found = dtypes.most_common(1)[0][0]
        raise PassError(
            f"pass `quant` needs float32 weights and the model's are {found.name}",
            hint="quantize the float32 model instead",
        )


def _require_opset(model: ir.Model, first: int, mode: str) -> None:
    found = walk.opset(model)
    if found < first:
        raise PassError(
            f"pass `quant:mode={mode}` needs opset {first} and the model has {found}",
            hint=f"put the pass `opset:to={max(first, PER_CHANNEL_OPSET)}` before it, or export with that or later",
        )


def _convolution_share(model: ir.Model) -> float:
    """Return which share of the multiplications convolutions make; 0 where there are none."""
    work = _multiplications(walk.every_node(model))
    return (work["Conv"] + work["ConvTranspose"]) / max(work.total(), 1)


def _nested_share(model: ir.Model) -> float:
    """Return which share of the multiplications is made outside the main graph."""
    work = _multiplications(walk.every_node(model)).total()
    return 1.0 - _multiplications(model.graph).total() / work if work else 0.0


def _multiplications(nodes: Iterable[ir.Node]) -> Counter[str]:
    """Return about how many multiplications each operator makes for one sample."""
    counts: Counter[str] = Counter()
    for node in nodes:
        layer = as_linear_layer(node)
        if layer is not None:
            counts[node.op_type] += weight_tensor(layer).size * _positions(layer)
    return counts


def _positions(layer: LinearLayer) -> int:
    """Return how often a layer's weight is applied to one sample."""
    shape = layer.node.outputs[0].shape
    is_convolution = layer.node.op_type in ("Conv", "ConvTranspose")
    if shape is None:
        return _ASSUMED_POSITIONS
    dims = list(shape)[2:] if is_convolution else list(shape)[1:-1]
    return math.prod(dim if isinstance(dim, int) else _ASSUMED_POSITIONS for dim in dims)


def _note_nested(model: ir.Model, ctx: Context) -> None:
    main = set(model.graph)
    nested = [layer for layer in linear_layers(model) if layer.node not in main]
    if nested:
        ctx.note(
            f"left {len(nested)} linear layers inside subgraphs or functions: their values cannot be observed",
            nested=len(nested),
        )


def _note_recurrent(model: ir.Model, ctx: Context, selection: Selection) -> None:
    """Say which recurrent layers keep their weights, and what these take."""
    nodes = [one for one in walk.every_node(model) if walk.is_onnx_op(one, *_RECURRENT_OPS) and selection.allows(one)]
    if not nodes:
        return
    read = dict.fromkeys(value for node in nodes for value in node.inputs)
    size = sum(tensor.nbytes for value in read if (tensor := walk.constant_tensor(value)) is not None)
    counts = ", ".join(f"{count} {operator}" for operator, count in Counter(one.op_type for one in nodes).items())
    ctx.note(
        f"left: {counts} (weights of recurrent operators, {show_bytes(size)}, which are no linear layers)",
        recurrent=len(nodes),
        recurrent_bytes=size,
    )
