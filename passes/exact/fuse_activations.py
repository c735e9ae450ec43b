"""Activations that follow each other, made one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import RewritePass
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target

_CLAMPS = ("Clip", "Relu", "Max", "Min")
_NONNEGATIVE = ("Sigmoid", "HardSigmoid", "Softmax", "Softplus", "Exp", "Sqrt", "Abs")
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
# Before these, Clip had its bounds as attributes, and took floats only.
_FIRST_OPSET_WITH_BOUNDS_AS_INPUTS, _FIRST_OPSET_WITH_CLIP_OF_ANY_DTYPE = 11, 12
# Slopes are compared up to this many elements.
_SLOPES = 4096


@dataclass(frozen=True)
class FuseActivations(RewritePass):
    """Merge Clip, Relu, Max and Min by constants; drop Relu and Abs of what is never negative; Log of Softmax."""

    name = "fuse-activations"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return a rule for each pair of operators."""
        return (
            *(Clamps(outer, inner) for outer, inner in product(_CLAMPS, _CLAMPS)),
            *(KeptSign("Relu", inner) for inner in _NONNEGATIVE),
            *(KeptSign("Abs", inner) for inner in (*_NONNEGATIVE, "Relu")),
            UniformSlope(),
        )


@dataclass(frozen=True)
class Bounds:
    """What a clamp keeps its input between; None where it has no bound."""

    low: float | None
    high: float | None

    def clamp(self, number: float) -> float:
        """Return a number clamped, the upper bound last."""
        raised = number if self.low is None else max(number, self.low)
        return raised if self.high is None else min(raised, self.high)

    def then(self, outer: Bounds) -> Bounds:
        """Return the bounds of clamping by these and then by others."""
        return Bounds(
            outer.low if self.low is None else outer.clamp(self.low),
            outer.high if self.high is None else outer.clamp(self.high),
        )


