"""Ranges tuned by the outputs of the model: what is chosen, when it is kept, and what trials leave behind."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.errors import UsageError
from graphopt.passes.lossy import tuned_ranges
from graphopt.ranges import Range
from graphopt.rewriter import Rewriter

from .quant_runs import Array, Outcome, model_of, quantize, random, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")

X86 = TARGETS["ort-cpu-x86"].static
assert X86 is not None
CONV = "y = Conv <pads = [1, 1, 1, 1]> (x, w, b)"
# Nothing reads the first channel.
WEIGHTS = {"w": random(1, 4, 3, 3, 3) * np.array([0, 1, 1], np.float32)[:, None, None], "b": random(2, 4)}
SAMPLES = 24


def images(low: float, high: float) -> Array:
    """Return images whose first channel spans a range, the others about [-1, 1]."""
    found = np.clip(random(3, SAMPLES, 3, 8, 8, scale=0.3), -1, 1)
    found[:, 0] = np.random.default_rng(4).uniform(low, high, found[:, 0].shape)
    return found


def input_range(result: Outcome) -> Range:
    """Return what the grid of the input covers."""
    quantize_input = next(use.node for use in result.model.graph.inputs[0].uses())
    scale, zero = (walk.constant_tensor(value).numpy() for value in quantize_input.inputs[1:])  # type: ignore[union-attr]
    return Range(float(-scale * int(zero)), float(scale * (255 - int(zero))))


def context(model: ir.Model, samples: Array) -> Context:
    data = open_data({"x": samples}, model)
    return Context(model, Rewriter(model), TARGETS["ort-cpu-x86"], OnnxRuntime(), threads=1, data=data)


def test_what_nothing_reads_is_clipped() -> None:
    samples = images(-8, 8)
    tuned, widest = (
        quantize(model_of(CONV, "N,3,8,8", WEIGHTS), samples, mode="static", ranges=ranges, solver="rtn")
        for ranges in ("tuned", "minmax")
    )
    assert tuned.error < 0.8 * widest.error
    assert input_range(tuned).high < 0.5 * input_range(widest).high
    assert "ranges tuned on 12 samples" in tuned.notes[0]


def test_each_end_is_moved_by_itself() -> None:
    result = quantize(model_of(CONV, "N,3,8,8", WEIGHTS), images(-8, 1), mode="static", ranges="tuned", solver="rtn")
    found = input_range(result)
    assert -found.low < 4.5
    assert found.high > 0.7


def test_first_ranges_are_kept_where_others_are_no_better(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuned_ranges, "_compared", lambda *arguments: [0.5, 0.5])
    samples = images(-8, 8)
    kept, usual = (
        quantize(model_of(CONV, "N,3,8,8", WEIGHTS), samples, mode="static", ranges=ranges, solver="rtn")
        for ranges in ("tuned", "auto")
    )
    assert input_range(kept) == input_range(usual)
    assert "kept as they were" in kept.notes[0]


@pytest.mark.parametrize("options", [{}, {"activations": "int8", "symmetric": True}, {"activations": "uint16"}])
def test_tuning_in_every_kind_of_grid(options: dict[str, Any]) -> None:
    body = "a = Conv <pads = [1, 1, 1, 1]> (x, w, b) r = Relu(a) y = Conv <pads = [1, 1, 1, 1]> (r, v)"
    weights = {**WEIGHTS, "v": random(5, 4, 4, 3, 3)}
    result = quantize(
        model_of(body, "N,3,8,8", weights), images(-1, 1), "portable", mode="static", ranges="tuned", **options
    )
    assert result.error < 0.05


def test_values_that_share_a_scale_are_tuned_together() -> None:
    body = "a = Conv (x, w, b) c = Conv (x, u) d = Concat <axis = 1> (a, c) y = Conv (d, v)"
    weights = {**WEIGHTS, "u": 3 * random(6, 4, 3, 3, 3), "v": random(7, 4, 8, 1, 1)}
    result = quantize(model_of(body, "N,3,8,8", weights), images(-1, 1), mode="static", ranges="tuned")
    (concat,) = (node for node in result.model.graph if node.op_type == "Concat")
    scales = {
        float(walk.constant_tensor(node.inputs[1]).numpy())  # type: ignore[union-attr]
        for value in (*concat.inputs, concat.outputs[0])
        for node in (value.producer(), *(use.node for use in value.uses()))  # type: ignore[union-attr]
        if node is not None and node.op_type in ("QuantizeLinear", "DequantizeLinear")
    }
    assert len(scales) == 1


def test_rounding_adds_what_the_definition_says_and_is_taken_away() -> None:
    model = model_of("r = Relu(x) y = Neg(r)", "N,3", {})
    samples = random(8, 8, 3)
    assert X86 is not None
    ctx = context(model, samples)
    assert ctx.data is not None
    probe = tuned_ranges._Probe(ctx, ctx.data, X86)
    group = tuned_ranges._Group(("r",), (Range(0, 1),), Range(0, 1))
    with probe.walkthrough() as steps, probe.rounded([group]) as feeds:
        (loss, other) = probe.losses(steps, [feeds([Range(0, 1.0)]), feeds([Range(0, 4.0)])])
    outputs = -np.maximum(samples, 0)
    for high, found in ((1.0, loss), (4.0, other)):
        rounded = -np.clip(np.rint(-outputs / (high / 255)), 0, 255) * (high / 255)
        logs = [one / tuned_ranges._TEMPERATURE for one in (outputs, rounded)]
        p, q = (np.exp(one) / np.exp(one).sum(1, keepdims=True) for one in logs)
        assert found == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-2, abs=1e-7)
    assert [node.op_type for node in probe.model.graph] == ["Relu", "Neg"]
    assert np.array_equal(run(probe.model, samples), outputs)


def test_outputs_of_three_axes_are_compared_by_noise() -> None:
    model = model_of("y = Relu(x)", "N,3,2", {})
    samples = random(9, 8, 3, 2)
    assert X86 is not None
    ctx = context(model, samples)
    assert ctx.data is not None
    probe = tuned_ranges._Probe(ctx, ctx.data, X86)
    group = tuned_ranges._Group(("x",), (Range(-1, 1),), Range(-1, 1))
    with probe.walkthrough() as steps, probe.rounded([group]) as feeds:
        (loss,) = probe.losses(steps, [feeds([Range(-0.5, 0.5)])])
    signal = np.maximum(samples, 0)
    noise = np.minimum(signal, 0.5) - signal
    assert loss == pytest.approx(float((noise**2).sum() / (signal**2).sum()), rel=0.02)


def test_other_modes_refuse_it() -> None:
    with pytest.raises(UsageError, match="ranges"):
        quantize(model_of("y = MatMul(x, w)", "4,8", {"w": random(1, 8, 8)}), None, mode="dynamic", ranges="tuned")


def test_halves_share_no_sample() -> None:
    model = model_of("y = Relu(x)", "N,1", {})
    data = open_data({"x": np.arange(9, dtype=np.float32)[:, None]}, model)
    halves = [[float(one) for batch in half.batches(4) for one in batch.feeds["x"][:, 0]] for half in data.halves(0)]
    assert sorted([*halves[0], *halves[1]]) == list(range(9))
    assert len(halves[0]) == 4
    assert [len(half) for half in data.take(1).halves(0)] == [1, 1]
