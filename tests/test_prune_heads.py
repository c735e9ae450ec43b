"""Pruning of attention heads: which groups they are, that whole ones go, and what makes up for them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import latency, shapes, summary
from graphopt.errors import GraphoptError, UsageError
from graphopt.passes import PruneHeads
from graphopt.passes.analyses.channel_groups import Layout, Side, channel_groups
from graphopt.passes.lossy.channel_latency import widths_by_latency
from graphopt.passes.lossy.channel_widths import WidthPlan
from graphopt.passes.lossy.prune_heads import are_heads

from .pass_runs import outputs_of
from .removed_channels import context, parsed

FEATURES, HEADS, WIDE, LENGTH = 12, 4, 3, 5

# Post-norm attention of four heads, and what follows it.
ATTENTION = """<ir_version: 8, opset_import: ["": 17]>
attention (float[N, 5, 12] x) => (float[N, 5, 7] y)
<float[12, 12] wq, float[12] bq, float[12, 12] wk, float[12, 12] wv, float[12] bv, float[12, 12] wo, float[12] bo,
 float[12] scale, float[12] shift, float[12, 20] w1, float[20, 7] w2, int64[4] split = {0, 0, 4, 3},
 int64[3] merged = {0, 0, 12}, float third = {0.577}>
{
    q0 = MatMul (x, wq)
    q1 = Add (q0, bq)
    q2 = Reshape (q1, split)
    q = Transpose <perm = [0, 2, 1, 3]> (q2)
    k0 = MatMul (x, wk)
    k2 = Reshape (k0, split)
    k = Transpose <perm = [0, 2, 3, 1]> (k2)
    v0 = MatMul (x, wv)
    v1 = Add (v0, bv)
    v2 = Reshape (v1, split)
    v = Transpose <perm = [0, 2, 1, 3]> (v2)
    s0 = MatMul (q, k)
    s1 = Mul (s0, third)
    p = Softmax <axis = -1> (s1)
    c0 = MatMul (p, v)
    c1 = Transpose <perm = [0, 2, 1, 3]> (c0)
    c = Reshape (c1, merged)
    o0 = MatMul (c, wo)
    o = Add (o0, bo)
    a = Add (x, o)
    n = LayerNormalization <axis = -1> (a, scale, shift)
    u = MatMul (n, w1)
    g = Relu (u)
    y = MatMul (g, w2)
}"""

# Eight heads of queries, two of them for each head of keys and values.
GROUPED = """<ir_version: 8, opset_import: ["": 17]>
grouped (float[N, 5, 16] x) => (float[N, 5, 16] y)
<float[16, 16] wq, float[16, 8] wk, float[16, 8] wv, float[16, 16] wo, int64[5] of_queries = {0, 5, 4, 2, 2},
 int64[5] of_keys = {0, 5, 4, 1, 2}, int64[3] merged = {0, 5, 16}>
{
    q0 = MatMul (x, wq)
    q2 = Reshape (q0, of_queries)
    q = Transpose <perm = [0, 2, 3, 1, 4]> (q2)
    k0 = MatMul (x, wk)
    k2 = Reshape (k0, of_keys)
    k = Transpose <perm = [0, 2, 3, 4, 1]> (k2)
    v0 = MatMul (x, wv)
    v2 = Reshape (v0, of_keys)
    v = Transpose <perm = [0, 2, 3, 1, 4]> (v2)
    s0 = MatMul (q, k)
    p = Softmax <axis = -1> (s0)
    c0 = MatMul (p, v)
    c1 = Transpose <perm = [0, 3, 1, 2, 4]> (c0)
    c = Reshape (c1, merged)
    y = MatMul (c, wo)
}"""


def named(text: str) -> ir.Model:
    model = parsed(text)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def content(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


def rows(features: int = FEATURES, count: int = 40, seed: int = 0) -> np.ndarray:
    """Rows of fewer dimensions than they have features, and a little noise."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((count, LENGTH, 6)) @ np.random.default_rng(9).standard_normal((6, features))
    return (mixed + 0.1 * rng.standard_normal((count, LENGTH, features))).astype(np.float32)


def run(model: ir.Model, spec: Any, data: np.ndarray | None = None) -> graphopt.Result:
    return graphopt.optimize(model, spec, data={"x": data} if data is not None else None)


def remarks(result: graphopt.Result) -> str:
    return " ".join(note.text for step in result.report.steps for note in step.notes)


def matrices(model: ir.Model) -> list[tuple[int, ...]]:
    found = [node.inputs[1] for node in model.graph if node.op_type == "MatMul"]
    return [tuple(value.const_value.shape) for value in found if value is not None and value.const_value is not None]


def noise(was: ir.Model, now: ir.Model, data: np.ndarray) -> float:
    before, after = (outputs_of(model, {"x": data})["y"] for model in (was, now))
    return float(np.square(after - before).sum() / np.square(before).sum())


@pytest.mark.parametrize(("text", "heads"), [(ATTENTION, 4), (GROUPED, 4)])
def test_heads_are_told_from_neurons(text: str, heads: int) -> None:
    groups = channel_groups(named(text), Layout(splits=Side.MAJOR)).groups
    assert [group.size for group in groups if are_heads(group)] == [heads]


@pytest.mark.parametrize("criterion", ["l1", "l2", "variance", "obs", "taylor"])
def test_whole_heads_go(criterion: str) -> None:
    result = run(named(ATTENTION), PruneHeads(ratio=0.5, criterion=criterion), rows())  # type: ignore[arg-type]
    assert matrices(result.model) == [(12, 6), (12, 6), (12, 6), (6, 12), (12, 20), (20, 7)]
    assert shapes.infer_shapes(result.model) is None
    assert outputs_of(result.model, {"x": rows(count=2)})["y"].shape == (2, LENGTH, 7)
    assert "2 of 4 attention heads removed" in remarks(result)
    assert "`q0` 2 of 4" in remarks(result)


