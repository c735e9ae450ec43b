"""Rules of the channel analysis for normalizations, which mix over what they normalise."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .axis_rules_elementwise import unary
from .axis_ties import AxisRule, Emit, NodeAxes

# From this version, GroupNormalization has one scale for each channel; before, one for each group.
_FIRST_GROUP_SCALE_BY_CHANNEL = 21


def batch_normalization(node: NodeAxes, emit: Emit) -> None:
    """One number for each channel, nothing mixed."""
    emit.tie_values(node.value(), node.node.outputs[0])
    for index in range(1, len(node.node.inputs)):
        if node.has(index):
            _per_channel(node, index, emit)
    for index in range(1, len(node.node.outputs)):
        if node.gives(index):
            emit.tie(node.output(index, 0), node.input(0, 1))


def _per_channel(node: NodeAxes, index: int, emit: Emit) -> None:
    if len(node.sizes_in(index)) == 1:
        emit.tie(node.input(index, 0), node.input(0, 1))
    else:
        emit.freeze_value(node.node.inputs[index], "its normalization is not by channel")
        emit.freeze_value(node.node.inputs[0], "its normalization is not by channel")


def instance_normalization(node: NodeAxes, emit: Emit) -> None:
    """One number for each channel; what is behind the channel axis is mixed."""
    emit.tie_values(node.value(), node.node.outputs[0])
    for index in (1, 2):
        _per_channel(node, index, emit)
    for axis in range(2, len(node.sizes_in(0))):
        emit.mixes(node.input(0, axis))


def group_normalization(node: NodeAxes, emit: Emit) -> None:
    """Channels are split into groups, and mixed within each."""
    emit.tie_values(node.value(), node.node.outputs[0])
    channels, groups = node.sizes_in(0)[1], node.integer("num_groups")
    x = node.input(0, 1)
    if channels is None:
        return
    of_groups, inside = emit.between(groups), emit.between(channels // groups)
    emit.split(x, [of_groups, inside])
    emit.mixes(inside)
    for axis in range(2, len(node.sizes_in(0))):
        emit.mixes(node.input(0, axis))
    for index in (1, 2):
        emit.tie(node.input(index, 0), of_groups if 0 < node.opset < _FIRST_GROUP_SCALE_BY_CHANNEL else x)


def layer_normalization(node: NodeAxes, emit: Emit) -> None:
    """The axes from one on are mixed; scale and bias have their shape."""
    value, rank = node.value(), len(node.sizes_in(0))
    axis = node.integer("axis", -1) % rank
    emit.tie_values(value, node.node.outputs[0])
    for index in range(1, len(node.node.inputs)):
        parameter = node.node.inputs[index]
        if parameter is not None:
            emit.tie_broadcast(parameter, value)
    for mixed in range(axis, rank):
        emit.mixes(node.input(0, mixed))
    for index in range(1, len(node.node.outputs)):
        if node.gives(index):
            emit.tie_values(value, node.node.outputs[index], skip=range(axis, rank))


def along_axis(node: NodeAxes, emit: Emit) -> None:
    """One axis is mixed."""
    unary(node, emit)
    emit.mixes(node.input(0, node.integer("axis", -1)))


def local_response(node: NodeAxes, emit: Emit) -> None:
    """Channels are mixed with their neighbours."""
    unary(node, emit)
    emit.mixes(node.input(0, 1))


def mean_variance(node: NodeAxes, emit: Emit) -> None:
    """The axes named are mixed."""
    unary(node, emit)
    for axis in node.integers("axes") or (0, 2, 3):
        emit.mixes(node.input(0, axis))


NORMALIZATION_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        ("", "BatchNormalization"): batch_normalization,
        ("", "InstanceNormalization"): instance_normalization,
        ("", "GroupNormalization"): group_normalization,
        ("", "LayerNormalization"): layer_normalization,
        ("", "RMSNormalization"): layer_normalization,
        ("", "SimplifiedLayerNormalization"): layer_normalization,
        ("com.microsoft", "SimplifiedLayerNormalization"): layer_normalization,
        ("com.microsoft", "LayerNormalization"): layer_normalization,
        ("", "LpNormalization"): along_axis,
        ("", "LRN"): local_response,
        ("", "MeanVarianceNormalization"): mean_variance,
    }
)
