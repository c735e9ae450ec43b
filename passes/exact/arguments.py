"""Arguments of operators that are known: axes, sizes and indices, attribute or input as the opset has it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk

REDUCTIONS = (
    "ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd",
    "ReduceSum", "ReduceSumSquare",
)  # fmt: skip
# Axes, sizes and indices are few; a larger constant is data, and is not read.
LARGEST_ARGUMENT = 4096
# Slices end here, or beyond, to say "at the end".
AT_THE_END = 2**31 - 1


def integers(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return what a small constant of integers holds, flattened, or None."""
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.size > LARGEST_ARGUMENT or tensor.dtype not in (ir.DataType.INT64, ir.DataType.INT32):
        return None
    return tuple(int(number) for number in tensor.numpy().reshape(-1))


def optional_input(node: ir.Node, index: int) -> ir.Value | None:
    """Return an input, or None where it is left out."""
    return node.inputs[index] if index < len(node.inputs) else None


def has_axes(node: ir.Node) -> bool:
    """Return whether an operator over axes, given second or as an attribute, is told which."""
    return "axes" in node.attributes or optional_input(node, 1) is not None


def axes_of(node: ir.Node, rank: int | None) -> tuple[int, ...] | None:
    """Return the axes an operator is told, second or as an attribute, as numbers from 0 up; None if unknown.

    Args:
        node: Squeeze, Unsqueeze or a reduction.
        rank: How many axes they count over; where unknown, negative axes are unknown too.
    """
    if "axes" in node.attributes:
        return counted(node.attributes["axes"].as_ints(), rank)
    given = integers(optional_input(node, 1))
    return counted(given, rank) if given is not None else None


def counted(axes: Iterable[int], rank: int | None) -> tuple[int, ...] | None:
    """Return axes as numbers from 0 up, or None where one is negative and the rank unknown, or out of range."""
    axes = tuple(axes)
    if rank is None:
        return axes if all(axis >= 0 for axis in axes) else None
    if not all(-rank <= axis < rank for axis in axes):
        return None
    return tuple(axis % rank for axis in axes)


def rank_of(value: ir.Value | None) -> int | None:
    """Return how many axes a value has, or None."""
    dims = shapes.dims_of(value)
    return len(dims) if dims is not None else None


def size_of(value: ir.Value | None, axis: int) -> int | None:
    """Return the size of an axis, or None where it varies or there is no such axis."""
    dims = shapes.dims_of(value)
    if dims is None or not -len(dims) <= axis < len(dims):
        return None
    size = dims[axis]
    return size if isinstance(size, int) else None


def over_axes(op: Any, op_type: str, x: ir.Value, axes: Sequence[int], like: ir.Node) -> ir.Value:
    """Return a Squeeze or Unsqueeze, its axes given as another of these gives them.

    Args:
        op: The builder of a replacement.
        op_type: Squeeze or Unsqueeze.
        x: Its input.
        axes: The axes.
        like: One whose axes are an attribute (before opset 13) or an input.
    """
    build = getattr(op, op_type)
    if "axes" in like.attributes:
        value: ir.Value = build(x, axes=list(axes))
    else:
        value = build(x, op.const(np.array(axes, np.int64), f"{like.name or op_type.lower()}_axes"))
    return value
