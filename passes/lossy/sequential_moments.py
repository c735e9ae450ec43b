"""What layers read, seen while the layers before them are being quantized: second moments for solvers."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.layer_rows import layer_rows, takes_rows
from ..analyses.linear_layers import LinearLayer


@dataclass(frozen=True, eq=False)
class Moments:
    """Second moments of what a layer reads.

    Attributes:
        second: E[x̂ x̂ᵀ], float32 [groups, inputs, inputs], of the input x̂ as the model now gives it.
        cross: E[x x̂ᵀ], float32 [groups, inputs, inputs], where x is the input in the model as it was; None where
            that was not asked for.
        rows: How many vectors they are means over.
        mean: E[x̂], float32 [groups, inputs].
        mean_before: E[x], likewise, or None as `cross`.
    """

    second: Array
    cross: Array | None
    rows: int
    mean: Array
    mean_before: Array | None


class SequentialMoments:
    """Second moments of layers, asked for in graph order, each after the layers before it were changed.

    Two walkthroughs of the calibration data go side by side: one through the model as it is being changed, one
    through a copy of it as it was.

    Args:
        ctx: Calibration data and the model; neither changed yet.
        compare: Whether the model as it was is run too, which is what `mean_before` and `cross` come from.
        cross: Whether `cross` is wanted.
        limit: The most rows of each sample that are looked at, evenly spaced; None for all.
    """

    def __init__(self, ctx: Context, *, compare: bool, cross: bool = True, limit: int | None = None) -> None:
        self._graph, self._limit, self._cross = ctx.model.graph, limit, cross
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
        self._known: tuple[str, Moments] | None = None

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
        if self._known is not None and self._known[0] == _key(layer, name):
            return self._known[1]
        moments = self._measure(layer, name)
        if moments is not None:
            self._known = (_key(layer, name), moments)
        return moments

    def _measure(self, layer: LinearLayer, name: str) -> Moments | None:
        before = self._values.get(name) if self._before is not None else None
        second = cross = mean = mean_before = None
        count = 0
        references = self._before.batches(before) if self._before is not None and before is not None else None
        for (x,) in self._now.batches(layer.input):
            rows = layer_rows(layer, x, limit=self._limit)
            count += rows.shape[1]
            second = _added(second, rows.transpose(0, 2, 1) @ rows)
            mean = _added(mean, rows.sum(axis=1))
            if references is not None:
                (reference,) = next(references)
                original = layer_rows(layer, reference, limit=self._limit)
                if self._cross:
                    cross = _added(cross, original.transpose(0, 2, 1) @ rows)
                mean_before = _added(mean_before, original.sum(axis=1))
        if second is None or mean is None or count == 0 or not np.isfinite(second).all():
            return None
        over = np.float32(count)
        return Moments(second / over, _finite(cross, over), count, mean / over, _finite(mean_before, over))

    def close(self) -> None:
        """Let go of everything kept."""
        self._stack.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _key(layer: LinearLayer, name: str) -> str:
    """Layers that read a value the same way share its moments: products of one side, windows of one kind."""
    across = layer.node.attributes.get_int("transA" if layer.weight_index == 1 else "transB", 0)
    tensor = walk.constant_tensor(layer.weight)
    window = ""
    if layer.node.op_type in ("Conv", "ConvTranspose") and tensor is not None:
        settings = sorted(f"{attribute.name}={attribute.value}" for attribute in layer.node.attributes.values())
        window = f"{walk.dims(tensor)[1:]}|{'|'.join(settings)}"
    return f"{name}|{layer.node.op_type}|{layer.weight_index}|{across}|{window}"


def _added(total: Array | None, part: Array) -> Array:
    if total is None:
        return part
    total += part
    return total


def _finite(total: Array | None, count: np.float32) -> Array | None:
    return total / count if total is not None and np.isfinite(total).all() else None
