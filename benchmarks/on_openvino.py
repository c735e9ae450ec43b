"""OpenVINO beside ONNX Runtime: latency of the same files in float and int8, and which operators OpenVINO gets right.

    python benchmarks/on_openvino.py latency --resnet50 MODELS/resnet50_ts.onnx
    python benchmarks/on_openvino.py conformance

Times are of one thread: processor time, which repeats on a machine that others use too, and wall time in brackets. The
two runtimes take turns in stretches, since run by run each would find the other's data in the caches. The script is not
named after the package, which it would hide from every script beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from real_models import SHARED, calibration, load_scorer

import graphopt
from graphopt import registry
from graphopt.backend import Backend, Bindable, Feeds, Session
from graphopt.comparison import Comparison
from graphopt.errors import BackendError, GraphoptError
from graphopt.versions import all_versions

ROOT = Path(__file__).resolve().parent.parent
CNNS = ("squeezenet", "mobilenet", "resnet20", "yunet", "digits")
FILES = {
    "float": ("simplify", None),
    "int8, `--target ort-cpu-x86`": ("quant:mode=static", "ort-cpu-x86"),
    "int8, `--target openvino`": ("quant:mode=static", "openvino"),
}
RUNTIMES = ("onnxruntime", "openvino")
BATCHES = (1, 8)
CALIBRATION_SAMPLES = 32
THREADS = 1
STRETCHES, STRETCH_SECONDS = 7, 0.2
WARM_UP_RUNS = 3
# Said before each case, so that a crash names the one it was in.
_BEGUN, _DONE = "begun", "done"


def main() -> None:
    """Print the tables asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=("latency", "conformance", "cases"))
    parser.add_argument("--resnet50", type=Path, help="ResNet-50, made up inputs and all")
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.table == "cases":
        run_cases(options.first)
        return
    print(", ".join(f"{name} {text}" for name, text in all_versions().items()))
    lines = latencies(options.resnet50) if options.table == "latency" else conformance()
    for line in lines:
        print(line, flush=True)


