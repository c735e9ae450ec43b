"""Cross-layer equalization: scales moved between layers, so that all channels of a value need one range."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.backend import Array
from graphopt.options import opt
from graphopt.statistics import MinMax

from ..analyses.channel_scales import FIXED, ChannelAxis, Scaling, channel_scalings
from ..analyses.channels import ChannelView, view_of

_RULE = "equalize"
# Channels within this share of the value's range are left, so that a second run finds nothing to do.
_CLOSE = 1.05


@dataclass(frozen=True)
class _Span:
    """The smallest and largest value of each channel, float64; low ≤ 0 ≤ high."""

    low: Array
    high: Array


@dataclass(frozen=True)
class Equalize(Pass):
    """Scale quiet channels up to the range of their value and divide it out of the weights behind, for `quant`.

    A value in integers has one scale, so that a channel a tenth as loud as the loudest has a tenth of the codes. Where
    only what is homogeneous lies between two layers, W₂ f(W₁ x) = (W₂ S⁻¹) f(S W₁ x) (Nagel et al., Data-Free
    Quantization Through Weight Equalization and Bias Correction, 2019). Their scales make two weights equally hard to
    round; where each output channel has a weight scale of its own it is the activations that gain. So each channel is
    scaled as far as no value's range grows. Ranges are observed, or estimated from the weights without data.

    Not a part of `quant`, as it does not always pay: a channel scaled to the full range is cut off as soon as it gets
    louder than it was on the samples, which is what ``headroom`` is for.
    """

    most: float = opt(64.0, help="largest factor; channels that would need more are left", low=1.0, high=1e6)

    headroom: float = opt(2.0, help="how much room above what was seen a scaled channel keeps", low=1.0, high=64.0)

    name = "equalize"
    guarantee = Guarantee.EQUIVALENT
    needs = frozenset({Need.CANONICAL, Need.CALIBRATION_OPTIONAL})
    edits: ClassVar[Mapping[str, str]] = {
        _RULE: "W₂ f(W₁ x) = (W₂ S⁻¹) f(S W₁ x)  for diagonal S > 0 and homogeneous f"
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Scale what can be scaled."""
        ctx.analyse(shapes.infer_shapes)
        scalings = [found for found in channel_scalings(model) if found.writers]
        if not scalings:
            ctx.note("no channels can be scaled: between layers lies what is not homogeneous, or nothing")
            return
        spans = _observed(scalings, ctx) if ctx.data is not None else _Estimates(model).of(scalings)
        changed = channels = 0
        for scaling in scalings:
            factors = self._factors(scaling, spans)
            moved = apply_factors(scaling, factors, ctx, _RULE) if factors is not None else 0
            changed, channels = changed + bool(moved), channels + moved
        by = "observed" if ctx.data is not None else "estimated from the weights, as there is no data"
        ctx.note(f"{channels} channels of {changed} values scaled; ranges {by}", channels=channels, values=changed)

    def _factors(self, scaling: Scaling, spans: Mapping[ir.Value, _Span]) -> Array | None:
        """Return the factor of each channel by its number; None where all are close to one."""
        count = 1 + max(int(known.channels.max()) for known in scaling.values)
        factors = np.full(count, np.inf)
        for known in scaling.values:
            span = spans.get(known.value)
            if span is not None and not _is_inner(known.value):
                np.minimum.at(factors, known.channels, _room(span))
        factors /= self.headroom
        # What has been seen of a channel that hardly ever speaks says little of its range.
        factors[(factors < _CLOSE) | (factors > self.most)] = 1.0
        factors[FIXED] = 1.0
        return factors.astype(np.float32).astype(np.float64) if (factors != 1.0).any() else None


def _room(span: _Span) -> Array:
    """Return how far each channel can be scaled up within the range of its value."""
    with np.errstate(divide="ignore", invalid="ignore"):
        room = np.minimum(span.high.max() / span.high, span.low.min() / span.low)
        only_high, only_low = span.high.max() / span.high, span.low.min() / span.low
    room = np.where(span.low == 0, only_high, np.where(span.high == 0, only_low, room))
    # Of a channel that is always zero nothing is known: other values decide.
    return np.where(np.isnan(room), np.inf, np.maximum(room, 1.0))


def _is_inner(value: ir.Value) -> bool:
    """Return whether only an activation reads a value, behind which it is quantized."""
    return all(use.node.op_type in ("Relu", "LeakyRelu") for use in value.uses())


def _observed(scalings: list[Scaling], ctx: Context) -> dict[ir.Value, _Span]:
    known = {one.value: one for scaling in scalings for one in scaling.values if not _is_inner(one.value)}
    seen = ctx.statistics({value: MinMax(one.axis) for value, one in known.items()})
    spans = {}
    for value, one in known.items():
        extremes = seen[value, MinMax(one.axis)]
        spans[value] = _Span(np.minimum(extremes.low, 0.0), np.maximum(extremes.high, 0.0))
    return spans