class Clamps(Rule):
    """clamp(clamp(x, a, b), c, d) = clamp(x, a', b'), a' and b' being a and b clamped by c and d.

    Clip, Relu, and Max and Min by a constant are clamps; a bound that one lacks is the other's. NaN stays NaN in all.
    """

    name = "clamps"

    def __init__(self, outer: str, inner: str) -> None:
        self._outer, self._inner = outer, inner

    def pattern(self, op: Any, x: Any, a: Any = None, b: Any = None, c: Any = None, d: Any = None) -> Any:
        return _clamp(op, self._outer, _clamp(op, self._inner, x, a, b, "inner"), c, d, "outer")

    def applies(self, m: Match) -> bool:
        by_constants = [name for name, op_type in (("a", self._inner), ("c", self._outer)) if op_type in ("Max", "Min")]
        return walk.constant_tensor(m.x) is None and all(
            walk.constant_tensor(m.values[name]) is not None for name in by_constants
        )

    def check(self, m: Match) -> Miss | None:
        for name in ("a", "b", "c", "d"):
            bound = m.values.get(name)
            if bound is None:
                continue
            tensor = walk.constant_tensor(bound)
            if tensor is None:
                return Miss("its bounds vary", m.root)
            if tensor.size != 1 or (tensor.shape and len(tensor.shape) > _rank(m.x)):
                return Miss("its bounds are no single numbers", m.root)
            if np.isnan(float(tensor.numpy().item())):
                return Miss("has NaN for a bound", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        inner = _bounds(self._inner, m.inner, m.values.get("a"), m.values.get("b"))
        outer = _bounds(self._outer, m.outer, m.values.get("c"), m.values.get("d"))
        if any(one.low is not None and one.high is not None and one.low > one.high for one in (inner, outer)):
            return Miss("its bounds are the wrong way round", m.root)
        both = inner.then(outer)
        if (
            both.low == 0
            and both.high is None
            and self._outer != "Clip" != self._inner
            and "Relu" in (self._inner, self._outer)
        ):
            return op.Relu(m.x)
        dtype = _dtype(m)
        if dtype is None:
            return Miss("its dtype is unknown", m.root)
        if "Clip" in (self._inner, self._outer):
            return _clip(op, m, both, dtype)
        if both.low is not None and both.high is not None:
            takes_floats_only = m.opset < _FIRST_OPSET_WITH_CLIP_OF_ANY_DTYPE
            if dtype is not ir.DataType.FLOAT and (takes_floats_only or dtype not in _FLOATS):
                return Miss("a Clip does not take its dtype", m.root)
            return _clip(op, m, both, dtype)
        bound = both.low if both.low is not None else both.high
        return (op.Min if both.low is None else op.Max)(m.x, _constant(op, bound, dtype, m))


class KeptSign(Rule):
    """Relu(f(x)) = f(x) and Abs(f(x)) = f(x), where f is never negative; NaN stays NaN in all."""

    def __init__(self, outer: str, inner: str) -> None:
        self.name = f"{outer.lower()}-of-nonnegative"
        self._outer, self._inner = outer, inner

    def pattern(self, op: Any, x: Any) -> Any:
        return getattr(op, self._outer)(getattr(op, self._inner)(x, _id="inner"))

    def check(self, m: Match) -> Miss | None:
        # The smallest integer is its own absolute value.
        if self._inner == "Abs" and m.x.dtype not in _FLOATS:
            return Miss("is known for floating-point numbers only", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.inner, m.x)


class UniformSlope(Rule):
    """PRelu(x, a) = LeakyRelu(x, alpha=a), where all slopes are one number."""

    name = "uniform-slope"

    def pattern(self, op: Any, x: Any, slope: Any) -> Any:
        return op.PRelu(x, slope)

    def applies(self, m: Match) -> bool:
        tensor = walk.constant_tensor(m.slope)
        return tensor is not None and tensor.dtype is ir.DataType.FLOAT and 0 < tensor.size <= _SLOPES

    def check(self, m: Match) -> Miss | None:
        slopes = m.array("slope")
        if not np.isfinite(slopes).all() or (slopes != slopes.flat[0]).any():
            return Miss("its slopes differ", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.LeakyRelu(m.x, alpha=float(m.array("slope").flat[0]))


def _clamp(op: Any, op_type: str, x: Any, first: Any, second: Any, name: str) -> Any:
    match op_type:
        case "Clip":
            return op.Clip(x, first, second, _id=name)
        case "Relu":
            return op.Relu(x, _id=name)
        case _:
            return getattr(op, op_type)(x, first, _id=name)


def _rank(value: ir.Value) -> int:
    """Return the rank of a value, 0 where it is unknown."""
    return len(value.shape) if value.shape is not None else 0


def _bounds(op_type: str, node: ir.Node, first: ir.Value | None, second: ir.Value | None) -> Bounds:
    match op_type:
        case "Relu":
            return Bounds(0, None)
        case "Max":
            return Bounds(_number(first), None)
        case "Min":
            return Bounds(None, _number(first))
    low, high = (node.attributes.get(name) for name in ("min", "max"))
    return Bounds(
        low.as_float() if low is not None else _number(first),
        high.as_float() if high is not None else _number(second),
    )


def _number(value: ir.Value | None) -> float | None:
    tensor = walk.constant_tensor(value)
    number: float | None = tensor.numpy().item() if tensor is not None else None
    return number


def _dtype(m: Match) -> ir.DataType | None:
    """Return the dtype of what is clamped, which is that of the bounds, too."""
    known = (m.x, m.inner.outputs[0], m.root.outputs[0], *(m.values.get(name) for name in ("a", "b", "c", "d")))
    return next((value.dtype for value in known if value is not None and value.dtype is not None), None)


def _clip(op: Any, m: Match, bounds: Bounds, dtype: ir.DataType) -> Any:
    if m.opset < _FIRST_OPSET_WITH_BOUNDS_AS_INPUTS:
        if dtype is ir.DataType.DOUBLE:
            return Miss("an attribute would round its bounds", m.root)
        low, high = (None if bound is None else float(bound) for bound in (bounds.low, bounds.high))
        return op.Clip(m.x, min=low, max=high)
    inputs = [None if bound is None else _constant(op, bound, dtype, m) for bound in (bounds.low, bounds.high)]
    return op.Clip(m.x, *inputs[: 2 if inputs[1] is not None else 1 if inputs[0] is not None else 0])


def _constant(op: Any, number: float | None, dtype: ir.DataType, m: Match) -> ir.Value:
    value: ir.Value = op.const(np.array(number, dtype.numpy()), f"{m.root.name or m.root.op_type}.bound")
    return value
