"""What a quantized model is worth: its score, how far it is from float32, and how long it takes, beside others."""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from quant_runs import PEER_SCRIPT, TIME_LIMIT, Array, Entry, reason

THREADS = 2
WARM_UP, LEAST_ROUNDS = 3, 15
SMALLEST_PROBABILITY = 1e-12


def open_session(path: Path, threads: int) -> Any:
    """Return a CPU session of a file, all optimizations on."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 4
    # Otherwise the threads of one session go on spinning after its run, and slow down the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def sound(entries: Sequence[Entry]) -> list[Entry]:
    """Return the entries that have a file which runs."""
    return [entry for entry in entries if not entry.failure]


def score(name: str, scorer: Any, entries: Sequence[Entry], *, record: bool) -> None:
    """Score files with the scorer of the assets; of classifiers keep the outputs the score was made on."""
    opened: Any = scorer.session
    for entry in sound(entries):
        scorer.session = recording(opened, entry.outputs) if record else opened
        try:
            entry.score = scorer.ASSETS[name][1](entry.path)
        except Exception as error:  # any: a file that does not run is a finding
            entry.failure = f"does not run: {reason(str(error))}"
        finally:
            scorer.session = opened


def recording(opened: Any, outputs: list[Array]) -> Any:
    """Return the scorer's way to open a session, with what it gives written down."""

    class Recorder:
        def __init__(self, path: Any) -> None:
            self.session = opened(path)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.session, name)

        def run(self, *arguments: Any) -> Any:
            result = self.session.run(*arguments)
            outputs.append(result[0])
            return result

    return Recorder


def fidelity(reference: Entry, entry: Entry) -> tuple[str, str]:
    """Return how often the top class agrees with float32's, and the mean KL divergence from it, as text."""
    if not reference.outputs or not entry.outputs:
        return "", ""
    p, q = (log_probabilities(np.concatenate(one.outputs)) for one in (reference, entry))
    agrees = float((p.argmax(1) == q.argmax(1)).mean())
    return f"{agrees:.4f}", f"{float((np.exp(p) * (p - q)).sum(1).mean()):.5f}"


def log_probabilities(outputs: Array) -> Array:
    """Return the logarithms of class probabilities, [samples, classes], of logits or of probabilities."""
    flat = outputs.reshape(len(outputs), -1).astype(np.float64)
    if flat.min() >= 0 and np.allclose(flat.sum(1), 1, atol=1e-2):
        return np.asarray(np.log(np.maximum(flat, SMALLEST_PROBABILITY)))
    flat = flat - flat.max(1, keepdims=True)
    return np.asarray(flat - np.log(np.exp(flat).sum(1, keepdims=True)))


def time_together(
    entries: Sequence[Entry], feeds: dict[str, Array], key: str, seconds: float, *, busy: bool = False
) -> None:
    """Time all files on ONNX Runtime in turn, so that what else the machine does hits all alike, under a key.

    On a busy machine by the processor time of one thread, which does not count while others run.
    """
    clock = time.thread_time if busy else time.perf_counter
    sessions: list[tuple[Entry, Any]] = []
    for entry in sound(entries):
        try:
            session = open_session(entry.path, 1 if busy else THREADS)
            for _ in range(WARM_UP):
                session.run(None, feeds)
        except Exception as error:  # any: a file that does not run is a finding
            entry.failure = f"does not run: {reason(str(error))}"
            continue
        entry.times[key] = []
        sessions.append((entry, session))
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < LEAST_ROUNDS or time.perf_counter() < end:
        rounds += 1
        for entry, session in sessions:
            start = clock()
            session.run(None, feeds)
            entry.times[key].append((clock() - start) * 1e3)


def time_on_openvino(
    entries: Sequence[Entry], data: Path, batch: int, key: str, seconds: float, interpreter: Path
) -> str:
    """Time all files on OpenVINO, which the peers' interpreter has, in turn; return why there are no figures, if so."""
    files = [str(entry.path) for entry in sound(entries)]
    command = [str(interpreter), str(PEER_SCRIPT), "time", str(data), str(batch), str(seconds), *files]
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT)
    if done.returncode:
        return reason(done.stderr, done.stdout)
    found = json.loads(done.stdout.splitlines()[-1])
    for entry in sound(entries):
        result = found[str(entry.path)]
        if isinstance(result, str):
            entry.failure = f"does not run on OpenVINO: {result[:100]}"
        else:
            entry.times[key] = result
    return ""


def shown(entry: Entry, reference: Entry, key: str) -> str:
    """Return the median in milliseconds and, in brackets, the median speed-up of paired runs over the reference."""
    mine, theirs = entry.times.get(key, []), reference.times.get(key, [])
    if not mine or not theirs:
        return ""
    speedup = np.median(np.array(theirs) / np.array(mine))
    return f"{np.median(mine):.2f} ({speedup:.2f}×)"