class _Estimates:
    """Magnitudes of channels as the weights have it, were the inputs of the first layers all of magnitude one.

    They scale with the channels exactly: what was equalized is found equalized.
    """

    def __init__(self, model: ir.Model) -> None:
        self.graph = model.graph

    def of(self, scalings: list[Scaling]) -> dict[ir.Value, _Span]:
        """Return the estimated span of each value that a layer makes."""
        axes = {known.value: known for scaling in scalings for known in scaling.values}
        magnitudes: dict[int, float] = {}
        writers = {view.node: (view, channels) for scaling in scalings for view, channels in scaling.writers}
        readers = {view.node: channels for scaling in scalings for view, channels in scaling.readers}
        spans: dict[ir.Value, _Span] = {}
        for node in self.graph:
            if node in writers:
                view, channels = writers[node]
                own = _magnitude_of(view, self._inputs(view, readers.get(node), magnitudes))
                for channel, magnitude in zip(channels.tolist(), own.tolist(), strict=True):
                    magnitudes[channel] = max(magnitudes.get(channel, 0.0), magnitude)
            for value in node.outputs:
                if value in axes:
                    spans[value] = _one_sided(axes[value], magnitudes)
        return spans

    def _inputs(self, view: ChannelView, channels: Array | None, magnitudes: Mapping[int, float]) -> Array:
        if channels is None:
            return np.ones(view.inputs)
        return np.array([magnitudes.get(channel, 1.0) if channel != FIXED else 1.0 for channel in channels.tolist()])


def _one_sided(known: ChannelAxis, magnitudes: Mapping[int, float]) -> _Span:
    high = np.array([magnitudes.get(channel, 0.0) if channel != FIXED else 0.0 for channel in known.channels.tolist()])
    return _Span(np.zeros_like(high), high)


def _magnitude_of(view: ChannelView, inputs: Array) -> Array:
    """Return the root mean square of each output for independent inputs of a given one."""
    weight = np.abs(view.tensor.numpy().astype(np.float64)) * view.over_inputs(inputs)
    squares = np.square(np.nan_to_num(weight, posinf=0.0))
    axes = tuple(range(weight.ndim))
    match view.node.op_type:
        case "Conv":
            sums = squares.sum(axes[1:])
        case "ConvTranspose":
            groups = view.outputs // view.dims[1]
            per_group = squares.reshape(groups, -1, view.dims[1], *view.dims[2:])
            sums = per_group.sum((1, *range(3, per_group.ndim))).reshape(-1)
        case _:
            sums = squares.sum(0 if view.over_outputs(np.ones(view.outputs)).shape[0] == 1 else 1)
    return np.asarray(np.sqrt(sums))


def apply_factors(scaling: Scaling, factors: Array, ctx: Context, rule: str) -> int:
    """Scale channels, as one edit, and return how many; none where a weight would leave its dtype's range.

    Args:
        scaling: The channels.
        factors: The factor of each channel by its number.
        ctx: Where the edit is made.
        rule: What the edit is called.
    """
    weights = _scaled_weights(scaling, factors)
    if weights is None:
        ctx.left("some channels stay as they are: scaled weights would leave the range of their dtype")
        return 0
    with ctx.rewriter.edit(rule, *(view.node for view, _ in (*scaling.writers, *scaling.readers))):
        for value, content in weights.items():
            ctx.rewriter.set_weight(value, content)
    return int(np.count_nonzero(factors != 1.0))


def _scaled_weights(scaling: Scaling, factors: Array) -> dict[ir.Value, Array] | None:
    """Return what each constant holds once the channels are scaled, rounded once."""
    scales: dict[ir.Value, tuple[ChannelView, Array]] = {}
    for view, channels in scaling.writers:
        scales[view.weight] = view, view.over_outputs(factors[channels])
    for view, channels in scaling.readers:
        before = scales.get(view.weight)
        own = view.over_inputs(1.0 / factors[channels])
        scales[view.weight] = view, own if before is None else before[1] * own
    results: dict[ir.Value, Array] = {}
    for value, (view, factor) in scales.items():
        if (factor == 1.0).all():
            continue
        current = view_of(view.node)  # what another scaling may have left in the weight
        content = current.scaled(factor) if current is not None else None
        if content is None:
            return None
        results[value] = content
    for value, channels in scaling.biases:
        tensor = walk.constant_tensor(value)
        assert tensor is not None, "found as a constant"
        bias = tensor.numpy()
        shaped = factors[channels].reshape([-1 if size == len(channels) else 1 for size in bias.shape])
        with np.errstate(over="ignore"):
            results[value] = (bias.astype(np.float64) * shaped).astype(bias.dtype)
        if np.isfinite(bias.astype(np.float64)).all() != np.isfinite(results[value].astype(np.float64)).all():
            return None
    return results
