"""Adaptive rounding: codes of weights already quantized are changed one by one for what their layer reads now."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context, Guarantee, Need, Pass

from ..solvers.objective import by_group, output_error
from ..solvers.rounding import descend
from .compared_layers import ComparedLayer, compared_layers
from .dequantized_weights import DequantizedWeight, dequantized_weight
from .layer_bias import LayerBias, bias_of
from .sequential_moments import Moments, SequentialMoments

_RULE = "ada-round"
# Rows of each sample that are looked at: a few thousand in all, several times as many as layers have inputs.
_ROWS_OF_A_SAMPLE = 64


@dataclass(frozen=True)
class AdaRound(Pass):
    """Round weights up or down so that each layer gives what it gave in float, their scales unchanged."""

    name = "ada-round"
    guarantee = Guarantee.LOSSY

    @property
    def needs(self) -> frozenset[Need]:
        """Data, on which each layer is looked at."""
        return frozenset({Need.CALIBRATION})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Improve the codes of the layers one after the other, each for what it reads behind those before it.

        The objective is tr((W−Ŵ) H (W−Ŵ)ᵀ), with W from the model before any loss (Nagel et al., Up or Down? Adaptive
        Rounding for Post-Training Quantization, 2020, equation 13). Where a layer has a bias, H is the covariance, and
        the bias keeps the mean of what the layer gives; so it never undoes `correct-bias`, which may come before or
        behind it.

        Raises:
            PassError: No lossy pass ran before.
        """
        layers = compared_layers(ctx, self.name, "quant:mode=static")
        left: Counter[str] = Counter()
        total = _Total()
        with SequentialMoments(ctx, compare=False, limit=_ROWS_OF_A_SAMPLE) as moments:
            for layer in ctx.track(layers, "rounding"):
                weight = dequantized_weight(layer)
                if isinstance(weight, str):
                    left[weight] += 1
                    continue
                found = moments.of(weight.layer, weight.layer.input.name or "")
                if found is None:
                    left["what they read cannot be seen"] += 1
                    continue
                _improve(layer, weight, found, ctx, total)
        for reason, count in left.items():
            ctx.left(f"layers left: {count}, as {reason}", left=count)
        total.note(ctx, len(layers))


@dataclass
class _Total:
    """What was done to all layers."""

    layers: int = 0
    changed: int = 0
    codes: int = 0
    # Shares of the predicted error that are left, one for each layer that had any.
    ratios: float = 0.0
    rated: int = 0

    def add(self, changed: int, codes: int, before: float, after: float) -> None:
        self.layers += 1
        self.changed += changed
        self.codes += codes
        if before > 0:
            self.rated += 1
            self.ratios += after / before

    def note(self, ctx: Context, known: int) -> None:
        text = f"{self.layers} of {known} layers rounded anew: {self.changed} of {self.codes} codes changed"
        mean = self.ratios / self.rated if self.rated else 1.0
        if self.rated:
            text += f", which leaves {mean:.0%} of the error predicted of a layer, on average"
        ctx.note(text, layers=self.layers, changed=self.changed, codes=self.codes, predicted=mean)


def _improve(layer: ComparedLayer, weight: DequantizedWeight, found: Moments, ctx: Context, total: _Total) -> None:
    bias = bias_of(layer.node, layer.outputs, ctx) if layer.before.weight_index == 1 else "left"
    # A bias that is there takes the mean; a new one is for `correct-bias` to make.
    takes = isinstance(bias, LayerBias) and bias.stored is not None
    moment = found.covariance if takes else found.second
    before = replace(weight.stored, error=output_error(weight.target - weight.stored.values(), moment))
    after = descend(weight.target, before, moment)
    changed = int(np.count_nonzero(after.codes != before.codes))
    total.add(changed, after.codes.size, before.error, after.error)
    if not changed:
        return
    with ctx.rewriter.edit(_RULE, layer.node):
        weight.store(after.codes, ctx.rewriter)
        if takes and isinstance(bias, LayerBias):
            lost = by_group(before.values() - after.values(), found.second).astype(np.float64)
            bias.shift((lost @ found.mean[:, :, None].astype(np.float64)).reshape(-1), ctx)
