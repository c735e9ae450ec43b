"""Rules of the channel analysis for operators that sum products: Conv, ConvTranspose, Gemm, MatMul, Einsum."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .axis_ties import Axis, AxisRule, Emit, NodeAxes, length_of


def convolution(node: NodeAxes, emit: Emit) -> None:
    """Channels in go with axis 1 of the weight, within a group; channels out with axis 0."""
    _windows(node, emit)
    x, inside = node.input(0, 1), node.input(1, 1)
    emit.tie(node.input(1, 0), node.output(0, 1))
    if node.integer("group", 1) == 1:
        emit.tie(x, inside)
    else:
        _groups(x, inside, node.output(0, 1), None, node.integer("group"), emit)
    _bias(node, emit)


def transposed_convolution(node: NodeAxes, emit: Emit) -> None:
    """Channels in go with axis 0 of the weight; channels out with axis 1, within a group."""
    _windows(node, emit)
    y, inside = node.output(0, 1), node.input(1, 1)
    emit.tie(node.input(0, 1), node.input(1, 0))
    if node.integer("group", 1) == 1:
        emit.tie(inside, y)
    else:
        _groups(node.input(0, 1), None, y, inside, node.integer("group"), emit)
    _bias(node, emit)


def _bias(node: NodeAxes, emit: Emit) -> None:
    if node.has(2):
        emit.tie(node.input(2, 0), node.output(0, 1))


def _windows(node: NodeAxes, emit: Emit) -> None:
    emit.tie(node.input(0, 0), node.output(0, 0))
    for axis in range(2, len(node.sizes_in(0))):
        emit.freeze(node.input(0, axis), f"{node.node.op_type} slides along it")
        emit.freeze(node.output(0, axis), f"{node.node.op_type} slides along it")
        emit.freeze(node.input(1, axis), "it is an axis of a kernel")


def _groups(x: Axis, x_inside: Axis | None, y: Axis, y_inside: Axis | None, groups: int, emit: Emit) -> None:
    """Relate the channels in and out of a convolution in groups, and the axis of the weight within a group."""
    channels, outputs = length_of(x), length_of(y)
    if channels is None or outputs is None:
        for axis in (x, y, x_inside, y_inside):
            if axis is not None:
                emit.freeze(axis, "how many channels a group has is not known")
        return
    of_groups = emit.between(groups)
    if channels == groups or outputs == groups:
        # Depthwise, or one output a group: only whole groups can go.
        emit.tie(x, of_groups, None, np.arange(channels) // (channels // groups))
        emit.tie(y, of_groups, None, np.arange(outputs) // (outputs // groups))
        for axis in (x_inside, y_inside):
            if axis is not None and length_of(axis) != 1:
                emit.freeze(axis, "it is within a group of a Conv, and whole groups are cut")
        return
    emit.split(x, [of_groups, x_inside or emit.between(channels // groups)], "convolutions")
    emit.split(y, [of_groups, y_inside or emit.between(outputs // groups)], "convolutions")


def gemm(node: NodeAxes, emit: Emit) -> None:
    """Rows of A, columns of B, and what they share, each transposed or not."""
    a_transposed, b_transposed = node.integer("transA") != 0, node.integer("transB") != 0
    emit.tie(node.input(0, int(not a_transposed)), node.input(1, int(b_transposed)))
    emit.tie(node.input(0, int(a_transposed)), node.output(0, 0))
    emit.tie(node.input(1, int(not b_transposed)), node.output(0, 1))
    bias = node.node.inputs[2] if node.has(2) else None
    if bias is not None:
        emit.tie_broadcast(bias, node.node.outputs[0])


def matmul(node: NodeAxes, emit: Emit) -> None:
    """Matrices in the last two axes, all others aligned at the right; a factor of one axis is a vector."""
    rank_a, rank_b = len(node.sizes_in(0)), len(node.sizes_in(1))
    emit.tie(node.input(0, -1), node.input(1, -2 if rank_b > 1 else 0))
    columns = int(rank_b > 1)
    if rank_a > 1:
        emit.tie(node.input(0, -2), node.output(0, -1 - columns))
    if rank_b > 1:
        emit.tie(node.input(1, -1), node.output(0, -1))
    matrix_axes = columns + int(rank_a > 1)
    for index, rank in enumerate((rank_a, rank_b)):
        for back in range(3, rank + 1):
            axis = node.input(index, -back)
            target = node.output(0, -(back - 2 + matrix_axes))
            if length_of(axis) != 1 or length_of(target) == 1:
                emit.tie(axis, target)


def einsum(node: NodeAxes, emit: Emit) -> None:
    """Axes of one letter go together."""
    equation = node.text("equation").replace(" ", "")
    terms, _, result = equation.partition("->")
    operands = terms.split(",")
    letters = "".join(operands)
    if "->" not in equation:
        result = "".join(sorted(letter for letter in set(letters) if letters.count(letter) == 1))
    repeated = any(len(set(term)) < len(term) for term in operands)
    if "." in equation or repeated:
        for value in (*node.node.inputs, *node.node.outputs):
            emit.freeze_value(value, f"the Einsum `{equation}` is not followed")
        return
    known: dict[str, Axis] = {}
    places = [(letter, node.output(0, axis)) for axis, letter in enumerate(result)]
    for index, term in enumerate(operands):
        places += [(letter, node.input(index, axis)) for axis, letter in enumerate(term)]
    for letter, axis in places:
        if length_of(axis) != 1:
            emit.tie(known.setdefault(letter, axis), axis)


PRODUCT_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        ("", "Conv"): convolution,
        ("", "ConvTranspose"): transposed_convolution,
        ("", "Gemm"): gemm,
        ("", "MatMul"): matmul,
        ("", "Einsum"): einsum,
    }
)
