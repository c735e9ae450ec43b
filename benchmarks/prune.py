"""Pruning side by side: graphopt, torch, Torch-Pruning, onnxsim, llm-compressor and the published recipes, in one run.

    python benchmarks/prune.py --peers PEERS/bin/python [--only TABLE] [--tool TEXT] [NAME ...]
    python benchmarks/prune.py --only latency --only obs --resnet50 MODELS/resnet50_ts.onnx
    python benchmarks/prune.py --only coverage --models MODELS --tool graphopt

Prints Markdown tables. Models, calibration data and scores come from the assets folder (``GRAPHOPT_SHARED``, by default
``../shared`` beside the repository); calibration samples are never among the scored ones, and every tool gets the same.
Nothing is trained. Every tool prunes in a process of its own. Multiplications, zeros and patterns are read off the
files by `prune_judging.py`, whatever a tool says of itself. Latency is measured in turn, ratios are medians of paired
runs; with ``--busy``, on machines that others use too, as the processor time of one thread. ``--peers`` is an
interpreter with torch, torch-pruning, transformers, llmcompressor, onnxsim, onnx and onnxruntime; without it this one
stands in, and what it lacks is said. ``--quick`` scores and calibrates on fewer windows of text.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType

import onnx
import onnxruntime
from prune_judging import in_pattern, run_alike, zeros
from quant_judging import THREADS, score, shown
from quant_runs import Entry, Tool, cost, graphopt
from quant_runs import peers as peers_of
from real_models import load_scorer
from tool_tables import (
    SAMPLES_OF_LARGE,
    Bench,
    head,
    large_cases,
    left,
    line,
    lost,
    made,
    resnet_case,
    scored,
    size,
)

PEERS = Path(__file__).with_name("prune_peers.py")
WINDOWS, QUICK_WINDOWS, QUICK_SCORED = 128, 32, 40
IMAGES = 256
OBS_SAMPLES = 64
PATTERN = "2of4"
SPARSITIES = ("0.5", "0.7")
SHARES = ("0.7", "0.6", "0.5")

NETWORKS = ("resnet20", "squeezenet", "mobilenet", "digits", "magika")
NARROWED = ("resnet20", "squeezenet", "mobilenet", "digits", "yunet")
LARGER = ("squeezenet", "mobilenet")


def peers(setting: str, *names: str) -> tuple[Tool, ...]:
    """Return peers at one setting."""
    return peers_of(*(f"{name}:{setting}" for name in names), script=PEERS)


def on_language(setting: str) -> tuple[Tool, ...]:
    """Return the tools for a language model at a sparsity or pattern."""
    kept = f"pattern={setting}" if setting == PATTERN else f"sparsity={setting}"
    return (
        *peers(setting, "torch magnitude", *(() if setting == PATTERN else ("torch magnitude, global",))),
        *peers(setting, "Wanda, reference", "SparseGPT, reference"),
        *peers(setting, "llm-compressor Wanda", "llm-compressor SparseGPT"),
        *peers(setting, "onnxsim magnitude", "onnxsim Wanda", "onnxsim SparseGPT"),
        graphopt(f"prune:method=magnitude:{kept}", calibrates=False),
        graphopt(f"prune:method=wanda:{kept}"),
        graphopt(f"prune:method=obs:{kept}"),
        *(() if setting == PATTERN else (graphopt(f"prune:method=obs:{kept}:scope=global"),)),
    )


def on_networks(setting: str) -> tuple[Tool, ...]:
    """Return the tools that zero weights of a classifier."""
    return (
        *peers(setting, "torch magnitude", "torch magnitude, global"),
        *peers(setting, "onnxsim magnitude", "onnxsim Wanda", "onnxsim SparseGPT"),
        graphopt(f"prune:method=magnitude:sparsity={setting}", calibrates=False),
        graphopt(f"prune:method=wanda:sparsity={setting}"),
        graphopt(f"prune:method=obs:sparsity={setting}"),
        graphopt(f"prune:method=obs:sparsity={setting}:scope=global"),
    )


def on_channels(setting: str) -> tuple[Tool, ...]:
    """Return the tools that remove channels, at a share of the multiplications."""
    return (
        *peers(setting, "Torch-Pruning L1", "Torch-Pruning L2", "Torch-Pruning L2, global"),
        *peers(setting, "Torch-Pruning LAMP, global", "Torch-Pruning Taylor, global"),
        *peers(setting, "Torch-Pruning L1, inner", "Torch-Pruning Taylor, inner"),
        *peers(setting, "onnxsim channels", "onnxsim channels, global", "onnxsim channels, Wanda"),
        graphopt(f"prune-channels:macs={setting}:allocate=uniform"),
        graphopt(f"prune-channels:macs={setting}:allocate=error"),
    )


NARROW = (
    *peers("0.7", "Torch-Pruning L2", "Torch-Pruning L1, inner"),
    graphopt("prune-channels:macs=0.7:allocate=error"),
)
COVERED = tuple(graphopt(f"{name}:ratio=0.2", "--metric", "sqnr_db") for name in ("prune-channels", "prune-heads"))
OBS = (
    *peers("0.5", "onnxsim SparseGPT"),
    graphopt("prune:method=wanda:sparsity=0.5"),
    graphopt("prune:method=obs:sparsity=0.5"),
)


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables that were asked for."""
    options = parsed(arguments)
    bench = Bench(quickened(load_scorer()) if options.quick else load_scorer(), options)
    how = "processor time of 1 thread" if options.busy else f"{THREADS} threads"
    print(f"ONNX Runtime {onnxruntime.__version__}, {how}. Milliseconds: median (speed-up, paired).")
    print("Seconds: whole process, after import, processor time; then peak MB.", flush=True)
    for name, table in TABLES.items():
        if not options.only or name in options.only:
            for line in table(bench):
                print(line, flush=True)


def parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Return what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="assets; by default all that a table has")
    parser.add_argument("--peers", type=Path, default=Path(sys.executable), help="interpreter of the other tools")
    parser.add_argument("--only", action="append", choices=list(TABLES), metavar="TABLE", help=", ".join(TABLES))
    parser.add_argument("--tool", action="append", default=[], metavar="TEXT", help="only tools whose name has this")
    parser.add_argument("--seconds", type=float, default=8.0, help="to time the files of one model at one batch size")
    parser.add_argument("--busy", action="store_true", help="time one thread by the processor, not the clock")
    parser.add_argument("--quick", action="store_true", help="fewer windows of text, to calibrate on and to score")
    parser.add_argument("--resnet50", type=Path, help="a ResNet-50 for batches of images of 224×224")
    parser.add_argument("--models", type=Path, help="a folder of large models, for the coverage")
    return parser.parse_args(arguments)


def quickened(scorer: ModuleType) -> ModuleType:
    """Return a scorer that reads fewer windows of the language model's text."""
    file, _, samples = scorer.ASSETS["gutenberg_lm"]
    ids = scorer.data("gutenberg_val.npz")["ids"][:QUICK_SCORED]
    scorer.ASSETS["gutenberg_lm"] = (file, lambda path: scorer.perplexity(path, ids), samples)
    return scorer


def language_table(bench: Bench) -> Iterator[str]:
    """Yield the perplexity of a language model with half its weights zero, wherever or two of every four."""
    columns = ("perplexity", "added", "zeros", "in 2:4", "MB", "process", "work", "CPU", "peak")
    yield from head("Zeros in a language model, one shot", "model", "tool", *columns)
    for case in bench.cases(("gutenberg_lm",), QUICK_WINDOWS if bench.options.quick else WINDOWS):
        entries = made(bench, case, [*on_language("0.5"), *on_language(PATTERN)])
        score(case.name, bench.scorer, entries, record=False)
        for entry in entries:
            yield line(case, entry, scored(entry), lost(entry, entries[0]), *zeroed(entry), size(entry), *cost(entry))


def zeroed(entry: Entry) -> tuple[str, str]:
    """Return the share of zeros among the weights of a file, and of weights in layers that follow 2:4."""
    if entry.failure:
        return "", ""
    model = onnx.load(entry.path)
    return f"{zeros(model):.1%}", f"{in_pattern(model):.0%}"


