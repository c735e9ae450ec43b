"""Normalizations of a stream that gets narrower: their scales follow the mean of the squares of what is left."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.statistics import Moments

from ..analyses.channel_groups import ChannelGroup

# What may mix the features of a stream: what is left of these is normalized anew. The mean of squares is part of one.
_WHOLE = frozenset({"LayerNormalization", "RMSNormalization", "SimplifiedLayerNormalization"})
STREAM_NORMS = _WHOLE | {"ReduceMean"}
# From the mean of squares to the product with the scale: plus epsilon, root, reciprocal, times what was read.
_LONGEST_NORM = 6
_SQUARE = 2.0


@dataclass(frozen=True, eq=False)
class NormScales:
    """Scales of normalizations, and what each is to be multiplied by.

    Attributes:
        factors: By the constant that holds a scale.
    """

    factors: Mapping[ir.Value, float]

    def apply(self, ctx: Context) -> None:
        """Multiply them, as they are by now."""
        for value, factor in self.factors.items():
            tensor = walk.constant_tensor(value)
            if tensor is not None:
                content = tensor.numpy()
                with ctx.rewriter.edit("rescale", *(use.node for use in value.uses())):
                    ctx.rewriter.set_weight(value, (content * factor).astype(content.dtype))


def keep_norms(kept: Mapping[ChannelGroup, Array], ctx: Context) -> NormScales:
    """Return what makes up for normalizations over fewer features, expected from calibration data.

    A normalization divides by the root of the mean of squares. That of the features kept differs from that of all by
    (share of the squares they hold) · n / k, the root of which their scale is multiplied by. Of a LayerNormalization it
    is the variance.

    Args:
        kept: Of each group, bool [size]: the features that stay; nothing is cut yet.
        ctx: The model as it is, and calibration data.
    """
    norms = [norm for group, stays in kept.items() for node in group.mixers for norm in _norms(node, group, stays, ctx)]
    observed = ctx.statistics({norm.read: norm.statistic for norm in norms})
    factors = {}
    for norm in norms:
        found = observed[norm.read, norm.statistic]
        powers = _powers(norm.kind, np.asarray(found.mean, np.float64), np.asarray(found.mean_square, np.float64))
        whole, left = float(powers.mean()), float(powers[norm.stays].mean())
        factors[norm.scale] = np.sqrt(left / whole) if whole > 0 and left > 0 else 1.0
    return NormScales(factors)


@dataclass(frozen=True, eq=False)
class _Norm:
    """A normalization: what it reads, which features of that stay, and the constant that holds its scale."""

    kind: str
    read: ir.Value
    statistic: Moments
    stays: Array
    scale: ir.Value


def _norms(node: ir.Node, group: ChannelGroup, stays: Array, ctx: Context) -> list[_Norm]:
    """Return a mixer as a normalization, if that is what it is, with a scale of its own."""
    read = node.inputs[0]
    axis = next((axis for axis in group.axes if axis.value is read), None)
    if axis is None or node.graph is not ctx.model.graph or (node.op_type not in _WHOLE and not _are_squares(read)):
        return []
    scale = node.inputs[1] if node.op_type in _WHOLE else _scale_behind(node, group)
    if scale is None or walk.constant_tensor(scale) is None or len(scale.uses()) != 1:
        return []
    kept = np.append(stays, True)[group.axes[axis]]
    return [_Norm(node.op_type, axis.value, Moments(axis.axis), kept, scale)]


def _are_squares(value: ir.Value | None) -> bool:
    """Return whether a value is of squares, of which a normalization takes the mean."""
    node = value.producer() if value is not None else None
    if node is None:
        return False
    if walk.is_onnx_op(node, "Mul"):
        return node.inputs[0] is node.inputs[1]
    exponent = walk.constant_tensor(node.inputs[1]) if walk.is_onnx_op(node, "Pow") else None
    return exponent is not None and exponent.size == 1 and float(exponent.numpy().reshape(())) == _SQUARE


def _scale_behind(node: ir.Node, group: ChannelGroup) -> ir.Value | None:
    """Return the constant that what was divided by the root of a mean is multiplied by, a number for each feature."""
    vectors = {axis.value for axis in group.axes if walk.constant_tensor(axis.value) is not None}
    reached = [node.outputs[0]]
    for _ in range(_LONGEST_NORM):
        users = [use.node for value in reached for use in value.uses()]
        for user in users:
            found = [value for value in user.inputs if value in vectors] if walk.is_onnx_op(user, "Mul") else []
            if found:
                return found[0]
        reached = [value for user in users for value in user.outputs]
    return None


def _powers(kind: str, mean: Array, squares: Array) -> Array:
    """Return what each feature adds to what a normalization divides by the root of, [features]."""
    if kind == "LayerNormalization":  # what varies around the mean over the features
        return np.asarray(squares - 2 * mean * mean.mean() + mean.mean() ** 2)
    return squares if kind in _WHOLE else mean
