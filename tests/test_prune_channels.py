"""Pruning of channels: what is chosen, what makes up for it, how wide groups become, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import latency, optimization, registry, shapes, summary
from graphopt.errors import GraphoptError, PassError, UsageError
from graphopt.passes import PruneChannels
from graphopt.passes.analyses.channel_groups import channel_groups
from graphopt.passes.lossy.channel_choice import is_stream, kept_units, order_by_weights, true_readers
from graphopt.passes.lossy.channel_widths import WidthPlan, widths_by_ratio, widths_of

from .pass_runs import outputs_of
from .removed_channels import context
from .removed_channels import parsed as parsed_without_names

MODELS = Path(__file__).resolve().parent.parent / "models"

PLAIN = """<ir_version: 8, opset_import: ["": 17]>
plain (float[N, 3, 8, 8] x) => (float[N, 5] y)
<float[16, 3, 3, 3] w1, float[16] b1, float[12, 16, 3, 3] w2, float[12] b2, float[5, 12] w3, float[5] b3>
{
    c1 = Conv <pads = [1, 1, 1, 1]> (x, w1, b1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
    r2 = Relu (c2)
    p = GlobalAveragePool (r2)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w3, b3)
}"""

RESIDUAL = """<ir_version: 8, opset_import: ["": 17]>
residual (float[N, 3, 8, 8] x) => (float[N, 8, 8, 8] y)
<float[8, 3, 3, 3] w0, float[8, 8, 3, 3] w1, float[8, 8, 3, 3] w2, float[16, 8, 1, 1] w3, float[8, 16, 3, 3] w4,
 float[8, 8, 1, 1] w5>
{
    c0 = Conv <pads = [1, 1, 1, 1]> (x, w0)
    s0 = Relu (c0)
    c1 = Conv <pads = [1, 1, 1, 1]> (s0, w1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
    a1 = Add (c2, s0)
    s1 = Relu (a1)
    c3 = Conv (s1, w3)
    r3 = Relu (c3)
    c4 = Conv <pads = [1, 1, 1, 1]> (r3, w4)
    a2 = Add (s1, c4)
    s2 = Relu (a2)
    y = Conv (s2, w5)
}"""

DEPTHWISE = """<ir_version: 8, opset_import: ["": 17]>
depthwise (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y)
<float[16, 3, 1, 1] w1, float[16] b1, float[16, 1, 3, 3] w2, float[16] b2, float[4, 16, 1, 1] w3>
{
    c1 = Conv (x, w1, b1)
    r1 = Relu (c1)
    c2 = Conv <group = 16> (r1, w2, b2)
    r2 = Relu (c2)
    y = Conv (r2, w3)
}"""

# What reads the second layer lies in branches, where nothing can be observed.
BRANCHES = """<ir_version: 8, opset_import: ["": 17]>
branches (float[N, 3, 8, 8] x) => (float[N, 4, 8, 8] y)
<float[16, 3, 3, 3] w1, float[16, 16, 3, 3] w2, float[4, 16, 1, 1] w3, float[4, 16, 1, 1] w4, float zero = {0.0}>
{
    c1 = Conv <pads = [1, 1, 1, 1]> (x, w1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
    r2 = Relu (c2)
    total = ReduceSum <keepdims = 0> (x)
    positive = Greater (total, zero)
    y = If (positive) <
        then_branch = yes () => (float[N, 4, 8, 8] a) { a = Conv (r2, w3) },
        else_branch = no () => (float[N, 4, 8, 8] b) { b = Conv (r2, w4) }
    >
}"""


@pytest.fixture(autouse=True)
def fine_steps(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cut the small networks here one channel at a time, as blocks of 16 are small beside real ones."""
    if "kernels_like" not in request.node.name:
        find = optimization.find_target
        monkeypatch.setattr(optimization, "find_target", lambda name: replace(find(name), width_multiple=1))


def parsed(text: str) -> ir.Model:
    """Return a model whose nodes are named after what they give."""
    model = parsed_without_names(text)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def images(count: int = 24, seed: int = 0) -> np.ndarray:
    """Noise that goes together from one position to the next, as images do."""
    noise = np.random.default_rng(seed).standard_normal((count, 3, 10, 10))
    return (noise[..., :-2, :-2] + noise[..., 1:-1, :-2] + noise[..., 1:-1, 1:-1] + noise[..., 2:, 2:]).astype(
        np.float32
    )


def pruned(model: ir.Model, spec: Any, *, data: bool = True) -> graphopt.Result:
    return graphopt.optimize(model, spec, data={"x": images()} if data else None)


def distance(model: ir.Model, other: ir.Model) -> float:
    """Return the noise in the outputs of a model on images not calibrated on, as a share of another's power."""
    feed = {"x": images(16, seed=9)}
    (wanted,), (given,) = outputs_of(model, feed).values(), outputs_of(other, feed).values()
    return float(np.square(wanted - given).mean() / np.square(wanted - wanted.mean(0)).mean())


def sizes(model: ir.Model) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.const_value.shape) for name, value in model.graph.initializers.items()}


