"""Forecasts: which share of the outputs of a changed layer is expected to be noise."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..solvers.objective import by_group
from .linear_layers import LinearLayer
from .second_moments import ROWS_PER_SAMPLE, gram

# Operators that runtimes run as part of the layer before them, which is then quantized behind them.
_TAILS = ("Add", "Clip", "Relu")
# A rounding error is spread evenly over one step.
_STEP_VARIANCE = 1 / 12
# Rows of all samples together: a power is then known to about a hundredth, and a solver's moments would be of no more
# use here.
_ROWS = 16_384


@dataclass(frozen=True)
class _Before:
    """A layer as it was, with its weight: its second moment, or None, and the signal power of each output."""

    layer: LinearLayer
    second_moment: Array | None
    power: Array


@dataclass(frozen=True)
class _After:
    """A changed layer: for each output the noise of the weights alone, and the sum of squares of the new weights."""

    noise: Array
    squares: Array


class Forecast:
    """What a pass expects of the layers it changes, said as notes with the fact `predicted_error`.

    The noise of an output y = w x is δ H δᵀ of its weights, δ = w − ŵ and H = E[x xᵀ], and of activations on a grid of
    step s an error of variance s² / 12 for each input and for itself (Widrow, Statistical analysis of
    amplitude-quantized sampled-data systems, 1961). Its signal is w H wᵀ. The fact is noise / (noise + signal), from 0
    to 1, the mean over outputs, each counting alike: the power of a layer is that of its few largest outputs, by which
    no small one could be seen to be lost. It is local, and does not know what later layers make of it: Spearman's rank
    correlation with the KL of layers quantized alone is 0.7 for MobileNet, 0.4 for a language model in int4, 0.2 for
    ResNet-20, where all layers cost about the same (`benchmarks/mixed.py`).

    Without calibration data, or where the input cannot be seen, H is the identity. What an activation loses that is
    quantized as it comes, by ranges of its own, is not counted.

    Args:
        ctx: The model before it is changed, and its calibration data.
        layers: The layers that may be changed.
    """

    def __init__(self, ctx: Context, layers: Iterable[LinearLayer]) -> None:
        self._ctx = ctx
        named = [layer for layer in layers if layer.node.name]
        moments = gram(ctx, named, rows=_rows_of(len(ctx.data))) if ctx.data is not None else {}
        self._before = {layer.node.name: _as_it_was(layer, moments.get(layer)) for layer in named}
        self._after: dict[str, _After] = {}

    def weight(self, node: ir.Node, values: Array) -> None:
        """Take note that a layer's weight becomes other values.

        Args:
            node: The layer.
            values: [outputs, inputs], ordered as its matrix, as they multiply what the layer read when the forecast
                was begun; what holds the weight now does not count.
        """
        before = self._before.get(node.name)
        matrix = before.layer.matrix() if before is not None else None
        if before is None or matrix is None or values.shape != matrix.shape:
            return
        difference = matrix.astype(np.float32) - values
        squares = np.square(values, dtype=np.float64).sum(axis=1)
        self._after[node.name or ""] = _After(_powers(difference, before.second_moment), squares)

    def say(self, model: ir.Model) -> None:
        """Say what is expected, now that the model is changed."""
        nodes = {node.name: node for node in walk.every_node(model)}
        for name, after in self._after.items():
            before, node = self._before[name], nodes.get(name)
            noise = after.noise
            if node is not None:
                noise = noise + _STEP_VARIANCE * _step_before(node, before.layer) ** 2 * after.squares
                noise = noise + _STEP_VARIANCE * _step_behind(node) ** 2
            everything = noise + before.power
            share = np.divide(noise, everything, out=np.zeros_like(noise), where=everything > 0)
            self._ctx.note("forecast", before.layer.node, predicted_error=float(share.mean()))


@contextlib.contextmanager
def forecasting(ctx: Context, model: ir.Model, layers: Iterable[LinearLayer]) -> Iterator[None]:
    """Say behind what happens inside what is expected of it, if that is asked for: `ctx.forecast` is there for it."""
    if not ctx.predicts:
        yield
        return
    ctx.forecast = forecast = Forecast(ctx, layers)
    try:
        yield
        forecast.say(model)
    finally:
        ctx.forecast = None


def _rows_of(samples: int) -> int:
    """Return how many rows of each sample are looked at."""
    return max(1, min(ROWS_PER_SAMPLE, _ROWS // samples))


def _as_it_was(layer: LinearLayer, second_moment: Array | None) -> _Before:
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"
    # The tensor is shared, and stays what it is when the model's weight becomes another one.
    kept = ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)])
    own = replace(layer, weight=kept.outputs[0])
    return _Before(own, second_moment, _powers(own.matrix().astype(np.float32, copy=False), second_moment))


def _powers(matrix: Array, second_moment: Array | None) -> Array:
    """Return w H wᵀ of each row w of a matrix, [outputs]."""
    if second_moment is None:
        return np.asarray(np.square(matrix, dtype=np.float64).sum(axis=1))
    grouped = by_group(matrix, second_moment)
    moments = second_moment.reshape(len(grouped), *second_moment.shape[-2:])
    powers = ((grouped @ moments) * grouped).sum(axis=-1, dtype=np.float64).reshape(-1)
    return np.asarray(np.maximum(powers, 0.0))  # rounding may take nothing below zero


def _step_before(node: ir.Node, layer: LinearLayer) -> float:
    """Return the step of the grid that a layer's input is on, or 0 where it is on none."""
    value = node.inputs[1 - layer.weight_index]
    producer = value.producer() if value is not None else None
    return _scale_of(producer) if producer is not None and walk.is_onnx_op(producer, "DequantizeLinear") else 0.0


def _step_behind(node: ir.Node) -> float:
    """Return the step of the grid that a layer's output is put on, at once or behind what is run with it; else 0."""
    while True:
        readers = {use.node for use in node.outputs[0].uses()}
        if len(readers) != 1:
            return 0.0
        (reader,) = readers
        if walk.is_onnx_op(reader, "QuantizeLinear"):
            return _scale_of(reader)
        if not walk.is_onnx_op(reader, *_TAILS):
            return 0.0
        node = reader


def _scale_of(node: ir.Node) -> float:
    tensor = walk.constant_tensor(node.inputs[1])
    return float(np.max(tensor.numpy())) if tensor is not None and tensor.size else 0.0
