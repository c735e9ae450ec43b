"""Checkpoints of a training: what is gone on with, to the last bit, and what is not."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import onnx_ir as ir
import pytest

from graphopt import registry
from graphopt.errors import PassError, UsageError
from graphopt.passes.recovery.settings import Training

torch = pytest.importorskip("torch")
pytest.importorskip("accelerate")

from graphopt.passes.recovery.objectives.task_losses import source_of  # noqa: E402
from graphopt.passes.recovery.training.fingerprints import digest  # noqa: E402

from .small_trainings import BRIEF, SAMPLES, Distance, network, run, samples  # noqa: E402


def test_time_that_is_up_ends_training_and_more_of_it_goes_on(tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoints")
    short, _ = run(Training(**BRIEF, minutes=1e-9, checkpoints=folder))
    assert (short.stopped, short.steps) == ("`minutes` are over", 1)
    again, _ = run(Training(**BRIEF, minutes=1e-9, checkpoints=folder))
    assert (again.stopped, again.steps) == (short.stopped, 1)
    more, weights = run(Training(**BRIEF, minutes=60, checkpoints=folder))
    assert (more.stopped, more.steps) == ("", 12)
    assert more.remarks == ["went on from the checkpoint of step 1 of 12"]
    assert weights == run(Training(**BRIEF))[1]


def test_a_finished_training_is_not_done_twice(tmp_path: Path) -> None:
    settings = Training(**BRIEF, checkpoints=str(tmp_path))
    curve, weights = run(settings)
    again, same = run(settings)
    assert again.remarks == ["went on from the checkpoint of step 12 of 12"]
    assert (again.points, again.looks, same) == (curve.points, curve.looks, weights)
    # Other weights to begin with, or another rate, are another training: it has a folder of its own.
    assert not run(settings, network(9))[0].remarks
    assert not run(Training(**{**BRIEF, "rate": 0.03}, checkpoints=str(tmp_path)))[0].remarks
    assert not run(settings, seed=8)[0].remarks
    assert not run(settings, data=samples(count=SAMPLES + 1))[0].remarks
    assert not run(settings, data=samples(labels=7))[0].remarks
    assert len(list(tmp_path.iterdir())) == 6


LEAKY = """
    <ir_version: 8, opset_import: ["" : 17]>
    g (float[n, 2] x, bool flag) => (float[n, 2] y)
    <float[2] b = {1.0, 2.0}>
    {
        h = LeakyRelu<alpha = 0.1>(x)
        y = If (flag) <
            then_branch = g1 () => (float[n, 2] y1) { y1 = Add(h, b) },
            else_branch = g2 () => (float[n, 2] y2) { y2 = Elu<alpha = 0.5>(h) }
        >
    }
"""


def test_a_teacher_is_told_by_all_it_computes() -> None:
    def digest_of(text: str) -> str:
        return digest(registry.backend("torch").lower(ir.from_onnx_text(text)))

    changes = [("alpha = 0.1", "alpha = 0.2"), ("alpha = 0.5", "alpha = 0.6"), ("Add", "Mul"), ("2.0}", "3.0}")]
    found = [digest_of(LEAKY.replace(*change)) for change in [("", ""), *changes]]
    assert len(set(found)) == 1 + len(changes)
    assert digest_of(LEAKY) == found[0]


def test_a_teacher_of_other_operators_is_another_training(tmp_path: Path) -> None:
    settings = Training(**BRIEF, checkpoints=str(tmp_path))
    run(settings)
    other = network(2)
    for node in other.graph.nodes:
        node.target = torch.sigmoid if node.target is torch.tanh else node.target
    other.recompile()
    assert not run(settings, teacher=other)[0].remarks
    assert run(settings, teacher=network(2))[0].remarks


def test_fingerprints_have_no_addresses_and_no_devices() -> None:
    """Each of several processes has a device of its own, and all of them must have one folder."""

    def digest_on(device: str) -> str:
        module = network()
        output = next(node for node in module.graph.nodes if node.op == "output")
        with module.graph.inserting_before(output):
            made = module.graph.call_function(torch.zeros, (3,), {"device": torch.device(device), "out": object()})
        output.args = ((*output.args[0], made),)
        return digest(module)

    assert digest_on("cpu") == digest_on("meta")


def test_random_numbers_of_a_teacher_are_gone_on_with(tmp_path: Path) -> None:
    def weights(folder: Path, failing_at: int = 0) -> Any:
        calls = 0

        def count(batch: Any) -> None:
            nonlocal calls
            calls += batch.epoch is not None
            if calls == failing_at > 0:
                raise InterruptedError

        settings = Training(**BRIEF, checkpoints=str(folder), checkpoint_every=3)
        return run(settings, network(), Distance(on_call=count), teacher=network(2, dropout=0.2))[1]

    with pytest.raises(InterruptedError):
        weights(tmp_path / "failed", failing_at=8)
    assert weights(tmp_path / "failed") == weights(tmp_path / "whole")


def test_only_whole_checkpoints_count(tmp_path: Path) -> None:
    settings = Training(**BRIEF, checkpoints=str(tmp_path), checkpoint_every=4)
    _, weights = run(settings)
    (folder,) = tmp_path.iterdir()
    assert [path.name for path in folder.iterdir()] == ["step-12"]
    # As it is left by a process that ends while it writes.
    (folder / "step-12").rename(folder / "step-12.unfinished")
    again, same = run(settings)
    assert not again.remarks
    assert same == weights
    assert [path.name for path in folder.iterdir()] == ["step-12"]


def test_a_broken_checkpoint_is_an_error(tmp_path: Path) -> None:
    settings = Training(**BRIEF, checkpoints=str(tmp_path))
    run(settings)
    (state,) = tmp_path.glob("*/step-12/training.pt")
    state.write_bytes(state.read_bytes()[:100])
    with pytest.raises(PassError, match="cannot go on from the checkpoint in") as error:
        run(settings)
    assert "delete" in (error.value.hint or "")


def test_a_folder_that_cannot_be_written_is_an_error_before_any_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    seen: list[Any] = []
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match="file` is a file"):
            run(Training(**BRIEF, checkpoints=str(folder)), objective=Distance(on_call=seen.append))
    assert not seen


def test_a_full_disk_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(PassError, match=r"cannot write a checkpoint to .*No space left") as error:
        run(Training(**BRIEF, checkpoints=str(tmp_path)))
    assert "has room" in (error.value.hint or "")
    assert not list(tmp_path.glob("*/step-*[0-9]"))


def test_another_function_of_the_same_name_is_another_task(tmp_path: Path) -> None:
    file = tmp_path / "task.py"
    sources = set()
    for text in ("one = abs\n", "one = float\n"):
        file.write_text(text)
        sources.add(source_of(f"{file}:one"))
    assert len({*sources, source_of("cross-entropy"), source_of("json:dumps")}) == 4


def test_random_numbers_of_others_are_left_alone(tmp_path: Path) -> None:
    settings = Training(**BRIEF, checkpoints=str(tmp_path))
    run(settings)
    drawn = random.random()
    state = random.getstate()
    assert run(settings)[0].remarks
    assert random.getstate() == state
    assert random.random() != drawn
