"""Every model loses a fifth of each of its groups of channels, and still runs: what was found, what is left, how long.

    python benchmarks/structured_coverage.py [model.onnx ...] [--ratio 0.2]

By default the real models of `real_models.py`. Each is brought into canonical form, its groups are found for either
layout, the units of smallest weights go, groups that normalizations mix included, and the result is saved, loaded by
ONNX Runtime and run on made-up inputs, as the original is. The table says nothing of what the outputs are worth: that
is what `prune.py` measures.
"""

from __future__ import annotations

import argparse
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx_ir as ir
from real_models import SHARED, VAD_FRAME

import graphopt
from graphopt import registry, shapes, walk
from graphopt.authoring import Context
from graphopt.backend import Array, Backend
from graphopt.generated import generated_feeds
from graphopt.passes.analyses.channel_groups import ChannelGroup, Layout, Side
from graphopt.passes.lossy.channel_choice import kept_units, order_by_weights
from graphopt.passes.lossy.removable_channels import find_channels
from graphopt.passes.lossy.shrinking import shrink
from graphopt.rewriter import Rewriter

LAYOUTS = {"inner": Layout(), "whole heads": Layout(Side.MAJOR, Side.MAJOR)}
RATIO = 0.2
MEGABYTE = 1e6
SAMPLING_SECONDS = 0.02


def main() -> None:
    """Print one row for each model and layout."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", type=Path)
    parser.add_argument("--ratio", type=float, default=RATIO)
    arguments = parser.parse_args()
    print("| model | cut | groups | frozen | parameters left | shrink s | save s | memory MB | runs |")
    print("|---|---|--:|--:|--:|--:|--:|--:|---|")
    for path in arguments.models or sorted((SHARED / "assets" / "models").glob("*.onnx")):
        for name, layout in LAYOUTS.items():
            print(_row(path, name, layout, arguments.ratio), flush=True)


def _row(path: Path, name: str, layout: Layout, ratio: float) -> str:
    backend = registry.backend("onnxruntime")
    model = graphopt.optimize(path, "simplify", verify="structure").model
    feed = _feed(path, model)
    expected = _outputs(model, backend, feed)
    ctx = Context(model, Rewriter(model), registry.find("TARGETS", "portable"), backend)
    ctx.analyse(shapes.infer_shapes)
    found = find_channels(ctx, layout)
    kept = {group: _kept(group, ratio) for group in found.groups if group.size > 1}
    before = _parameters(model)
    with _watched() as shrinking:
        shrink(ctx, kept)
    with tempfile.TemporaryDirectory() as folder, _watched() as saving:
        graphopt.save(model, Path(folder) / "small.onnx")
    left = _parameters(model) / before
    runs = "yes" if _shapes(_outputs(model, backend, feed)) == _shapes(expected) else "other shapes"
    memory = max(shrinking[1], saving[1]) / MEGABYTE
    figures = f"{left:.0%} | {shrinking[0]:.1f} | {saving[0]:.1f} | {memory:.0f} | {runs}"
    return f"| {path.stem} | {name} | {len(found.groups)} | {len(found.frozen)} | {figures} |"


def _kept(group: ChannelGroup, ratio: float) -> Array:
    width = group.size - max(int(ratio * group.size), 1)
    return kept_units(group.size, order_by_weights(group, "l1"), width)


def _feed(path: Path, model: ir.Model) -> dict[str, Array]:
    if path.stem == "silero_vad":  # its inputs name no sizes, and only two rates are rates
        frame = np.zeros((1, VAD_FRAME), np.float32)
        return {"input": frame, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000, np.int64)}
    return generated_feeds(model, seed=0, sets=1)[0]


def _outputs(model: ir.Model, backend: Backend, feed: dict[str, Array]) -> dict[str, Array]:
    with backend.open(model) as session:
        return dict(session.run(feed))


def _shapes(outputs: dict[str, Array]) -> dict[str, tuple[int, ...]]:
    return {name: array.shape for name, array in outputs.items()}


def _parameters(model: ir.Model) -> int:
    return sum(tensor.size for tensor in walk.stored_tensors(model))


@contextmanager
def _watched() -> Iterator[list[float]]:
    """Measure seconds, and the most bytes of memory of its own that a block adds; pages of files are the system's."""
    figures, done = [0.0, 0.0], threading.Event()
    before = _own_memory()

    def watch() -> None:
        while True:
            figures[1] = max(figures[1], _own_memory() - before)
            if done.wait(SAMPLING_SECONDS):
                return

    watcher, start = threading.Thread(target=watch), time.perf_counter()
    watcher.start()
    try:
        yield figures
    finally:
        figures[0] = time.perf_counter() - start
        done.set()
        watcher.join()


def _own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


if __name__ == "__main__":
    main()
