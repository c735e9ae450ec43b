"""Quantization side by side: float32, graphopt, ONNX Runtime's quantizers, NNCF and onnxsim, in one run.

    python benchmarks/quant.py --peers PEERS/bin/python [--only TABLE] [NAME ...]
    python benchmarks/quant.py --only resnet50 --only openvino --resnet50 MODELS/resnet50_ts.onnx
    python benchmarks/quant.py --only size --large MODELS/llama_300m_dynamo.onnx

Prints Markdown tables. Models, calibration data and scores come from the assets folder (``GRAPHOPT_SHARED``, by default
``../shared`` beside the repository); calibration samples are never among the scored ones. Every tool quantizes in a
process of its own. Latency is measured in turn, speed-ups are medians of paired runs; with ``--busy``, on machines that
others use too, as the processor time of one thread. ``--peers`` is an interpreter with onnxruntime, onnx_ir, nncf,
openvino, onnxsim and torch; without it this one stands in, and what it lacks is said.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import onnxruntime
from quant_judging import THREADS, fidelity, score, shown, time_on_openvino
from quant_runs import Array, cost, graphopt, peers
from real_models import load_scorer
from tool_tables import Bench, Case, head, line, resnet_case, scored, size

SENTENCES, TOKENS = 8, 64
INT4 = "quant:mode=weights:weights=int4:group=32"

CLASSIFIERS = ("squeezenet", "resnet20", "mobilenet", "digits", "magika")
STATIC = (
    *peers("ORT min-max", "ORT percentile", "ORT entropy", "NNCF", "onnxsim"),
    graphopt("quant:mode=static"),
    graphopt("quant"),
)
TRANSFORMERS = ("minilm", "gutenberg_lm")
DYNAMIC = (
    *peers("ORT dynamic", "ORT min-max", "NNCF", "onnxsim dynamic"),
    graphopt("O2", calibrates=False),
    graphopt("quant:mode=dynamic", calibrates=False),
    graphopt("quant:mode=dynamic,O2", calibrates=False),
    graphopt("quant:mode=static,O2"),
)
PLAIN = (*peers("ORT min-max", "NNCF"), graphopt("quant:mode=static"))
OPENVINO = (*peers("NNCF"), graphopt("quant:mode=static"), graphopt("quant:mode=static", "--target", "openvino"))
WEIGHTS = (
    *peers("ORT RTN", "ORT RTN symmetric", "ORT HQQ", "ORT GPTQ symmetric"),
    *peers("NNCF int4", "NNCF int4 AWQ", "onnxsim int4", "onnxsim int4 GPTQ"),
    *(graphopt(f"{INT4}:solver={solver}", calibrates=False) for solver in ("rtn", "mse", "hqq")),
    *(graphopt(f"{INT4}:solver={solver}") for solver in ("awq", "gptq")),
)
SIZE = (*peers("ORT RTN symmetric"), graphopt(f"{INT4}:solver=rtn", calibrates=False))


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the tables that were asked for."""
    options = parsed(arguments)
    bench = Bench(load_scorer(), options)
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
    parser.add_argument("--seconds", type=float, default=8.0, help="to time the files of one model at one batch size")
    parser.add_argument("--busy", action="store_true", help="time one thread by the processor, not the clock")
    parser.add_argument("--resnet50", type=Path, help="a ResNet-50 for batches of images of 224×224")
    parser.add_argument("--large", type=Path, help="a large language model, for the time that quantizing takes")
    return parser.parse_args(arguments)


def static_table(bench: Bench) -> Iterator[str]:
    """Yield the static int8 table: task, fidelity, latency, and the time it takes to quantize."""
    columns = ("score", "agrees", "KL", "MB", "batch 1, ms", "batch 8, ms", "process", "work", "CPU", "peak")
    yield from head("Static int8, classifiers", "model", "tool", *columns)
    for case in bench.cases(CLASSIFIERS):
        entries = bench.made(case, STATIC)
        score(case.name, bench.scorer, entries, record=True)
        for batch in (1, 8):
            bench.time(entries, case.first(batch), str(batch))
        for entry in entries:
            figures = fidelity(entries[0], entry) if not entry.failure else ()
            latency = [shown(entry, entries[0], str(batch)) for batch in (1, 8)]
            yield line(case, entry, scored(entry), *figures, size(entry), *latency, *cost(entry))


