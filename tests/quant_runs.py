"""Small models for the tests of quantization, and what quantizing them gives."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx import numpy_helper, parser

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.passes.lossy.quant import Quant
from graphopt.rewriter import Rewriter
from graphopt.shapes import infer_shapes
from graphopt.verify import verify

STEPS = 255  # of a grid of 8 bits
Array = np.ndarray[Any, Any]


def model_of(
    body: str, shape: str, weights: dict[str, Array], *, opset: int = 17, outputs: str = "float y"
) -> ir.Model:
    """Return a model with one float input `x`, nodes written in ONNX's text form, and named weights."""
    text = f"""<ir_version: 8, opset_import: ["" : {opset}]> g (float[{shape}] x) => ({outputs}) {{ {body} }}"""
    proto = parser.parse_model(text.replace("float y", "float[] y"))
    for output in proto.graph.output:
        output.type.tensor_type.ClearField("shape")
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    for number, node in enumerate(proto.graph.node):
        node.name = f"{node.op_type.lower()}{number}"
    model: ir.Model = ir.from_proto(proto)
    infer_shapes(model)
    return model


def random(seed: int, *shape: int, scale: float = 1.0) -> Array:
    """Return seeded normal float32 numbers."""
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@dataclasses.dataclass
class Outcome:
    """A quantized model with what it was made from."""

    model: ir.Model
    before: Array
    after: Array
    notes: list[str]

    @property
    def ops(self) -> Counter[str]:
        return Counter(node.op_type for node in walk.every_node(self.model))

    @property
    def error(self) -> float:
        """Largest error as a share of the output's span."""
        return float(np.abs(self.before - self.after).max() / max(np.ptp(self.before), 1e-30))


def run(model: ir.Model, feed: Array, *, optimize: bool = False) -> Array:
    with OnnxRuntime().open(model, threads=1, optimize=optimize) as session:
        return next(iter(session.run({"x": feed}).values()))


def quantize(model: ir.Model, samples: Array | None, target: str = "ort-cpu-x86", **options: Any) -> Outcome:
    feed = samples[:2] if samples is not None else random(9, *(int(dim) for dim in model.graph.inputs[0].shape or ()))
    before = run(model, feed)
    data = open_data({"x": samples}, model) if samples is not None else None
    ctx = Context(model, Rewriter(model), TARGETS[target], OnnxRuntime(), threads=1, data=data)
    Quant(**options).run(model, ctx)
    verify(model)
    return Outcome(model, before, run(model, feed), [note.text for note in ctx.notes])


def fused(model: ir.Model, folder: Path) -> Counter[str]:
    """Return the operators ONNX Runtime really runs."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    proto = ir.to_proto(model).SerializeToString()
    onnxruntime.InferenceSession(proto, options, providers=["CPUExecutionProvider"])
    return Counter(node.op_type for node in onnx.load(folder / "optimized.onnx").graph.node)
