"""Where quantization puts Q and DQ on each target, rule by rule, and what ONNX Runtime makes of it."""

from __future__ import annotations

import importlib.util
from collections import Counter
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import walk
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.passes.analyses.integer_units import integer_units
from graphopt.passes.analyses.selection import Selection
from graphopt.passes.lossy.quant import Quant
from graphopt.passes.raising.runtime_operators import RuntimeOperators
from graphopt.rewriter import Rewriter

from .quant_runs import STEPS, Array, fused, model_of, quantize, random, run

pytestmark = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")

IMAGES = random(3, 16, 16, 8, 8)
WIDE = {"w": random(1, 32, 16, 3, 3), "b": random(2, 32), "v": random(4, 32, 32, 3, 3), "u": random(5, 32, 16, 1, 1)}


def is_quantized(value: ir.Value | None) -> bool:
    """Return whether a value comes from codes."""
    producer = value.producer() if value is not None else None
    return producer is not None and producer.op_type == "DequantizeLinear"


def is_stored(value: ir.Value | None) -> bool:
    """Return whether a value comes from codes that are stored in the model."""
    assert value is not None
    producer = value.producer()
    return is_quantized(value) and producer is not None and walk.constant_tensor(producer.inputs[0]) is not None


def readers(value: ir.Value) -> list[str]:
    return sorted(use.node.op_type for use in value.uses())


def node_of(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in model.graph if node.name == name)


def codes(model: ir.Model) -> set[tuple[str, bool]]:
    """Return dtype of codes and whether all zero points are 0, of every QuantizeLinear."""
    found = set()
    for node in model.graph:
        if node.op_type == "QuantizeLinear":
            zero_point = walk.constant_tensor(node.inputs[2])
            assert zero_point is not None
            found.add((zero_point.dtype.name, not np.asarray(zero_point.numpy(), np.float32).any()))
    return found


# TensorRT


def tensorrt(body: str, shape: str, constants: dict[str, Array], samples: Array, **options: Any) -> ir.Model:
    result = quantize(model_of(body, shape, constants), samples, "tensorrt", mode="static", **options)
    assert result.error < 0.15
    return result.model


def test_tensorrt_quantizes_inputs_and_weights_but_no_output_and_no_bias() -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, v)"
    model = tensorrt(body, "N,16,8,8", WIDE, IMAGES)
    first, relu, second = (node_of(model, name) for name in ("conv0", "relu1", "conv2"))
    assert is_quantized(first.inputs[0])
    assert is_stored(first.inputs[1])
    assert first.inputs[2] is not None
    assert first.inputs[2].dtype == ir.DataType.FLOAT
    assert readers(first.outputs[0]) == ["Relu"]  # no Q between Conv and Relu
    assert readers(relu.outputs[0]) == ["QuantizeLinear"]
    assert second.outputs[0].is_graph_output()
    assert codes(model) == {("INT8", True)}
    outcome = quantize(model_of(body, "N,16,8,8", WIDE), IMAGES, "tensorrt", mode="static")
    assert outcome.notes == [
        "2 of 2 Conv in integers; ranges by `p99.999`, weights by `gptq`"
    ]  # what reads floats is nothing that was left


def test_a_bias_of_one_number_for_each_row_is_none_for_each_output() -> None:
    weights = {"w": random(1, 64, 32), "c": random(2, 32, 1, scale=9.0)}
    model, x = model_of("y = Gemm(x, w, c)", "32,64", weights), random(3, 32, 64)
    data = open_data({"x": random(4, 64, 64)}, model)
    before = run(model, x)
    ctx = Context(model, Rewriter(model), TARGETS["tensorrt"], OnnxRuntime(), threads=1, data=data)
    Quant(mode="static").run(model, ctx)
    assert np.abs(run(model, x) - before).max() < 0.02 * np.ptp(before)


def test_tensorrt_fp8() -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, v)"
    model = tensorrt(body, "N,16,8,8", WIDE, IMAGES, activations="float8e4m3fn", weights="float8e4m3fn")
    assert codes(model) == {("FLOAT8E4M3FN", True)}
    assert walk.opset(model) >= 19


