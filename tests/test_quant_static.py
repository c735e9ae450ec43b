"""Static quantization: formats, groups, opsets, what is done beforehand, and who rounds the weights."""

from __future__ import annotations

import importlib.util
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.errors import DataError, GraphoptError, PassError, UsageError
from graphopt.passes.analyses.selection import Selection
from graphopt.passes.lossy.quant_plan import StaticPlan
from graphopt.passes.lossy.quant_preparation import in_opset
from graphopt.passes.lossy.quant_static import quantize_static
from graphopt.passes.lossy.static_formats import activation_grid, encode, first_opset, limits
from graphopt.passes.lossy.static_weights import RoundedWeight, WeightTask, nearest, without_data
from graphopt.ranges import Range, RangeMethod
from graphopt.rewriter import Rewriter
from graphopt.target import IntegerScheme
from graphopt.verify import verify

from .quant_runs import STEPS, Array, fused, model_of, quantize, random, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")

X86 = TARGETS["ort-cpu-x86"]
CONV = "c = Conv<pads=[1,1,1,1]>(x, w, b) y = Relu(c)"
CONV_WEIGHTS = {"w": random(1, 16, 3, 3, 3), "b": random(2, 16)}
IMAGES = random(3, 16, 3, 8, 8)


def made_by(model: ir.Model, op_type: str) -> list[ir.Node]:
    return [node for node in walk.every_node(model) if node.op_type == op_type]


def array_of(value: ir.Value | None) -> Array:
    tensor = walk.constant_tensor(value)
    assert tensor is not None
    return tensor.numpy()


# Formats


@pytest.mark.parametrize("activations", ["uint8", "int8", "uint16", "int16", "float8e4m3fn", "float8e5m2"])
def test_activations_in_every_format_of_the_standard(activations: str) -> None:
    options: dict[str, Any] = {"weights": activations} if activations.startswith("float") else {}
    model = model_of(CONV, "N,3,8,8", CONV_WEIGHTS)
    result = quantize(model, IMAGES, "portable", mode="static", activations=activations, **options)
    (quantized, *_) = made_by(result.model, "QuantizeLinear")
    assert quantized.inputs[2] is not None
    assert quantized.inputs[2].dtype.name.lower() == activations  # type: ignore[union-attr]
    assert walk.opset(result.model) >= first_opset(activations)  # type: ignore[arg-type]
    # Two bits of mantissa keep an eighth of each value, three a sixteenth; weights are in 8 bits at best.
    assert result.error < {"float8e4m3fn": 0.08, "float8e5m2": 0.15}.get(activations, 4 / STEPS)


def test_sixteen_bits_of_activation_leave_only_the_error_of_the_weights() -> None:
    errors = {}
    for activations in ("int8", "int16"):
        model = model_of(CONV, "N,3,8,8", CONV_WEIGHTS)
        result = quantize(model, IMAGES, "portable", mode="static", activations=activations, ranges="minmax")
        errors[activations] = result.error
    assert errors["int16"] < 0.7 * errors["int8"]


@pytest.mark.parametrize("weights", ["int8", "uint8", "int4", "uint4"])
def test_weights_in_every_format_of_the_standard(weights: str) -> None:
    result = quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS), IMAGES, "portable", mode="static", weights=weights)
    (conv,) = made_by(result.model, "Conv")
    read = conv.inputs[1].producer()  # type: ignore[union-attr]
    assert read is not None
    assert read.inputs[0].dtype.name.lower() == weights  # type: ignore[union-attr]
    if weights.startswith("u"):
        assert len(np.unique(array_of(read.inputs[2]))) > 1  # zero points of their own
    assert result.error < (4 / STEPS if weights.endswith("8") else 0.15)


def test_zero_points_follow_one_sided_weights() -> None:
    weights = {"w": np.abs(random(1, 16, 3, 3, 3)) + 2, "b": random(2, 16)}
    errors = [
        quantize(model_of(CONV, "N,3,8,8", weights), IMAGES, "portable", mode="static", weights=name).error
        for name in ("int4", "uint4")
    ]
    assert errors[1] < errors[0]


