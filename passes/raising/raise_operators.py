"""Raise decomposed patterns to the standard operators they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.authoring import RewritePass
from graphopt.pattern import Rule
from graphopt.target import Target

from . import activations, attention, normalization, rotary


@dataclass(frozen=True)
class RaiseOperators(RewritePass):
    """Put back LayerNormalization, Gelu, Attention, ... where an exporter wrote their parts, as the opset allows."""

    name = "raise-operators"
    # What quantizes or prunes looks for the layers themselves.
    keeps_canonical = False

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return the rules for operators that do not lose to their parts on the target."""
        rules: dict[str, tuple[Rule, ...]] = {
            "LayerNormalization": (
                normalization.LayerNorm("Div"),
                normalization.LayerNorm("Mul"),
                normalization.NormInFloat("LayerNormalization"),
                normalization.NormScale("LayerNormalization"),
                normalization.NormBias(),
            ),
            "RMSNormalization": (
                normalization.RootMeanSquareNorm("Div"),
                normalization.RootMeanSquareNorm("Mul"),
                normalization.NormInFloat("RMSNormalization"),
                normalization.NormScale("RMSNormalization"),
            ),
            "GroupNormalization": (normalization.GroupNorm(),),
            "Gelu": (activations.Gelu(), activations.TanhGelu()),
            "HardSigmoid": tuple(activations.HardSigmoid(last) for last in ("Clip", "Div", "Mul")),
            "HardSwish": (
                activations.HardSwish(),
                activations.HardSwishDivided("Mul"),
                activations.HardSwishDivided("Div"),
            ),
            "Swish": (activations.Swish(),),
            "Mish": (activations.Mish(),),
            "RotaryEmbedding": (rotary.Rotary(), rotary.RotaryOfHeads()),
            "Attention": (attention.AttentionCore(), attention.HeadsInAttention()),
        }
        return [rule for operator, group in rules.items() if operator not in target.slow_ops for rule in group]
