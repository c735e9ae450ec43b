"""How often the static prediction of `explain` agrees with what ONNX Runtime ran.

    python benchmarks/explain.py [ASSET ...]

Each model of the assets is quantized in many ways: by graphopt, by ONNX Runtime's own tools, and with Q and DQ put
anywhere. Every operator that is quantized, or is a convolution or a product, counts once. What the runtime folded away
counts in neither column. Prints a Markdown table and each disagreement.
"""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_dynamic, quantize_static
from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer
from onnxruntime.quantization.shape_inference import quant_pre_process
from real_models import SHARED, calibration, load_scorer
from scattered import scatter

import graphopt
from graphopt.explaining.explanation import Explanation, explain

SAMPLES = 4
BLOCK = 32
PER_CHANNEL_OPSET = 13
SEEDS = 4
TARGET = "ort-cpu-x86"
Arrays = dict[str, np.ndarray[Any, Any]]


@dataclass
class Model:
    """A float model to quantize.

    Attributes:
        name: Of the asset.
        path: Its file.
        feeds: Calibration samples.
    """

    name: str
    path: Path
    feeds: Arrays
    prepared: dict[Path, Path] = field(default_factory=dict)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Calibration samples for ONNX Runtime's quantizer, one at a time."""

    def __init__(self, feeds: Arrays, whole: bool) -> None:
        count = len(next(iter(feeds.values())))
        feed = [
            {key: np.asarray(x[at]) if whole else x[at : at + 1] for key, x in feeds.items()} for at in range(count)
        ]
        self._feeds = iter(feed)

    def get_next(self) -> Arrays | None:
        """Return the next sample, or None at the end."""
        return next(self._feeds, None)


def per_channel_source(model: Model, folder: Path) -> Path:
    """Return the model in an operator set that has scales per channel: ONNX Runtime's tool does not see to that."""
    if graphopt.load(model.path).opset_imports[""] >= PER_CHANNEL_OPSET:
        return model.path
    newer = folder / "newer.onnx"
    graphopt.optimize(model.path, f"opset:to={PER_CHANNEL_OPSET}", output=newer, verify="off")
    return newer


def by_graphopt(spec: str) -> Callable[[Model, Path], None]:
    """Return a quantizer by a pipeline of graphopt."""

    def make(model: Model, output: Path) -> None:
        graphopt.optimize(
            model.path, spec, output=output, data=model.feeds, evaluation=model.feeds, verify="off", target=TARGET
        )

    return make


def by_runtime(
    activation: QuantType,
    weight: QuantType,
    layout: QuantFormat = QuantFormat.QDQ,
    per_channel: bool = True,
    **options: Any,
) -> Callable[[Model, Path], None]:
    """Return ONNX Runtime's static quantizer with its options."""

    def make(model: Model, output: Path) -> None:
        prepared = output.with_name("prepared.onnx")
        if not prepared.exists():
            source = per_channel_source(model, output.parent)
            try:
                quant_pre_process(str(source), str(prepared))
            except Exception:  # its symbolic shape inference fails on some models; its own advice is to skip it
                quant_pre_process(str(source), str(prepared), skip_symbolic_shape=True)
        quantize_static(
            str(prepared),
            str(output),
            Reader(model.feeds, model.name == "silero_vad"),
            quant_format=layout,
            per_channel=per_channel,
            activation_type=activation,
            weight_type=weight,
            extra_options=options,
        )

    return make


def dynamically(weight: QuantType, per_channel: bool) -> Callable[[Model, Path], None]:
    """Return ONNX Runtime's dynamic quantizer."""
    return lambda model, output: quantize_dynamic(
        str(model.path), str(output), weight_type=weight, per_channel=per_channel
    )


def anywhere(seed: int) -> Callable[[Model, Path], None]:
    """Return what puts Q and DQ anywhere."""

    def make(model: Model, output: Path) -> None:
        simple = output.with_name("simple.onnx")
        if not simple.exists():
            graphopt.optimize(model.path, "simplify", output=simple, verify="off")
        scatter(simple, output, seed)

    return make


def in_few_bits(layout: QuantFormat, bits: int) -> Callable[[Model, Path], None]:
    """Return ONNX Runtime's weight-only quantizer."""

    def make(model: Model, output: Path) -> None:
        quantizer = MatMulNBitsQuantizer(
            onnx.load(model.path), bits=bits, block_size=BLOCK, is_symmetric=True, quant_format=layout
        )
        quantizer.process()
        quantizer.model.save_model_to_file(str(output))

    return make


