"""Quantization side by side: float32, ONNX Runtime's own quantizer, and graphopt, interleaved in one run.

    python benchmarks/quant.py [ASSET ...]

Prints Markdown tables. Models, calibration data and scores come from the assets folder (``GRAPHOPT_SHARED``, by
default ``../shared`` beside the repository). Calibration samples are never among the scored ones.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.shape_inference import quant_pre_process
from real_models import SHARED, calibration, load_scorer

import graphopt

STATIC = ("squeezenet", "resnet20", "mobilenet", "digits")
DYNAMIC = ("minilm", "gutenberg_lm")
CALIBRATION_SAMPLES = 64
CALIBRATION_BATCH = 8
THREADS = 2
WARM_UP, LEAST_ROUNDS = 5, 15
SECONDS_PER_BATCH = 8.0
BATCHES = (1, 8)


@dataclass
class Entry:
    """One model file under test, and what was measured of it."""

    tool: str
    path: Path
    score: dict[str, float] = field(default_factory=dict)
    outputs: list[np.ndarray[Any, Any]] = field(default_factory=list)
    times: dict[int, list[float]] = field(default_factory=dict)


def main(names: list[str]) -> None:
    """Print a table for each kind of model."""
    logging.disable(logging.WARNING)
    score = load_scorer()
    for title, known, make in (
        ("Static int8", STATIC, make_static),
        ("Dynamic int8", DYNAMIC, make_dynamic),
    ):
        chosen = [name for name in known if not names or name in names]
        if not chosen:
            continue
        print(f"\n{title}, ONNX Runtime {onnxruntime.__version__}, {THREADS} threads, median (speed-up, paired)\n")
        print("| model | tool | score | agrees | KL to fp32 | bytes | smaller | batch 1, ms | batch 8, ms | seconds |")
        print("|---|---|---|---|---|---|---|---|---|---|")
        for name in chosen:
            for row in measure(name, score, make):
                print(row, flush=True)


def make_static(tool: str, model: Path, feeds: dict[str, np.ndarray[Any, Any]], folder: Path) -> Path:
    """Quantize statically with a tool and return the file."""
    output = folder / f"{tool}.onnx"
    if tool == "graphopt":
        graphopt.optimize(
            model, "simplify,quant:mode=static", output=output, data=feeds, evaluation=feeds, verify="off"
        )
        return output
    prepared = folder / "prepared.onnx"
    try:
        quant_pre_process(str(model), str(prepared))
    except Exception:  # its symbolic shape inference fails on some models; its own advice is to skip it
        quant_pre_process(str(model), str(prepared), skip_symbolic_shape=True)
    quantize_static(
        str(prepared),
        str(output),
        Reader(feeds),
        per_channel=True,
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
    )
    return output


def make_dynamic(tool: str, model: Path, feeds: dict[str, np.ndarray[Any, Any]], folder: Path) -> Path:
    """Quantize dynamically with a tool and return the file."""
    output = folder / f"{tool}.onnx"
    if tool == "graphopt":
        graphopt.optimize(model, "simplify,quant:mode=dynamic", output=output, verify="off")
    else:
        quantize_dynamic(str(model), str(output), weight_type=QuantType.QInt8, per_channel=True)
    return output


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration batches for ONNX Runtime's quantizer."""

    def __init__(self, feeds: dict[str, np.ndarray[Any, Any]]) -> None:
        count = len(next(iter(feeds.values())))
        starts = range(0, count, CALIBRATION_BATCH)
        self.batches = iter([{key: x[at : at + CALIBRATION_BATCH] for key, x in feeds.items()} for at in starts])

    def get_next(self) -> dict[str, np.ndarray[Any, Any]] | None:
        """Return the next batch, or None at the end."""
        return next(self.batches, None)


