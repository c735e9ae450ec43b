"""Rules of the channel analysis for ONNX Runtime's own operators that fuse plain ones; attention is elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from .axis_rules_elementwise import unary
from .axis_rules_products import convolution, gemm
from .axis_ties import Axis, AxisRule, Emit, NodeAxes, length_of

_LOOKED_UP = "its rows are looked up by number"


def aligned(node: NodeAxes, emit: Emit) -> None:
    """The axes of the inputs, aligned at the right, are those of the output."""
    for value in node.node.inputs:
        if value is not None:
            emit.tie_broadcast(value, node.node.outputs[0])


def skip_normalization(node: NodeAxes, emit: Emit) -> None:
    """A sum of two tensors and a bias, normalised along the last axis; the sum may be an output, too."""
    aligned(node, emit)
    if node.gives(3):
        emit.tie_values(node.node.outputs[3], node.node.outputs[0])
    emit.mixes(node.input(0, -1))


def embedding_normalization(node: NodeAxes, emit: Emit) -> None:
    """A sum of rows of tables, normalised along the last axis; the sum may be an output, too."""
    result = node.output(0, -1)
    for axis in (0, 1):  # batch and rows
        emit.tie(node.input(0, axis), node.output(0, axis))
    for index in (2, 3, 4, 5, 6):
        if node.has(index):
            emit.tie(node.input(index, -1), result)
        if node.has(index) and len(node.sizes_in(index)) > 1:
            emit.freeze(node.input(index, 0), _LOOKED_UP)
    if node.gives(2):
        emit.tie_values(node.node.outputs[2], node.node.outputs[0])
    emit.mixes(result)


def fused_matmul(node: NodeAxes, emit: Emit) -> None:
    """A MatMul of tensors that are transposed first."""
    a, b = _turned(node, 0, "A"), _turned(node, 1, "B")
    result = [node.output(0, axis) for axis in range(len(node.sizes_out()))]
    emit.tie(a[-1], b[-2])
    emit.tie(a[-2], result[-2])
    emit.tie(b[-1], result[-1])
    for axes in (a[:-2], b[:-2]):
        for axis, target in zip(reversed(axes), reversed(result[:-2]), strict=False):
            if length_of(axis) != 1 or length_of(target) == 1:
                emit.tie(axis, target)


def _turned(node: NodeAxes, index: int, letter: str) -> Sequence[Axis]:
    """Return the axes of a factor in the order in which the product takes them."""
    axes = [node.input(index, axis) for axis in range(len(node.sizes_in(index)))]
    if len(axes) < 2:
        raise ValueError("a factor that is no matrix")
    if node.integer(f"transBatch{letter}"):  # the batch lies before the columns
        axes = [*axes[1:-1], axes[0], axes[-1]]
    return [*axes[:-2], axes[-1], axes[-2]] if node.integer(f"trans{letter}") else axes


def split_gelu(node: NodeAxes, emit: Emit) -> None:
    """Half of the channels times the Gelu of the other half."""
    halves, result = node.input(0, -1), node.output(0, -1)
    count = length_of(halves)
    if count is not None:
        emit.tie(halves, result, None, np.arange(count) % (count // 2))
    if node.has(1):
        emit.tie(node.input(1, 0), halves)
    emit.tie_values(node.value(), node.node.outputs[0], skip=(halves.axis,))


def fused_convolution(node: NodeAxes, emit: Emit) -> None:
    """A Conv, a tensor added to it, and an activation."""
    convolution(node, emit)
    added = node.node.inputs[3] if node.has(3) else None
    if added is not None:
        emit.tie_broadcast(added, node.node.outputs[0])


_MICROSOFT = "com.microsoft"

FUSED_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        **{(_MICROSOFT, name): unary for name in ("Gelu", "QuickGelu")},
        **{(_MICROSOFT, name): aligned for name in ("BiasAdd", "BiasGelu", "FastGelu")},
        (_MICROSOFT, "BiasSplitGelu"): split_gelu,
        (_MICROSOFT, "EmbedLayerNormalization"): embedding_normalization,
        (_MICROSOFT, "FusedConv"): fused_convolution,
        (_MICROSOFT, "FusedGemm"): gemm,
        (_MICROSOFT, "FusedMatMul"): fused_matmul,
        (_MICROSOFT, "SkipLayerNormalization"): skip_normalization,
        (_MICROSOFT, "SkipSimplifiedLayerNormalization"): skip_normalization,
        (_MICROSOFT, "TransposeMatMul"): fused_matmul,
    }
)