def test_heads_of_queries_go_with_those_of_keys() -> None:
    result = run(named(GROUPED), PruneHeads(ratio=0.25), rows(16))
    assert matrices(result.model) == [(16, 12), (16, 6), (16, 6), (12, 16)]
    assert outputs_of(result.model, {"x": rows(16, 2)})["y"].shape == (2, LENGTH, 16)


def test_without_data_the_rest_is_as_it_was() -> None:
    model = named(ATTENTION)
    weight = content(model, "wo").copy()
    weight[3:6] *= 1e-4
    for name in ("wq", "wk", "wv"):
        small = content(model, name).copy()
        small[:, 3:6] *= 1e-2
        model.graph.initializers[name].const_value = ir.tensor(small, name=name)
    model.graph.initializers["wo"].const_value = ir.tensor(weight, name="wo")
    result = run(model.clone(), PruneHeads(ratio=0.25))
    kept = content(result.model, "wo")
    np.testing.assert_array_equal(kept, np.delete(weight, range(3, 6), axis=0))
    assert noise(model, result.model, rows(count=4)) < 1e-4


def test_the_rest_makes_up_for_a_head() -> None:
    # The second head repeats the first, so that either can be made up for.
    model = named(ATTENTION)
    for name in ("wq", "wk", "wv", "bq", "bv"):
        twice = content(model, name).copy()
        twice[..., 3:6] = twice[..., 0:3]
        model.graph.initializers[name].const_value = ir.tensor(twice, name=name)
    fresh = rows(count=16, seed=5)
    result = run(model.clone(), PruneHeads(ratio=0.25), rows())
    assert noise(model, result.model, fresh) < 1e-3
    small = run(model.clone(), PruneHeads(ratio=0.25, criterion="l2"))
    assert noise(model, small.model, fresh) > 10 * noise(model, result.model, fresh)


def test_macs_are_reached() -> None:
    result = run(named(ATTENTION), PruneHeads(macs=0.8), rows())
    assert result.report.after.macs <= 0.8 * result.report.before.macs


def test_by_the_clock_whole_heads_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    def by_parameters(sessions: Any, *_: Any, **__: Any) -> list[latency.Latency]:
        return [latency.Latency(one, one, one, 1, one / sessions[0]) for one in sessions]

    @contextmanager
    def opened(_: Any, model: ir.Model, **__: Any) -> Iterator[int]:
        yield summary.summarize(model).macs

    model = named(ATTENTION)
    ctx = context(model)
    monkeypatch.setattr(latency, "measure", by_parameters)
    monkeypatch.setattr(type(ctx.backend), "open", opened)
    layout = Layout(splits=Side.MAJOR)
    heads = [group for group in channel_groups(model, layout).groups if are_heads(group)]
    widths, measured = widths_by_latency(WidthPlan(heads, 1, ctx), 0.8, layout, ctx)
    assert measured == pytest.approx(widths.macs)
    assert measured <= 0.8


def test_attention_is_chosen_by_name() -> None:
    assert "unchanged" in remarks(run(named(ATTENTION), PruneHeads(exclude=("q0",))))
    assert "removed" in remarks(run(named(ATTENTION), PruneHeads(ratio=0.25, include=("q0",))))
    with pytest.raises(UsageError, match="matches no node"):
        run(named(ATTENTION), PruneHeads(include=("nothing*",)))


@pytest.mark.parametrize("ratio", ["0", "1", "1.5", "-0.3"])
def test_ratios_that_mean_nothing_are_refused(ratio: str) -> None:
    with pytest.raises(UsageError, match="pass `prune-heads`: option `ratio` is out of range") as caught:
        run(named(ATTENTION), f"prune-heads:ratio={ratio}")
    assert caught.value.hint


def test_one_head_always_stays() -> None:
    result = run(named(ATTENTION), PruneHeads(ratio=0.99))
    assert matrices(result.model)[0] == (12, 3)


def test_without_heads_the_model_is_unchanged() -> None:
    text = GROUPED[: GROUPED.index("{\n    q0")] + "{\n    y = MatMul (x, wo)\n}"
    result = run(named(text), "prune-heads")
    assert "found no attention heads that can be removed: the model is unchanged" in remarks(result)
    few = run(named(ATTENTION), "prune-heads:ratio=0.1")
    assert "the model is unchanged" in remarks(few)
    assert matrices(few.model) == matrices(named(ATTENTION))


def test_a_quantized_model_is_refused_with_the_right_order() -> None:
    quantized = run(named(ATTENTION), "quant:mode=weights").model
    with pytest.raises(GraphoptError, match="already quantized") as caught:
        run(quantized, "prune-heads")
    assert "prune-heads,quant" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("file", "left"),
    [("stories260k.onnx", "3 of 4"), ("all-MiniLM-L6-v2.onnx", "10 of 12")],
)
def test_real_models_lose_heads_and_run(shared: Path, file: str, left: str) -> None:
    model = graphopt.load(shared / "assets" / "models" / file)
    result = graphopt.optimize(model, PruneHeads(ratio=0.2, criterion="l2"), verify="off")
    assert left in remarks(result)
    names = [value.name or "" for value in result.model.graph.inputs]
    feed = {name: np.ones((2, 16), np.int64) for name in names}
    assert all(np.isfinite(value).all() for value in outputs_of(result.model, feed).values())
    assert result.report.after.parameters < result.report.before.parameters
