"""How long the graph view takes: laid out in Python, opened in a browser, moved.

    python benchmarks/graph_view.py [--nodes 1000 5000 20000] [--models MODEL.onnx ...] [--passes simplify]

Stacks of decoder layers (see `growth.py`) and any models, each before and after a pipeline. In headless Chromium,
without a GPU: from the address to a picture that can be used, then frames while both sides are moved and zoomed, at
scales from the whole graph to full size. A browser draws 60 frames a second at most: 16.7 ms is as good as it gets.
Python's time is that on the processor, the browser's by the clock. Prints a Markdown table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import onnx
from growth import transformer
from playwright.sync_api import sync_playwright

import graphopt
from graphopt.graph_view.view import graph_page, graph_view
from graphopt.model_io import load

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from tests.browser import OPTIONS, find_chromium  # noqa: E402

NODES = (1_000, 5_000, 20_000)
FRAMES = 60
SCALES = {"whole": None, "10 %": 0.1, "25 %": 0.25, "full size": 1.0}
MEGABYTE, PERCENTILE = 1e6, 0.95

MOVE = """async ([scale, frames]) => {
  const view = document.querySelector(".graph-view").graphView, times = [];
  if (scale === null) view.fit(); else view.move(0, view.scene.bottom / 2, scale);
  let last = performance.now();
  for (let i = 0; i < frames; i++) {
    const back = i % 2 ? 1 : -1;
    view.move(view.view.x + back * 9, view.view.y + 25 / view.view.scale, view.view.scale * (i % 2 ? 1.02 : 1 / 1.02));
    await new Promise(requestAnimationFrame);
    times.push(performance.now() - last);
    last = performance.now();
  }
  return times;
}"""


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int, nargs="*", default=NODES)
    parser.add_argument("--models", type=Path, nargs="*", default=())
    parser.add_argument("--passes", default="simplify")
    options = parser.parse_args()
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("no Chromium on this machine; set GRAPHOPT_CHROMIUM to one")
    print("| model | nodes before, after | view | page | open | " + " | ".join(SCALES) + " |")
    print("|---|---|---|---|---|" + "---|" * len(SCALES))
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=list(OPTIONS))
        for name, file in models(options.nodes, options.models, Path(folder)):
            print(row(name, file, options.passes, browser, Path(folder)), flush=True)


def models(nodes: Sequence[int], files: Sequence[Path], folder: Path) -> Iterator[tuple[str, Path]]:
    """Yield the models and what they are called."""
    for count in nodes:
        file = folder / f"{count}.onnx"
        onnx.save(transformer(count), file)
        yield "decoder layers", file
    yield from ((file.stem, file) for file in files)


def row(name: str, file: Path, passes: str, browser: Any, folder: Path) -> str:
    """Return the row of a model: seconds of Python, megabytes, seconds to open, milliseconds a frame."""
    before, after = load(file), graphopt.optimize(file, passes, verify="off").model
    start = time.process_time()
    text = graph_page(graph_view(before, after), name)
    made = time.process_time() - start
    page = folder / "page.html"
    page.write_text(text, encoding="utf-8")
    tab = browser.new_page(viewport={"width": 1400, "height": 900})
    start = time.perf_counter()
    tab.goto(page.as_uri())
    tab.wait_for_selector(".gv-ready")
    opened = time.perf_counter() - start
    frames = [frame_times(tab, scale) for scale in SCALES.values()]
    tab.close()
    counts = f"{before.graph.num_nodes():,}, {after.graph.num_nodes():,}"
    size = f"{len(text.encode()) / MEGABYTE:.2f} MB"
    return f"| {name} | {counts} | {made:.1f} s | {size} | {opened:.1f} s | {' | '.join(frames)} |"


def frame_times(tab: Any, scale: float | None) -> str:
    """Return the median and the 95th percentile of the times between frames while the view is moved."""
    times = sorted(tab.evaluate(MOVE, [scale, FRAMES]))
    return f"{statistics.median(times):.0f}, {times[int(PERCENTILE * len(times))]:.0f} ms"


if __name__ == "__main__":
    main()
