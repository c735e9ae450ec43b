"""Which layers could share a weight, and how well: what each reads, what it counts, and groups by least cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.finite_weights import finite_matrix
from ..analyses.linear_layers import LinearLayer
from ..analyses.output_damage import Change, error_weights, tried_of
from ..analyses.second_moments import ROWS_PER_SAMPLE, SUMS_LIMIT, group_count, inputs_of
from ..analyses.selection import Selection
from ..solvers.common_weights import Pool, merges, pool_of, shrunk
from .layer_bias import bias_for_mean, bias_of_layer, product_scale
from .sequential_moments import Moments, SequentialMoments

# Bytes of a number of a second moment while groups are found.
_MOMENT_BYTES = 8


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that are to share a weight.

    Attributes:
        layers: The layers, in graph order.
        weight: The weight, [outputs, inputs].
        errors: What each loses of its output's power, as a share.
    """

    layers: tuple[LinearLayer, ...]
    weight: Array
    errors: tuple[float, ...]


def alike(layers: Iterable[LinearLayer], selection: Selection, ctx: Context) -> list[list[LinearLayer]]:
    """Return layers whose weights could take one another's place, in classes of two and more, and say what is left."""
    classes: dict[tuple[object, ...], list[LinearLayer]] = {}
    left: Counter[str] = Counter()
    for layer in layers:
        if not selection.allows(layer.node):
            continue
        obstacle = _obstacle(layer, ctx)
        if obstacle is not None:
            left[obstacle] += 1
        else:
            classes.setdefault(_kind(layer), []).append(layer)
    left["no other layer has a weight of their shape"] = sum(len(one) == 1 for one in classes.values())
    for reason, count in left.items():
        if count:
            ctx.left(f"layers left: {count}, as {reason}", left=count)
    return [one for one in classes.values() if len(one) > 1]


def _kind(layer: LinearLayer) -> tuple[object, ...]:
    """Return what layers must have in common to share a weight."""
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"
    place = layer.weight_index, layer.output_axis, group_count(layer), product_scale(layer)
    return layer.node.op_type, layer.dims, tensor.dtype, *place


def _obstacle(layer: LinearLayer, ctx: Context) -> str | None:
    """Return why a layer's weight must stay its own, or None."""
    if layer.node.graph is not ctx.model.graph:
        return "they are in a subgraph or function"
    if layer.weight.is_graph_output():
        return "their weight is an output of the model"
    if len(layer.weight.uses()) > 1:
        return "their weight is shared already"
    return None


