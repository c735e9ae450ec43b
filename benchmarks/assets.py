"""Run the main job on every real model and score the results with the models' own scorer.

    python benchmarks/assets.py [--threads 2] [NAME ...]

The models are looked for in `../shared/assets`, or where GRAPHOPT_SHARED points. Prints a Markdown table: score, size
and latency of the original and of each pipeline's result. The score comes from `score.py` beside the models, not from
graphopt; latency is graphopt's own interleaved measurement at batch 1.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from real_models import calibration, load_scorer

import graphopt

PIPELINES = ("prune:sparsity=0.5", "quant", "prune:sparsity=0.5,quant")
CALIBRATION_SAMPLES = 64


def row(scorer: ModuleType, name: str, passes: str, threads: int) -> str:
    """Run one pipeline on one model and return its table row."""
    file, score, _ = scorer.ASSETS[name]
    source = scorer.HERE / "models" / file
    samples = calibration(scorer, name, CALIBRATION_SAMPLES)
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "out.onnx"
        # The scored split is the scorer's; what is calibrated on here is judged here too, so nothing is held back.
        report = graphopt.optimize(
            source, passes, data=samples, evaluation=samples, output=output, threads=threads
        ).report
        before, after = score(source), score(output)
    metric = next(iter(before))
    mode = next((n.facts["mode"] for step in report.steps for n in step.notes if "mode" in n.facts), "")
    sizes = report.before.bytes, report.after.bytes
    latency = (
        f"{report.before.latency_ms:.3g} → {report.after.latency_ms:.3g} ms ({1 / report.latency_ratio:.2f}×)"
        if report.latency_ratio
        else "–"
    )
    return (
        f"| {name} | `{passes}`{f' ({mode})' if mode else ''} | {metric} {before[metric]:.4g} → {after[metric]:.4g} "
        f"| {sizes[0] / 1e6:.2f} → {sizes[1] / 1e6:.2f} MB ({sizes[0] / sizes[1]:.2f}×) | {latency} "
        f"| {report.after.nonzero / report.after.parameters:.0%} |"
    )


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    scorer = load_scorer()
    print("| model | pipeline | score | size | latency, batch 1 | nonzero |\n|---|---|---|---|---|---|")
    for name in options.names or scorer.ASSETS:
        for passes in PIPELINES:
            print(row(scorer, name, passes, options.threads))
            sys.stdout.flush()


if __name__ == "__main__":
    main()
