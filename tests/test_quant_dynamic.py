"""Products quantized as their inputs come: what is left in float, and what raising the rest behind them makes of it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import walk
from graphopt.passes.analyses.quantized import is_rescaled_product

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
