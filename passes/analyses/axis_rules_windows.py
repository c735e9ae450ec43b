"""Rules of the channel analysis for pools, resizing and other operators on the axes behind the channels."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .axis_ties import AxisRule, Emit, NodeAxes, length_of


def pool(node: NodeAxes, emit: Emit) -> None:
    """Samples and channels stay apart; a window slides along the rest."""
    for index, output in enumerate(node.node.outputs):
        if node.gives(index):
            emit.tie_values(node.value(), output, skip=range(2, len(node.sizes_in(0))))
            _freeze_behind(node, output_index=index, emit=emit)
    if node.gives(1):
        emit.freeze(node.input(0, 1), "the numbers of maxima count its elements")


def global_pool(node: NodeAxes, emit: Emit) -> None:
    """Each channel becomes one number; the axes behind it are mixed."""
    emit.tie_values(node.value(), node.node.outputs[0], skip=range(2, len(node.sizes_in(0))))
    for axis in range(2, len(node.sizes_in(0))):
        emit.mixes(node.input(0, axis))


def sampled(node: NodeAxes, emit: Emit) -> None:
    """Channels stay apart; where they are sampled is what the other inputs say."""
    emit.tie(node.input(0, 1), node.output(0, 1))
    for index in range(len(node.node.inputs)):
        if node.has(index):
            emit.freeze_value(node.value(index), f"{node.node.op_type} samples it", skip=(1,) if index == 0 else ())
    emit.freeze_value(node.node.outputs[0], f"{node.node.op_type} samples it", skip=(1,))


def _freeze_behind(node: NodeAxes, output_index: int, emit: Emit) -> None:
    for axis in range(2, len(node.sizes_in(0))):
        for one in (node.input(0, axis), node.output(output_index, axis)):
            emit.freeze(one, f"{node.node.op_type} slides along it")


def resize(node: NodeAxes, emit: Emit) -> None:
    """Axes that keep their size are not resized."""
    crops = node.text("coordinate_transformation_mode") == "tf_crop_and_resize"
    for axis in range(len(node.sizes_in(0))):
        a, b = node.input(0, axis), node.output(0, axis)
        if length_of(a) == length_of(b) and not crops:
            emit.tie(a, b)
        else:
            emit.freeze(a, f"{node.node.op_type} changes its size")
            emit.freeze(b, f"{node.node.op_type} changes its size")


def depth_to_space(node: NodeAxes, emit: Emit) -> None:
    """Channels go to several places: which, depends on the order of the two."""
    x, y = node.input(0, 1), node.output(0, 1)
    count, out = length_of(x), length_of(y)
    if count is not None and out is not None:
        of_output = np.arange(count) // (count // out) if node.text("mode", "DCR") == "CRD" else np.arange(count) % out
        emit.tie(x, y, None, of_output)
    _blocks(node, emit)


def space_to_depth(node: NodeAxes, emit: Emit) -> None:
    """Places become channels, the original channel being the inner part of their number."""
    x, y = node.input(0, 1), node.output(0, 1)
    count, out = length_of(x), length_of(y)
    if count is not None and out is not None:
        emit.tie(y, x, None, np.arange(out) % count)
    _blocks(node, emit)


def _blocks(node: NodeAxes, emit: Emit) -> None:
    emit.tie(node.input(0, 0), node.output(0, 0))
    for axis in (2, 3):
        for one in (node.input(0, axis), node.output(0, axis)):
            emit.freeze(one, f"{node.node.op_type} cuts it into blocks")


def frozen(node: NodeAxes, emit: Emit) -> None:
    """What depends on the place of every element."""
    for value in (*node.node.inputs, *node.node.outputs):
        emit.freeze_value(value, f"{node.node.op_type} depends on all of it")


WINDOW_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        **{("", name): pool for name in ("MaxPool", "AveragePool", "LpPool")},
        **{("", name): global_pool for name in ("GlobalAveragePool", "GlobalMaxPool", "GlobalLpPool")},
        **{("", name): sampled for name in ("RoiAlign", "MaxRoiPool", "GridSample")},
        **{("", name): resize for name in ("Resize", "Upsample")},
        ("", "DepthToSpace"): depth_to_space,
        ("", "SpaceToDepth"): space_to_depth,
        **{("", name): frozen for name in ("MaxUnpool", "NonMaxSuppression", "Col2Im", "Det")},
    }
)
