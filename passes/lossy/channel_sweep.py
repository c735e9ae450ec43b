"""Channels chosen and made up for, layer after layer: each on what the layers before it give by then."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.channel_groups import ChannelGroup
from ..analyses.linear_layers import LinearLayer, linear_layers
from ..analyses.second_moments import group_count, inputs_of
from ..solvers import columns
from ..solvers.blas_threads import threads_for
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
from .channel_gradients import orders_by_gradient
from .layer_bias import LayerBias, bias_of_layer
from .layer_targets import LayerTargets, Residual, Target, residual_of
from .sequential_moments import Moments, SequentialMoments
from .solved_layers import why_fixed

# Shares of the mean of H's diagonal tried as ridge: with thousands of samples the least is best, with dozens more.
_DAMPINGS = (1e-3, 1e-2, 1e-1, 1.0)
# Of a layer with more inputs, each try takes seconds: two must do.
_MANY_INPUTS = 2500
_FEW_DAMPINGS = (1e-2, 1e-1)
_UNSEEN = "what they read cannot be looked at"


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
        self._every = linear_layers(ctx.model)
        self._layers = [layer for layer in self._every if layer.node.graph is ctx.model.graph]
        # One bit for each layer; those of nested graphs are cut with the others, but never solved anew.
        self._bits = {layer.node: 1 << place for place, layer in enumerate(self._every)}
        # Groups name the layers of their own analysis; nodes are the same.
        self._readers = {group: {one.node for one in true_readers(group)} for group in widths}
        self._hangs_on = _dependencies(ctx.model, self._bits)
        self._changed, self._pending = 0, sum(self._bits[layer.node] for layer in self._layers)
        self._known: dict[ir.Node, Target | None] = {}
        self._kept: dict[ChannelGroup, Array] = {}
        self._left: Counter[str] = Counter()
        self.solved = 0

    def run(self) -> dict[ChannelGroup, Array]:
        """Choose and solve, and return of each group which units stay, bool [size]."""
        with LayerTargets(self._ctx) as targets:
            self._targets = targets
            seen = {layer.node for layer in self._layers if targets.sees(layer)}
            orders = orders_by_gradient(self._widths, self._ctx) if self._criterion == "taylor" else {}
            for group, order in orders.items():
                self._cut(group, order)
            for group, readers in self._readers.items():
                if group in self._kept:
                    continue
                if self._criterion in ("l1", "l2") or not readers & seen:
                    self._cut(group, self._order_unseen(group))
            for layer in self._ctx.track(self._layers, "choosing channels"):
                if layer.node in seen:
                    with threads_for(inputs_of(layer)):
                        self._settle(layer)
                self._pending &= ~self._bits[layer.node]
        self._left[_UNSEEN] += len(set().union(*self._readers.values()) - seen)
        for reason, count in (+self._left).items():
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
        reason = why_fixed(layer, self._every)
        target = self._target(layer) if reason is None else None
        if target is None:
            self._left[reason or _UNSEEN] += 1
            self._changed |= self._bits[layer.node]
            return
        self._solve(layer, target, keep, bias)

    def _solve(self, layer: LinearLayer, target: Target, keep: Array, bias: LayerBias | None) -> None:
        """Write the weights and the bias that do best."""
        weight = layer.matrix().astype(np.float64)
        moment, cross = target.around(centred=bias is not None)
        new = columns.refitted(
            weight, moment, keep=keep, cross=cross, damping=_best_damping(weight, target, keep, bias)
        )
        self._known.pop(layer.node, None)
        with np.errstate(over="ignore"):
            stored = layer.from_matrix(new)
        if not np.isfinite(stored.astype(np.float32)).all():
            self._left["what they read has no least squares solution"] += 1
            return
        with self._ctx.rewriter.edit("refit", layer.node):
            self._ctx.rewriter.set_weight(layer.weight, stored)
            if bias is not None:
                bias.shift(target.shift(new, bias), self._ctx)
        self._changed |= self._bits[layer.node]
        self.solved += 1

    def _cut(self, group: ChannelGroup, order: Array) -> None:
        """Settle which units of a group go, and let nothing read them."""
        kept = kept_units(group.size, order, self._widths[group])
        self._kept[group] = kept
        with self._ctx.rewriter.edit("zero", *(layer.node for layer in group.readers)):
            for value, content in zeroed(group, kept).items():
                self._ctx.rewriter.set_weight(value, content)
        for layer in group.readers:
            self._changed |= self._bits[layer.node]

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
                moment, cross = target.around(centred=bias is not None)
                moment = moment * (keep[:, :, None] & keep[:, None, :])
                damping = columns.damping_for(moment, target.rows)
                weight = columns.refitted(layer.matrix(), moment, keep=keep, cross=cross, damping=damping)
                readers.append(as_reader(group, layer, weight, moment, target.rows))
        for layer, known in self._ahead(later).items():
            covariances[layer] = known.covariance
            readers.append(as_reader(group, layer, layer.matrix(), known.covariance, known.rows))
        if not covariances:
            return self._order_unseen(group)
        if self._criterion == "variance":
            return order_by_variance(group, covariances)
        most = group.size - self._widths[group]
        return columns.removal_order(readers, group.size, most=most).order

    def _order_unseen(self, group: ChannelGroup) -> Array:
        """Return the units of a group by its weights alone."""
        return order_by_weights(group, "l1" if self._criterion == "l1" else "l2")

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
        found = residual_of(layer, bias)
        ready = found is not None and not self._hangs_on.get(found.other, 0) & self._pending
        return found if ready else None

    def _kept_inputs(self, layer: LinearLayer) -> Array:
        """Return which inputs of a layer are still read, bool [groups, inputs]."""
        keep = np.ones((group_count(layer), inputs_of(layer)), bool)
        for group, kept in self._kept.items():
            if layer.node in self._readers[group]:
                units = read_units(group, layer)
                assert units is not None, "the layer reads the group"
                keep &= np.append(kept, True)[units]
        return keep


def _dependencies(model: ir.Model, bits: Mapping[ir.Node, int]) -> dict[ir.Value, int]:
    """Return on which layers each value of the main graph hangs, as bits."""
    found: dict[ir.Value, int] = {}
    for node in model.graph:
        own = bits.get(node, 0)
        for nested in walk.nodes_within(node):
            own |= bits.get(nested, 0)
        for value in walk.values_read(node):
            own |= found.get(value, 0)
        for value in node.outputs:
            found[value] = own
    return found


def _best_damping(weight: Array, target: Target, keep: Array, bias: LayerBias | None) -> float:
    """Return the ridge with which what is solved on half of the rows does best on the other half."""
    usual = columns.damping_for(target.covariance, target.rows)
    if len(target.halves) < 2:
        return usual
    centred = bias is not None
    (moment, cross), (others, other_cross) = (half.around(centred=centred) for half in target.halves)
    best, least = usual, np.inf
    for damping in _DAMPINGS if weight.shape[1] <= _MANY_INPUTS else _FEW_DAMPINGS:
        new = columns.refitted(weight, moment, keep=keep, cross=cross, damping=damping)
        # E|y − Ŵ x̂|² but for E|y|², which is the same for all.
        error = output_error(new, others.astype(np.float64)) - 2 * float(np.vdot(new, other_cross))
        if error < least:
            best, least = damping, error
    return best
