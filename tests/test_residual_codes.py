"""Factors and codes of one weight: each the best for the other, and the graph made of them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt.backends.targets import TARGETS
from graphopt.errors import GraphoptError, UsageError
from graphopt.passes.lossy.factorize import Factorize
from graphopt.passes.lossy.residual_codes import residual_plan
from graphopt.passes.solvers.grid import Grid
from graphopt.passes.solvers.low_rank_codes import low_rank_codes
from graphopt.passes.solvers.objective import output_error
from graphopt.passes.solvers.rank import Spectrum
from graphopt.passes.solvers.scale_search import mse

onnxruntime = pytest.importorskip("onnxruntime")

GRID = Grid(4, symmetric=True, block=16, narrow=False)
INPUTS, OUTPUTS = 48, 32


def problem(seed: int) -> tuple[np.ndarray, np.ndarray]:
    """A weight with a few strong directions, and inputs that go together."""
    rng = np.random.default_rng(seed)
    strong = rng.standard_normal((OUTPUTS, 2)) @ rng.standard_normal((2, INPUTS))
    root = rng.standard_normal((INPUTS, INPUTS)) * np.linspace(0.1, 2, INPUTS)
    weight = 2 * strong + rng.standard_normal((OUTPUTS, INPUTS))
    return weight.astype(np.float32), (root @ root.T / INPUTS).astype(np.float32)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("with_data", [True, False])
def test_factors_and_codes_beat_either_published_order(seed: int, with_data: bool) -> None:
    weight, h = problem(seed)
    moment = h if with_data else None
    found = low_rank_codes(weight, GRID, 4, moment)
    assert output_error(weight - found.values(), moment) == pytest.approx(found.error, rel=1e-3)
    # Codes first (LoftQ, one round), factors first, and codes alone.
    codes = mse(weight, GRID).values()
    loftq = Spectrum(weight - codes, moment).factors(4).error
    near = Spectrum(weight, moment).factors(4).matrix().astype(np.float32)
    factors_first = output_error(weight - near - mse(weight - near, GRID).values(), moment)
    alone = low_rank_codes(weight, GRID, 0, moment)
    assert found.error <= min(loftq, factors_first, alone.error)
    # Given the codes there are no better factors: what they leave is the tail of the whitened singular values.
    rest = weight - found.codes.values()
    values, vectors = np.linalg.eigh(np.eye(INPUTS) if moment is None else moment.astype(np.float64))
    singular = np.linalg.svd(rest @ (vectors * np.sqrt(np.maximum(values, 0))), compute_uv=False)
    assert found.error == pytest.approx(np.sum(singular[4:] ** 2), rel=1e-4)


def test_more_rank_never_loses_more() -> None:
    weight, h = problem(5)
    errors = [low_rank_codes(weight, GRID, rank, h).error for rank in (0, 2, 8, 16)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.5 * errors[0]


def test_rank_zero_is_codes_alone_and_zeros_lose_nothing() -> None:
    weight, h = problem(6)
    found = low_rank_codes(weight, GRID, 0, h)
    assert found.factors.rank == 0
    assert np.array_equal(found.values(), found.codes.values())
    zero = low_rank_codes(np.zeros_like(weight), GRID, 2, h)
    assert zero.error == 0
    assert not zero.values().any()


BODIES = {
    "MatMul": ("float[b,3,64] x", (64, 48), "y = MatMul(x, w)", "float[b,3,48] y"),
    "Biased": ("float[b,3,64] x", (64, 48), "m = MatMul(x, w) y = Add(m, bias)", "float[b,3,48] y"),
    "Gemm": ("float[b,64] x", (48, 64), "y = Gemm<transB=1, alpha=0.5>(x, w, bias)", "float[b,48] y"),
    "Left": ("float[64,b] x", (48, 64), "y = MatMul(w, x)", "float[48,b] y"),
}


def layer_model(kind: str, body: str | None = None) -> ir.Model:
    given, dims, text, output = BODIES[kind]
    source = f"""<ir_version: 8, opset_import: ["": 17]>
        g ({given}, float[{dims[0]},{dims[1]}] w, float[48] bias) => ({output}) {{ {body or text} }}"""
    model = ir.from_proto(onnx.parser.parse_model(source))
    rng = np.random.default_rng(8)
    for value in list(model.graph.inputs)[1:]:
        shape = [int(size) for size in value.shape or ()]
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=value.name)
        if value.uses():
            model.graph.register_initializer(value)
    return model


def samples(kind: str) -> np.ndarray:
    shape = {"MatMul": (32, 3, 64), "Biased": (32, 3, 64), "Gemm": (32, 64), "Left": (64, 32)}[kind]
    return (0.5 + np.random.default_rng(9).standard_normal(shape)).astype(np.float32)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return np.asarray(session.run(None, {"x": x})[0])


@pytest.mark.parametrize("kind", BODIES)
@pytest.mark.parametrize("target", ["ort-cpu-x86", "portable"])
def test_products_of_codes_and_factors_come_near(kind: str, target: str) -> None:
    """With few codes alone the noise is some percent; with factors beside them it is less, and nothing is wrong."""
    model, x = layer_model(kind), samples(kind)
    wanted = run(model, x)
    noises = []
    for share in (0.17, 0.8):
        data = {"x": x} if kind != "Left" else None
        result = graphopt.optimize(model, [Factorize(params=share, residual="int4")], data=data, target=target)
        operators = [node.op_type for node in result.model.graph]
        assert ("MatMulNBits" if target == "ort-cpu-x86" else "DequantizeLinear") in operators
        assert (share > 0.5) == ("Add" in operators[-2:] and operators.count("MatMul") >= 2)
        assert [value.name for value in result.model.graph.outputs] == ["y"]
        assert all(value.uses() for value in result.model.graph.initializers.values())
        noises.append(np.square(run(result.model, x) - wanted).mean() / np.square(wanted).mean())
    assert noises[0] < 0.03
    assert noises[1] < 0.6 * noises[0]


@pytest.mark.parametrize(("dtype", "share"), [(np.float32, 0.17), (np.float16, 0.31)])
def test_bytes_are_those_of_the_weight_s_type(dtype: Any, share: float) -> None:
    """Codes in blocks of 32 take four bits and a half or a whole one for scales."""
    name = {np.float32: "float", np.float16: "float16"}[dtype]
    model = ir.from_onnx_text(
        f"""<ir_version: 8, opset_import: ["": 17]>
        g ({name}[b,128] x, {name}[128,64] w) => ({name}[b,64] y) {{ y = MatMul(x, w) }}"""
    )
    value = model.graph.inputs[1]
    model.graph.inputs.remove(value)
    content = np.random.default_rng(3).standard_normal((128, 64)).astype(dtype)
    value.const_value = ir.tensor(content, name="w")
    model.graph.register_initializer(value)
    result = graphopt.optimize(model, [Factorize(params=share, residual="int4")], target="portable")
    (left,) = [note.facts["left"] for step in result.report.steps for note in step.notes if "levels" in note.facts]
    bits = 8 * content.itemsize * left
    assert 4 < bits < 5.1
    said = [note.text for step in result.report.steps for note in step.notes]
    assert not any("cannot be had" in text for text in said)


def test_what_cannot_be_coded_is_said() -> None:
    twice = layer_model(
        "Gemm", "p = Gemm<transB=1>(x, w, bias) q = Relu(x) r = Gemm<transB=1>(q, w, bias) y = Add(p, r)"
    )
    result = graphopt.optimize(twice, [Factorize(params=0.5, residual="int4")])
    said = [note.text for step in result.report.steps for note in step.notes]
    assert any("read more than once" in text for text in said)


def test_bad_input_is_refused() -> None:
    model = layer_model("MatMul")
    content = model.graph.initializers["w"].const_value.numpy().copy()  # type: ignore[union-attr]
    content[1, 2] = np.inf
    model.graph.initializers["w"].const_value = ir.tensor(content, name="w")
    with pytest.raises(GraphoptError, match="weight `w` holds NaN or infinity"):
        graphopt.optimize(model, [Factorize(params=0.5, residual="int4")])
    without = replace(TARGETS["portable"], weight_only=None)
    with pytest.raises(UsageError, match="reads no weights of 4 bits"):
        residual_plan(without)
