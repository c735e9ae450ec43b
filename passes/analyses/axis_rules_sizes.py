"""Rules of the channel analysis for operators that read sizes, or make tensors of sizes they read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

import onnx_ir as ir

from graphopt import walk

from .axis_rules_views import tie_to_origins
from .axis_ties import Axis, AxisRule, Emit, NodeAxes
from .size_origins import SHAPE_INPUT, size_origins

# What hands sizes on, as `size_origins` follows them: by which inputs.
_HANDS_ON = ("Cast", "Concat", "Gather", "Identity", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Where")


def shape(node: NodeAxes, emit: Emit) -> None:
    """What reads the size of an axis holds it, unless it makes another axis of that size."""
    value = node.value()
    for read in _read_otherwise(node.node.outputs[0]):
        origins = size_origins(read)
        for axis in range(len(node.sizes_in(0))):
            if origins is None or None in origins or Axis(value, axis) in origins:
                emit.freeze(Axis(value, axis), "its size is read by Shape")


def _read_otherwise(sizes: ir.Value) -> Iterator[ir.Value]:
    """Yield a vector of sizes, and what is made of it, where it is read for more than the shape of a tensor."""
    frontier, seen = [sizes], {sizes}
    while frontier:
        value = frontier.pop()
        if value.is_graph_output():
            yield value
        for use in value.uses():
            if walk.is_onnx_op(use.node, *SHAPE_INPUT) and SHAPE_INPUT[use.node.op_type] == use.idx:
                continue  # its own rule ties the axes
            if walk.is_onnx_op(use.node, *_HANDS_ON) and (use.idx == 0 or use.node.op_type in ("Concat", "Where")):
                made = use.node.outputs[0]
                if made not in seen:
                    seen.add(made)
                    frontier.append(made)
            else:
                yield value


def size(node: NodeAxes, emit: Emit) -> None:
    """The number of elements."""
    emit.freeze_value(node.value(), "how many elements it has is read by Size")


def made(node: NodeAxes, emit: Emit) -> None:
    """A tensor as large as a shape says: it shrinks with what that is read off, and freely where it is a constant."""
    tie_to_origins(node.node.outputs[0], node.node.inputs[0], emit)


def counted(node: NodeAxes, emit: Emit) -> None:
    """What depends on the number of each element."""
    for value in (*node.node.inputs, *node.node.outputs):
        emit.freeze_value(value, f"{node.node.op_type} counts its elements")


SIZE_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        ("", "Shape"): shape,
        ("", "Size"): size,
        ("", "ConstantOfShape"): made,
        **{("", name): counted for name in ("Range", "NonZero", "OneHot", "EyeLike", "Unique", "Compress")},
    }
)
