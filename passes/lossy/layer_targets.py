"""What linear layers are to give, and what they now read to give it from, while the layers before them change."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.token_inputs import mask_of
from graphopt.walkthrough import Closing

from ..analyses.covariance import Covariance, around_zero, parts
from ..analyses.layer_rows import layer_rows, output_rows, takes_rows
from ..analyses.linear_layers import LinearLayer, linear_layers
from ..analyses.padding import only, real_rows
from ..analyses.second_moments import group_count, inputs_of
from ..solvers.objective import by_group
from .layer_bias import LayerBias, bias_content, product_scale

# Rows looked at of all samples together, where these have so many: of one image they are much alike, so that as many
# for each input of a layer as solve it well on other images too.
_ROWS = 1 << 16
_ROWS_PER_INPUT = 32


@dataclass(frozen=True, eq=False)
class Residual:
    """A sum that a layer's output is one of two terms of.

    Attributes:
        other: The other term, which does not hang on the layer.
        total: The sum.
    """

    other: ir.Value
    total: ir.Value


def residual_of(layer: LinearLayer, bias: LayerBias | None) -> Residual | None:
    """Return the sum that what a layer gives is one of two terms of, and read by nothing else.

    Whether the other term is what it is going to be is for the caller to know.

    Args:
        layer: A layer of the main graph, shapes inferred.
        bias: Its bias, as `bias_of_layer` finds it.
    """
    if layer.node.op_type == "ConvTranspose" or (bias is None and len(layer.node.inputs) > 2):
        return None  # what is padded is no product, and what is added is not known
    if product_scale(layer) != 1:
        return None  # the other term is not multiplied with it
    made = (bias.adder if bias is not None else layer.node).outputs[0]
    uses = list(made.uses())
    if len(uses) != 1 or made.is_graph_output() or not walk.is_onnx_op(uses[0].node, "Add"):
        return None
    other, total = uses[0].node.inputs[1 - uses[0].idx], uses[0].node.outputs[0]
    if other is None or walk.constant_tensor(other) is not None:
        return None
    dims = [shapes.dims_of(value) for value in (made, other, total)]
    return Residual(other, total) if dims[0] is not None and dims[0] == dims[1] == dims[2] else None


@dataclass(frozen=True, eq=False)
class Target:
    """A least squares problem: what a layer is to give, y, from what it reads, x̂.

    Attributes:
        covariance: E[x̂ x̂ᵀ] around the mean, float32 [groups, inputs, inputs].
        cross_covariance: E[y x̂ᵀ] around the means, float64 [outputs, inputs].
        mean: E[x̂], float64 [groups, inputs].
        wanted: E[y], float64 [outputs].
        with_bias: Whether the layer's bias is part of y.
        rows: How many rows these are of.
        halves: The problems of every other batch, and of those between, where there are both: what is solved on one
            can be judged by the other.
    """

    covariance: Array
    cross_covariance: Array
    mean: Array
    wanted: Array
    with_bias: bool
    rows: int
    halves: tuple[Target, ...] = ()

    def around(self, *, centred: bool) -> tuple[Array, Array]:
        """Return E[x̂ x̂ᵀ] and E[y x̂ᵀ], around the means or not."""
        if centred:
            return self.covariance, self.cross_covariance
        return self.second, self.cross_covariance + _product(self.wanted, self.mean)

    @property
    def second(self) -> Array:
        """E[x̂ x̂ᵀ], a new float32 [groups, inputs, inputs]."""
        return around_zero(self.covariance.copy(), self.mean)

    def shift(self, weight: Array, bias: LayerBias | None) -> Array:
        """Return what a bias has to grow by, float64 [outputs], for a weight [outputs, inputs] to give the mean."""
        products = by_group(weight.astype(np.float64), self.covariance) @ self.mean[:, :, None]
        found: Array = self.wanted - products.reshape(-1)
        return found - bias_content(bias, len(found)) if self.with_bias else found


def rows_per_sample(samples: int, inputs: int = 0) -> int:
    """Return how many rows of each sample are looked at, for a layer with so many inputs."""
    return -(-max(_ROWS, _ROWS_PER_INPUT * inputs) // max(samples, 1))


class LayerTargets(Closing):
    """Targets of layers, asked for in graph order, each after the layers before it were changed.

    A layer is to give what it gave in the model as it was. At the end of a residual block the sum is to be what it was,
    so that the layer makes up for what the other term lost as well.

    Args:
        ctx: Calibration data and the model; neither changed yet.
    """

    def __init__(self, ctx: Context) -> None:
        assert ctx.data is not None, "the pass did not declare that it needs calibration data"
        self._graph, self._samples = ctx.model.graph, max(len(ctx.data), 1)
        copy = ctx.model.clone()
        # Weights of the copy stay what they were, whatever becomes of the model's.
        self._were = {now.node: was for now, was in zip(linear_layers(ctx.model), linear_layers(copy), strict=True)}
        self._mask = mask_of(ctx.model)
        self._cuts: Mapping[tuple[str, int], Array] = {}
        self._values = {value.name or "": value for value in copy.graph.inputs}
        self._values.update({value.name or "": value for node in copy.graph for value in node.outputs})
        with ExitStack() as stack:
            self._now = stack.enter_context(ctx.walkthrough())
            self._before = stack.enter_context(ctx.walkthrough(copy))
            self._stack = stack.pop_all()

    def sees(self, layer: LinearLayer) -> bool:
        """Return whether a layer's input can be looked at: a computed value of the main graph, taken row by row."""
        return layer.node.graph is self._graph and walk.constant_tensor(layer.input) is None and takes_rows(layer)

    def of(self, layer: LinearLayer, residual: Residual | None = None) -> Target | None:
        """Return what a layer is to give; None where what it reads is not finite, or nothing.

        Args:
            layer: A layer that is seen, as the model now has it.
            residual: The sum to restore, or None to restore the layer's own output.
        """
        halves, was = [_Sums(), _Sums()], self._were.get(layer.node, layer)
        if group_count(was) != group_count(layer):
            return None
        if residual is not None:
            for turn, (rows, targets) in enumerate(self._of_sum(layer, residual)):
                halves[turn % 2].update(rows, targets)
            return _settled(halves, with_bias=True)
        weight = self._taken(was.matrix().astype(np.float64), was.node.outputs[0], _channel_axis(was), 0)
        groups, inputs = group_count(was), inputs_of(was)
        by_group = weight.reshape(groups, -1, inputs)
        # Of two ways to the same, the one with fewer products.
        of_outputs = by_group.shape[1] < inputs
        single = by_group.astype(np.float32)
        for turn, (rows, were) in enumerate(self._of_inputs(layer, was)):
            halves[turn % 2].update(rows, were @ single.transpose(0, 2, 1) if of_outputs else were)
        through = None if of_outputs else by_group
        return _settled(halves, with_bias=False, through=through)

    def _of_sum(self, layer: LinearLayer, residual: Residual) -> Iterator[tuple[Array, Array]]:
        limit = self._limit(layer)
        sums = self._before.batches(self._values[residual.total.name or ""])
        for (x, other, *mask), (total,) in zip(self._batches(layer.input, residual.other), sums, strict=True):
            real = real_rows(layer, x, mask)
            rows = layer_rows(layer, only(real, x), limit=limit)
            axis = _channel_axis(layer)
            wanted = self._taken(total, residual.total, axis, axis)
            targets = output_rows(layer, only(real, np.subtract(wanted, other)), limit=limit)
            yield rows, targets.reshape(len(targets), len(rows), -1).transpose(1, 0, 2)

    def _of_inputs(self, layer: LinearLayer, was: LinearLayer) -> Iterator[tuple[Array, Array]]:
        limit = self._limit(layer)
        were = self._before.batches(was.input)
        for (x, *mask), (old,) in zip(self._batches(layer.input), were, strict=True):
            real = real_rows(layer, x, mask)
            yield layer_rows(layer, only(real, x), limit=limit), layer_rows(was, only(real, old), limit=limit)

    def _batches(self, *values: ir.Value) -> Iterator[tuple[Array, ...]]:
        """Yield what values hold by now, and last what the model's mask holds, where it has one."""
        return self._now.batches(*values, *([self._mask] if self._mask is not None else []))

    def narrow(self, kept: Mapping[tuple[str, int], Array]) -> None:
        """Take note that channels are gone from the model by now, so that layers are to give only what is left.

        Args:
            kept: By name and axis of values, axes counted from the front: bool [their length before].
        """
        self._cuts = kept

    def _taken(self, array: Array, value: ir.Value, axis: int, along: int) -> Array:
        """Return what is left of an array along one of its axes, which is an axis of a value, from either end."""
        rank = len(value.shape) if value.shape is not None else 0
        kept = self._cuts.get((value.name or "", axis % max(rank, 1)))
        return array if kept is None else np.asarray(array.take(np.flatnonzero(kept), along))

    def _limit(self, layer: LinearLayer) -> int:
        return rows_per_sample(self._samples, inputs_of(layer))

    def close(self) -> None:
        """Let go of everything kept."""
        self._stack.close()


