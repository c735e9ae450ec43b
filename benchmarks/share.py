"""Weight sharing: clusters beside scikit-learn's k-means, the solver by itself, copies found, and memory.

    python benchmarks/share.py [cluster] [solver] [planted] [tied] [memory] [--model NAME] [--tool TEXT]
    python benchmarks/share.py planted memory --models MODELS

Prints Markdown tables. Models, calibration data and scores come from the assets folder (``GRAPHOPT_SHARED``, by default
``../shared`` beside the repository); calibration samples are never among the scored ones. Nothing is trained. Every
tool works in a process of its own, k-means by `share_peers.py`, whose files hold float32. Sizes are those of files:
codes, tables, scales and graph. *Load* is the opening of a session, optimizations on.

``tied`` lets similar layers read one weight. ``solver`` compares objectives, without a model around them. ``planted``
plants copies of weights, equal up to what an operator gives back, in every model, and looks for them; ``--models``, a
folder of large ones, adds language models whose head was untied, and more models to ``memory``.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
import shared_copies
from memory_peaks import memory_table
from plain_layers import Array, layers_of, second_moments
from prune_judging import layer_weights
from quant_judging import open_session, score, shown, sound
from quant_runs import Entry, cost, graphopt, peers
from share_peers import clustered as by_kmeans
from table_command import Tables, print_tables
from tool_tables import Bench, head, line, lost, made, scored, size

from graphopt.passes.solvers.clustered_weight import Clustering
from graphopt.passes.solvers.clusters import clustered

PEERS = Path(__file__).with_name("share_peers.py")
NETWORKS = ("resnet20", "squeezenet", "mobilenet", "digits", "magika", "yunet")
IMAGES = 256
BITS = (4, 3, 2)
BATCHES = (1, 8)
LOADS = 9
TIED_SAMPLES = {"gutenberg_lm": 32, "minilm": 64}
TIED = (graphopt("tie-layers:params=0.9"),)
# k-means starts somewhere: the best of so many runs, as its users have it.
STARTS = 10
CLUSTERS = (
    *peers(*(f"k-means:{bits}" for bits in BITS), script=PEERS),
    graphopt("cluster:bits=4:solver=kmeans", calibrates=False),
    *(graphopt(f"cluster:bits={bits}") for bits in BITS),
    graphopt("cluster:bits=4:solver=compensated"),
    graphopt("cluster:bits=4:granularity=channel"),
    graphopt("cluster:bits=8:vector=4"),
    graphopt("cluster:bits=4:outliers=0.005"),
    graphopt("cluster:bits=4,quant:mode=static"),
)


def cluster_table(bench: Bench) -> Iterator[str]:
    """Yield the scores of networks whose weights are codes, how large their files are, and how they load and run."""
    latencies = tuple(f"batch {batch}, ms" for batch in BATCHES)
    costs = ("process", "work", "CPU", "peak")
    yield from head(
        "Weights as codes", "model", "tool", "score", "lost", "MB", "smaller", "load, ms", *latencies, *costs
    )
    for case in bench.cases(NETWORKS, IMAGES):
        entries = made(bench, case, CLUSTERS)
        score(case.name, bench.scorer, entries, record=False)
        load_together(entries)
        for batch in BATCHES:
            bench.time(entries, case.first(batch), str(batch))
        for entry in entries:
            cells = (scored(entry), lost(entry, entries[0]), size(entry), smaller(entry, entries[0]))
            times = (shown(entry, entries[0], key) for key in ("load", *map(str, BATCHES)))
            yield line(case, entry, *cells, *times, *cost(entry))


def smaller(entry: Entry, original: Entry) -> str:
    """Return how many times smaller a file is than the original's."""
    return "" if entry.failure else f"{original.size / entry.size:.2f}×"


