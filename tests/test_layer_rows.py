"""Rows of linear layers, against the operators themselves: rows @ matrixᵀ is what the runtime computes."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.helper as oh
import onnx_ir as ir
import pytest
from onnx import TensorProto, numpy_helper

from graphopt.passes.analyses.layer_rows import layer_rows, takes_rows
from graphopt.passes.analyses.linear_layers import LinearLayer, as_linear_layer

ort = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(0)


def layer_of(
    op_type: str, x: np.ndarray[Any, Any], weight: np.ndarray[Any, Any], *, left: bool = False, **attributes: Any
) -> tuple[LinearLayer, np.ndarray[Any, Any]]:
    """Return a layer and what the runtime computes for x."""
    inputs = ["w", "x"] if left else ["x", "w"]
    graph = oh.make_graph(
        [oh.make_node(op_type, inputs, ["y"], name="n", **attributes)],
        "g",
        [oh.make_tensor_value_info("x", TensorProto.FLOAT, x.shape)],
        [oh.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(weight, "w")],
    )
    proto = oh.make_model(graph, opset_imports=[oh.make_opsetid("", 17)], ir_version=8)
    y = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})[0]
    model = ir.from_proto(proto)
    layer = as_linear_layer(next(iter(model.graph)))
    assert layer is not None
    return layer, y


def rand(*shape: int) -> np.ndarray[Any, Any]:
    return RNG.standard_normal(shape).astype(np.float32)


def computed(layer: LinearLayer, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return the layer's output as [rows, outputs], groups side by side."""
    rows, matrix = layer_rows(layer, x), layer.matrix()
    each = np.split(matrix, len(rows))
    return np.concatenate([group @ part.T for group, part in zip(rows, each, strict=True)], axis=1)


@pytest.mark.parametrize("shape", [(5, 6), (2, 5, 6), (2, 3, 5, 6)])
def test_matmul(shape: tuple[int, ...]) -> None:
    x = rand(*shape)
    layer, y = layer_of("MatMul", x, rand(6, 4))
    np.testing.assert_allclose(computed(layer, x), y.reshape(-1, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(6, 5), (2, 6, 5)])
def test_matmul_with_the_weight_on_the_left(shape: tuple[int, ...]) -> None:
    x = rand(*shape)
    layer, y = layer_of("MatMul", x, rand(4, 6), left=True)
    np.testing.assert_allclose(computed(layer, x), np.moveaxis(y, -2, -1).reshape(-1, 4), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("trans_a", [0, 1])
@pytest.mark.parametrize("trans_b", [0, 1])
def test_gemm(left: bool, trans_a: int, trans_b: int) -> None:
    first, second = ((6, 5) if trans_a else (5, 6)), ((4, 6) if trans_b else (6, 4))
    x, weight = (rand(*second), rand(*first)) if left else (rand(*first), rand(*second))
    layer, y = layer_of("Gemm", x, weight, left=left, transA=trans_a, transB=trans_b)
    np.testing.assert_allclose(computed(layer, x), y.T if left else y, rtol=1e-4, atol=1e-5)


def random_convolution(seed: int, transposed: bool) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    rank = int(rng.integers(1, 4))
    pick = lambda low, high: [int(n) for n in rng.integers(low, high, rank)]  # noqa: E731
    options: dict[str, Any] = {"strides": pick(1, 4), "dilations": pick(1, 3)}
    if transposed or rng.random() < 0.7:
        options["pads"] = pick(0, 3) + pick(0, 3)
    else:
        options["auto_pad"] = str(rng.choice(["SAME_UPPER", "SAME_LOWER", "VALID"]))
        options["dilations"] = [1] * rank
    group = 1 if transposed else int(rng.choice([1, 2, 4]))
    return {**options, "group": group, "kernel": pick(1, 4), "sizes": pick(9, 13)}


@pytest.mark.parametrize("seed", range(30))
def test_convolutions(seed: int) -> None:
    drawn = random_convolution(seed, False)
    kernel, sizes, group = drawn.pop("kernel"), drawn.pop("sizes"), drawn["group"]
    x = rand(2, 4, *sizes)
    layer, y = layer_of("Conv", x, rand(8, 4 // group, *kernel), **drawn)
    assert takes_rows(layer)
    np.testing.assert_allclose(computed(layer, x), np.moveaxis(y, 1, -1).reshape(-1, 8), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_transposed_convolutions(seed: int) -> None:
    drawn = random_convolution(seed, True)
    kernel, sizes = drawn.pop("kernel"), drawn.pop("sizes")
    x = rand(2, 4, *sizes)
    layer, y = layer_of("ConvTranspose", x, rand(4, 8, *kernel), **drawn)
    assert takes_rows(layer)
    np.testing.assert_allclose(computed(layer, x), np.moveaxis(y, 1, -1).reshape(-1, 8), rtol=1e-3, atol=1e-4)


def test_what_is_no_single_matrix_takes_no_rows() -> None:
    batched, _ = layer_of("MatMul", rand(2, 3, 4), rand(2, 4, 5))
    grouped, _ = layer_of("ConvTranspose", rand(1, 4, 5, 5), rand(4, 2, 3, 3), group=2)
    assert not takes_rows(batched)
    assert not takes_rows(grouped)


@pytest.mark.parametrize("op_type", ["MatMul", "Conv"])
def test_a_limit_takes_evenly_spaced_rows_of_every_sample(op_type: str) -> None:
    x = rand(3, 7, 6) if op_type == "MatMul" else rand(3, 6, 4, 5)
    layer, _ = layer_of(op_type, x, rand(6, 4) if op_type == "MatMul" else rand(4, 6, 1, 1))
    every, some = layer_rows(layer, x)[0], layer_rows(layer, x, limit=4)[0]
    assert len(some) == 12
    assert (some[0] == every[0]).all()
    assert (some[-1] == every[-1]).all()
    assert {row.tobytes() for row in some} <= {row.tobytes() for row in every}