def _channel_axis(layer: LinearLayer) -> int:
    """Return which axis of a layer's output its outputs are, from either end."""
    if layer.node.op_type.startswith("Conv"):
        return 1
    return -1 if layer.weight_index == 1 else -2


class _Sums:
    """Moments of rows x̂ together with others, y, both taken around the mean of their first batch."""

    def __init__(self) -> None:
        self._rows = Covariance()
        self._origins: tuple[Array, Array] | None = None
        self._products = self._sum = np.zeros(())

    def update(self, rows: Array, others: Array) -> None:
        """Add rows, float32 [groups, rows, inputs] and [groups, rows, outputs]."""
        if not rows.shape[1]:
            return
        if self._origins is None:
            x, y = (one.mean(axis=1, keepdims=True, dtype=np.float64) for one in (rows, others))
            self._origins = x.astype(np.float32), y.astype(np.float32)
            self._products = np.zeros((len(rows), others.shape[2], rows.shape[2]))
        self._rows.update(rows)
        with np.errstate(all="ignore"):  # what overflows is not finite, which `is_known` tells
            y = others - self._origins[1]
            self._products += y.transpose(0, 2, 1) @ (rows - self._origins[0])
            self._sum = self._sum + y.sum(axis=1, dtype=np.float64)

    @property
    def count(self) -> int:
        """How many rows there were."""
        return self._rows.count

    @property
    def is_known(self) -> bool:
        """Whether there were rows, and all of them finite."""
        return self._rows.is_known and bool(np.isfinite(self._products).all())

    def target(self, *, with_bias: bool, through: Array | None = None) -> Target:
        """Return the problem.

        Args:
            with_bias: Whether the layer's bias is part of what it is to give.
            through: What the others are multiplied by to be that, [groups, outputs of a group, inputs].
        """
        assert self._origins is not None, "there were rows"
        x_origin, y_origin = (one[:, 0].astype(np.float64) for one in self._origins)
        mean, y_mean = self._rows.mean(), self._sum / self._rows.count
        cross = self._products / self._rows.count - y_mean[:, :, None] * (mean - x_origin)[:, None, :]
        wanted = y_mean + y_origin
        if through is not None:
            cross, wanted = through @ cross, (through @ wanted[:, :, None])[:, :, 0]
        flat = cross.reshape(-1, cross.shape[2])
        return Target(self._rows.covariance(), flat, mean, wanted.reshape(-1), with_bias, self.count)


