"""What the CUDA and TensorRT providers make of real models: is it right, how fast is it, and does it stay on the GPU.

    python benchmarks/gpu.py [--models FOLDER] [--provider cuda ...] [--only TEXT] [--batch N] [--seconds S]

The models are those of `../shared/assets` (or where GRAPHOPT_SHARED points) with their own data, and those of a folder,
such as the seven of `simplify_models.py`, with made-up inputs. Each is run as it is, in half precision, and in the
integers its target is fast in: weights of 4 bits in MatMulNBits on CUDA, static int8 on TensorRT. The table has

* **against CPU**: signal to noise of the provider's outputs against those of ONNX Runtime on the CPU on the same file:
  does the provider compute what the file says;
* **against float32**: the same against the original on the CPU: what the format costs, and the provider on top;
* **ms**: median of a run with inputs and outputs on the GPU, interleaved with the original on the same provider, and
  the median of the paired speed-ups;
* **elsewhere**: nodes that are not on the provider, arithmetic on shapes left out.

Where a provider is missing, that is all it prints of it. `--provider cpu` rehearses the script itself.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from real_models import SHARED, calibration, load_scorer

import graphopt
from graphopt import latency
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.onnxruntime_library import gpus, tensorrt_version
from graphopt.backends.onnxruntime_profiles import spans_of
from graphopt.comparison import Comparison
from graphopt.data import open_data
from graphopt.errors import BackendError, GraphoptError
from graphopt.generated import generated_feeds

CALIBRATION_SAMPLES = 64
CHECKED_FEEDS = 4
TARGETS = {"cpu": "ort-cpu-x86", "cuda": "ort-cuda", "tensorrt": "tensorrt"}
VARIANTS = {
    "cpu": {"float32": "", "dynamic int8": "quant:mode=dynamic"},
    "cuda": {
        "float32": "",
        "float16": "simplify,cast",
        "bfloat16": "simplify,cast:to=bfloat16",
        "float32, 4-bit weights": "simplify,quant:mode=weights:weights=int4",
        "float16, 4-bit weights": "simplify,quant:mode=weights:weights=int4,cast",
    },
    "tensorrt": {
        "float32": "",
        "float16": "simplify,cast",
        "int8": "simplify,quant:mode=static",
        "int8, float16": "simplify,quant:mode=static,cast",
    },
}
HEADER = (
    "| model | provider | variant | MB | against CPU, dB | against float32, dB | ms | speed-up | elsewhere |\n"
    "|---|---|---|---:|---:|---:|---:|---:|---:|"
)

Feed = dict[str, np.ndarray[Any, Any]]


def sources(folder: Path | None, batch: int) -> Iterator[tuple[str, Path, list[Feed], Any]]:
    """Yield name, file, feeds and calibration samples of every model."""
    if (SHARED / "assets").is_dir():
        scorer = load_scorer()
        for name, (file, *_) in scorer.ASSETS.items():
            samples, path = calibration(scorer, name, CALIBRATION_SAMPLES), scorer.HERE / "models" / file
            batches = open_data(samples, graphopt.load(path)).batches(batch)
            yield name, path, [one.feeds for one in islice(batches, CHECKED_FEEDS)], samples
    for file in sorted(folder.glob("*.onnx")) if folder is not None else ():
        feeds = generated_feeds(graphopt.load(file), 0, sets=CHECKED_FEEDS, batch=batch)
        yield file.stem, file, feeds, feeds


def written(source: Path, passes: str, backend: OnnxRuntime, samples: Any, output: Path) -> Path:
    """Return the file a pipeline makes of a model; the model itself for no pipeline."""
    if not passes:
        return source
    # Nobody waits for an engine to score what is scored here anyway.
    judge = "cpu" if backend.provider == "cpu" else f"cuda:allow_cpu=true:device_id={backend.device_id}"
    graphopt.optimize(
        source,
        passes,
        data=samples,
        metric="sqnr_db",
        target=TARGETS[backend.provider],
        backend=f"onnxruntime:provider={judge}",
        verify="off",
        output=output,
    )
    return output


def outputs(backend: OnnxRuntime, file: Path, feeds: Sequence[Feed]) -> list[Feed] | None:
    """Return what comes out of a model, or None where a backend lacks a kernel: the CPU has few of bfloat16."""
    try:
        with backend.open(file) as session:
            return [session.run(feed) for feed in feeds]
    except BackendError:
        return None


def distance(left: Sequence[Feed] | None, right: Sequence[Feed]) -> str:
    """Return the signal to noise of outputs, in decibels."""
    if left is None:
        return "–"
    comparison = Comparison()
    for one, other in zip(left, right, strict=True):
        comparison.update(one, other)
    return "equal" if comparison.equal else f"{comparison.sqnr_db:.1f}"


def rows(
    name: str, source: Path, feeds: list[Feed], samples: Any, backend: OnnxRuntime, seconds: float, work: Path
) -> Iterator[str]:
    """Yield the table rows of one model on one provider."""
    cpu = OnnxRuntime()
    with contextlib.ExitStack() as stack:
        truth = outputs(cpu, source, feeds)
        try:
            if backend.provider == "tensorrt":
                backend = replace(backend, dims=spans_of(graphopt.load(source), feeds))
            base = stack.enter_context(backend.open(source))
        except GraphoptError as error:
            yield f"| {name} | {backend.provider} | float32 | {error.message} |"
            return
        for variant, passes in VARIANTS[backend.provider].items():
            start = f"| {name} | {backend.provider} | {variant} |"
            try:
                file = written(source, passes, backend, samples, work / "out.onnx")
                here = outputs(cpu, file, feeds)
                with backend.open(file) as session:
                    there = [session.run(feed) for feed in feeds]
                    _, after = latency.measure([base, session], [feeds[0]] * 2, seconds=seconds)
                    placed = session.placement()
            except GraphoptError as error:
                yield f"{start} {error.message} |"
                continue
            elsewhere = len(placed.elsewhere) if placed is not None else "unknown"
            size = sum(path.stat().st_size for path in file.parent.glob(f"{file.name}*")) / 1e6
            yield (
                f"{start} {size:.1f} | {distance(here, there)} | {distance(truth, there)} "
                f"| {after.median:.3g} | {1 / after.ratio:.2f}× | {elsewhere} |"
            )


def machine(device: int) -> str:
    """Return what figures were taken on."""
    found = gpus()
    gpu = found[device].describe() if found and device < len(found) else "no GPU"
    numbers = tensorrt_version()
    tensorrt = ".".join(map(str, numbers)) if numbers else "not installed"
    return f"{gpu}; ONNX Runtime {onnxruntime.__version__}; TensorRT {tensorrt}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the table; return 1 if no provider that was asked for is here."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=Path, help="a folder of more models")
    parser.add_argument("--provider", nargs="+", choices=TARGETS, default=["cuda", "tensorrt"])
    parser.add_argument("--only", default="", help="only models with this in their names")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--device", type=int, default=0, help="number of the GPU")
    parser.add_argument("--seconds", type=float, default=4.0, help="to time each variant beside the original")
    options = parser.parse_args(arguments)
    backends = []
    for provider in options.provider:
        # Whatever has no kernel runs on the CPU and is counted: a table of refusals would say less.
        gpu = {} if provider == "cpu" else {"device_id": options.device, "allow_cpu": True}
        backend = OnnxRuntime(provider=provider, **gpu)
        why = backend.missing()
        if why is None:
            backends.append(backend)
        else:
            print(f"No figures: {why.message} ({why.hint}).")
    if not backends:
        return 1
    print(f"{machine(options.device)}; batch {options.batch}.\n\n{HEADER}", flush=True)
    with tempfile.TemporaryDirectory() as work:
        for name, source, feeds, samples in sources(options.models, options.batch):
            for backend in backends if options.only in name else ():
                for row in rows(name, source, feeds, samples, backend, options.seconds, Path(work)):
                    print(row, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
