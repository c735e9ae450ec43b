"""Recovery as a pass: what was lost comes back, what was fixed stays, and what cannot be is refused before any work."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import walk
from graphopt.errors import BackendError, DataError, GraphoptError, OverBudget, PassError, UsageError
from graphopt.optimization import Result
from graphopt.pipeline import Pipeline
from graphopt.reporting.trainings import LOSS_CURVE

from .command_line import FEATURES, classifier, samples

pytest.importorskip("torch")
pytest.importorskip("accelerate")

from graphopt.passes.recovery import recovery_run
from graphopt.passes.recovery.prune_gradually import PruneGradually
from graphopt.passes.recovery.recover import Recover

# Enough to move a network of 600 weights, in a tenth of a second.
BRIEF = "recover:steps=30:rate=0.05"
PRUNED = "prune:method=magnitude:sparsity=0.8"


def model() -> ir.Model:
    return ir.from_proto(classifier())


def run(passes: Any, *, given: ir.Model | None = None, count: int = 120, **options: Any) -> Result:
    data = options.pop("data", samples(count))
    return graphopt.optimize(given or model(), passes, data=data, threads=1, timed=False, **options)


def weights_of(model: ir.Model) -> dict[str, Any]:
    return {value.name or "": walk.constant_tensor(value).numpy() for value in walk.initializers(model)}  # type: ignore[union-attr]


def kl_of(result: Result) -> float:
    assert result.report.after is not None
    return result.report.after.metrics["kl"]


def facts_of(result: Result, name: str) -> list[Any]:
    return [note.facts[name] for step in result.report.steps for note in step.notes if name in note.facts]


@pytest.fixture(scope="module")
def pruned() -> Result:
    return run(PRUNED)


@pytest.fixture(scope="module")
def recovered() -> Result:
    return run(f"{PRUNED},{BRIEF}")


# What it does


def test_what_pruning_lost_comes_back_and_zeros_stay(pruned: Result, recovered: Result) -> None:
    assert kl_of(recovered) < kl_of(pruned) / 2
    before, after = weights_of(pruned.model), weights_of(recovered.model)
    assert before.keys() == after.keys()
    for name in ("w1", "w2"):
        assert np.count_nonzero(before[name] == 0) > before[name].size / 2
        np.testing.assert_array_equal(after[name][before[name] == 0], 0.0)
        assert not np.array_equal(before[name], after[name])


def test_training_is_one_edit_and_told_of(recovered: Result) -> None:
    step = recovered.report.steps[-1]
    assert step.edits == 1
    (curve,) = facts_of(recovered, LOSS_CURVE)
    assert curve["steps"] == 30
    assert curve["best"] < curve["first"]
    assert curve["samples"] + curve["held_out"] == 90  # of 120 a quarter is scored, and never seen
    texts = " ".join(note.text for note in step.notes)
    assert "trained 640 numbers for 30 steps on cpu" in texts
    assert "zeros held in 2 weights" in texts


def test_same_run_gives_the_same_model(recovered: Result) -> None:
    again = weights_of(run(f"{PRUNED},{BRIEF}").model)
    for name, array in weights_of(recovered.model).items():
        np.testing.assert_array_equal(array, again[name])


def test_original_is_untouched() -> None:
    given = model()
    before = ir.to_proto(given).SerializeToString(deterministic=True)
    run(f"{PRUNED},{BRIEF}", given=given)
    assert ir.to_proto(given).SerializeToString(deterministic=True) == before


def test_run_that_ends_before_it_does_not_train(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recovery_run, "train", lambda *_, **__: pytest.fail("it trained"))
    edits = sum(step.edits for step in run(PRUNED).report.steps)
    assert run(f"{PRUNED},{BRIEF}", stop_after_edits=edits).report.stopped_after_edits == edits


def test_labels_will_do_without_a_teacher() -> None:
    noisy = model()
    rng = np.random.default_rng(3)
    for value in walk.initializers(noisy):
        array = walk.constant_tensor(value).numpy()  # type: ignore[union-attr]
        value.const_value = ir.tensor(array + rng.normal(0, 1, array.shape).astype(np.float32), name=value.name)
    result = run(BRIEF, given=noisy)
    assert result.report.after is not None
    assert result.report.after.metrics["top1"] > result.report.before.metrics["top1"]


def test_broken_constraint_leaves_no_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def stored(self: Any) -> Any:
        yield "w1", np.ones((FEATURES, 32), np.float32)

    from graphopt.passes.recovery.constraints.constrained import Constrained

    def check(self: Any) -> None:
        raise PassError("training broke a constraint", hint="this is a mistake of `recover`")

    monkeypatch.setattr(Constrained, "stored", stored)
    monkeypatch.setattr(Constrained, "check", check)
    with pytest.raises(PassError, match="broke a constraint"):
        run(f"{PRUNED},{BRIEF}", output=tmp_path / "out.onnx")
    assert list(tmp_path.iterdir()) == []


def test_it_is_a_step_of_a_recipe() -> None:
    text = """
        [[pass]]
        name = "prune"
        sparsity = 0.5

        [[pass]]
        name = "recover"
        epochs = 2
        train = ["weights", "biases"]

        [[pass]]
        name = "prune"
        sparsity = 0.8

        [[pass]]
        name = "recover"
        steps = 5
    """
    pipeline = Pipeline.from_toml(text)
    assert Pipeline.from_toml(pipeline.to_toml()) == pipeline == Pipeline.parse(str(pipeline))
    result = run(pipeline)
    assert [curve["steps"] for curve in facts_of(result, LOSS_CURVE)] == [6, 5]


def test_bisection_reaches_the_training(tmp_path: Path) -> None:
    found = graphopt.bisect(
        model(), f"{PRUNED},{BRIEF}", data=samples(120), check=lambda file: not _has_small_weights(file)
    )
    assert found.edit is not None
    assert (found.edit.pass_name, found.edit.rule) == ("recover", "recover")


def _has_small_weights(file: Any) -> bool:
    """Return whether a bias moved, which pruning by magnitude leaves alone."""
    bias = next(one for one in onnx.load(file).graph.initializer if one.name == "b1")
    return not np.array_equal(onnx.numpy_helper.to_array(bias), weights_of(model())["b1"])


# The teacher


def test_teacher_is_learnt_from_and_scored_against(pruned: Result) -> None:
    result = graphopt.recover(pruned.model, model(), data=samples(120), options={"steps": 30, "rate": 0.05}, threads=1)
    report = result.report
    assert report.after is not None
    assert report.teacher is not None
    assert report.teacher["top1"] == 1.0
    assert report.before.metrics["kl"] == pytest.approx(kl_of(pruned), rel=1e-3)
    assert report.after.metrics["kl"] < report.before.metrics["kl"] / 2
    assert report.as_dict()["teacher"] == report.teacher


def test_repairs_layer_by_layer_are_by_the_model_itself_not_by_the_teacher() -> None:
    rng = np.random.default_rng(0)
    other = model()
    for value in walk.initializers(other):
        array = walk.constant_tensor(value).numpy()  # type: ignore[union-attr]
        value.const_value = ir.tensor(rng.normal(size=array.shape).astype(array.dtype))
    passes = "quant:mode=static,ada-round"
    plain, taught = (weights_of(run(passes, teacher=teacher).model) for teacher in (None, other))
    assert plain.keys() == taught.keys()
    assert all(np.array_equal(plain[name], taught[name]) for name in plain)


def test_budget_is_held_against_the_teacher(pruned: Result) -> None:
    options = {"data": samples(120), "options": "steps=1:rate=1e-6", "threads": 1}
    with pytest.raises(OverBudget, match="top1 went from 100"):
        graphopt.recover(pruned.model, model(), budget="top1=1%", **options)
    graphopt.recover(pruned.model, pruned.model, budget="top1=1%", **options)


def test_exact_steps_are_checked_against_the_student(pruned: Result) -> None:
    result = run(f"simplify,{BRIEF}", given=pruned.model, teacher=model(), strict=True)
    assert result.report.steps[0].check.ok


def test_smaller_student_learns_from_the_whole_model() -> None:
    many = samples(1600)  # cutting fits the rest by least squares, which hundreds of such samples do not improve on
    cut = run("prune-channels:ratio=0.5", data=many)
    assert weights_of(cut.model)["w1"].shape[1] < 32
    result = graphopt.recover(cut.model, model(), data=many, options="steps=80:rate=0.01", threads=1)
    assert result.report.after is not None
    assert result.report.after.metrics["kl"] < result.report.before.metrics["kl"]
    assert weights_of(result.model)["w1"].shape == weights_of(cut.model)["w1"].shape


def renamed(**names: str) -> ir.Model:
    other = model()
    for value in (*other.graph.inputs, *other.graph.outputs):
        value.name = names.get(value.name or "", value.name)
    return other


def reshaped() -> ir.Model:
    other = model()
    other.graph.inputs[0].shape = ir.Shape(["batch", FEATURES + 1])
    return other


def retyped() -> ir.Model:
    other = model()
    other.graph.outputs[0].dtype = ir.DataType.INT64
    return other


@pytest.mark.parametrize(
    ("teacher", "what"),
    [
        (lambda: renamed(x="pixels"), "the teacher has no input `x`"),
        (lambda: renamed(scores="logits"), "the teacher has no output `scores`"),
        (reshaped, "input `x` is ?×16 in the student and ?×17 in the teacher"),
        (retyped, "output `scores` is FLOAT in the student and INT64 in the teacher"),
        (lambda: "missing.onnx", "missing.onnx"),
    ],
)
def test_wrong_teacher_is_refused(teacher: Any, what: str) -> None:
    refused(what, PRUNED, teacher=teacher())


# What is refused before any work


def refused(what: str, passes: Any, kind: type[GraphoptError] = GraphoptError, **options: Any) -> GraphoptError:
    with pytest.raises(kind) as caught:
        run(passes, **options)
    assert what in caught.value.message
    assert caught.value.hint
    assert "failed" not in caught.value.message
    return caught.value


@pytest.fixture
def no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.manager.PassManager.run", lambda *_: pytest.fail("work had begun"))


def of_integers() -> ir.Model:
    """Return a layer whose inputs and weight are integers, as dynamic quantization leaves them."""
    return ir.from_onnx_text("""
        <ir_version: 8, opset_import: ["" : 17]>
        g (float[batch, 16] x) => (float[batch, 3] scores)
        <uint8[16, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6,
                           7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3, 4, 5, 6, 7, 8, 9, 1, 2, 3}>
        {
            codes, scale, zero = DynamicQuantizeLinear(x)
            [first] sums = MatMulInteger(codes, w, zero)
            [cast] floats = Cast<to = 1>(sums)
            [scaled] scores = Mul(floats, scale)
        }
    """)


@pytest.mark.usefixtures("no_work")
def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "accelerate" else found(name))
    error = refused("training needs `accelerate`", BRIEF, BackendError)
    assert error.hint is not None
    assert "graphopt[recover]" in error.hint


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize("passes", [BRIEF, f"simplify,{BRIEF}"])
def test_nothing_to_learn_from_is_refused(passes: str) -> None:
    refused("no teacher", passes, data={"x": samples()["x"]})


@pytest.mark.usefixtures("no_work")
def test_data_is_needed() -> None:
    refused("needs calibration data", BRIEF, UsageError, data=None)
    refused("needs calibration data", "prune-gradually", UsageError, data=None)


@pytest.mark.usefixtures("no_work")
def test_too_few_samples_are_refused() -> None:
    refused("to train on", f"{PRUNED},{BRIEF}", DataError, count=2)


@pytest.mark.usefixtures("no_work")
def test_device_that_is_not_here_is_refused() -> None:
    refused("cannot train on `tpu`", f"{PRUNED},recover:device=tpu", UsageError)
    refused("cannot train on `cuda:99`", f"{PRUNED},recover:device=cuda\\:99", BackendError)


@pytest.mark.usefixtures("no_work")
@pytest.mark.parametrize(
    ("passes", "what"),
    [
        ("recover:epochs=0", "`steps` nor `epochs`"),
        ("recover:distill=2", "out of range"),
        ("recover:train=everything", "`everything`"),
        ("recover:task=cross-entropie", "unknown task"),
        ("recover:optimizer=lion", "cannot be `lion`"),
        ("recover:l1=0.1:train=biases", "no weights to shrink"),
        (f"{PRUNED},recover:include=nowhere*", "nowhere"),
        ("prune-gradually:rounds=0", "out of range"),
        ("prune-gradually:zeros=free", "train away the zeros"),
        ("prune-gradually:pattern=4of2", "`4of2`"),
        ("quant,prune-gradually", "comes too late"),
    ],
)
def test_wrong_options_are_refused(passes: str, what: str) -> None:
    refused(what, passes)


@pytest.mark.usefixtures("no_work")
def test_model_of_integer_operators_is_refused() -> None:
    refused("MatMulInteger", BRIEF, given=of_integers())


def test_python_options_come_in_three_forms(pruned: Result) -> None:
    for options in ("steps=2", {"steps": 2}, Recover(steps=2)):
        result = graphopt.recover(pruned.model, model(), data=samples(), options=options, threads=1)
        assert result.report.pipeline == "recover:steps=2"
    for wrong in (3, ["steps=2"], PruneGradually()):
        with pytest.raises(UsageError):
            graphopt.recover(pruned.model, model(), data=samples(), options=wrong)  # type: ignore[arg-type]


# prune-gradually


@pytest.mark.parametrize(
    ("one", "expected"),
    [
        (PruneGradually(sparsity=0.8, rounds=2), [0.7, 0.8]),
        (PruneGradually(sparsity=0.9, rounds=3), [0.6333, 0.8667, 0.9]),
        (PruneGradually(pattern="2of4"), ["3of4", "2of4"]),
        (PruneGradually(pattern="4of16", rounds=1), ["4of16"]),
    ],
)
def test_rounds_follow_the_cubic_schedule(one: PruneGradually, expected: list[Any]) -> None:
    found = [cut.pattern if cut.pattern is not None else round(cut.sparsity, 4) for cut in one.cuts()]
    assert found == expected


def test_gradual_pruning_trains_in_each_round() -> None:
    gradual = "prune-gradually:method=magnitude:sparsity=0.8:rounds=3:steps=20:rate=0.01"
    result = run(gradual)
    assert len(facts_of(result, LOSS_CURVE)) == 3
    for name in ("w1", "w2"):
        array = weights_of(result.model)[name]
        assert np.count_nonzero(array == 0) / array.size == pytest.approx(0.8, abs=0.02)
    assert kl_of(result) < kl_of(run(PRUNED))


def test_gradual_pattern_is_exact() -> None:
    result = run("prune-gradually:pattern=2of4:steps=5")
    array = weights_of(result.model)["w1"].T.reshape(-1, 4)
    assert (np.count_nonzero(array, axis=1) <= 2).all()


# Reports


def test_reports_show_the_loss(tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("r.json", "r.md", "r.html")]
    run(f"{PRUNED},{BRIEF}", report=files)
    document = json.loads(files[0].read_text())
    notes = [note for step in document["steps"] for note in step["notes"] if LOSS_CURVE in note]
    assert [point["step"] for point in notes[0][LOSS_CURVE]["points"]] == list(range(1, 31))
    text = files[1].read_text()
    assert "## Training" in text
    assert "| 3 recover | 30 |" in text
    page = files[2].read_text()
    assert 'id="training"' in page
    assert "Loss, 3 recover" in page


def test_reports_of_other_runs_have_no_such_section(tmp_path: Path) -> None:
    run(PRUNED, report=tmp_path / "r.md")
    assert "## Training" not in (tmp_path / "r.md").read_text()