def load_together(entries: Sequence[Entry]) -> None:
    """Open a session of every file in turn, several times, and keep the milliseconds of one thread's processor time."""
    for entry in sound(entries):
        entry.times["load"] = []
    for _ in range(LOADS):
        for entry in sound(entries):
            start = time.thread_time()
            open_session(entry.path, 1)
            entry.times["load"].append((time.thread_time() - start) * 1e3)


def tied_table(bench: Bench) -> Iterator[str]:
    """Yield the scores of models in which layers share weights until a tenth of those of linear layers is gone."""
    yield from head(
        "Layers that share a weight", "model", "tool", "score", "lost", "MB", "process", "work", "CPU", "peak"
    )
    for name, count in TIED_SAMPLES.items():
        for case in bench.cases((name,), count):
            entries = made(bench, case, TIED)
            score(case.name, bench.scorer, entries, record=False)
            for entry in entries:
                yield line(case, entry, scored(entry), lost(entry, entries[0]), size(entry), *cost(entry))


def solver_table(bench: Bench) -> Iterator[str]:
    """Yield the solver's objective over that of scikit-learn's KMeans, plain and weighed by what inputs are like."""
    columns = ("layers", "values", "all layers", "best", "worst", "weighed: all layers", "best", "worst")
    yield from head(f"The solver's objective over KMeans' (n_init={STARTS})", "model", *columns)
    for case in bench.cases(NETWORKS, IMAGES):
        model = onnx.load(case.model)
        weights = [weight.reshape(len(weight), -1) for _, weight in layer_weights(model)]
        layers = layers_of(model)
        diagonals = [np.diag(h) for h in second_moments(model, layers, case.feeds)]
        matrices = [layer.matrix.astype(np.float32) for layer in layers]
        for bits in BITS:
            plain = [objectives(weight, None, bits) for weight in weights]
            weighed = [objectives(one, h, bits) for one, h in zip(matrices, diagonals, strict=True)]
            cells = (case.name, str(len(weights)), str(2**bits), *compared(plain), *compared(weighed))
            yield "| " + " | ".join(cells) + " |"


def objectives(weight: Array, diagonal: Array | None, bits: int) -> tuple[float, float]:
    """Return the weighed sum of squares that the solver leaves, and that KMeans leaves.

    Args:
        weight: Floats, [outputs, inputs].
        diagonal: What the square of each input is on average; None for 1.
        bits: Of a code.
    """
    importance = np.ones(weight.shape[1]) if diagonal is None else diagonal
    how = Clustering(bits=bits, block=None, zeros=False, compensated=False)
    ours = clustered(weight, how, None if diagonal is None else np.diag(diagonal)).values()
    flat = np.broadcast_to(importance, weight.shape).ravel()
    theirs = by_kmeans(weight, 2**bits, None if diagonal is None else flat, starts=STARTS)
    left, right = (float(((weight - one).astype(np.float64) ** 2 * importance).sum()) for one in (ours, theirs))
    return left, right


def compared(pairs: Sequence[tuple[float, float]]) -> tuple[str, str, str]:
    """Return the ratio of all objectives together, of the best and of the worst, but for what both lose nothing of."""
    ratios = [ours / theirs for ours, theirs in pairs if theirs > 0]
    together = sum(ours for ours, _ in pairs) / sum(theirs for _, theirs in pairs)
    return f"{together:.5f}", f"{min(ratios):.5f}", f"{max(ratios):.5f}"


def planted_table(bench: Bench) -> Iterator[str]:
    """Yield what `share` finds of copies that were planted."""
    yield "\n### Copies planted\n"
    folder = bench.options.models
    yield from shared_copies.tables(sorted(folder.glob("*.onnx")) if folder is not None else [])


TABLES: Tables = {
    "cluster": cluster_table,
    "solver": solver_table,
    "planted": planted_table,
    "tied": tied_table,
    "memory": memory_table("cluster:bits=4", "share", "tie-layers:params=0.9"),
}


if __name__ == "__main__":
    print_tables(__doc__, TABLES)
