"""The command `recover`: every option of the pass as one of its own, and one process of several that talks."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from graphopt import options, registry
from graphopt.commands.recover_command import option_groups, split_arguments
from graphopt.errors import PassError, UsageError
from graphopt.processes import is_main_process, process_count, process_number

from .command_line import Outcome, contents, fill, run

BRIEF = ("--steps", "5", "--rate", "0.01", "--threads", "1")
OWN = ("--data", "--teacher", "--help")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a model, a pruned one and data."""
    fill(tmp_path)
    model = onnx.load(tmp_path / "net.onnx")
    weight = next(one for one in model.graph.initializer if one.name == "w1")
    array = onnx.numpy_helper.to_array(weight).copy()
    array[np.abs(array) < 1] = 0
    weight.CopyFrom(onnx.numpy_helper.from_array(array, "w1"))
    onnx.save(model, tmp_path / "student.onnx")
    return tmp_path


def recover(folder: Path, *args: Any) -> Outcome:
    given = () if "--teacher" in args else ("--teacher", folder / "net.onnx")
    return run("recover", folder / "student.onnx", *given, "--data", folder / "data.npz", *args)


@pytest.fixture
def trained() -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")


@pytest.fixture
def company(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Make this process the main one of two, without the other; what it says, and hears in the place of another."""
    told: dict[str, Any] = {"said": [], "heard": []}

    def said(code: int) -> int:
        told["said"].append(code)
        heard = told["heard"].pop(0) if told["heard"] else code
        if isinstance(heard, Exception):
            raise heard
        return int(heard)

    monkeypatch.setattr("graphopt.processes._said", said)
    monkeypatch.setattr("graphopt.passes.recovery.training.acceleration.join", lambda *_: None)
    monkeypatch.setattr("graphopt.passes.recovery.recovery_run.recover", lambda *_: None)
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    return told


@pytest.mark.usefixtures("trained")
def test_it_writes_the_student_beside_itself(folder: Path) -> None:
    outcome = recover(folder, *BRIEF)
    assert outcome.code == 0, outcome.err
    assert f"wrote {folder / 'student.recovered.onnx'}" in outcome.out
    assert "recover:rate=0.01:steps=5" in outcome.out.replace("steps=5:rate=0.01", "rate=0.01:steps=5")
    assert "the teacher: 100.0 %" in outcome.out
    assert "against the teacher" in outcome.out
    onnx.checker.check_model(folder / "student.recovered.onnx")


@pytest.mark.usefixtures("trained")
def test_quiet_says_nothing(folder: Path) -> None:
    outcome = recover(folder, *BRIEF, "-q", "-o", folder / "out.onnx")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert (folder / "out.onnx").exists()


@pytest.mark.usefixtures("trained", "company")
def test_other_processes_write_and_say_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = contents(folder)
    monkeypatch.setenv("RANK", "1")
    outcome = recover(folder, *BRIEF, "--report", folder / "report.md")
    assert (outcome.code, outcome.out, outcome.err) == (0, "", "")
    assert contents(folder) == before


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("heard", "code", "told"),
    [([0, 0], 0, ""), ([0, 1], 1, ""), ([1], 1, ""), ([0, RuntimeError("reset")], 2, "the main process is gone")],
)
def test_other_processes_end_as_the_main_one_does(
    folder: Path, company: dict[str, Any], monkeypatch: pytest.MonkeyPatch, heard: list[Any], code: int, told: str
) -> None:
    monkeypatch.setattr("graphopt.evaluation.Judge.score", lambda *_: pytest.fail("it is the main process that scores"))
    monkeypatch.setenv("RANK", "1")
    company["heard"] = list(heard)
    outcome = recover(folder, *BRIEF)
    assert outcome.code == code
    assert told in outcome.err
    assert bool(outcome.err) is bool(told)
    assert company["heard"] == []


RUIN = "prune:sparsity=0.99:method=magnitude"


@pytest.mark.usefixtures("trained")
@pytest.mark.parametrize(
    ("passes", "expected"),
    [
        (RUIN, []),
        (f"{RUIN},recover", [1]),
        (f"recover,{RUIN}", [0, 1]),
        ("recover", [0, 0]),
        ("recover,recover", [0] * 3),
    ],
)
def test_main_process_says_where_others_go_on(
    folder: Path, company: dict[str, Any], passes: str, expected: list[int]
) -> None:
    model, data = folder / "net.onnx", ("--data", folder / "data.npz", "--budget", "top1=1%")
    outcome = run("optimize", model, "--passes", passes, "--teacher", model, *data, "-q", "-o", folder / "out.onnx")
    assert outcome.code == max(expected, default=1)
    assert company["said"] == expected


@pytest.mark.usefixtures("trained")
def test_nothing_is_said_of_a_training_that_failed_in_all(
    folder: Path, company: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the main process said then would be taken for a part of the training by those still at it."""

    def fail(*_: Any) -> None:
        raise PassError("it diverged", hint="a lower rate")

    monkeypatch.setattr("graphopt.passes.recovery.recovery_run.recover", fail)
    assert recover(folder, *BRIEF).code == 2
    assert company["said"] == [0]


@pytest.mark.parametrize(("error", "said"), [("UsageError", False), ("PassError", True)])
def test_other_processes_tell_only_of_what_the_main_one_cannot(
    folder: Path, monkeypatch: pytest.MonkeyPatch, error: str, said: bool
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        import graphopt.errors

        raise getattr(graphopt.errors, error)("it went wrong", hint="do better")

    monkeypatch.setattr("graphopt.driver.Run", fail)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    outcome = recover(folder)
    assert outcome.code == 2
    assert outcome.err == ("error: process 1 of 2: it went wrong\nhint: do better\n" if said else "")


@pytest.mark.parametrize(
    ("args", "what"),
    [
        (("--epohs", "3"), "no such option: --epohs"),
        (("--epochs",), "`--epochs` requires an argument"),
        (("--epochs", "3", "--epochs=4"), "`--epochs` is given twice"),
        (("--epochs", "many"), "option `epochs` cannot be `many`"),
        (("--train", "all"), "option `train` cannot be `all`"),
        (("--teacher", "nowhere.onnx"), "nowhere.onnx"),
        (("--eval", "nowhere.npz"), "nowhere.npz"),
        (("--report", "report.txt"), "unknown kind"),
    ],
)
def test_mistakes_are_told_before_any_work(folder: Path, args: tuple[Any, ...], what: str) -> None:
    before = contents(folder)
    outcome = recover(folder, *args)
    assert outcome.code == 2
    assert what in outcome.error
    assert contents(folder) == before


def test_close_options_are_proposed(folder: Path) -> None:
    assert "`--epochs`" in recover(folder, "--epohs", "3").hint
    assert "`--teacher`" in recover(folder, "--teecher", "x").hint


def test_data_is_asked_for(folder: Path) -> None:
    outcome = run("recover", folder / "student.onnx", "--teacher", folder / "net.onnx")
    assert outcome.code == 2
    assert "--data" in outcome.hint


def test_neither_student_nor_teacher_is_overwritten(folder: Path) -> None:
    for name, what in (("student.onnx", "input"), ("net.onnx", "teacher")):
        assert f"is the {what}" in recover(folder, "-o", folder / name).error
    assert "it is the teacher" in recover(folder, "--report", folder / "net.onnx.md", "--teacher", _md(folder)).error


def _md(folder: Path) -> Path:
    """Return a teacher that is called like a report."""
    return (folder / "net.onnx").rename(folder / "net.onnx.md")


def test_arguments_are_told_apart() -> None:
    args = ["--steps=3", "student.onnx", "--data", "d.npz", "--batch-norm", "update", "-o", "out.onnx"]
    rest, given = split_arguments(args, OWN)
    assert rest == ["student.onnx", "--data", "d.npz", "-o", "out.onnx"]
    assert given == {"steps": "3", "batch_norm": "update"}
    assert split_arguments(["--", "--steps"], OWN) == (["--", "--steps"], {})
    with pytest.raises(UsageError):
        split_arguments(["--no-steps"], OWN)


def test_help_has_every_option_of_the_pass_by_groups() -> None:
    groups = option_groups()
    named = [word.split()[0] for _, rows in groups for word, _ in rows]
    known = [f"--{name.replace('_', '-')}" for name in options.fields(registry.find("PASSES", "recover"))]
    assert sorted(named) == sorted(known)
    assert len(groups) == 4
    shown = run("recover", "--help").out
    assert all(title in shown for title, _ in groups)
    assert all(name in shown for name in known)


def test_command_is_a_module() -> None:
    done = subprocess.run([sys.executable, "-m", "graphopt", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("graphopt ")


@pytest.mark.parametrize(("rank", "world", "expected"), [("", "", (0, 1)), ("1", "4", (1, 4)), ("x", "y", (0, 1))])
def test_processes_are_counted(monkeypatch: pytest.MonkeyPatch, rank: str, world: str, expected: Any) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", world)
    assert (process_number(), process_count()) == expected
    assert is_main_process() is (expected[0] == 0)


@pytest.mark.parametrize("given", [("--augment", "flip,crop"), ("--train", "weights,biases")])
def test_what_commas_join_is_told_how(given: tuple[str, str], folder: Path) -> None:
    """A comma parts the passes of a pipeline, so it joins nothing inside one, nor on the command line."""
    before = contents(folder)
    outcome = recover(folder, *given)
    assert outcome.code == 2
    assert "joined by +" in outcome.err
    assert contents(folder) == before
