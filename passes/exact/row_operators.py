"""Operators that treat each row by itself: what they are to a matrix of all rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.backend import Array
from graphopt.shape_rules.shape_facts import Dims

from .arguments import REDUCTIONS, axes_of, counted, has_axes, integers, optional_input, rank_of
from .renamed_axes import ALONG_AN_AXIS, BROADCASTING, SOFTMAX_ALONG_ONE_AXIS_SINCE, UNARY

_MATRIX = 2
_NORMALIZATIONS = ("LayerNormalization", "RMSNormalization")


@dataclass(frozen=True)
class RowWise:
    """How an operator does the same to a matrix.

    Attributes:
        rows: Indices of the inputs that become matrices; the others stay.
        attributes: Attributes that change.
        constants: Inputs that change, by index.
    """

    rows: Sequence[int]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[int, Array] = field(default_factory=dict)


def leading(value: ir.Value | None) -> Dims | None:
    """Return all sizes but the last, if a constant can tell these as well as the last; None otherwise."""
    dims = shapes.dims_of(value)
    if dims is None or len(dims) <= _MATRIX or not told(dims) or not isinstance(dims[-1], int):
        return None
    return dims[:-1]


def told(dims: Dims) -> list[int] | None:
    """Return sizes as a Reshape is told them: one that is not known is computed; None if more are, or one may be 0."""
    unknown = [size for size in dims if not isinstance(size, int)]
    if len(unknown) > 1 or 0 in dims:
        return None
    return [size if isinstance(size, int) else -1 for size in dims]


def row_wise(node: ir.Node, opset: int) -> RowWise | None:
    """Return how an operator treats the rows of its operands each by itself, or None if it does not."""
    lead = leading(node.outputs[0]) if node.outputs else None
    if lead is None or node.domain not in walk.ONNX_DOMAINS or walk.has_references(node):
        return None
    if node.op_type in BROADCASTING or node.op_type == "Concat":
        return _of_many(node, lead)
    if leading(node.inputs[0] if node.inputs else None) != lead:
        return None
    if node.op_type in UNARY:
        return RowWise([0])
    last = len(lead)
    if node.op_type == "MatMul":
        return RowWise([0]) if rank_of(node.inputs[1]) == _MATRIX else None
    if node.op_type in _NORMALIZATIONS:
        return _normalization(node, last)
    if node.op_type in ALONG_AN_AXIS:
        if node.op_type != "Split" and opset < SOFTMAX_ALONG_ONE_AXIS_SINCE:
            return None
        axis = counted([node.attributes.get_int("axis", ALONG_AN_AXIS[node.op_type])], last + 1)
        return RowWise([0], {"axis": 1}) if axis == (last,) else None
    if node.op_type in REDUCTIONS:
        return _reduction(node, last)
    return _slice(node, last) if node.op_type == "Slice" else None


def _of_many(node: ir.Node, lead: Dims) -> RowWise | None:
    """Each operand has all the rows, or is one row for all of them."""
    rows = []
    for index, value in enumerate(node.inputs):
        if value is None:
            return None
        if leading(value) == lead:
            rows.append(index)
        elif node.op_type == "Concat" or rank_of(value) not in (0, 1):
            return None
    if node.op_type != "Concat":
        # PRelu broadcasts the slope to the rows, never the rows to the slope.
        return RowWise(rows) if rows and (node.op_type != "PRelu" or 0 in rows) else None
    axis = counted([node.attributes.get_int("axis", 0)], len(lead) + 1)
    return RowWise(rows, {"axis": 1}) if axis == (len(lead),) else None


def _normalization(node: ir.Node, last: int) -> RowWise | None:
    if counted([node.attributes.get_int("axis", -1)], last + 1) != (last,):
        return None
    if any(rank_of(value) != 1 for value in node.inputs[1:] if value is not None):
        return None
    if any(value.uses() or value.is_graph_output() for value in node.outputs[1:]):
        return None
    return RowWise([0], {"axis": -1})


def _reduction(node: ir.Node, last: int) -> RowWise | None:
    axes = axes_of(node, last + 1) if has_axes(node) else None
    if axes != (last,) or node.attributes.get_int("keepdims", 1) != 1:
        return None
    if "axes" in node.attributes:
        return RowWise([0], {"axes": [1]})
    return RowWise([0], {}, {1: np.array([1], np.int64)})


def _slice(node: ir.Node, last: int) -> RowWise | None:
    axes = integers(optional_input(node, 3))
    if axes is None or counted(axes, last + 1) != (last,):
        return None
    dtype = np.int32 if node.inputs[1] is not None and node.inputs[1].dtype == ir.DataType.INT32 else np.int64
    return RowWise([0], {}, {3: np.array([1], dtype)})
