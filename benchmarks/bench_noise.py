"""How far `bench` can be believed here: models timed against themselves.

    python benchmarks/bench_noise.py [SECONDS] [REPEATS]

A verdict of `faster` or `slower` is wrong each time.
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path

import graphopt
from graphopt import machine

MODELS = Path(__file__).resolve().parents[2] / "shared" / "assets" / "models"
NAMES = ("digits_resnet", "resnet20_cifar10", "squeezenet1.1_imagenet", "mobilenet_v1_0.5_160_imagenet")


def main(seconds: float = 1.0, repeats: int = 10) -> None:
    """Print the verdicts by model and threads, as Markdown."""
    print(f"{machine.cpu_name()}, ONNX Runtime, {repeats} comparisons of {seconds:g} s each\n")
    print("| model | threads | verdicts | ratios | taken by others |\n|---|---|---|---|---|")
    for name in NAMES:
        path = MODELS / f"{name}.onnx"
        for threads in sorted({1, len(machine.physical_cores())}):
            found = [graphopt.bench([path, path], seconds=seconds, threads=threads, batch=8) for _ in range(repeats)]
            times = [one.rows[1].latency for one in found if one.rows[1].latency is not None]
            verdicts = ", ".join(f"{n} {verdict}" for verdict, n in Counter(t.verdict for t in times).most_common())
            ratios = f"{min(t.ratio for t in times):.3f}–{max(t.ratio for t in times):.3f}"
            taken = max((one.taken for one in found if one.taken is not None), default=None)
            print(
                f"| {name} | {threads} | {verdicts} | {ratios} | {'–' if taken is None else f'{taken:.0%}'} |",
                flush=True,
            )


if __name__ == "__main__":
    main(*(kind(text) for kind, text in zip((float, int), sys.argv[1:], strict=False)))