def test_float8_takes_its_largest_code_for_the_largest_magnitude() -> None:
    scheme = IntegerScheme("float8e4m3fn", True, "float8e4m3fn", per_channel=True, bias="float")
    assert activation_grid(Range(-3, 448), scheme).scale == 1.0
    assert limits("float8e4m3fn") == (-448, 448)
    assert limits("float8e5m2") == (-57344, 57344)
    beyond = encode(np.array([1e9, -1e9, 0.3], np.float32), "float8e4m3fn").astype(np.float32)
    assert beyond.tolist() == [448.0, -448.0, 0.3125]


def test_unsigned_codes_may_be_symmetric_about_their_middle() -> None:
    scheme = IntegerScheme("uint8", True, "int8", per_channel=True, bias="int32")
    found = activation_grid(Range(-1, 4), scheme)
    assert found.zero_point == 128
    assert (255 - 128) * found.scale == pytest.approx(4)


# Groups


@pytest.mark.parametrize(
    ("body", "shape", "weights"),
    [
        ("y = MatMul(x, w)", "N,64", {"w": random(1, 64, 8)}),
        ("y = Gemm<transB=1>(x, w, b)", "N,64", {"w": random(1, 8, 64), "b": random(2, 8)}),
        ("y = Conv(x, w)", "N,64,4,4", {"w": random(1, 8, 64, 3, 3)}),
    ],
)
def test_smaller_groups_lose_less(body: str, shape: str, weights: dict[str, Array]) -> None:
    weights = dict(weights)
    # Inputs of very different size, a constant and an empty one: what a scale of their own is for.
    axis = 0 if "MatMul" in body else 1
    size = np.exp(random(7, 64) * 2).reshape([-1 if one == axis else 1 for one in range(weights["w"].ndim)])
    weights["w"] = (weights["w"] * size).astype(np.float32)
    samples = random(3, *[16 if dim == "N" else int(dim) for dim in shape.split(",")])
    errors = {}
    for group in ("tensor", "channel", "16"):
        model = model_of(body, shape, weights)
        options = {"weights": "int4", "group": group, "ranges": "minmax", "activations": "int16"}
        result = quantize(model, samples, "portable", mode="static", **options)
        errors[group] = float(np.square(result.before - result.after).mean())
        node = next(node for node in result.model.graph if node.op_type in ("MatMul", "Gemm", "Conv"))
        scales = array_of(node.inputs[1].producer().inputs[1])  # type: ignore[union-attr]
        assert scales.size == {"tensor": 1, "channel": 8, "16": weights["w"].size // 16}[group]
        assert walk.opset(result.model) == 21
    assert errors["16"] < errors["channel"] < errors["tensor"]


def test_a_block_that_does_not_fit_gives_way_to_channels() -> None:
    model = model_of("y = MatMul(x, w)", "N,24", {"w": random(1, 24, 8)})
    result = quantize(model, random(2, 16, 24), "portable", mode="static", group="16")
    node = made_by(result.model, "MatMul")[0]
    assert array_of(node.inputs[1].producer().inputs[1]).shape == (8,)  # type: ignore[union-attr]


def test_a_weight_without_one_output_axis_has_one_scale() -> None:
    model = model_of("y = MatMul(x, w)", "N,4,6,24", {"w": random(1, 4, 24, 8)})
    result = quantize(model, random(2, 8, 4, 6, 24), mode="static", group="channel")
    node = made_by(result.model, "MatMul")[0]
    assert array_of(node.inputs[1].producer().inputs[1]).shape == ()  # type: ignore[union-attr]
    assert result.error < 4 / STEPS


# What cannot be


@pytest.mark.parametrize(
    ("target", "options", "message", "hint"),
    [
        ("ort-cpu-x86", {"activations": "int16"}, "no kernels", "activations=uint8:weights=int8"),
        ("ort-cpu-x86", {"weights": "int4"}, "no kernels", "weights=int8"),
        ("tensorrt", {"activations": "uint8"}, "no kernels", "activations=int8"),
        ("tensorrt", {"symmetric": False}, "no kernels", "symmetric=true"),
        ("ort-cpu-x86", {"group": "32"}, "blocks of 32", "quant:mode=weights"),
        ("portable", {"group": "48"}, "`group` cannot be `48`", "a power of two"),
        ("portable", {"group": "rows"}, "`group` cannot be `rows`", "tensor, channel"),
        ("portable", {"ranges": "p30"}, "ranges cannot be `p30`", "minmax"),
        ("ort-cpu-x86", {"solver": "awq"}, "no `solver=awq`", "rtn"),
        ("ort-cpu-x86", {"mode": "dynamic", "activations": "int8"}, "no use for `activations`", "mode=static"),
        ("ort-cpu-x86", {"mode": "weights", "symmetric": True}, "no use for `symmetric`", "mode=static"),
        ("ort-cpu-x86", {"mode": "weights", "ranges": "minmax"}, "no use for `ranges`", "mode=static"),
    ],
)
def test_what_cannot_be_says_what_can(target: str, options: dict[str, Any], message: str, hint: str) -> None:
    model = model_of(CONV, "N,3,8,8", CONV_WEIGHTS)
    samples = IMAGES if options.get("mode", "static") == "static" else IMAGES[:2]
    with pytest.raises(UsageError, match=message) as caught:
        quantize(model, samples, target, **{"mode": "static", **options})
    assert hint in (caught.value.hint or "")
    assert not made_by(model, "QuantizeLinear")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_broken_weight_is_named(value: float) -> None:
    weight = random(1, 16, 3, 3, 3)
    weight[0, 0, 0, 0] = value
    with pytest.raises(GraphoptError) as caught:
        quantize(model_of("y = Conv(x, w)", "N,3,8,8", {"w": weight}), IMAGES, mode="static")
    assert caught.value.hint


def test_what_is_quantized_already_is_kept_and_never_quantized_twice() -> None:
    body = "a = Conv(x, w) t = Tanh(a) c = Conv(t, v) y = MatMul(c, m)"
    weights = {"w": random(1, 16, 3, 1, 1), "v": random(2, 8, 16, 1, 1), "m": random(3, 8, 8)}
    half = quantize(model_of(body, "N,3,8,8", weights), IMAGES, mode="static", include=("conv0", "matmul3"))
    kept, count = {node.name for node in half.model.graph}, half.ops["QuantizeLinear"]
    whole = quantize(half.model, IMAGES, mode="static")
    assert whole.notes[0].startswith("kept what is quantized already")
    assert kept <= {node.name for node in whole.model.graph}
    assert whole.ops["QuantizeLinear"] > count
    for node in made_by(whole.model, "QuantizeLinear"):
        producer = node.inputs[0].producer()  # type: ignore[union-attr]
        assert producer is None or producer.op_type != "DequantizeLinear"
    with pytest.raises(PassError, match="already quantized") as caught:
        quantize(whole.model, IMAGES, mode="static")
    assert caught.value.hint == "start from the float model"


# Opsets


@pytest.mark.parametrize("opset", [8, 11])
def test_old_opsets_are_converted(opset: int, tmp_path: Path) -> None:
    result = quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS, opset=opset), IMAGES, mode="static")
    assert walk.opset(result.model) == 13
    assert f"opset {opset} → 13" in result.notes[0]
    assert fused(result.model, tmp_path)["QLinearConv"] == 1
    assert result.error < 4 / STEPS


