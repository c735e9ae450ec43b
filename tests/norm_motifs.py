"""Motifs of normalizations and softmaxes, written out of their parts, in any float type and over one axis or more."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx
from onnx import TensorProto

if TYPE_CHECKING:
    from .graph_generator import Builder, Value

FLOAT, FLOAT16, DOUBLE = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE


def written_softmax(b: Builder) -> Value:
    """Exp over its sum, with or without the largest taken off before, sometimes through Log; or Softplus of parts."""
    dtype = b.rng.choice((FLOAT, FLOAT, DOUBLE))
    x = b.tame(b.pick(dtype, where=lambda s: len(s) > 0 and isinstance(s[-1], int), fresh=("batch", 4)))
    if b.chance(0.25):
        return b.op("Log", b.op("Add", b.op("Exp", b.op("Tanh", x), bound=3.0), _number(b, x, 1), bound=4.0))
    x = b.op("Sub", x, _over(b, "ReduceMax", x, [-1], 18)) if b.chance(0.6) else b.op("Tanh", x)
    powers = b.op("Exp", x, bound=25.0)
    total = _over(b, "ReduceSum", powers, [-1], 13)
    if b.chance(0.3):
        return b.op("Sub", x, b.op("Log", total), bound=200.0)
    y = b.op("Div", powers, total) if b.chance(0.7) else b.op("Mul", powers, b.op("Reciprocal", total))
    return b.op("Neg", y, bound=1.0)


def group_norm(b: Builder) -> Value:
    """Group normalization by way of InstanceNormalization, scaled and shifted per channel, as torch exports it."""
    x = b.pick(rank=4, where=lambda s: s[1] == 4 and all(isinstance(n, int) for n in s[2:]), fresh=("batch", 4, 5, 5))
    groups = b.rng.choice((1, 2, 4))
    whole = b.ints([0, groups, -1])
    y = b.op("Reshape", x, whole, as_shape=(x.shape[0], groups, 4 // groups * x.shape[2] * x.shape[3]))
    ones, zeros = (b.const(np.full(groups, n, np.float32)) for n in (1, 0))
    y = b.op("InstanceNormalization", y, ones, zeros if b.chance(0.8) else b.weight(groups), epsilon=1e-2, bound=20.0)
    back = b.op("Shape", x) if b.chance(0.6) else b.ints([0 if isinstance(n, str) else n for n in x.shape])
    y = b.op("Reshape", y, back, as_shape=x.shape)
    shape = b.rng.choice(((4, 1, 1), (1, 4, 1, 1)))
    y = b.op("Mul", y, b.weight(*shape, between=(0.5, 1.5)), bound=30.0)
    return b.op("Add", y, b.weight(*shape), bound=31.0) if b.chance(0.8) else y


def norm_of_any_type(b: Builder) -> Value:
    """Layer or root-mean-square normalization in half, single or double precision, sometimes through a wider one."""
    dtype = b.rng.choice((FLOAT, FLOAT16, DOUBLE))
    x = b.tame(b.pick(dtype, where=lambda s: len(s) > 1 and s[-1] == 4, fresh=("batch", "seq", 4)))
    y = b.op("Cast", x, to=FLOAT) if b.chance(0.5) else x
    axes = b.rng.choice(([-1], [-1], [len(x.shape) - 1], [-2, -1]))
    if b.chance(0.5):
        y = b.op("Sub", y, _over(b, "ReduceMean", y, axes, 18), bound=2 * y.bound)
    square = b.op("Mul", y, y, bound=y.bound**2) if b.chance(0.5) else b.op("Pow", y, _number(b, y, 2), bound=4.0)
    spread = b.op("Add", _over(b, "ReduceMean", square, axes, 18), _number(b, y, 0.01))
    y = b.op("Div", y, b.op("Sqrt", spread), bound=10 * y.bound)
    y = b.op("Cast", y, to=x.dtype) if y.dtype != x.dtype and b.chance(0.8) else y
    y = b.op("Mul", y, b.weight(4, dtype=y.dtype, between=(0.5, 1.5)), bound=y.bound * 2)
    return b.op("Add", y, b.weight(4, dtype=y.dtype), bound=y.bound + 1) if b.chance(0.6) else y


# Parts


def _number(b: Builder, like: Value, number: float) -> Value:
    return b.const(np.array(number, onnx.helper.tensor_dtype_to_np_dtype(like.dtype)))


def _over(b: Builder, op: str, x: Value, axes: list[int], since: int) -> Value:
    """Add a reduction that keeps its axes, which are an input since some opset and an attribute before."""
    if b.opset >= since:
        return b.op(op, x, b.ints(axes), keepdims=1)
    return b.op(op, x, axes=[axis % len(x.shape) for axis in axes], keepdims=1)
