"""Training on two processes: the same as on one, whatever the batches are made of, and gone on with after a failure."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")
pytest.importorskip("accelerate")

from . import small_trainings
from .small_trainings import SCENARIOS, checkpointed, with_mapped_constant

PROCESSES = 2
# Sums over half batches differ from sums over whole ones in the last bits, and steps of Adam carry that on.
LOSS_TOLERANCE = 1e-4
HALF_PRECISION_TOLERANCE = 1e-2


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What two processes make of all trainings, started once: most of the time goes into imports."""
    folder = tmp_path_factory.mktemp("distributed")
    names = ["at_odds", *SCENARIOS, "sharded", "resumed", "plain", "commands"]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={PROCESSES}"]
    done = subprocess.run(
        [*launch, small_trainings.__file__, str(folder), *names],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    files = [*names[1:-1], *(f"process{number}" for number in range(PROCESSES))]
    found = {name: json.loads((folder / f"{name}.json").read_text()) for name in files}
    return {**found, "stderr": done.stderr}


def losses(curve: dict[str, Any]) -> list[float]:
    return [entry["loss"] for kind in ("points", "looks") for entry in curve[kind]]


@pytest.mark.parametrize("name", SCENARIOS)
def test_two_processes_do_what_one_does(name: str, results: dict[str, Any]) -> None:
    alone, weights = SCENARIOS[name]()
    together = results[name]
    tolerance = HALF_PRECISION_TOLERANCE if name == "bf16" else LOSS_TOLERANCE
    assert (together["curve"]["processes"], alone.processes) == (PROCESSES, 1)
    assert losses(together["curve"]) == pytest.approx(losses(alone.as_dict()), rel=tolerance)
    assert together["weights"] == pytest.approx(weights, abs=tolerance)
    assert alone.best is not None
    assert alone.looks[0].loss > 1.5 * alone.best


def test_divided_weights_are_trained_as_whole_ones(results: dict[str, Any]) -> None:
    alone, weights = small_trainings.run(
        small_trainings.Training(**small_trainings.BRIEF), with_mapped_constant(small_trainings.network())
    )
    assert losses(results["sharded"]["curve"]) == pytest.approx(losses(alone.as_dict()), rel=LOSS_TOLERANCE)
    assert results["sharded"]["weights"] == pytest.approx(weights, abs=LOSS_TOLERANCE)


def test_a_failed_training_of_two_is_gone_on_with(results: dict[str, Any]) -> None:
    alone, _ = small_trainings.run(small_trainings.Training(**small_trainings.BRIEF))
    assert results["resumed"]["curve"]["remarks"] == ["went on from the checkpoint of step 6 of 12"]
    # To the last bit what the same two processes came by without a failure.
    assert losses(results["resumed"]["curve"]) == losses(results["plain"]["curve"])
    assert results["resumed"]["weights"] == results["plain"]["weights"]
    assert losses(results["resumed"]["curve"]) == pytest.approx(losses(alone.as_dict()), rel=LOSS_TOLERANCE)


def test_nothing_is_warned_of_that_a_user_could_not_change(results: dict[str, Any]) -> None:
    assert "broadcast_buffers" not in results["stderr"]
    assert "find_unused_parameters" not in results["stderr"]
    assert "strides" not in results["stderr"]


def test_one_process_scores_and_all_end_as_it_does(results: dict[str, Any]) -> None:
    main, other = results["process0"], results["process1"]
    assert main["good"][:3] == [0, "", ["student.recovered.onnx"]]
    assert main["good"][3] >= 3  # the student, the teacher and the result
    assert other["good"] == [0, "", [], 0]
    assert main["over budget"][0] == other["over budget"][0] == 1
    assert main["over budget"][1].startswith("error: over budget")
    assert other["over budget"][1:] == ["", [], 0]


def test_a_killed_training_is_gone_on_with_to_the_last_bit(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, small_trainings.__file__, str(tmp_path / "killed"), "kill"],
        capture_output=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode < 0
    whole, expected = checkpointed(str(tmp_path / "whole"))
    curve, weights = checkpointed(str(tmp_path / "killed"))
    assert curve.remarks == ["went on from the checkpoint of step 6 of 12"]
    assert weights == expected
    assert losses(curve.as_dict()) == losses(whole.as_dict())
