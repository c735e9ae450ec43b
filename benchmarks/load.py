"""Time and memory of loading and saving a large model: graphopt, onnx and onnx_ir.

Makes a Llama-like model of about 4,000 nodes and 1.2 GB of random weights inside one file, then loads and saves it in
fresh processes with a warm file cache. Memory is the peak above what the imports take.

    python benchmarks/load.py --runs 5
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

HEADS = 16
SEQUENCE = 8
MEGABYTE = 1e6

MEASURE = """
import json, sys, time
def memory(key):
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith(key))
path, out = sys.argv[1:3]
{imports}
before = memory("VmRSS")
start = time.perf_counter()
model = {load}
loaded = time.perf_counter() - start
load_peak = memory("VmHWM") - before
save_seconds = None
if {save!r} != "None":
    start = time.perf_counter()
    {save}
    save_seconds = time.perf_counter() - start
print(json.dumps([loaded, load_peak, save_seconds, memory("VmHWM") - before]))
"""

CONTENDERS = {
    "graphopt, one file": (
        "from graphopt import model_io", "model_io.load(path)", "model_io.save(model, out, external=False)",
    ),
    "graphopt, data file": (
        "from graphopt import model_io", "model_io.load(path)", "model_io.save(model, out, external=True)",
    ),
    "onnx, one file": ("import onnx", "onnx.load(path)", "onnx.save(model, out)"),
    "onnx_ir, one file": ("import onnx_ir", "onnx_ir.load(path)", "onnx_ir.save(model, out)"),
    "onnx_ir, data file": (
        "import onnx_ir", "onnx_ir.load(path)", "onnx_ir.save(model, out, external_data='out.onnx.data')",
    ),
}  # fmt: skip


class Llama:
    """A decoder stack in the operators that exporters write, shape computations included."""

    def __init__(self, layers: int, hidden: int) -> None:
        self.hidden = hidden
        self.nodes: list[Any] = []
        self.weights: list[Any] = []
        self._random = np.random.default_rng(0)
        x = "x"
        for layer in range(layers):
            x = self._layer(x, f"layers.{layer}")
        self.nodes.append(helper.make_node("Identity", [x], ["y"]))

    def proto(self) -> Any:
        """Return the model."""
        shape = ["batch", SEQUENCE, self.hidden]
        graph = helper.make_graph(
            self.nodes,
            "llama",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
            self.weights,
        )
        return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])

    def _node(self, op: str, *inputs: str, **attributes: Any) -> str:
        output = f"{op}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=f"/{output}", **attributes))
        return output

    def _constant(self, value: Any, dtype: Any = np.int64) -> str:
        return self._node("Constant", value=onnx.numpy_helper.from_array(np.array(value, dtype)))

    def _weight(self, name: str, *shape: int) -> str:
        values = self._random.standard_normal(shape, np.float32) * np.float32(0.02)
        self.weights.append(onnx.numpy_helper.from_array(values, name))
        return name

    def _layer(self, x: str, name: str) -> str:
        hidden, wide = self.hidden, self.hidden * 43 // 16
        normed = self._norm(x, f"{name}.input_norm")
        query, key, value = (
            self._to_heads(self._node("MatMul", normed, self._weight(f"{name}.{part}", hidden, hidden)))
            for part in ("q", "k", "v")
        )
        query, key = self._rotate(query), self._rotate(key)
        scores = self._node("MatMul", query, self._node("Transpose", key, perm=[0, 1, 3, 2]))
        scores = self._node("Div", scores, self._constant((hidden / HEADS) ** 0.5, np.float32))
        scores = self._node("Add", scores, self._constant(np.triu(np.full((SEQUENCE,) * 2, -1e9), 1), np.float32))
        mixed = self._node("MatMul", self._node("Softmax", scores, axis=-1), value)
        mixed = self._node("Transpose", mixed, perm=[0, 2, 1, 3])
        mixed = self._node("Reshape", mixed, self._shape_like(mixed, [hidden]))
        x = self._node("Add", x, self._node("MatMul", mixed, self._weight(f"{name}.o", hidden, hidden)))
        normed = self._norm(x, f"{name}.mlp_norm")
        gate = self._node("MatMul", normed, self._weight(f"{name}.gate", hidden, wide))
        gate = self._node("Mul", gate, self._node("Sigmoid", gate))
        up = self._node("MatMul", normed, self._weight(f"{name}.up", hidden, wide))
        down = self._node("MatMul", self._node("Mul", gate, up), self._weight(f"{name}.down", wide, hidden))
        return self._node("Add", x, down)

    def _norm(self, x: str, name: str) -> str:
        square = self._node("Pow", x, self._constant(2, np.float32))
        mean = self._node("ReduceMean", square, axes=[-1], keepdims=1)
        root = self._node("Sqrt", self._node("Add", mean, self._constant(1e-6, np.float32)))
        return self._node("Mul", self._node("Div", x, root), self._weight(f"{name}.weight", self.hidden))

    def _shape_like(self, x: str, tail: Sequence[int]) -> str:
        parts = []
        for axis in (0, 1):
            size = self._node("Gather", self._node("Shape", x), self._constant(axis))
            parts.append(self._node("Unsqueeze", size, self._constant([0])))
        return self._node("Concat", *parts, self._constant(tail), axis=0)

    def _to_heads(self, x: str) -> str:
        shape = self._shape_like(x, [HEADS, self.hidden // HEADS])
        return self._node("Transpose", self._node("Reshape", x, shape), perm=[0, 2, 1, 3])

    def _rotate(self, x: str) -> str:
        size = self.hidden // HEADS
        halves = [
            self._node("Slice", x, self._constant([low]), self._constant([high]), self._constant([-1]))
            for low, high in ((0, size // 2), (size // 2, size))
        ]
        turned = self._node("Concat", self._node("Neg", halves[1]), halves[0], axis=-1)
        angles = np.outer(np.arange(SEQUENCE), np.ones(size)) / size
        cosine = self._node("Mul", x, self._constant(np.cos(angles), np.float32))
        return self._node("Add", cosine, self._node("Mul", turned, self._constant(np.sin(angles), np.float32)))


def measure(contender: str, path: Path, folder: Path) -> list[float]:
    """Return seconds to load, peak bytes after it, seconds to save and peak bytes after that, in a new process."""
    imports, load, save = CONTENDERS[contender]
    with tempfile.TemporaryDirectory(dir=folder) as out:
        code = MEASURE.format(imports=imports, load=load, save=save)
        command = [sys.executable, "-c", code, str(path), str(Path(out) / "out.onnx")]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    figures: list[float] = json.loads(done.stdout)
    return figures


def main() -> None:
    """Make the model, measure every contender and print a Markdown table of medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5, help="runs of which the median is shown")
    parser.add_argument("--layers", type=int, default=34, help="decoder layers, 118 nodes each")
    parser.add_argument("--hidden", type=int, default=864, help="width of the model, a multiple of 32")
    parser.add_argument("--folder", type=Path, default=None, help="where to put the files; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        path = folder / "llama.onnx"
        proto = Llama(options.layers, options.hidden).proto()
        onnx.save(proto, path)
        nodes = len(proto.graph.node)
        del proto
        print(f"{nodes:,} nodes, {path.stat().st_size / MEGABYTE:,.0f} MB in one file, median of {options.runs} runs\n")
        print("| | load, s | memory after load, MB | save, s | peak memory, MB |")
        print("|---|---:|---:|---:|---:|")
        for contender in CONTENDERS:
            runs = [measure(contender, path, folder) for _ in range(options.runs)]
            load, load_peak, save, peak = (statistics.median(column) for column in zip(*runs, strict=True))
            row = f"{load:.2f} | {load_peak / MEGABYTE:,.0f} | {save:.2f} | {peak / MEGABYTE:,.0f}"
            print(f"| {contender} | {row} |", flush=True)


if __name__ == "__main__":
    main()
