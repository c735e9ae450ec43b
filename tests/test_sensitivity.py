"""Sensitivity of layers: what is measured, what is left, what is predicted, and how candidates are judged."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import candidates, registry, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.candidates import CandidateJudge, Tally
from graphopt.data import Batch, open_data
from graphopt.errors import UsageError
from graphopt.layer_sensitivity import OTHERS, sensitivity, spearman
from graphopt.layers import layers_of, name_nodes
from graphopt.metrics import KL, SQNR, Budget, Top1
from graphopt.optimization import Run
from graphopt.options import opt
from graphopt.request import Request

from .command_line import fill, run, samples
from .pass_runs import BACKEND, loaded

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATA = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits.npz"

CHAIN = """
<ir_version: 9, opset_import: ["" : 17]>
chain (float[n, 4] x) => (float[n, 4] y)
<float[4, 4] a = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1},
 float[4, 4] b = {1, 2, 3, 4, 5, 6, 7, 8, 1, 0, 1, 0, 2, 2, 2, 2}, float[4] c = {1, 2, 3, 4}>
{
    [first] h = MatMul (x, a)
    [bias] i = Add (h, c)
    [second] y = MatMul (i, b)
}
"""


def chain() -> ir.Model:
    return loaded(onnx.parser.parse_model(CHAIN))


def inputs(count: int = 20) -> dict[str, np.ndarray]:
    return {"x": np.random.default_rng(0).standard_normal((count, 4)).astype(np.float32)}


@dataclass(frozen=True)
class Scale(Pass):
    """Multiply weights of selected MatMuls, by one factor each."""

    include: tuple[str, ...] = opt((), help="nodes")
    exclude: tuple[str, ...] = opt((), help="nodes")

    name = "scale"
    guarantee = Guarantee.LOSSY

    def run(self, model: ir.Model, ctx: Context) -> None:
        for node in model.graph:
            if node.op_type != "MatMul" or (self.include and node.name not in self.include):
                continue
            if node.name in self.exclude:
                ctx.left("it is excluded", node)
                continue
            if node.name == "first":
                ctx.rewriter.set_weight(node.inputs[1], walk.constant_tensor(node.inputs[1]).numpy().copy())  # a no-op
            else:
                ctx.rewriter.set_weight(node.inputs[1], walk.constant_tensor(node.inputs[1]).numpy() * np.float32(1.1))
            if ctx.predicts:
                ctx.note("scaled", node, predicted_error=0.0 if node.name == "first" else 0.01)


def test_a_layer_whose_change_is_none_costs_nothing_and_is_last() -> None:
    result = sensitivity(chain(), Scale(), data=inputs())
    assert [row.name for row in result.rows] == ["second", "first"]
    assert result.rows[1].cost == 0.0
    assert result.rows[0].cost == pytest.approx(0.01, rel=1e-4)  # 1.1 times the output: noise is 0.1² of the signal
    assert result.rows[0].standing.outputs["y"]["sqnr_db"] == pytest.approx(20.0, abs=0.01)
    assert result.rank_correlation == pytest.approx(1.0)
    assert result.whole.divergence == pytest.approx(0.01, rel=1e-4)


def test_a_prediction_the_wrong_way_round_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    real = Context.note

    def lying(self: Context, text: str, node: Any = None, **facts: Any) -> None:
        facts = {name: -value for name, value in facts.items()}
        real(self, text, node, **facts)

    monkeypatch.setattr(Context, "note", lying)
    assert sensitivity(chain(), Scale(), data=inputs()).rank_correlation == pytest.approx(-1.0)


def test_real_model_every_layer_is_measured_or_left_with_a_reason() -> None:
    data = {name: array[:48] for name, array in np.load(DATA).items()}
    result = sensitivity(MODEL, "quant:mode=static", data=data, samples=16)
    names = {row.name for row in result.rows} | {name for name, _ in result.left}
    assert {"node_conv2d", "node_linear"} <= names
    assert result.samples == 16
    assert result.whole.kind == "kl"
    assert all(row.cost > 0 for row in result.rows)
    assert [row.cost for row in result.rows] == sorted((row.cost for row in result.rows), reverse=True)
    assert all(why for _, why in result.left)
    assert result.rank_correlation is not None


def test_excluded_layers_are_left_alone_and_included_ones_alone_are_tried() -> None:
    one = sensitivity(chain(), Scale(include=("second",)), data=inputs())
    assert [row.name for row in one.rows if row.name != OTHERS] == ["second"]
    but = sensitivity(chain(), Scale(exclude=("first",)), data=inputs())
    assert [row.name for row in but.rows] == ["second"]
    assert but.left == (("first", "it is excluded"),)


def test_the_model_given_stays_as_it_is() -> None:
    model = chain()
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    sensitivity(model, Scale(), data=inputs())
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("simplify",), "is no lossy pass"),
        (("quant,simplify",), "is no lossy pass"),
        (("prune",), "cannot be applied to one layer"),
        (("qaunt",), "unknown pass"),
    ],
)
def test_passes_that_cannot_be_looked_at(arguments: tuple[str], message: str) -> None:
    if arguments == ("prune",) and "include" in registry.find("PASSES", "prune").__dataclass_fields__:
        pytest.skip("prune has include now")
    with pytest.raises(UsageError, match=message) as error:
        sensitivity(MODEL, arguments[0], data=DATA)
    assert error.value.hint


def test_without_data_there_is_nothing_to_measure_on(tmp_path: Path) -> None:
    outcome = run("sensitivity", fill(tmp_path), "--passes", "quant:mode=dynamic")
    assert outcome.code == 2
    assert "there are none" in outcome.error
    with pytest.raises(UsageError, match="samples cannot be `0`"):
        sensitivity(MODEL, "quant", data=DATA, samples=0)


def test_a_pass_that_changes_nothing_says_so() -> None:
    model = loaded(onnx.parser.parse_model(CHAIN.replace("MatMul", "Sub").replace("float[4, 4]", "float[4, 4]")))
    with pytest.raises(UsageError, match="changes nothing"):
        sensitivity(model, Scale(), data={"x": np.ones((4, 4), np.float32)}, samples=1)


def test_command_prints_a_table_or_json(tmp_path: Path) -> None:
    model = fill(tmp_path)
    arguments = ("sensitivity", model, "--passes", "quant:mode=dynamic", "--data", tmp_path / "data.npz")
    outcome = run(*arguments)
    assert outcome.code == 0, outcome.err
    assert outcome.out.split()[:6] == ["layer", "operator", "stored", "as", "weights", "KL"]
    assert "Spearman" in outcome.out or "no rank correlation" in outcome.out
    report = json.loads(run(*arguments, "--json").out)
    assert report["measured"] == "kl"
    assert {row["layer"] for row in report["layers"]} == {"bias", "second"}  # the first product was fused with its bias
    assert report["baseline"]["top1"] == 1.0
    assert set(report["whole"]["outputs"]["scores"]) == {"kl", "sqnr_db"}


# Rank correlation


def test_spearman_by_hand_and_with_ties() -> None:
    assert spearman([1, 2, 3], [10, 20, 30]) == pytest.approx(1.0)
    assert spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1.0)
    assert spearman([1, 2, 2, 4], [1, 3, 2, 4]) == pytest.approx(4.5 / math.sqrt(4.5 * 5))  # ranks 1, 2.5, 2.5, 4
    assert spearman([1], [1]) is None
    assert spearman([1, 1, 1], [1, 2, 3]) is None


# Layers


def test_a_tied_weight_is_one_layer_with_all_its_readers() -> None:
    text = """
    <ir_version: 9, opset_import: ["" : 17]>
    tied (int64[n] x) => (float[n, 5] y) <float[5, 3] table = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6}>
    { [look] h = Gather (table, x)
      [turn] t = Transpose <perm = [1, 0]> (table)
      [head] y = MatMul (h, t) }
    """
    (layer,) = layers_of(loaded(onnx.parser.parse_model(text)))
    assert set(layer.nodes) == {"look", "turn", "head"}
    assert layer.operators == ("Gather", "MatMul")
    assert layer.elements == 15


def test_biases_are_no_layers_and_globs_match_only_what_is_meant() -> None:
    model = chain()
    model.graph[0].name = "fi[r]st*"
    assert [layer.globs for layer in layers_of(model)] == [("fi[[]r]st[*]",), ("second",)]


def test_nodes_without_a_name_of_their_own_get_one() -> None:
    model = chain()
    model.graph[0].name, model.graph[2].name = "MatMul", None
    assert [layer.globs for layer in layers_of(model)] == [(), ()]
    name_nodes(model)
    assert all(layer.globs for layer in layers_of(model))
    assert len({node.name for node in model.graph}) == 3


# Judging


def judge(budget: str | None, data: Any = None, **options: Any) -> tuple[CandidateJudge, Callable[[float], ir.Model]]:
    model = chain()
    metrics = {"top1": Top1, "kl": KL, "sqnr_db": SQNR}
    budgets = [(Budget.parse(budget, metrics), metrics[budget.partition("=")[0]])] if budget else []
    dataset = open_data(data or inputs(), model)

    def scaled(factor: float) -> ir.Model:
        copy = model.clone()
        weight = copy.graph.initializers["b"]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(factor), name="b")
        return copy

    return CandidateJudge(model, registry.backend(BACKEND), dataset, (), budgets, threads=1, **options), scaled


def test_the_original_itself_uses_up_nothing() -> None:
    ask, scaled = judge("kl=0.1")
    standing = ask(scaled(1.0))
    assert (standing.divergence, standing.used, standing.holds) == (0.0, 0.0, True)


def test_used_is_the_share_of_the_budget_and_divergence_is_the_metric() -> None:
    ask, scaled = judge("kl=0.001")
    standing = ask(scaled(1.5))
    assert not standing.holds
    assert standing.used == pytest.approx(standing.metrics["kl"] / 0.001)
    assert standing.divergence == pytest.approx(standing.metrics["kl"])
    assert "kl" in standing.why


def test_sqnr_is_that_of_the_comparison_between_models() -> None:
    ask, scaled = judge("sqnr_db=190", of_classes=False)
    standing = ask(scaled(1.1))
    assert standing.kind == "noise"
    assert standing.metrics["sqnr_db"] == pytest.approx(20.0, abs=0.01)
    assert not judge("sqnr_db=100", of_classes=False)[0](scaled(1.1)).holds


def test_nan_is_over_any_budget_and_sorts_last() -> None:
    ask, scaled = judge("kl=1000")
    standing = ask(scaled(float("nan")))
    assert standing.divergence == float("inf")
    assert not standing.holds


def test_without_labels_agreement_stands_in_for_top1_and_nothing_for_others() -> None:
    ask, scaled = judge("top1=1%")
    assert "agreement" in ask(scaled(-1.0)).metrics
    assert not ask(scaled(-1.0)).holds
    labelled, _ = judge("top1=1%", {**inputs(), "labels": np.zeros(20, np.int64)})
    assert "top1" in labelled.baseline


def test_outputs_beyond_the_limit_wait_in_files_and_fewer_samples_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, scaled = judge("kl=1")
    monkeypatch.setattr("graphopt.candidates.KEPT_IN_MEMORY", 0)
    spilled, _ = judge("kl=1")
    assert spilled(scaled(1.3)) == plain(scaled(1.3))
    fewer, _ = judge("kl=1", most_bytes=5 * 4 * 4)  # five samples of four floats
    fewer(scaled(1.3))
    assert len(fewer.data) == 5


def test_outputs_in_files_are_kept_apart_and_gone_once_closed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.candidates.KEPT_IN_MEMORY", 0)
    kept = candidates._KeptOutputs()
    one, none = np.ones((2, 3), np.float32), np.zeros((0, 5), np.float32)
    kept.append({"one": one, "none": none, "other": 2 * one})
    found = kept.read(0)
    assert {name: array.shape for name, array in found.items()} == {"one": (2, 3), "none": (0, 5), "other": (2, 3)}
    np.testing.assert_array_equal(found["one"], one)
    assert kept._folder is not None
    folder = Path(kept._folder.name)
    kept.close()
    assert not folder.exists()


def test_a_closed_judge_keeps_no_files_and_can_be_asked_again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("graphopt.candidates.KEPT_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ask, scaled = judge("kl=1")
    with ask:
        first = ask(scaled(1.3))
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())
    with ask:
        assert ask(scaled(1.3)) == first
    assert not list(tmp_path.iterdir())


def test_a_judge_whose_budget_fits_no_output_keeps_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("graphopt.candidates.KEPT_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ask, scaled = judge("kl=1", of_classes=False)
    with pytest.raises(UsageError, match="needs a score per class"):
        ask(scaled(1.3))
    assert not list(tmp_path.iterdir())


def test_what_a_run_weighs_candidates_by_is_closed_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("graphopt.candidates.KEPT_IN_MEMORY", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    model = chain()
    job = Run(Request(model=model, passes="mixed-quant:mode=weights", data=inputs(), budget=("kl=1",), threads=1))
    weigh = job._setting().weigh
    assert weigh is not None
    with job.opened:
        assert weigh(model).holds
        assert list(tmp_path.iterdir())
    assert not list(tmp_path.iterdir())


def test_api_is_public() -> None:
    assert graphopt.sensitivity is sensitivity
    assert samples()["labels"].shape == (40,)


def test_curves_of_a_pass_that_shares_out_are_shown_and_predictions_are_those_of_the_layer_alone() -> None:
    spec = "prune:sparsity=0.9:scope=global"
    found = sensitivity(chain(), spec, data=inputs(), samples=8)
    assert [len(row.curve) for row in found.rows] == [3, 3]
    for row in found.rows:
        assert list(row.curve) == pytest.approx([0.45, 0.9, 0.95])
        errors = list(row.curve.values())
        assert errors == sorted(errors)
    assert all(row.predicted is not None for row in found.rows)
    assert len(found.as_dict()["layers"][0]["curve"]) == 3


def test_an_axis_as_long_as_the_sample_is_no_axis_of_classes() -> None:
    """The first samples pass for shares of classes; the next have but one number along that axis."""
    tally = Tally([], first_is_of_classes=False)
    for scores in (np.full((1, 3, 2), 0.5, np.float32), np.full((1, 3, 1), 0.5, np.float32)):
        tally.update({"y": scores}, {"y": scores}, Batch({}, None, 1, 1))
    assert tally.standing().kind == "noise"