def test_where_conversion_fails_there_is_one_scale_per_weight_or_an_error() -> None:
    """Opset 11 has no Gelu, but a runtime may have one."""
    model = model_of("c = Conv(x, w, b) y = Elu(c)", "N,3,8,8", CONV_WEIGHTS, opset=11)
    model.graph.node(1).op_type = "Gelu"
    ctx = Context(model, Rewriter(model), X86, OnnxRuntime(), threads=1)
    assert X86.static is not None
    plan = StaticPlan(X86.static, "channel", RangeMethod())
    assert in_opset(model, ctx, plan).group == "tensor"
    assert "one scale per weight: opset 11" in ctx.notes[0].text
    assert walk.opset(model) == 11
    with pytest.raises(PassError, match="needs opset 21") as caught:
        in_opset(model, ctx, replace(plan, group=32))
    assert caught.value.hint == "export the model with opset 21 or later"


# Before


def test_channels_are_made_up_to_what_the_kernel_reads(tmp_path: Path) -> None:
    result = quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS), IMAGES, mode="static")
    (conv,) = made_by(result.model, "Conv")
    codes = array_of(conv.inputs[1].producer().inputs[0])  # type: ignore[union-attr]
    assert codes.shape == (16, 4, 3, 3)
    assert not codes[:, 3].any()
    ran = fused(result.model, tmp_path)
    assert (ran["QLinearConv"], ran["Pad"], ran["QuantizeLinear"]) == (1, 1, 1)
    assert result.error < 4 / STEPS


