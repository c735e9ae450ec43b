"""Affine steps around linear operators, over every combination of operator, step, shape and attribute."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from graphopt.comparison import Comparison

from .pass_runs import loaded, outputs_of, run_passes

CASES = 400
SIZES = (1, 2, 4, 6)


@dataclass
class Draft:
    """A model in the making: nodes, constants, and the input."""

    rng: random.Random
    dtype: Any
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[TensorProto] = field(default_factory=list)

    def const(self, *shape: int, positive: bool = False) -> str:
        numbers = np.random.default_rng(self.rng.getrandbits(32)).uniform(0.5 if positive else -2, 2, shape)
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(np.asarray(numbers, self.dtype), name))
        return name

    def node(self, op_type: str, *inputs: str, **attributes: Any) -> str:
        name = f"t{len(self.nodes)}"
        self.nodes.append(helper.make_node(op_type, inputs, [name], **attributes))
        return name

    def constant_for(self, shape: list[int], axis: int) -> str:
        """Return a constant that broadcasts along the channels, or, at times, along other axes, or that adds some."""
        channel = [1] * len(shape)
        channel[axis] = shape[axis]
        trimmed = channel[len(shape) + axis :] if axis < 0 else channel[axis:]
        other = [1] * len(shape)
        other[0] = shape[0]
        choices = ([], [1], channel, trimmed, channel, trimmed, other, [1, *channel], [1] * len(shape), shape)
        return self.const(*self.rng.choice(choices), positive=True)

    def step(self, x: str, shape: list[int], axis: int) -> str:
        """Scale or shift x; the constants broadcast along its channel axis, mostly."""
        op_type = self.rng.choice(("Mul", "Div", "Add", "Sub", "Neg", "BatchNormalization", "from"))
        if op_type == "BatchNormalization" and len(shape) >= 2:
            statistics = [self.const(shape[1], positive=True) for _ in range(4)]
            return self.node("BatchNormalization", x, *statistics)
        if op_type == "Neg":
            return self.node("Neg", x)
        constant = self.constant_for(shape, axis)
        if op_type == "from":
            return self.node("Sub", constant, x)
        operands = (x, constant) if op_type in ("Div", "Sub") or self.rng.random() < 0.7 else (constant, x)
        return self.node(op_type if op_type != "BatchNormalization" else "Mul", *operands)


def draft(seed: int) -> onnx.ModelProto:
    """Return a linear operator with a step before or behind it."""
    rng = random.Random(seed)
    made = Draft(rng, rng.choice((np.float32, np.float32, np.float64, np.float16)))
    kind = rng.choice(("Conv", "ConvTranspose", "Gemm", "MatMul", "MatMul+Add"))
    batch = rng.choice((1, 2))
    if kind in ("Conv", "ConvTranspose"):
        x_shape, out, axis = convolution(made, kind, batch)
    else:
        x_shape, out, axis = product(made, kind, batch)
    x_type = helper.np_dtype_to_tensor_dtype(np.dtype(made.dtype))
    declared = [f"d{i}" if rng.random() < 0.15 else size for i, size in enumerate(x_shape)]
    graph = helper.make_graph(
        made.nodes,
        "drawn",
        [helper.make_tensor_value_info("x", x_type, declared)],
        [helper.make_tensor_value_info(out, x_type, None)],
        made.constants,
    )
    model = helper.make_model(
        graph, opset_imports=[helper.make_opsetid("", rng.choice((11, 13, 17, 20)))], ir_version=8
    )
    helper.set_model_props(model, {"shape": " ".join(map(str, x_shape))})
    return model


def convolution(made: Draft, kind: str, batch: int) -> tuple[list[int], str, int]:
    rng = made.rng
    spatial = rng.choice((1, 2))
    groups = rng.choice((1, 1, 2, 4))
    inputs, outputs = groups * rng.choice((1, 2)), groups * rng.choice((1, 2))
    shape = [batch, inputs, *([5] * spatial)]
    before = rng.random() < 0.4
    x = made.step("x", shape, 1 - len(shape) - 1 + 1) if before else "x"
    dims = (outputs, inputs // groups) if kind == "Conv" else (inputs, outputs // groups)
    weight = made.const(*dims, *([2] * spatial))
    bias = [made.const(outputs)] if rng.random() < 0.5 else []
    pads = rng.choice(({}, {"pads": [1] * (2 * spatial)}, {"auto_pad": "VALID"}, {"strides": [2] * spatial}))
    y = made.node(kind, x, weight, *bias, group=groups, **pads)
    if not before:
        y = made.step(y, [batch, outputs, *([1] * spatial)], 1 - len(shape))
    return shape, y, 1 - len(shape)


def product(made: Draft, kind: str, batch: int) -> tuple[list[int], str, int]:
    rng = made.rng
    inner, outer = rng.choice(SIZES), rng.choice(SIZES)
    shape = [batch, inner] if kind == "Gemm" else [*rng.choice(([], [batch], [batch, 3])), inner]
    before = rng.random() < 0.4
    x = made.step("x", shape, -1) if before else "x"
    if kind == "Gemm":
        attributes = {name: 1 for name in ("transB",) if rng.random() < 0.5}
        factors = {name: 0.5 for name in ("alpha", "beta") if rng.random() < 0.15}
        bias = [made.const(*rng.choice(([], [1], [outer], [1, outer], [batch, outer])))] if rng.random() < 0.7 else []
        weight = made.const(*((outer, inner) if attributes else (inner, outer)))
        y = made.node("Gemm", x, weight, *bias, **attributes, **factors)
    else:
        y = made.node("MatMul", x, made.const(*rng.choice(([], [2])), inner, outer))
        if kind == "MatMul+Add":
            y = made.node("Add", *rng.choice(((y, bias := made.const(outer)), (bias, y))))
    if not before:
        y = made.step(y, [*shape[:-1], outer], -1)
    return shape, y, -1


def test_what_is_folded_computes_the_same() -> None:
    fired: Counter[str] = Counter()
    for seed in range(CASES):
        model = draft(seed)
        dtype = helper.tensor_dtype_to_np_dtype(model.graph.input[0].type.tensor_type.elem_type)
        shape = [int(size) for size in model.metadata_props[0].value.split()]
        feed = {"x": np.random.default_rng(seed).standard_normal(shape).astype(dtype)}
        try:
            before = outputs_of(model, feed)
        except Exception as error:
            assert (
                "Fail" in type(error).__name__ or "Invalid" in type(error).__name__ or "NotImpl" in type(error).__name__
            )
            continue
        run = run_passes(loaded(model), "fuse-affine")
        comparison = Comparison()
        comparison.update(before, outputs_of(run.model, feed))
        assert comparison.within(), f"seed {seed}: {comparison.worst} {[e.rule for e in run.edits]}"
        fired.update(edit.rule for edit in run.edits)
    assert len(fired) == 20, fired
