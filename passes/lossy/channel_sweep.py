"""Channels chosen and made up for, layer after layer: each on what the layers before it give by then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.channel_groups import ChannelGroup
from ..analyses.linear_layers import LinearLayer, linear_layers, readers_elsewhere
from ..analyses.second_moments import group_count, inputs_of
from ..solvers import columns
from ..solvers.objective import output_error
from .channel_choice import (
    Criterion,
    as_reader,
    kept_units,
    order_by_variance,
    order_by_weights,
    read_units,
    true_readers,
    zeroed,
)
from .layer_bias import LayerBias, bias_of
from .layer_targets import LayerTargets, Residual, Target
from .sequential_moments import Moments, SequentialMoments

# Shares of the mean of H's diagonal tried as ridge: with thousands of samples the least is best, with dozens more.
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
# Of a layer with more inputs, each try takes seconds: two must do.
_MANY_INPUTS = 2500
_FEW_DAMPINGS = (1e-2, 1e-1)


class ChannelSweep:
    """One sweep over the layers of a model: at the first layer that reads a group its channels are chosen, and every
    layer is solved anew, by least squares, for what it was to give. Removed channels are zero in the weights that read
    them; nothing has another shape yet.

    Args:
        ctx: Data and model.
        widths: Of each group to be cut, how many units are to stay.
        criterion: How units are chosen.
    """

    def __init__(self, ctx: Context, widths: Mapping[ChannelGroup, int], criterion: Criterion) -> None:
        self._ctx, self._widths, self._criterion = ctx, widths, criterion
        every = linear_layers(ctx.model)
        self._every = every
        self._layers = [layer for layer in every if layer.node.graph is ctx.model.graph]
        self._place = {layer.node: place for place, layer in enumerate(self._layers)}
        # Groups name the layers of their own analysis; nodes are the same.
        self._readers = {group: {one.node for one in true_readers(group)} for group in widths}
        self._hangs_on = _dependencies(ctx.model, self._place)
        self._changed, self._pending = 0, (1 << len(self._layers)) - 1
        self._known: dict[ir.Node, Target | None] = {}
        self._kept: dict[ChannelGroup, Array] = {}
        self._left: Counter[str] = Counter()
        self.solved = 0

    def run(self) -> dict[ChannelGroup, Array]:
        """Choose and solve, and return of each group which units stay, bool [size]."""
        with LayerTargets(self._ctx) as targets:
            self._targets = targets
            seen = {layer.node for layer in self._layers if targets.sees(layer)}
            for group, readers in self._readers.items():
                if self._criterion in ("l1", "l2") or not readers & seen:
                    criterion = "l2" if self._criterion == "obs" else self._criterion
                    self._cut(group, order_by_weights(group, criterion))
            for place, layer in enumerate(self._layers):
                if layer.node in seen:
                    self._settle(layer)
                self._pending &= ~(1 << place)
        for reason, count in self._left.items():
            self._ctx.left(f"layers whose weights make up for nothing: {count}, as {reason}", left=count)
        return self._kept

    def _settle(self, layer: LinearLayer) -> None:
        for group, readers in self._readers.items():
            if group not in self._kept and layer.node in readers:
                self._cut(group, self._order(group))
        keep, bias = self._kept_inputs(layer), bias_of_layer(layer, self._ctx)
        residual = self._residual(layer, bias)
        hangs = self._hangs_on.get(layer.input, 0) | (self._hangs_on.get(residual.other, 0) if residual else 0)
        if keep.all() and not hangs & self._changed:
            return
        reason = self._obstacle(layer)
        if reason is not None:
            self._left[reason] += 1
            self._changed |= 1 << self._place[layer.node]
            return
        target = self._target(layer)
        if target is not None:
            self._solve(layer, target, keep, bias)

    def _solve(self, layer: LinearLayer, target: Target, keep: Array, bias: LayerBias | None) -> None:
        """Write the weights and the bias that do best."""
        weight = layer.matrix().astype(np.float64)
        moment, cross = _around(target, bias)
        new = columns.refitted(
            weight, moment, keep=keep, cross=cross, damping=_best_damping(weight, target, keep, bias)
        )
        self._known.pop(layer.node, None)
        with np.errstate(over="ignore"):
            stored = layer.from_matrix(new)
        if not np.isfinite(stored.astype(np.float32)).all():
            self._left["what they read has no least squares solution"] += 1
            return
        shift = (
            target.wanted - _products(new, target.mean) - (bias_content(bias, len(new)) if target.with_bias else 0.0)
        )
        with self._ctx.rewriter.edit("refit", layer.node):
            self._ctx.rewriter.set_weight(layer.weight, stored)
            if bias is not None:
                bias.shift(shift, self._ctx)
        self._changed |= 1 << self._place[layer.node]
        self.solved += 1

    def _cut(self, group: ChannelGroup, order: Array) -> None:
        """Settle which units of a group go, and let nothing read them."""
        kept = kept_units(group.size, order, self._widths[group])
        self._kept[group] = kept
        with self._ctx.rewriter.edit("zero", *(layer.node for layer in group.readers)):
            for value, content in zeroed(group, kept).items():
                self._ctx.rewriter.set_weight(value, content)
        for layer in group.readers:
            self._changed |= 1 << self._place[layer.node]

    def _order(self, group: ChannelGroup) -> Array:
        """Return the units of a group that nobody has read yet, the least first."""
        covariances: dict[LinearLayer, Array] = {}
        readers: list[columns.Reader] = []
        later = []
        for layer in self._layers:
            if layer.node not in self._readers[group] or not self._targets.sees(layer):
                continue
            if self._hangs_on.get(layer.input, 0) & self._pending:
                later.append(layer)
                continue
            target, bias = self._target(layer), bias_of_layer(layer, self._ctx)
            if target is None:
                continue
            covariances[layer] = target.covariance
            if self._criterion == "obs":
                keep = self._kept_inputs(layer)
                moment, cross = _around(target, bias)
                moment = moment * (keep[:, :, None] & keep[:, None, :])
                damping = columns.damping_for(moment, target.rows)
                weight = columns.refitted(layer.matrix(), moment, keep=keep, cross=cross, damping=damping)
                readers.append(as_reader(group, layer, weight, moment, target.rows))
        for layer, known in self._ahead(later).items():
            covariances[layer] = known.covariance
            readers.append(as_reader(group, layer, layer.matrix(), known.covariance, known.rows))
        if self._criterion == "variance":
            return order_by_variance(group, covariances)
        most = group.size - self._widths[group]
        return columns.removal_order(readers, group.size, most=most).order

    def _ahead(self, layers: Sequence[LinearLayer]) -> dict[LinearLayer, Moments]:
        """Return the moments of what layers read that come after others still to be solved."""
        found: dict[LinearLayer, Moments] = {}
        if layers:
            with SequentialMoments(self._ctx, compare=False) as moments:
                for layer in layers:
                    known = moments.of(layer, layer.input.name or "")
                    if known is not None:
                        found[layer] = known
        return found

    def _target(self, layer: LinearLayer) -> Target | None:
        if layer.node not in self._known:
            residual = self._residual(layer, bias_of_layer(layer, self._ctx))
            self._known[layer.node] = self._targets.of(layer, residual)
        return self._known[layer.node]

    def _residual(self, layer: LinearLayer, bias: LayerBias | None) -> Residual | None:
        """Return the sum a layer's output is a term of, if the other term is ready."""
        if layer.node.op_type == "ConvTranspose" or (bias is None and len(layer.node.inputs) > 2):
            return None
        made = (bias.adder if bias is not None else layer.node).outputs[0]
        uses = list(made.uses())
        if len(uses) != 1 or made.is_graph_output() or not walk.is_onnx_op(uses[0].node, "Add"):
            return None
        other, total = uses[0].node.inputs[1 - uses[0].idx], uses[0].node.outputs[0]
        if other is None or other is made or walk.constant_tensor(other) is not None:
            return None
        dims = [shapes.dims_of(value) for value in (made, other, total)]
        ready = not self._hangs_on.get(other, 0) & self._pending
        return Residual(other, total) if ready and dims[0] is not None and dims[0] == dims[1] == dims[2] else None

    def _kept_inputs(self, layer: LinearLayer) -> Array:
        """Return which inputs of a layer are still read, bool [groups, inputs]."""
        keep = np.ones((group_count(layer), inputs_of(layer)), bool)
        for group, kept in self._kept.items():
            if layer.node in self._readers[group]:
                units = read_units(group, layer)
                assert units is not None, "the layer reads the group"
                keep &= np.append(kept, True)[units]
        return keep

    def _obstacle(self, layer: LinearLayer) -> str | None:
        """Return why a layer's weight must stay as it is, if so."""
        if layer.weight.is_graph_output():
            return "their weight is an output of the model"
        if readers_elsewhere(layer, self._every) or sum(one.weight is layer.weight for one in self._every) > 1:
            return "their weight is read elsewhere too"
        if layer.node.op_type == "Gemm" and layer.node.attributes.get_float("alpha", 1.0) != 1.0:
            return "their product is multiplied by a number"
        return None


