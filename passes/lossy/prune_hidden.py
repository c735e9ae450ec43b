"""Pruning of the residual width: features of the stream that all blocks of a model read and add to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.options import opt

from ..analyses.channel_groups import ChannelGroup
from ..analyses.linear_layers import LinearLayer, linear_layers
from ..analyses.residual_blocks import residual_blocks
from ..analyses.second_moments import gram
from ..analyses.selection import Selection, select
from ..solvers import columns
from ..solvers.objective import output_error
from .channel_choice import (
    Criterion,
    kept_units,
    order_by_variance,
    order_by_weights,
    read_units,
    true_readers,
)
from .channel_gradients import orders_by_gradient
from .prune_aims import Aims
from .prune_channels import PruneChannels
from .removable_channels import find_channels
from .shrinking import shrink
from .solved_layers import solve_anew
from .stream_norms import STREAM_NORMS, keep_norms

_FEW = 3


@dataclass(frozen=True)
class PruneHidden(PruneChannels):
    """Remove the features of the residual stream that cost all layers together least; data make up for it."""

    ratio: float | None = opt(None, help="share of each stream's features to remove; 0.1 where nothing is asked for")
    include: tuple[str, ...] = opt((), help="only streams that a layer writes to whose name or operator matches a glob")
    exclude: tuple[str, ...] = opt((), help="no stream that a layer writes to whose name or operator matches a glob")

    name = "prune-hidden"
    units: ClassVar[str] = "features of the residual stream"
    usual_ratio: ClassVar[float] = 0.1

    def _groups(self, model: ir.Model, ctx: Context) -> list[ChannelGroup]:
        """Return the streams that may be narrowed; the others are said to be left."""
        selection = select(model, self.include, self.exclude, where=f"pass `{self.name}`")
        asked, barred = Selection(include=selection.include), Selection(exclude=selection.exclude)
        found = find_channels(ctx)
        sums = {block.total.outputs[0] for block in residual_blocks(model)}
        streams = [group for group in found.groups if not sums.isdisjoint(axis.value for axis in group.axes)]
        mixed = [group for group in streams if any(node.op_type not in STREAM_NORMS for node in group.mixers)]
        if mixed:
            operators = sorted({node.op_type for group in mixed for node in group.mixers} - STREAM_NORMS)
            ctx.left(f"{len(mixed)} streams, as {' and '.join(operators)} mixes their features", left=len(mixed))
        if not streams:
            widest = sorted(found.frozen, key=lambda axis: -axis.size)[:_FEW]
            for axis in widest:
                ctx.left(f"{axis.size} channels at `{axis.name}` must stay: {axis.reason}")
        chosen = []
        for group in streams:
            nodes = [layer.node for layer in group.writers]
            allowed = any(map(asked.allows, nodes)) and all(map(barred.allows, nodes))
            if allowed and group not in mixed:
                chosen.append(group)
        return chosen

    def listed(self, cut: Mapping[ChannelGroup, int]) -> str:
        """Return how wide each stream is."""
        return f" (left: {', '.join(f'{width} of {group.size}' for group, width in cut.items())})"

    def cut(self, widths: Mapping[ChannelGroup, int], criterion: Criterion, ctx: Context) -> int:
        """Choose for all layers that read a stream at once, cut, and solve every layer anew for what is left."""
        kept = {
            group: kept_units(group.size, _order(group, width, criterion, ctx), width)
            for group, width in widths.items()
        }
        if ctx.data is None:
            shrink(ctx, kept)
            return 0
        scales = keep_norms(kept, ctx)
        with Aims(ctx) as aims:
            shrink(ctx, kept)
            aims.narrow(_kept_axes(kept))
            scales.apply(ctx)
            return solve_anew(linear_layers(ctx.model), aims, ctx)


def _order(group: ChannelGroup, width: int, criterion: Criterion, ctx: Context) -> Array:
    """Return the features of a stream, the least first."""
    if criterion == "taylor":
        return orders_by_gradient([group], ctx)[group]
    moments = gram(ctx, true_readers(group)) if ctx.data is not None and criterion in ("obs", "variance") else {}
    if not moments:
        return order_by_weights(group, "l2" if criterion == "obs" else criterion)
    if criterion == "variance":
        return order_by_variance(group, moments)
    readers = [_reader(group, layer, moment) for layer, moment in moments.items()]
    return columns.removal_order(readers, group.size, most=group.size - width).order


def _reader(group: ChannelGroup, layer: LinearLayer, moment: Array) -> columns.Reader:
    """Return a layer for the solver; its errors count against the power of what it gives."""
    weight, units = layer.matrix(), read_units(group, layer)
    assert units is not None, "the layer reads the stream"
    power = output_error(weight.astype(np.float32), moment)
    return columns.Reader(weight, moment, units, 1.0 / power if power > 0 else 1.0)


def _kept_axes(kept: Mapping[ChannelGroup, Array]) -> dict[tuple[str, int], Array]:
    """Return what stays of each axis, by the name of its value."""
    found: dict[tuple[str, int], Array] = {}
    for group, stays in kept.items():
        for axis, units in group.axes.items():
            key = (axis.value.name or "", axis.axis)
            found[key] = found.get(key, np.ones(len(units), bool)) & np.append(stays, True)[units]
    return found
