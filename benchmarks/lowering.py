"""Models lowered to torch beside ONNX Runtime: the same outputs, and a step of training.

    python benchmarks/lowering.py [--models MODELS] [NAME ...]
    python benchmarks/lowering.py --device cuda

Prints a Markdown table. The models are those of the assets folder (``GRAPHOPT_SHARED``, by default ``../shared`` beside
the repository) on real samples, and those of a folder of large models on made-up ones. ONNX Runtime's optimizations are
off. The difference is the largest of any output over that output's largest number. The step goes down the gradient of
the mean square of the outputs, over all weight matrices and kernels; it counts if every gradient is finite, some are
not zero, and the loss falls. Milliseconds are medians of interleaved runs on one thread.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import simplify
import torch
from real_models import SHARED, calibration, load_scorer

import graphopt
from graphopt import registry
from graphopt.backend import Differentiable
from graphopt.errors import GraphoptError

SAMPLES = 4
RUNS = 5
THREADS = 1
# Steps down a gradient, of which one must lower the loss: how long one may be differs from model to model.
STEPS = (1e-2, 1e-4, 1e-6)
# Weights of layers; what has fewer axes are biases, normalizations and numbers.
MATRIX_RANK = 2
# What an output of zeros is divided by.
TINY = 1e-9


def rows(names: list[str], folder: Path | None, device: str) -> Iterator[str]:
    """Yield a table of models in torch beside ONNX Runtime."""
    yield "| model | nodes | difference | torch, ms | ONNX Runtime, ms | opened, s | step of training | weights moved |"
    yield "|---|---:|---:|---:|---:|---:|---|---:|"
    scorer = load_scorer()
    for name, (file, *_) in scorer.ASSETS.items():
        if not names or name in names:
            yield row(name, SHARED / "assets" / "models" / file, calibration(scorer, name, SAMPLES), device)
    for path in sorted(folder.glob("*.onnx")) if folder is not None else ():
        if not names or path.stem in names:
            yield row(path.stem, path, simplify.feeds_of(simplify.open_session(path, "ORT_DISABLE_ALL"), {}), device)


def row(name: str, path: Path, feeds: Mapping[str, Any], device: str) -> str:
    """Return what torch makes of a model."""
    model = graphopt.load(path)
    feeds = fitting(model, feeds)
    try:
        with registry.backend("onnxruntime").open(path, threads=THREADS, optimize=False) as theirs:
            start = time.perf_counter()
            with registry.backend("torch", device=device).open(path, threads=THREADS) as ours:
                opened = time.perf_counter() - start
                expected, found = theirs.run(feeds), ours.run(feeds)
                times = [(timed(ours, feeds), timed(theirs, feeds)) for _ in range(RUNS)]
        mine, other = (statistics.median(column) for column in zip(*times, strict=True))
        apart = max(difference(found[key], expected[key]) for key in expected)
        shown = f"{apart:.1e} | {mine:.1f} | {other:.1f} | {opened:.2f}"
        return f"| {name} | {len(model.graph)} | {shown} | {' | '.join(step(model, feeds, device))} |"
    except GraphoptError as error:
        return f"| {name} | {len(model.graph)} | {error.message} |"


def fitting(model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, Any]:
    """Return feeds of the batch size a model takes, or of one sample each where samples are whole feeds."""
    fitted = {}
    for value in model.graph.inputs:
        array, shape = feeds[value.name or ""], value.shape
        if shape is not None and array.ndim == len(shape) + 1:
            array = array[0]
        first = shape[0] if shape is not None and len(shape) else None
        fitted[value.name or ""] = np.ascontiguousarray(array[:first] if isinstance(first, int) else array)
    return fitted


def timed(session: Any, feeds: Mapping[str, Any]) -> float:
    """Return the milliseconds of a run."""
    start = time.perf_counter()
    session.run(feeds)
    return (time.perf_counter() - start) * 1e3


def difference(found: Any, expected: Any) -> float:
    """Return how far an output is off, as a share of its largest number."""
    wide = np.asarray(expected, np.float64)
    return float(
        np.abs(np.asarray(found, np.float64) - wide).max(initial=0.0) / max(np.abs(wide).max(initial=0.0), 1e-9)
    )


def step(model: ir.Model, feeds: Mapping[str, Any], device: str) -> tuple[str, str]:
    """Return whether a step of training goes well, and how many of the weights have a gradient."""
    backend = registry.backend("torch", device=device)
    assert isinstance(backend, Differentiable)
    module = backend.lower(model).to(device)
    inputs = [torch.from_numpy(feeds[name].copy()).to(device) for name in module.meta["graphopt"].inputs]
    weights = [one for one in module.parameters() if one.ndim >= MATRIX_RANK]
    for weight in weights:
        weight.data = weight.data.clone()
        weight.requires_grad_(True)
    before = loss(module, inputs)
    before.backward()
    gradients = [weight.grad for weight in weights if weight.grad is not None]
    moved = sum(bool(gradient.any()) for gradient in gradients)
    if not all(bool(gradient.isfinite().all()) for gradient in gradients):
        return "a gradient is not finite", f"{moved} of {len(weights)}"
    falls = any(lower_after(module, inputs, weights, rate, before.item()) for rate in STEPS)
    return ("the loss falls" if falls else "the loss does NOT fall"), f"{moved} of {len(weights)}"


def loss(module: Any, inputs: list[torch.Tensor]) -> torch.Tensor:
    """Return the mean square of all outputs that hang on weights."""
    return sum((one.square().mean() for one in module(*inputs) if one.requires_grad), torch.zeros(()))


def lower_after(
    module: Any, inputs: list[torch.Tensor], weights: list[torch.Tensor], rate: float, before: float
) -> bool:
    """Return whether a step of this length, as a share of each weight, lowers the loss; it is taken back."""
    kept = [weight.data.clone() for weight in weights]
    with torch.no_grad():
        for weight in weights:
            if weight.grad is not None and bool(weight.grad.any()):
                weight -= rate * weight.grad * weight.norm() / weight.grad.norm()
    after = loss(module, inputs).item()
    for weight, one in zip(weights, kept, strict=True):
        weight.data = one
    return after < before


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="only models of this name")
    parser.add_argument("--models", type=Path, help="a folder of large models")
    parser.add_argument("--device", default="cpu", help="where torch computes, such as cuda")
    options = parser.parse_args()
    for line in rows(options.names, options.models, options.device):
        print(line, flush=True)


if __name__ == "__main__":
    main()