def measure(name: str, score: ModuleType, make: Callable[..., Path]) -> Iterator[str]:
    """Make each tool's model, score and time them, and yield table rows."""
    model = SHARED / "assets" / "models" / score.ASSETS[name][0]
    feeds = calibration(score, name, CALIBRATION_SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        entries, seconds = [Entry("fp32", model)], {"fp32": 0.0}
        for tool in ("onnxruntime", "graphopt"):
            start = time.perf_counter()
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                entries.append(Entry(tool, make(tool, model, feeds, Path(folder))))
            seconds[tool] = time.perf_counter() - start
        for entry in entries:
            entry.score, entry.outputs = scored(name, score, entry.path)
        time_interleaved(entries, feeds)
        for entry in entries:
            yield row(name, entry, entries[0], seconds[entry.tool])


def scored(name: str, score: ModuleType, path: Path) -> tuple[dict[str, float], list[np.ndarray[Any, Any]]]:
    """Return a model's score, and of classifiers the logits it was scored on."""
    outputs: list[np.ndarray[Any, Any]] = []
    opened = score.session

    class Recorder:
        def __init__(self, session: Any) -> None:
            self.session = session

        def get_inputs(self) -> Any:
            return self.session.get_inputs()

        def run(self, *arguments: Any) -> Any:
            result = self.session.run(*arguments)
            if name in STATIC:
                outputs.append(result[0])
            return result

    score.session = lambda path: Recorder(opened(path))
    try:
        return score.ASSETS[name][1](path), outputs
    finally:
        score.session = opened


def time_interleaved(entries: list[Entry], feeds: dict[str, np.ndarray[Any, Any]]) -> None:
    """Time all entries in turn, round by round, so that what else the machine does hits all alike."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 3
    # Otherwise the threads of one session go on spinning after its run, and slow down the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = [
        onnxruntime.InferenceSession(str(entry.path), options, providers=["CPUExecutionProvider"]) for entry in entries
    ]
    for batch in BATCHES:
        feed = {key: value[:batch] for key, value in feeds.items()}
        for session in sessions:
            for _ in range(WARM_UP):
                session.run(None, feed)
        end, rounds = time.perf_counter() + SECONDS_PER_BATCH, 0
        while rounds < LEAST_ROUNDS or time.perf_counter() < end:
            rounds += 1
            for entry, session in zip(entries, sessions, strict=True):
                start = time.perf_counter()
                session.run(None, feed)
                entry.times.setdefault(batch, []).append(time.perf_counter() - start)


def row(name: str, entry: Entry, reference: Entry, seconds: float) -> str:
    """Return one row of the table."""
    metric, value = next(iter(entry.score.items()))
    size = entry.path.stat().st_size
    agrees, divergence = fidelity(reference.outputs, entry.outputs)
    times = " | ".join(shown(entry.times[batch], reference.times[batch]) for batch in BATCHES)
    smaller = reference.path.stat().st_size / size
    return (
        f"| {name} | {entry.tool} | {metric} {value:.4f} | {agrees} | {divergence} | {size:,} | {smaller:.2f}× "
        f"| {times} | {seconds:.1f} |"
    )


def shown(times: list[float], reference: list[float]) -> str:
    """Return the median in milliseconds and, in brackets, the median speed-up of paired runs over the reference."""
    speedup = np.median(np.array(reference) / np.array(times))
    return f"{np.median(times) * 1e3:.2f} ({speedup:.2f}×)"


def fidelity(reference: list[np.ndarray[Any, Any]], outputs: list[np.ndarray[Any, Any]]) -> tuple[str, str]:
    """Return how often the top class agrees, and the mean KL divergence, as text."""
    if not reference:
        return "", ""
    p, q = log_softmax(np.concatenate(reference)), log_softmax(np.concatenate(outputs))
    agrees = float((p.argmax(1) == q.argmax(1)).mean())
    return f"{agrees:.3f}", f"{float((np.exp(p) * (p - q)).sum(1).mean()):.4f}"


def log_softmax(logits: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Return log probabilities, [samples, classes]."""
    flat = logits.reshape(len(logits), -1).astype(np.float64)
    flat = flat - flat.max(1, keepdims=True)
    return np.asarray(flat - np.log(np.exp(flat).sum(1, keepdims=True)))


if __name__ == "__main__":
    main(sys.argv[1:])
