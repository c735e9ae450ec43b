"""A model from nothing: the runtime started, the file opened and run once, in a process that does nothing else."""

from __future__ import annotations

import json
import pickle
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import options, registry
from graphopt.backend import Array, Backend
from graphopt.errors import BackendError, GraphoptError
from graphopt.machine import peak_rss_mb, reset_peak_rss

STARTS = 3
# Runtimes come into their memory over the first runs.
_RUNS = 3
_OPSET, _IR_VERSION = 17, 8


@dataclass(frozen=True)
class ColdStart:
    """What a model takes in a new process; files lie in the system's cache by the second start.

    Attributes:
        start: Milliseconds until the runtime is imported and has run one node.
        load: Milliseconds to open the model.
        first: Milliseconds of its first run.
        peak_mb: Most memory resident while it was opened and ran, in MB, above what the runtime held before. Parts of
            files that lie in memory count; memory of a GPU does not.
        starts: In how many processes it was measured; times are medians, memory is the most.
    """

    start: float
    load: float
    first: float
    peak_mb: float
    starts: int


@dataclass(frozen=True)
class _Job:
    """What a new process is to do."""

    backend: str
    model: str
    feeds: Mapping[str, Array]
    threads: int


def measure_cold_start(
    backend: Backend, model: Path, feeds: Mapping[str, Array], *, threads: int = 0, starts: int = STARTS
) -> ColdStart:
    """Open and run a model in new processes, one after the other.

    Args:
        backend: The backend, one that is installed by name.
        model: The file.
        feeds: What it runs on.
        threads: Threads inside an operator; 0 leaves it to the runtime.
        starts: How many processes.

    Raises:
        BackendError: The runtime refuses the model, or its process ended.
    """
    texts = [backend.name, options.to_text(backend)]
    job = _Job(":".join(filter(None, texts)), str(model.resolve()), dict(feeds), threads)
    with tempfile.TemporaryDirectory(prefix="graphopt_cold_start_") as folder:
        file = Path(folder, "job")
        file.write_bytes(pickle.dumps(job))
        found = [_run_in_new_process(file, backend) for _ in range(starts)]
    medians = {name: statistics.median(one[name] for one in found) for name in ("start", "load", "first")}
    return ColdStart(**medians, peak_mb=max(one["peak_mb"] for one in found), starts=starts)


def _run_in_new_process(job: Path, backend: Backend) -> dict[str, float]:
    # `-P`: a file in the current folder is not to stand in for a library.
    command = [sys.executable, "-P", "-m", "graphopt.benchmarking.cold_start", str(job)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    answer = _answer_in(done.stdout)
    if answer is None:
        reason = done.stderr.strip().splitlines()[-1:] or ["it said nothing"]
        raise BackendError(
            f"{backend.describe()}: the process of a cold start ended with {done.returncode}: {reason[0]}",
            hint="the model may crash the runtime; without `--cold` it is timed in this process",
        )
    if "error" in answer:
        raise BackendError(answer["error"], hint=answer["hint"])
    return answer


def _answer_in(said: str) -> dict[str, Any] | None:
    """Return the last line of what a process said, or None where it is no answer: runtimes have their say, too."""
    try:
        answer = json.loads(said.splitlines()[-1])
    except (IndexError, ValueError):
        return None
    return answer if isinstance(answer, dict) else None


def _main(job_file: str) -> None:
    job: _Job = pickle.loads(Path(job_file).read_bytes())
    try:
        answer: dict[str, Any] = _cold_start(job)
    except GraphoptError as error:
        answer = {"error": error.message, "hint": error.hint}
    sys.stdout.write(json.dumps(answer) + "\n")


def _cold_start(job: _Job) -> dict[str, float]:
    begin = time.perf_counter()
    backend: Backend = registry.backend(job.backend)
    why = backend.missing()
    if why is not None:
        raise why
    _run_one_node(backend, job.threads)
    started = time.perf_counter()
    reset_peak_rss()
    held = peak_rss_mb()
    with backend.open(Path(job.model), threads=job.threads) as session:
        loaded = time.perf_counter()
        session.run(job.feeds)
        first = time.perf_counter()
        for _ in range(_RUNS):
            session.run(job.feeds)
        peak = peak_rss_mb()
    times = {"start": started - begin, "load": loaded - started, "first": first - loaded}
    return {name: seconds * 1e3 for name, seconds in times.items()} | {"peak_mb": max(peak - held, 0.0)}


def _run_one_node(backend: Backend, threads: int) -> None:
    """Have the runtime load all it needs for any model."""
    kind, shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([1])
    given = ir.Value(name="x", type=kind, shape=shape)
    node = ir.node("Neg", [given])
    made = node.outputs[0]
    made.name, made.type, made.shape = "y", kind, shape
    graph = ir.Graph([given], [made], nodes=[node], opset_imports={"": _OPSET}, name="one_node")
    with backend.open(ir.Model(graph, ir_version=_IR_VERSION), threads=threads) as session:
        session.run({"x": np.zeros(1, np.float32)})


if __name__ == "__main__":
    _main(sys.argv[1])
