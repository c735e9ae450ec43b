"""Which share of its weights each layer loses, so that a share of all of them is gone where that costs least."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from ..analyses.output_damage import Change, error_weights, say_curve, tried_of
from ..analyses.second_moments import ROWS_PER_SAMPLE
from ..solvers import mask
from ..solvers.allocation import Separable, allocate
from ..solvers.objective import output_error
from ..solvers.sparsity import Unstructured
from .layer_bias import bias_for_mean, bias_of_layer
from .sequential_moments import SequentialMoments

# Shares between which a layer's is chosen.
_STEP = 0.01
# Errors below the lowest share looked at: those of the smallest of weights that are spread evenly about zero.
_POWER_OF_SMALLEST = 3


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
    if len(layers) < 2:
        return [sparsity] * len(layers)
    curves, changes, sizes = [], [], []
    kinds = [(layer.node.op_type, layer.dims) for layer in layers]
    chosen = set(tried_of(kinds))
    looks = sparsity / 2, sparsity, (1 + sparsity) / 2
    shares = np.arange(0.0, looks[-1], _STEP)
    with SequentialMoments(ctx, compare=False, limit=ROWS_PER_SAMPLE) as moments:
        for place, layer in enumerate(ctx.track(layers, "trying shares")):
            matrix, seen = layer.matrix(), moments.of(layer, layer.input.name or "")
            bias = bias_of_layer(layer, ctx)
            moment = None if seen is None else seen.second if bias is None else seen.covariance
            power = output_error(matrix.astype(np.float32, copy=False), moment) or 1.0
            tried = [mask.prune_quickly(matrix, Unstructured(share), moment) for share in looks]
            errors = np.maximum.accumulate([one.error / power for one in tried])
            say_curve(ctx, layer.node, dict(zip(looks, errors.tolist(), strict=True)))
            curves.append(_between(shares, looks, errors))
            sizes.append(float(matrix.size))
            contents = None
            if place in chosen:
                contents = {layer.weight.name or "": layer.from_matrix(tried[1].weight)}
                if seen is not None and bias is not None and bias.stored is not None:
                    contents[bias.stored.name or ""] = bias_for_mean(bias, matrix - tried[1].weight, seen.mean)
            changes.append(Change(walk.label(layer.node), kinds[place], errors[1], contents))
    scales = error_weights(ctx, changes)
    kept = Separable([size * (1 - shares) for size in sizes])
    weighed = [scale * curve for scale, curve in zip(scales, curves, strict=True)]
    levels = allocate(weighed, kept, (1 - sparsity) * sum(sizes)).levels
    found = [float(shares[level]) for level in levels]
    ctx.note(
        f"of single layers {min(found):.0%} to {max(found):.0%} go, where it costs the outputs least", shares=found
    )
    return found


def _between(shares: Array, looks: Sequence[float], errors: Array) -> Array:
    """Return the errors at all shares, from 0; between those looked at, they go by powers of the share."""
    known = np.log(np.maximum(errors, np.finfo(np.float32).tiny))
    first = known[0] - _POWER_OF_SMALLEST * np.log(looks[0] / _STEP)
    places = np.log([_STEP, *looks])
    found = np.exp(np.interp(np.log(np.maximum(shares, _STEP)), places, [first, *known]))
    return np.where(shares > 0, found, 0.0)
