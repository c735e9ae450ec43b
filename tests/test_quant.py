"""The pass `quant`: where it places integers, where it holds back, and what it costs in accuracy."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx import parser

from graphopt.authoring import Context, Need
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.errors import PassError, UsageError
from graphopt.passes.analyses.integer_units import integer_units
from graphopt.passes.analyses.linear_layers import linear_layers
from graphopt.passes.analyses.selection import Selection
from graphopt.passes.lossy.quant import Quant
from graphopt.passes.lossy.static_formats import activation_grid
from graphopt.passes.solvers import grid
from graphopt.ranges import Range
from graphopt.rewriter import Rewriter
from graphopt.verify import verify

from .quant_runs import STEPS, fused, model_of, quantize, random, run

needs_runtime = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")
pytestmark = needs_runtime

X86 = TARGETS["ort-cpu-x86"]


CONV = "c = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(c)"
CONV_WEIGHTS = {"w": random(1, 8, 3, 3, 3), "b": random(2, 8)}
IMAGES = random(3, 16, 3, 8, 8)


def test_conv_and_relu_become_one_integer_convolution(tmp_path: Path) -> None:
    result = quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS), IMAGES, mode="static")
    assert result.ops == {"QuantizeLinear": 2, "DequantizeLinear": 4, "Conv": 1}
    assert result.error < 4 / STEPS
    assert fused(result.model, tmp_path)["QLinearConv"] == 1
    assert result.model.graph.outputs[0].name == "y"
    assert "1 of 1 Conv" in result.notes[0]


def test_a_relu_reaching_other_readers_through_its_conv_is_kept() -> None:
    body = "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) y = Add(r, c)"
    result = quantize(model_of(body, "N,3,8,8", CONV_WEIGHTS), IMAGES, mode="static")
    assert result.ops["Relu"] == 1
    assert result.error < 4 / STEPS


@pytest.mark.parametrize(("low", "high", "left"), [(-0.5, 6.0, 0), (0.0, 6.0, 0), (0.5, 6.0, 1)])
def test_a_clip_goes_only_if_zero_lies_within(low: float, high: float, left: int) -> None:
    body = "c = Conv<pads=[1,1,1,1]>(x, w, b) y = Clip(c, lo, hi)"
    weights = CONV_WEIGHTS | {"lo": np.array(low, np.float32), "hi": np.array(high, np.float32)}
    result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static")
    assert result.ops["Clip"] == left
    # The convolution's own errors count against the clipped span, a third of its range.
    assert result.error < 12 / STEPS


def test_residual_concat_and_pooling_stay_in_integers(tmp_path: Path) -> None:
    body = """a = Conv<pads=[1,1,1,1]>(x, w, b) ar = Relu(a) m = MaxPool<kernel_shape=[2,2], strides=[2,2]>(ar)
              p = Conv(m, v) q = Conv(m, v2) s = Add(p, m) sr = Relu(s) k = Concat<axis=1>(sr, q)
              g = GlobalAveragePool(k) f = Flatten(g) y = Gemm<transB=1>(f, h, hb)"""
    weights = CONV_WEIGHTS | {
        "v": random(4, 8, 8, 1, 1),
        "v2": random(5, 8, 8, 1, 1),
        "h": random(6, 5, 16),
        "hb": random(7, 5),
    }
    result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static")
    ran = fused(result.model, tmp_path)
    assert ran["QLinearConv"] == 3
    assert ran["QLinearAdd"] == ran["QLinearConcat"] == ran["QGemm"] == ran["QLinearGlobalAveragePool"] == 1
    assert ran["QuantizeLinear"] == 1
    assert ran["DequantizeLinear"] == 0
    assert result.error < 12 / STEPS


@pytest.mark.parametrize("activation", ["Relu(a)", "Clip(a, lo, hi)"])
def test_a_shared_scale_never_undoes_a_relu_or_clip(activation: str) -> None:
    body = f"a = Conv(x, v) r = {activation} c = Conv(x, v2) k = Concat<axis=1>(r, c) y = Conv(k, u)"
    weights = {
        "v": random(4, 8, 3, 1, 1),
        "v2": random(5, 8, 3, 1, 1),
        "u": random(6, 4, 16, 1, 1),
        "lo": np.array(0, np.float32),
        "hi": np.array(1, np.float32),
    }
    result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static")
    assert result.ops["Relu"] == result.ops["Clip"] == 0
    assert result.error < 4 / STEPS


def test_moves_share_one_scale_and_padding_moves_integers() -> None:
    body = """a = Conv<pads=[1,1,1,1]>(x, w, b) s = Slice(a, begin, end) p = Pad(s, pads)
              t = Transpose<perm=[0,1,3,2]>(p) y = Conv(t, v)"""
    weights = CONV_WEIGHTS | {
        "begin": np.array([0, 0, 0, 0]),
        "end": np.array([99, 8, 4, 8]),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
        "v": random(4, 4, 8, 1, 1),
    }
    result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static")
    pad = next(node for node in result.model.graph if node.op_type == "Pad")
    assert pad.inputs[0] is not None
    assert pad.inputs[0].producer().op_type == "QuantizeLinear"  # type: ignore[union-attr]
    scales = {
        node.inputs[1].name  # type: ignore[union-attr]
        for node in result.model.graph
        if node.op_type == "QuantizeLinear" and node.inputs[0].producer() is not None  # type: ignore[union-attr]
    }
    assert len(scales) == 2  # the first convolution's, shared by every move, and the second's
    assert result.error < 8 / STEPS


def test_a_relu_in_front_of_integers_that_move(tmp_path: Path) -> None:
    body = "a = Conv(x, w) r = Relu(a) p = Pad(r, pads) s, t = Split<axis=1>(p) k = Add(s, t) y = Conv(k, v)"
    weights = {"w": random(1, 8, 3, 1, 1), "v": random(2, 4, 4, 1, 1), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static")
    ran = fused(result.model, tmp_path)
    assert (ran["QLinearConv"], ran["QLinearAdd"], ran["QuantizeLinear"], ran["DequantizeLinear"]) == (2, 1, 1, 1)
    assert result.error < 4 / STEPS


def test_an_operator_between_floats_is_left_alone() -> None:
    result = quantize(model_of("a = Tanh(x) b2 = Add(a, x) y = Sigmoid(b2)", "N,4", {}), random(1, 8, 4), mode="static")
    assert result.ops == {"Tanh": 1, "Add": 1, "Sigmoid": 1}
    assert "unchanged" in result.notes[-1]


def test_a_polynomial_is_left_and_a_gate_is_not(tmp_path: Path) -> None:
    weights = {"w": random(1, 16, 3, 1, 1), "v": random(2, 4, 16, 1, 1), "k": np.array(0.5, np.float32)}
    for body, kept in (
        ("a = Conv(x, w) b = Mul(k, a) c = Mul(a, b) d = Mul(a, c) e = Add(a, d) y = Conv(e, v)", 3),
        ("a = Conv(x, w) g = GlobalAveragePool(a) s = Sigmoid(g) m = Mul(a, s) y = Conv(m, v)", 0),
    ):
        result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static")
        ran = fused(result.model, tmp_path)
        assert (ran["Mul"], ran["QLinearMul"]) == (kept, 0 if kept else 1)
        assert result.error < 12 / STEPS


def test_matmul_with_bias_becomes_an_integer_gemm(tmp_path: Path) -> None:
    weights = {"w": random(1, 16, 8), "b": random(2, 8), "v": random(3, 8, 4), "c": random(4, 4)}
    body = "m = MatMul(x, w) a = Add(m, b) r = Relu(a) n = MatMul(r, v) y = Add(n, c)"
    result = quantize(model_of(body, "N,16", weights), random(5, 32, 16), mode="static")
    assert fused(result.model, tmp_path)["QGemm"] == 2
    assert result.error < 6 / STEPS


@pytest.mark.parametrize("attributes", ["", "<transB=1>", "<alpha=0.5, beta=2.0>", "<transA=1>"])
def test_gemm_with_any_attributes(attributes: str, tmp_path: Path) -> None:
    weight = random(1, 16, 8)
    weights = {"w": np.ascontiguousarray(weight.T) if "transB" in attributes else weight, "b": random(2, 8)}
    samples = random(3, 1, 16, 16) if "transA" in attributes else random(3, 32, 16)
    model = model_of(f"y = Gemm{attributes}(x, w, b)", "16,16" if "transA" in attributes else "N,16", weights)
    if "transA" in attributes:
        samples = samples[0]
        before = run(model, samples)
        ctx = Context(model, Rewriter(model), X86, OnnxRuntime(), threads=1, data=open_data([{"x": samples}], model))
        Quant(mode="static").run(model, ctx)
        assert np.abs(run(model, samples) - before).max() < 4 / STEPS * np.ptp(before)
    else:
        result = quantize(model, samples, mode="static")
        assert result.error < 4 / STEPS
    assert fused(model, tmp_path)["QGemm"] == 1


def test_depthwise_and_grouped_convolutions(tmp_path: Path) -> None:
    body = "a = Conv<group=64, pads=[1,1,1,1]>(x, w) y = Conv<group=2>(a, v)"
    weights = {"w": random(1, 64, 1, 3, 3), "v": random(2, 64, 32, 1, 1)}
    result = quantize(model_of(body, "N,64,6,6", weights), random(3, 16, 64, 6, 6), mode="static")
    assert fused(result.model, tmp_path)["QLinearConv"] == 2
    assert result.error < 6 / STEPS


def test_pruned_weights_stay_exactly_zero() -> None:
    weight = random(1, 8, 3, 3, 3)
    weight[np.abs(weight) < 0.7] = 0
    weight[2] = 0
    for mode in ("static", "weights"):
        result = quantize(model_of("y = Conv(x, w)", "N,3,8,8", {"w": weight}), IMAGES, mode=mode)
        codes = next(v.const_value.numpy() for v in result.model.graph.initializers.values() if v.name == "w_q")  # type: ignore[union-attr]
        assert codes.dtype == np.int8
        assert np.array_equal(codes == 0, (codes == 0) | (weight == 0))
        assert not codes[weight == 0].any()
        assert result.error < 4 / STEPS


def test_zero_constant_and_empty_ranges_give_finite_scales() -> None:
    weights = {"w": np.zeros((4, 3, 1, 1), np.float32), "b": np.array([0, 0.3, -7, 0], np.float32)}
    result = quantize(model_of("y = Conv(x, w, b)", "N,3,8,8", weights), np.zeros_like(IMAGES), mode="static")
    assert np.isfinite(result.after).all()
    assert result.error < 2 / STEPS
    for value in result.model.graph.initializers.values():
        array = value.const_value.numpy()  # type: ignore[union-attr]
        if array.dtype == np.float32:
            assert (array > 0).all()
            assert np.isfinite(array).all()


def test_a_bias_that_would_overflow_int32_raises_its_channels_scale() -> None:
    weight = random(1, 4, 3, 1, 1)
    weight[1] *= 1e-9
    weights = {"w": weight, "b": np.array([1.0, 50.0, 0.0, -1.0], np.float32)}
    result = quantize(model_of("y = Conv(x, w, b)", "N,3,8,8", weights), IMAGES, mode="static")
    assert result.error < 4 / STEPS
    assert any("1 channels took a larger weight scale" in note for note in result.notes)


def test_a_weight_read_twice_is_stored_once_and_one_shared_with_a_lookup_is_left() -> None:
    result = quantize(
        model_of("a = Conv(x, w) s = Sigmoid(a) y = Conv(s, w)", "N,3,4,4", {"w": random(1, 3, 3, 1, 1)}),
        random(2, 8, 3, 4, 4),
        mode="static",
    )
    assert (
        sum(
            value.dtype == ir.DataType.INT8 and len(value.shape or ()) == 4
            for value in result.model.graph.initializers.values()
        )
        == 1
    )
    body = "i = Cast<to=7>(x) e = Gather(w, i) f = ReduceSum<keepdims=0>(e, ax) y = Gemm<transB=1>(f, w)"
    tied = model_of(body, "N,4", {"w": random(1, 8, 16), "ax": np.array([1])})
    result = quantize(tied, np.abs(random(3, 8, 4)).clip(0, 7), mode="static")
    assert result.ops["QuantizeLinear"] == 0
    assert "also read by Gather" in result.notes[-1]


def test_float_readers_of_a_quantized_input_keep_the_float() -> None:
    body = "c = Conv(x, w) t = Tanh(x) y = Add(c, t)"
    result = quantize(model_of(body, "N,3,8,8", {"w": random(1, 3, 3, 1, 1)}), IMAGES, mode="static")
    tanh = next(node for node in result.model.graph if node.op_type == "Tanh")
    assert tanh.inputs[0] is result.model.graph.inputs[0]


def test_refuses_what_is_quantized_already_or_not_float32() -> None:
    result = quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS), IMAGES, mode="static")
    with pytest.raises(PassError, match="already quantized"):
        quantize(result.model, IMAGES, mode="dynamic")
    half = {name: value.astype(np.float16) for name, value in CONV_WEIGHTS.items()}
    body = "h = Cast<to=10>(x) c = Conv(h, w, b) y = Cast<to=1>(c)"
    with pytest.raises(PassError, match="FLOAT16"):
        quantize(model_of(body, "N,3,8,8", half), IMAGES, mode="static")


def test_layers_in_subgraphs_are_left_with_a_note() -> None:
    body = """c = Conv(x, w) s = ReduceSum<keepdims=0>(c) z = Greater(s, zero)
              y = If<then_branch = g1 () => (float[N,3,8,8] t) { t = Conv(c, w) },
                     else_branch = g2 () => (float[N,3,8,8] e) { e = Identity(c) }>(z)"""
    weights = {"w": random(1, 3, 3, 1, 1), "zero": np.array(0, np.float32)}
    result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static")
    assert any("left 1 linear layers inside subgraphs" in note for note in result.notes)
    assert result.error < 4 / STEPS


def test_nothing_is_dequantized_into_moves_that_a_subgraph_captures(tmp_path: Path) -> None:
    body = """c = Conv(x, w) u = Unsqueeze(c, ax) v = Squeeze(u, ax) s = ReduceSum<keepdims=0>(x) z = Greater(s, zero)
              y = If<then_branch = g1 () => (float[N,3,8,8] t) { t = Relu(v) },
                     else_branch = g2 () => (float[N,3,8,8] e) { e = Neg(v) }>(z)"""
    weights = {"w": random(1, 3, 3, 1, 1), "zero": np.array(0, np.float32), "ax": np.array([0])}
    result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static")
    assert result.ops["QuantizeLinear"] == 0
    assert "read inside a subgraph" in result.notes[0]
    assert fused(result.model, tmp_path)["If"] == 1  # ONNX Runtime 1.31 would abort here, not raise


def test_include_and_exclude_take_names_operators_and_globs() -> None:
    body = "a = Conv(x, w) r = Tanh(a) y = Conv(r, w)"
    weights = {"w": random(1, 3, 3, 1, 1)}
    for options in ({"include": ("conv0",)}, {"exclude": ("conv2",)}, {"include": ("Conv",), "exclude": ("*2",)}):
        result = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static", **options)
        assert result.ops["QuantizeLinear"] == 2
        assert "excluded" in result.notes[-1]
    with pytest.raises(UsageError, match="`include=Cnov` matches no node") as caught:
        quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static", include=("Cnov",))
    assert caught.value.hint == "did you mean `Conv`?"


def test_dynamic_products_fuse_and_share_what_they_quantize(tmp_path: Path) -> None:
    weights = {name: random(seed, 32, 32) for seed, name in enumerate("qkv")}
    body = "a = MatMul(x, q) b = MatMul(x, k) c = MatMul(x, v) s = Add(a, b) y = Mul(s, c)"
    result = quantize(model_of(body, "2,4,32", weights), None, mode="dynamic")
    assert result.ops["DynamicQuantizeLinear"] == 1
    assert fused(result.model, tmp_path)["MatMulIntegerToFloat"] == 3
    assert result.error < 4 / STEPS


@pytest.mark.parametrize("attributes", ["", "<transB=1>", "<alpha=0.5, beta=2.0>"])
def test_dynamic_gemm(attributes: str, tmp_path: Path) -> None:
    weight = random(1, 64, 32)
    weights = {"w": np.ascontiguousarray(weight.T) if "transB" in attributes else weight, "b": random(2, 32)}
    result = quantize(model_of(f"y = Gemm{attributes}(x, w, b)", "4,64", weights), None, mode="dynamic")
    assert fused(result.model, tmp_path)["DynamicQuantizeMatMul"] == 1
    assert result.error < 4 / STEPS


def test_dynamic_products_inside_a_subgraph() -> None:
    body = """s = ReduceSum<keepdims=0>(x) z = Greater(s, zero)
              y = If<then_branch = g1 () => (float[4,32] t) { t = MatMul(x, w) },
                     else_branch = g2 () => (float[4,32] e) { e = MatMul(x, w) }>(z)"""
    weights = {"w": random(1, 64, 32), "zero": np.array(0, np.float32)}
    result = quantize(model_of(body, "4,64", weights), None, mode="dynamic")
    assert result.ops["MatMulInteger"] == 2
    assert sum(value.dtype == ir.DataType.INT8 for value in result.model.graph.initializers.values()) == 1
    assert result.error < 4 / STEPS


def test_a_tied_table_is_stored_once_for_lookup_and_output_layer() -> None:
    body = "i = Cast<to=7>(x) e = Gather(w, i) t = Transpose<perm=[1,0]>(w) y = MatMul(e, t)"
    for mode in ("dynamic", "weights"):
        model = model_of(body, "2,4", {"w": random(1, 64, 32)})
        feed = np.arange(8, dtype=np.float32).reshape(2, 4)
        before = run(model, feed)
        Quant(mode=mode).run(model, Context(model, Rewriter(model), X86, OnnxRuntime(), threads=1))  # type: ignore[arg-type]
        verify(model)
        tables = [
            v for v in model.graph.initializers.values() if v.const_value is not None and v.const_value.size == 2048
        ]
        assert [value.dtype for value in tables] == [ir.DataType.INT8]
        assert np.abs(run(model, feed) - before).max() < 6 / STEPS * np.ptp(before)


def test_weights_only_needs_no_data_and_lets_the_runtime_fold(tmp_path: Path) -> None:
    body = "c = Conv(x, w) f = Flatten(c) y = Gemm(f, h)"
    weights = {"w": random(1, 16, 3, 3, 3), "h": random(2, 576, 10)}
    result = quantize(model_of(body, "2,3,8,8", weights), None, mode="weights")
    ran = fused(result.model, tmp_path)
    assert ran["Conv"] == 1
    assert ran["Cast"] == ran["DequantizeLinear"] == 0
    assert ran["MatMulNBits"] == 1
    assert result.error < 6 / STEPS
    assert "in float as before" in result.notes[0]


@pytest.mark.parametrize(
    ("body", "shape", "data", "target", "mode"),
    [
        ("y = Conv(x, w)", "N,3,8,8", True, "ort-cpu-x86", "static"),
        ("y = Conv(x, w)", "2,3,8,8", False, "ort-cpu-x86", "weights"),
        ("y = Conv(x, w)", "N,3,8,8", True, "ort-cuda", "weights"),
        ("y = MatMul(x, m)", "2,3,8,8", True, "ort-cpu-x86", "dynamic"),
        ("y = MatMul(x, m)", "2,3,8,8", False, "ort-cpu-x86", "dynamic"),
        ("y = MatMul(x, m)", "2,3,8,8", False, "ort-cuda", "weights"),
    ],
)
def test_auto_follows_data_target_and_work(body: str, shape: str, data: bool, target: str, mode: str) -> None:
    weights = {"w": random(1, 8, 3, 3, 3)} if "Conv" in body else {"m": random(1, 8, 64)}
    samples = IMAGES if data else None
    if data and shape.startswith("2"):
        samples = IMAGES[:2]
    result = quantize(model_of(body, shape, weights), samples, target)
    assert result.notes[0].startswith(f"chose `mode={mode}`: ")


def test_auto_stores_weights_where_the_data_see_too_little() -> None:
    body = """y = If (b) <
        then_branch = g1 () => (float[N,8,6,6] t) { t = Conv(x, w) },
        else_branch = g2 () => (float[N,8,6,6] e) { e = Conv(x, v) }
    >"""
    weights = {"w": random(1, 8, 3, 3, 3), "v": random(2, 8, 3, 3, 3), "b": np.array(True)}
    result = quantize(model_of(body, "N,3,8,8", weights), IMAGES)
    assert result.notes[0].startswith("chose `mode=weights`: 100% of the multiplications are inside subgraphs")


def test_auto_only_stores_weights_in_formats_without_kernels() -> None:
    model = model_of("y = Conv(x, w)", "2,16,8,8", {"w": random(1, 16, 16, 3, 3)})
    result = quantize(model, random(2, 2, 16, 8, 8), weights="int4")
    assert result.notes[0] == "chose `mode=weights`: `ort-cpu-x86` only stores weights as int4"


def test_needs_follow_the_mode() -> None:
    assert Quant(mode="static").needs == {Need.CANONICAL, Need.CALIBRATION}
    assert Quant().needs == {Need.CANONICAL, Need.CALIBRATION_OPTIONAL}
    assert Quant(mode="weights", solver="rtn").needs == {Need.CANONICAL}


def test_targets_without_the_mode_refuse_it() -> None:
    for mode in ("static", "dynamic"):
        with pytest.raises(PassError, match="gains nothing on target `ort-cuda`"):
            quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS), IMAGES, "ort-cuda", mode=mode)


def test_rounding_is_within_half_a_step_and_reduced_range_within_seven_bits() -> None:
    weight = random(1, 6, 40)
    for bits in (grid.FULL_RANGE_BITS, grid.REDUCED_RANGE_BITS):
        for per_channel in (True, False):
            found = grid.round_to_nearest(weight, grid.Grid(bits, tensor=not per_channel))
            assert np.abs(found.codes).max() == 2 ** (bits - 1) - 1
            restored = found.codes * found.scales
            assert (np.abs(restored - weight) <= found.scales * 0.5001).all()
            assert found.error == pytest.approx(np.square(restored - weight).sum(), rel=1e-3)


@pytest.mark.parametrize("span", [Range(0, 0), Range(-1, 0), Range(0, 6), Range(-1e-44, 0), Range(-3, 5)])
def test_zero_is_on_every_activation_grid(span: Range) -> None:
    for target in TARGETS.values():
        if target.static is None:
            continue
        found = activation_grid(span, target.static)
        low, high = (0, 255) if target.static.activation == "uint8" else (-128, 127)
        assert low <= found.zero_point <= high
        assert found.scale >= grid.SMALLEST_SCALE
        assert (low - found.zero_point) * found.scale <= span.low + found.scale
        assert (high - found.zero_point) * found.scale >= span.high - found.scale


def test_units_say_what_stays_float_and_why() -> None:
    model = model_of("a = Conv(x, w) t = Tanh(a) y = Conv(t, t)", "3,3,8,8", {"w": random(1, 3, 3, 1, 1)})
    assert X86.static is not None
    units = integer_units(model, X86, X86.static, Selection())
    assert [unit.node.name for unit in units.units] == ["conv0"]
    assert units.left == {
        ("Tanh", "no integer kernel on this target"): 1,
        ("Conv", "its weight is no constant"): 1,
    }


@pytest.mark.parametrize(
    "body",
    [
        "c = Conv(x, w) m = MaxPool<kernel_shape=[2,2]>(c) r = Relu(m) y = Conv(r, v)",
        "c = Conv(x, w) t = Transpose<perm=[0,1,3,2]>(c) r = Relu(t) y = Conv(r, v)",
        "c = Conv(x, w) p = Pad(c, pads) r = Relu(p) y = Conv(r, v)",
        "c = Conv(x, w) f = Flatten(c) r = Relu(f) y = MatMul(r, h)",
    ],
)
def test_an_activation_behind_a_move_still_clips(body: str) -> None:
    """A move shares the scale of what it reads: its range cannot stand for an activation behind it."""
    weights = {
        "w": random(1, 8, 3, 3, 3),
        "v": random(2, 4, 8, 3, 3),
        "h": random(3, 288, 5),
        "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
    }
    assert quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static").error < 8 / STEPS


def test_weights_read_twice_out_of_order_are_brought_to_float_before_the_first_reader() -> None:
    weights = {"w": random(1, 16, 3, 3, 3)}
    model = model_of("b = Conv(x, w) a = Conv(x, w) y = Add(a, b)", "2,3,8,8", weights)
    first, second = (node for node in model.graph if node.op_type == "Conv")
    model.graph.remove(first)
    model.graph.insert_before(model.graph[1], first)
    assert next(use.node for use in model.graph.initializers["w"].uses()) is not second
    assert quantize(model, None, mode="weights").error < 6 / STEPS


def test_weights_an_excluded_node_reads_too_stay_float() -> None:
    body = "a = MatMul(x, w) b = MatMul(a, w) y = Identity(b)"
    model = model_of(body, "2,3,8,64", {"w": random(1, 64, 64)})
    for node, name in zip(model.graph, ("A", "B", "C"), strict=True):
        node.name = name
    result = quantize(model, None, mode="weights", exclude=("B",))
    assert "DequantizeLinear" not in result.ops
    assert any("`B`, which is excluded" in note for note in result.notes)


def test_a_bias_that_adds_axes_is_no_bias() -> None:
    weights = {"w": random(1, 8, 16), "b": random(2, 1, 1, 16)}
    result = quantize(model_of("m = MatMul(x, w) y = Add(m, b)", "N,8", weights), random(4, 16, 8), mode="static")
    assert result.error < 6 / STEPS


def test_a_layer_whose_attributes_the_caller_gives_is_left_alone() -> None:
    text = """<ir_version: 9, opset_import: ["": 17, "local": 1]>
    g (float[2,64] x) => (float[2,64] y) { y = local.f<t=1>(x) }
    <domain: "local", opset_import: ["": 17]>
    f <t> (x) => (y) {
      i = Constant<value_ints = [64, 64]>()
      w = ConstantOfShape<value = float[1] {0.5}>(i)
      y = Gemm<transB: int = @t>(x, w)
    }"""
    model = ir.from_proto(parser.parse_model(text))
    assert not linear_layers(model)
