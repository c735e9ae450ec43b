"""The most memory that a pass takes, beside what the largest tensor of the model allows.

    python benchmarks/memory_peaks.py make PASSES MODEL DATA.npz OUT

This is the process that is measured. Resident memory counts while passes are at work, all that the process holds by
then included, but not while the original is scored before, or the result afterwards. The last line on stdout is JSON:
seconds and bytes.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
from quant_runs import MEGABYTE, Entry, cost, peers
from tool_tables import Bench, head, large_cases, line, made

import graphopt

# What a pass may hold at most: so many times the largest tensor, and so much besides.
TIMES, BESIDES = 6, 300 * MEGABYTE
SAMPLES = 64


def memory_table(*pipelines: str) -> Callable[[Bench], Iterator[str]]:
    """Return the table of what pipelines take on MiniLM and the models of ``--models``, each in its own process."""

    tools = peers(*pipelines, script=Path(__file__))

    def table(bench: Bench) -> Iterator[str]:
        columns = ("peak MB", "allowed", "held", "work, s", "CPU, s")
        yield from head(f"Memory: at most {TIMES} × the largest tensor + 300 MB", "model", "pass", *columns)
        for case in itertools.chain(bench.cases(("minilm",), SAMPLES), large_cases(bench)):
            allowed = TIMES * largest_tensor(case.model) + BESIDES
            for entry in made(bench, case, tools)[1:]:
                yield line(case, entry, *judged(entry, allowed), *cost(entry)[1:3])

    return table


def judged(entry: Entry, allowed: float) -> tuple[str, str, str]:
    """Return a peak, what is allowed, and whether it was held."""
    if entry.peak is None:
        return "", "", ""
    held = "yes" if entry.peak <= allowed else f"{entry.peak / allowed:.2f}× as much"
    return f"{entry.peak / MEGABYTE:,.0f}", f"{allowed / MEGABYTE:,.0f}", held


def largest_tensor(model: Path) -> int:
    """Return the bytes of the largest initializer of a file."""
    found = onnx.load(model, load_external_data=False).graph.initializer
    return max(int(onnx.helper.tensor_dtype_to_np_dtype(one.data_type).itemsize) * size(one) for one in found)


def size(tensor: onnx.TensorProto) -> int:
    """Return how many elements a tensor has."""
    count = 1
    for extent in tensor.dims:
        count *= extent
    return count


def make(passes: str, model: str, data: str, out: str) -> None:
    """Run a pipeline on a model and print what that took."""
    samples = dict(np.load(data))
    first = {name: x[:1] for name, x in samples.items()}
    start = time.perf_counter()
    done = graphopt.optimize(model, passes, output=out, data=samples, evaluation=first, verify="off")
    seconds = time.perf_counter() - start
    print("\n" + json.dumps([seconds, max(step.peak_rss_mb for step in done.report.steps) * MEGABYTE]))


if __name__ == "__main__":
    {"make": make}[sys.argv[1]](*sys.argv[2:])
