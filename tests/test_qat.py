"""Training on integer codes: gradients as published, codes on their grids, and what is written is what was trained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import PassError
from graphopt.model_io import load

from .pass_runs import loaded, outputs_of, run_passes

torch = pytest.importorskip("torch")

from graphopt.passes.recovery.constraints.latent_codes import CodeGrid, LatentCodes, grid_of  # noqa: E402
from graphopt.passes.recovery.constraints.masks import kept_of_codes  # noqa: E402
from graphopt.passes.recovery.constraints.scales import LearnedScale, LearnedZeroPoint, gradient_factor  # noqa: E402

from .trained_models import ALL_BUT_ADAPTERS, Trained, constrained, difference, is_exact  # noqa: E402

MODELS = Path(__file__).resolve().parents[1] / "models"
RNG = np.random.default_rng(0)
INPUTS, OUTPUTS = 32, 8
FEED = {"x": RNG.normal(0, 1, (16, INPUTS)).astype(np.float32)}
CLOSE = 1e-4  # sums of 32 products of numbers around 1 in float32


def product(
    codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray | None = None, **attributes: int
) -> onnx.ModelProto:
    """Return a MatMul by codes, without codes of its input."""
    constants = {"w": codes, "s": scales, **({} if zeros is None else {"z": zeros})}
    nodes = [
        helper.make_node("DequantizeLinear", list(constants), ["f"], "decode", **attributes),
        helper.make_node("MatMul", ["x", "f"], ["y"], "product"),
    ]
    return model_of(nodes, constants)


def model_of(nodes: Sequence[onnx.NodeProto], constants: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", INPUTS])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def some(low: int, high: int, dtype: Any, shape: tuple[int, ...] = (INPUTS, OUTPUTS)) -> np.ndarray:
    return RNG.integers(low, high + 1, shape).astype(dtype)


def steps(*shape: int) -> np.ndarray:
    return RNG.uniform(0.01, 0.05, shape).astype(np.float32)


FORMS = {
    "int8 per tensor": (some(-128, 127, np.int8), steps(), None, {}),
    "int8 per channel": (some(-127, 127, np.int8), steps(OUTPUTS), np.zeros(OUTPUTS, np.int8), {"axis": 1}),
    "uint8 per tensor": (some(0, 255, np.uint8), steps(), np.array(120, np.uint8), {}),
    "uint8 per row": (some(0, 255, np.uint8), steps(INPUTS), some(90, 150, np.uint8, (INPUTS,)), {"axis": 0}),
    "int4 in blocks": (
        some(-7, 7, ml_dtypes.int4),
        steps(INPUTS // 16, OUTPUTS),
        None,
        {"axis": 0, "block_size": 16},
    ),
    "uint4 in blocks": (
        some(0, 15, ml_dtypes.uint4),
        steps(INPUTS // 16, OUTPUTS),
        some(5, 9, ml_dtypes.uint4, (INPUTS // 16, OUTPUTS)),
        {"axis": 0, "block_size": 16},
    ),
    "float8 per channel": (
        RNG.normal(0, 50, (INPUTS, OUTPUTS)).astype(ml_dtypes.float8_e4m3fn),
        steps(OUTPUTS),
        None,
        {"axis": 1},
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_codes_of_every_form_train_and_are_written_as_they_were_computed(name: str) -> None:
    codes, scales, zeros, attributes = FORMS[name]
    trained = constrained(product(codes, scales, zeros, **attributes), zeros="free")
    assert {one.name: one.names for one in trained.constrained.parameters()} == {"weights": ("w",), "scales": ("s",)}
    assert difference(trained, FEED) < CLOSE
    assert not list(trained.constrained.stored())
    trained.train(FEED)
    trained.constrained.check()
    now = trained.array("w")
    assert now.dtype == codes.dtype
    assert (now.astype(np.float32) != codes.astype(np.float32)).mean() > 0.02
    assert (trained.array("s") != scales).all()
    assert (trained.array("s") > 0).all()
    assert difference(trained, FEED) < 10 * CLOSE
    assert is_exact(trained, FEED)


def test_codes_behind_a_cast_train_too() -> None:
    codes, scales = some(-127, 127, np.int8), steps(1, OUTPUTS)
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], "cast", to=TensorProto.FLOAT),
        helper.make_node("Mul", ["f", "s"], ["m"], "decode"),
        helper.make_node("MatMul", ["x", "m"], ["y"], "product"),
    ]
    trained = constrained(model_of(nodes, {"w": codes, "s": scales}))
    assert sorted(one.name for one in trained.constrained.parameters()) == ["scales", "weights"]
    trained.train(FEED)
    assert (trained.array("w") != codes).any()
    assert difference(trained, FEED) < 10 * CLOSE


def test_gradients_are_those_of_lsq() -> None:
    """Esser et al., Learned Step Size Quantization, 2020: equations 3 and 5, the scale's by its gradient scale."""
    scale, highest, lowest = 0.1, 7.0, -8.0
    weight = torch.tensor([0.04, 0.26, -0.33, 5.0, -3.0])
    wanted = torch.tensor([1.0, -2.0, 3.0, 0.5, 2.0])
    factor = gradient_factor(weight.numel(), highest)
    codes, step = (
        LatentCodes(weight.clone(), CodeGrid(lowest, highest), None),
        LearnedScale(torch.tensor(scale), torch.float32, factor),
    )
    s = step()
    (codes(s) * s * wanted).sum().backward()
    v = weight / scale
    inside = (v > lowest) & (v < highest)
    by_step = torch.where(inside, v.round() - v, v.clamp(lowest, highest))
    assert codes.latent.grad is not None
    assert step.logarithm.grad is not None
    torch.testing.assert_close(codes.latent.grad, torch.where(inside, wanted, 0.0))
    torch.testing.assert_close(step.logarithm.grad[0], (by_step * wanted).sum() * factor * scale)
    assert factor == pytest.approx(1 / np.sqrt(5 * 7))


