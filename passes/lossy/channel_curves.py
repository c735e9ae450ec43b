"""What removing channels costs, group by group and width by width, in one unit: so that groups can be weighed up."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.channel_groups import ChannelGroup
from ..analyses.linear_layers import LinearLayer
from ..analyses.output_damage import Change, error_weights, say_curve, tried_of
from ..solvers import columns
from .channel_choice import as_reader, kept_units, read_units, true_readers, zeroed
from .layer_bias import LayerBias, bias_content, bias_of_layer
from .layer_targets import rows_per_sample
from .sequential_moments import Moments, SequentialMoments

# A layer that has lost this share of what it gives has lost all.
_MOST_LOST = 0.999
# Of fewer samples, none are set apart to measure on.
_FEWEST_SAMPLES = 8


def error_curves(
    groups: Sequence[ChannelGroup], widths: Sequence[Sequence[int]], levels: Sequence[int], ctx: Context
) -> list[Array | None]:
    """Return what the outputs are expected to lose where one group alone has each of its widths.

    The shape of a curve is that of the errors which the kept weights of its readers cannot make up for, against what
    is left of what these give; its height follows what the outputs were seen to lose at one of the widths.

    Args:
        groups: The groups.
        widths: Of each, the widths it may have, falling from the present one.
        levels: Of each, the place of the width it is tried at, about the one to be expected.
        ctx: The model, not changed, and the data.

    Returns:
        Of each group float64 [widths], from 0; None where nothing can be seen of what reads it.
    """
    plans = {group: (own, max(level, 1)) for group, own, level in zip(groups, widths, levels, strict=True)}
    curves: dict[ChannelGroup, Array] = {}
    changes = []
    readers_of = {group: true_readers(group) for group in groups}
    kinds = {group: (group.size, *((one.node.op_type, one.dims) for one in readers_of[group])) for group in groups}
    tried = {groups[place] for place in tried_of([kinds[group] for group in groups])}
    assert ctx.data is not None, "the pass did not declare that it needs calibration data"
    # What is solved for some samples is measured on others, or nothing would seem lost where there are few.
    rest, judged = ctx.data.split(ctx.seed) if len(ctx.data) >= _FEWEST_SAMPLES else (ctx.data, ctx.data)
    for group, seen in _readers(groups, replace(ctx, data=rest)):
        own, level = plans[group]
        readers = [
            as_reader(group, layer, layer.matrix(), _moment(layer, moments, ctx), moments.rows)
            for layer, moments in seen.items()
        ]
        removal = columns.removal_order(readers, group.size, most=group.size - own[-1])
        # Each layer that reads a group loses something: a stream of many readers is no cheaper than they are together.
        mean = removal.errors[[group.size - width for width in own]] / len(readers)
        curves[group] = len(readers) * _as_noise(mean)
        kept = kept_units(group.size, removal.order, own[level])
        contents = None
        if group in tried:
            contents = {value.name or "": array for value, array in _without(group, kept, seen, ctx).items()}
        changes.append(Change(group.name, kinds[group], float(curves[group][level]), contents))
        first = (group.writers or group.readers)[0].node
        say_curve(ctx, first, {1 - width / group.size: float(e) for width, e in zip(own, curves[group], strict=True)})
    scales = error_weights(replace(ctx, data=judged), changes)
    found = {group: curve * scale for (group, curve), scale in zip(curves.items(), scales, strict=True)}
    return [found.get(group) for group in groups]


def _readers(
    groups: Sequence[ChannelGroup], ctx: Context
) -> Iterator[tuple[ChannelGroup, Mapping[LinearLayer, Moments]]]:
    """Yield each group with what the layers that read it read, as soon as the last of them has been seen."""
    graph = ctx.model.graph
    missing = {group: [one for one in true_readers(group) if one.node.graph is graph] for group in groups}
    seen: dict[ChannelGroup, dict[LinearLayer, Moments]] = {group: {} for group in groups}
    order = {node: place for place, node in enumerate(graph)}
    layers = {layer.node: layer for group in groups for layer in missing[group]}
    limit = rows_per_sample(len(ctx.data) if ctx.data is not None else 0)
    with SequentialMoments(ctx, compare=False, limit=limit) as moments:
        for node in sorted(layers, key=lambda node: order[node]):
            known = moments.of(layers[node], layers[node].input.name or "")
            for group in [group for group in missing if any(layer.node is node for layer in missing[group])]:
                layer = next(layer for layer in missing[group] if layer.node is node)
                missing[group].remove(layer)
                if known is not None:
                    seen[group][layer] = known
                if not missing[group]:
                    found = seen.pop(group)
                    if found:
                        yield group, found


def _without(
    group: ChannelGroup, kept: Array, seen: Mapping[LinearLayer, Moments], ctx: Context
) -> dict[ir.Value, Array]:
    """Return the weights, and biases, of the layers that read a group as they are best without some of its units."""
    found = zeroed(group, kept)
    for layer, moments in seen.items():
        units = read_units(group, layer)
        assert units is not None, "the layer reads the group"
        weight = layer.matrix().astype(np.float64)
        keep = np.append(kept, True)[units]
        moment = _moment(layer, moments, ctx)
        damping = columns.damping_for(moment, moments.rows)
        new = columns.refitted(weight, moment, keep=keep, damping=damping)
        found[layer.weight] = layer.from_matrix(new)
        bias = bias_of_layer(layer, ctx)
        if bias is None or bias.stored is None or len(bias.stored.uses()) > 1:
            continue
        lost = (weight - new).reshape(len(moments.mean), -1, weight.shape[1]) @ moments.mean[:, :, None]
        tensor = walk.constant_tensor(bias.stored)
        assert tensor is not None, "what is stored is a constant"
        whole = (bias_content(bias, len(new)) + lost.reshape(-1)) / bias.factor
        found[bias.stored] = whole.reshape(walk.dims(tensor)).astype(tensor.dtype.numpy())
    return found


def _moment(layer: LinearLayer, moments: Moments, ctx: Context) -> Array:
    """Return H, around the mean where a bias takes the mean."""
    bias = bias_of_layer(layer, ctx)
    return moments.covariance if isinstance(bias, LayerBias) else moments.second


def _as_noise(errors: Array) -> Array:
    """Return what is lost against what is left, of what is lost as a share of the whole.

    The last channels take little more with them than those before, but without them all is noise.
    """
    lost = np.minimum(errors, _MOST_LOST)
    return np.asarray(lost / (1.0 - lost))
