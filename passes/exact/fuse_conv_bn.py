"""Fold an inference BatchNormalization into the Conv that feeds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.authoring import RewritePass
from graphopt.backend import Array
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target


@dataclass(frozen=True)
class FuseConvBatchNorm(RewritePass):
    """Fold an inference BatchNormalization into the Conv or ConvTranspose that feeds it."""

    name = "fuse-conv-bn"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return a rule for each kind of convolution."""
        return (ConvBatchNorm("Conv"), ConvBatchNorm("ConvTranspose"))


class ConvBatchNorm(Rule):
    """BN(Conv(x, w) + b) = Conv(x, s·w) + (b − mean)·s + beta, with s = gamma / sqrt(var + epsilon)."""

    def __init__(self, conv: str) -> None:
        self.name = f"{conv.lower()}-bn"
        self._conv = conv

    def pattern(self, op: Any, x: Any, w: Any, gamma: Any, beta: Any, mean: Any, var: Any, b: Any = None) -> Any:
        conv = getattr(op, self._conv)(x, w, b, _id="conv")
        return op.BatchNormalization(conv, gamma, beta, mean, var, _id="bn", training_mode=0)

    def check(self, m: Match) -> Miss | None:
        if not m.all_constant("w", "b", "gamma", "beta", "mean", "var"):
            return Miss("needs constant weights and statistics", m.bn)
        if any(value.uses() or value.is_graph_output() for value in m.bn.outputs[1:]):
            return Miss("its running statistics are read", m.bn)
        if len(m.w.uses()) > 1:
            return Miss("its weight is shared", m.bn)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        epsilon = m.bn.attributes.get_float("epsilon", 1e-5)
        gamma, beta, mean, var = (m.array(name).astype(np.float64) for name in ("gamma", "beta", "mean", "var"))
        weight = m.array("w")
        scale = gamma / np.sqrt(var + epsilon)
        bias = m.array("b").astype(np.float64) if m.b is not None else 0.0
        folded = (bias - mean) * scale + beta
        groups = m.conv.attributes.get_int("group", 1)
        scaled = (weight.astype(np.float64) * self._per_output(scale, weight, groups)).astype(weight.dtype)
        return op.like(
            m.conv,
            m.x,
            op.const(scaled, m.w.name),
            op.const(folded.astype(weight.dtype), m.b.name if m.b is not None else f"{m.conv.name or m.w.name}.bias"),
        )

    def _per_output(self, scale: Array, weight: Array, groups: int) -> Array:
        """Return the scale of each output channel shaped to multiply the weight."""
        ones = [1] * (weight.ndim - 2)
        if self._conv == "Conv":
            return scale.reshape(-1, 1, *ones)
        # ConvTranspose weights are [inputs, outputs / groups, ...]: each input belongs to one group of outputs.
        per_group = scale.reshape(groups, 1, -1)
        inputs = weight.shape[0] // groups
        return np.broadcast_to(per_group, (groups, inputs, per_group.shape[-1])).reshape(weight.shape[0], -1, *ones)
