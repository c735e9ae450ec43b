"""`factorize` on small models: what it writes, what it leaves, what it loses, and what it refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.backend import Array
from graphopt.errors import GraphoptError
from graphopt.passes.lossy.factor_forms import allowed_ranks, steadied
from graphopt.passes.solvers.rank import Spectrum

from .pass_runs import PassRun, outputs_of, run_passes, to_bytes

RNG = np.random.default_rng
WIDTH, RANK = 64, 16


def low_rank(rng: np.random.Generator, rows: int, columns: int, rank: int = RANK, noise: float = 0.0) -> Array:
    """Return a matrix of about a rank."""
    made = rng.normal(size=(rows, rank)) @ rng.normal(size=(rank, columns)) / rank
    return (made + noise * rng.normal(size=made.shape)).astype(np.float32)


def model_of(text: str, **weights: Array) -> ir.Model:
    """Return a model of some nodes, the weights as initializers; opset 17."""
    model = ir.from_onnx_text(f'<ir_version: 9, opset_import: ["" : 17]>\nsmall {text}')
    values = {value.name: value for value in model.graph.inputs}
    for node in model.graph:
        values.update({value.name: value for value in node.inputs if value is not None})
    for name, content in weights.items():
        value = values[name]
        value.const_value = ir.tensor(content, name=name)
        value.shape, value.type = ir.Shape(content.shape), ir.TensorType(value.const_value.dtype)
        model.graph.inputs[:] = [one for one in model.graph.inputs if one is not value]
        model.graph.register_initializer(value)
    return model


def product_model(weight: Array) -> ir.Model:
    """Return y = x W."""
    inputs, outputs = weight.shape
    return model_of(
        f"(float[n, {inputs}] x, float[{inputs}, {outputs}] w) => (float[n, {outputs}] y) {{ y = MatMul (x, w) }}",
        w=weight,
    )


def samples(count: int = 64, width: int = WIDTH, seed: int = 1, name: str = "x") -> list[dict[str, Array]]:
    """Return rows that lie mostly in a few directions, each a sample."""
    rng = RNG(seed)
    mixing = rng.normal(size=(width, width)) * np.geomspace(1, 0.01, width)[:, None]
    return [{name: (rng.normal(size=(1, width)) @ mixing + 0.5).astype(np.float32)} for _ in range(count)]


def operators(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def close(run: PassRun, before: Any, feed: dict[str, Array], tolerance: float) -> None:
    """Assert that a model gives what it gave, but for a share of it."""
    expected, found = outputs_of(before, feed), outputs_of(run.model, feed)
    for name, value in expected.items():
        assert np.linalg.norm(found[name] - value) <= tolerance * np.linalg.norm(value)


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        (f"(float[5, {WIDTH}] x, float[{WIDTH}, 48] w) => (float[5, 48] y) {{ y = MatMul (x, w) }}", (WIDTH, 48)),
        (f"(float[{WIDTH}, 5] x, float[48, {WIDTH}] w) => (float[48, 5] y) {{ y = MatMul (w, x) }}", (48, WIDTH)),
        (f"(float[2, 5, {WIDTH}] x, float[{WIDTH}, 48] w) => (float[2, 5, 48] y) {{ y = MatMul (x, w) }}", (WIDTH, 48)),
        (f"(float[{WIDTH}] x, float[{WIDTH}, 48] w) => (float[48] y) {{ y = MatMul (x, w) }}", (WIDTH, 48)),
        (
            f"(float[{WIDTH}, 5] x, float[48, {WIDTH}] w, float[48] b) => (float[5, 48] y) "
            "{ y = Gemm <transA = 1, transB = 1, alpha = 2.0, beta = 0.5> (x, w, b) }",
            (48, WIDTH),
        ),
        (
            f"(float[5, {WIDTH}] x, float[{WIDTH}, 48] w, float[48] b) => (float[48, 5] y) "
            "{ y = Gemm <transA = 1, transB = 1, alpha = 0.5> (w, x) }",
            (WIDTH, 48),
        ),
    ],
    ids=["matmul", "left", "batches", "vector", "gemm", "gemm left"],
)
def test_every_layout_keeps_its_function(text: str, shape: tuple[int, int]) -> None:
    rng = RNG(2)
    given = {"w": low_rank(rng, *shape), "b": rng.normal(size=48).astype(np.float32)}
    model = model_of(text, **{name: value for name, value in given.items() if f"] {name}" in text})
    value = model.graph.inputs[0]
    feed = {"x": rng.normal(size=[int(dim) for dim in value.shape or ()]).astype(np.float32)}
    before = model.clone()
    run = run_passes(model, f"factorize:rank={RANK}")
    # Canonical form may bring a bias or a transposition elsewhere; there are two products in any case.
    assert sum(one in ("MatMul", "Gemm") for one in operators(run.model)) == 2
    assert {min(one.shape) for one in weights_of(run.model) if one.ndim == 2} == {RANK}
    close(run, before, feed, 1e-5)


def weights_of(model: ir.Model) -> list[Array]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return [one.numpy() for one in tensors if one is not None]


def test_reaches_the_optimum_of_the_objective() -> None:
    weight = low_rank(RNG(3), WIDTH, WIDTH, 40)
    data = samples(400)
    run = run_passes(product_model(weight), "factorize:rank=16:method=whitened", data=data)
    left, right = sorted(weights_of(run.model), key=lambda one: one.shape[0], reverse=True)
    rows = np.concatenate([one["x"] for one in data]).astype(np.float64)
    moment = rows.T @ rows / len(rows)
    reached = (weight - left.astype(np.float64) @ right).T
    lost = float(np.sum((reached @ moment) * reached))
    assert lost <= 1.01 * Spectrum(weight.T, moment).errors[16]
    # The same matrix without a look at the data loses more.
    plain = Spectrum(weight.T).factors(16).matrix() - weight.T
    assert lost < 0.5 * float(np.sum((plain @ moment) * plain))


@pytest.mark.parametrize("method", ["svd", "auto"])
def test_params_is_what_is_left(method: str) -> None:
    model = chain(RNG(4), 3)
    whole = sum(one.size for one in weights_of(model) if one.ndim == 2)
    run = run_passes(model, f"factorize:params=0.7:method={method}", data=samples() if method == "auto" else None)
    left = sum(one.size for one in weights_of(run.model) if one.ndim == 2)
    assert 0.55 * whole < left <= 0.7 * whole


def chain(rng: np.random.Generator, layers: int, width: int = WIDTH) -> ir.Model:
    """Return layers with a Relu between them, each with a bias, of rising rank."""
    nodes, weights, given = [], {}, "x"
    for place in range(layers):
        weights[f"w{place}"] = low_rank(rng, width, width, 4 + 24 * place, 0.01)
        weights[f"b{place}"] = rng.normal(size=width).astype(np.float32)
        nodes.append(f"s{place} = MatMul ({given}, w{place})\nt{place} = Add (s{place}, b{place})")
        given = "y" if place == layers - 1 else f"r{place}"
        nodes.append(f"{given} = {'Identity' if given == 'y' else 'Relu'} (t{place})")
    declared = ", ".join(f"float[{', '.join(map(str, one.shape))}] {name}" for name, one in weights.items())
    body = "\n".join(nodes)
    return model_of(f"(float[n, {width}] x, {declared}) => (float[n, {width}] y) {{ {body} }}", **weights)


def test_ranks_go_where_they_cost_least() -> None:
    model = chain(RNG(5), 3, 128)
    run = run_passes(model, "factorize:params=0.6", data=samples(width=128))
    (levels,) = [note.facts["levels"] for record in run.records for note in record.notes if "levels" in note.facts]
    ranks = [level[1] if len(level) > 1 else 128 for level in levels]
    assert ranks[0] < ranks[2]
    assert all(rank % 16 == 0 for rank in ranks)


def test_whitened_loses_less_than_plain() -> None:
    before = chain(RNG(6), 3)
    feed = {"x": np.concatenate([one["x"] for one in samples(seed=7)])}
    expected = outputs_of(before, feed)["y"]
    lost = []
    for method in ("svd", "whitened"):
        run = run_passes(before.clone(), f"factorize:params=0.6:method={method}", data=samples())
        lost.append(np.linalg.norm(outputs_of(run.model, feed)["y"] - expected))
    assert lost[1] < 0.8 * lost[0]


def test_bias_stays_to_the_bit_without_data_and_takes_the_mean_with_it() -> None:
    before = chain(RNG(8), 2)
    bias = weights_named(before, "b0")
    plain = run_passes(before.clone(), "factorize:params=0.6")
    np.testing.assert_array_equal(weights_named(plain.model, "b0"), bias)
    data = samples()
    run = run_passes(before.clone(), "factorize:params=0.6", data=data)
    feed = {"x": np.concatenate([one["x"] for one in data])}
    expected, found = outputs_of(before, feed)["y"], outputs_of(run.model, feed)["y"]
    spread = np.abs(expected - expected.mean(axis=0)).mean()
    assert np.abs(found.mean(axis=0) - expected.mean(axis=0)).max() < 0.05 * spread


def weights_named(model: ir.Model, name: str) -> Array:
    """Return the constant of a name, or the one that begins like it."""
    (value,) = [one for key, one in model.graph.initializers.items() if key.startswith(name)]
    assert value.const_value is not None
    return value.const_value.numpy()


def beside(weights: Sequence[Array]) -> ir.Model:
    """Return products that read the same rows."""
    products = " ".join(f"y{place} = MatMul (x, w{place})" for place in range(len(weights)))
    given = ", ".join(f"float[{WIDTH}, {WIDTH}] w{place}" for place in range(len(weights)))
    outputs = ", ".join(f"float[n, {WIDTH}] y{place}" for place in range(len(weights)))
    named = {f"w{place}": weight for place, weight in enumerate(weights)}
    return model_of(f"(float[n, {WIDTH}] x, {given}) => ({outputs}) {{ {products} }}", **named)


def test_an_error_is_the_mean_of_layers_also_where_some_are_together() -> None:
    """Of three layers that share their output directions, and so a first product."""
    rng = RNG(21)
    shared = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0] * np.geomspace(1, 0.05, WIDTH)
    model = beside([(shared @ np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0]).astype(np.float32) for _ in range(3)])
    run = run_passes(model, "factorize:error=0.05:method=svd")
    (facts,) = [note.facts for record in run.records for note in record.notes if "predicted_errors" in note.facts]
    (level,), (lost,) = facts["levels"], facts["predicted_errors"]
    assert level[0] == "stacked"
    assert 0.05 < lost <= 3 * 0.05
    assert any(f"{lost / 3:.2%} in the mean" in text for text in run.remarks)


def test_energy_is_kept_by_each_layer_by_itself() -> None:
    rng = RNG(22)
    weights = [low_rank(rng, WIDTH, WIDTH, 8, noise) for noise in (0.0, 0.05, 0.2)]
    run = run_passes(beside(weights), "factorize:energy=0.99:method=svd")
    (facts,) = [note.facts for record in run.records for note in record.notes if "predicted_errors" in note.facts]
    assert all(form in ("whole", "pair") for form, *_ in facts["levels"])
    assert all(lost <= 0.01 for lost in facts["predicted_errors"])


def test_energy_and_error() -> None:
    weight = low_rank(RNG(9), WIDTH, WIDTH, 12, 1e-4)
    run = run_passes(product_model(weight), "factorize:energy=0.999")
    assert sorted(one.shape for one in weights_of(run.model)) == [(16, WIDTH), (WIDTH, 16)]
    kept = run_passes(product_model(RNG(9).normal(size=(WIDTH, WIDTH)).astype(np.float32)), "factorize:error=0.01")
    assert [one.shape for one in weights_of(kept.model)] == [(WIDTH, WIDTH)]
    assert any("the model is unchanged" in remark for remark in kept.remarks)
    run = run_passes(chain(RNG(9), 3), "factorize:error=0.2", data=samples())
    (errors,) = [n.facts["predicted_errors"] for r in run.records for n in r.notes if "predicted_errors" in n.facts]
    assert sum(errors) > 0


@pytest.mark.parametrize("rank", [WIDTH, WIDTH - 1, 1000])
def test_rank_that_saves_nothing_changes_nothing(rank: int) -> None:
    model = product_model(low_rank(RNG(10), WIDTH, WIDTH))
    before = to_bytes(model.clone())
    run = run_passes(model, f"factorize:rank={rank}")
    assert operators(run.model) == ["MatMul"]
    assert to_bytes(run.model) == before
    assert any(f"`rank={rank}` takes no layer" in remark and "unchanged" in remark for remark in run.remarks)


def test_zero_weight() -> None:
    model = product_model(np.zeros((WIDTH, WIDTH), np.float32))
    run = run_passes(model, "factorize:params=0.5", data=samples())
    found = outputs_of(run.model, samples(1)[0])["y"]
    np.testing.assert_array_equal(found, np.zeros_like(found))


@pytest.mark.parametrize("wrong", [np.nan, np.inf])
@pytest.mark.parametrize("method", ["svd", "whitened"])
def test_weights_that_are_no_numbers_are_named(wrong: float, method: str) -> None:
    weight = low_rank(RNG(11), WIDTH, WIDTH)
    weight[3, 4] = wrong
    with pytest.raises(GraphoptError, match=r"`w` holds NaN or infinity"):
        run_passes(product_model(weight), f"factorize:method={method}", data=samples())


def test_shared_weight_is_factored_once_for_all() -> None:
    weight = low_rank(RNG(12), WIDTH, WIDTH)
    model = model_of(
        f"(float[n, {WIDTH}] x, float[{WIDTH}, {WIDTH}] w) => (float[n, {WIDTH}] y) "
        "{ a = MatMul (x, w)\n b = Relu (a)\n y = MatMul (b, w) }",
        w=weight,
    )
    before = model.clone()
    run = run_passes(model, f"factorize:rank={RANK}", data=samples())
    assert operators(run.model) == ["MatMul", "MatMul", "Relu", "MatMul", "MatMul"]
    assert sorted(one.shape for one in weights_of(run.model)) == [(RANK, WIDTH), (WIDTH, RANK)]
    close(run, before, samples(1)[0], 1e-4)


@pytest.mark.parametrize(
    ("text", "weights", "reason"),
    [
        (
            "(float[n, 64] x, float[64, 64] w) => (float[n, 64] y, float[64, 64] z) "
            "{ y = MatMul (x, w)\n z = Mul (w, w) }",
            ["w"],
            "also read by Mul",
        ),
        (
            "(float[n, 64] x, float[64, 64] w) => (float[n, 64] y) { t = Mul (x, x)\n y = MatMul (t, w) }",
            [],
            "computed, not constant",
        ),
        (
            "(float[3, n, 64] x, float[3, 64, 64] w) => (float[3, n, 64] y) { y = MatMul (x, w) }",
            ["w"],
            "a matrix for each of several batches",
        ),
        (
            "(float[n, 64] x, float[64, 1] w) => (float[n, 1] y) { y = MatMul (x, w) }",
            ["w"],
            "two factors of any rank would be no smaller",
        ),
    ],
    ids=["read elsewhere", "computed", "batches", "vector"],
)
def test_what_is_left_is_said(text: str, weights: Sequence[str], reason: str) -> None:
    shapes = {"w": (3, 64, 64) if "[3, 64, 64] w" in text else (64, 1) if "[64, 1] w" in text else (64, 64)}
    contents = {name: RNG(13).normal(size=shapes[name]).astype(np.float32) for name in weights}
    run = run_passes(model_of(text, **contents), "factorize")
    assert operators(run.model).count("MatMul") == 1
    assert any(reason in remark for remark in run.remarks)
    assert any("found no layer that can be factored" in remark for remark in run.remarks)


def test_few_rows_do_not_make_a_layer_look_low_rank() -> None:
    moments = (rows := RNG(22).normal(size=(8, WIDTH)).astype(np.float32)).T @ rows / 8
    weight = RNG(23).normal(size=(WIDTH, WIDTH))
    seen = Spectrum(weight, moments)
    assert seen.errors[16] < 1e-6 * seen.errors[0]
    held = Spectrum(weight, steadied(moments[None], 8))
    assert held.errors[16] > 0.1 * held.errors[0]
    many = np.eye(WIDTH, dtype=np.float32)[None] * np.arange(1, WIDTH + 1, dtype=np.float32)
    assert steadied(many, 1_000_000) is many


def test_excluded_layers_stay() -> None:
    model = chain(RNG(14), 2)
    first, second = (node for node in model.graph if node.op_type == "MatMul")
    first.name, second.name = "encoder", "decoder"
    run = run_passes(model, f"factorize:rank={RANK}:exclude=dec*")
    assert sorted(one.shape for one in weights_of(run.model) if one.ndim == 2) == [
        (RANK, WIDTH),
        (WIDTH, RANK),
        (WIDTH, WIDTH),
    ]
    with pytest.raises(GraphoptError, match="matches no node"):
        run_passes(chain(RNG(14), 2), "factorize:include=nothing*")


def test_layer_in_a_subgraph_is_factored_by_its_weights() -> None:
    weight = low_rank(RNG(15), WIDTH, WIDTH)
    model = model_of(
        f"(float[n, {WIDTH}] x, bool c, float[{WIDTH}, {WIDTH}] w) => (float[n, {WIDTH}] y) "
        f"{{ y = If (c) <then_branch = one () => (float[n, {WIDTH}] p) {{ p = MatMul (x, w) }}, "
        f"else_branch = other () => (float[n, {WIDTH}] q) {{ q = Neg (x) }}> }}",
    )
    graph = model.graph
    value = next(one for one in graph.inputs if one.name == "w")
    value.const_value = ir.tensor(weight, name="w")
    graph.inputs[:] = [one for one in graph.inputs if one is not value]
    graph.register_initializer(value)
    before = model.clone()
    run = run_passes(model, f"factorize:rank={RANK}")
    assert sorted(one.shape for one in weights_of(run.model)) == [(RANK, WIDTH), (WIDTH, RANK)]
    close(run, before, {**samples(1)[0], "c": np.array(True)}, 1e-5)


def test_float16_stays_float16() -> None:
    weight = low_rank(RNG(16), WIDTH, WIDTH).astype(np.float16)
    model = model_of(
        f"(float16[n, {WIDTH}] x, float16[{WIDTH}, {WIDTH}] w) => (float16[n, {WIDTH}] y) {{ y = MatMul (x, w) }}",
        w=weight,
    )
    before = model.clone()
    run = run_passes(model, f"factorize:rank={RANK}")
    assert {one.dtype for one in weights_of(run.model)} == {np.dtype(np.float16)}
    close(run, before, {"x": RNG(16).normal(size=(4, WIDTH)).astype(np.float16)}, 1e-2)


def test_simplify_does_not_put_it_together_again() -> None:
    run = run_passes(product_model(low_rank(RNG(17), WIDTH, WIDTH)), f"factorize:rank={RANK},simplify")
    assert operators(run.model) == ["MatMul", "MatMul"]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("params=0.5:macs=0.5", "cannot both be given"),
        ("params=1", "out of range"),
        ("macs=0", "out of range"),
        ("rank=0", "out of range"),
        ("method=best", "cannot be `best`"),
        ("macs=0.5:residual=int4", "saves no multiplications"),
    ],
)
def test_wrong_options_are_refused(options: str, words: str) -> None:
    with pytest.raises(GraphoptError, match=words) as caught:
        run_passes(product_model(low_rank(RNG(18), WIDTH, WIDTH)), f"factorize:{options}")
    assert caught.value.hint


def test_more_than_can_be_had_is_said() -> None:
    run = run_passes(product_model(low_rank(RNG(19), WIDTH, WIDTH)), "factorize:params=0.01")
    assert any("`params=0.01` cannot be had" in remark for remark in run.remarks)


def test_without_data_whitened_asks_for_it() -> None:
    with pytest.raises(GraphoptError, match="calibration data"):
        run_passes(product_model(low_rank(RNG(20), WIDTH, WIDTH)), "factorize:method=whitened")


@pytest.mark.parametrize(
    ("sizes", "multiple", "ranks"),
    [
        ((64, 64), 16, [16]),
        ((128, 64), 16, [32, 16]),
        ((24, 24), 16, [8]),
        ((10, 10), 16, [4, 3, 2, 1]),
        ((1, 9), 8, []),
    ],
)
def test_ranks_save_something_and_suit_the_target(sizes: tuple[int, int], multiple: int, ranks: list[int]) -> None:
    found = allowed_ranks(*sizes, multiple)
    assert found == ranks
    assert all(rank * sum(sizes) < sizes[0] * sizes[1] for rank in found)


def test_how_much_a_layer_matters_is_tried_where_next_to_no_weights_go() -> None:
    result = graphopt.optimize(chain(RNG(11), 3), "factorize:params=0.97", data=samples())
    remarks = [note.text for step in result.report.steps for note in step.notes]
    assert any("layers factored" in remark for remark in remarks)
    assert not any("0 of 3 layers tried alone" in remark for remark in remarks)


def test_what_is_taken_without_a_look_at_the_clock_is_said() -> None:
    model, data = product_model(low_rank(RNG(12), WIDTH, WIDTH)), samples()
    said = {}
    for backend in ("reference", "onnxruntime"):
        result = graphopt.optimize(model, "factorize:macs=0.6", data=data, backend=backend)
        said[backend] = " ".join(note.text for step in result.report.steps for note in step.notes)
    assert "taken without a look at the clock: 1" in said["reference"]
    assert "without a look at the clock" not in said["onnxruntime"]
