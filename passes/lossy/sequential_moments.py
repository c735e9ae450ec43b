"""What layers read, seen while the layers before them are being quantized: second moments for solvers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.token_inputs import mask_of
from graphopt.walkthrough import Closing

from ..analyses.covariance import Covariance
from ..analyses.layer_rows import layer_rows, takes_rows
from ..analyses.linear_layers import LinearLayer
from ..analyses.padding import only, real_rows
from ..analyses.second_moments import reading


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of what a layer reads.

    Attributes:
        second: E[x̂ x̂ᵀ], float32 [groups, inputs, inputs], of the input x̂ as the model now gives it.
        covariance: The same around the mean.
        cross: E[x x̂ᵀ], float32 [groups, inputs, inputs], where x is the input in the model as it was; None where
            that was not asked for.
        mean: E[x̂], float64 [groups, inputs].
        rows: How many rows these are of.
    """

    second: Array
    covariance: Array
    cross: Array | None
    mean: Array
    rows: int


class SequentialMoments(Closing):
    """Second moments of layers, asked for in graph order, each after the layers before it were changed.

    Two walkthroughs of the calibration data go side by side: one through the model as it is being changed, one
    through a copy of it as it was.

    Args:
        ctx: Calibration data and the model; neither changed yet.
        compare: Whether the model as it was is run too, which is what `cross` comes from.
        limit: The most rows of each sample that are looked at, evenly spaced; None for all.
    """

    def __init__(self, ctx: Context, *, compare: bool, limit: int | None = None) -> None:
        self._graph, self._limit = ctx.model.graph, limit
        self._before = None
        self._values: dict[str, ir.Value] = {}
        with ExitStack() as stack:
            self._now = stack.enter_context(ctx.walkthrough())
            if compare:
                copy = ctx.model.clone()
                self._before = stack.enter_context(ctx.walkthrough(copy))
                self._values = {value.name or "": value for value in copy.graph.inputs}
                self._values.update({value.name or "": value for node in copy.graph for value in node.outputs})
            self._stack = stack.pop_all()
        self._mask = mask_of(ctx.model)
        self._known: tuple[tuple[str, str], Moments] | None = None

    def of(self, layer: LinearLayer, name: str) -> Moments | None:
        """Return the moments of a layer's input; None where nothing can be seen of it.

        Args:
            layer: The layer, as the model now has it.
            name: What its input was called in the model as it was.
        """
        # Only values of the main graph can be observed.
        seen = layer.node.graph is self._graph and walk.constant_tensor(layer.input) is None
        if not seen or not takes_rows(layer):
            return None
        if self._known is not None and self._known[0] == (name, reading(layer)):
            return self._known[1]
        moments = self._measure(layer, name)
        if moments is not None:
            self._known = ((name, reading(layer)), moments)
        return moments

    def _measure(self, layer: LinearLayer, name: str) -> Moments | None:
        before = self._values.get(name) if self._before is not None else None
        found, cross = Covariance(), None
        references = self._before.batches(before) if self._before is not None and before is not None else None
        masks = [self._mask] if self._mask is not None else []
        for x, *mask in self._now.batches(layer.input, *masks):
            real = real_rows(layer, x, mask)
            rows = layer_rows(layer, only(real, x), limit=self._limit)
            found.update(rows)
            if references is not None:
                (reference,) = next(references)
                with np.errstate(all="ignore"):  # what overflows is left out below
                    before_rows = layer_rows(layer, only(real, reference), limit=self._limit)
                    product = before_rows.transpose(0, 2, 1) @ rows
                cross = product if cross is None else np.add(cross, product, out=cross)
        if not found.is_known:
            return None
        if cross is not None:
            cross = cross / np.float32(found.count) if np.isfinite(cross).all() else None
        return Moments(found.second(), found.covariance(), cross, found.mean(), found.count)

    def close(self) -> None:
        """Let go of everything kept."""
        self._stack.close()
