"""How the time and memory of `simplify` grow with the graph: stacked layers, a thousand nodes to a hundred thousand.

    python benchmarks/growth.py [--nodes 1000 3000 10000] [--passes simplify] [--profile 10000]

A transformer's decoder layers (see `load.py`) and a ResNet's blocks, with small weights, so that the graph is what
grows. Each model is optimized in a fresh process, which checks the structure and runs nothing. Prints a Markdown table
and, of each stack, the exponent: the slope of a straight line through log time against log nodes, by least squares,
and the slope between the last two sizes, where fixed costs no longer flatter it. Fitted is the time on the processor,
which does not hang on what else the machine does. `--profile` prints where the time
goes at one size instead.
"""

from __future__ import annotations

import argparse
import cProfile
import json
import pstats
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from load import Llama
from onnx import TensorProto, helper

import graphopt

NODES = (1_000, 3_000, 10_000, 30_000, 100_000)
HIDDEN = 32
CHANNELS = 8
SIDE = 8
MEGABYTE = 1e6
PROFILE_LINES = 40

PROCESS = """
import json, sys, time
import graphopt
optimize = graphopt.optimize
path, out, passes = sys.argv[1:4]
start, busy = time.perf_counter(), time.process_time()
optimize(path, passes, output=out, verify="structure")
seconds, busy = time.perf_counter() - start, time.process_time() - busy
with open("/proc/self/status") as status:
    peak = next(int(line.split()[1]) * 1024 for line in status if line.startswith("VmHWM"))
print("\\n" + json.dumps([seconds, busy, peak]))
"""


def transformer(nodes: int) -> onnx.ModelProto:
    """Return decoder layers of about so many nodes in all."""
    one, two = (len(Llama(layers, HIDDEN).nodes) for layers in (1, 2))
    model: onnx.ModelProto = Llama(max(1, round(nodes / (two - one))), HIDDEN).proto()
    return model


def convolutional(nodes: int) -> onnx.ModelProto:
    """Return residual blocks of about so many nodes in all: twice Conv, BatchNormalization and Relu, and an Add."""
    random = np.random.default_rng(0)
    steps: list[onnx.NodeProto] = []
    weights: list[TensorProto] = []

    def weight(name: str, low: float, *shape: int) -> str:
        weights.append(onnx.numpy_helper.from_array(random.uniform(low, 1, shape).astype(np.float32), name))
        return name

    def node(op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op}_{len(steps)}"
        steps.append(helper.make_node(op, list(inputs), [output], name=f"/{output}", **attributes))
        return output

    x = "x"
    for block in range(max(1, nodes // 7)):
        y = x
        for place in range(2):
            name = f"blocks.{block}.{place}"
            y = node("Conv", y, weight(f"{name}.w", -1, CHANNELS, CHANNELS, 3, 3), pads=[1] * 4)
            y = node("BatchNormalization", y, *(weight(f"{name}.{one}", 0.1, CHANNELS) for one in ("s", "b", "m", "v")))
            y = node("Relu", y) if place == 0 else y
        x = node("Relu", node("Add", x, y))
    node("Identity", x)
    shape = ["batch", CHANNELS, SIDE, SIDE]
    infos = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x", steps[-1].output[0])]
    graph = helper.make_graph(steps, "resnet", infos[:1], infos[1:], weights)
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


STACKS: dict[str, Callable[[int], onnx.ModelProto]] = {"transformer": transformer, "convolutional": convolutional}


def main() -> None:
    """Print the table, or a profile."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nodes", type=int, nargs="+", default=list(NODES))
    parser.add_argument("--passes", default="simplify")
    parser.add_argument("--stacks", nargs="+", choices=STACKS, default=list(STACKS))
    parser.add_argument("--profile", type=int, metavar="NODES", help="print where the time goes at this size")
    parser.add_argument("--limit", type=float, default=600.0, help="seconds after which a process is ended")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.profile:
            for stack in options.stacks:
                profile(stack, options.profile, options.passes, Path(name))
            return
        print(
            "| stack | nodes | left | seconds | on the processor | peak, MB | exponent |\n" + "|---|" + "---:|" * 6,
            flush=True,
        )
        for stack in options.stacks:
            table(stack, options, Path(name))


def table(stack: str, options: argparse.Namespace, folder: Path) -> None:
    """Measure one stack at every size and print its rows, the exponent in the last."""
    points: list[tuple[int, float]] = []
    for wanted in options.nodes:
        path = folder / "model.onnx"
        model = STACKS[stack](wanted)
        nodes = len(model.graph.node)
        onnx.save(model, path)
        del model
        try:
            seconds, busy, peak, left = measure(path, options.passes, options.limit)
        except subprocess.TimeoutExpired:
            print(f"| {stack} | {nodes:,} | | more than {options.limit:.0f} | | | |", flush=True)
            break
        points.append((nodes, busy))
        slope = f"{exponent(points[-2:]):.2f} since the last" if len(points) > 1 else ""
        times = f"{seconds:.2f} | {busy:.2f}"
        print(f"| {stack} | {nodes:,} | {left:,} | {times} | {peak / MEGABYTE:,.0f} | {slope} |", flush=True)
    if len(points) > 1:
        print(f"| {stack} | all | | | | | **{exponent(points):.2f}** |", flush=True)


def measure(path: Path, passes: str, limit: float) -> tuple[float, float, int, int]:
    """Return seconds after import, those on the processor, peak resident bytes and nodes left, in a new process."""
    out = path.with_name("out.onnx")
    command = [sys.executable, "-c", PROCESS, str(path), str(out), passes]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=limit)
    seconds, busy, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, busy, peak, len(onnx.load(out, load_external_data=False).graph.node)


def exponent(points: Sequence[tuple[int, float]]) -> float:
    """Return the slope of log seconds over log nodes."""
    nodes, seconds = np.log(np.array(points)).T
    return float(np.polyfit(nodes, seconds, 1)[0])


def profile(stack: str, nodes: int, passes: str, folder: Path) -> None:
    """Print the functions in which a run spends most of its time."""
    path = folder / "model.onnx"
    onnx.save(STACKS[stack](nodes), path)
    optimize = graphopt.optimize
    print(f"\n{stack}, {nodes:,} nodes: by own time, then with what it calls\n", flush=True)
    with cProfile.Profile() as profiler:
        optimize(path, passes, output=folder / "out.onnx", verify="structure")
    statistics = pstats.Stats(profiler, stream=sys.stdout).strip_dirs()
    for key in ("tottime", "cumulative"):
        statistics.sort_stats(key).print_stats(PROFILE_LINES)


if __name__ == "__main__":
    main()
