"""Weights of few bits: every form they are stored in computes what their codes say, and what is left is said."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import parser

from graphopt import walk
from graphopt.authoring import Context, Need
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.errors import PassError, UsageError
from graphopt.passes.lossy.packed_codes import packed, packed_codes, unpacked
from graphopt.passes.lossy.quant import Quant
from graphopt.passes.lossy.weight_plan import weight_plan
from graphopt.passes.solvers.grid import Grid
from graphopt.rewriter import Rewriter
from graphopt.verify import verify

from .quant_runs import Array, fused, model_of, quantize, random, run

needs_runtime = pytest.mark.skipif(importlib.util.find_spec("onnxruntime") is None, reason="needs onnxruntime")
pytestmark = needs_runtime

# One target for each form: the runtime's operators computing in float, and in int8; DequantizeLinear.
FORMS = ["ort-cuda", "ort-cpu-x86", "portable"]
# Activations in int8 err by half a step of 127, and these errors add up; the rest is rounding of float32.
TOLERANCE = {"ort-cuda": 1e-5, "ort-cpu-x86": 0.02, "portable": 1e-5}


def on_grid(seed: int, outputs: int, inputs: int, bits: int = 4, block: int = 32) -> Array:
    """A weight [outputs, inputs] that symmetric codes of so many bits say exactly, block by block."""
    generator = np.random.default_rng(seed)
    low = -(1 << bits - 1)
    blocks = -(-inputs // block)
    codes = generator.integers(low, -low, (outputs, blocks, block))
    codes[:, :, 0] = low
    scales = 2.0 ** generator.integers(-6, -2, (outputs, blocks, 1))
    return (codes * scales).reshape(outputs, -1)[:, :inputs].astype(np.float32)


PRODUCTS = {
    "matrix": ("y = MatMul(x, w)", "2,5,64", (64, 48), False),
    "row times matrix": ("y = MatMul(x, w)", "1,64", (64, 48), False),
    "gemm": ("y = Gemm(x, w, b)", "6,64", (64, 48), False),
    "gemm and a row": ("y = Gemm(x, w, b)", "6,64", (64, 48), False),
    "gemm transposed": ("y = Gemm<transB=1>(x, w, b)", "6,64", (48, 64), True),
    "gemm with alpha": ("y = Gemm<alpha=0.5, transB=1>(x, w)", "6,64", (48, 64), True),
    "through a transpose": ("t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)", "2,5,64", (48, 64), True),
    "from the left": ("y = MatMul(w, x)", "2,64,5", (48, 64), True),
    "twice": ("a = MatMul(x, w) b = Relu(x) c = MatMul(b, w) y = Add(a, c)", "2,5,64", (64, 48), False),
    "inputs no multiple of the block": ("y = MatMul(x, w)", "2,5,50", (50, 48), False),
}


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("name", PRODUCTS)
def test_products_compute_what_the_codes_say(name: str, target: str) -> None:
    body, shape, (rows, columns), outputs_first = PRODUCTS[name]
    matrix = on_grid(1, rows, columns) if outputs_first else on_grid(1, columns, rows).T
    weights = {"w": np.ascontiguousarray(matrix)} | ({"b": random(2, 48)} if ", b)" in body else {})
    if name == "gemm and a row":
        weights["b"] = weights["b"].reshape(1, 48)
    result = quantize(model_of(body, shape, weights), None, target, mode="weights", weights="int4", solver="rtn")
    assert result.error < TOLERANCE[target]
    assert "w" not in result.model.graph.initializers
    expected = {"DequantizeLinear"} if target == "portable" else {"MatMulNBits"}
    assert expected <= set(result.ops)
    assert "MatMul" not in result.ops or target == "portable"
    # ONNX Runtime makes no MatMulNBits of a Gemm with another bias than a vector.
    biases = [node.inputs[2] for node in result.model.graph if node.op_type == "Gemm" and len(node.inputs) > 2]
    assert all(value is not None and value.shape is not None and len(value.shape) == 1 for value in biases)


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("code", ["int4", "uint4", "int8", "uint8", "int2", "uint2"])
@pytest.mark.parametrize("group", ["16", "32", "128"])
def test_formats_and_blocks(code: str, group: str, target: str) -> None:
    """Every width, symmetric or not, within half a step of the widest block; 2 bits where the target reads them."""
    bits = int(code.lstrip("uint"))
    scheme = TARGETS[target].weight_only
    assert scheme is not None
    if bits not in scheme.bits:
        with pytest.raises(UsageError, match=f"no weights of {bits} bits"):
            quantize(
                model_of("y = MatMul(x, w)", "3,256", {"w": random(1, 256, 8)}),
                None,
                target,
                mode="weights",
                weights=code,
            )
        return
    model = model_of("y = MatMul(x, w)", "3,256", {"w": random(1, 256, 48)})
    result = quantize(model, None, target, mode="weights", weights=code, group=group, solver="rtn")
    assert result.error < {2: 0.6, 4: 0.12, 8: 0.02}[bits]
    assert code in result.notes[-1] or code in result.notes[0]


@pytest.mark.parametrize("solver", ["rtn", "mse", "hqq", "gptq", "awq", "auto"])
def test_solvers_by_name(solver: str) -> None:
    samples = random(3, 64, 64)
    model = model_of(
        "a = MatMul(x, w) r = Relu(a) y = MatMul(r, v)", "N,64", {"w": random(1, 64, 64), "v": random(2, 64, 16)}
    )
    result = quantize(model, samples, "ort-cuda", mode="weights", weights="int4", solver=solver)
    named = "gptq" if solver == "auto" else solver
    assert f"`solver={named}`" in " ".join(result.notes)
    assert result.ops["MatMulNBits"] == 2
    assert result.error < 0.2


def test_without_data_the_scales_are_searched() -> None:
    model = model_of("y = MatMul(x, w)", "3,64", {"w": random(1, 64, 64)})
    assert "`solver=mse`" in " ".join(quantize(model, None, mode="weights", weights="int4").notes)
    assert Quant(mode="weights", weights="int4").needs >= {Need.CALIBRATION_OPTIONAL}
    assert Quant(mode="weights", weights="int4", solver="gptq").needs >= {Need.CALIBRATION}
    assert not Quant(mode="weights", weights="int4", solver="rtn").needs & {Need.CALIBRATION, Need.CALIBRATION_OPTIONAL}


def test_data_make_a_layer_better() -> None:
    """On inputs of very different sizes, what data tell is worth a lot."""
    generator = np.random.default_rng(0)
    samples = (generator.standard_normal((128, 8)) @ generator.standard_normal((8, 64))).astype(np.float32)
    samples += 0.1 * random(1, 128, 64)
    errors = {}
    for solver in ("rtn", "gptq"):
        model = model_of("y = MatMul(x, w)", "N,64", {"w": random(2, 64, 48)})
        result = quantize(model, samples, "ort-cuda", mode="weights", weights="int4", solver=solver)
        errors[solver] = float(np.square(result.before - result.after).mean())
    assert errors["gptq"] < 0.3 * errors["rtn"]


IDS = """<ir_version: 8, opset_import: ["" : 17]> g (int64[2, 3] i) => (float[2, 3, {width}] y) {{ {body} }}"""


def with_table(body: str, weights: dict[str, Array], width: int) -> ir.Model:
    from onnx import numpy_helper

    proto = parser.parse_model(IDS.format(body=body, width=width))
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    model: ir.Model = ir.from_proto(proto)
    return model


def on_ids(model: ir.Model) -> Array:
    with OnnxRuntime().open(model, threads=1) as session:
        feed = np.array([[0, 7, 49], [3, 3, 1]])
        return next(iter(session.run({"i": feed}).values()))


def run_on_table(model: ir.Model, target: str, **options: Any) -> tuple[float, Context]:
    before = on_ids(model)
    ctx = Context(model, Rewriter(model), TARGETS[target], OnnxRuntime(), threads=1)
    Quant(mode="weights", **options).run(model, ctx)
    verify(model)
    return float(np.abs(on_ids(model) - before).max() / np.abs(before).max()), ctx


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("code", ["int4", "uint4"])
@pytest.mark.parametrize("width", [64, 50])
def test_a_tied_table_is_stored_once_in_eight_bits(width: int, code: str, target: str) -> None:
    body = "e = Gather(w, i) t = Transpose<perm=[1,0]>(w) y = MatMul(e, t)"
    model = with_table(body, {"w": random(1, 50, width)}, 50)
    error, ctx = run_on_table(model, target, weights=code, solver="rtn")
    assert error < 0.02
    stored = [tensor for tensor in walk.stored_tensors(model) if tensor.nbytes > 1000]
    blocks = -(-width // 32)
    filled = width if target == "portable" else blocks * 32
    assert sum(tensor.nbytes for tensor in stored) <= 50 * filled + 50 * blocks * 4
    assert f"{code.replace('4', '8')} by 32: 1" in ctx.notes[-1].text
    if target != "portable":
        assert {node.op_type for node in model.graph} >= {"GatherBlockQuantized", "MatMulNBits"}


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("width", [64, 50])
def test_a_table_alone(width: int, target: str) -> None:
    model = with_table("y = Gather(w, i)", {"w": random(1, 50, width)}, width)
    error, _ = run_on_table(model, target, weights="int4", solver="rtn")
    assert error < 0.005
    expected = {"GatherBlockQuantized"} if target != "portable" else {"Gather", "DequantizeLinear"}
    assert {node.op_type for node in model.graph} >= expected


def test_float16_weights_have_float16_scales() -> None:
    for target in FORMS:
        matrix = np.ascontiguousarray(on_grid(1, 48, 64).T.astype(np.float16))
        model = model_of("h = Cast<to=10>(x) p = MatMul(h, w) y = Cast<to=1>(p)", "5,64", {"w": matrix})
        result = quantize(model, None, target, mode="weights", weights="int4", solver="rtn")
        assert result.error < 0.02
        assert any(tensor.dtype == ir.DataType.FLOAT16 for tensor in walk.stored_tensors(result.model))


def test_what_the_runtime_makes_of_the_standard_form(tmp_path: Path) -> None:
    """ONNX Runtime fuses each product with its own DequantizeLinear, but not one whose Relu it fuses first."""
    body = "a = MatMul(x, w) r = Sigmoid(a) b = MatMul(r, v) y = Sigmoid(b)"
    model = model_of(body, "4,64", {"w": random(1, 64, 64), "v": random(2, 64, 32)})
    result = quantize(model, None, "portable", mode="weights", weights="int4", solver="rtn")
    assert result.ops["DequantizeLinear"] == 2
    assert fused(result.model, tmp_path)["MatMulNBits"] == 2


@pytest.mark.parametrize("before", ["m = Mul(x, g)", "m = LayerNormalization(x, g, h)"])
def test_awq_scales_inputs_without_a_further_operator(before: str) -> None:
    """One input much larger than the rest: with its factor in the operator before, the layers lose less."""
    gain = np.ones(64, np.float32)
    gain[3] = 50
    weights = {"g": gain, "h": 0.1 * gain, "w": random(1, 64, 48), "v": random(2, 64, 32)}
    body = f"{before} a = MatMul(m, w) b = MatMul(m, v) y = Concat<axis=1>(a, b)"
    errors = {}
    for solver in ("mse", "awq"):
        model = model_of(body, "N,64", {name: one for name, one in weights.items() if f"{name}" in body})
        result = quantize(model, random(4, 64, 64), "ort-cuda", mode="weights", weights="int4", solver=solver)
        assert result.ops["MatMulNBits"] == 2
        assert sum(result.ops.values()) == 4
        errors[solver] = float(np.square(result.before - result.after).mean())
    assert errors["awq"] < 0.5 * errors["mse"]


def test_awq_says_where_nothing_takes_the_factors_in() -> None:
    body = "r = Relu(x) a = MatMul(r, w) m = Mul(a, g) b = MatMul(m, v) c = Neg(m) y = Concat<axis=1>(b, c)"
    weights = {"w": random(1, 64, 64), "g": random(2, 64), "v": random(3, 64, 64)}
    result = quantize(model_of(body, "N,64", weights), random(4, 32, 64), mode="weights", weights="int4", solver="awq")
    assert any("2 weights rounded without data" in note for note in result.notes)
    assert result.error < 0.2


def test_accuracy_level_is_the_targets() -> None:
    for target in ("ort-cuda", "ort-cpu-x86"):
        model = model_of("y = MatMul(x, w)", "4,64", {"w": random(1, 64, 64)})
        result = quantize(model, None, target, mode="weights", weights="int4", solver="rtn")
        scheme = TARGETS[target].weight_only
        assert scheme is not None
        node = next(node for node in result.model.graph if node.op_type == "MatMulNBits")
        assert node.attributes.get_int("accuracy_level", -1) == scheme.accuracy_level
        assert f"`accuracy_level={scheme.accuracy_level}`" in " ".join(result.notes)


BRANCHES = """
<ir_version: 8, opset_import: ["" : 17]>
g (float[4, 64] x, bool c) => (float[4, 48] y)
<float[64, 48] w>
{
    y = If (c) <
        then_branch = left () => (float[4, 48] a) { a = MatMul (x, w) },
        else_branch = right () => (float[4, 48] b) { n = Neg (x) b = MatMul (n, w) }
    >
}
"""


def test_weights_read_in_branches_are_stored_once() -> None:
    text = BRANCHES.replace("<float[64, 48] w>", "")
    proto = parser.parse_model(text)
    from onnx import numpy_helper

    proto.graph.initializer.append(numpy_helper.from_array(np.ascontiguousarray(on_grid(1, 48, 64).T), "w"))
    model = ir.from_proto(proto)
    x = random(2, 4, 64)

    def both() -> list[Array]:
        with OnnxRuntime().open(model, threads=1) as session:
            return [next(iter(session.run({"x": x, "c": np.array(flag)}).values())) for flag in (True, False)]

    before = both()
    data = open_data({"x": x[None], "c": np.array([True])}, model) if False else None
    ctx = Context(model, Rewriter(model), TARGETS["ort-cuda"], OnnxRuntime(), threads=1, data=data)
    Quant(mode="weights", weights="int4", solver="rtn").run(model, ctx)
    verify(model)
    for old, new in zip(before, both(), strict=True):
        np.testing.assert_allclose(old, new, rtol=1e-4, atol=1e-4)
    assert sum(tensor.size > 1000 for tensor in walk.stored_tensors(model)) == 1


FUNCTION = """
<ir_version: 8, opset_import: ["" : 17, "own" : 1]>
g (float[4, 64] x) => (float[4, 48] y) { y = own.layer (x) }
<domain: "own", opset_import: ["" : 17]>
layer (x) => (y) { w = Constant <value = float[64, 48] {WEIGHT}> () y = MatMul (x, w) }
"""


def test_weights_of_functions_stay_in_them() -> None:
    numbers = ", ".join(str(value) for value in on_grid(1, 48, 64).T.reshape(-1))
    model = ir.from_proto(parser.parse_model(FUNCTION.replace("{WEIGHT}", "{" + numbers + "}")))
    result = quantize(model, None, "ort-cuda", mode="weights", weights="int4", solver="rtn")
    assert result.error < 1e-5
    assert result.ops["MatMulNBits"] == 1


@pytest.mark.parametrize(
    ("body", "shape", "weights", "reason"),
    [
        ("y = MatMul(x, w)", "64", {"w": random(1, 64, 48)}, "multiplied by a vector"),
        ("a = MatMul(x, w) s = Neg(w) y = Add(a, s)", "64,64", {"w": random(1, 64, 64)}, "also read by Neg"),
        ("a = MatMul(x, w) y = MatMul(w, a)", "64,64", {"w": random(1, 64, 64)}, "as it is and transposed"),
        ("y = MatMul(x, w)", "4,8", {"w": random(1, 8, 4)}, "no smaller"),
    ],
)
def test_what_is_left_is_said(body: str, shape: str, weights: dict[str, Array], reason: str) -> None:
    result = quantize(model_of(body, shape, weights), None, "ort-cuda", mode="weights", weights="int4", solver="rtn")
    assert "MatMulNBits" not in result.ops
    assert any(reason in note for note in result.notes)
    assert result.error < 0.05


def test_excluded_layers_stay_float() -> None:
    body = "a = MatMul(x, w) y = MatMul(a, v)"
    model = model_of(body, "4,64", {"w": random(1, 64, 64), "v": random(2, 64, 64)})
    result = quantize(model, None, mode="weights", weights="int4", exclude=("matmul1",))
    assert result.ops["MatMulNBits"] == result.ops["MatMul"] == 1


def test_convolutions_beside_are_stored_as_int8() -> None:
    body = "c = Conv<pads=[1,1,1,1]>(x, k) f = Flatten(c) y = MatMul(f, w)"
    model = model_of(body, "2,3,8,8", {"k": random(1, 4, 3, 3, 3), "w": random(2, 256, 64)})
    result = quantize(model, None, mode="weights", weights="int4", solver="rtn")
    assert result.ops["MatMulNBits"] == result.ops["Conv"] == 1
    assert result.error < 0.2


def test_layers_that_data_cannot_reach_are_said() -> None:
    samples = random(3, 32, 64)
    body = "a = MatMul(x, w) b = MatMul(a, w) y = MatMul(b, v)"
    model = model_of(body, "N,64", {"w": random(1, 64, 64, scale=0.1), "v": random(2, 64, 64)})
    result = quantize(model, samples, "ort-cuda", mode="weights", weights="int4", solver="gptq")
    assert any("1 weights rounded without data" in note for note in result.notes)


def test_report_tells_of_each_layer() -> None:
    model = model_of("y = MatMul(x, w)", "3,64", {"w": random(1, 64, 64)})
    ctx = Context(model, Rewriter(model), TARGETS["ort-cpu-x86"], OnnxRuntime(), threads=1)
    Quant(mode="weights", weights="uint4", group="16").run(model, ctx)
    facts = next(note.facts for note in ctx.notes if "layers" in note.facts)
    (layer,) = facts["layers"]
    assert (layer["weight"], layer["format"], layer["group"]) == ("w", "uint4", 16)
    assert layer["output_error"] > 0
    # Codes of half a byte, a scale of 4 bytes for 16 of them, and a zero point of half a byte.
    assert layer["bytes"] == 64 * 64 // 2 + 64 * 4 * 4 + 64 * 2
    stored = sum(tensor.nbytes for tensor in walk.stored_tensors(model))
    assert layer["bytes"] == stored


@pytest.mark.parametrize(
    ("options", "target", "words"),
    [
        ({"weights": "float8e4m3fn"}, "ort-cpu-x86", "stored as integers"),
        ({"weights": "int4", "group": "48"}, "ort-cpu-x86", "group"),
        ({"weights": "int8", "group": "32"}, "tensorrt", "8 bits"),
        ({"weights": "int4", "group": "16"}, "tensorrt", "no blocks of 16"),
    ],
)
def test_what_a_target_cannot_read_is_refused(options: dict[str, str], target: str, words: str) -> None:
    model = model_of("y = MatMul(x, w)", "3,64", {"w": random(1, 64, 64)})
    with pytest.raises(UsageError, match=words) as caught:
        quantize(model, None, target, mode="weights", **options)
    assert caught.value.hint


@pytest.mark.parametrize("solver", ["rtn", "mse"])
@pytest.mark.parametrize("number", [np.nan, np.inf, -np.inf])
def test_a_weight_with_nan_or_infinity_is_an_error(number: float, solver: str) -> None:
    for inputs in (64, 50):
        weight = random(1, inputs, 64)
        weight[3, 4] = number
        model = model_of("y = MatMul(x, w)", f"3,{inputs}", {"w": weight})
        ctx = Context(model, Rewriter(model), TARGETS["ort-cpu-x86"], OnnxRuntime())
        with pytest.raises(PassError, match="NaN"):
            Quant(mode="weights", weights="int4", solver=solver).run(model, ctx)  # type: ignore[arg-type]


def test_twice_is_refused() -> None:
    for target in FORMS:
        model = model_of("y = MatMul(x, w)", "3,64", {"w": random(1, 64, 64)})
        result = quantize(model, None, target, mode="weights", weights="int4", solver="rtn")
        with pytest.raises(PassError, match="already quantized"):
            quantize(result.model, None, target, mode="weights", weights="int4")


def test_without_a_wish_int8_by_channel_is_stored_as_before() -> None:
    assert weight_plan(TARGETS["ort-cpu-x86"], None, None, "auto") is None
    assert weight_plan(TARGETS["ort-cpu-x86"], "int8", "channel", "rtn") is None


@given(st.sampled_from([2, 4, 8]), st.integers(1, 5), st.integers(1, 70), st.integers(0, 2**32 - 1))
@settings(max_examples=50, deadline=None)
def test_packing_is_undone_by_unpacking(bits: int, outputs: int, inputs: int, seed: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (outputs, inputs), dtype=np.uint8)
    data = packed(codes, bits)
    assert data.shape == (outputs, -(-inputs * bits // 8))
    np.testing.assert_array_equal(unpacked(data, bits, inputs), codes)


def test_low_bits_come_first_and_zero_is_the_middle() -> None:
    grid = Grid(4, block=4, narrow=False)
    codes = np.array([[-8, 7, 0, 1, -1]], np.int8)
    assert packed_codes(codes, grid).tolist() == [[[0xF0, 0x98], [0x87, 0x88]]]
    assert packed_codes(np.array([[1, 2, 3]], np.uint8), Grid(2, symmetric=False, block=4)).tolist() == [[[0b10111001]]]


def test_runs_on_an_older_opset_and_upgrades_for_the_standard_form() -> None:
    for target, opset in (("ort-cuda", 11), ("portable", 21)):
        model = model_of("y = MatMul(x, w)", "3,64", {"w": np.ascontiguousarray(on_grid(1, 48, 64).T)}, opset=11)
        result = quantize(model, None, target, mode="weights", weights="int4", solver="rtn")
        assert walk.opset(result.model) == opset
        assert run(result.model, random(1, 3, 64)).shape == (3, 48)
        assert result.error < 1e-5


@pytest.mark.parametrize("target", FORMS)
@pytest.mark.parametrize("group", ["32", "channel", "tensor"])
@pytest.mark.parametrize("code", ["int2", "uint2", "int4", "uint4"])
@pytest.mark.parametrize(("inputs", "outputs"), [(96, 37), (97, 66), (97, 36)])
def test_odd_sizes(inputs: int, outputs: int, code: str, group: str, target: str) -> None:
    """What the runtime makes of the file is what the file says, whether or not rows of codes fill whole bytes."""
    bits = int(code.lstrip("uint"))
    scheme = TARGETS[target].weight_only
    assert scheme is not None
    if bits not in scheme.bits:
        pytest.skip("refused there, see test_formats_and_blocks")
    model = model_of("y = MatMul(x, w)", f"33,{inputs}", {"w": random(1, inputs, outputs)})
    result = quantize(model, None, target, mode="weights", weights=code, group=group, solver="rtn")
    assert result.error < ({2: 0.75, 4: 0.3} if group != "32" else {2: 0.7, 4: 0.12})[bits]
    standard = target == "portable" or group != "32"
    left = any("misread by the target in 2 bits" in note for note in result.notes)
    assert left == (standard and bits == 2 and bool(outputs % 4))
    feed = random(5, 33, inputs)
    plain, as_fused = run(result.model, feed), run(result.model, feed, optimize=True)
    # Whatever it fuses computes in int8 at worst.
    np.testing.assert_allclose(as_fused, plain, atol=0.02 * float(np.ptp(plain)))


@pytest.mark.parametrize("body", ["y = Gemm<transB=1>(x, w)", "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t)"])
def test_two_bits_stored_outputs_first_need_no_whole_bytes(body: str) -> None:
    model = model_of(body, "33,97", {"w": random(1, 37, 97)})
    result = quantize(model, None, "portable", mode="weights", weights="int2", solver="rtn")
    assert result.error < 0.7
    assert "DequantizeLinear" in result.ops
    assert not any("misread" in note for note in result.notes)


@pytest.mark.parametrize("group", ["channel", "tensor"])
def test_scales_of_whole_channels_use_every_code(group: str) -> None:
    """A matrix of -2, -1, 0 and 1 is said exactly by two bits, as blocks say it."""
    matrix = np.random.default_rng(0).integers(-2, 2, (64, 48)).astype(np.float32)
    matrix[0] = -2
    result = quantize(
        model_of("y = MatMul(x, w)", "3,64", {"w": matrix}),
        None,
        "portable",
        mode="weights",
        weights="int2",
        group=group,
        solver="rtn",
    )
    # The runtime's MatMulNBits of 2 bits computes in int8.
    assert result.error < 0.02
