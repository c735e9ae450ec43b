"""Times of factored layers: which models are opened, on which shapes, and what is made of their times; no clock."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir
import pytest

from graphopt import Context, Guarantee, Pass, latency, provenance, registry, shapes
from graphopt.backend import Feeds
from graphopt.errors import BackendError
from graphopt.passes.analyses.linear_layers import linear_layers
from graphopt.passes.lossy import pair_latency
from graphopt.passes.lossy.factor_forms import Candidate, Level
from graphopt.passes.lossy.factored_convolutions import candidate_of
from graphopt.passes.lossy.factored_products import Product
from graphopt.passes.lossy.pair_latency import PairClock
from graphopt.passes.lossy.stacked_layers import Stack
from graphopt.passes.solvers.stacked_rank import Part
from graphopt.summary import count_parameters
from tests.pass_runs import run_passes

CONVOLUTIONS = """
<ir_version: 9, opset_import: ["" : 17]>
net (float[batch, 16, 9, 7] x) => (float[batch, 16, 9, 7] y)
{
    a = Conv <pads = [1, 1, 1, 1]> (x, w)
    b = Relu (a)
    c = Conv <pads = [1, 1, 1, 1]> (b, v)
    y = Conv <pads = [1, 1, 1, 1]> (c, u)
}
"""
IN_A_BRANCH = """
<ir_version: 9, opset_import: ["" : 17]>
net (float[batch, 16, 9, 7] x, bool c) => (float[batch, 16, 9, 7] y)
{
    y = If (c) <
        then_branch = then () => (t) { r = Relu (x)
            t = Conv <pads = [1, 1, 1, 1]> (r, w) },
        else_branch = other () => (e) { e = Identity (x) }
    >
}
"""
PRODUCTS = """
<ir_version: 9, opset_import: ["" : 17]>
net (float[batch, length, 32] x) => (float[batch, length, 32] y, float[batch, length, 16] z)
{
    y = MatMul (x, w)
    z = MatMul (x, v)
}
"""


def model_of(text: str, **weights: Sequence[int]) -> ir.Model:
    """A model with random weights of these sizes, shapes inferred."""
    model = ir.from_onnx_text(text)
    rng = np.random.default_rng(0)
    values = {value.name: value for node in model.graph for value in node.inputs if value is not None}
    for name, dims in weights.items():
        values[name].const_value = ir.tensor(rng.standard_normal(dims).astype(np.float32), name=name)
        values[name].shape, values[name].type = ir.Shape(dims), ir.TensorType(ir.DataType.FLOAT)
        model.graph.register_initializer(values[name])
    provenance.stamp(model)
    shapes.infer_shapes(model)
    return model


def convolutions() -> ir.Model:
    return model_of(CONVOLUTIONS, w=(16, 16, 3, 3), v=(16, 16, 3, 3), u=(16, 16, 3, 3))


@dataclass
class Recorded:
    """A session of a backend that remembers what it opened."""

    inner: Any
    model: ir.Model
    fed: list[Feeds] = field(default_factory=list)

    def run(self, feeds: Feeds) -> dict[str, Any]:
        self.fed.append(feeds)
        return self.inner.run(feeds)

    def __enter__(self) -> Recorded:
        return self

    def __exit__(self, *error: object) -> None:
        self.inner.close()


@dataclass(frozen=True)
class Recorder:
    """ONNX Runtime, remembering every session."""

    name: ClassVar[str] = "recorder"
    opened: list[Recorded] = field(default_factory=list)
    refuses_chains: bool = False

    def open(self, model: ir.Model, *, threads: int = 0, optimize: bool = True, profile: Any = None) -> Recorded:
        if self.refuses_chains and len(list(model.graph)) == 2:
            raise BackendError("no such kernel")
        session = registry.backend("onnxruntime").open(model, threads=threads, optimize=optimize)
        self.opened.append(Recorded(session, model))
        return self.opened[-1]


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Recorded, Recorded]]:
    """Let time go by weights; every pair that is timed runs once."""
    pairs: list[tuple[Recorded, Recorded]] = []

    def by_size(sessions: Any, feeds: Any, **_: Any) -> list[latency.Latency]:
        pairs.append(tuple(sessions))
        for session, feed in zip(sessions, feeds, strict=True):
            session.run(feed)
        sizes = [count_parameters(session.model) for session in sessions]
        return [latency.Latency(one, one, one, 1, one / sizes[0]) for one in sizes]

    monkeypatch.setattr(latency, "measure", by_size)
    return pairs


def within(model: ir.Model, work: Any, *, backend: Any, data: Any = None) -> None:
    """Do something with a context that runs things by a backend."""

    @dataclass(frozen=True)
    class Look(Pass):
        name = "look"
        guarantee = Guarantee.LOSSY

        def run(self, model: ir.Model, ctx: Context) -> None:
            object.__setattr__(ctx, "backend", backend)
            work(ctx)

    run_passes(model, [Look()], data=data)


def candidates(ctx: Context) -> list[Any]:
    found = [candidate_of(layer, "auto", "svd", ctx) for layer in linear_layers(ctx.model)]
    assert not any(isinstance(one, str) for one in found)
    return found


def level_of(candidate: Candidate, form: str, ctx: Context) -> Level:
    return next(one for one in candidate.curve(lambda _: None, ctx).levels if one.form == form)


@pytest.mark.parametrize("with_data", [False, True])
def test_layers_alike_are_timed_once_on_the_shapes_of_one_sample(timed: list[Any], with_data: bool) -> None:
    recorder, model = Recorder(), convolutions()
    data = [{"x": np.zeros((2, 16, 9, 7), np.float32)}] * 3 if with_data else None

    def work(ctx: Context) -> None:
        layers = candidates(ctx)
        clock = PairClock(ctx, layers)
        for form in ("channel", "input", "spatial", "tucker"):
            levels = [level_of(candidate, form, ctx) for candidate in layers]
            ratios = [clock.ratio(one, level) for one, level in zip(layers, levels, strict=True)]
            assert ratios == pytest.approx([levels[0].macs / layers[0].macs] * 3)
            assert clock.pays(layers[0], levels[0]) == (ratios[0] < 0.98)
        assert clock.ratio(layers[0], layers[0].curve(lambda _: None, ctx).levels[0]) == 1

    edges = uses(model)
    within(model, work, backend=recorder, data=data)
    assert len(timed) == 4, "one for each form"
    for original, chain in timed:
        assert [node.op_type for node in original.model.graph] == ["Conv"]
        assert {node.op_type for node in chain.model.graph} == {"Conv"}
        assert len(list(chain.model.graph)) in (2, 3)
        assert original.fed[0]["in0"].shape == chain.fed[0]["in0"].shape == (1, 16, 9, 7)
        found = chain.inner
        assert found is not None
    assert uses(model) == edges, "the model reads what it read"


def uses(model: ir.Model) -> list[int]:
    return [len(value.uses()) for node in model.graph for value in (*node.inputs, *node.outputs) if value is not None]


@pytest.mark.parametrize("shared", [False, True])
def test_products_and_stacks(timed: list[Any], shared: bool) -> None:
    model = model_of(PRODUCTS, w=(32, 32), v=(32, 16))

    def work(ctx: Context) -> None:
        layers = linear_layers(ctx.model)
        products = tuple(Product(layer, [layer], "svd") for layer in layers)
        clock = PairClock(ctx, products)
        if shared:
            plan = (Part((0, 1), 8),)
            stack = Stack(products)
            assert clock.ratio(stack, Level("stacked", (8,), 0.1, 0, 0.0, plan)) == pytest.approx(
                (8 * 32 + 8 * 32 + 8 * 16) / (32 * 32 + 32 * 16)
            )
            apart = (Part((0,), 8), Part((1,), None))
            assert clock.ratio(stack, Level("pair", (8,), 0.1, 0, 0.0, apart)) == pytest.approx(
                (16 * 32 + 32 * 16) / (32 * 32 + 32 * 16)
            )
        else:
            ratio = clock.ratio(products[1], Level("pair", (4,), 0.1, 0, 0.0))
            assert ratio == pytest.approx(4 * 48 / (32 * 16))

    within(model, work, backend=Recorder(), data=[{"x": np.zeros((1, 5, 32), np.float32)}])
    assert timed
    assert timed[0][0].fed[0]["in0"].shape == (1, 5, 32)


def test_nearly_equal_times_are_looked_at_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds: list[float] = []

    def equal(sessions: Any, feeds: Any, **how: Any) -> list[latency.Latency]:
        seconds.append(how["seconds"])
        return [latency.Latency(1, 1, 1, 1, ratio) for ratio in (1.0, 1.05)]

    monkeypatch.setattr(latency, "measure", equal)

    def work(ctx: Context) -> None:
        first = candidates(ctx)[0]
        clock = PairClock(ctx, [first])
        assert not clock.pays(first, level_of(first, "spatial", ctx))

    within(convolutions(), work, backend=Recorder())
    assert seconds == [pair_latency._SECONDS, pair_latency._MORE_SECONDS]


def test_what_cannot_be_timed_is_not(timed: list[Any]) -> None:
    def untimed(ctx: Context) -> None:
        first = candidates(ctx)[0]
        level = level_of(first, "spatial", ctx)
        clock = PairClock(ctx, [first])
        assert clock.ratio(first, level) is None
        assert clock.pays(first, level)

    within(convolutions(), untimed, backend=registry.backend("reference"))
    within(convolutions(), untimed, backend=Recorder(refuses_chains=True))
    assert not timed


def test_a_layer_in_a_branch_is_not_timed(timed: list[Any]) -> None:
    model = ir.from_onnx_text(IN_A_BRANCH)
    branch = model.graph.node(0).attributes["then_branch"].as_graph()
    weight = branch.node(1).inputs[1]
    assert weight is not None
    content = ir.tensor(np.ones((16, 16, 3, 3), np.float32), name="w")
    value = ir.Value(name="w", const_value=content, type=ir.TensorType(content.dtype), shape=content.shape)
    model.graph.register_initializer(value)
    branch.node(1).replace_input_with(1, value)
    provenance.stamp(model)

    def work(ctx: Context) -> None:
        (inner,) = candidates(ctx)
        assert PairClock(ctx, [inner]).ratio(inner, level_of(inner, "spatial", ctx)) is None

    within(model, work, backend=Recorder())
    assert not timed