def test_a_scale_stays_positive_at_any_rate() -> None:
    trained = constrained(product(*FORMS["int8 per channel"][:3], axis=1))
    trained.train(FEED, rate=3.0)
    trained.constrained.check()
    assert (trained.array("s") > 0).all()


@pytest.mark.parametrize(
    ("codes", "dtype", "wanted"),
    [
        ([-64, 63], np.int8, (-64, 63)),
        ([-63, 63], np.int8, (-63, 63)),
        ([-127, 100], np.int8, (-127, 127)),
        ([-128, 3], np.int8, (-128, 127)),
        ([-7, 7], ml_dtypes.int4, (-7, 7)),
        ([0, 3], ml_dtypes.uint4, (0, 15)),
    ],
)
def test_grids_are_no_wider_than_kernels_take(codes: list[int], dtype: Any, wanted: tuple[int, int]) -> None:
    grid = grid_of(np.array(codes).astype(dtype), ir.DataType.from_numpy(np.dtype(dtype)), 0, 0)
    assert (grid.low, grid.high) == wanted


# Zeros among codes


def test_zeros_that_rounding_makes_are_free_and_those_of_pruning_are_held() -> None:
    rng = np.random.default_rng(1)
    floats = rng.normal(0, 1, (64, 64))
    rounded = np.rint(floats / 0.45).clip(-7, 7).astype(np.int32)
    peaked = np.rint(rng.laplace(0, 0.7, (64, 64)) / 0.9).clip(-7, 7).astype(np.int32)
    # Channels of which some are a tenth as large as others, on one grid.
    uneven = np.rint(floats * np.where(np.arange(64) % 4, 0.1, 1.0)[:, None] / 0.45).clip(-7, 7).astype(np.int32)
    wide = np.where(np.abs(floats) < np.quantile(np.abs(floats), 0.3), 0, np.rint(floats / 0.03)).astype(np.int32)
    removed = np.where(np.abs(floats) < np.quantile(np.abs(floats), 0.5), 0, rounded)
    order = np.argsort(np.abs(floats.reshape(-1, 4)), axis=1)
    in_pattern = rounded.reshape(-1, 4).copy()
    np.put_along_axis(in_pattern, order[:, :2], 0, axis=1)
    assert kept_of_codes(rounded, on_purpose=False) is None
    assert kept_of_codes(peaked, on_purpose=False) is None
    assert kept_of_codes(uneven, on_purpose=False) is None
    assert kept_of_codes(rounded, on_purpose=True) is not None
    for codes in (removed, wide, in_pattern.reshape(64, 64)):
        kept = kept_of_codes(codes, on_purpose=False)
        assert kept is not None
        np.testing.assert_array_equal(kept, codes != 0)