def networks_table(bench: Bench) -> Iterator[str]:
    """Yield the score of classifiers with many weights zero."""
    columns = ("score", "points lost", "zeros", "process", "work", "CPU", "peak")
    yield from head("Zeros in convolutional networks, no training", "model", "tool", *columns)
    for case in bench.cases(NETWORKS, IMAGES):
        entries = made(bench, case, [tool for setting in SPARSITIES for tool in on_networks(setting)])
        score(case.name, bench.scorer, entries, record=False)
        for entry in entries:
            cells = (scored(entry), lost(entry, entries[0]), zeroed(entry)[0])
            yield line(case, entry, *cells, *cost(entry))


def channels_table(bench: Bench) -> Iterator[str]:
    """Yield the score of networks with fewer channels, at equal multiplications."""
    columns = ("score", "lost", "multiplications", "parameters", "MB", "process", "work", "CPU", "peak")
    yield from head("Channels removed, no training", "model", "tool", *columns)
    for case in bench.cases(NARROWED, IMAGES):
        entries = made(bench, case, [tool for setting in SHARES for tool in on_channels(setting)])
        score(case.name, bench.scorer, entries, record=False)
        for entry in entries:
            cells = (scored(entry), lost(entry, entries[0]), *left(entry, entries[0], case))
            yield line(case, entry, *cells, size(entry), *cost(entry))


def latency_table(bench: Bench) -> Iterator[str]:
    """Yield the latency of larger networks at 70 % of the multiplications."""
    columns = ("multiplications", "parameters", "MB", "batch 1, ms", "batch 8, ms")
    yield from head("Latency with fewer channels", "model", "tool", *columns)
    with tempfile.TemporaryDirectory() as folder:
        # A case's folder is there while its turn lasts.
        for case in itertools.chain(bench.cases(LARGER), [resnet_case(bench, folder)]):
            if case is None:
                yield "| ResNet-50 | not measured: give `--resnet50 FILE` |"
                return
            entries = made(bench, case, NARROW)
            for batch in (1, 8):
                bench.time(entries, case.first(batch), str(batch))
            for entry in entries:
                latency = [shown(entry, entries[0], str(batch)) for batch in (1, 8)]
                yield line(case, entry, *left(entry, entries[0], case), size(entry), *latency)


def coverage_table(bench: Bench) -> Iterator[str]:
    """Yield what is left of every model at hand where a fifth of its channels, or heads, goes, and whether it runs."""
    columns = ("multiplications", "parameters", "runs", "process", "work", "CPU", "peak")
    yield from head("Every model, a fifth of its channels or heads", "model", "tool", *columns)
    for case in itertools.chain(bench.cases(list(bench.scorer.ASSETS), SAMPLES_OF_LARGE), large_cases(bench)):
        entries = made(bench, case, COVERED)
        for entry in entries[1:]:
            runs = "" if entry.failure else run_alike(entries[0].path, entry.path, case.first(1)) or "yes"
            yield line(case, entry, *left(entry, entries[0], case), runs, *cost(entry))


def obs_table(bench: Bench) -> Iterator[str]:
    """Yield the time and memory that pruning a model of 100 MB takes."""
    columns = ("score", "zeros", "process", "work", "CPU", "peak")
    yield from head("A model of 100 MB", "model", "tool", *columns)
    with tempfile.TemporaryDirectory() as folder:
        for case in itertools.chain(bench.cases(("minilm",), OBS_SAMPLES), [resnet_case(bench, folder)]):
            if case is None:
                yield "| ResNet-50 | not measured: give `--resnet50 FILE` |"
                return
            entries = made(bench, case, OBS)
            if case.name in bench.scorer.ASSETS:
                score(case.name, bench.scorer, entries, record=False)
            for entry in entries:
                yield line(case, entry, scored(entry), zeroed(entry)[0], *cost(entry))


TABLES: dict[str, Callable[[Bench], Iterator[str]]] = {
    "language": language_table,
    "networks": networks_table,
    "channels": channels_table,
    "latency": latency_table,
    "coverage": coverage_table,
    "obs": obs_table,
}


if __name__ == "__main__":
    main()