@pytest.mark.parametrize(
    ("body", "shape"),
    [("y = Conv(x, w)", (16, 3, 1, 1)), ("y = Conv(x, w)", (8, 3, 3, 3)), ("y = Conv<group=3>(x, w)", (48, 1, 3, 3))],
)
def test_channels_are_left_where_another_kernel_runs_anyway(body: str, shape: tuple[int, ...]) -> None:
    result = quantize(model_of(body, "N,3,8,8", {"w": random(1, *shape)}), IMAGES, mode="static")
    assert result.ops["Pad"] == 0


@pytest.mark.parametrize(
    "mean", ["m = ReduceMean<axes=[2,3], keepdims=0>(r) y = Identity(m)", "y = GlobalAveragePool(r)"]
)
def test_a_mean_nobody_reads_in_integers_is_a_product_that_gives_floats(mean: str, tmp_path: Path) -> None:
    body = "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) " + mean
    model = model_of(body, "N,3,8,8", CONV_WEIGHTS)
    result = quantize(model, IMAGES, mode="static")
    ran = fused(result.model, tmp_path)
    assert ran["MatMulIntegerToFloat"] == 1
    assert ran["DequantizeLinear"] == ran["ReduceMean"] == ran["GlobalAveragePool"] == 0
    assert ran["Transpose"] == 1  # of the input; the layout of the Conv is the one rows are read in
    assert result.before.shape == result.after.shape
    assert result.error < 4 / STEPS


def test_a_mean_read_in_integers_is_a_pool(tmp_path: Path) -> None:
    body = "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) m = ReduceMean<axes=[2,3], keepdims=0>(r) y = MatMul(m, h)"
    result = quantize(model_of(body, "N,3,8,8", CONV_WEIGHTS | {"h": random(5, 16, 4)}), IMAGES, mode="static")
    ran = fused(result.model, tmp_path)
    assert ran["QLinearGlobalAveragePool"] == ran["MatMulIntegerToFloat"] == 1
    assert result.error < 6 / STEPS


def test_a_mean_over_an_image_of_any_size_stays() -> None:
    body = "c = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(c) y = GlobalAveragePool(r)"
    result = quantize(model_of(body, "N,3,H,W", CONV_WEIGHTS), IMAGES, mode="static")
    assert result.ops["GlobalAveragePool"] == 1
    assert result.ops["MatMul"] == 0


# Who rounds


def rounded_by(model: ir.Model, rounder: Any) -> Array:
    data = open_data({"x": IMAGES}, model)
    ctx = Context(model, Rewriter(model), X86, OnnxRuntime(), threads=1, data=data)
    assert X86.static is not None
    quantize_static(
        model, ctx, Selection(), StaticPlan(X86.static, "channel", RangeMethod()), without_data("rtn", rounder)
    )
    verify(model)
    return run(model, IMAGES[:2])


def test_a_rounder_sees_each_layer_behind_what_is_quantized_already() -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) f = Flatten(r) y = Gemm<alpha=0.5>(f, h, hb)"
    model = model_of(body, "N,3,8,8", CONV_WEIGHTS | {"h": random(5, 1024, 4), "hb": random(6, 4)})
    seen: list[tuple[str, str, tuple[int, ...]]] = []

    def rounder(task: WeightTask) -> RoundedWeight:
        producer = task.quantized_input.producer()
        assert producer is not None
        assert task.bias is not None
        seen.append((task.layer.node.op_type, producer.op_type, task.matrix().shape))
        answer = nearest(task)
        return RoundedWeight(answer.weight, task.bias + 1)

    plain, moved = rounded_by(model.clone(), nearest), rounded_by(model, rounder)
    assert seen == [("Conv", "DequantizeLinear", (16, 27)), ("Gemm", "DequantizeLinear", (4, 1024))]
    assert np.abs(moved - plain).min() > 0.1  # what is added to the bias of the Conv is there, as is the Gemm's


