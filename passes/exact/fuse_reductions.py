"""Reductions together with the Squeeze, Flatten or Reshape behind them, and means over images as pooling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import RewritePass
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target

from .arguments import REDUCTIONS

_POOL = "GlobalAveragePool"
# How far above a mean its Conv may be, and what may lie between.
_STEPS_UP = 4
_ELEMENTWISE = ("Relu", "Clip", "LeakyRelu", "Sigmoid", "HardSwish", "HardSigmoid", "Mul", "Add", "BatchNormalization")
_RESHAPING = ("Squeeze", "Flatten", "Reshape")


@dataclass(frozen=True)
class FuseReductions(RewritePass):
    """Let a reduction drop its axes itself; make a mean over an image a GlobalAveragePool where the target gains."""

    name = "fuse-reductions"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return the rules for each reduction; pooling only for a target that is fast at it."""
        dropping = (
            *(ReduceSqueeze(op_type) for op_type in REDUCTIONS),
            *(ReduceFlatten(op_type, shaper) for op_type in REDUCTIONS for shaper in ("Flatten", "Reshape")),
        )
        return (*dropping, MeanAsPool()) if _POOL in target.fast_ops else dropping


class ReduceSqueeze(Rule):
    """Squeeze(Reduce(x, axes, keepdims=1), axes) = Reduce(x, axes, keepdims=0)."""

    name = "reduce-squeeze"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any, axes: Any = None, squeezed: Any = None) -> Any:
        return op.Squeeze(getattr(op, self._op_type)(x, axes, _id="reduce", keepdims=1), squeezed)

    def check(self, m: Match) -> Miss | None:
        if not m.all_constant("axes", "squeezed"):
            return Miss("its axes vary", m.root)
        reduced, dropped = _axes(m.reduce, m.axes), _axes(m.root, m.squeezed)
        if not reduced or not dropped:
            return Miss("its axes are not said", m.root)
        rank = len(m.x.shape) if m.x.shape is not None else None
        if any(axis < 0 for axis in (*reduced, *dropped)) and rank is None:
            return Miss("counts axes from the end of an unknown rank", m.root)
        if _normal(reduced, rank) != _normal(dropped, rank):
            return Miss("drops other axes than those reduced", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return _dropping(op, m)


class ReduceFlatten(Rule):
    """Flatten(Reduce(x, axes, keepdims=1)) = Reduce(x, axes, keepdims=0), where two axes are left; so for Reshape."""

    name = "reduce-flatten"

    def __init__(self, op_type: str, shaper: str) -> None:
        self._op_type, self._shaper = op_type, shaper

    def pattern(self, op: Any, x: Any, axes: Any = None, shape: Any = None) -> Any:
        reduced = getattr(op, self._op_type)(x, axes, _id="reduce", keepdims=1)
        return op.Flatten(reduced, axis=1) if self._shaper == "Flatten" else op.Reshape(reduced, shape)

    def applies(self, m: Match) -> bool:
        if self._shaper == "Flatten":
            return True
        return m.all_constant("shape") and not (m.root.attributes.get_int("allowzero", 0) and 0 in m.array("shape"))

    def check(self, m: Match) -> Miss | None:
        if not m.all_constant("axes"):
            return Miss("its axes vary", m.root)
        reduced = _axes(m.reduce, m.axes)
        if not reduced or m.x.shape is None:
            return Miss("its axes are not said, or of an unknown rank", m.root)
        gone = _normal(reduced, len(m.x.shape))
        left = [axis for axis in range(len(m.x.shape)) if axis not in gone]
        if len(left) != 2 or left[0] != 0:
            return Miss("leaves other axes than the first and one more", m.root)
        if self._shaper == "Reshape" and not _says(m.array("shape").tolist(), m.x.shape[0], m.x.shape[left[1]]):
            return Miss("may reshape what is left", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return _dropping(op, m)


class MeanAsPool(Rule):
    """ReduceMean(x, axes=2, 3, ..., keepdims=1) = GlobalAveragePool(x).

    Behind a Conv, whose layout a runtime may keep for pooling but not for a mean.
    """

    name = "mean-as-pool"

    def pattern(self, op: Any, x: Any, axes: Any = None) -> Any:
        return op.ReduceMean(x, axes, keepdims=1)

    def applies(self, m: Match) -> bool:
        return _comes_from_a_conv(m.x)

    def check(self, m: Match) -> Miss | None:
        if m.x.dtype is not ir.DataType.FLOAT or m.x.shape is None or not m.all_constant("axes"):
            return Miss("its dtype, rank or axes are unknown, or not those of an image", m.root)
        rank = len(m.x.shape)
        if rank < 3 or _normal(_axes(m.root, m.axes), rank) != set(range(2, rank)):
            return Miss("is no mean over the whole image", m.root)
        if any(walk.is_onnx_op(use.node, *_RESHAPING) for use in m.root.outputs[0].uses()):
            return Miss("may drop its axes itself", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.GlobalAveragePool(m.x)


def _dropping(op: Any, m: Match) -> Any:
    """Return the reduction with keepdims=0."""
    inputs = [m.x, *([m.axes] if m.axes is not None else [])]
    attributes = {**m.reduce.attributes, "keepdims": 0}
    return getattr(op, m.reduce.op_type)(*inputs, _name=m.reduce.name, **attributes)


def _axes(node: ir.Node, given: ir.Value | None) -> list[int]:
    """Return the axes of a node, an attribute or an input; empty where it has none."""
    tensor = walk.constant_tensor(given)
    if tensor is not None:
        return [int(axis) for axis in tensor.numpy().reshape(-1)]
    return list(node.attributes.get_ints("axes", ()))


def _normal(axes: Sequence[int], rank: int | None) -> set[int]:
    return {axis + rank if axis < 0 and rank is not None else axis for axis in axes}


def _says(shape: Sequence[int], first: Any, second: Any) -> bool:
    """Return whether a Reshape to a shape leaves two dimensions as they are; known ones are not 0."""
    if len(shape) != 2:
        return False
    is_first = shape[0] == 0 or (isinstance(first, int) and 0 < first == shape[0])
    is_second = isinstance(second, int) and 0 < second == shape[1]
    # A -1 is what the other dimension leaves.
    return (is_first or shape[0] == -1) and (is_second or shape[1] == -1) and (is_first or is_second)


def _comes_from_a_conv(value: ir.Value) -> bool:
    for _ in range(_STEPS_UP):
        producer = value.producer()
        if producer is None:
            return False
        if walk.is_onnx_op(producer, "Conv"):
            return True
        varying = [one for one in producer.inputs if one is not None and walk.constant_tensor(one) is None]
        if not walk.is_onnx_op(producer, *_ELEMENTWISE) or not varying:
            return False
        value = varying[0]
    return False
