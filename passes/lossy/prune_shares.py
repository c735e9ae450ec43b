"""Which share of its weights each layer loses, so that a share of all of them is gone where that costs least."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from ..analyses.output_damage import Change, error_weights
from ..analyses.second_moments import ROWS_PER_SAMPLE
from ..solvers import mask
from ..solvers.allocation import Separable, allocate
from ..solvers.objective import by_group, output_error
from ..solvers.sparsity import Unstructured
from .channel_sweep import bias_of_layer
from .layer_bias import LayerBias
from .sequential_moments import SequentialMoments

# Shares at which errors are looked at; between them the logarithm of the error is taken for a straight line.
_LOOKS = (0.2, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.96)
# Shares a layer may get.
_LEVELS = np.linspace(0.0, 0.96, 97)


def shares_by_magnitude(layers: Sequence[LinearLayer], sparsity: float) -> list[float]:
    """Return the shares that one threshold for the magnitudes of all layers takes.

    Args:
        layers: The layers.
        sparsity: The share of all their weights that is to be zero.
    """
    magnitudes = [np.abs(layer.matrix().astype(np.float32, copy=False)).reshape(-1) for layer in layers]
    together = np.concatenate(magnitudes)
    count = round(sparsity * len(together))
    if count == 0:
        return [0.0] * len(layers)
    threshold = np.partition(together, count - 1)[count - 1]
    return [float(np.mean(one <= threshold)) for one in magnitudes]


def shares_by_error(layers: Sequence[LinearLayer], sparsity: float, ctx: Context) -> list[float]:
    """Return the shares with which the outputs of the model are expected to lose least.

    Of each layer, the error that one sweep of SparseGPT leaves is looked at for some shares, against the power of what
    the layer gives; how much such an error counts is what pruning that layer alone does to the outputs.

    Args:
        layers: The layers, none changed yet.
        sparsity: The share of all their weights that is to be zero.
        ctx: Calibration data.
    """
    curves, changes = [], []
    with SequentialMoments(ctx, compare=False, limit=ROWS_PER_SAMPLE) as moments:
        for layer in layers:
            matrix, seen = layer.matrix(), moments.of(layer, layer.input.name or "")
            bias = bias_of_layer(layer, ctx)
            moment = None if seen is None else seen.second if bias is None else seen.covariance
            power = output_error(matrix.astype(np.float32, copy=False), moment) or 1.0
            curves.append(_curve(matrix, moment, power))
            tried = mask.prune_quickly(matrix, Unstructured(sparsity), moment)
            contents = {layer.weight.name or "": layer.from_matrix(tried.weight)}
            if seen is not None and bias is not None and bias.stored is not None:
                contents[bias.stored.name or ""] = _with_mean(bias, matrix - tried.weight, seen.mean)
            kind = layer.node.op_type, layer.dims
            changes.append(Change(walk.label(layer.node), kind, tried.error / power, partial(_put, contents)))
    scales = error_weights(ctx, changes)
    sizes = [float(layer.matrix().size) for layer in layers]
    kept = Separable([size * (1 - _LEVELS) for size in sizes])
    weighed = [scale * curve for scale, curve in zip(scales, curves, strict=True)]
    found = allocate(weighed, kept, (1 - sparsity) * sum(sizes))
    return [float(_LEVELS[level]) for level in found.levels]


def _curve(matrix: Array, moment: Array | None, power: float) -> Array:
    """Return the share of a layer's outputs that is noise at each level."""
    errors = [mask.prune_quickly(matrix, Unstructured(share), moment).error / power for share in _LOOKS]
    rising = np.maximum.accumulate(np.maximum(errors, np.finfo(np.float32).tiny))
    found = np.exp(np.interp(_LEVELS, _LOOKS, np.log(rising)))
    # The first few weights cost hardly anything: about the square of their share.
    found *= np.square(np.minimum(_LEVELS / _LOOKS[0], 1.0))
    return np.asarray(found)


def _with_mean(bias: LayerBias, difference: Array, mean: Array) -> Array:
    """Return what a stored bias is to hold for the mean of the outputs to stay."""
    tensor = walk.constant_tensor(bias.stored)
    assert tensor is not None, "what is stored is a constant"
    lost = by_group(difference.astype(np.float64), mean[:, None]) @ mean[:, :, None]
    whole = tensor.numpy().astype(np.float64).reshape(-1) + lost.reshape(-1) / bias.factor
    return whole.reshape(walk.dims(tensor)).astype(tensor.dtype.numpy())


def _put(contents: Mapping[str, Array], model: ir.Model, ctx: Context) -> None:
    """Let constants of a copy of the model, by name, hold something else."""
    made = (value for node in walk.every_node(model) for value in node.outputs)
    with ctx.rewriter.edit("try"):
        for value in [*walk.initializers(model), *made]:
            if (content := contents.get(value.name or "")) is not None:
                ctx.rewriter.set_weight(value, content)
