"""Exact simplification side by side: graphopt and every other simplifier, on the models of `simplify_models.py`.

    python benchmarks/simplify_models.py MODELS
    python benchmarks/simplify.py MODELS --peers PEERS/bin/python [--only NAME ...] [--tools TOOL ...] [--runs 3]

Every tool runs in fresh processes, in turn, over a file that lies in the page cache; each writes a file. Measured are
the whole process with its imports, the time after them, the peak resident memory (mapped files included), the nodes
left (subgraphs included) and the size of what was written (external data included). Then each result is judged on
ONNX Runtime's CPU provider: with its optimizations off, how far the outputs are from the original's, relative to the
largest number among them, on random inputs of two sizes where sizes are dynamic; and with all of them on, its latency,
the results of one model round by round in one process. Ratios are medians of paired rounds against the original.

`--peers` is an interpreter that has onnxslim, onnxsim, onnxoptimizer, onnxscript and onnxruntime. Prints Markdown;
`--json` writes the figures as well.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime

import graphopt
from graphopt import registry, walk

Array = np.ndarray[Any, Any]
Result = TypeVar("Result")

THREADS = 2
SEED = 0
MEGABYTE = 1e6
WARM_UP, LEAST_ROUNDS = 2, 7
# What dynamic sizes are judged at, and what they are timed at: the second.
SIZES = ({"batch": 2, "sequence": 7}, {"batch": 1, "sequence": 128})
OTHER_SIZE = 2
# Token ids lie below this.
VOCABULARY = 500
# An output farther from the original than this, relative to the largest number, is called wrong.
WRONG = 1e-3
# A session holds its weights and often a second, packed copy.
COPIES_OF_WEIGHTS = 2.2
SHARE_OF_MEMORY = 0.5

# Runs one tool and prints seconds after import and the peak resident bytes; graphopt's command line may exit.
PROCESS = """
import json, sys, time
{imports}
path, out, mode = sys.argv[1:4]
start = time.perf_counter()
try:
    {work}
except SystemExit as exit:
    if exit.code:
        raise
