"""What linear layers are to give, and what they now read to give it from, while the layers before them change."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.covariance import Covariance
from ..analyses.layer_rows import layer_rows, output_rows, takes_rows
from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import group_count, inputs_of

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


@dataclass(frozen=True, eq=False)
class Target:
    """A least squares problem: what a layer is to give, y, from what it reads, x̂.

    Attributes:
        second: E[x̂ x̂ᵀ], float32 [groups, inputs, inputs].
        covariance: The same around the mean.
        cross: E[y x̂ᵀ], float64 [outputs, inputs].
        cross_covariance: The same around the means.
        mean: E[x̂], float64 [groups, inputs].
        wanted: E[y], float64 [outputs].
        with_bias: Whether the layer's bias is part of y.
    """

    second: Array
    covariance: Array
    cross: Array
    cross_covariance: Array
    mean: Array
    wanted: Array
    with_bias: bool


def rows_per_sample(samples: int, inputs: int = 0) -> int:
    """Return how many rows of each sample are looked at, for a layer with so many inputs."""
    return -(-max(_ROWS, _ROWS_PER_INPUT * inputs) // max(samples, 1))


class LayerTargets:
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
        found = _Sums()
        if residual is not None:
            for rows, targets in self._of_sum(layer, residual):
                found.update(rows, targets)
            return found.target(with_bias=True) if found.is_known else None
        weight = layer.matrix().astype(np.float64)
        groups, inputs = group_count(layer), inputs_of(layer)
        by_group = weight.reshape(groups, -1, inputs)
        # Of two ways to the same, the one with fewer products.
        of_outputs = by_group.shape[1] < inputs
        single = by_group.astype(np.float32)
        for rows, were in self._of_inputs(layer):
            found.update(rows, were @ single.transpose(0, 2, 1) if of_outputs else were)
        if not found.is_known:
            return None
        return found.target(with_bias=False, through=None if of_outputs else by_group)

    def _of_sum(self, layer: LinearLayer, residual: Residual) -> Iterator[tuple[Array, Array]]:
        limit = self._limit(layer)
        sums = self._before.batches(self._values[residual.total.name or ""])
        for (x, other), (total,) in zip(self._now.batches(layer.input, residual.other), sums, strict=True):
            rows = layer_rows(layer, x, limit=limit)
            targets = output_rows(layer, np.subtract(total, other), limit=limit)
            yield rows, targets.reshape(len(targets), len(rows), -1).transpose(1, 0, 2)

    def _of_inputs(self, layer: LinearLayer) -> Iterator[tuple[Array, Array]]:
        limit = self._limit(layer)
        were = self._before.batches(self._values[layer.input.name or ""])
        for (x,), (was,) in zip(self._now.batches(layer.input), were, strict=True):
            yield layer_rows(layer, x, limit=limit), layer_rows(layer, was, limit=limit)

    def _limit(self, layer: LinearLayer) -> int:
        return rows_per_sample(self._samples, inputs_of(layer))

    def close(self) -> None:
        """Let go of everything kept."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


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
        around_zero = cross + wanted[:, :, None] * mean[:, None, :]
        flat = (-1, cross.shape[2])
        return Target(
            self._rows.second(),
            self._rows.covariance(),
            around_zero.reshape(flat),
            cross.reshape(flat),
            mean,
            wanted.reshape(-1),
            with_bias,
        )