def latencies(resnet50: Path | None) -> Iterator[str]:
    """Yield a table: each file on both runtimes."""
    runtimes = {name: registry.backend(name) for name in RUNTIMES}
    for backend in runtimes.values():
        if (why := backend.missing()) is not None:
            raise SystemExit(f"{why.message}; {why.hint}")
    yield "| model | file | batch | ONNX Runtime, ms (wall) | OpenVINO, ms (wall) | OpenVINO is | they agree to |"
    yield "|---|---|---|---|---|---|---|"
    scorer = load_scorer()
    with tempfile.TemporaryDirectory() as folder:
        for name in CNNS:
            model = SHARED / "assets" / "models" / scorer.ASSETS[name][0]
            yield from _rows(name, model, calibration(scorer, name, CALIBRATION_SAMPLES), runtimes, Path(folder))
        if resnet50 is not None:
            image = np.random.default_rng(0).standard_normal((CALIBRATION_SAMPLES // 4, 3, 224, 224)).astype(np.float32)
            name = graphopt.load(resnet50).graph.inputs[0].name or ""
            yield from _rows("resnet50 (random weights)", resnet50, {name: image}, runtimes, Path(folder))


def _rows(name: str, model: Path, data: Any, runtimes: dict[str, Backend], folder: Path) -> Iterator[str]:
    for label, (passes, target) in FILES.items():
        file = folder / "model.onnx"
        graphopt.optimize(model, passes, data=data, target=target, output=file, verify="off", threads=THREADS)
        for batch in BATCHES:
            feed = _feed(graphopt.load(file), data, batch)
            if feed is not None:
                yield f"| {name} | {label} | {batch} | {_cells(file, feed, runtimes)} |"


def _feed(model: ir.Model, data: dict[str, Any], batch: int) -> dict[str, Any] | None:
    """Return a batch of the data, or None where the model takes batches of another size only."""
    for value in model.graph.inputs:
        first = value.shape[0] if value.shape is not None and len(value.shape) else None
        if isinstance(first, int) and first != batch:
            return None
    return {name: np.ascontiguousarray(array[:batch]) for name, array in data.items()}


def _cells(file: Path, feed: Feeds, runtimes: dict[str, Backend]) -> str:
    left, right = (backend.open(file, threads=THREADS) for backend in runtimes.values())
    with left, right:
        comparison = Comparison()
        comparison.update(left.run(feed), right.run(feed))
        agree = min(output.sqnr_db for output in comparison.outputs.values())
        times = [[_stretch(session, feed) for session in (left, right)] for _ in range(STRETCHES)]
    ratio = statistics.median(there[0] / here[0] for here, there in times)
    shown = [
        tuple(statistics.median(column) for column in zip(*side, strict=True)) for side in zip(*times, strict=True)
    ]
    cells = [f"{processor:.2f} ({wall:.2f})" for processor, wall in shown]
    verdict = f"{1 / ratio:.2f}× as fast"
    return f"{cells[0]} | {cells[1]} | {verdict} | {agree:.0f} dB"


def _stretch(session: Session, feed: Feeds) -> tuple[float, float]:
    """Return milliseconds of a run for so long: processor time of the whole process, and wall time."""
    run = session.bind(feed) if isinstance(session, Bindable) else lambda: session.run(feed)
    for _ in range(WARM_UP_RUNS):
        run()
    runs, start, used = 0, time.perf_counter(), time.process_time()
    walls = []
    while time.perf_counter() - start < STRETCH_SECONDS:
        begun = time.perf_counter()
        run()
        walls.append(time.perf_counter() - begun)
        runs += 1
    return (time.process_time() - used) / runs * 1e3, statistics.median(walls) * 1e3


def conformance() -> Iterator[str]:
    """Yield how many of ONNX's own cases for single operators OpenVINO gets right, and the others by name.

    They run in a child process, which is started again behind a case that ends it.
    """
    outcomes: dict[str, str] = {}
    first = 0
    while first is not None:
        command = [sys.executable, __file__, "cases", "--first", str(first)]
        done = subprocess.run(command, capture_output=True, text=True)
        told = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
        outcomes.update({one["name"]: one["outcome"] for one in told if one["state"] == _DONE})
        last = told[-1] if told else None
        if last is None:
            raise SystemExit(f"no case ran: {done.stderr[-300:]}")
        first = last["index"] + 1 if last["state"] == _BEGUN else None
        if first is not None:
            outcomes[last["name"]] = f"crashed: the process ends with {done.returncode}"
    counts = Counter(outcome.partition(":")[0] for outcome in outcomes.values())
    yield f"{len(outcomes)} node cases of ONNX: {', '.join(f'{count} {kind}' for kind, count in counts.most_common())}"
    for kind in ("crashed", "wrong", "fails", "refused"):
        yield f"\n{kind}:"
        texts: dict[str, list[str]] = {}
        for name, outcome in outcomes.items():
            if outcome.startswith(kind):
                texts.setdefault(outcome.partition(": ")[2], []).append(name.removeprefix("test_"))
        for text, names in sorted(texts.items(), key=lambda item: -len(item[1])):
            yield f"- {text}: {', '.join(names)}"


def run_cases(first: int) -> None:
    """Run ONNX's cases from a number on, and say of each what came of it."""
    sys.path.insert(0, str(ROOT))
    from tests.node_cases import node_cases

    backend = registry.backend("openvino")
    for index, case in enumerate(node_cases()[first:], first):
        facts = {"index": index, "name": case.name}
        print(json.dumps({"state": _BEGUN, **facts}), flush=True)
        print(json.dumps({"state": _DONE, **facts, "outcome": _outcome(backend, case)}), flush=True)


def _outcome(backend: Backend, case: Any) -> str:
    try:
        opened = backend.open(ir.from_proto(case.model), threads=THREADS)
    except GraphoptError as error:
        return f"refused: {_reason(error)}"
    except Exception as error:
        return f"fails: {type(error).__name__}"
    with opened as session:
        try:
            found = session.run({name: array for name, array in case.inputs.items() if array is not None})
        except BackendError as error:
            return f"fails: {_reason(error)}"
    for (name, array), wanted in zip(found.items(), case.outputs, strict=True):
        if array.shape != np.shape(wanted) or array.dtype != np.asarray(wanted).dtype:
            return f"wrong: `{name}` is {array.dtype}{list(array.shape)}"
        same = np.allclose(
            array.astype(np.float64), np.asarray(wanted).astype(np.float64), case.rtol, case.atol, equal_nan=True
        ) if array.dtype.kind not in "OSU" else bool((array == wanted).all())  # fmt: skip
        if not same:
            return "wrong: other numbers"
    return "right"


def _reason(error: GraphoptError) -> str:
    """Return what of an error does not hang on the case."""
    words = error.message.partition(": ")[2]
    return words.partition("with a message:")[0].split("'")[0][:80].strip() or words[:80]


if __name__ == "__main__":
    main()
