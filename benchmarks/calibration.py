"""Calibration side by side: memory on a network of large activations, and time on real ones.

    python benchmarks/calibration.py memory [--size 880] [--images 20] [--layers 30] [--channels 16] [--ceiling 8]
    python benchmarks/calibration.py time [ASSET ...]

`memory` makes the case of https://github.com/microsoft/onnxruntime/issues/21979 (20 images of 1760×1760 took 200 GB),
by default at half the size in each direction: a network of wide convolutions, all activations of which are observed.
Each tool runs in a process of its own that may use no more than the ceiling, in GB; one that needs more fails there.

`time` calibrates classifiers of the assets folder on 64 samples. The processor's time is more telling than that of the
clock where other programs run beside.
"""

from __future__ import annotations

import argparse
import json
import logging
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
from onnxruntime.quantization.calibrate import create_calibrator
from real_models import calibration, load_scorer

import graphopt
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.calibration_cache import CalibrationCache
from graphopt.data import open_data
from graphopt.observation import observe
from graphopt.ranges import RangeMethod, read_range
from graphopt.shapes import infer_shapes

THREADS = 2
SAMPLES = 64
CLASSIFIERS = ("squeezenet", "resnet20")
TOOLS = (
    "onnxruntime run alone",
    *(f"graphopt {method}" for method in ("minmax", "p99.99", "kl", "mse")),
    *(f"onnxruntime {method}" for method in ("MinMax", "Percentile", "Entropy")),
)
GB, MB = 1 << 30, 1 << 20
Feed = dict[str, np.ndarray[Any, Any]]


