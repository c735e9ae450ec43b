"""Rules of the channel analysis for operators that reduce an axis, or rank what is along it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType

from .axis_ties import AxisRule, Emit, NodeAxes


def reduction(node: NodeAxes, emit: Emit) -> None:
    """Axes reduced are mixed; the others stay."""
    rank = len(node.sizes_in(0))
    axes = node.integers("axes")
    if node.has(1):
        axes = node.numbers(1)
        if axes is None:
            emit.freeze_value(node.value(), "which axes are reduced is not known")
            emit.freeze_value(node.node.outputs[0], "which axes are reduced is not known")
            return
    if not axes:
        axes = () if node.integer("noop_with_empty_axes") else tuple(range(rank))
    reduced = {axis % rank for axis in axes}
    for axis in sorted(reduced):
        emit.mixes(node.input(0, axis))
    _tie_kept(node, reduced, node.integer("keepdims", 1) != 0, emit)


def extreme(node: NodeAxes, emit: Emit) -> None:
    """The number of the largest element counts those before it."""
    rank = len(node.sizes_in(0))
    axis = node.integer("axis") % rank
    emit.freeze(node.input(0, axis), f"{node.node.op_type} counts its elements")
    _tie_kept(node, {axis}, node.integer("keepdims", 1) != 0, emit)


def _tie_kept(node: NodeAxes, reduced: Collection[int], kept: bool, emit: Emit) -> None:
    target = 0
    for axis in range(len(node.sizes_in(0))):
        if axis not in reduced:
            emit.tie(node.input(0, axis), node.output(0, target))
        target += int(kept or axis not in reduced)


def top_k(node: NodeAxes, emit: Emit) -> None:
    """Some of the elements of an axis are picked, and counted."""
    rank = len(node.sizes_in(0))
    axis = node.integer("axis", -1) % rank
    emit.freeze(node.input(0, axis), "TopK counts its elements")
    for index, output in enumerate(node.node.outputs):
        if node.gives(index):
            emit.tie_values(node.value(), output, skip=(axis,))
            emit.freeze(node.output(index, axis), "TopK counts its elements")


_REDUCING = (
    *("ReduceL1", "ReduceL2", "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin"),
    *("ReduceProd", "ReduceSum", "ReduceSumSquare"),
)

REDUCTION_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        **{("", name): reduction for name in _REDUCING},
        ("", "ArgMax"): extreme,
        ("", "ArgMin"): extreme,
        ("", "TopK"): top_k,
    }
)
