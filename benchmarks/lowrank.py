"""Low rank beside its references: plain and whitened SVD, every layer at one share, as their papers have it.

    python benchmarks/lowrank.py [language] [sentence] [images] [optimum] [memory] [--model NAME] [--tool TEXT]
    python benchmarks/lowrank.py memory --models MODELS --model bert_base_ts

Prints Markdown tables. Models, calibration data and scores come from the assets folder (``GRAPHOPT_SHARED``, by default
``../shared`` beside the repository); calibration samples are never among the scored ones, and every tool gets the same.
Nothing is trained. Every tool works in a process of its own, the references by `lowrank_peers.py`. Multiplications and
parameters are read off the files. Latency is measured in turn, ratios are medians of paired runs.

``optimum`` asks the solver itself: at the rank of the references, its objective tr(ΔHΔᵀ) over the least there is at
this rank, the squared singular values of W H^½ that are left out, with H from the samples, all in float64 by numpy.
``images`` asks the references for as many multiplications as graphopt came to, where it did not come down to what was
asked for: it factors nothing that would be slower. ``memory`` needs, for more than MiniLM, a folder of large models.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from lowrank_peers import rank_of
from memory_peaks import memory_table
from plain_layers import Array, Layer, layers_of, second_moments
from prune_judging import macs
from quant_judging import score, shown, sound
from quant_runs import Entry, Tool, cost, graphopt, peers
from table_command import Tables, print_tables
from tool_tables import Bench, Case, head, left, line, lost, made, scored, size

from graphopt.passes.solvers.rank import Spectrum

PEERS = Path(__file__).with_name("lowrank_peers.py")
WINDOWS, SENTENCES, IMAGES = 128, 256, 256
NETWORKS = ("resnet20", "squeezenet", "mobilenet", "digits")
SOLVED = ("gutenberg_lm", "minilm", *NETWORKS)
SHARE, ASKED_MACS = 0.8, 0.7
BATCHES = (1, 8)
COLUMNS = ("score", "lost", "multiplications", "parameters", "MB")
COSTS = ("process", "work", "CPU", "peak")
LATENCIES = tuple(f"batch {batch}, ms" for batch in BATCHES)


def references(setting: str) -> tuple[Tool, ...]:
    """Return the references at one setting."""
    return peers(f"plain SVD:{setting}", f"whitened SVD:{setting}", script=PEERS)


def at_params(share: float) -> tuple[Tool, ...]:
    """Return the tools for a share of the parameters of a model of matrix products."""
    return (
        *references(f"params={share}"),
        graphopt(f"factorize:params={share}:method=svd", calibrates=False),
        graphopt(f"factorize:params={share}"),
    )


IN_IMAGES = (graphopt(f"factorize:macs={ASKED_MACS}"), graphopt(f"factorize:macs={ASKED_MACS}:form=channel"))


def table_head(title: str) -> Iterator[str]:
    """Yield the head of a table of models and what tools make of them."""
    yield from head(title, "model", "tool", *COLUMNS, *LATENCIES, *COSTS)


def rows(bench: Bench, case: Case, entries: Sequence[Entry]) -> Iterator[str]:
    """Yield, of the files made of a model, scores, what is left, and how long they take to run and took to make."""
    score(case.name, bench.scorer, entries, record=False)
    for batch in BATCHES:
        bench.time(entries, case.first(batch), str(batch))
    for entry in entries:
        cells = (scored(entry), lost(entry, entries[0]), *left(entry, entries[0], case), size(entry))
        latencies = (shown(entry, entries[0], str(batch)) for batch in BATCHES)
        yield line(case, entry, *cells, *latencies, *cost(entry))


def language_table(bench: Bench) -> Iterator[str]:
    """Yield the perplexity of a language model without a fifth of the parameters of its linear layers."""
    yield from table_head("A language model at 80 % of its linear layers")
    for case in bench.cases(("gutenberg_lm",), WINDOWS):
        yield from rows(bench, case, made(bench, case, at_params(0.8)))


def sentence_table(bench: Bench) -> Iterator[str]:
    """Yield the rank correlation of a sentence encoder without a quarter of the parameters of its linear layers."""
    yield from table_head("A sentence encoder at 75 % of its linear layers")
    for case in bench.cases(("minilm",), SENTENCES):
        yield from rows(bench, case, made(bench, case, at_params(0.75)))


def images_table(bench: Bench) -> Iterator[str]:
    """Yield the accuracy of convolutional networks at 70 % of their multiplications, or as near as it pays."""
    yield from table_head("Convolutional networks at 70 % of the multiplications")
    for case in bench.cases(NETWORKS, IMAGES):
        original, *ours = made(bench, case, IN_IMAGES)
        whole = macs(original.path, case.first(1))
        share = max([ASKED_MACS, *(macs(one.path, case.first(1)) / whole for one in sound(ours[:1]))])
        work = replace(case, folder=case.folder / "references")
        work.folder.mkdir()
        theirs = made(bench, work, references(f"macs={share:.4f}"))[1:]
        yield from rows(bench, case, [original, *theirs, *ours])


def optimum_table(bench: Bench) -> Iterator[str]:
    """Yield how near the solver comes to the least of the objective at the rank of the references."""
    columns = ("layers", "worst / least", "of", "plain SVD / least, median")
    yield from head("The objective at equal ranks, over the least there is", "model", *columns)
    for case in bench.cases(SOLVED, IMAGES):
        model = onnx.load(case.model)
        layers = layers_of(model)
        moments = second_moments(model, layers, case.feeds)
        ratios = [over_least(one, h) for one, h in zip(layers, moments, strict=True)]
        worst = int(np.argmax([ratio for ratio, _ in ratios]))
        plain = float(np.median([ratio for _, ratio in ratios]))
        cells = (case.name, str(len(layers)), f"{ratios[worst][0]:.6f}", f"`{layers[worst].name}`", f"{plain:.2f}")
        yield "| " + " | ".join(cells) + " |"


def over_least(layer: Layer, moments: Array) -> tuple[float, float]:
    """Return the objective of the solver's factors, and of the plain SVD's, over the least at this rank."""
    weight, rank = layer.matrix, rank_of(layer, SHARE)
    values, vectors = np.linalg.eigh(moments)
    root = vectors * np.sqrt(np.maximum(values, 0))
    least = float((np.linalg.svd(weight @ root, compute_uv=False)[rank:] ** 2).sum())
    factors = Spectrum(weight, moments).factors(rank)
    u, s, vt = np.linalg.svd(weight, full_matrices=False)
    found = (factors.left.astype(np.float64) @ factors.right.astype(np.float64), (u[:, :rank] * s[:rank]) @ vt[:rank])
    ours, plain = (objective(weight - one, moments) / least for one in found)
    return ours, plain


def objective(change: Array, moments: Array) -> float:
    """Return tr(Δ H Δᵀ)."""
    return float(np.einsum("oi,ij,oj->", change, moments, change, optimize=True))


TABLES: Tables = {
    "language": language_table,
    "sentence": sentence_table,
    "images": images_table,
    "optimum": optimum_table,
    "memory": memory_table("factorize:params=0.8"),
}


if __name__ == "__main__":
    print_tables(__doc__, TABLES)
