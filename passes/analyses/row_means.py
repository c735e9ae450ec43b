"""Means of what linear layers read: E[x] over all positions, of which no row is unfolded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from graphopt.backend import Array
from graphopt.statistics import Accumulator

from .layer_rows import layer_rows, summed_rows
from .linear_layers import LinearLayer
from .second_moments import group_count, inputs_of, reading


@dataclass(frozen=True)
class RowMean:
    """The mean of the rows that a linear layer reads of a value; layers that read the same rows share one.

    Attributes:
        reading: What decides which rows these are, as text.
        layer: A layer that reads them.
    """

    reading: str
    layer: LinearLayer = field(compare=False, repr=False)

    @classmethod
    def of(cls, layer: LinearLayer) -> RowMean:
        """Return what a layer reads; of a layer of which `takes_rows` holds."""
        return cls(reading(layer), layer)

    @property
    def key(self) -> str:
        """Name and options."""
        return f"row-mean({self.reading})"

    def start(self) -> Accumulator:
        """Return what collects it."""
        return RowSums(self.layer)

    def result(self, arrays: Mapping[str, Array]) -> Array:
        """Return E[x] as float64 [groups, inputs], ordered as `LinearLayer.matrix` orders them."""
        mean = arrays["mean"]
        if mean.shape != (groups := group_count(self.layer), inputs := inputs_of(self.layer)):
            raise ValueError(f"{mean.shape} is no mean of {groups} times {inputs} inputs")
        return mean


class RowSums:
    """Sums of rows.

    Of a convolution, samples are added up as they come, and unfolded at the end: what is kept is as large as a sample.

    Args:
        layer: The layer that reads them.
    """

    def __init__(self, layer: LinearLayer) -> None:
        self._layer = layer
        self._total = np.zeros((group_count(layer), inputs_of(layer)))
        self._rows = 0
        # Of each size samples have: their sum, and how many there were.
        self._samples: dict[tuple[int, ...], tuple[Array, int]] = {}

    def update(self, values: Array, samples: int) -> None:
        """Add what the value is on some samples."""
        if self._layer.node.op_type.startswith("Conv"):
            total, count = self._samples.get(values.shape[1:], (np.float32(0), 0))
            self._samples[values.shape[1:]] = np.asarray(total + values.sum(axis=0)), count + len(values)
            return
        rows = layer_rows(self._layer, values)
        self._total += rows.sum(axis=1)
        self._rows += rows.shape[1]

    def arrays(self) -> dict[str, Array]:
        """Return the mean so far."""
        total, rows = self._total.copy(), self._rows
        for values, count in self._samples.values():
            sums, positions = summed_rows(self._layer, values[None])
            total += sums
            rows += positions * count
        return {"mean": total / max(rows, 1)}