@pytest.mark.parametrize("zero", [0, 9])
def test_zeros_in_codes_stay_at_their_zero_point(zero: int) -> None:
    # As pruning by magnitude leaves them: a gap beside the zeros.
    codes = some(zero + 3, zero + 6, np.uint8)
    held = RNG.random(codes.shape) < 0.6
    codes[held] = zero
    trained = constrained(product(codes, steps(), np.array(zero, np.uint8)))
    trained.train(FEED, steps=20)
    trained.constrained.check()
    now = trained.array("w")
    assert (now[held] == zero).all()
    assert (now[~held] != codes[~held]).mean() > 0.1
    assert difference(trained, FEED) < 10 * CLOSE


# Whole layers in integers


def convolutions() -> onnx.ModelProto:
    rng = np.random.default_rng(5)
    shapes = {"w0": (16, 16, 3, 3), "b0": (16,), "w1": (16, 16, 3, 3), "b1": (16,), "w2": (16, 4), "b2": (4,)}
    constants = [numpy_helper.from_array(rng.normal(0, 0.15, d).astype(np.float32), n) for n, d in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w0", "b0"], ["c0"], "conv0", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c0"], ["r0"], "relu0"),
        helper.make_node("Conv", ["r0", "w1", "b1"], ["c1"], "conv1", pads=[1, 1, 1, 1]),
        helper.make_node("Add", ["c1", "r0"], ["a"], "add"),
        helper.make_node("Relu", ["a"], ["r1"], "relu1"),
        helper.make_node("GlobalAveragePool", ["r1"], ["p"], "pool"),
        helper.make_node("Flatten", ["p"], ["f"], "flatten"),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["y"], "head"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


IMAGES = {"x": RNG.normal(0, 1, (8, 16, 8, 8)).astype(np.float32)}
PIECES = [{"x": IMAGES["x"][index : index + 1]} for index in range(8)]


def quantized() -> Any:
    return run_passes(loaded(convolutions()), "quant:mode=static:solver=rtn", data=PIECES).model


