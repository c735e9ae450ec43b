"""Advice: another runtime is named where it runs the same file clearly faster, and nowhere else."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import onnx.parser
import pytest

import graphopt
from graphopt import registry, target_advice
from graphopt.backend import Backend, Feeds
from graphopt.backend_survey import backends_here
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.openvino import OpenVino
from graphopt.backends.reference import Reference
from graphopt.errors import BackendError
from graphopt.plain_runs import PlainRuns
from graphopt.target_advice import Advice, advise, others

from .command_line import run

pytest.importorskip("onnxruntime")

TEXT = """<ir_version: 9, opset_import: ["": 17]>
agraph (float[n, 4] x) => (float[n, 4] y) { y = Relu(x) }"""
FEED = {"x": np.array([[1.0, -2.0, 3.0, -4.0]], np.float32)}
SLOW, FAST = 0.004, 0.001  # seconds of a run


class Session:
    """Sleeps, and answers."""

    input_names, output_names = ("x",), ("y",)

    def __init__(self, seconds: float, answer: float) -> None:
        self.seconds, self.answer = seconds, answer

    def run(self, feeds: Feeds) -> dict[str, Any]:
        time.sleep(self.seconds)
        return {"y": np.maximum(feeds["x"], 0) * self.answer}

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        pass


@dataclass(frozen=True)
class Runtime(Reference):
    """A runtime of a known speed."""

    seconds: float = SLOW
    answer: float = 1.0
    refuses: type[Exception] | None = None

    name: ClassVar[str] = "openvino"
    timed: ClassVar[bool] = True

    def describe(self) -> str:
        return "a runtime"

    def open(self, *_: Any, **__: Any) -> Any:
        if self.refuses is not None:
            raise self.refuses("refused")
        return Session(self.seconds, self.answer)


class Here(Runtime):
    """The runtime there is."""

    name: ClassVar[str] = "here"


def asked(monkeypatch: pytest.MonkeyPatch, *there: Runtime, size: int = 100) -> Advice | None:
    monkeypatch.setattr(target_advice, "backends_here", lambda wanted: [one for one in (Here(), *there) if wanted(one)])
    monkeypatch.setattr(target_advice, "ADVICE_SECONDS", 0.2)
    monkeypatch.setattr(target_advice, "BURST_SECONDS", 0.02)
    return advise(Here(), Path("any.onnx"), size, FEED, 1)


def test_a_runtime_that_is_faster_is_named_with_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(target_advice, "backend_of", lambda target: Runtime(seconds=FAST))
    found = asked(monkeypatch, Runtime(seconds=FAST))
    assert found is not None
    assert found.target == "openvino"
    assert found.speedup > target_advice.WORTH
    assert "try `--target openvino`" in found.text()
    assert found.text().startswith("a runtime runs the result ")
    assert found.as_dict()["text"] == found.text()


@pytest.mark.parametrize(
    "other",
    [
        Runtime(seconds=SLOW),
        Runtime(seconds=FAST, answer=2.0),
        Runtime(seconds=FAST, refuses=BackendError),
        Runtime(seconds=FAST, refuses=ZeroDivisionError),
    ],
    ids=["no faster", "another answer", "refuses", "fails"],
)
def test_what_is_no_gain_is_not_named(other: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, other) is None


def test_the_fastest_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    found = asked(monkeypatch, Runtime(seconds=SLOW / 2), Runtime(seconds=SLOW / 8))
    assert found is not None
    assert found.speedup > 3


def test_a_large_file_is_not_compiled_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert asked(monkeypatch, Runtime(seconds=FAST), size=target_advice.MOST_BYTES + 1) is None


def test_nothing_is_advised_against_a_time_that_says_nothing() -> None:
    assert advise(Reference(), Path("any.onnx"), 1, FEED, 1) is None


@pytest.mark.parametrize(
    ("backend", "target"),
    [
        (OnnxRuntime(provider="cuda"), "ort-cuda"),
        (OpenVino(), "openvino"),
        (OpenVino(device="gpu"), None),  # the target of that name is of CPUs
    ],
)
def test_a_target_is_named_only_where_it_runs_there(backend: Backend, target: str | None) -> None:
    found = target_advice._target_of(backend)
    assert (found.name if found is not None else None) == target


def test_a_strangers_backend_that_fails_is_none_to_advise(monkeypatch: pytest.MonkeyPatch) -> None:
    class Rude(Reference):
        def missing(self) -> BackendError | None:
            raise ZeroDivisionError("of its own")

    monkeypatch.setattr(registry, "table", lambda kind: {"reference": Reference, "rude": Rude})
    assert [one.name for one in backends_here()] == ["reference"]


def test_the_others_are_timed_runtimes_of_another_name() -> None:
    names = [one.name for one in others(OnnxRuntime())]
    assert "onnxruntime" not in names
    assert "reference" not in names
    assert "here" not in [one.name for one in others(PlainRuns(Here(), Reference()))]


def test_a_run_prints_it_and_reports_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    told = Advice("openvino", "openvino", "openvino cpu", 1.0, 2.0, 2.0)
    monkeypatch.setattr("graphopt.optimization.advise", lambda *_: told)
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    outcome = run("optimize", path, "--passes", "simplify")
    assert outcome.code == 0, outcome.err
    line = "advice: openvino cpu runs the result 2.0× faster (1 ms instead of 2 ms): try `--target openvino`"
    assert line in " ".join(outcome.out.split())
    assert graphopt.optimize(path, "simplify", advise=True).report.as_dict()["advice"]["speedup"] == 2.0


def test_from_python_it_is_asked_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def unasked(*_: Any) -> None:
        raise AssertionError("nobody asked")

    monkeypatch.setattr("graphopt.optimization.advise", unasked)
    path = tmp_path / "m.onnx"
    onnx.save(onnx.parser.parse_model(TEXT), path)
    assert graphopt.optimize(path, "simplify").report.advice is None
    assert run("optimize", path, "--passes", "simplify", "-q").code == 0
