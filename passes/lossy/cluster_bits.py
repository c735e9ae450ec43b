"""How many bits the codes of each layer have, so that all take what was asked for and the outputs lose least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from ..analyses.output_damage import Change, error_weights, say_curve, tried_of
from ..analyses.second_moments import ROWS_PER_SAMPLE
from ..solvers.allocation import Separable, allocate
from ..solvers.clustered_weight import Clustering, stored_bytes
from ..solvers.clusters import clustered
from ..solvers.objective import output_error
from .layer_bias import bias_of_layer
from .sequential_moments import SequentialMoments

MOST_BITS = 8
# What a bit more divides the error by, beyond the bits looked at: steps half as wide.
_PER_BIT = 4.0


def bits_by_error(layers: Sequence[LinearLayer], clustering: Clustering, ctx: Context) -> list[int]:
    """Return the bits with which the outputs of the model are expected to lose least.

    All layers together take no more bytes than with as many bits as the clustering says. Of each layer, the error of
    k-means is looked at for that many bits, and one more and one less; how much such an error counts is what clustering
    that layer alone does to the outputs.

    Args:
        layers: The layers, none changed yet, no two of one weight.
        clustering: How they are clustered.
        ctx: Calibration data.
    """
    if len(layers) < 2:
        return [clustering.bits] * len(layers)
    curves, changes, costs = [], [], []
    kinds = [(layer.node.op_type, layer.dims) for layer in layers]
    chosen = set(tried_of(kinds))
    # From most to fewest, as levels are counted in what is taken away.
    bits = list(range(MOST_BITS, 0, -1))
    with SequentialMoments(ctx, compare=False, limit=ROWS_PER_SAMPLE) as moments:
        for place, layer in enumerate(layers):
            matrix, seen = layer.matrix().astype(np.float32, copy=False), moments.of(layer, layer.input.name or "")
            bias = bias_of_layer(layer, ctx)
            moment = None if seen is None else seen.second if bias is None else seen.covariance
            looks = _looks(clustering.bits)
            tried = [clustered(matrix, replace(clustering, bits=one, compensated=False), moment) for one in looks]
            power = output_error(matrix, moment) or 1.0
            errors = np.array([one.error / power for one in tried])
            curves.append(_curve(bits, looks, errors))
            say_curve(ctx, layer.node, {one / 32: error for one, error in zip(bits, curves[-1].tolist(), strict=True)})
            costs.append(np.array([stored_bytes(replace(clustering, bits=one), *matrix.shape) for one in bits]))
            own = looks.index(clustering.bits)
            contents = {layer.weight.name or "": layer.from_matrix(tried[own].values())} if place in chosen else None
            changes.append(Change(walk.label(layer.node), kinds[place], errors[own], contents))
    scales = error_weights(ctx, changes)
    budget = float(sum(one[bits.index(clustering.bits)] for one in costs))
    weighed = [scale * curve for scale, curve in zip(scales, curves, strict=True)]
    levels = allocate(weighed, Separable(costs), budget).levels
    found = [bits[level] for level in levels]
    ctx.note(f"layers have {min(found)} to {max(found)} bits, where they cost the outputs least", bits_of_layers=found)
    return found


def _looks(bits: int) -> list[int]:
    return [one for one in (bits - 1, bits, bits + 1) if 1 <= one <= MOST_BITS]


def _curve(bits: Sequence[int], looks: Sequence[int], errors: Array) -> Array:
    """Return the errors at all bits, which fall with them; between and beyond those looked at, by powers."""
    known = np.log(np.maximum(np.minimum.accumulate(errors), np.finfo(np.float32).tiny))
    wanted = np.array(bits, np.float64)
    found = np.interp(wanted, looks, known)
    beyond = np.minimum(wanted - looks[0], 0) + np.maximum(wanted - looks[-1], 0)
    return np.asarray(np.exp(found - np.log(_PER_BIT) * beyond))
