"""Allocation against brute force, costs of widths against models really shrunk, and weights of errors as measured."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import Context, Guarantee, Need, Pass
from graphopt.data import Dataset, open_data
from graphopt.passes.analyses.channel_groups import ChannelGroup, channel_groups
from graphopt.passes.analyses.output_damage import Change, error_weights, say_curve, tried_of
from graphopt.passes.analyses.width_costs import WidthCosts, cost_of_cuts
from graphopt.passes.lossy.channel_trial import best_of
from graphopt.passes.lossy.channel_widths import Widths
from graphopt.passes.lossy.shrinking import shrink
from graphopt.passes.solvers.allocation import Separable, allocate, allocate_evenly, allowed_widths
from graphopt.standing import Standing
from graphopt.summary import count_macs, count_parameters

from .removed_channels import context, parsed

pytest.importorskip("onnxruntime")

MODELS = Path(__file__).resolve().parent.parent / "models"


@dataclass
class Bilinear:
    """Costs of layers between neighbours: the product of the widths on both sides."""

    widths: Sequence[np.ndarray]
    factors: Sequence[float]

    def __call__(self, levels: Sequence[int]) -> float:
        kept = [own[level] for own, level in zip(self.widths, levels, strict=True)]
        return float(sum(f * a * b for f, a, b in zip(self.factors, [3, *kept], [*kept, 10], strict=True)))

    def along(self, item: int, levels: Sequence[int]) -> np.ndarray:
        every = range(len(self.widths[item]))
        return np.array([self([*levels[:item], one, *levels[item + 1 :]]) for one in every])


def curves(rng: np.random.Generator, items: int, levels: int) -> list[np.ndarray]:
    """Errors from 0, neither convex nor monotone everywhere, of scales that differ a hundredfold."""
    steps = [rng.exponential(size=levels - 1) - 0.1 for _ in range(items)]
    return [np.append(0, np.cumsum(own)) * 10 ** rng.uniform(-1, 1) for own in steps]


def problem(seed: int, *, bilinear: bool) -> tuple[list[np.ndarray], Separable | Bilinear, float]:
    rng = np.random.default_rng(seed)
    items, levels = int(rng.integers(2, 5)), int(rng.integers(2, 6))
    widths = [np.linspace(1, 0.2, levels) * rng.integers(8, 65) for _ in range(items)]
    cost = Bilinear(widths, rng.uniform(0.1, 2, items + 1)) if bilinear else Separable(widths)
    return curves(rng, items, levels), cost, rng.uniform(0.4, 0.95) * cost([0] * items)


def least(errors: Sequence[np.ndarray], cost: Separable | Bilinear, budget: float) -> float | None:
    """Return the least error of all choices that hold, by trying each."""
    choices = itertools.product(*(range(len(own)) for own in errors))
    found = [sum(own[level] for own, level in zip(errors, one, strict=True)) for one in choices if cost(one) <= budget]
    return min(found, default=None)


@pytest.mark.parametrize("bilinear", [False, True])
def test_choice_holds_and_is_nearly_always_the_best_of_all(bilinear: bool) -> None:
    gaps = []
    for seed in range(60):
        errors, cost, budget = problem(seed, bilinear=bilinear)
        found, best = allocate(errors, cost, budget), least(errors, cost, budget)
        assert found.cost == pytest.approx(cost(found.levels))
        assert found.holds == (best is not None)
        if best is None:
            continue
        assert found.cost <= budget * (1 + 1e-6)
        assert found.error >= best - 1e-9
        gaps.append(found.error - best)
    assert np.mean(np.array(gaps) < 1e-9) > 0.9
    assert np.mean(gaps) < 0.05


def test_many_items_lie_on_the_hull_but_for_one_step() -> None:
    rng = np.random.default_rng(0)
    errors = [np.linspace(0, 1, 21) ** 2 * rng.exponential() for _ in range(60)]
    sizes = rng.integers(8, 65, 60).astype(float)
    cost = Separable([size * (1 - np.linspace(0, 1, 21)) for size in sizes])
    found = allocate(errors, cost, 0.6 * sizes.sum())
    # The bound of the dual problem, at the best of many prices.
    prices = np.geomspace(1e-4, 10, 2000)[:, None]
    terms = zip(errors, cost.costs, sizes, strict=True)
    dual = sum((own + prices * (left - 0.6 * size)).min(axis=1) for own, left, size in terms)
    assert found.error <= dual.max() * 1.002
    even = allocate_evenly([np.linspace(0, 1, 21)] * 60, cost, 0.6 * sizes.sum())
    assert found.error < 0.9 * sum(own[level] for own, level in zip(errors, even.levels, strict=True))


def test_what_cannot_be_reached_is_said_and_comes_as_near_as_can_be() -> None:
    cost = Separable([np.array([4.0, 2.0]), np.array([4.0, 3.0])])
    for found in (
        allocate([np.array([0.0, 1.0])] * 2, cost, 4.9),
        allocate_evenly([np.array([0.0, 0.5])] * 2, cost, 4.9),
    ):
        assert (found.holds, found.levels, found.cost) == (False, (1, 1), 5.0)
    # A budget that is met to the last bit holds.
    assert allocate([np.array([0.0, 1.0])] * 2, cost, 5.0).holds


def test_what_costs_nothing_to_remove_goes() -> None:
    errors = [np.array([0.0, 0.0, 1.0]), np.array([0.0, 0.1])]
    found = allocate(errors, Separable([np.array([3.0, 2.0, 1.0]), np.array([3.0, 1.0])]), 100.0)
    assert found.levels == (1, 0)


def test_even_shares_are_the_smallest_that_hold() -> None:
    shares = [np.array([0, 0.25, 0.5, 0.75]), np.array([0, 0.1, 0.3, 0.6]), np.array([0.0, 1 / 3, 2 / 3])]
    cost = Separable([1 - own for own in shares])
    assert allocate_evenly(shares, cost, 2.46).levels == (1, 2, 0)  # up to 30 % of each
    assert allocate_evenly(shares, cost, 2.2).levels == (1, 2, 1)  # up to a third
    assert allocate_evenly(shares, cost, 3.0).levels == (0, 0, 0)


@pytest.mark.parametrize(
    ("size", "multiple", "least", "widths"),
    [
        (10, 4, 1, [10, 8, 4]),
        (16, 8, 1, [16, 8]),
        (16, 1, 13, [16, 15, 14, 13]),
        (3, 8, 1, [3]),
        (1, 1, 1, [1]),
        (8, 2, 5, [8, 6]),
    ],
)
def test_allowed_widths(size: int, multiple: int, least: int, widths: list[int]) -> None:
    assert allowed_widths(size, multiple, least) == widths


RESIDUAL = """
<ir_version: 8, opset_import: ["" : 18]>
net (float[1,3,8,8] x) => (float[1,5] y)
<float[12,3,3,3] w1, float[12] b1, float[8,12,3,3] w2, float[12,8,1,1] w3, float[12,1,3,3] dw, float[768,5] w4>
{
    a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    b = Conv <pads = [1, 1, 1, 1]> (a, w2)
    c = Conv (b, w3)
    d = Add (a, c)
    e = Conv <group = 12, pads = [1, 1, 1, 1]> (d, dw)
    f = Flatten (e)
    y = MatMul (f, w4)
}
"""


def cuts_of(groups: Sequence[ChannelGroup], seed: int) -> dict[ChannelGroup, np.ndarray]:
    rng = np.random.default_rng(seed)
    cuts = {group: rng.permutation(group.size) >= rng.integers(0, group.size) for group in groups}
    return {group: kept for group, kept in cuts.items() if kept.any()}


@pytest.mark.parametrize("seed", range(3))
def test_costs_are_those_of_the_model_once_it_is_shrunk(seed: int) -> None:
    model = parsed(RESIDUAL)
    groups = channel_groups(model).groups
    assert len(groups) == 2
    cuts = cuts_of(groups, seed)
    kept = [int(cuts[group].sum()) if group in cuts else group.size for group in groups]
    expected = {name: cost_of_cuts(model, cuts, name) for name in ("macs", "parameters", "bytes")}  # type: ignore[arg-type]
    widths = [[group.size, own] for group, own in zip(groups, kept, strict=True)]
    forecast = {name: WidthCosts(model, groups, widths, name)([1, 1]) for name in expected}  # type: ignore[arg-type]
    shrink(context(model), cuts)
    found = {"macs": count_macs(model), "parameters": count_parameters(model)}
    found["bytes"] = 4 * found["parameters"]
    assert {name: expected[name] for name in found} == found
    assert {name: forecast[name] for name in found} == pytest.approx(found)


def test_costs_along_one_group_are_those_at_each_of_its_widths() -> None:
    model = parsed(RESIDUAL)
    groups = channel_groups(model).groups
    widths = [allowed_widths(group.size) for group in groups]
    costs = WidthCosts(model, groups, widths)
    assert costs([0, 0]) == count_macs(model)
    for item, levels in ((0, [3, 2]), (1, [5, 0])):
        along = [costs([*levels[:item], one, *levels[item + 1 :]]) for one in range(len(widths[item]))]
        np.testing.assert_allclose(costs.along(item, levels), along)
    found = allocate([np.arange(len(own), dtype=float) for own in widths], costs, 0.7 * costs([0, 0]))
    assert found.holds
    assert 0.6 * count_macs(model) < found.cost <= 0.7 * count_macs(model)


@contextmanager
def judged(original: ir.Model, samples: Dataset) -> Iterator[object]:
    """Judge by how much the weights changed: w1 tells a hundred times as much as the others."""

    def judge(model: ir.Model) -> Standing:
        moved = {
            name: float(np.square(value.const_value.numpy() - model.graph.initializers[name].const_value.numpy()).sum())  # type: ignore[union-attr]
            for name, value in original.graph.initializers.items()
        }
        return Standing("noise", sum(error * (100 if name == "w1" else 1) for name, error in moved.items()), {}, {})

    yield judge


def prepared() -> Context:
    samples: Mapping[str, np.ndarray] = {"x": np.zeros((4, 3, 8, 8), np.float32)}
    model = parsed(RESIDUAL)
    return replace(context(model), data=open_data(samples, model), judge=judged)


def change(name: str, factor: float, ctx: Context, kind: object = None, *, is_tried: bool = True) -> Change:
    tensor = ctx.model.graph.initializers[name].const_value
    assert tensor is not None
    error = float(np.square(tensor.numpy() * (1 - factor)).sum())
    contents = {name: tensor.numpy() * np.float32(factor)} if is_tried else None
    return Change(name, kind or name, error, contents)


def test_weights_are_the_roots_of_measured_over_predicted() -> None:
    ctx = prepared()
    found = error_weights(ctx, [change("w1", 0.5, ctx), change("w2", 0.7, ctx), change("w4", 0.9, ctx)])
    assert found[0] / found[1] == pytest.approx(10, rel=1e-3)
    assert found[2] / found[1] == pytest.approx(1, rel=1e-3)
    assert not ctx.rewriter.edits


def test_changes_that_were_not_tried_stand_between_those_of_their_kind() -> None:
    ctx = prepared()
    tried = [change("w1", 0.5, ctx, "a"), change("w2", 0.5, ctx, "a", is_tried=False), change("w3", 0.5, ctx, "a")]
    found = error_weights(ctx, [*tried, change("w4", 0.5, ctx, "b"), change("dw", 0.5, ctx, "c", is_tried=False)])
    assert found[1] / found[2] == pytest.approx(10**0.5, rel=1e-3)
    assert found[4] == pytest.approx(found[3], rel=1e-3)  # of a kind nobody has tried: the middle one
    assert any("tried alone" in note.text for note in ctx.notes)


def test_a_change_that_does_nothing_or_measures_nothing_has_the_weight_in_the_middle() -> None:
    ctx = prepared()
    idle = Change("idle", "idle", 1.0, {})
    found = error_weights(ctx, [change("w2", 0.5, ctx), idle, change("w3", 0.5, ctx)])
    assert found == pytest.approx([1, 1, 1], rel=1e-3)
    assert error_weights(replace(ctx, judge=None), [idle, idle]) == [1.0, 1.0]
    assert error_weights(ctx, []) == []


def test_curves_are_said_where_predictions_are_asked_for() -> None:
    ctx = prepared()
    node = ctx.model.graph[0]
    say_curve(ctx, node, {0.5: 0.1})
    assert not ctx.notes
    say_curve(replace(ctx, predicts=True), node, {0.5: 0.1})
    assert [note.facts["error_curve"] for note in ctx.notes] == [{0.5: 0.1}]


@contextmanager
def counted(original: ir.Model, samples: Dataset) -> Iterator[object]:
    """Judge by the zeros in the weight that reads the inner channels alone."""

    def judge(model: ir.Model) -> Standing:
        tensor = model.graph.initializers["w3"].const_value
        assert tensor is not None
        return Standing("noise", float((tensor.numpy() == 0).mean()), {}, {})

    yield judge


def test_of_several_divisions_the_one_is_taken_that_loses_least_by_trial() -> None:
    ctx = replace(prepared(), judge=counted)
    groups = channel_groups(ctx.model).groups
    inner = next(group for group in groups if group.size == 8)
    other = next(group for group in groups if group is not inner)
    ways = {"more": Widths({inner: 3, other: 12}), "less": Widths({inner: 7, other: 10})}
    assert best_of(ways, "obs", None, ctx) is ways["less"]
    (note,) = [note for note in ctx.notes if "divided" in note.facts]
    assert note.facts["losses"] == pytest.approx({"more": 5 / 8, "less": 1 / 8})
    assert not ctx.rewriter.edits
    # What does not hold, or is the same again, is not tried.
    ways = {"more": ways["more"], "same": Widths({inner: 3}), "none": Widths({other: 2}, holds=False)}
    assert best_of(ways, "obs", None, ctx) is ways["more"]
    assert sum("divided" in note.facts for note in ctx.notes) == 1


def test_of_many_changes_some_of_each_kind_are_tried_evenly_spaced() -> None:
    kinds = ["a"] * 100 + ["b"] * 100 + ["c"]
    found = tried_of(kinds, most=20)
    assert len(found) == 21
    assert {kinds[index] for index in found} == {"a", "b", "c"}
    assert (found[0], found[9], found[10]) == (0, 99, 100)
    assert tried_of(kinds[:20], most=20) == list(range(20))


@dataclass(frozen=True)
class Look(Pass):
    """Take the judge along."""

    seen: tuple[float, ...] = ()

    name = "look"
    guarantee = Guarantee.LOSSY

    @property
    def needs(self) -> frozenset[Need]:
        return frozenset({Need.CALIBRATION})

    def run(self, model: ir.Model, ctx: Context) -> None:
        assert ctx.judge is not None
        assert ctx.data is not None
        with ctx.judge(model.clone(), ctx.data) as judge:
            same = judge(model)
        ctx.note("judged", kind=same.kind, divergence=same.divergence)


def test_a_run_lets_passes_judge_without_a_budget() -> None:
    result = graphopt.optimize(MODELS / "digits_cnn.onnx", Look(), data=MODELS / "digits.npz", verify="off")
    (facts,) = [note.facts for step in result.report.steps for note in step.notes if note.facts]
    assert facts["kind"] == "kl"
    assert facts["divergence"] == pytest.approx(0, abs=1e-9)