def test_tensorrt_fp8_leaves_large_kernels() -> None:
    model = model_of("y = Conv<pads=[3,3,3,3]>(x, w)", "N,16,8,8", {"w": random(1, 32, 16, 7, 7)})
    target = TARGETS["tensorrt"]
    for scheme, left in ((target.static, 0), (target.alternatives[0], 1)):
        assert scheme is not None
        assert integer_units(model, target, scheme, Selection()).left.total() == left


def test_tensorrt_quantizes_the_identity_branch_of_a_residual_and_leaves_the_other_to_its_conv() -> None:
    body = """a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, v) s = Add(c, r) q = Relu(s)
              y = Conv<pads=[1,1,1,1]>(q, v)"""
    model = tensorrt(body, "N,16,8,8", WIDE, IMAGES)
    relu, conv, add = (node_of(model, name) for name in ("relu1", "conv2", "add3"))
    assert add.inputs[0] is conv.outputs[0]
    assert is_quantized(add.inputs[1])
    assert readers(relu.outputs[0]) == ["QuantizeLinear"]  # one for the layer and the Add
    assert readers(add.outputs[0]) == ["Relu"]
    assert add.inputs[1] is conv.inputs[0]


def test_tensorrt_leaves_the_last_of_two_layers_to_the_add() -> None:
    body = """a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) c = Conv<pads=[1,1,1,1]>(r, v) d = Conv(x, u) s = Add(c, d)
              y = Relu(s)"""
    add = node_of(tensorrt(body, "N,16,8,8", WIDE, IMAGES), "add4")
    assert is_quantized(add.inputs[0])
    assert not is_quantized(add.inputs[1])


@pytest.mark.parametrize("body", ["t = Tanh(x) y = Add(t, x)", "a = Conv(x, u) y = Add(a, k)"])
def test_tensorrt_leaves_sums_without_a_layer_or_of_a_constant(body: str) -> None:
    model = tensorrt(body, "N,16,8,8", {"u": WIDE["u"], "k": random(6, 1, 32, 1, 1)}, IMAGES)
    assert not any(is_quantized(value) for node in model.graph if node.op_type == "Add" for value in node.inputs)


@pytest.mark.parametrize(
    ("shape", "group", "channels", "quantized"),
    [
        ((32, 16, 3, 3), 1, 16, True),
        ((32, 3, 3, 3), 1, 3, False),  # the first layer of most networks
        ((8, 16, 3, 3), 1, 16, True),  # a multiple of 8, its kernel square
        ((8, 16, 1, 3), 1, 16, False),
        ((12, 16, 3, 3), 1, 16, False),
        ((8, 1, 3, 3), 8, 8, True),  # depthwise
        ((8, 1, 1, 1), 8, 8, False),
    ],
)
def test_tensorrt_leaves_small_convolutions(shape: tuple[int, ...], group: int, channels: int, quantized: bool) -> None:
    model = model_of(f"y = Conv<group={group}>(x, w)", f"N,{channels},8,8", {"w": random(1, *shape)})
    units = integer_units(model, TARGETS["tensorrt"], TARGETS["tensorrt"].static, Selection())  # type: ignore[arg-type]
    assert bool(units.units) == quantized
    if not quantized:
        assert units.left == {("Conv", "fewer than 16 channels"): 1}


@pytest.mark.parametrize(
    ("shape", "weight", "reason"),
    [
        ("N,64", (64, 32), None),
        ("N,64", (64, 8), "fewer than 16 inputs or outputs"),
        ("N,8", (8, 32), "fewer than 16 inputs or outputs"),
        ("1,64", (64, 32), "a product with a vector"),
        ("1,1,64", (64, 32), "a product with a vector"),
    ],
)
def test_tensorrt_leaves_small_products(shape: str, weight: tuple[int, int], reason: str | None) -> None:
    model = model_of("y = MatMul(x, w)", shape, {"w": random(1, *weight)})
    units = integer_units(model, TARGETS["tensorrt"], TARGETS["tensorrt"].static, Selection())  # type: ignore[arg-type]
    assert units.left == ({("MatMul", reason): 1} if reason else {})