def scales_of_biases(trained: Trained) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return the scale of each int32 bias as written, and the product of the scales of what its layer multiplies."""
    written, found = trained.written(), []
    for node in written.graph:
        if node.op_type in ("Conv", "Gemm"):
            x, w, b = (value.producer().inputs[1].const_value.numpy() for value in node.inputs)
            found.append((b, x * w))
    return found


def biased(codes: np.ndarray, scale: Any) -> Any:
    """Return a Gemm of codes whose bias is in int32."""
    constants = {"xs": scale, "z": np.uint8(120), "w": some(-127, 127, np.int8), "b": codes, "bs": scale * scale}
    nodes = [
        helper.make_node("Cast", ["x"], ["h"], to=helper.np_dtype_to_tensor_dtype(scale.dtype)),
        helper.make_node("QuantizeLinear", ["h", "xs", "z"], ["q"], "encode"),
        helper.make_node("DequantizeLinear", ["q", "xs", "z"], ["d"], "decode"),
        helper.make_node("DequantizeLinear", ["w", "xs"], ["f"], "weight"),
        helper.make_node("DequantizeLinear", ["b", "bs"], ["c"], "bias"),
        helper.make_node("Gemm", ["d", "f", "c"], ["g"], "product"),
        helper.make_node("Cast", ["g"], ["y"], to=TensorProto.FLOAT),
    ]
    return model_of(nodes, constants)


def test_bias_codes_larger_than_graphopt_makes_them_are_not_cut() -> None:
    codes = some(2**30, 2**31 - 1, np.int32, (OUTPUTS,))
    model = biased(codes, np.float32(1e-4))
    trained = constrained(model, train=("biases",))
    wanted = np.asarray(outputs_of(model, FEED)["y"])
    np.testing.assert_allclose(trained.outputs(FEED)[0], wanted, rtol=1e-5)
    trained.constrained.check()


def test_scales_in_half_floats_stay_where_a_bias_needs_their_product() -> None:
    trained = constrained(biased(some(-200, 200, np.int32, (OUTPUTS,)), np.float16(2**-5)))
    assert [one.name for one in trained.constrained.parameters()] == ["weights", "biases"]
    trained.train(FEED)
    trained.constrained.check()
    assert is_exact(trained, FEED)


@pytest.mark.parametrize("train", [ALL_BUT_ADAPTERS, ("scales",), ("weights", "scales")], ids=" ".join)
def test_biases_in_int32_go_with_the_scales_of_their_products(train: tuple[str, ...]) -> None:
    trained = constrained(quantized(), train=train)
    assert not trained.constrained.left
    trained.train(IMAGES)
    trained.constrained.check()
    pairs = scales_of_biases(trained)
    assert len(pairs) == 3
    assert is_exact(trained, IMAGES)
    for scale, wanted in pairs:
        assert scale.dtype == np.float32
        np.testing.assert_array_equal(scale, wanted)
    # One code of the outputs of a layer on its way may be another where sums differ in their last bits.
    assert difference(trained, IMAGES) < 0.05
    # A bias is what it was, up to rounding, where only its scale moved.
    if "biases" not in train:
        written, before = trained.written(), quantized()
        for name, value in before.graph.initializers.items():
            if value.const_value.dtype.name == "INT32":
                reader = next(iter(value.uses())).node
                now = written.graph.initializers
                new = now[name].const_value.numpy() * now[reader.inputs[1].name].const_value.numpy()
                old = value.const_value.numpy() * reader.inputs[1].const_value.numpy()
                np.testing.assert_allclose(new, old, atol=float(np.max(now[reader.inputs[1].name].const_value.numpy())))


def test_fused_kernels_of_the_runtime_give_what_was_trained() -> None:
    trained = constrained(quantized())
    trained.train(IMAGES)
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    proto = ir.to_proto(trained.written()).SerializeToString()
    session = ort.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    fused = session.run(None, IMAGES)[0]
    ours = trained.outputs(IMAGES)[0]
    assert np.abs(fused - ours).max() < 0.05
    assert np.abs(ours).max() > 0.3


def test_a_scale_that_several_read_is_one_parameter() -> None:
    model = quantized()
    trained = constrained(model, train=("scales",))
    (group,) = trained.constrained.parameters()
    assert len(group.names) == len(set(group.names))
    converters = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    activations = {node.inputs[1].name for node in converters if node.op_type == "QuantizeLinear"}
    assert activations <= set(group.names)
    assert len(activations) < len([node for node in converters if node.inputs[0].const_value is None])


def test_zero_points_learn_as_integers() -> None:
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"], "quantize"),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["d"], "dequantize"),
        helper.make_node("MatMul", ["d", "w"], ["y"], "product"),
    ]
    weight = RNG.normal(0, 1, (INPUTS, 4)).astype(np.float32)
    proto = model_of(nodes, {"s": np.array(0.004, np.float32), "z": np.array(10, np.uint8), "w": weight})
    trained = constrained(proto, train=("zero-points",))
    wanted = FEED["x"] @ weight
    first = trained.train(FEED, wanted, steps=1)
    assert trained.train(FEED, wanted, steps=30, rate=0.02) < first
    now = trained.array("z")
    assert now.dtype == np.uint8
    assert now > 10  # half of what is read is negative, and was cut off
    assert difference(trained, FEED) < CLOSE


def test_a_zero_point_keeps_to_the_codes_there_are() -> None:
    module = LearnedZeroPoint(torch.tensor(250.0), 0.0, 255.0, 1.0)
    with torch.no_grad():
        module.shift.fill_(3.0)
    assert float(module().detach()) == 255.0


def test_training_on_codes_recovers_what_rounding_lost() -> None:
    teacher = RNG.normal(0, 1, (INPUTS, OUTPUTS)).astype(np.float32)
    scales = np.abs(teacher).max(axis=0) / 7
    codes = np.rint(teacher / scales).astype(ml_dtypes.int4)
    # Inputs that go together: what one weight loses another can make up for.
    mixing = RNG.normal(0, 1, (4, INPUTS))
    feed = {"x": (RNG.normal(0, 1, (256, 4)) @ mixing).astype(np.float32)}
    wanted = feed["x"] @ teacher
    trained = constrained(product(codes, scales.astype(np.float32), axis=1))
    before = trained.train(feed, wanted, steps=1, rate=0.0)
    # Ever smaller steps: at one rate codes swing between two integers to the end, and the last step is one of luck.
    for rate in (0.1, 0.02, 0.003):
        trained.train(feed, wanted, steps=100, rate=rate)
    after = np.square(outputs_of(trained.written(), feed)["y"] - wanted).mean()
    assert after < 0.3 * before


# What does not train, and what breaks


def test_codes_read_by_several_scales_are_left_and_said() -> None:
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s"], ["f"], "decode"),
        helper.make_node("DequantizeLinear", ["w", "t"], ["g"], "decode_again"),
        helper.make_node("MatMul", ["x", "f"], ["a"], "first"),
        helper.make_node("MatMul", ["x", "g"], ["b"], "second"),
        helper.make_node("Add", ["a", "b"], ["y"], "sum"),
    ]
    trained = constrained(model_of(nodes, {"w": some(-127, 127, np.int8), "s": steps(), "t": steps()}))
    assert [one.name for one in trained.constrained.parameters()] == ["scales"]
    assert any("several scales" in line for line in trained.constrained.describe())


def test_codes_torch_does_not_round_to_are_left_and_said() -> None:
    codes = RNG.normal(0, 3, (INPUTS, OUTPUTS)).astype(ml_dtypes.float4_e2m1fn)
    trained = constrained(product(codes, steps(INPUTS // 16, OUTPUTS), axis=0, block_size=16))
    assert [one.name for one in trained.constrained.parameters()] == ["scales"]
    assert any("float4e2m1" in reason for reason in trained.constrained.left)


def test_codes_off_their_grid_are_caught() -> None:
    trained = constrained(product(some(-7, 7, np.int8), steps(), None))
    latent = next(module for module in trained.module.modules() if isinstance(module, LatentCodes))
    latent.grid = CodeGrid(-1000.0, 1000.0)
    scale = float(trained.model.graph.initializers["s"].const_value.numpy())  # type: ignore[union-attr]
    for code, what in ((100, "codes beyond -63 to 63"), (300, "codes of .* to 300 in int8"), (np.nan, "no number")):
        with torch.no_grad():
            latent.latent[0, 0] = code * scale
        with pytest.raises(PassError, match=what):
            trained.constrained.check()


def test_a_scale_that_is_not_positive_is_caught() -> None:
    trained = constrained(product(some(-7, 7, np.int8), steps(), None))
    scale = next(module for module in trained.module.modules() if isinstance(module, LearnedScale))
    scale.start.neg_()
    with pytest.raises(PassError, match="`s` is a scale that is not above zero"):
        trained.constrained.check()


def test_a_bias_scale_that_is_no_product_is_caught() -> None:
    trained = constrained(quantized())
    trained.train(IMAGES)
    kept = next(one for one in trained.constrained.kept if one.factors)
    object.__setattr__(kept, "now", lambda: torch.full_like(torch.from_numpy(kept.before.numpy()), 0.5))
    with pytest.raises(PassError, match="is no longer the product of"):
        trained.constrained.check()


def test_adapters_leave_codes_that_are_no_matrix() -> None:
    trained = constrained(product(some(-127, 127, np.int8, (INPUTS,)), steps()), train=("adapters", "scales"))
    assert [one.name for one in trained.constrained.parameters()] == ["scales"]
    assert trained.constrained.left["adapters are for matrices"] == 1


def test_adapters_train_codes() -> None:
    codes = some(-100, 100, np.int8)
    trained = constrained(product(codes, steps(), None), train=("adapters",), adapter_rank=2, adapter_alpha=32.0)
    (group,) = trained.constrained.parameters()
    assert group.names == ("w.A", "w.B")
    trained.train(FEED, steps=20)
    assert (trained.array("w") != codes).any()
    assert difference(trained, FEED) < 10 * CLOSE


def test_digits_stay_what_they_were_trained_to() -> None:
    """A real model, quantized as a user does, trained for two steps, in the runtime with its optimizations on."""
    digits = np.load(MODELS / "digits.npz")
    images = digits[next(name for name in digits.files if digits[name].ndim == 4)][:32].astype(np.float32)
    model = load(MODELS / "digits_cnn.onnx")
    name = model.graph.inputs[0].name or ""
    feeds = [{name: images[index : index + 1]} for index in range(16)]
    trained = constrained(run_passes(model, "quant:mode=static:solver=rtn", data=feeds).model)
    trained.train({name: images}, steps=2, rate=1e-3)
    trained.constrained.check()
    assert is_exact(trained, {name: images})
    largest = np.abs(trained.outputs({name: images})[0]).max()
    assert difference(trained, {name: images}) < 0.02 * largest
