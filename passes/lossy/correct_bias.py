"""Bias correction: what a lossy change does to the mean of a layer's outputs is taken back by its bias."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import provenance
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.backend import Array
from graphopt.walkthrough import Walkthrough

from .compared_layers import ComparedLayer, compared_layers
from .layer_bias import LayerBias, bias_of


@dataclass(frozen=True)
class CorrectBias(Pass):
    """Shift the bias of each linear layer so that the mean of its outputs is what it was before any loss."""

    name = "correct-bias"
    guarantee = Guarantee.LOSSY

    @property
    def needs(self) -> frozenset[Need]:
        """Data, over which means are taken."""
        return frozenset({Need.CALIBRATION})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Measure and correct the layers one after the other, each behind those corrected before it.

        This is empirical bias correction (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
        Correction, 2019, section 4.2 and appendix D), for whatever was lost: by rounding, pruning or a number format.

        Raises:
            PassError: No lossy pass ran before.
        """
        layers = compared_layers(ctx, self.name, "prune")
        left: Counter[str] = Counter()
        corrected, largest = 0, 0.0
        with ctx.walkthrough() as now, ctx.walkthrough(ctx.reference) as before:
            for layer in ctx.track(layers, "comparing means"):
                bias = _bias(layer, ctx)
                if isinstance(bias, str):
                    left[bias] += 1
                    continue
                difference = _difference(layer, bias, ctx, now, before)
                if difference is None:
                    left["their outputs cannot be compared"] += 1
                    continue
                if not bias.shift(difference.shift, ctx):
                    continue
                corrected += 1
                largest = max(largest, difference.share)
                now.repeat(bias.adder)
        for reason, count in left.items():
            ctx.left(f"layers left: {count}, as {reason}", left=count)
        text = f"the bias of {corrected} of {len(layers)} layers corrected"
        if corrected:
            text += f", by up to {largest:.2g} standard deviations of what they give"
        ctx.note(text, corrected=corrected, layers=len(layers))


@dataclass(frozen=True, eq=False)
class _Difference:
    """What a layer's outputs lack in the mean: float64 [outputs], and the most of it as a share of their deviation."""

    shift: Array
    share: float


def _bias(layer: ComparedLayer, ctx: Context) -> LayerBias | str:
    if layer.before.weight_index != 1:
        return "their weight is the left factor"
    return bias_of(layer.node, layer.outputs, ctx)


def _difference(
    layer: ComparedLayer, bias: LayerBias, ctx: Context, now: Walkthrough, before: Walkthrough
) -> _Difference | None:
    """Measure both, bias included; what the bias is added to is asked for too, so that the node can run anew."""
    read = bias.adder.inputs[0 if bias.adder is layer.node else 1 - bias.index]
    assert read is not None, "a layer reads something"
    known = bias_of(layer.before.node, layer.outputs, ctx)
    if isinstance(known, str) or not provenance.origins(known.adder) or known.adder.op_type != bias.adder.op_type:
        return None
    present = (y for _, y in now.batches(read, bias.adder.outputs[0]))
    original = (y for (y,) in before.batches(known.adder.outputs[0]))
    old, new = _moments(original, layer), _moments(present, layer)
    if old is None or new is None:
        return None
    shift = old[0] - new[0]
    if not np.isfinite(shift).all():
        return None
    deviation = float(np.sqrt(old[1].mean())) or 1.0
    return _Difference(shift, float(np.abs(shift).max(initial=0.0)) / deviation)


def _moments(batches: Iterator[Array], layer: ComparedLayer) -> tuple[Array, Array] | None:
    """Return mean and variance of each output, float64 [outputs]; None where there are other outputs than known."""
    axis = 1 if layer.node.op_type.startswith("Conv") else -1
    count, total, squares = 0, np.zeros(layer.outputs), np.zeros(layer.outputs)
    for y in batches:
        if y.ndim < 2 or y.shape[axis] != layer.outputs:
            return None
        rows = np.moveaxis(y, axis, -1).reshape(-1, layer.outputs).astype(np.float64)
        count += len(rows)
        total += rows.sum(axis=0)
        squares += np.square(rows).sum(axis=0)
    if count == 0:
        return None
    mean = total / count
    return mean, np.maximum(squares / count - np.square(mean), 0.0)
