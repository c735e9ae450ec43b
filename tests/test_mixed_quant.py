"""Mixed precision: the budget is met with the fewest layers in more bits, or a clear error names the best reached."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import numpy_helper

import graphopt
from graphopt.errors import PassError, UsageError
from graphopt.options import to_text
from graphopt.passes import MixedQuant
from graphopt.passes.analyses.linear_layers import linear_layers
from graphopt.pipeline import Pipeline

from .command_line import FEATURES, classifier, fill, optimize, samples
from .pass_runs import loaded

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATA = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits.npz"
OUTLIER = 1000.0


def deep(layers: int = 4, *, hard: int | None = None) -> ir.Model:
    """Return a network of square layers with a Relu behind each; behind `hard` one channel is a thousandfold.

    What that layer scales up the next one scales down, so that the function is the same but no grid fits the value.
    """
    rng = np.random.default_rng(0)
    weights = [rng.standard_normal((FEATURES, FEATURES)).astype(np.float32) / 4 for _ in range(layers)]
    if hard is not None:
        weights[hard][:, 3] = np.abs(weights[hard][:, 3]) * OUTLIER
        weights[hard + 1][3] /= OUTLIER
    lines = []
    for index in range(layers):
        source = "x" if index == 0 else f"r{index - 1}"
        target = f"h{index}" if index < layers - 1 else "y"
        lines.append(f"[layer{index}] {target} = MatMul ({source}, w{index})")
        if index < layers - 1:
            lines.append(f"[relu{index}] r{index} = Relu (h{index})")
    text = (
        '<ir_version: 9, opset_import: ["" : 17]> deep '
        f"(float[n, {FEATURES}] x) => (float[n, {FEATURES}] y) {{ {' '.join(lines)} }}"
    )
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(numpy_helper.from_array(array, f"w{i}") for i, array in enumerate(weights))
    return loaded(proto)


def kept(result: graphopt.Result) -> list[str]:
    """Return the layers that are in more bits, as the report names them."""
    (facts,) = [note.facts for step in result.report.steps for note in step.notes if "kept" in note.facts]
    return [one["layer"] for one in facts["kept"]]


def in_float(result: graphopt.Result) -> int:
    """Return how many products read their weight as it was."""
    return sum(layer.weight.name in ("w0", "w1", "w2", "w3") for layer in linear_layers(result.model))


def mixed(model: ir.Model | Path, options: str, budget: str, data: Any = None) -> graphopt.Result:
    given = data if data is not None else {"x": samples(80)["x"]}
    return graphopt.optimize(model, f"mixed-quant:{options}", data=given, budget=budget, metric="kl")


def test_a_layer_with_an_outlier_is_kept_and_no_other() -> None:
    result = mixed(deep(hard=1), "mode=dynamic", "kl=0.01")
    assert kept(result) == ["layer2"]  # which reads the outlier
    assert result.report.after.metrics["kl"] <= 0.01
    assert in_float(result) == 1
    with pytest.raises(graphopt.VerificationError, match="over budget"):
        graphopt.optimize(
            deep(hard=1), "quant:mode=dynamic", data={"x": samples(80)["x"]}, budget="kl=0.01", metric="kl"
        )


def test_where_the_budget_holds_without_nothing_is_kept_and_no_layer_is_tried_alone() -> None:
    result = mixed(deep(), "mode=dynamic", "kl=0.1")
    assert kept(result) == []
    (facts,) = [note.facts for step in result.report.steps for note in step.notes if "kept" in note.facts]
    assert (facts["trials"], facts["measured"]) == (1, 0)


def test_the_report_says_what_was_kept_and_why(tmp_path: Path) -> None:
    model = tmp_path / "net.onnx"
    graphopt.save(deep(hard=1), model)
    np.savez(tmp_path / "data.npz", x=samples(80)["x"])
    arguments = ("--passes", "mixed-quant:mode=dynamic", "--data", tmp_path / "data.npz", "--budget", "kl=0.01")
    outcome, report = optimize(model, *arguments, "--metric", "kl")
    assert outcome.code == 0, outcome.err
    assert "1 in float of 4 layers" in outcome.out
    assert "`layer2` in float: alone in int8 it costs" in outcome.out
    notes = report["steps"][-1]["notes"]
    (one,) = next(note["kept"] for note in notes if "kept" in note)
    assert one["layer"] == "layer2"
    assert json.dumps(one)


def test_a_budget_that_cannot_be_met_names_the_best_reached() -> None:
    with pytest.raises(
        PassError, match=r"no choice of layers keeps the budget; the best one tried has .* kl 0 → "
    ) as e:
        mixed(deep(), "mode=dynamic", "kl=0")
    assert e.value.hint


def test_it_needs_a_budget_and_data_before_any_work(tmp_path: Path) -> None:
    model = fill(tmp_path)
    outcome, _ = optimize(model, "--passes", "mixed-quant:mode=dynamic", "--data", tmp_path / "data.npz")
    assert "needs a budget and none was given" in outcome.error
    outcome, _ = optimize(model, "--passes", "mixed-quant:mode=dynamic", "--budget", "kl=1")
    assert "needs calibration data" in outcome.error


@pytest.mark.parametrize("higher", ["int8", "int4+float", "float+int8", "bfloat", ""])
def test_formats_that_do_not_get_finer_are_refused(higher: str) -> None:
    with pytest.raises(UsageError, match="option `higher` cannot be"):
        Pipeline.parse(f"mixed-quant:higher={higher}")


def test_options_are_those_of_quant_and_one_more() -> None:
    one = MixedQuant(mode="weights", weights="int4", higher=("int8", "float"))
    assert Pipeline.parse(f"mixed-quant:{to_text(one)}").steps[0].passes == (one,)
    assert Pipeline.from_toml(Pipeline.of(one).to_toml()) == Pipeline.of(one)


def test_layers_without_names_of_their_own_stay_on_the_coarsest_rung_and_that_is_said() -> None:
    model = deep()
    model.graph[2].name = "MatMul"  # a glob takes it for the operator
    result = graphopt.optimize(
        model, "mixed-quant:mode=dynamic", data={"x": samples(80)["x"]}, budget="kl=0.1", metric="kl"
    )
    assert any("no names of their own" in note.text for step in result.report.steps for note in step.notes)


def test_excluded_layers_stay_float_and_count_for_nothing() -> None:
    result = mixed(deep(hard=1), "mode=dynamic:exclude=layer0", "kl=0.01")
    assert kept(result) == ["layer2"]
    assert in_float(result) == 2


def test_budget_on_top1_without_labels_to_choose_by_is_held() -> None:
    data, scored = {"x": samples(80)["x"]}, samples(80, seed=2)
    result = graphopt.optimize(
        loaded(classifier()), "mixed-quant:mode=dynamic", data=data, evaluation=scored, budget="top1=5%"
    )
    assert result.report.after.metrics["top1"] >= result.report.before.metrics["top1"] - 0.05


def hardened() -> ir.Model:
    """Return the digits network with one channel between two convolutions a thousandfold."""
    model = graphopt.optimize(MODEL, "simplify", verify="off").model
    nodes = {node.name: node for node in model.graph}
    first, second = nodes["node_conv2d_1"], nodes["node_conv2d_2"]
    for node, index, where, factor in (
        (first, 1, np.s_[5], OUTLIER),
        (first, 2, np.s_[5], OUTLIER),
        (second, 1, np.s_[:, 5], 1 / OUTLIER),
    ):
        value = node.inputs[index]
        array = value.const_value.numpy().copy()
        array[where] *= np.float32(factor)
        value.const_value = ir.tensor(array, name=value.name)
    return model


def test_a_real_network_made_hard_meets_its_budget_with_two_layers_kept() -> None:
    data = dict(np.load(DATA))
    data = {name: array[:96] for name, array in data.items()}
    result = graphopt.optimize(hardened(), "mixed-quant:mode=static", data=data, budget="kl=0.001")
    assert set(kept(result)) <= {"node_conv2d_1", "node_conv2d_2"}
    assert kept(result)
    assert result.report.after.metrics["kl"] <= 0.001
