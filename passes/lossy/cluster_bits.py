"""How many bits the codes of each layer have: more than asked for where that takes next to nothing and helps most."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from ..analyses.output_damage import say_curve
from ..analyses.second_moments import ROWS_PER_SAMPLE
from ..solvers.allocation import Separable, allocate
from ..solvers.clustered_weight import Clustering, stored_bytes
from ..solvers.clusters import clustered
from ..solvers.objective import output_error
from .layer_bias import bias_of_layer
from .sequential_moments import SequentialMoments

MOST_BITS = 8
# What small layers may take beside the bytes of all with as many bits as asked for. At 4 bits, solved on half of 64
# calibration images and KL taken on the other half, both ways: SqueezeNet 0.030 with it and 0.051 without, MobileNet
# 0.044 and 0.076. Bits are not taken from large layers: nothing makes up for what a large last layer loses.
_ROOM = 0.03
# What a bit more divides the error by, beyond the bits looked at: steps half as wide.
_PER_BIT = 4.0
_FLOAT_BITS = 32


def bits_by_error(layers: Sequence[LinearLayer], clustering: Clustering, ctx: Context) -> list[int]:
    """Return the bits with which layers are expected to lose least, each at least as many as the clustering says.

    All layers together take at most `_ROOM` more bytes than with that many bits. Of each layer, the error of k-means as
    a share of its power is looked at for that many bits and one more; what an error does to the model's outputs is not.

    Args:
        layers: The layers, none changed yet, no two of one weight.
        clustering: How they are clustered.
        ctx: Calibration data.
    """
    # From most to fewest, as levels are counted in what is taken away.
    bits = list(range(MOST_BITS, clustering.bits - 1, -1))
    if len(layers) < 2 or len(bits) < 2:
        return [clustering.bits] * len(layers)
    curves, costs = [], []
    with SequentialMoments(ctx, compare=False, limit=ROWS_PER_SAMPLE) as moments:
        for layer in ctx.track(layers, "trying bits"):
            matrix, seen = layer.matrix().astype(np.float32, copy=False), moments.of(layer, layer.input.name or "")
            moment = None if seen is None else seen.second if bias_of_layer(layer, ctx) is None else seen.covariance
            looks = bits[:-3:-1]
            tried = [replace(clustering, bits=one, compensated=False) for one in looks]
            power = output_error(matrix, moment) or 1.0
            errors = np.array([clustered(matrix, one, moment).error / power for one in tried])
            curves.append(_curve(bits, looks, errors))
            shares = dict(zip(bits, curves[-1].tolist(), strict=True))
            say_curve(ctx, layer.node, {1 - one / _FLOAT_BITS: error for one, error in shares.items()})
            costs.append(np.array([stored_bytes(replace(clustering, bits=one), *matrix.shape) for one in bits]))
    budget = (1 + _ROOM) * float(sum(one[-1] for one in costs))
    found = [bits[level] for level in allocate(curves, Separable(costs), budget).levels]
    more = sum(one > clustering.bits for one in found)
    if more:
        ctx.note(
            f"more bits, up to {max(found)}, where that takes little ({_ROOM:.0%} of all at the most): {more} layers",
            bits_of_layers=found,
        )
    return found


def _curve(bits: Sequence[int], looks: Sequence[int], errors: Array) -> Array:
    """Return the errors at all bits, which fall with them; beyond those looked at, by powers."""
    known = np.log(np.maximum(np.minimum.accumulate(errors), np.finfo(np.float32).tiny))
    wanted = np.array(bits, np.float64)
    beyond = np.maximum(wanted - looks[-1], 0)
    return np.asarray(np.exp(np.interp(wanted, looks, known) - np.log(_PER_BIT) * beyond))
