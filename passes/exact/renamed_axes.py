"""Operators over renamed axes: what each becomes when its operands come before a Transpose instead of behind it."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import derived, shapes, walk
from graphopt.backend import Array

from .arguments import REDUCTIONS, axes_of, counted, has_axes, integers, optional_input, rank_of

# f(x) element by element, of the first input alone; further inputs are numbers.
UNARY = frozenset(
    [
        "Abs",
        "Acos",
        "Acosh",
        "Asin",
        "Asinh",
        "Atan",
        "Atanh",
        "BitwiseNot",
        "Cast",
        "Ceil",
        "Celu",
        "Clip",
        "Cos",
        "Cosh",
        "Elu",
        "Erf",
        "Exp",
        "Floor",
        "Gelu",
        "HardSigmoid",
        "HardSwish",
        "Identity",
        "IsInf",
        "IsNaN",
        "LeakyRelu",
        "Log",
        "Mish",
        "Neg",
        "Not",
        "Reciprocal",
        "Relu",
        "Round",
        "Selu",
        "Shrink",
        "Sigmoid",
        "Sign",
        "Sin",
        "Sinh",
        "Softplus",
        "Softsign",
        "Sqrt",
        "Swish",
        "Tan",
        "Tanh",
        "ThresholdedRelu",
    ]
)
# Element by element, of operands that broadcast.
BROADCASTING = frozenset(
    [
        "Add",
        "And",
        "BitShift",
        "BitwiseAnd",
        "BitwiseOr",
        "BitwiseXor",
        "Div",
        "Equal",
        "Greater",
        "GreaterOrEqual",
        "Less",
        "LessOrEqual",
        "Max",
        "Mean",
        "Min",
        "Mod",
        "Mul",
        "Or",
        "PRelu",
        "Pow",
        "Sub",
        "Sum",
        "Where",
        "Xor",
    ]
)
# Operators along one axis, told by an attribute, with its default.
ALONG_AN_AXIS = {"Concat": 0, "Hardmax": -1, "LogSoftmax": -1, "Softmax": -1, "Split": 0}
# Before this opset Softmax took all axes from the given one on together.
SOFTMAX_ALONG_ONE_AXIS_SINCE = 13
# A constant that others read too is copied if it is as small as this, in elements.
SMALL = 4096
_BYTE_BITS = 8

Perm = tuple[int, ...]


@dataclass(frozen=True)
class Renamed:
    """How an operator goes on with operands that are not transposed yet.

    Attributes:
        perms: For each output, the permutation that makes the output it had of the one it has now.
        attributes: Attributes that change.
        constants: Inputs that change, by index.
    """

    perms: Sequence[Perm]
    attributes: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[int, Array | ir.TensorProtocol] = field(default_factory=dict)


def renamed(node: ir.Node, perm: Perm, moved: Collection[int], opset: int) -> Renamed | None:
    """Return what an operator becomes when some operands lose a Transpose, or None where that cannot be said.

    Args:
        node: The operator.
        perm: The permutation of the Transpose before each of these operands.
        moved: Indices of the operands.
        opset: The opset of the model.
    """
    if node.domain not in walk.ONNX_DOMAINS or walk.has_references(node):
        return None
    op_type = node.op_type
    if op_type in BROADCASTING or op_type == "Concat":
        return _of_many(node, perm, moved)
    if set(moved) != {0}:
        return None
    if op_type in UNARY:
        return Renamed([perm])
    if op_type in ALONG_AN_AXIS:
        if op_type != "Split" and opset < SOFTMAX_ALONG_ONE_AXIS_SINCE:
            return None
        return _along(node, perm, ALONG_AN_AXIS[op_type])
    if op_type in REDUCTIONS:
        return _reduction(node, perm)
    rule = {
        "ArgMax": _pick,
        "ArgMin": _pick,
        "DequantizeLinear": _quantization,
        "Gather": _gather,
        "Pad": _pad,
        "QuantizeLinear": _quantization,
        "Slice": _slice,
        "Squeeze": _squeeze,
        "Tile": _tile,
        "Unsqueeze": _unsqueeze,
    }.get(op_type)
    return rule(node, perm) if rule is not None else None


def _of_many(node: ir.Node, perm: Perm, moved: Collection[int]) -> Renamed | None:
    """Operands that are not moved are constants, turned instead, or broadcast whatever their axes are called."""
    constants = {}
    for index, value in enumerate(node.inputs):
        if index in moved:
            continue
        shape = shapes.static_shape(value)
        if node.op_type != "Concat" and shape is not None and len(shape) <= len(perm) and set(shape) <= {1}:
            continue
        turned = _turned(value, perm, node)
        if turned is None or (node.op_type == "Concat" and shape is not None and len(shape) != len(perm)):
            return None
        constants[index] = turned
    if node.op_type != "Concat":
        return Renamed([perm], {}, constants)
    axis = counted([node.attributes.get_int("axis", 0)], len(perm))
    return Renamed([perm], {"axis": perm[axis[0]]}, constants) if axis is not None else None


def _turned(value: ir.Value | None, perm: Perm, reader: ir.Node) -> ir.TensorProtocol | None:
    """Return a constant as it was before the Transpose, or None where it varies, or a copy of it would be large."""
    tensor = walk.constant_tensor(value)
    if value is None or tensor is None or tensor.dtype == ir.DataType.STRING or tensor.dtype.bitwidth < _BYTE_BITS:
        return None
    shape = walk.dims(tensor)
    if len(shape) > len(perm) or (tensor.size > SMALL and any(use.node is not reader for use in value.uses())):
        return None
    aligned = derived.reshaped(tensor, (1,) * (len(perm) - len(shape)) + shape)
    return derived.transposed(aligned, [int(axis) for axis in np.argsort(perm)])


def _along(node: ir.Node, perm: Perm, default: int) -> Renamed | None:
    axis = counted([node.attributes.get_int("axis", default)], len(perm))
    return Renamed([perm] * len(node.outputs), {"axis": perm[axis[0]]}) if axis is not None else None


def _without(perm: Perm, axes: Collection[int]) -> Perm:
    """Return the permutation of the axes that are left when some, counted behind the Transpose, are gone."""
    left = [perm[axis] for axis in range(len(perm)) if axis not in axes]
    places = {axis: place for place, axis in enumerate(sorted(left))}
    return tuple(places[axis] for axis in left)


def _reduction(node: ir.Node, perm: Perm) -> Renamed | None:
    keepdims = node.attributes.get_int("keepdims", 1)
    if not has_axes(node):
        if node.attributes.get_int("noop_with_empty_axes", 0):
            return None
        # Over all axes, in whatever order; those kept have size 1.
        return Renamed([tuple(range(len(perm))) if keepdims else ()])
    axes = axes_of(node, len(perm))
    if not axes:
        return None
    now = sorted(perm[axis] for axis in axes)
    perms = [perm if keepdims else _without(perm, axes)]
    if "axes" in node.attributes:
        return Renamed(perms, {"axes": now})
    return Renamed(perms, {}, {1: np.array(now, np.int64)})


def _pick(node: ir.Node, perm: Perm) -> Renamed | None:
    axis = counted([node.attributes.get_int("axis", 0)], len(perm))
    if axis is None:
        return None
    kept = node.attributes.get_int("keepdims", 1)
    return Renamed([perm if kept else _without(perm, axis)], {"axis": perm[axis[0]]})


def _quantization(node: ir.Node, perm: Perm) -> Renamed | None:
    scale = shapes.static_shape(node.inputs[1])
    if scale is None or len(scale) > 1 or node.attributes.get_int("block_size", 0) != 0:
        return None
    if len(scale) == 0:
        return Renamed([perm])
    return _along(node, perm, 1)


def _gather(node: ir.Node, perm: Perm) -> Renamed | None:
    axis = counted([node.attributes.get_int("axis", 0)], len(perm))
    rank = rank_of(node.inputs[1])
    if axis is None or rank is None or rank > 1:
        return None
    return Renamed([perm if rank else _without(perm, axis)], {"axis": perm[axis[0]]})


def _slice(node: ir.Node, perm: Perm) -> Renamed | None:
    if len(node.inputs) < 3:
        return None  # before opset 10 the bounds were attributes
    given, starts = optional_input(node, 3), shapes.static_shape(node.inputs[1])
    if starts is None:
        return None
    axes = counted(integers(given) or () if given is not None else range(starts[0]), len(perm))
    if axes is None or len(axes) != starts[0]:
        return None
    # Bounds and axes are of one dtype.
    dtype = np.int32 if node.inputs[1].dtype == ir.DataType.INT32 else np.int64  # type: ignore[union-attr]
    return Renamed([perm], {}, {3: np.array([perm[axis] for axis in axes], dtype)})


def _pad(node: ir.Node, perm: Perm) -> Renamed | None:
    if optional_input(node, 1) is None:
        return None  # before opset 11 the widths were an attribute
    if optional_input(node, 3) is not None:
        axes = integers(node.inputs[3])
        counts = counted(axes, len(perm)) if axes is not None else None
        return Renamed([perm], {}, {3: np.array([perm[axis] for axis in counts], np.int64)}) if counts else None
    widths = integers(node.inputs[1])
    if widths is None or len(widths) != 2 * len(perm):
        return None
    return Renamed([perm], {}, {1: np.array(widths, np.int64).reshape(2, -1)[:, np.argsort(perm)].reshape(-1)})


def _tile(node: ir.Node, perm: Perm) -> Renamed | None:
    repeats = integers(node.inputs[1])
    if repeats is None or len(repeats) != len(perm):
        return None
    return Renamed([perm], {}, {1: np.array(repeats, np.int64)[np.argsort(perm)]})


def _squeeze(node: ir.Node, perm: Perm) -> Renamed | None:
    axes = axes_of(node, len(perm)) if has_axes(node) else None
    if not axes:
        return None
    now = sorted(perm[axis] for axis in axes)
    if "axes" in node.attributes:
        return Renamed([_without(perm, axes)], {"axes": now})
    return Renamed([_without(perm, axes)], {}, {1: np.array(now, np.int64)})


def _unsqueeze(node: ir.Node, perm: Perm) -> Renamed | None:
    """The new axes stay where they are; the others keep to the places between them."""
    count = len(integers(optional_input(node, 1)) or node.attributes.get_ints("axes", ()) or ())
    axes = axes_of(node, len(perm) + count)
    if not axes:
        return None
    others = [axis for axis in range(len(perm) + count) if axis not in axes]
    result = list(range(len(perm) + count))
    for place, axis in zip(others, perm, strict=True):
        result[place] = others[axis]
    return Renamed([tuple(result)])
