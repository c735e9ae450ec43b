"""Which channels of a group to remove: criteria that need the weights alone, or what layers read as well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array

from ..analyses.channel_groups import ChannelGroup, input_axis, is_matrix, output_axis
from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import group_count, inputs_of
from ..solvers import columns
from ..solvers.objective import by_group, output_error

Criterion = Literal["l1", "l2", "variance", "obs", "taylor"]
# Criteria that look at what layers read, or at the outputs.
OF_DATA: frozenset[str] = frozenset({"variance", "obs", "taylor"})


def read_units(group: ChannelGroup, layer: LinearLayer) -> Array | None:
    """Return which unit each input of a layer belongs to, int64 [groups, inputs], -1 for those of none.

    None where the layer's inputs do not shrink by themselves: it does not read the group, or whole groups of a
    convolution go, outputs included, as in a depthwise one.
    """
    units = group.axes.get(input_axis(layer))
    if units is None:
        return None
    # A ConvTranspose has one set of inputs, each group of outputs its own part of them.
    count = group_count(layer) if layer.node.op_type == "Conv" else 1
    inputs = inputs_of(layer)
    # Of a convolution, `LinearLayer.matrix` has all channels of one kernel position side by side.
    return np.broadcast_to(np.tile(units, inputs // len(units)), (count, inputs))


def true_readers(group: ChannelGroup) -> list[LinearLayer]:
    """Return the layers that lose inputs, and not the outputs made of them with them, in graph order."""
    return [layer for layer in group.readers if read_units(group, layer) is not None]


def is_stream(group: ChannelGroup) -> bool:
    """Return whether a group is the stream of a residual network: sums of what several layers write into it."""
    values = {axis.value for axis in group.axes}
    sums = {use.node for value in values for use in value.uses() if walk.is_onnx_op(use.node, "Add", "Sum")}
    return any(sum(one in values and walk.constant_tensor(one) is None for one in node.inputs) > 1 for node in sums)


def order_by_weights(group: ChannelGroup, criterion: Criterion) -> Array:
    """Return all units, the least first, by the size of the weights that make and read them.

    Each tensor counts by the mean magnitude (l1) or square (l2) of the unit's weights in it, against the tensor's own
    mean, so that none outweighs the others by its scale (as in Fang et al., DepGraph, 2023).
    """
    scores = np.zeros(group.size)
    for (value, axis), units in group.axes.items():
        tensor = walk.constant_tensor(value)
        if tensor is None or not is_matrix(value):
            continue
        magnitude = np.abs(np.moveaxis(tensor.numpy(), axis, 0).astype(np.float32)).reshape(len(units), -1)
        sizes = (magnitude if criterion == "l1" else np.square(magnitude)).mean(axis=1, dtype=np.float64)
        scores += _by_unit(sizes, units, group.size) / max(float(sizes.mean()), np.finfo(np.float64).tiny)
    return np.argsort(scores, kind="stable")


def order_by_variance(group: ChannelGroup, covariances: Mapping[LinearLayer, Array]) -> Array:
    """Return all units, the least first, by the variance of what layers read of them.

    Args:
        group: The group.
        covariances: Of each layer that reads it, [groups, inputs, inputs].
    """
    scores = np.zeros(group.size)
    for layer, covariance in covariances.items():
        units = read_units(group, layer)
        assert units is not None, "the layer reads the group"
        variances = np.diagonal(covariance, axis1=1, axis2=2).astype(np.float64)
        scale = max(float(variances.mean()), np.finfo(np.float64).tiny)
        scores += _by_unit(variances.reshape(-1), units.reshape(-1), group.size) / scale
    return np.argsort(scores, kind="stable")


def as_reader(group: ChannelGroup, layer: LinearLayer, weight: Array, moment: Array, rows: int) -> columns.Reader:
    """Return a layer for the solver; its errors count against the power of what it gives.

    Args:
        group: The group.
        layer: A layer that reads it.
        weight: [outputs, inputs].
        moment: [groups, inputs, inputs], around the mean where a bias takes the mean.
        rows: How many rows that was taken over.
    """
    units = read_units(group, layer)
    assert units is not None, "the layer reads the group"
    damping = columns.damping_for(moment, rows)
    # Damping is as if there was more of each input than was seen, which counts on both sides.
    ridge = damping * np.trace(moment, axis1=1, axis2=2).astype(np.float64) / moment.shape[2]
    squares = np.square(by_group(weight, moment), dtype=np.float64).sum(axis=(1, 2))
    power = output_error(weight.astype(np.float32), moment) + float(ridge @ squares)
    return columns.Reader(weight, moment, units, 1.0 / power if power > 0 else 1.0, damping)


def zeroed(group: ChannelGroup, kept: Array) -> dict[ir.Value, Array]:
    """Return the weights that read units as they are without these: zero where a unit that goes is read.

    Args:
        group: The group.
        kept: bool [size]: the units that stay.
    """
    made = {output_axis(layer) for layer in group.writers}
    found: dict[ir.Value, Array] = {}
    for axis, units in group.axes.items():
        tensor = walk.constant_tensor(axis.value)
        if tensor is None or not is_matrix(axis.value) or axis in made:
            continue
        content = found.get(axis.value)
        array = (tensor.numpy() if content is None else content).copy()
        gone = np.append(~kept, False)[units]
        array[(slice(None),) * axis.axis + (gone,)] = 0
        found[axis.value] = array
    return found


def kept_units(size: int, order: Sequence[int] | Array, width: int) -> Array:
    """Return bool [size]: all units but the first ones of an order, as many as leave a width."""
    kept = np.ones(size, bool)
    kept[np.asarray(order[: size - width], np.int64)] = False
    return kept


def _by_unit(scores: Array, units: Array, size: int) -> Array:
    """Return the sum of the scores of each unit's elements, [size]."""
    own = units >= 0
    return np.bincount(units[own], weights=scores[own], minlength=size)
