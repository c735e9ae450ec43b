"""Small models of one input, before and after a pass, on random and on extreme numbers."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.capi.onnxruntime_pybind11_state import (
    Fail,
    InvalidArgument,
    InvalidGraph,
    NotImplemented,
    RuntimeException,
)

from graphopt.comparison import Comparison

from .pass_runs import loaded, outputs_of, run_passes


@dataclass
class Draft:
    """A model in the making: nodes and constants, drawn from a seed.

    Attributes:
        seed: The seed.
        dtype: Dtype of the input and, where nothing else is said, of constants.
        opset: Version of the operators.
    """

    seed: int
    dtype: Any = np.float32
    opset: int = 17
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)
    rng: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def const(self, content: Any, dtype: Any = None) -> str:
        """Add a constant."""
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(content, dtype or self.dtype), name))
        return name

    def drawn(self, shape: Sequence[int], low: float = -2, high: float = 2) -> str:
        """Add a constant of random numbers."""
        return self.const(np.random.default_rng(self.rng.getrandbits(32)).uniform(low, high, shape))

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        """Add a node and return its output."""
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def model(self, output: str, shape: Sequence[int | str]) -> onnx.ModelProto:
        """Return the model of input `x` and one output."""
        dtype = helper.np_dtype_to_tensor_dtype(np.dtype(self.dtype))
        graph = helper.make_graph(
            self.nodes,
            "drawn",
            [helper.make_tensor_value_info("x", dtype, shape)],
            [helper.make_tensor_value_info(output, dtype, None)],
            self.constants,
        )
        imports = [helper.make_opsetid("", self.opset)]
        return onnx.shape_inference.infer_shapes(helper.make_model(graph, opset_imports=imports, ir_version=8))


def fired(spec: str, model: onnx.ModelProto, feeds: Sequence[np.ndarray]) -> Counter[str]:
    """Return the rules that fire on a model, having compared what comes out; none where the runtime refuses it."""
    try:
        expected = [outputs_of(model, {"x": feed}) for feed in feeds]
    except (Fail, InvalidArgument, InvalidGraph, NotImplemented, RuntimeException):
        return Counter()
    run = run_passes(loaded(model), spec)
    rules = [edit.rule for edit in run.edits]
    for before, feed in zip(expected, feeds, strict=True):
        comparison = Comparison()
        comparison.update(before, outputs_of(run.model, {"x": feed}))
        assert comparison.within(), f"{comparison.worst} by {rules}:\n{onnx.printer.to_text(model)}"
    return Counter(rules)


def feeds_of(shape: Sequence[int], dtype: Any, seed: int = 0) -> list[np.ndarray]:
    """Return random numbers, then, of floats, some with zeros, infinities and NaN among them."""
    feed = (np.random.default_rng(seed).standard_normal(shape) * 3).astype(dtype)
    if np.dtype(dtype).kind != "f":
        return [feed]
    odd = feed.reshape(-1).copy()
    every_third = odd[::3]
    every_third[:] = np.resize([np.nan, np.inf, 0, -np.inf, -0.0], every_third.shape)
    return [feed, odd.reshape(shape)]
