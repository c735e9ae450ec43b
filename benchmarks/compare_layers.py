"""How much of a model `compare --layers` sees, what it finds on real models, and what it takes.

    python benchmarks/compare_layers.py [--samples N] [--pipeline SPEC ...] [ASSET ...]

Each model of the assets goes through each pipeline, and is compared with the result, in memory and as a file, on
calibration samples. `lowest` is the lowest SQNR of any pair that can be compared: a wrong pair would have about 0 dB.
Each comparison of files runs in a process of its own, of which seconds and peak memory are. Prints a
Markdown table.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from real_models import SHARED, calibration, load_scorer

import graphopt
from graphopt.machine import peak_rss_mb

PIPELINES = ("simplify", "O2", "quant", "prune,quant")
SAMPLES, CALIBRATED_ON = 8, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("assets", nargs="*", metavar="ASSET", help="by default all")
    parser.add_argument("--pipeline", action="append", metavar="SPEC", help=f"by default {', '.join(PIPELINES)}")
    parser.add_argument("--samples", type=int, default=SAMPLES)
    parser.add_argument("--one", nargs=3, metavar=("A", "B", "DATA"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measured(*options.one, options.samples)))
        return
    scorer = load_scorer()
    print(
        "| model | pipeline | values | compared, in memory | from files | verdict | lowest | first diverging | s | MB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for name in options.assets or scorer.ASSETS:
        for spec in options.pipeline or PIPELINES:
            print(row(scorer, name, spec, options.samples), flush=True)


def row(scorer: Any, name: str, spec: str, samples: int) -> str:
    path, data = SHARED / "assets" / "models" / scorer.ASSETS[name][0], calibration(scorer, name, CALIBRATED_ON)
    with tempfile.TemporaryDirectory() as folder:
        out, stored = Path(folder, "out.onnx"), Path(folder, "data.npz")
        np.savez(stored, **data)
        try:
            result = graphopt.optimize(path, spec, output=out, data=data, verify="structure")
        except graphopt.GraphoptError as error:
            return f"| {name} | `{spec}` | {error.message} |"
        found = graphopt.compare_layers(path, result.model, data=data, samples=samples)
        command = [sys.executable, __file__, "--samples", str(samples), "--one", str(path), str(out), str(stored)]
        file = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()[-1])
    errors = [one.sqnr_db for one in found.layers if one.error.mismatch is None]
    other = sum(one.has_other_shape for one in found.layers)
    first = found.first_diverging
    cells = [
        name,
        f"`{spec}`",
        str(found.left.values),
        str(len(found.layers)),
        str(file["layers"]),
        verdict(found),
        f"{min(errors):.1f} dB" + (f", {other} of other shape" if other else ""),
        f"`{first.origin}` ({first.op_type})" if first is not None else "–",
        f"{file['seconds']:.1f}",
        f"{file['mb']:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


def verdict(found: graphopt.LayerComparison) -> str:
    if found.identical:
        return "identical"
    if found.judges_disagree:
        return "the judges disagree"
    return "within rounding" if found.ok else found.cannot_run or "differs"


def measured(a: str, b: str, data: str, samples: int) -> dict[str, float]:
    """Compare two files; what is returned is printed as JSON for the process that asked."""
    start = time.perf_counter()
    found = graphopt.compare_layers(a, b, data=data, samples=samples)
    return {"layers": len(found.layers), "seconds": time.perf_counter() - start, "mb": peak_rss_mb()}


if __name__ == "__main__":
    main()
