"""What layers read in a model while it is being quantized, and what they read on average before it was."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.walkthrough import Closing

from ..analyses.covariance import Covariance
from ..analyses.layer_rows import layer_rows, takes_rows
from ..analyses.linear_layers import LinearLayer
from ..analyses.row_means import RowMean, RowSums
from ..analyses.second_moments import group_count, inputs_of, reading

# Rows of each sample that are looked at: a few thousand in all, several times as many as blocks have inputs.
_ROWS_OF_A_SAMPLE = 64
# Inputs that hang together in a second moment, at most: its cost grows with the square of their number.
_MOST_INPUTS = 1024


@dataclass(frozen=True, eq=False)
class Reading:
    """What a layer reads.

    Attributes:
        sampled: Mean and covariance of some rows of each sample, of the input x̂ as the model now gives it: of each
            group, or of each of some blocks of inputs.
        columns: Which columns of the layer's matrix the inputs are, block by block.
        mean: E[x̂] of all rows, float64 [groups, inputs].
        mean_before: E[x] in the model as it was, likewise; None where that is not known.
    """

    sampled: Covariance
    columns: Array
    mean: Array
    mean_before: Array | None


def means_of(layers: Iterable[LinearLayer], graph: ir.Graph) -> dict[ir.Value, list[RowMean]]:
    """Return the statistics that `QuantizedReadings` asks of the model as it was, by value."""
    requests: dict[ir.Value, list[RowMean]] = {}
    for layer in layers:
        if _is_seen(layer, graph):
            requests.setdefault(layer.input, []).append(RowMean.of(layer))
    return requests


class QuantizedReadings(Closing):
    """What layers read, asked for in graph order, each after the layers before it were changed.

    Args:
        ctx: Calibration data and the model, not changed yet.
        layers: The layers that will be asked for.
    """

    def __init__(self, ctx: Context, layers: Iterable[LinearLayer]) -> None:
        self._graph = ctx.model.graph
        requests = means_of(layers, self._graph)
        observed = ctx.statistics(requests) if requests else None
        self._before = {
            (value.name or "", mean.reading): observed[value, mean]
            for value, means in requests.items()
            for mean in means
            if observed is not None
        }
        self._stack = ExitStack()
        self._now = self._stack.enter_context(ctx.walkthrough())
        self._known: tuple[tuple[str, str, bool], Reading] | None = None

    def of(self, layer: LinearLayer, now: ir.Value, *, whole: bool = False) -> Reading | None:
        """Return what a layer reads; None where nothing can be seen of it.

        Args:
            layer: The layer, with the input it had in the model as it was.
            now: Its input in the model as that is now.
            whole: Whether all inputs shall be in one block.
        """
        if not _is_seen(layer, self._graph):
            return None
        name = layer.input.name or ""
        key = name, reading(layer), whole
        if self._known is None or self._known[0] != key:
            found = self._measure(replace(layer, input=now), self._before.get(key[:2]), whole=whole)
            if found is None:
                return None
            self._known = key, found
        return self._known[1]

    def _measure(self, layer: LinearLayer, before: Array | None, *, whole: bool) -> Reading | None:
        blocks = 1 if whole else _blocks(layer)
        sampled, sums = Covariance(), RowSums(layer)
        for (x,) in self._now.batches(layer.input):
            rows = layer_rows(layer, x, limit=_ROWS_OF_A_SAMPLE, blocks=blocks)
            sampled.update(rows)
            sums.update(x, len(x))
        if not sampled.is_known:
            return None
        if before is not None and not np.isfinite(before).all():
            before = None
        columns = _columns(layer, blocks)
        return Reading(sampled, columns, sums.arrays()["mean"], before)

    def close(self) -> None:
        """Let go of everything kept."""
        self._stack.close()


def _is_seen(layer: LinearLayer, graph: ir.Graph) -> bool:
    """Return whether a layer's rows can be observed: of varying values of the main graph alone."""
    return layer.node.graph is graph and walk.constant_tensor(layer.input) is None and takes_rows(layer)


def _blocks(layer: LinearLayer) -> int:
    """Return into how many blocks of channels the inputs of a layer are divided; few enough hang all together."""
    inputs = inputs_of(layer)
    if inputs <= _MOST_INPUTS or group_count(layer) > 1 or layer.node.op_type == "ConvTranspose":
        return 1
    wanted = math.ceil(inputs / _MOST_INPUTS)
    return next(blocks for blocks in range(wanted, inputs + 1) if layer.channels % blocks == 0 or blocks == inputs)


def _columns(layer: LinearLayer, blocks: int) -> Array:
    """Return the columns of a layer's matrix, block by block of its channels, which run fastest."""
    inputs = inputs_of(layer)
    if blocks == 1:
        return np.arange(inputs)
    return np.arange(inputs).reshape(inputs // layer.channels, blocks, -1).transpose(1, 0, 2).reshape(-1)