class Similarity:
    """How alike layers are.

    Args:
        classes: As `alike` gives them; none changed yet.
        ctx: Calibration data, or none: then all inputs count alike.

    Raises:
        PassError: A weight holds NaN or infinity.
    """

    def __init__(self, classes: Sequence[Sequence[LinearLayer]], ctx: Context) -> None:
        order = {node: place for place, node in enumerate(ctx.model.graph)}
        self.layers = sorted((layer for one in classes for layer in one), key=lambda layer: order[layer.node])
        places = {layer: place for place, layer in enumerate(self.layers)}
        self._classes = [[places[layer] for layer in one] for one in classes]
        self._means: list[Array | None] = []
        self._pools = self._look(ctx)
        self._powers = [pool.error_at(np.zeros(1)) or 1.0 for pool in self._pools]
        self._counts = [1.0] * len(self.layers)

    def weigh(self, ctx: Context) -> None:
        """Find out what an error of each layer does to the outputs of the model, and count it so from now on."""
        kinds = [_kind(layer) for layer in self.layers]
        chosen = set(tried_of(kinds))
        nearest = self._nearest()
        changes = [
            self._change(place, nearest[place], ctx if place in chosen else None, kinds[place])
            for place in range(len(self.layers))
        ]
        self._counts = error_weights(ctx, changes)

    def groups(self, *, save: float = np.inf, error: float = np.inf) -> list[Group]:
        """Return layers that are to share weights, those that cost the outputs least.

        Args:
            save: How many numbers are to be left out.
            error: The most that layers may lose of their output's power, the mean of all.
        """
        scaled = zip(self._pools, self._powers, self._counts, strict=True)
        pools = [pool.scaled(count / power) for pool, power, count in scaled]
        found: dict[tuple[int, ...], Pool] = {}
        errors = np.zeros(len(self.layers))
        for merge in merges(self._classes, pools, save):
            lost = errors.copy()
            for place in merge.members:
                lost[place] = self._error(place, merge.pool.weight)
            if lost.mean() > error:
                break
            errors = lost
            found = {members: pool for members, pool in found.items() if not set(members) <= set(merge.members)}
            found[merge.members] = merge.pool
        return [self._group(members, pool, errors) for members, pool in sorted(found.items())]

    def _group(self, members: Sequence[int], pool: Pool, errors: Array) -> Group:
        matrix = pool.weight.reshape(-1, pool.weight.shape[2])
        lost = tuple(float(errors[place]) for place in members)
        return Group(tuple(self.layers[place] for place in members), matrix, lost)

    def _look(self, ctx: Context) -> list[Pool]:
        """Return what is known of each layer by itself."""
        sizes = [group_count(layer) * inputs_of(layer) ** 2 * _MOMENT_BYTES for layer in self.layers]
        whole = sum(sizes) <= SUMS_LIMIT
        if not whole and ctx.data is not None:
            ctx.note("too many inputs to look at all that go together: each counts by itself")
        pools = []
        with ExitStack() as stack:
            moments = None
            if ctx.data is not None:
                moments = stack.enter_context(SequentialMoments(ctx, compare=False, limit=ROWS_PER_SAMPLE))
            for layer in self.layers:
                matrix = finite_matrix(layer)
                seen = moments.of(layer, layer.input.name or "") if moments is not None else None
                moment = _moment(layer, seen, ctx)
                if moment is not None and not whole:
                    moment = np.diagonal(moment, axis1=1, axis2=2)
                self._means.append(None if seen is None else seen.mean)
                pools.append(pool_of(matrix.reshape(group_count(layer), -1, matrix.shape[1]), moment))
        return pools

    def _nearest(self) -> list[int]:
        """Return of each layer the one of its class whose weight is nearest."""
        found = [0] * len(self.layers)
        for places in self._classes:
            for place in places:
                others = [other for other in places if other != place]
                costs = [self._pools[place].quick_cost(self._pools[other]) / self._powers[other] for other in others]
                found[place] = others[int(np.argmin(costs))]
        return found

    def _change(self, place: int, other: int, ctx: Context | None, kind: tuple[object, ...]) -> Change:
        """Return what becomes of a layer if it shares a weight with another one; with a context, for a try."""
        own, its = (self._pools[one].scaled(1 / self._powers[one]) for one in (place, other))
        weight = own.join(its)[0].weight
        name, contents = walk.label(self.layers[place].node), None
        if ctx is not None:
            contents = self._contents(place, weight.reshape(-1, weight.shape[2]), ctx)
        return Change(name, kind, self._error(place, weight), contents)

    def _contents(self, place: int, weight: Array, ctx: Context) -> Mapping[str, Array]:
        """Return what constants hold once a layer has another weight, by name."""
        layer, mean = self.layers[place], self._means[place]
        contents = {layer.weight.name or "": layer.from_matrix(weight)}
        bias = bias_of_layer(layer, ctx)
        if mean is not None and bias is not None and bias.stored is not None:
            contents[bias.stored.name or ""] = bias_for_mean(bias, layer.matrix() - weight, mean)
        return contents

    def _error(self, place: int, weight: Array) -> float:
        return self._pools[place].error_at(weight) / self._powers[place]


def _moment(layer: LinearLayer, seen: Moments | None, ctx: Context) -> Array | None:
    """Return H of a layer, around the mean where a bias takes the mean."""
    if seen is None:
        return None
    return shrunk(seen.second if bias_of_layer(layer, ctx) is None else seen.covariance, seen.rows)