def _settled(sums: list[_Sums], *, with_bias: bool, through: Array | None = None) -> Target | None:
    """Return the problem of all rows; None where one holds what is not finite. Of the sums, which are large, none stay.

    Args:
        sums: Those of halves of the batches; empty afterwards.
        with_bias: Whether the layer's bias is part of what it is to give.
        through: As `_Sums.target` takes it.
    """
    counts, halves = np.array([one.count for one in sums if one.count]), []
    while sums:
        half = sums.pop(0)
        if half.is_known:
            halves.append(half.target(with_bias=with_bias, through=through))
    return _whole(counts, halves) if halves and len(halves) == len(counts) else None


def _whole(counts: Array, halves: Sequence[Target]) -> Target:
    """Return the problem of all rows from those of halves of so many rows."""
    if len(halves) == 1:
        return halves[0]
    pairs = list(zip(counts / counts.sum(), halves, strict=True))
    mean = np.sum([share * half.mean for share, half in pairs], axis=0)
    wanted = np.sum([share * half.wanted for share, half in pairs], axis=0)
    covariance, cross = np.empty_like(halves[0].covariance), np.zeros(halves[0].cross_covariance.shape)
    for share, half in pairs:
        # Each around its own mean, and the halves' means around that of all.
        cross += share * (half.cross_covariance + _product(half.wanted - wanted, half.mean - mean))
    for part in parts(covariance.shape[1]):
        covariance[:, part] = sum(share * _around(half, mean, part) for share, half in pairs)
    return Target(covariance, cross, mean, wanted, halves[0].with_bias, int(counts.sum()), tuple(halves))


def _around(half: Target, mean: Array, part: slice) -> Array:
    """Return some rows of E[(x̂ − mean) (x̂ − mean)ᵀ], float64."""
    away = half.mean - mean
    return np.asarray(half.covariance[:, part] + away[:, part, None] * away[:, None, :])


def _product(outputs: Array, inputs: Array) -> Array:
    """Return y xᵀ of [outputs] and [groups, inputs], each group of outputs with its own inputs: [outputs, inputs]."""
    found = outputs.reshape(len(inputs), -1)[:, :, None] * inputs[:, None, :]
    return np.asarray(found.reshape(-1, inputs.shape[1]))