def test_codes_of_a_rounder_are_those_of_the_model() -> None:
    def zeros(task: WeightTask) -> RoundedWeight:
        weight = nearest(task).weight
        return RoundedWeight(replace(weight, codes=np.zeros_like(weight.codes)), task.bias)

    model = model_of("y = Conv(x, w, b)", "N,3,8,8", CONV_WEIGHTS)
    result = rounded_by(model, zeros)
    assert np.abs(result - CONV_WEIGHTS["b"].reshape(1, 16, 1, 1)).max() < 0.1


def test_a_solver_that_searches_loses_no_more_of_the_weights() -> None:
    options = {"weights": "int4", "activations": "int16", "ranges": "minmax"}
    errors = [
        quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS), IMAGES, "portable", mode="static", solver=name, **options)
        for name in ("rtn", "mse")
    ]
    found = [float(np.square(one.before - one.after).mean()) for one in errors]
    assert found[1] < found[0]


@pytest.mark.parametrize("ranges", ["minmax", "average", "p99.9", "kl", "mse", "sqnr"])
def test_every_kind_of_range(ranges: str) -> None:
    result = quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS), IMAGES, mode="static", ranges=ranges)
    assert result.error < 0.2
    assert result.ops == Counter({"QuantizeLinear": 2, "DequantizeLinear": 4, "Conv": 1, "Pad": 1})


@pytest.mark.parametrize("ranges", ["minmax", "p99.99", "kl"])
def test_values_that_overflow_are_named(ranges: str) -> None:
    model = model_of("e = Exp(x) y = Conv(e, w)", "N,3,8,8", {"w": random(1, 16, 3, 1, 1)})
    with pytest.raises(DataError, match="`e` becomes NaN or infinite") as caught:
        quantize(model, IMAGES * 1000, mode="static", ranges=ranges)
    assert caught.value.hint
    assert not made_by(model, "QuantizeLinear")


def test_channels_that_are_zero_or_constant_keep_their_values() -> None:
    weight = random(1, 16, 3, 3, 3)
    weight[3], weight[4] = 0, 0.25
    bias = random(2, 16)
    bias[5] = 0
    for options in ({}, {"target": "portable", "weights": "uint8"}, {"target": "portable", "weights": "int4"}):
        model = model_of(CONV, "N,3,8,8", {"w": weight, "b": bias})
        result = quantize(model, IMAGES, mode="static", **options)
        assert np.isfinite(result.after).all()
        empty = result.after[:, 3]
        assert np.abs(empty - max(bias[3], 0)).max() < 2 * np.ptp(result.before) / STEPS


@pytest.mark.parametrize(
    "body", ["y = MatMul(x, w)", "m = MatMul(x, w) y = Relu(m)", "a = MatMul(x, w) y = MatMul(a, v)"]
)
@pytest.mark.parametrize("code", ["float8e4m3fn", "float8e5m2"])
def test_products_on_floats_of_eight_bits_run(code: str, body: str) -> None:
    """ONNX Runtime makes operators of them that take no floats, unless it is kept from that; this is said."""
    weights = {"w": random(1, 64, 64)} | ({"v": random(2, 64, 64)} if "v" in body else {})
    samples = random(3, 32, 4, 64)
    result = quantize(
        model_of(body, "N,4,64", weights), samples, "portable", mode="static", activations=code, weights=code
    )
    expected = run(result.model, samples[:2])
    np.testing.assert_allclose(run(result.model, samples[:2], optimize=True), expected, rtol=1e-4, atol=1e-3)
    assert any("session.disable_quant_qdq" in note for note in result.notes)


@pytest.mark.parametrize("solver", ["mse", "gptq"])
def test_solvers_that_know_no_floats_of_eight_bits_are_refused(solver: str) -> None:
    options = {"activations": "float8e4m3fn", "weights": "float8e4m3fn", "solver": solver}
    with pytest.raises(UsageError, match=f"`solver={solver}` knows no floats") as caught:
        quantize(model_of(CONV, "N,3,8,8", CONV_WEIGHTS), IMAGES, "portable", mode="static", **options)
    assert "leave `solver` out" in (caught.value.hint or "")