def test_tensorrt_leaves_products_of_two_activations() -> None:
    body = "q = MatMul(x, w) t = Transpose<perm=[0,2,1]>(x) s = MatMul(q, t) y = Softmax(s)"
    model = tensorrt(body, "N,8,32", {"w": random(1, 32, 32)}, random(2, 8, 8, 32))
    assert is_quantized(node_of(model, "matmul0").inputs[0])
    assert not is_quantized(node_of(model, "matmul2").inputs[0])


# ONNX Runtime's CPU provider, OpenVINO, portable


@pytest.mark.parametrize(
    ("target", "dtype"),
    [("ort-cpu-x86", "UINT8"), ("ort-cpu-arm", "INT8"), ("openvino", "UINT8"), ("portable", "UINT8")],
)
def test_targets_that_rescale_in_integers_quantize_outputs_and_biases(target: str, dtype: str) -> None:
    body = "a = Conv<pads=[1,1,1,1]>(x, w, b) r = Relu(a) y = Conv<pads=[1,1,1,1]>(r, v)"
    result = quantize(model_of(body, "N,16,8,8", WIDE), IMAGES, target, mode="static")
    first = node_of(result.model, "conv0")
    assert readers(first.outputs[0]) == ["QuantizeLinear"]
    assert is_stored(first.inputs[2])
    assert first.inputs[2].producer().inputs[0].dtype == ir.DataType.INT32  # type: ignore[union-attr]
    assert {name for name, _ in codes(result.model)} == {dtype}
    assert result.ops["Relu"] == 0
    assert result.error < 8 / STEPS


def test_seven_bits_where_sums_saturate() -> None:
    model = model_of("y = Conv(x, w)", "N,16,8,8", {"w": WIDE["w"]})
    for target, highest in (("ort-cpu-x86", 127), ("ort-cpu-x86-avx2", 63)):
        made = quantize(model.clone(), IMAGES, target, mode="static").model
        weight = walk.constant_tensor(node_of(made, "conv0").inputs[1].producer().inputs[0])  # type: ignore[union-attr]
        assert weight is not None
        assert np.abs(weight.numpy().astype(int)).max() == highest


@pytest.mark.parametrize(
    "body",
    [
        "y = Conv(x, w, b)",
        "a = Conv(x, w) r = Relu(a) y = MaxPool<kernel_shape=[2,2]>(r)",
        "a = Conv(x, w) t = Tanh(a) s = Add(t, a) y = Sigmoid(s)",
        "a = Conv(x, w) y = Softmax(a)",
    ],
)
def test_what_is_given_out_is_float_and_what_gains_nothing_is_left(body: str, tmp_path: Path) -> None:
    result = quantize(model_of(body, "N,16,8,8", WIDE), IMAGES, mode="static")
    ran = fused(result.model, tmp_path)
    assert ran["QLinearConv"] == 1
    assert ran["QuantizeLinear"] == 1
    assert result.model.graph.outputs[0].dtype == ir.DataType.FLOAT
    assert ran["DequantizeLinear"] == (2 if "Add" in body else 1)  # the runtime makes one for each reader


ATTENTION = "q = MatMul(x, w) t = Transpose<perm=[0,2,1]>(x) s = MatMul(q, t) p = Mul(s, c)"


def test_products_of_two_activations_run_in_integers(tmp_path: Path) -> None:
    samples, constants = random(2, 8, 8, 32), {"w": random(1, 32, 32), "c": np.float32(0.5).reshape(())}
    result = quantize(model_of(f"{ATTENTION} y = Tanh(p)", "N,8,32", constants), samples, mode="static", solver="rtn")
    ran = fused(result.model, tmp_path)
    assert ran["QLinearMatMul"] + ran["MatMulIntegerToFloat"] == 2
    assert ran["MatMul"] == 0


