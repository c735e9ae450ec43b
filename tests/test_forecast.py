"""Forecasts of noise: by the definition, on data, and by what the grids around a layer add."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

from graphopt import registry
from graphopt.authoring import Context
from graphopt.data import open_data
from graphopt.passes.analyses.forecast import Forecast, forecasting
from graphopt.passes.analyses.linear_layers import linear_layers
from graphopt.passes.lossy.quant import Quant
from graphopt.rewriter import Rewriter

from .pass_runs import BACKEND, TARGET, loaded

INPUTS, OUTPUTS, STEP_IN, STEP_OUT = 6, 5, 0.25, 0.5
RNG = np.random.default_rng(3)
WEIGHT = RNG.standard_normal((INPUTS, OUTPUTS)).astype(np.float32)
X = RNG.standard_normal((200, INPUTS)).astype(np.float32) * np.arange(1, INPUTS + 1, dtype=np.float32)


def model(body: str) -> ir.Model:
    text = (
        f'<ir_version: 9, opset_import: ["" : 17]> g (float[n, {INPUTS}] x) => (float[n, {OUTPUTS}] y) '
        f"<float s = {{{STEP_IN}}}, float t = {{{STEP_OUT}}}, uint8 z = {{128}}> {{ {body} }}"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(WEIGHT, "w"))
    return loaded(proto)


def plain() -> ir.Model:
    return model("[layer] y = MatMul (x, w)")


def context(of: ir.Model, *, data: bool = True, predicts: bool = False) -> Context:
    return Context(
        model=of,
        rewriter=Rewriter(of),
        target=registry.find("TARGETS", TARGET),
        backend=registry.backend(BACKEND),
        threads=1,
        data=open_data({"x": X}, of) if data else None,
        predicts=predicts,
    )


def predicted(ctx: Context, changed: np.ndarray, after: ir.Model | None = None) -> float:
    forecast = Forecast(ctx, linear_layers(ctx.model))
    forecast.weight(ctx.model.graph[0], changed)
    forecast.say(after or ctx.model)
    (note,) = ctx.notes
    assert note.node == "layer"
    return float(note.facts["predicted_error"])


def test_noise_of_the_weight_is_what_it_is_on_the_data() -> None:
    changed = np.round(WEIGHT.T * 4) / 4
    noise = np.square(X @ (WEIGHT - changed.T)).mean(0)
    signal = np.square(X @ WEIGHT).mean(0)
    assert predicted(context(plain()), changed) == pytest.approx(float((noise / (noise + signal)).mean()), rel=1e-3)


def test_a_weight_that_stays_makes_no_noise_and_a_lost_one_is_half_noise() -> None:
    assert predicted(context(plain()), WEIGHT.T) == 0.0
    assert predicted(context(plain()), 0 * WEIGHT.T) == pytest.approx(0.5)  # noise as strong as the signal


def test_grids_around_the_layer_add_what_a_simulation_finds() -> None:
    after = model(
        "q = QuantizeLinear (x, s, z) d = DequantizeLinear (q, s, z) [layer] h = MatMul (d, w) "
        "[relu] r = Relu (h) p = QuantizeLinear (r, t, z) y = DequantizeLinear (p, t, z)"
    )
    signal = np.square(X @ WEIGHT).mean(0)
    on_grid = np.round(X / STEP_IN) * STEP_IN
    output = on_grid @ WEIGHT
    noise = np.square(np.round(output / STEP_OUT) * STEP_OUT - X @ WEIGHT).mean(0)
    found = predicted(context(plain()), WEIGHT.T, after)
    assert found == pytest.approx(float((noise / (noise + signal)).mean()), rel=0.15)


def test_without_data_every_input_counts_alike() -> None:
    changed = np.round(WEIGHT.T * 4) / 4
    noise, signal = np.square(WEIGHT.T - changed).sum(1), np.square(WEIGHT.T).sum(1)
    found = predicted(context(plain(), data=False), changed)
    assert found == pytest.approx(float((noise / (noise + signal)).mean()), rel=1e-3)


def test_nothing_is_said_where_nobody_asks() -> None:
    ctx = context(plain())
    with forecasting(ctx, ctx.model, linear_layers(ctx.model)):
        assert ctx.forecast is None
    assert ctx.notes == []
    asked = context(plain(), predicts=True)
    with forecasting(asked, asked.model, linear_layers(asked.model)):
        assert asked.forecast is not None
        asked.forecast.weight(asked.model.graph[0], WEIGHT.T * 2)
    assert [note.facts["predicted_error"] for note in asked.notes] == [pytest.approx(0.5)]
    assert asked.forecast is None


def test_the_weight_counts_as_it_was_when_the_forecast_began() -> None:
    ctx = context(plain())
    forecast = Forecast(ctx, linear_layers(ctx.model))
    (layer,) = linear_layers(ctx.model)
    ctx.rewriter.set_weight(layer.weight, WEIGHT * 7)
    forecast.weight(layer.node, WEIGHT.T)
    forecast.say(ctx.model)
    assert [note.facts["predicted_error"] for note in ctx.notes] == [0.0]


def test_scaled_inputs_are_counted_as_they_were() -> None:
    """AWQ gives inputs and weights factors that cancel: what is forecast is what quantizing does to the outputs."""
    proto = onnx.parser.parse_model(
        '<ir_version: 9, opset_import: ["" : 17]> g (float[n, 64] x) => (float[n, 48] y) '
        "{ [scale] s = Mul (x, f) [layer] y = MatMul (s, w) }"
    )
    sizes = np.exp(1.5 * RNG.standard_normal(64)).astype(np.float32)
    weight = RNG.standard_normal((64, 48)).astype(np.float32)
    proto.graph.initializer.extend([numpy_helper.from_array(sizes, "f"), numpy_helper.from_array(weight, "w")])
    x = RNG.standard_normal((256, 64)).astype(np.float32)
    of = loaded(proto)
    ctx = Context(
        model=of,
        rewriter=Rewriter(of),
        target=registry.find("TARGETS", "portable"),
        backend=registry.backend(BACKEND),
        threads=1,
        data=open_data({"x": x}, of),
        predicts=True,
    )
    Quant(mode="weights", weights="int4", group="32", solver="awq").run(of, ctx)
    with ctx.backend.open(of, threads=1, optimize=False) as session:
        after = next(iter(session.run({"x": x}).values()))
    before = (x * sizes) @ weight
    noise, signal = np.square(after - before).mean(0), np.square(before).mean(0)
    (found,) = [note.facts["predicted_error"] for note in ctx.notes if "predicted_error" in note.facts]
    assert found == pytest.approx(float((noise / (noise + signal)).mean()), rel=0.02)
