"""Runs of passes over small models, as the tests look at them: what was before, what came out, what was recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from graphopt import provenance, registry
from graphopt.candidates import CandidateJudge
from graphopt.data import Dataset, open_data
from graphopt.instruments import Instrument
from graphopt.manager import PassManager, Setting
from graphopt.metrics import SQNR, Budget
from graphopt.model_io import load
from graphopt.pipeline import Pipeline, schedule
from graphopt.report import StepRecord
from graphopt.rewrite_check import RewriteChecker
from graphopt.rewriter import Edit
from graphopt.shapes import forget_inferred

# One target for every machine, so that a test does the same everywhere.
TARGET = "ort-cpu-x86"
BACKEND = "onnxruntime"

# What a model may lose of the 200 dB that equal outputs have: 30 dB are left, about what int8 gives a few layers.
NOISE_BUDGET_DB = 170.0

# What compares the model with the one before a lossy pass, and such a pass.
REPAIRS = {"ada-round": "quant:mode=static", "correct-bias": "prune", "recover": "prune:method=magnitude"}
# Options with which a pass that trains does so for a moment.
BRIEFLY = {
    "recover": "recover:steps=1",
    "prune-gradually": "prune-gradually:method=magnitude:rounds=1:steps=1",
}

Feed = Mapping[str, Any]


@dataclass(frozen=True)
class PassRun:
    """What one pipeline did to one model.

    Attributes:
        model: The model afterwards.
        records: One record per step.
        edits: The journal.
    """

    model: ir.Model
    records: Sequence[StepRecord]
    edits: Sequence[Edit]

    @property
    def remarks(self) -> list[str]:
        """What the passes said, in order."""
        return [note.text for record in self.records for note in record.notes]


def loaded(proto: onnx.ModelProto) -> ir.Model:
    """Return a model as `graphopt.load` gives it, with origins stamped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        path.write_bytes(proto.SerializeToString())
        model = load(path)
    provenance.stamp(model)
    return model


def run_passes(
    model: ir.Model,
    passes: Any,
    *,
    data: Sequence[Feed] | None = None,
    check_rewrites: bool = False,
    instruments: Sequence[Instrument] = (),
) -> PassRun:
    """Run passes over a model in place, with what they need before them, as the driver does."""
    backend = registry.backend(BACKEND)
    dataset = open_data(list(data), model) if data is not None else None
    setting = Setting(
        target=registry.find("TARGETS", TARGET),
        backend=backend,
        threads=1,
        data=dataset,
        check_rewrite=RewriteChecker(backend) if check_rewrites else None,
        weigh=weigh_by_noise(model, dataset, NOISE_BUDGET_DB) if dataset is not None else None,
    )
    steps = schedule(Pipeline.of(passes), has_data=dataset is not None, has_budget=dataset is not None)
    manager = PassManager(steps, setting, instruments)
    manager.run(model)
    forget_inferred(model)
    return PassRun(model, manager.records, manager.journal.edits)


def with_what_it_repairs(name: str) -> str:
    """Return a pipeline in which a pass can do its work: the pass alone, but for those that repair what others do."""
    spec = BRIEFLY.get(name, name)
    return f"{REPAIRS[name]},{spec}" if name in REPAIRS else spec


def weigh_by_noise(model: ir.Model, data: Dataset, budget_db: float) -> CandidateJudge:
    """Return what weighs candidates against a model as it is now, with a budget on the noise of its outputs."""
    budget = Budget(SQNR.name, budget_db)
    return CandidateJudge(model.clone(), registry.backend(BACKEND), data, (), [(budget, SQNR)], threads=1)


def to_bytes(model: ir.Model) -> bytes:
    """Return the model's text, so to say: equal bytes, equal models."""
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


def tensor_names(model: ir.Model) -> list[tuple[str | None, str | None]]:
    """Return the name of every initializer of the main graph and of the tensor it holds."""
    values = model.graph.initializers.values()
    return [(value.name, value.const_value.name) for value in values if value.const_value is not None]


def outputs_of(model: onnx.ModelProto | ir.Model, feed: Feed) -> dict[str, Any]:
    """Return a model's outputs in ONNX Runtime without its optimizations."""
    proto = ir.to_proto(model) if isinstance(model, ir.Model) else model
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feed)), strict=True))


def kinds(outputs: Mapping[str, Any]) -> dict[str, tuple[np.dtype[Any], tuple[int, ...]]]:
    """Return dtype and shape of each output that is a tensor."""
    return {name: (value.dtype, value.shape) for name, value in outputs.items() if isinstance(value, np.ndarray)}


def is_deterministic(model: ir.Model, passes: Any, data: Sequence[Feed] | None = None) -> bool:
    """Tell whether passes make the same of two clones of a model, to the byte."""
    first, second = (to_bytes(run_passes(model.clone(), passes, data=data).model) for _ in range(2))
    return first == second