seconds = time.perf_counter() - start
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print("\\n" + json.dumps([seconds, peak]))
"""

ORT_WORK = (
    "options = onnxruntime.SessionOptions(); "
    "options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, mode); "
    "options.optimized_model_filepath = out; options.log_severity_level = 4; "
    'onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])'
)
GRAPHOPT = ("from graphopt.cli import main", "sys.argv = ['graphopt', *mode.split(), path, '-q', '-o', out]; main()")


@dataclass(frozen=True)
class Tool:
    """What runs in the process: imports, the work, and a word that the work reads as `mode`."""

    imports: str
    work: str
    mode: str = ""
    peer: bool = True


TOOLS = {
    "graphopt simplify": Tool(*GRAPHOPT, "optimize --passes simplify --verify structure", peer=False),
    "graphopt simplify, proven": Tool(*GRAPHOPT, "optimize --passes simplify --verify each", peer=False),
    "graphopt O2": Tool(*GRAPHOPT, "optimize --passes O2 --verify structure", peer=False),
    "onnxslim": Tool("import onnx, onnxslim", "onnx.save(onnxslim.slim(path), out)"),
    "onnxsim": Tool("import onnx, onnxsim", "onnx.save(onnxsim.simplify(onnx.load(path))[0], out)"),
    "onnxscript": Tool(
        "import onnx, onnxscript.optimizer, onnxscript.rewriter",
        "onnx.save(onnxscript.rewriter.rewrite(onnxscript.optimizer.optimize(onnx.load(path))), out)",
    ),
    "onnxoptimizer": Tool("import onnx, onnxoptimizer", "onnx.save(onnxoptimizer.optimize(onnx.load(path)), out)"),
    "ORT basic": Tool("import onnxruntime", ORT_WORK, "ORT_ENABLE_BASIC"),
    "ORT extended": Tool("import onnxruntime", ORT_WORK, "ORT_ENABLE_EXTENDED"),
    "onnx load + save": Tool("import onnx", "onnx.save(onnx.load(path), out)"),
}


@dataclass
class Row:
    """What was measured of one tool on one model; milliseconds and ratio of its result, seconds and bytes of it."""

    model: str
    tool: str
    process: list[float] = field(default_factory=list)
    after_import: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    nodes: int = 0
    size: int = 0
    milliseconds: float | None = None
    ratio: float | None = None
    difference: float | None = None
    failure: str = ""


def main() -> None:
    """Measure and print one table for all models."""
    options = arguments()
    rows: list[Row] = []
    print(f"ONNX Runtime {onnxruntime.__version__}, {THREADS} threads, medians of {options.runs} runs\n")
    print("| model (MB, nodes) | tool | process, s | after import, s | peak, MB | nodes | file, MB ", end="")
    print("| latency, ms | difference |\n|---|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    for path in chosen_models(options.folder, options.only):
        for row in measure(path, options):
            rows.append(row)
            print(shown(row, rows), flush=True)
    if options.json:
        options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1))


def arguments() -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the models are")
    parser.add_argument("--peers", type=Path, help="interpreter of the other tools; without it graphopt runs alone")
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="models, by file name without .onnx")
    parser.add_argument("--tools", nargs="+", default=list(TOOLS), metavar="TOOL", help="tools, by how they start")
    parser.add_argument("--runs", type=int, default=3, help="processes of each tool")
    parser.add_argument("--seconds", type=float, default=20.0, help="to time the results of one model")
    parser.add_argument("--no-latency", action="store_true", help="judge outputs, but time nothing")
    parser.add_argument("--json", type=Path, help="write all figures here")
    return parser.parse_args()


def chosen_models(folder: Path, only: Sequence[str]) -> list[Path]:
    """Return the model files, smallest first; the tiny ones only if asked for by name."""
    names = only or [path.stem for path in folder.glob("*.onnx") if not path.stem.startswith("tiny_")]
    return sorted((folder / f"{name}.onnx" for name in names), key=lambda path: path.stat().st_size)


def chosen_tools(options: argparse.Namespace) -> dict[str, Tool]:
    """Return the tools that were asked for and exist: peers need their interpreter, a preset to be registered."""
    return {
        name: tool
        for name, tool in TOOLS.items()
        if any(name.startswith(one) for one in options.tools)
        and (options.peers or not tool.peer)
        and (name != "graphopt O2" or "O2" in registry.table("PRESETS"))
    }


def measure(path: Path, options: argparse.Namespace) -> Iterator[Row]:
    """Run every tool over one model, judge the results, and yield a row of the original and one of each tool."""
    tools = chosen_tools(options)
    original, rows = Row(path.stem, "the original"), {name: Row(path.stem, name) for name in tools}
    with tempfile.TemporaryDirectory() as name:
        results = {tool: Path(name) / str(place) / "model.onnx" for place, tool in enumerate(tools)}
        for _ in range(options.runs):
            for tool, out in results.items():
                run(tools[tool], path, out, rows[tool], options.peers)
        made = {original.tool: path} | {tool: out for tool, out in results.items() if not rows[tool].failure}
        original.size = path.stat().st_size
        for tool in list(made)[1:]:
            rows[tool].size = folder_size(made[tool].parent)
        judge(made, {original.tool: original} | rows, options)
        yield from (original, *rows.values())


def run(tool: Tool, path: Path, out: Path, row: Row, peers: Path | None) -> None:
    """Run a tool once in a new process, with the model in the page cache, and note the figures."""
    if row.failure:
        return
    shutil.rmtree(out.parent, ignore_errors=True)
    out.parent.mkdir(parents=True)
    with path.open("rb") as file:
        while file.read(1 << 24):
            pass
    python = str(peers) if tool.peer else sys.executable
    code = PROCESS.format(imports=tool.imports, work=tool.work)
    start = time.perf_counter()
    done = subprocess.run([python, "-c", code, str(path), str(out), tool.mode], capture_output=True, text=True)
    seconds = time.perf_counter() - start
    if done.returncode or not out.exists():
        row.failure = (done.stderr.strip() or done.stdout.strip() or f"exit {done.returncode}").splitlines()[-1]
        return
    after_import, peak = json.loads(done.stdout.splitlines()[-1])
    row.process.append(seconds)
    row.after_import.append(after_import)
    row.peak.append(peak)


def in_new_process(work: Callable[..., Result], *given: Any) -> Result:
    """Return what a function returns when it runs in a process of its own, which then gives its memory back."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *given).result()


def count_nodes(paths: dict[str, Path]) -> dict[str, int]:
    """Return how many nodes models have, those of subgraphs and functions included."""
    return {name: sum(1 for _ in walk.every_node(graphopt.load(path))) for name, path in paths.items()}


def folder_size(folder: Path) -> int:
    """Return the bytes of the model and of external data beside it."""
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix != ".json")


# Judging the results


def judge(made: dict[str, Path], rows: dict[str, Row], options: argparse.Namespace) -> None:
    """Fill in the nodes of each result, how far its outputs are from the original's, and how long it takes."""
    for tool, nodes in in_new_process(count_nodes, made).items():
        rows[tool].nodes = nodes
    for tool, found in in_new_process(differences, made).items():
        rows[tool].difference = found if isinstance(found, float) else None
        rows[tool].failure = found if isinstance(found, str) else ""
    sound = [tool for tool in made if not rows[tool].failure]
    for group in [] if options.no_latency else grouped(sound, made):
        seconds = options.seconds * len(group) / len(sound)
        for tool, (milliseconds, ratio) in in_new_process(time_together, group, made, seconds).items():
            rows[tool].milliseconds, rows[tool].ratio = milliseconds, ratio


def grouped(tools: Sequence[str], made: dict[str, Path]) -> Iterator[list[str]]:
    """Yield groups of results whose sessions fit into memory together, the original first in each."""
    original, *others = tools
    sessions = SHARE_OF_MEMORY * available_memory() / COPIES_OF_WEIGHTS / made[original].stat().st_size
    step = max(1, int(sessions) - 1)
    for at in range(0, len(others), step):
        yield [original, *others[at : at + step]]