@pytest.mark.parametrize(("target", "in_float"), [("ort-cpu-x86", 2), ("ort-cpu-arm", 0)])
def test_attention_stays_float_where_the_runtime_has_it_as_one_operator(target: str, in_float: int) -> None:
    body = f"{ATTENTION} e = Softmax(p) y = MatMul(e, x)"
    constants = {"w": random(1, 32, 32), "c": np.float32(0.5).reshape(())}
    result = quantize(model_of(body, "N,8,32", constants), random(2, 8, 8, 32), target, mode="static", solver="rtn")
    products = [node for node in result.model.graph if node.op_type == "MatMul"]
    assert sum(not is_quantized(node.inputs[1]) for node in products) == in_float
    assert any("attention" in note for note in result.notes) == bool(in_float)


@pytest.mark.parametrize(("rows", "bias_in_codes"), [("N,4,32", False), ("N,32", True)])
def test_a_product_takes_its_bias_in_codes_only_where_the_runtime_joins_the_two(
    rows: str, bias_in_codes: bool, tmp_path: Path
) -> None:
    model = model_of("p = MatMul(x, w) y = Add(p, b)", rows, {"w": random(1, 32, 32), "b": random(2, 32)})
    samples = random(3, *(6 if size == "N" else int(size) for size in rows.split(",")))
    result = quantize(model, samples, mode="static", solver="rtn")
    (adder,) = [node for node in result.model.graph if node.op_type == "Add"]
    assert is_quantized(adder.inputs[1]) == bias_in_codes
    assert fused(result.model, tmp_path)["DequantizeLinear"] == 0


def test_runtime_operators_give_an_integer_product_its_bias(tmp_path: Path) -> None:
    weights = {"w": random(1, 32, 32), "b": random(2, 32)}
    model = model_of("p = MatMul(x, w) a = Add(p, b) y = Tanh(a)", "N,4,32", weights)
    result = quantize(model, random(3, 6, 4, 32), mode="static", solver="rtn")
    before = run(result.model, random(4, 2, 4, 32))
    ctx = Context(result.model, Rewriter(result.model), TARGETS["ort-cpu-x86"], OnnxRuntime(), threads=1)
    RuntimeOperators().run(result.model, ctx)
    assert dict(fused(result.model, tmp_path)) == {"QuantizeLinear": 1, "MatMulIntegerToFloat": 1, "Tanh": 1}
    np.testing.assert_allclose(run(result.model, random(4, 2, 4, 32)), before, atol=1e-5)