U8, S8, U16 = QuantType.QUInt8, QuantType.QInt8, QuantType.QUInt16
VARIANTS: dict[str, Callable[[Model, Path], None]] = {
    "graphopt static": by_graphopt("simplify,quant:mode=static"),
    "graphopt static, not simplified": by_graphopt("quant:mode=static"),
    "graphopt dynamic": by_graphopt("simplify,quant:mode=dynamic"),
    "graphopt weights": by_graphopt("simplify,quant:mode=weights"),
    "graphopt float": by_graphopt("simplify"),
    "ORT U8S8": by_runtime(U8, S8),
    "ORT S8S8": by_runtime(S8, S8),
    "ORT S8S8 symmetric": by_runtime(S8, S8, ActivationSymmetric=True),
    "ORT U8U8 per tensor": by_runtime(U8, U8, per_channel=False),
    "ORT U16S8": by_runtime(U16, S8, UseQDQContribOps=True),
    "ORT U8S8, float bias": by_runtime(U8, S8, QuantizeBias=False),
    "ORT U8S8, DQ apart": by_runtime(U8, S8, DedicatedQDQPair=True),
    "ORT U8S8, weights as float with Q": by_runtime(U8, S8, AddQDQPairToWeight=True),
    "ORT U8S8, outputs float": by_runtime(U8, S8, OpTypesToExcludeOutputQuantization=["Conv", "MatMul", "Gemm"]),
    "ORT QOperator U8S8": by_runtime(U8, S8, QuantFormat.QOperator),
    "ORT QOperator S8S8": by_runtime(S8, S8, QuantFormat.QOperator),
    "ORT dynamic S8": dynamically(S8, True),
    "ORT dynamic U8": dynamically(U8, False),
    "ORT MatMulNBits, QDQ": in_few_bits(QuantFormat.QDQ, 4),
    "ORT MatMulNBits": in_few_bits(QuantFormat.QOperator, 4),
    "ORT MatMulNBits 8": in_few_bits(QuantFormat.QOperator, 8),
    **{f"anywhere, seed {seed}": anywhere(seed) for seed in range(SEEDS)},
}


def main(names: list[str]) -> None:
    """Print the table of agreement, and what disagrees."""
    logging.disable(logging.ERROR)
    scorer = load_scorer()
    files = {path.stem: path for path in sorted((SHARED / "assets" / "models").glob("*.onnx"), key=_size)}
    assets = {entry[0].removesuffix(".onnx"): name for name, entry in scorer.ASSETS.items()}
    print("| model | quantized | operators | in integers | as predicted | same kernel | folded |")
    print("|---|---|---|---|---|---|---|")
    total: Counter[str] = Counter()
    random: Counter[str] = Counter()
    wrong: list[str] = []
    for stem, path in files.items():
        name = assets.get(stem, stem)
        if names and name not in names:
            continue
        model = Model(name, path, calibration(scorer, name, SAMPLES))
        with tempfile.TemporaryDirectory() as folder:
            for label, found in explanations(model, Path(folder)):
                if isinstance(found, str):
                    print(f"| {name} | {label} | {found} | | | | |", flush=True)
                    continue
                counts = count(found)
                if label.startswith("anywhere"):
                    random += counts
                else:
                    total += counts
                wrong += [f"{name}, {label}: {text}" for text in disagreements(found)]
                print(f"| {name} | {label} | {cells(counts)} |", flush=True)
    print(f"| all | by tools | {cells(total)} |")
    print(f"| all | anywhere | {cells(random)} |")
    for line in wrong:
        print(f"* {line}")


def _size(path: Path) -> int:
    return path.stat().st_size


def explanations(model: Model, folder: Path) -> Iterator[tuple[str, Explanation | str]]:
    """Yield what becomes of a model by the way it was quantized, or why it could not be."""
    for label, make in VARIANTS.items():
        output = folder / f"{len(list(folder.iterdir()))}.onnx"
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                make(model, output)
        except Exception as error:  # a tool that does not do this model
            yield label, f"not made: {' '.join(str(error).split())[:80]}"
            continue
        found = explain(output, target=TARGET, data=model.feeds, runs=1, threads=2)
        yield label, found if found.proven_by is not None else f"not run: {found.unproven[:110]}"


def count(found: Explanation) -> Counter[str]:
    """Count operators by what was predicted of them and what ran."""
    judged = [one for one in found.findings if one.agrees is not None]
    right = [one for one in judged if one.agrees]
    kernels = [one for one in right if one.in_integers and one.state == one.predicted]
    return Counter(
        operators=len(judged),
        integers=sum(one.in_integers for one in judged),
        right=len(right),
        kernels=sum(one.kernel.removeprefix("Nhwc") == one.predicted_kernel for one in kernels),
        inside=len(kernels),
        folded=len(found.findings) - len(judged),
    )


def cells(counts: Counter[str]) -> str:
    """Return the cells of a row."""
    share = f"{counts['right'] / counts['operators']:.2%}" if counts["operators"] else "–"
    kernels = f"{counts['kernels'] / counts['inside']:.2%}" if counts["inside"] else "–"
    right = f"{counts['right']} ({share})"
    return f"{counts['operators']} | {counts['integers']} | {right} | {kernels} | {counts['folded']}"


def disagreements(found: Explanation) -> list[str]:
    """Return each operator that did not run as predicted."""
    return [
        f"{one.op} `{one.node}`: predicted {one.predicted} ({one.predicted_kernel}), ran in {one.state} ({one.kernel})"
        for one in found.findings
        if one.agrees is False
    ]


if __name__ == "__main__":
    main(sys.argv[1:])
