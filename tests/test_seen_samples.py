"""Samples that are trained on and scored: found by what they hold, wherever they lie, and warned of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.data import Dataset, open_data
from graphopt.reporting.rows import doubts
from graphopt.seen_samples import seen_samples

from .command_line import FEATURES, classifier, fill, run, samples

SEEN = "are trained on, too"


def dataset(*feeds: Any, batch: int | str = "batch") -> Dataset:
    return open_data([{"x": array} for array in feeds], ir.from_proto(classifier(batch=batch)))


def test_samples_are_compared_by_content() -> None:
    x = samples(8)["x"]
    nudged = x[5:6] + np.float32(1e-6)
    assert seen_samples(dataset(x[2:5]), dataset(x)) == 3
    assert seen_samples(dataset(np.concatenate([x[:1], x[:1], nudged])), dataset(x[3:], x[:2])) == 2
    assert seen_samples(dataset(nudged), dataset(x, x)) == 0


def test_chosen_samples_alone_count() -> None:
    whole = dataset(samples(20)["x"])
    given, held_back = whole.split(0)
    assert seen_samples(held_back, given) == 0
    assert seen_samples(held_back, whole) == len(held_back) == 5


def test_feeds_of_one_sample_are_samples() -> None:
    x = samples(6)["x"]
    stacked = dataset(x[:, None], batch=1)
    assert seen_samples(stacked, dataset(x[:4])) == 4
    assert seen_samples(dataset(x[4:]), stacked) == 2


def test_runs_that_train_on_what_they_score_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    data = samples(40)
    again = {name: array[:10] for name, array in data.items()}
    options: dict[str, Any] = {"data": data, "evaluation": again, "threads": 1, "timed": False}
    model = ir.from_proto(classifier())
    report = graphopt.optimize(model, "prune,recover:steps=2", **options).report
    (warning,) = report.warnings
    assert warning.startswith("10 of 10 samples")
    assert report.as_dict()["warnings"] == [warning]
    assert doubts(report) == [f"WARNING: {warning}"]  # which all forms of the report show
    # Passes that only look at samples may look at any; and nobody reads them for that.
    monkeypatch.setattr("graphopt.seen_samples.seen_samples", lambda *_: pytest.fail("samples were compared"))
    assert graphopt.optimize(model, "quant:mode=static", **options).report.warnings == []


def test_samples_that_the_data_has_twice_are_found_in_what_is_held_back(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("accelerate")
    fill(tmp_path)
    x = samples(20)["x"]
    np.savez(tmp_path / "data.npz", x=np.concatenate([x, x]))
    args = ("recover", tmp_path / "net.onnx", "--teacher", tmp_path / "net.onnx", "--steps", "1", "--threads", "1")
    outcome = run(*args, "--data", tmp_path / "data.npz", "-q")
    assert outcome.code == 0
    assert outcome.out == ""
    assert outcome.err.startswith("warning: ")
    assert SEEN in outcome.err
    np.savez(tmp_path / "data.npz", x=np.arange(40 * FEATURES, dtype=np.float32).reshape(40, FEATURES))
    assert run(*args, "--data", tmp_path / "data.npz", "-q").err == ""