def texts(result: graphopt.Result) -> str:
    return "\n".join(note.text for note in result.report.steps[-1].notes)


@pytest.mark.parametrize("criterion", ["l1", "l2", "variance", "obs", "taylor"])
@pytest.mark.parametrize("text", [PLAIN, RESIDUAL, DEPTHWISE])
def test_every_group_loses_its_share_and_the_model_runs(text: str, criterion: str) -> None:
    model = parsed(text)
    before = [group.size for group in channel_groups(model).groups if not is_stream(group)]
    result = pruned(model, f"prune-channels:ratio=0.25:criterion={criterion}")
    shapes.infer_shapes(result.model)
    after = [group.size for group in channel_groups(result.model).groups if not is_stream(group)]
    assert after == [size * 3 // 4 for size in before]
    assert result.report.after.parameters < result.report.before.parameters
    assert 0 < distance(model, result.model) < 1.5


def with_copies(text: str) -> ir.Model:
    """Return a model in which each second channel of the first layer is twice the one before it."""
    model = parsed(text)
    for value in [one for name, one in model.graph.initializers.items() if name in ("w1", "b1")]:
        array = value.const_value.numpy().copy()
        array[1::2] = 2 * array[::2]
        value.const_value = ir.tensor(array, name=value.name)
    return model


@pytest.mark.parametrize("text", [PLAIN, RESIDUAL])
def test_what_other_channels_say_too_is_removed_without_loss(text: str) -> None:
    model = with_copies(text)
    first = channel_groups(model).groups[0 if text is PLAIN else 1].name
    result = pruned(model, PruneChannels(ratio=0.5, include=(first,)))
    assert sizes(result.model)["w1"][0] == sizes(model)["w1"][0] // 2
    assert distance(model, result.model) < 1e-3
    plain = pruned(model, f"prune-channels:ratio=0.5:criterion=l2:include={first}", data=False)
    assert distance(model, plain.model) > 10 * distance(model, result.model)


def test_without_data_the_smallest_go_and_nothing_else_changes() -> None:
    model = parsed(PLAIN)
    value = model.graph.initializers["w1"]
    array = value.const_value.numpy().copy()
    array[[2, 7, 11, 12]] *= 1e-4
    value.const_value = ir.tensor(array, name="w1")
    result = pruned(model, "prune-channels:ratio=0.25:exclude=c2", data=False)
    keep = np.delete(np.arange(16), [2, 7, 11, 12])
    assert np.array_equal(result.model.graph.initializers["w1"].const_value.numpy(), array[keep])
    wanted = model.graph.initializers["w2"].const_value.numpy()[:, keep]
    assert np.array_equal(result.model.graph.initializers["w2"].const_value.numpy(), wanted)


@pytest.mark.parametrize("text", [PLAIN, RESIDUAL, DEPTHWISE])
def test_the_compensated_choice_loses_less_than_magnitude(text: str) -> None:
    model = parsed(text)
    best = distance(model, pruned(model, "prune-channels:ratio=0.4").model)
    assert best < 0.8 * distance(model, pruned(model, "prune-channels:ratio=0.4", data=False).model)


@pytest.mark.parametrize("text", [PLAIN, RESIDUAL])
def test_what_weights_choose_is_made_up_for_with_data(text: str) -> None:
    model, spec = parsed(text), "prune-channels:ratio=0.4:criterion=l2"
    made_up = distance(model, pruned(model, spec).model)
    assert made_up < 0.8 * distance(model, pruned(model, spec, data=False).model)


def test_layers_without_a_bias_get_one_and_keep_their_means() -> None:
    model = parsed(RESIDUAL)
    result = pruned(model, "prune-channels:ratio=0.4")
    feed = {"x": images()}
    (wanted,), (given,) = outputs_of(model, feed).values(), outputs_of(result.model, feed).values()
    # Calibrated on part of these.
    assert np.abs(wanted.mean((0, 2, 3)) - given.mean((0, 2, 3))).max() < 0.05 * wanted.std()
    assert sum(len(node.inputs) == 3 for node in result.model.graph if node.op_type == "Conv") >= 3


@pytest.mark.parametrize("text", [PLAIN, RESIDUAL, DEPTHWISE])
@pytest.mark.parametrize("allocate", ["uniform", "error"])
def test_a_share_of_the_macs_is_left(text: str, allocate: str) -> None:
    result = pruned(parsed(text), f"prune-channels:macs=0.7:allocate={allocate}:multiple=1")
    assert 0.55 < result.report.after.macs / result.report.before.macs <= 0.7


def test_errors_divide_the_macs_better_than_equal_shares() -> None:
    """One layer's channels are copies of each other: it alone can lose half without loss."""
    model = with_copies(PLAIN)
    even = pruned(model, "prune-channels:macs=0.6:allocate=uniform:multiple=1")
    result = pruned(model, "prune-channels:macs=0.6:multiple=1")
    assert result.report.after.macs <= 0.6 * result.report.before.macs
    assert distance(model, result.model) < 0.5 * distance(model, even.model)


@pytest.mark.parametrize("asked", ["macs=0.4", "ratio=0.5"])
def test_rounds_end_about_where_a_single_cut_does(asked: str) -> None:
    spec = f"prune-channels:{asked}:multiple=1"
    once, rounds = pruned(parsed(PLAIN), spec), pruned(parsed(PLAIN), f"{spec}:rounds=3")
    assert rounds.report.after.macs == pytest.approx(once.report.after.macs, rel=0.15)
    assert texts(rounds).count("round ") == 3
    assert f"{rounds.report.after.macs / rounds.report.before.macs:.1%} of the MACs left after 3 rounds" in texts(
        rounds
    )


def test_rounds_of_images_of_any_size_take_no_more() -> None:
    """Sizes that are not known count alike in each round."""
    text = PLAIN.replace("float[N, 3, 8, 8] x", "float[N, 3, H, W] x")
    spec = "prune-channels:macs=0.4:multiple=1"
    once, rounds = (sizes(pruned(parsed(text), one).model) for one in (spec, f"{spec}:rounds=3"))
    kept = [sum(shape[0] for shape in one.values() if len(shape) == 4) for one in (once, rounds)]
    assert kept[1] == pytest.approx(kept[0], abs=4)


def test_rounds_with_nothing_left_to_take_are_said() -> None:
    said = texts(pruned(parsed(PLAIN), "prune-channels:macs=0.9:multiple=8:rounds=4"))
    assert "widths in blocks have taken what it was to take" in said


@pytest.mark.parametrize("criterion", ["l1", "variance", "obs"])
def test_layers_that_cannot_be_seen_are_cut_and_that_is_said(criterion: str) -> None:
    model = parsed(BRANCHES)
    result = pruned(model, f"prune-channels:ratio=0.25:criterion={criterion}")
    assert [sizes(result.model)[name][0] for name in ("w1", "w2")] == [12, 12]
    assert "make up for nothing: 2, as what they read cannot be looked at" in texts(result)
    assert 0 < distance(model, result.model) < 1.5


@pytest.mark.parametrize(("macs", "widths"), [(0.6, {"w2": {16}}), (0.03, {"w1": {1}, "w2": {1, 2}})])
def test_groups_that_cannot_be_seen_shrink_last(macs: float, widths: dict[str, set[int]]) -> None:
    result = pruned(parsed(BRANCHES), PruneChannels(macs=macs, multiple=1))
    assert "shrink only where no others can: 1 (`c2`)" in texts(result)
    assert result.report.after.macs <= macs * result.report.before.macs
    for name, allowed in widths.items():
        assert sizes(result.model)[name][0] in allowed


def test_groups_none_of_which_can_be_seen_shrink_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.passes.lossy import channel_widths

    model = parsed(PLAIN)
    groups = channel_groups(model).groups
    plan = WidthPlan(groups, 1, context(model))
    even = plan.at(0.5)
    curves: list[Any] = [None] * len(groups)
    monkeypatch.setattr(channel_widths, "error_curves", lambda *_: curves)
    plan.look(0.5)
    assert plan.at(0.5).of == even.of
    # Those that are seen go first; the price of the others is finite, or all of them would go at once.
    curves[0] = np.linspace(0, 1, 16)
    plan.look(0.9)
    found = plan.at(0.9)
    assert found.of[groups[1]] == groups[1].size
    assert 0.8 < (found.macs or 0.0) <= 0.9
    assert plan.at(0.9, whole=groups).holds


def test_a_product_with_a_factor_keeps_its_mean() -> None:
    text = PLAIN.replace("Gemm <transB = 1>", "Gemm <transB = 1, alpha = 0.5, beta = 2.0>")
    model = parsed(text)
    feed = {"x": images()}
    for spec in ("prune-channels:ratio=0.5", "prune:sparsity=0.8"):
        result = pruned(model, spec)
        wanted, given = outputs_of(model, feed)["y"], outputs_of(result.model, feed)["y"]
        # Calibrated on part of these.
        assert np.abs(wanted.mean(0) - given.mean(0)).max() < 0.2 * wanted.std(0).max()


def test_what_cannot_be_reached_is_said() -> None:
    result = pruned(parsed(PLAIN), "prune-channels:macs=0.01", data=False)
    assert "1% of the MACs cannot be reached" in texts(result)
    assert sizes(result.model)["w1"][0] == 1


def test_latency_is_halved_in_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that tells MACs, so that the outcome is known."""

    def by_macs(sessions: Any, feeds: Any, **_: Any) -> list[latency.Latency]:
        first, second = (session.macs for session in sessions)
        return [latency.Latency(one, one, one, 1, one / first) for one in (first, second)]

    class Session:
        def __init__(self, model: ir.Model) -> None:
            self.macs = summary.summarize(model).macs

        def __enter__(self) -> Session:
            return self

        def __exit__(self, *_: object) -> None: ...

    class Clock:
        def open(self, model: ir.Model, **_: Any) -> Session:
            return Session(model)

    from graphopt.passes.lossy import channel_latency

    monkeypatch.setattr(latency, "measure", by_macs)
    model = parsed(PLAIN)
    ctx = context(model)
    ctx.backend = Clock()  # type: ignore[assignment]
    plan = WidthPlan(channel_groups(model).groups, 1, ctx)
    widths, measured = channel_latency.widths_by_latency(plan, 0.6, None, ctx)
    assert 0.5 < measured <= 0.6
    assert widths.macs == pytest.approx(measured)
    _, fastest = channel_latency.widths_by_latency(plan, 1e-3, None, ctx)
    assert fastest < 0.1


def test_latency_by_the_clock_leaves_a_model_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt.passes.lossy import channel_latency

    monkeypatch.setattr(channel_latency, "_SECONDS", 0.02)
    result = pruned(parsed(PLAIN), "prune-channels:latency=0.9", data=False)
    assert "of its time" in texts(result)
    assert "noisy" in texts(result)
    assert distance(parsed(PLAIN), result.model) >= 0


def test_time_that_says_nothing_is_refused() -> None:
    with pytest.raises(PassError, match="cannot be measured") as caught:
        graphopt.optimize(parsed(PLAIN), "prune-channels:latency=0.7", backend="reference")
    assert "macs=0.7" in (caught.value.hint or "")


@pytest.mark.parametrize(
    ("size", "multiple", "liked", "widths"),
    [
        (10, None, 16, 9),
        (16, None, 16, 8),
        (64, None, 16, 48),
        (512, None, 16, 496),
        (64, None, 8, 56),
        (64, None, 1, 63),
        (10, 4, 16, 8),
    ],
)
def test_widths_are_what_kernels_like(size: int, multiple: int | None, liked: int, widths: int) -> None:
    group = channel_groups(parsed(PLAIN)).groups[0]
    allowed = widths_of(replace(group, size=size), multiple, liked)
    assert allowed[:2] == [size, widths]
    assert allowed[-1] == (multiple or size - widths)


@pytest.mark.parametrize(("size", "width"), [(10, 7), (16, 11), (32, 22), (64, 44), (512, 352)])
def test_a_share_is_not_rounded_away_by_what_kernels_like(size: int, width: int) -> None:
    group = replace(channel_groups(parsed(PLAIN)).groups[0], size=size)
    assert widths_by_ratio([group], 0.3, None, 16).of == {group: width}
    assert widths_by_ratio([group], 0.3, 2, 16).of[group] % 2 == 0


def test_widths_are_multiples_of_what_is_asked_for() -> None:
    result = pruned(parsed(PLAIN), "prune-channels:ratio=0.3:multiple=4", data=False)
    assert [sizes(result.model)[name][0] for name in ("w1", "w2")] == [12, 8]
    whole = pruned(parsed(PLAIN), "prune-channels:ratio=0.3:multiple=16", data=False)
    assert "unchanged" in texts(whole)
    assert whole.report.steps[-1].edits == 0


def test_streams_are_left_to_errors_and_to_those_who_name_them() -> None:
    model = parsed(RESIDUAL)
    result = pruned(model, "prune-channels:ratio=0.5", data=False)
    assert sizes(result.model)["w0"][0] == 8
    assert "stream of a residual network" in texts(result)
    named = pruned(model, "prune-channels:ratio=0.5:include=Conv", data=False)
    assert sizes(named.model)["w0"][0] == 4


def test_exclude_holds_channels() -> None:
    model = parsed(PLAIN)
    first = channel_groups(model).groups[0].name
    result = pruned(model, f"prune-channels:exclude={first}", data=False)
    assert sizes(result.model)["w1"][0] == 16
    assert sizes(result.model)["w2"][0] < 12


def test_channels_that_a_normalization_mixes_are_left() -> None:
    text = PLAIN.replace("r2 = Relu (c2)", "r2 = LayerNormalization <axis = 1> (c2, s)").replace(
        "float[12] b2,", "float[12] b2, float[12, 8, 8] s,"
    )
    result = pruned(parsed(text), "prune-channels:ratio=0.5", data=False)
    assert sizes(result.model)["w2"][0] == 12
    assert sizes(result.model)["w1"][0] == 8
    assert "mixes them" in texts(result) or "LayerNormalization" in texts(result)


def test_a_shared_weight_makes_up_for_nothing() -> None:
    text = PLAIN.replace("p = GlobalAveragePool (r2)", "c3 = Conv (r1, w2)\n    p = GlobalAveragePool (r2)").replace(
        "(float[N, 5] y)", "(float[N, 5] y, float[N, 12, 6, 6] c3)"
    )
    result = pruned(parsed(text), "prune-channels:ratio=0.25")
    assert sizes(result.model)["w2"][:2] == (12, 12)
    assert "read elsewhere too" in texts(result)


@pytest.mark.parametrize(
    ("options", "what"),
    [
        ("ratio=0", "`ratio` is out of range: `0`"),
        ("ratio=1", "`ratio` is out of range: `1`"),
        ("ratio=1.5", "`ratio` is out of range: `1.5`"),
        ("ratio=-0.2", "`ratio` is out of range: `-0.2`"),
        ("ratio=nan", "`ratio` is out of range"),
        ("macs=1", "`macs` is out of range: `1`"),
        ("latency=0", "`latency` is out of range: `0`"),
        ("ratio=0.3:macs=0.7", "`ratio` and `macs` cannot both be given"),
        ("allocate=error", "needs something to divide"),
        ("multiple=0", "`multiple` is out of range"),
        ("criterion=best", "`criterion`"),
        ("include=nothing_of_that_name", "matches no node"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: str, what: str) -> None:
    with pytest.raises(GraphoptError, match=what.replace("(", r"\(")) as caught:
        graphopt.optimize(parsed(PLAIN), f"prune-channels:{options}")
    assert isinstance(caught.value, UsageError)
    assert caught.value.hint


@pytest.mark.parametrize("spec", ["criterion=obs", "criterion=variance", "macs=0.7:allocate=error"])
def test_criteria_of_data_need_data(spec: str) -> None:
    with pytest.raises(GraphoptError, match="calibration data"):
        graphopt.optimize(parsed(PLAIN), f"prune-channels:{spec}")


def test_nothing_to_remove_is_said_and_no_error() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3, 8, 8] x) => (float[N, 3, 8, 8] y) { y = Relu(x) }'
    result = graphopt.optimize(parsed(text), "prune-channels")
    assert "no channels that can be removed" in texts(result)
    assert result.report.steps[-1].edits == 0


def test_at_least_one_channel_is_left() -> None:
    result = pruned(parsed(PLAIN), "prune-channels:ratio=0.99", data=False)
    assert [sizes(result.model)[name][0] for name in ("w1", "w2")] == [1, 1]


def test_a_quantized_model_is_refused_with_the_right_order() -> None:
    quantized = pruned(parsed(PLAIN), "quant:mode=static").model
    with pytest.raises(PassError) as caught:
        graphopt.optimize(quantized, "prune-channels")
    assert "prune-channels,quant" in (caught.value.hint or "")


def test_nan_in_a_weight_is_an_error_that_names_it() -> None:
    model = parsed(PLAIN)
    value = model.graph.initializers["w2"]
    array = value.const_value.numpy().copy()
    array[0, 0] = np.nan
    value.const_value = ir.tensor(array, name="w2")
    with pytest.raises(PassError, match="`w2` holds NaN"):
        graphopt.optimize(model, "prune-channels")


def test_order_by_weights_counts_each_tensor_by_its_own_scale() -> None:
    model = parsed(DEPTHWISE)
    (group,) = channel_groups(model).groups
    assert [layer.node.op_type for layer in true_readers(group)] == ["Conv"]
    assert true_readers(group)[0].weight.name == "w3"
    before = order_by_weights(group, "l2")
    value = model.graph.initializers["w2"]
    value.const_value = ir.tensor(value.const_value.numpy() * 100, name="w2")
    assert np.array_equal(order_by_weights(group, "l2"), before)
    assert kept_units(16, before, 10).sum() == 10


def test_digits_keep_their_score_at_seven_tenths_of_the_macs() -> None:
    samples = dict(np.load(MODELS / "digits.npz"))
    result = graphopt.optimize(MODELS / "digits_cnn.onnx", "prune-channels:macs=0.7", data=samples)
    report = result.report
    assert report.after.macs <= 0.7 * report.before.macs
    assert report.after.metrics["top1"] >= report.before.metrics["top1"] - 0.03


@pytest.mark.parametrize(("target", "liked"), [("ort-cpu-x86", 16), ("ort-cuda", 8)])
def test_widths_asked_for_by_macs_are_what_kernels_like(target: str, liked: int) -> None:
    """The default as it is, end to end, on a trained network."""
    assert registry.find("TARGETS", target).width_multiple == liked
    samples = dict(np.load(MODELS / "digits.npz"))
    simplified = graphopt.optimize(MODELS / "digits_cnn.onnx", "simplify").model
    on_cpu = "onnxruntime:provider=cpu"
    result = graphopt.optimize(simplified, "prune-channels:macs=0.7", data=samples, target=target, backend=on_cpu)
    assert result.report.after.macs <= 0.7 * result.report.before.macs
    before, after = sorted(groups_of(simplified)), sorted(groups_of(result.model))
    assert before != after
    for was, width in zip(before, after, strict=True):
        assert width == was or width % (liked if was >= 2 * liked else liked // 2) == 0, (before, after)


def groups_of(model: ir.Model) -> list[int]:
    shapes.infer_shapes(model)
    return [group.size for group in channel_groups(model).groups]