@pytest.mark.parametrize(
    ("body", "in_float"),
    [
        # It is at the beginning, with the narrow layer before it.
        ("a = Conv(x, f) d = Conv<group=16>(a, d16) b = Relu(d) y = Conv(b, w32)", 2),
        # It is at the end.
        ("a = Conv(x, w32) b = Conv(a, n) d = Conv<group=16>(b, d16) y = Tanh(d)", 1),
        # It is in between.
        ("a = Conv(x, w32) b = Conv(a, n) d = Conv<group=16>(b, d16) y = Conv(d, w32of16)", 0),
        # It is wide enough.
        ("a = Conv(x, w32) d = Conv<group=32>(a, d32) y = Tanh(d)", 0),
        # It is wide enough, but nothing around it is in integers.
        ("e = Concat<axis=1>(x, x) d = Conv<group=32>(e, d32) y = Tanh(d)", 1),
        # Groups of 8 channels, at the beginning, behind a narrow layer, and at the end; and of 32.
        ("a = Conv(x, f) g = Conv<group=2>(a, g8) y = Conv(g, w32)", 0),
        ("g = Conv<group=2>(x, g8) y = Conv(g, w32)", 1),
        ("a = Conv(x, w32) b = Conv(a, n) g = Conv<group=2>(b, g8) y = Tanh(g)", 1),
        ("a = Conv(x, w64) g = Conv<group=2>(a, g32) y = Tanh(g)", 0),
        # One output of several channels is no depthwise convolution.
        ("a = Conv(x, w32) y = Conv(a, one)", 0),
    ],
)
def test_convolutions_with_slow_kernels_stay_float_at_the_ends_of_integers(body: str, in_float: int) -> None:
    weights = {
        "f": random(1, 16, 16, 1, 1),
        "w32": random(2, 32, 16, 1, 1),
        "w32of16": random(2, 32, 16, 1, 1),
        "n": random(3, 16, 32, 1, 1),
        "one": random(4, 1, 32, 1, 1),
        "d16": random(5, 16, 1, 3, 3),
        "d32": random(6, 32, 1, 3, 3),
        "g8": random(7, 16, 8, 3, 3),
        "w64": random(8, 64, 16, 1, 1),
        "g32": random(9, 64, 32, 3, 3),
    }
    result = quantize(model_of(body, "N,16,8,8", weights), IMAGES, mode="static", solver="rtn")
    convolutions = [node for node in result.model.graph if node.op_type == "Conv"]
    assert sum(not is_quantized(node.inputs[1]) for node in convolutions) == in_float


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin"])
def test_extremes_are_taken_of_the_codes(op: str, tmp_path: Path) -> None:
    body = f"a = Conv(x, w32) m = {op}<axes=[2], keepdims=1>(a) y = Conv(m, v)"
    weights = {"w32": random(2, 32, 16, 1, 1), "v": random(4, 32, 32, 1, 1)}
    result = quantize(model_of(body, "N,16,8,8", weights), IMAGES, mode="static", solver="rtn")
    ran = fused(result.model, tmp_path)
    del ran["Transpose"]  # to the layout its convolutions want, and back
    assert dict(ran) == {"QuantizeLinear": 1, "QLinearConv": 2, op: 1, "DequantizeLinear": 1}


@pytest.fixture(scope="module")
def score(shared: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("score", shared / "assets" / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        # What is not in integers of a whole network: the way in, and the way out.
        ("squeezenet", {"QuantizeLinear": 1}),
        ("resnet20", {"QuantizeLinear": 1}),
        ("mobilenet", {"QuantizeLinear": 1, "DequantizeLinear": 1}),
        ("digits", {"QuantizeLinear": 1}),
    ],
)
def test_everything_placed_in_a_real_network_fuses(
    name: str, kept: dict[str, int], score: ModuleType, tmp_path: Path
) -> None:
    source = Path(score.HERE) / "models" / str(score.ASSETS[name][0])
    data = {graphopt.load(source).graph.inputs[0].name: score.ASSETS[name][2](4)}
    result = graphopt.optimize(
        source, "quant:mode=static:solver=rtn", data=data, threads=2, verify="off", target="ort-cpu-x86"
    )
    layers = Counter(node.op_type for node in result.model.graph)
    ran = fused(result.model, tmp_path)
    assert {op: ran[op] for op in ("QuantizeLinear", "DequantizeLinear") if ran[op]} == kept
    # The first layers of MobileNet are narrow, one of them depthwise.
    in_float = 2 if name == "mobilenet" else 0
    assert ran["QLinearConv"] == layers["Conv"] - in_float
    assert ran["QGemm"] == layers["Gemm"]
    assert ran["MatMulIntegerToFloat"] == layers["MatMul"]
    assert ran["Conv"] == in_float
    assert ran["Gemm"] == ran["MatMul"] == ran["Relu"] == ran["Clip"] == 0


def test_one_calibration_serves_every_target(score: ModuleType, tmp_path: Path) -> None:
    source = Path(score.HERE) / "models" / str(score.ASSETS["digits"][0])
    data = {graphopt.load(source).graph.inputs[0].name: score.ASSETS["digits"][2](16)}
    here = "onnxruntime:provider=cpu"
    for target in ("ort-cpu-x86", "ort-cpu-arm", "tensorrt", "openvino", "portable"):
        output = tmp_path / f"{target}.onnx"
        report = graphopt.optimize(
            source, "quant:mode=static:solver=rtn", data=data, target=target, backend=here, output=output
        ).report
        assert report.ok, target
        onnx.checker.check_model(str(output))