def main() -> None:
    """Run what was asked for."""
    logging.disable(logging.WARNING)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("memory", "time", "tool"))
    parser.add_argument("assets", nargs="*", default=list(CLASSIFIERS))
    for name, default in (("size", 880), ("images", 20), ("layers", 30), ("channels", 16), ("ceiling", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    match options.what:
        case "memory":
            compare_memory(options)
        case "tool":
            run_tool(options.assets[0], Path(options.assets[1]), options)
        case _:
            compare_time(options.assets)


# ----------------------------------------------------------------------------------------------------------- memory


def compare_memory(options: argparse.Namespace) -> None:
    """Print what each tool takes to calibrate a network of large activations."""
    values = 2 * options.layers
    each = options.size**2 * options.channels * 4
    print(f"{options.images} images of {options.size}², {values} activations of {each / MB:.0f} MB each:", end=" ")
    print(f"{values * each / GB:.1f} GB an image, {values * each * options.images / GB:.0f} GB in all\n")
    print(f"| tool | peak memory, MB | time, s | of the processor, s |\n|{'---|' * 4}")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "wide.onnx"
        graphopt.save(wide_network(options.layers, options.channels), path)
        arguments = [f"--{name}={getattr(options, name)}" for name in ("size", "images", "ceiling")]
        for tool in TOOLS:
            done = subprocess.run(
                [sys.executable, __file__, "tool", tool, str(path), *arguments],
                capture_output=True,
                text=True,
                check=False,
            )
            lines = done.stdout.strip().splitlines()
            if done.returncode == 0:
                found = json.loads(lines[-1])
                print(f"| {tool} | {found['peak']:.0f} | {found['seconds']:.1f} | {found['cpu']:.1f} |", flush=True)
            else:
                last = (done.stderr.strip().splitlines() or [f"signal {-done.returncode}"])[-1]
                print(f"| {tool} | more than {options.ceiling * 1024}: {last[:160]} | | |", flush=True)


def wide_network(layers: int, channels: int) -> ir.Model:
    """Return convolutions and Relus at full resolution, one after the other."""
    draw = np.random.default_rng(0)
    image = ir.Value(name="image", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([None, 3, None, None]))
    nodes, weights, last, depth = [], [], image, 3
    for index in range(layers):
        array = (draw.standard_normal((channels, depth, 3, 3)) * (2 / (9 * depth)) ** 0.5).astype(np.float32)
        tensor = ir.tensor(array, name=f"w{index}")
        weight = ir.Value(
            name=f"w{index}", type=ir.TensorType(ir.DataType.FLOAT), shape=tensor.shape, const_value=tensor
        )
        conv = ir.node("Conv", [last, weight], {"pads": [1, 1, 1, 1]}, name=f"conv{index}")
        relu = ir.node("Relu", [conv.outputs[0]], name=f"relu{index}")
        nodes += [conv, relu]
        weights.append(weight)
        last, depth = relu.outputs[0], channels
        conv.outputs[0].name, last.name = f"c{index}", f"r{index}"
    last.type, last.shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([None, channels, None, None])
    graph = ir.Graph([image], [last], nodes=nodes, initializers=weights, opset_imports={"": 17}, name="wide")
    return ir.Model(graph, ir_version=8)


def run_tool(tool: str, path: Path, options: argparse.Namespace) -> None:
    """Run one tool in this process, under the ceiling, and print what it took."""
    resource.setrlimit(resource.RLIMIT_AS, (options.ceiling * GB, options.ceiling * GB))

    def images() -> Iterator[Feed]:
        draw = np.random.default_rng(1)
        for _ in range(options.images):
            yield {"image": draw.standard_normal((1, 3, options.size, options.size), dtype=np.float32)}

    name, _, method = tool.partition(" ")
    if name == "graphopt":
        calibrate: Callable[[], Any] = lambda: graphopt_ranges(graphopt.load(path), images, RangeMethod.parse(method))  # noqa: E731
    elif method == "run alone":
        calibrate = lambda: run_alone(path, images())  # noqa: E731
    else:
        calibrate = lambda: runtime_ranges(path, images(), method)  # noqa: E731
    clock, cpu = time.perf_counter(), time.process_time()
    calibrate()
    spent = {"seconds": time.perf_counter() - clock, "cpu": time.process_time() - cpu}
    print(json.dumps({"peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, **spent}))


def run_alone(path: Path, feeds: Iterator[Feed]) -> None:
    """Run the network, observing nothing."""
    session = onnxruntime.InferenceSession(str(path), session_options(), providers=["CPUExecutionProvider"])
    for feed in feeds:
        session.run(None, feed)


def session_options() -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = THREADS
    return options


def graphopt_ranges(model: ir.Model, data: Any, method: RangeMethod) -> None:
    """Read a range off each float value of a model."""
    infer_shapes(model)
    values = [value for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT]
    statistic = method.statistic()
    samples = open_data(data, model)
    observed = observe(
        model, dict.fromkeys(values, statistic), samples, OnnxRuntime(), CalibrationCache(), threads=THREADS
    )
    for value in values:
        read_range(observed[value, statistic], method)


class Reader(CalibrationDataReader):  # type: ignore[misc]
    """Feeds, one after the other."""

    def __init__(self, feeds: Iterator[Feed]) -> None:
        self._feeds = feeds

    def get_next(self) -> Feed | None:
        """Return the next feed."""
        return next(self._feeds, None)


def runtime_ranges(path: Path, feeds: Iterator[Feed], method: str) -> None:
    """Calibrate all activations with ONNX Runtime's own tool."""
    with tempfile.TemporaryDirectory() as folder:
        calibrator = create_calibrator(
            str(path),
            augmented_model_path=str(Path(folder) / "augmented.onnx"),
            calibrate_method=getattr(CalibrationMethod, method),
        )
        calibrator.collect_data(Reader(feeds))
        calibrator.compute_data()


# ------------------------------------------------------------------------------------------------------------- time


def compare_time(names: list[str]) -> None:
    """Print what it takes to calibrate and quantize classifiers."""
    scorer = load_scorer()
    print(f"| model | tool | calibration, s | of the processor, s | all, s | of the processor, s |\n|{'---|' * 6}")
    for name in names:
        samples = calibration(scorer, name, SAMPLES)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.onnx"
            source = scorer.HERE / "models" / scorer.ASSETS[name][0]
            graphopt.optimize(source, "simplify", output=path, verify="off")
            for method in ("minmax", "p99.999", "kl", "mse"):
                parts = [*time_calibration(path, samples, method), *time_graphopt(path, samples, method)]
                print(f"| {name} | graphopt {method} | {' | '.join(f'{part:.2f}' for part in parts)} |", flush=True)
            for method in ("MinMax", "Percentile", "Entropy"):
                wall, cpu = timed(lambda: quantize_with_runtime(path, samples, method))  # noqa: B023
                print(f"| {name} | onnxruntime {method} | | | {wall:.2f} | {cpu:.2f} |", flush=True)


def timed(run: Callable[[], Any]) -> tuple[float, float]:
    """Return the time of the clock and of the processor a call takes."""
    clock, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - clock, time.process_time() - cpu


def time_calibration(path: Path, samples: Feed, method: str) -> tuple[float, float]:
    return timed(lambda: graphopt_ranges(graphopt.load(path), samples, RangeMethod.parse(method)))


def time_graphopt(path: Path, samples: Feed, method: str) -> tuple[float, float]:
    """Time loading, quantizing as the peer rounds, and saving; with data given, both are scored and timed."""
    pipeline, output = f"quant:mode=static:solver=rtn:ranges={method}", path.with_name("quantized.onnx")
    return timed(lambda: graphopt.optimize(path, pipeline, data=samples, output=output, verify="off", threads=THREADS))


def quantize_with_runtime(path: Path, samples: Feed, method: str) -> None:
    """Quantize as ONNX Runtime's own tool does, sample by sample."""
    feeds = ({name: array[i : i + 1] for name, array in samples.items()} for i in range(SAMPLES))
    quantize_static(
        str(path),
        str(path.with_name("peer.onnx")),
        Reader(feeds),
        activation_type=QuantType.QUInt8,
        weight_type=QuantType.QInt8,
        per_channel=True,
        calibrate_method=getattr(CalibrationMethod, method),
    )


if __name__ == "__main__":
    main()
