"""Where the sizes come from that a shape holds while a model runs: a constant, or an axis of a tensor."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import TypeAlias

import onnx_ir as ir

from graphopt import walk
from graphopt.value_records import fact_of

from .axis_ties import Axis

# A number that is written down, an axis whose length it is, or None where it is neither.
Origin: TypeAlias = int | Axis | None

# Which input of these says of what shape the output is, axis for axis.
SHAPE_INPUT: Mapping[str, int] = MappingProxyType({"ConstantOfShape": 0, "Expand": 1, "Reshape": 1})

_MOVES_NOTHING = ("Identity", "Cast", "Squeeze", "Unsqueeze", "Reshape")


def size_origins(value: ir.Value | None) -> Sequence[Origin] | None:
    """Return the origin of each element of an integer tensor, in order, or None where even their number is unknown."""
    if value is None:
        return None
    tensor = walk.constant_tensor(value)
    if tensor is not None:
        return [int(number) for number in tensor.numpy().reshape(-1)]
    node = value.producer()
    found = _computed(node) if node is not None else None
    contents = fact_of(value).contents
    if found is None and contents is not None:
        return [None] * contents.array.size
    return found


def _computed(node: ir.Node) -> Sequence[Origin] | None:
    if walk.is_onnx_op(node, *_MOVES_NOTHING):
        return size_origins(node.inputs[0])
    if walk.is_onnx_op(node, "Shape"):
        return _of_shape(node)
    if walk.is_onnx_op(node, "Concat"):
        pieces = [size_origins(value) for value in node.inputs]
        return None if None in pieces else [origin for piece in pieces for origin in piece or ()]
    if walk.is_onnx_op(node, "Gather"):
        return _chosen(size_origins(node.inputs[0]), _numbers(node, 1))
    if walk.is_onnx_op(node, "Where"):
        return _where(node)
    if walk.is_onnx_op(node, "Slice"):
        starts, ends, steps = (_numbers(node, index) for index in (1, 2, 4))
        origins = size_origins(node.inputs[0])
        if origins is None or not starts or not ends or (steps is None and len(node.inputs) > 4):
            return None
        return origins[slice(starts[0], ends[0], steps[0] if steps else 1)]
    return None


def _of_shape(node: ir.Node) -> Sequence[Origin] | None:
    value = node.inputs[0]
    dims = fact_of(value).dims if value is not None else None
    if dims is None or value is None:
        return None
    start, end = node.attributes.get_int("start", 0), node.attributes.get_int("end", len(dims))
    return [Axis(value, axis) for axis in range(len(dims))[start:end]]


def _where(node: ir.Node) -> Sequence[Origin] | None:
    """Return the origins of what a condition that is known picks from two vectors of one length."""
    conditions, (one, other) = _numbers(node, 0), (size_origins(value) for value in node.inputs[1:3])
    if conditions is None or one is None or other is None or not len(conditions) == len(one) == len(other):
        return None
    return [a if condition else b for condition, a, b in zip(conditions, one, other, strict=True)]


def _numbers(node: ir.Node, index: int) -> tuple[int, ...] | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    contents = fact_of(value).contents if value is not None else None
    return contents.known if contents is not None else None


def _chosen(origins: Sequence[Origin] | None, places: tuple[int, ...] | None) -> Sequence[Origin] | None:
    if origins is None or places is None or any(not -len(origins) <= place < len(origins) for place in places):
        return None
    return [origins[place] for place in places]