def transformer_table(bench: Bench) -> Iterator[str]:
    """Yield the table of transformers: dynamic and static int8, before and after raising."""
    shape = f"{SENTENCES}×{TOKENS}, ms"
    yield from head("Int8, transformers", "model", "tool", "score", "MB", shape, "process", "work", "CPU", "peak")
    for case in bench.cases(TRANSFORMERS):
        entries = bench.made(case, DYNAMIC)
        score(case.name, bench.scorer, entries, record=False)
        bench.time(entries, whole_sentences(case), shape)
        for entry in entries:
            yield line(case, entry, scored(entry), size(entry), shown(entry, entries[0], shape), *cost(entry))


def whole_sentences(case: Case) -> dict[str, Array]:
    """Return sentences of one length, no token of them padding: their first tokens, over and over."""
    feeds = {}
    for key, x in case.first(SENTENCES).items():
        feeds[key] = np.ones_like(x[:, :TOKENS]) if "mask" in key else x[:, np.arange(TOKENS) % min(8, x.shape[1])]
        feeds[key] = np.ascontiguousarray(np.resize(feeds[key], (SENTENCES, TOKENS)))
    return feeds


def resnet_table(bench: Bench) -> Iterator[str]:
    """Yield the latency of a ResNet-50 at batch 1."""
    columns = ("MB", "batch 1, ms", "process", "work", "CPU", "peak")
    yield from head("Static int8, ResNet-50", "model", "tool", *columns)
    with tempfile.TemporaryDirectory() as folder:
        case = resnet_case(bench, folder)
        if case is None:
            yield "| ResNet-50 | not measured: give `--resnet50 FILE` |"
            return
        entries = bench.made(case, PLAIN)
        bench.time(entries, case.first(1), "1")
        for entry in entries:
            yield line(case, entry, size(entry), shown(entry, entries[0], "1"), *cost(entry))


def openvino_table(bench: Bench) -> Iterator[str]:
    """Yield the latency of graphopt's and NNCF's files on OpenVINO."""
    yield from head("The same files on OpenVINO", "model", "tool", "MB", "batch 1, ms", "batch 8, ms")
    with tempfile.TemporaryDirectory() as folder:
        resnet = resnet_case(bench, folder)
        # A case's folder is there while its turn lasts.
        for case in itertools.chain(bench.cases(CLASSIFIERS), [resnet] if resnet is not None else []):
            entries = bench.made(case, OPENVINO)
            for batch in (1, 8):
                given = (entries, case.data, batch, str(batch), bench.options.seconds, bench.options.peers)
                missing = time_on_openvino(*given)
                if missing:
                    yield f"| {case.name} | OpenVINO did not run: {missing} |"
            for entry in entries:
                yield line(case, entry, size(entry), *(shown(entry, entries[0], str(batch)) for batch in (1, 8)))


def weights_table(bench: Bench) -> Iterator[str]:
    """Yield the perplexity of a language model with 4-bit weights in blocks of 32."""
    columns = ("perplexity", "added", "MB", "process", "work", "CPU", "peak")
    yield from head("Weights in 4 bits, blocks of 32", "model", "tool", *columns)
    for case in bench.cases(("gutenberg_lm",)):
        entries = bench.made(case, WEIGHTS)
        score(case.name, bench.scorer, entries, record=False)
        for entry in entries:
            added = entry.score["perplexity"] - entries[0].score["perplexity"] if entry.score else 0.0
            yield line(case, entry, scored(entry), f"{added:+.3f}", size(entry), *cost(entry))


def size_table(bench: Bench) -> Iterator[str]:
    """Yield the time and memory that 4-bit weights of a large model take to make."""
    yield from head("A large model to 4 bits", "model", "tool", "MB", "process", "work", "CPU", "peak")
    path = bench.options.large
    if path is None:
        yield "| a large model | not measured: give `--large FILE` |"
        return
    with tempfile.TemporaryDirectory() as folder:
        ids = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"]).get_inputs()[0]
        shape = [dim if isinstance(dim, int) else 8 for dim in ids.shape]
        case = Case(path.stem, path, {ids.name: np.ones(shape, np.int64)}, Path(folder))
        for entry in bench.made(case, SIZE):
            yield line(case, entry, size(entry), *cost(entry))


TABLES: dict[str, Callable[[Bench], Iterator[str]]] = {
    "static": static_table,
    "transformers": transformer_table,
    "resnet50": resnet_table,
    "openvino": openvino_table,
    "int4": weights_table,
    "size": size_table,
}


if __name__ == "__main__":
    main()
