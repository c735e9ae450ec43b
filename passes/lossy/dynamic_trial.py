"""What rounding activations as they come does to a model's outputs, tried on a few samples, and which to spare."""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.walkthrough import Walkthrough

from ..analyses.linear_layers import LinearLayer

# A trial runs the model once. Its noise on 8 samples is within 0.4 dB of that on 32, on 4 within 1.4 dB (three models).
_SAMPLES = 8
# Noise over signal at the outputs above which layers are looked at one by one: 17 dB, halfway between the models that
# take it well and the one that does not. 29 dB: gutenberg_lm; 20 dB: MiniLM, at 0.001 Spearman less;
# 14 dB: stories_lm, at a perplexity of 21.3 for 17.6.
_ALARM = 0.02
# What the products that go on in integers may then leave of it, a tenth, 27 dB: stories_lm gets a perplexity of 18.5,
# and 18.7 with 23 dB, of which int8 weights alone, computed on in float, make 18.3.
_ENOUGH = 0.002
# The loudest ones named in the report.
_NAMED = 3
_NO_SIGNAL = 1e-30


@dataclass(frozen=True)
class Trial:
    """What was found out by trial.

    Attributes:
        tried: How many activations were rounded.
        noise: Noise over signal at the outputs, of the worst one, with all of them rounded.
        spared: Nodes whose activations had better stay float.
        loudest: (Activation, its noise alone) of those, the loudest first.
        rest: Noise over signal with the others rounded.
    """

    tried: int
    noise: float
    spared: frozenset[ir.Node] = frozenset()
    loudest: tuple[tuple[str, float], ...] = ()
    rest: float = 0.0

    def say(self, ctx: Context) -> None:
        """Say for the report what was found."""
        if not self.spared:
            ctx.note(
                f"activations in 8 bits alone leave the outputs {_decibels(self.noise)} dB above the noise, "
                f"by trial on {_samples(ctx)} samples",
                activation_sqnr_db=_decibels(self.noise),
            )
            return
        named = ", ".join(f"`{name}` alone {_decibels(noise)} dB" for name, noise in self.loudest[:_NAMED])
        ctx.note(
            f"{len(self.spared)} products compute in float, on weights in int8: with all {self.tried} activations in 8 "
            f"bits the outputs were {_decibels(self.noise)} dB above the noise, by trial on {_samples(ctx)} samples, "
            f"with the others {_decibels(self.rest)} dB; the loudest: {named}",
            spared=sorted(node.name or "" for node in self.spared),
            activation_sqnr_db=_decibels(self.rest),
            activation_sqnr_db_of_all=_decibels(self.noise),
        )


def try_rounding(ctx: Context, layers: Iterable[LinearLayer]) -> Trial | None:
    """Round the activations of products as DynamicQuantizeLinear does, and find those that hurt the outputs.

    Noise in the outputs of a layer itself tells little: by the mean of its rows, one of MiniLM at 14 dB hurts nothing,
    and one of stories_lm at 28 dB takes its perplexity from 17.6 to 18.7. So the whole model is run, once where all is
    well. Where it is not, it is run once more for each activation rounded alone; noise of different origins adds up
    (14.5 dB summed, 14.4 dB measured), so that the loudest are spared until the share of the others is small.

    A range is that of all samples together, which no caller's batch needs to be; those of single samples are narrower.

    Args:
        ctx: The model as it is before, and its calibration data.
        layers: Products; those outside the main graph are not tried.

    Returns:
        None where nothing can be told: no activation in the main graph, or no output of floats.
    """
    readers: dict[ir.Value, list[ir.Node]] = {}
    for layer in layers:
        if layer.node.graph is ctx.model.graph:
            readers.setdefault(layer.input, []).append(layer.node)
    outputs = [index for index, value in enumerate(ctx.model.graph.outputs) if value.dtype == ir.DataType.FLOAT]
    if not readers or not outputs or ctx.data is None:
        return None
    few = replace(ctx, data=ctx.data.take(_SAMPLES))
    with few.walkthrough() as floats:
        bench = _Bench(few, floats, outputs)
        noise = bench.noise(readers.values())
        if noise <= _ALARM:
            return Trial(len(readers), noise)
        alone = {value: bench.noise([nodes]) for value, nodes in readers.items()}
        spared = _loudest(alone, _ENOUGH * sum(alone.values()) / noise)
        rest = bench.noise(nodes for value, nodes in readers.items() if value not in spared)
    return Trial(
        len(readers),
        noise,
        frozenset(node for value in spared for node in readers[value]),
        tuple((value.name or "", alone[value]) for value in spared),
        rest,
    )


def _loudest(alone: dict[ir.Value, float], enough: float) -> list[ir.Value]:
    """Return the fewest values, loudest first, without which the noise of all others adds up to no more than enough."""
    ordered = sorted(alone, key=lambda value: alone[value], reverse=True)
    left = float(sum(alone.values()))
    for count, value in enumerate(ordered):
        if left <= enough:
            return ordered[:count]
        left -= alone[value]
    return ordered


@dataclass
class _Bench:
    """Compares outputs of a model with activations rounded to those of the model as it is.

    Attributes:
        ctx: The model, and the samples.
        floats: The model as it is on these samples.
        outputs: Positions of the outputs that are compared.
    """

    ctx: Context
    floats: Walkthrough
    outputs: list[int] = field(default_factory=list)

    def noise(self, chosen: Iterable[Collection[ir.Node]]) -> float:
        """Return noise over signal of the worst output, where chosen nodes read their activations rounded."""
        names = frozenset(node.outputs[0].name or "" for nodes in chosen for node in nodes)
        if not names:
            return 0.0
        rounded = self.ctx.attempt(functools.partial(_round, names=names)).model
        noise, signal = np.zeros(len(self.outputs)), np.zeros(len(self.outputs))
        with self.ctx.walkthrough(rounded) as walk:
            before = self.floats.batches(*self._compared(self.ctx.model))
            for exact, approximate in zip(before, walk.batches(*self._compared(rounded)), strict=True):
                for place, (x, y) in enumerate(zip(exact, approximate, strict=True)):
                    noise[place] += np.square(x - y, dtype=np.float64).sum()
                    signal[place] += np.square(x, dtype=np.float64).sum()
        share = noise / np.maximum(signal, _NO_SIGNAL)
        return float(share.max()) if np.isfinite(share).all() else np.inf

    def _compared(self, model: ir.Model) -> list[ir.Value]:
        return [model.graph.outputs[index] for index in self.outputs]


def _round(model: ir.Model, ctx: Context, names: frozenset[str]) -> None:
    """Give the nodes that make some values activations rounded to 8 bits, by the range of all of each."""
    rounded: dict[ir.Value, ir.Value] = {}
    for node in list(model.graph):
        value = node.inputs[0] if node.inputs else None
        if value is None or not node.outputs or node.outputs[0].name not in names:
            continue
        if value not in rounded:
            codes = ctx.rewriter.make("DynamicQuantizeLinear", [value], sources=[node], outputs=3, name="trial")
            ctx.rewriter.insert(codes, before=node)
            floats = ctx.rewriter.make("DequantizeLinear", list(codes.outputs), sources=[node], name="trial")
            rounded[value] = ctx.rewriter.insert(floats, before=node).outputs[0]
        ctx.rewriter.set_input(node, 0, rounded[value])


def _samples(ctx: Context) -> int:
    return min(_SAMPLES, len(ctx.data)) if ctx.data is not None else 0


def _decibels(noise: float) -> float:
    return round(float(-10 * np.log10(max(noise, _NO_SIGNAL))), 1)