def available_memory() -> int:
    """Return the bytes that processes may still take, the page cache counted as free."""
    with open("/proc/meminfo") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def open_session(path: Path, level: str) -> Any:
    """Return a CPU session of a file at a level of optimization."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.intra_op_num_threads = THREADS
    options.log_severity_level = 4
    # Otherwise the threads of one session go on spinning after its run, and slow down the next one's.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds_of(session: Any, sizes: dict[str, int]) -> dict[str, Array]:
    """Return random inputs: normal numbers, token ids, or true."""
    random, feeds = np.random.default_rng(SEED), {}
    for spec in session.get_inputs():
        shape = [sizes.get(size, OTHER_SIZE) if isinstance(size, str) else size for size in spec.shape]
        if "float" in spec.type:
            feeds[spec.name] = random.standard_normal(shape).astype(np.float32)
        else:
            dtype = {"tensor(int32)": np.int32, "tensor(bool)": np.bool_}.get(spec.type, np.int64)
            feeds[spec.name] = random.integers(1, VOCABULARY, shape).astype(dtype)
    return feeds


def differences(made: dict[str, Path]) -> dict[str, float | str]:
    """Return, of each result, the largest difference of any output over its largest number, or why there is none."""
    reference = open_session(next(iter(made.values())), "ORT_DISABLE_ALL")
    fixed = all(isinstance(size, int) for spec in reference.get_inputs() for size in spec.shape)
    feeds = [feeds_of(reference, sizes) for sizes in (SIZES[:1] if fixed else SIZES)]
    expected = [reference.run(None, feed) for feed in feeds]
    del reference
    found: dict[str, float | str] = {}
    for tool, path in made.items():
        try:
            session = open_session(path, "ORT_DISABLE_ALL")
            outputs = [session.run(None, feed) for feed in feeds]
        except Exception as error:  # any: a result that cannot run is a finding
            found[tool] = f"does not run: {str(error).splitlines()[0]}"
            continue
        pairs = [
            pair for mine, theirs in zip(expected, outputs, strict=True) for pair in zip(mine, theirs, strict=True)
        ]
        found[tool] = max(apart(np.asarray(one), np.asarray(other)) for one, other in pairs)
    return found


def apart(expected: Array, found: Array) -> float:
    """Return the largest difference over the largest number expected; infinity where shapes or types differ."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return float("inf")
    gap = np.abs(expected.astype(np.float64) - found.astype(np.float64)).max(initial=0)
    return float(gap / max(1e-12, np.abs(expected).max(initial=0))) if np.isfinite(gap) else float("inf")


def time_together(group: Sequence[str], made: dict[str, Path], seconds: float) -> dict[str, tuple[float, float]]:
    """Return the median milliseconds of each result, and its median ratio to the first, timed in turn."""
    sessions = [open_session(made[tool], "ORT_ENABLE_ALL") for tool in group]
    feed = feeds_of(sessions[0], SIZES[-1])
    for session in sessions:
        for _ in range(WARM_UP):
            session.run(None, feed)
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < LEAST_ROUNDS or time.perf_counter() < end:
        rounds.append([one_run(session, feed) for session in sessions])
    times = np.array(rounds)
    ratios = np.median(times / times[:, :1], axis=0)
    return {tool: (float(ms), float(r)) for tool, ms, r in zip(group, np.median(times, axis=0), ratios, strict=True)}


def one_run(session: Any, feed: dict[str, Array]) -> float:
    """Return the milliseconds of one run."""
    start = time.perf_counter()
    session.run(None, feed)
    return (time.perf_counter() - start) * 1e3


# The table


def shown(row: Row, rows: Sequence[Row]) -> str:
    """Return one row of the table."""
    original = next(one for one in rows if one.model == row.model)
    title = f"{row.model} ({row.size / MEGABYTE:,.0f}, {row.nodes:,})" if row is original else ""
    if row.failure:
        return f"| {title} | {row.tool} | {row.failure[:120]} | | | | | | |"
    cost = ["", "", ""]
    if row.process:
        cost = [f"{statistics.median(column):.2f}" for column in (row.process, row.after_import)]
        cost.append(f"{statistics.median(row.peak) / MEGABYTE:,.0f}")
    larger = " **larger**" if row.size > 1.01 * original.size else ""
    latency = "" if row.milliseconds is None else f"{row.milliseconds:.2f} ({row.ratio:.3f}×)"
    wrong = " **wrong**" if row.difference is None or row.difference > WRONG else ""
    gap = f"{row.difference:.1e}{wrong}" if row.difference else "0" if row.difference == 0 else ""
    figures = [*cost, f"{row.nodes:,}", f"{row.size / MEGABYTE:,.1f}{larger}", latency, gap]
    return f"| {title} | {row.tool} | {' | '.join(figures)} |"


if __name__ == "__main__":
    main()
