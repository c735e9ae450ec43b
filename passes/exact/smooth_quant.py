"""SmoothQuant: outliers of activations moved into weights, through the normalization in front of the layers."""

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
from graphopt.statistics import MinMax, Moments

from ..analyses.channel_scales import FIXED, ChannelAxis, Scaling, channel_scalings
from .equalize import apply_factors

_RULE = "smooth-quant"
# Strengths that are tried for each layer, from all of it in the activations to all of it in the weights.
_STRENGTHS = tuple(np.linspace(0.0, 1.0, 11))
_CODES_OF_ACTIVATIONS = 255
_CODES_OF_WEIGHTS = 254
# What is left to gain after the first choice; the search starts again from there until nothing is.
_ROUNDS = 8
# How many standard deviations a normalized value reaches, where no data say so.
_REACH = 4.0


@dataclass(frozen=True)
class _Layer:
    """What is known of one normalization and the layers that read it.

    Attributes:
        low: Smallest value of each channel, at most 0.
        high: Largest value of each channel, at least 0.
        squares: E[x²] of each channel.
        weights: Weights of the readers, [channels, outputs] each.
    """

    low: Array
    high: Array
    squares: Array
    weights: tuple[Array, ...]

    def scaled(self, factors: Array) -> _Layer:
        """Return the same with channels scaled."""
        weights = tuple(weight / factors[:, None] for weight in self.weights)
        return _Layer(self.low * factors, self.high * factors, self.squares * factors**2, weights)

    def predicted_error(self) -> float:
        """Return what rounding activations and weights to 8 bits does to the outputs, mean squared, summed."""
        step = (self.high.max() - self.low.min()) / _CODES_OF_ACTIVATIONS
        error = 0.0
        for weight in self.weights:
            steps = 2 * np.abs(weight).max(axis=0) / _CODES_OF_WEIGHTS
            error += float(step**2 * np.square(weight).sum() + np.square(steps).sum() * self.squares.sum()) / 12
        return error

    def candidate(self, strength: float) -> Array:
        """Return s⁻¹ for s = max|x|^α / max|w|^(1−α) (Xiao et al., 2023, equation 4)."""
        reach = np.maximum(self.high, -self.low)
        largest = np.max([np.abs(weight).max(axis=1) for weight in self.weights], axis=0)
        alive = (reach > 0) & (largest > 0)
        factors = np.ones_like(reach)
        factors[alive] = largest[alive] ** (1 - strength) / reach[alive] ** strength
        if alive.any():
            factors[alive] /= np.exp(np.log(factors[alive]).mean())
        return factors


@dataclass(frozen=True)
class SmoothQuant(Pass):
    """Move outliers of activations behind a normalization into the weights, as far as that pays, for `quant`.

    The factors of a LayerNormalization or RMSNormalization are divided by s, the weights behind multiplied by it
    (Xiao et al., SmoothQuant: Accurate and Efficient Post-Training Quantization for Large Language Models, 2023). The
    strength α is searched for each layer, by the error that rounding both sides to 8 bits is predicted to make; ranges
    are observed, or without data taken from the factors themselves.
    """

    least_gain: float = opt(0.1, help="share of the predicted error a layer must be spared", low=0.01, high=1.0)

    name = "smooth-quant"
    guarantee = Guarantee.EQUIVALENT
    needs = frozenset({Need.CANONICAL, Need.CALIBRATION_OPTIONAL})
    edits: ClassVar[Mapping[str, str]] = {_RULE: "W (γ ∘ x̄ + β) = (W S) (S⁻¹γ ∘ x̄ + S⁻¹β)  for diagonal S > 0"}

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Smooth what reads a normalization and nothing else reads."""
        ctx.analyse(shapes.infer_shapes)
        scalings = [found for found in channel_scalings(model) if not found.writers and _is_whole(found)]
        gains = []
        for scaling in scalings:
            layer = _observed(scaling, ctx) if ctx.data is not None else _estimated(scaling)
            factors = self._search(layer)
            if factors is None:
                continue
            spread = np.ones(1 + max(int(known.channels.max()) for known in scaling.values))
            spread[scaling.readers[0][1]] = factors
            if apply_factors(scaling, spread, ctx, _RULE):
                gains.append(layer.scaled(factors).predicted_error() / layer.predicted_error())
        if gains:
            share = f"predicted error {np.mean(gains):.2f} of before"
            ctx.note(f"{len(gains)} of {len(scalings)} normalizations smoothed, {share}", smoothed=len(gains))
        else:
            ctx.note(f"{len(scalings)} normalizations are read by linear layers alone, and none gains")

    def _search(self, layer: _Layer) -> Array | None:
        """Return the factors of the channels, or None where too little is gained."""
        if not all(np.isfinite(part).all() for part in (layer.low, layer.high, layer.squares, *layer.weights)):
            return None
        total, now = np.ones_like(layer.low), layer
        for _ in range(_ROUNDS):
            candidates = [now.candidate(strength) for strength in _STRENGTHS]
            errors = [now.scaled(factors).predicted_error() for factors in candidates]
            best = int(np.argmin(errors))
            if not errors[best] < (1 - self.least_gain) * now.predicted_error():
                break
            total, now = total * candidates[best], now.scaled(candidates[best])
        return total.astype(np.float32).astype(np.float64) if now is not layer else None


def _is_whole(scaling: Scaling) -> bool:
    """Return whether all that is scaled is one vector of channels."""
    first = scaling.readers[0][1]
    parts = (*(known.channels for known in scaling.values), *(channels for _, channels in scaling.readers))
    distinct = len(np.unique(first)) == len(first)
    return distinct and FIXED not in first and all(np.array_equal(part, first) for part in parts)


def _weights(scaling: Scaling) -> tuple[Array, ...]:
    """Return each reader's weight as [channels, outputs and kernel positions]."""
    found = []
    for view, channels in scaling.readers:
        shape = view.over_inputs(np.ones(len(channels))).shape
        axis = shape.index(len(channels)) if len(channels) in shape else 0
        weight = np.moveaxis(view.tensor.numpy().astype(np.float64), axis, 0)
        found.append(weight.reshape(len(channels), -1))
    return tuple(found)


def _read(scaling: Scaling) -> ChannelAxis:
    """Return the value that the layers read."""
    read = scaling.readers[0][0].node.inputs[0]
    return next(known for known in scaling.values if known.value is read)


def _observed(scaling: Scaling, ctx: Context) -> _Layer:
    known = _read(scaling)
    extremes, averages = MinMax(known.axis), Moments(known.axis)
    seen = ctx.statistics({known.value: (extremes, averages)})
    span = seen[known.value, extremes]
    squares = seen[known.value, averages].mean_square
    return _Layer(np.minimum(span.low, 0), np.maximum(span.high, 0), squares, _weights(scaling))


def _estimated(scaling: Scaling) -> _Layer:
    """Return what factors and offsets say of a value that was normalized."""
    vectors = []
    for value, _ in scaling.biases:
        tensor = walk.constant_tensor(value)
        assert tensor is not None, "found as a constant"
        vectors.append(np.abs(tensor.numpy().astype(np.float64).reshape(-1)))
    reach, squares = _REACH * np.sum(vectors, axis=0), np.sum(np.square(vectors), axis=0)
    return _Layer(-reach, reach, squares, _weights(scaling))
