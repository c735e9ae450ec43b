"""Layers that read the same rows, factored together: the best division of a stack, its factors, and the graph made."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt.passes.lossy.factorize import Factorize
from graphopt.passes.solvers.objective import output_error
from graphopt.passes.solvers.stacked_rank import Part, joint_factors, stack_levels

onnxruntime = pytest.importorskip("onnxruntime")

INPUTS = 6


def moment(rng: np.random.Generator, rank: int = INPUTS) -> np.ndarray:
    root = rng.standard_normal((INPUTS, rank)).astype(np.float32)
    return root @ root.T


def least(weight: np.ndarray, h: np.ndarray, rank: int) -> float:
    """The error of the best matrix of a rank, by the singular values of W S with H = S Sᵀ."""
    values, vectors = np.linalg.eigh(h.astype(np.float64))
    singular = np.linalg.svd(weight @ (vectors * np.sqrt(np.maximum(values, 0))), compute_uv=False)
    return float(np.sum(singular[rank:] ** 2))


def every_rank(outputs: int, inputs: int) -> list[int]:
    return [rank for rank in range(1, min(outputs, inputs)) if rank * (outputs + inputs) < outputs * inputs]


def partitions(items: Sequence[int]) -> list[list[tuple[int, ...]]]:
    """All divisions of a few items, by brute force over labels."""
    found = set()
    for labels in itertools.product(range(len(items)), repeat=len(items)):
        parts = [tuple(i for i, at in zip(items, labels, strict=True) if at == label) for label in set(labels)]
        found.add(frozenset(parts))
    return [list(one) for one in found]


@pytest.mark.parametrize("seed", range(4))
def test_levels_are_the_best_of_all_divisions_and_ranks(seed: int) -> None:
    rng = np.random.default_rng(seed)
    outputs, scales, h = (6, 4, 9), (1.0, 3.0, 0.5), moment(rng, 4 + seed % 3)
    weights = [rng.standard_normal((count, INPUTS)).astype(np.float32) for count in outputs]
    found = stack_levels(weights, h, scales, every_rank)
    everything = []
    for parts in partitions(range(3)):
        choices = []
        for part in parts:
            together = sum(outputs[one] for one in part)
            stacked = np.concatenate([np.sqrt(scales[one]) * weights[one] for one in part])
            ranks = every_rank(together, INPUTS)
            pairs = [(rank * (together + INPUTS), least(stacked, h, rank)) for rank in ranks]
            choices.append(pairs + ([(together * INPUTS, 0.0)] if len(part) == 1 else []))
        everything += [tuple(map(sum, zip(*way, strict=True))) for way in itertools.product(*choices)]
    for cost, error in zip(found.costs, found.errors, strict=True):
        best = min(other for price, other in everything if price <= cost)
        assert error == pytest.approx(best, rel=1e-6, abs=1e-6 * everything[0][1])
    cheapest = min(price for price, _ in everything)
    assert found.costs[-1] == cheapest
    assert (np.diff(found.errors) >= 0).all()
    assert (np.diff(found.costs) < 0).all()
    assert found.plans[0] == (Part((0,), None), Part((1,), None), Part((2,), None))


def test_a_level_loses_what_it_says() -> None:
    rng = np.random.default_rng(7)
    weights = [rng.standard_normal((count, INPUTS)) for count in (5, 8)]
    h, scales = moment(rng), (0.3, 2.0)
    found = stack_levels(weights, h, scales, every_rank)
    for error, plan in zip(found.errors[1:], found.plans[1:], strict=True):
        lost = 0.0
        for part in plan:
            if part.rank is None:
                continue
            own = [weights[one] for one in part.members]
            counts = [scales[one] for one in part.members]
            lefts, right = joint_factors(own, [h] * len(own), counts, part.rank)
            assert right.shape == (part.rank, INPUTS)
            for weight, left, count in zip(own, lefts, counts, strict=True):
                lost += count * output_error(weight - left @ right, h)
        assert lost == pytest.approx(error, rel=1e-4, abs=1e-6)


def test_joint_factors_reach_the_least_error_there_is() -> None:
    rng = np.random.default_rng(1)
    weights = [rng.standard_normal((count, INPUTS)) for count in (7, 5, 6)]
    scales = (1.0, 10.0, 0.1)
    for h in (moment(rng), moment(rng, 3), np.zeros((INPUTS, INPUTS), np.float32), None):
        lefts, right = joint_factors(weights, [h] * 3, scales, 2)
        lost = sum(
            scale * output_error(weight - left @ right, h)
            for weight, left, scale in zip(weights, lefts, scales, strict=True)
        )
        stacked = np.concatenate([np.sqrt(scale) * weight for scale, weight in zip(scales, weights, strict=True)])
        assert lost == pytest.approx(least(stacked, np.eye(INPUTS) if h is None else h, 2), rel=1e-5, abs=1e-9)


def test_where_second_moments_differ_each_left_factor_is_the_best_for_its_own() -> None:
    rng = np.random.default_rng(2)
    weights = [rng.standard_normal((5, INPUTS)) for _ in range(2)]
    moments = [moment(rng), moment(rng)]
    lefts, right = joint_factors(weights, moments, (1.0, 1.0), 2)
    for weight, h, left in zip(weights, moments, lefts, strict=True):
        reached = output_error(weight - left @ right, h)
        for _ in range(20):
            other = left + 0.05 * rng.standard_normal(left.shape)
            assert reached <= output_error(weight - other @ right, h) + 1e-9


def test_weights_of_zeros_lose_nothing() -> None:
    found = stack_levels([np.zeros((6, INPUTS)), np.zeros((6, INPUTS))], None, (0.0, 0.0), every_rank)
    assert not found.errors.any()
    assert found.costs[0] == 12 * INPUTS
    lefts, right = joint_factors([np.zeros((6, INPUTS))] * 2, [None, None], (0.0, 0.0), 1)
    assert np.isfinite(right).all()
    assert all(np.isfinite(left).all() for left in lefts)


def test_more_layers_than_all_divisions_are_looked_at_for() -> None:
    rng = np.random.default_rng(3)
    shared = rng.standard_normal((2, INPUTS))
    weights = [rng.standard_normal((6, 2)) @ shared for _ in range(6)]
    found = stack_levels(weights, None, [1.0] * 6, every_rank)
    place = found.plans.index((Part(tuple(range(6)), 2),))
    assert found.errors[place] < 1e-9
    assert {len(plan) for plan in found.plans} == {1, 6}


MODELS = {
    "MatMul": (
        "float[b,3,12] x",
        {"q": (12, 10), "k": (12, 8), "v": (12, 12)},
        "a = MatMul(x, q) c = MatMul(x, k) d = MatMul(x, v)",
    ),
    "Gemm": (
        "float[b,12] x",
        {"q": (10, 12), "k": (12, 8), "v": (12, 12), "bias": (10,)},
        "a = Gemm<transB=1, alpha=0.5, beta=2.0>(x, q, bias) c = MatMul(x, k) d = Gemm(x, v)",
    ),
    "GemmAcross": (
        "float[12,b] x",
        {"q": (10, 12), "k": (12, 8), "v": (12, 12), "bias": (10,)},
        "a = Gemm<transA=1, transB=1>(x, q, bias) c = Gemm<transA=1>(x, k) d = MatMul(v, x)",
    ),
}


def stack_model(kind: str, rng: np.random.Generator) -> ir.Model:
    """Three layers on one input, whose weights together have rank 3."""
    given, weights, body = MODELS[kind]
    ranks = "float[b,m,n]" if kind == "MatMul" else "float[m,n]"
    outputs = ", ".join(f"{ranks.replace('m', name + 'm').replace('n', name + 'n')} {name}" for name in "acd")
    text = f'<ir_version: 8, opset_import: ["": 17]> g ({given}) => ({outputs}) {{ {body} }}'
    params = ", ".join(f"float[{','.join(map(str, dims))}] {name}" for name, dims in weights.items())
    model = ir.from_proto(onnx.parser.parse_model(text.replace(f"({given})", f"({given}, {params})")))
    shared = rng.standard_normal((3, 12)).astype(np.float32)
    for value in list(model.graph.inputs)[1:]:
        dims = weights[value.name or ""]
        array = rng.standard_normal(dims).astype(np.float32)
        if len(dims) == 2:
            outputs_first = value.name in {"Gemm": ("q",), "GemmAcross": ("q", "v")}.get(kind, ())
            count = dims[0] if outputs_first else dims[1]
            dense = (rng.standard_normal((count, 3)) @ shared).astype(np.float32)
            array = dense if outputs_first else np.ascontiguousarray(dense.T)
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(array, name=value.name)
        model.graph.register_initializer(value)
    return model


def run(model: ir.Model, x: np.ndarray) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return [np.asarray(one) for one in session.run(None, {"x": x})]


@pytest.mark.parametrize("kind", MODELS)
def test_one_first_product_serves_all(kind: str) -> None:
    rng = np.random.default_rng(4)
    model = stack_model(kind, rng)
    x = rng.standard_normal((12, 5) if kind == "GemmAcross" else (5, 3, 12) if kind == "MatMul" else (5, 12))
    expected = run(model, x.astype(np.float32))
    result = graphopt.optimize(model, [Factorize(params=0.4)])
    made = [node for node in result.model.graph if node.op_type in ("MatMul", "Gemm")]
    assert len(made) == 4
    first = made[0]
    assert len(first.outputs[0].uses()) == 3
    factor = next(value for value in first.inputs if value is not None and value.const_value is not None)
    assert min(factor.const_value.numpy().shape) == 3  # type: ignore[union-attr]
    assert [value.name for value in result.model.graph.outputs] == ["a", "c", "d"]
    for got, wanted in zip(run(result.model, x.astype(np.float32)), expected, strict=True):
        assert np.allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


def test_with_data_biases_take_the_mean() -> None:
    """Weights of full rank, an input far from zero: the mean of what is lost goes to the biases."""
    rng = np.random.default_rng(5)
    shared = rng.standard_normal((12, 4))
    weights = {
        name: (shared @ rng.standard_normal((4, 12)) + 0.1 * rng.standard_normal((12, 12))).astype(np.float32)
        for name in ("q", "v")
    }
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[b,12] x, float[12,12] q, float[12,12] v, float[12] p, float[12] r) => (float[b,12] y, float[b,12] z)
        { s = MatMul(x, q) y = Add(s, p) t = MatMul(x, v) z = Add(t, r) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        content = weights.get(value.name or "", np.ones(12, np.float32))
        value.const_value = ir.tensor(content, name=value.name)
        model.graph.register_initializer(value)
    x = (5 + rng.standard_normal((256, 12))).astype(np.float32)
    result = graphopt.optimize(model, [Factorize(params=0.6)], data={"x": x})
    products = [node for node in result.model.graph if node.op_type in ("MatMul", "Gemm")]
    assert len(products) == 3
    for got, wanted in zip(run(result.model, x), run(model, x), strict=True):
        noise = got - wanted
        assert np.abs(noise.mean(axis=0)).max() < 0.2 * noise.std()  # samples to score by are others


def test_what_ends_in_a_sum_waits_for_its_own_turn() -> None:
    """A shortcut that is added to a branch makes up for the branch, which must be settled first."""
    rng = np.random.default_rng(6)
    text = """<ir_version: 8, opset_import: ["": 17]>
        g (float[b,12] x, float[12,12] p, float[12,12] q, float[12,12] r) => (float[b,12] y)
        { a = MatMul(x, p) h = Relu(a) c = MatMul(h, q) s = MatMul(x, r) y = Add(c, s) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    for value in list(model.graph.inputs)[1:]:
        model.graph.inputs.remove(value)
        value.const_value = ir.tensor(rng.standard_normal((12, 12)).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    x = rng.standard_normal((64, 12)).astype(np.float32)
    result = graphopt.optimize(model, [Factorize(params=0.5)], data={"x": x})
    firsts = [use.node for value in result.model.graph.inputs for use in value.uses()]
    assert all(len(node.outputs[0].uses()) == 1 for node in firsts)
