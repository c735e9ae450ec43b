"""Products quantized as their inputs come: what is left in float, and what raising the rest behind them makes of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.passes.analyses.linear_layers import linear_layers
from graphopt.passes.analyses.quantized import is_rescaled_product
from graphopt.passes.lossy.dynamic_trial import try_rounding
from graphopt.passes.lossy.quant import Quant
from graphopt.rewriter import Rewriter

from .pass_runs import run_passes
from .quant_runs import STEPS, fused, model_of, quantize, random, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")

WIDTH = 32
GELU = "d = Div(h, r) e = Erf(d) f = Add(e, one) m = Mul(h, f) g = Mul(m, half)"
FEED_FORWARD = f"p = MatMul(x, w1) h = Add(p, b1) {GELU} o = MatMul(g, w2) y = Add(o, b2)"
FEED_FORWARD_WEIGHTS = {
    "w1": random(1, WIDTH, 2 * WIDTH),
    "b1": random(2, 2 * WIDTH),
    "w2": random(3, 2 * WIDTH, WIDTH),
    "b2": random(4, WIDTH),
    "r": np.array(2**0.5, np.float32),
    "one": np.array(1, np.float32),
    "half": np.array(0.5, np.float32),
}
# Two heads of 16, whose sizes are said by the Reshapes.
ATTENTION = """q0 = MatMul(x, wq) q1 = Add(q0, bq) q2 = Reshape(q1, split) q = Transpose<perm=[0,2,1,3]>(q2)
    k0 = MatMul(x, wk) k1 = Add(k0, bk) k2 = Reshape(k1, split) k = Transpose<perm=[0,2,3,1]>(k2)
    v0 = MatMul(x, wv) v1 = Add(v0, bv) v2 = Reshape(v1, split) v = Transpose<perm=[0,2,1,3]>(v2)
    s = MatMul(q, k) t = Mul(s, quarter) p = Softmax<axis=-1>(t) c = MatMul(p, v)
    j = Transpose<perm=[0,2,1,3]>(c) o = Reshape(j, join) y = Relu(o)"""
ATTENTION_WEIGHTS = {
    **{f"w{name}": random(seed, WIDTH, WIDTH, scale=0.2) for seed, name in enumerate("qkv")},
    **{f"b{name}": random(seed + 3, WIDTH) for seed, name in enumerate("qkv")},
    "split": np.array([0, 0, 2, 16]),
    "join": np.array([0, 0, WIDTH]),
    "quarter": np.array(0.25, np.float32),
}


def counts(model: ir.Model) -> dict[str, int]:
    ops = [node.op_type for node in walk.every_node(model)]
    return {op: ops.count(op) for op in set(ops)}


def test_a_gelu_behind_an_integer_product_leaves_it_its_bias(tmp_path: Path) -> None:
    feed = random(9, 2, 4, WIDTH)
    before = run(model_of(FEED_FORWARD, f"2,4,{WIDTH}", FEED_FORWARD_WEIGHTS), feed)
    model = run_passes(model_of(FEED_FORWARD, f"2,4,{WIDTH}", FEED_FORWARD_WEIGHTS), "quant:mode=dynamic,O2").model
    ran = fused(model, tmp_path)
    assert ran == {"DynamicQuantizeMatMul": 2, "Gelu": 1}, "each bias is in its product, none is in the Gelu"
    assert np.abs(run(model, feed) - before).max() < 6 / STEPS * np.ptp(before)


def test_a_gelu_behind_a_float_product_takes_the_bias() -> None:
    model = run_passes(model_of(FEED_FORWARD, f"2,4,{WIDTH}", FEED_FORWARD_WEIGHTS), "O2").model
    assert counts(model)["BiasGelu"] == 1


def test_attention_behind_integer_products_leaves_them_their_biases(tmp_path: Path) -> None:
    feed = random(9, 2, 4, WIDTH)
    before = run(model_of(ATTENTION, f"n,s,{WIDTH}", ATTENTION_WEIGHTS), feed)
    model = run_passes(model_of(ATTENTION, f"n,s,{WIDTH}", ATTENTION_WEIGHTS), "quant:mode=dynamic,O2").model
    attention = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert len(attention.inputs) == 3 or attention.inputs[3] is None
    ran = fused(model, tmp_path)
    assert ran["DynamicQuantizeLinear"] == 1, "q, k and v share what is quantized"
    assert ran["MatMulIntegerToFloat"] == 3
    assert ran["Add"] == 0
    assert np.abs(run(model, feed) - before).max() < 6 / STEPS * np.ptp(before)


def test_attention_behind_float_products_takes_their_biases() -> None:
    model = run_passes(model_of(ATTENTION, f"n,s,{WIDTH}", ATTENTION_WEIGHTS), "O2").model
    attention = next(node for node in model.graph if node.op_type == "MultiHeadAttention")
    assert attention.inputs[3] is not None


@pytest.mark.parametrize(("inputs", "outputs"), [(16, 64), (64, 16)])
def test_a_product_too_narrow_to_pay_stays_in_float(inputs: int, outputs: int) -> None:
    model = model_of("y = MatMul(x, w)", f"2,{inputs}", {"w": random(1, inputs, outputs)})
    result = quantize(model, None, mode="dynamic")
    assert result.ops["MatMulInteger"] == 0
    assert "1 MatMul (fewer than 32 inputs or outputs)" in result.notes[0]


def test_a_target_without_such_kernels_has_no_least_width() -> None:
    model = model_of("y = MatMul(x, w)", "2,16", {"w": random(1, 16, 64)})
    assert quantize(model, None, "portable", mode="dynamic").ops["MatMulInteger"] == 1


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ("i = MatMulInteger(c, w, z) f = Cast<to=1>(i) m = Mul(f, s) y = Identity(m)", True),
        ("i = MatMulInteger(c, w, z) f = Cast<to=1>(i) m = Mul(s, f) y = Identity(m)", True),
        ("f = Cast<to=1>(c) m = Mul(f, s) y = Identity(m)", False),
        ("i = MatMulInteger(c, w, z) f = Cast<to=1>(i) m = Add(f, s) y = Identity(m)", False),
        ("m = Mul(x, s) y = Identity(m)", False),
    ],
)
def test_what_counts_as_a_rescaled_product(body: str, expected: bool) -> None:
    weights = {"w": np.ones((4, 4), np.int8)}
    model = model_of(f"c, s, z = DynamicQuantizeLinear(x) {body}", "2,4", weights)
    value = next(node for node in model.graph if node.op_type == "Identity").inputs[0]
    assert value is not None
    assert is_rescaled_product(value) is expected


# A row whose last number is huge: one range for all leaves the other numbers, which alone are read, few codes.
LOUD = "h = Mul(x, scale) a = MatMul(h, w1) k = MatMul(x, w2) y = Add(a, k)"
LOUD_WEIGHTS = {
    "scale": np.array([1.0] * (WIDTH - 1) + [1000.0], np.float32),
    "w1": np.concatenate([random(1, WIDTH - 1, WIDTH), np.zeros((1, WIDTH), np.float32)]),
    "w2": random(2, WIDTH, WIDTH),
}
QUIET_WEIGHTS = {**LOUD_WEIGHTS, "scale": np.ones(WIDTH, np.float32)}


def loud(weights: dict[str, np.ndarray] = LOUD_WEIGHTS) -> ir.Model:
    return model_of(LOUD, f"n,{WIDTH}", weights)


def test_an_activation_that_hurts_the_outputs_stays_float() -> None:
    samples = random(5, 16, WIDTH)
    outcome = quantize(loud(), samples, mode="dynamic")
    assert outcome.ops["MatMulInteger"] == 1
    assert outcome.ops["DequantizeLinear"] == 0, "a runtime would round what is multiplied by dequantized weights"
    codes = next(node for node in outcome.model.graph if node.op_type == "DynamicQuantizeLinear")
    assert codes.inputs[0] is outcome.model.graph.inputs[0]
    assert any(note.startswith("1 products compute in float") and "`h` alone" in note for note in outcome.notes)
    assert "1 MatMul (its activation in 8 bits hurts the outputs)" in outcome.notes[0]
    assert outcome.error < 0.02


def test_the_weight_of_a_spared_product_is_stored_in_integers() -> None:
    outcome = quantize(loud(), random(5, 16, WIDTH), mode="dynamic")
    stored = [value.const_value for value in outcome.model.graph.initializers.values() if value.const_value is not None]
    assert not [tensor.name for tensor in stored if tensor.dtype == ir.DataType.FLOAT and tensor.size > WIDTH]


def test_activations_that_do_no_harm_are_all_rounded() -> None:
    outcome = quantize(loud(QUIET_WEIGHTS), random(5, 16, WIDTH), mode="dynamic")
    assert outcome.ops["MatMulInteger"] == 2
    assert any("above the noise, by trial on 8 samples" in note for note in outcome.notes)


def test_without_data_the_report_says_that_nobody_looked() -> None:
    notes = quantize(
        model_of("y = MatMul(x, w)", f"2,{WIDTH}", {"w": random(1, WIDTH, WIDTH)}), None, mode="dynamic"
    ).notes
    assert any("was not looked at" in note and "--data" in note for note in notes)


@pytest.mark.parametrize("what", ["is_attempt", "weigh"])
def test_where_someone_else_judges_nothing_is_tried(what: str) -> None:
    model = loud()
    data = open_data({"x": random(5, 16, WIDTH)}, model)
    judge = {"is_attempt": True} if what == "is_attempt" else {"weigh": lambda model: pytest.fail("not asked here")}
    ctx = Context(model, Rewriter(model), TARGETS["ort-cpu-x86"], OnnxRuntime(), threads=1, data=data, **judge)
    Quant(mode="dynamic").run(model, ctx)
    assert counts(model)["MatMulInteger"] == 2


def test_the_noise_of_a_trial_is_that_of_dynamic_quantize_linear() -> None:
    model, samples = loud(QUIET_WEIGHTS), random(5, 8, WIDTH)
    data = open_data({"x": samples}, model)
    ctx = Context(model, Rewriter(model), TARGETS["ort-cpu-x86"], OnnxRuntime(), threads=1, data=data)
    found = try_rounding(ctx, linear_layers(model))
    step = (samples.max() - samples.min()) / STEPS
    error = np.round(samples / step) * step - samples
    both = QUIET_WEIGHTS["w1"] + QUIET_WEIGHTS["w2"]
    expected = np.square(error @ both).sum() / np.square(samples @ both).sum()
    assert found is not None
    assert found.noise == pytest.approx(expected, rel=0.05)
    assert (found.tried, found.spared, ctx.rewriter.edits) == (2, frozenset(), 0)


def test_nothing_is_told_of_a_model_without_outputs_of_floats() -> None:
    model = model_of(
        "m = MatMul(x, w) y = ArgMax<axis=1>(m)", f"2,{WIDTH}", {"w": random(1, WIDTH, WIDTH)}, outputs="int64 y"
    )
    outcome = quantize(model, random(5, 4, WIDTH).reshape(2, 2, WIDTH)[0], mode="dynamic")
    assert outcome.ops["MatMulInteger"] == 1
    assert not any("above the noise" in note for note in outcome.notes)


def test_a_product_right_behind_another_reads_what_that_one_gives() -> None:
    weights = {"w": random(1, 64, 64), "v": random(2, 64, 64)}
    result = quantize(model_of("a = MatMul(x, w) y = MatMul(a, v)", "N,64", weights), random(3, 4, 64), mode="dynamic")
    assert result.ops["MatMulInteger"] == 2
    assert result.error < 0.05