def _dependencies(model: ir.Model, place: Mapping[ir.Node, int]) -> dict[ir.Value, int]:
    """Return on which layers each value of the main graph hangs, as bits."""
    found: dict[ir.Value, int] = {}
    for node in model.graph:
        own = 1 << place[node] if node in place else 0
        for value in walk.values_read(node):
            own |= found.get(value, 0)
        for value in node.outputs:
            found[value] = own
    return found


def bias_of_layer(layer: LinearLayer, ctx: Context) -> LayerBias | None:
    """Return a layer's bias, or where one may be put; None where there can be none."""
    if layer.weight_index != 1:
        return None
    weight = walk.constant_tensor(layer.weight)
    assert weight is not None, "a linear layer has a constant weight"
    groups = group_count(layer) if layer.node.op_type == "ConvTranspose" else 1
    found = bias_of(layer.node, walk.dims(weight)[layer.output_axis] * groups, ctx)
    return found if isinstance(found, LayerBias) and found.scales is None else None


def _around(target: Target, bias: LayerBias | None) -> tuple[Array, Array]:
    """Return H and E[y x̂ᵀ], around the means where there is a bias to take these."""
    if bias is None:
        return target.second, target.cross
    return target.covariance, target.cross_covariance


def _best_damping(weight: Array, target: Target, keep: Array, bias: LayerBias | None) -> float:
    """Return the ridge with which what is solved on half of the rows does best on the other half."""
    usual = columns.damping_for(target.covariance, target.rows)
    if len(target.halves) < 2:
        return usual
    (moment, cross), (others, other_cross) = (_around(half, bias) for half in target.halves)
    best, least = usual, np.inf
    for damping in _DAMPINGS if weight.shape[1] <= _MANY_INPUTS else _FEW_DAMPINGS:
        new = columns.refitted(weight, moment, keep=keep, cross=cross, damping=damping)
        # E|y − Ŵ x̂|² but for E|y|², which is the same for all.
        error = output_error(new, others.astype(np.float64)) - 2 * float(np.vdot(new, other_cross))
        if error < least:
            best, least = damping, error
    return best


def _products(weight: Array, mean: Array) -> Array:
    """Return W E[x̂], float64 [outputs], of a mean [groups, inputs]."""
    by_group = weight.reshape(len(mean), -1, weight.shape[1])
    return np.asarray((by_group @ mean[:, :, None]).reshape(-1))


def bias_content(bias: LayerBias | None, outputs: int) -> Array:
    """Return what a bias adds to each output, float64 [outputs]."""
    tensor = walk.constant_tensor(bias.stored) if bias is not None else None
    if bias is None or tensor is None:
        return np.zeros(outputs)
    return np.asarray(tensor.numpy().astype(np.float64).reshape(-1) * bias.factor)
