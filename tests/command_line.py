"""Runs the command line in this process, on a small model and data made for it."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from graphopt import cli

FEATURES, CLASSES, SAMPLES = 16, 3, 40


@dataclass(frozen=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one ``error:`` line, after checking that it comes with one ``hint:`` line and nothing else."""
        lines = self.err.splitlines()
        assert [line.partition(" ")[0] for line in lines] == ["error:", "hint:"], self.err
        assert all(line.partition(" ")[2].strip() for line in lines), self.err
        return lines[0]

    @property
    def hint(self) -> str:
        return self.err.splitlines()[1]


def run(*args: Any) -> Outcome:
    """Run ``graphopt ARGS`` as the console script does."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with (
        mock.patch.object(sys, "argv", ["graphopt", *map(str, args)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main()
        except SystemExit as ended:
            code = int(ended.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def optimize(model: Path, *args: Any) -> tuple[Outcome, dict[str, Any]]:
    """Run ``graphopt optimize`` with a report and return both."""
    report = model.parent / "report.json"
    outcome = run("optimize", model, *args, "--report", report)
    return outcome, json.loads(report.read_text()) if report.exists() else {}


def classifier(*, batch: int | str = "batch", seed: int = 0) -> onnx.ModelProto:
    """Return two layers of weights: ``x`` [batch, 16] to ``scores`` [batch, 3]."""
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((FEATURES, 32)).astype(np.float32),
        "b1": rng.standard_normal(32).astype(np.float32),
        "w2": rng.standard_normal((32, CLASSES)).astype(np.float32),
    }
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w1"], ["h"], "first"),
            helper.make_node("Add", ["h", "b1"], ["biased"], "bias"),
            helper.make_node("Relu", ["biased"], ["relu"], "relu"),
            helper.make_node("MatMul", ["relu", "w2"], ["scores"], "second"),
        ],
        "classifier",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, FEATURES])],
        [helper.make_tensor_value_info("scores", TensorProto.FLOAT, [batch, CLASSES])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int = SAMPLES, *, seed: int = 1) -> dict[str, Any]:
    """Return inputs of the classifier, labelled as it classifies them itself."""
    x = np.random.default_rng(seed).standard_normal((count, FEATURES)).astype(np.float32)
    return {"x": x, "labels": scores_of(classifier().SerializeToString(), x).argmax(-1)}


def scores_of(model: bytes | Path, x: Any) -> Any:
    """Run the classifier, or what was made of it, in ONNX Runtime alone."""
    session = ort.InferenceSession(str(model) if isinstance(model, Path) else model, providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x})[0]


def fill(folder: Path) -> Path:
    """Put the model and its data into a folder and return the model's path."""
    model = folder / "net.onnx"
    onnx.save(classifier(), model)
    np.savez(folder / "data.npz", **samples())
    return model


def contents(folder: Path) -> dict[str, str]:
    """Return what lies in a folder and below: path to hash, hidden files included."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
        if "__pycache__" not in path.parts
    }
