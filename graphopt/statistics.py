"""Streamed calibration statistics: bounded memory over any number of samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array, Backend
from graphopt.data import Dataset
from graphopt.errors import DataError

HISTOGRAM_BINS = 4096
# Histograms start at this power of two: smaller values are zero to any grid, and bins stay normal in float32.
SMALLEST_EXPONENT = -100
# Bytes of observed values held at once; the batch size follows from it.
OBSERVED_BYTES_LIMIT = 256 << 20
LARGEST_BATCH = 32


@dataclass(frozen=True)
class Range:
    """The interval an activation is quantized over; contains zero."""

    low: float
    high: float


@dataclass(frozen=True)
class RangeMethod:
    """How a range is read off the observed values.

    Attributes:
        percentile: Share of the values, in percent, that lies inside; 100 is min-max.
    """

    percentile: float = 100.0


class Histogram:
    """Counts of values in equal bins over a range that doubles as larger values arrive; no value is lost.

    The range is symmetric and a power of two wide, so that doubling merges bins in pairs exactly and the
    result does not depend on the order of samples.
    """

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf
        self.exponent: int | None = None
        self.counts = np.zeros(HISTOGRAM_BINS, np.int64)

    def update(self, values: Array) -> None:
        """Add the values of an array; it must be finite."""
        if values.size == 0:
            return
        flat = values.reshape(-1).astype(np.float32, copy=False)
        self.low, self.high = min(self.low, float(np.min(flat))), max(self.high, float(np.max(flat)))
        self._cover(max(abs(self.low), abs(self.high)))
        half = float(2.0 ** (self.exponent or 0))
        # Bins are a power of two wide, so the scaling is exact; the top edge belongs to the last bin.
        bins = np.floor(flat * np.float32(HISTOGRAM_BINS / (2 * half))).astype(np.int32) + HISTOGRAM_BINS // 2
        self.counts += np.bincount(np.minimum(bins, HISTOGRAM_BINS - 1), minlength=HISTOGRAM_BINS)

    def _cover(self, peak: float) -> None:
        needed = max(int(np.ceil(np.log2(peak))), SMALLEST_EXPONENT) if peak > 0 else SMALLEST_EXPONENT
        if self.exponent is None:
            self.exponent = needed
        while self.exponent < needed:
            pairs = self.counts.reshape(-1, 2).sum(1)
            self.counts = np.zeros_like(self.counts)
            quarter = HISTOGRAM_BINS // 4
            self.counts[quarter : quarter + len(pairs)] = pairs
            self.exponent += 1

    def percentile(self, share: float) -> tuple[float, float]:
        """Return the interval that holds ``share`` percent of the values, as much cut off below as above."""
        half = float(2.0 ** (self.exponent or 0))
        edges = np.linspace(-half, half, HISTOGRAM_BINS + 1)
        cumulative = np.cumsum(self.counts)
        tail = cumulative[-1] * (100.0 - share) / 200.0
        low = edges[np.searchsorted(cumulative, tail, side="right")]
        high = edges[np.searchsorted(cumulative, cumulative[-1] - tail, side="left") + 1]
        return max(float(low), self.low), min(float(high), self.high)


class MinMax:
    """The smallest and largest value seen."""

    def __init__(self) -> None:
        self.low, self.high = np.inf, -np.inf

    def update(self, values: Array) -> None:
        """Add the values of an array."""
        if values.size:
            self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))


def collect_ranges(
    model: ir.Model, names: Sequence[str], data: Dataset, backend: Backend, method: RangeMethod, *, threads: int = 0
) -> dict[str, Range]:
    """Return the range of each named value of the main graph over the data, in one pass over it.

    Args:
        model: The model; not changed.
        names: Values to observe.
        data: Calibration samples.
        backend: Runs the model.
        method: How a range is read off the values.
        threads: Threads for the backend.

    Raises:
        DataError: A value became NaN or infinite; names it.
    """
    use_histogram = method.percentile < 100.0
    observers = {name: Histogram() if use_histogram else MinMax() for name in names}
    for observed in observe(model, names, data, backend, threads=threads):
        for name, observer in observers.items():
            values = observed[name]
            if not np.isfinite(values).all():
                raise DataError(
                    f"`{name}` becomes NaN or infinite on `{data.name}`", hint="check the model on these samples"
                )
            observer.update(values)
    return {name: _range_of(observer, method) for name, observer in observers.items()}


def _range_of(observer: Histogram | MinMax, method: RangeMethod) -> Range:
    low, high = (
        observer.percentile(method.percentile) if isinstance(observer, Histogram) else (observer.low, observer.high)
    )
    # Zero must be exact (padding, ReLU), and an empty or constant-zero value still needs a scale.
    return Range(min(low, 0.0), max(high, 0.0))


def observe(
    model: ir.Model, names: Sequence[str], data: Dataset, backend: Backend, *, threads: int = 0
) -> Iterator[dict[str, Array]]:
    """Yield the values of the named values of the main graph, batch by batch, within `OBSERVED_BYTES_LIMIT`."""
    if not names:
        return
    with backend.open(with_outputs(model, names), threads=threads) as session:
        size = 1
        for batch in data.take(1).batches(1):
            one = sum(np.asarray(value).nbytes for value in session.run(batch.feeds).values())
            size = max(1, min(LARGEST_BATCH, OBSERVED_BYTES_LIMIT // max(one, 1)))
        for batch in data.batches(size):
            yield session.run(batch.feeds)


def with_outputs(model: ir.Model, names: Sequence[str]) -> ir.Model:
    """Return a copy of a model whose outputs are the named values of its main graph; weights are shared."""
    copy = model.clone()
    known = {value.name: value for node in copy.graph for value in node.outputs}
    known.update({value.name: value for value in copy.graph.inputs})
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(known[name] for name in names)
    return copy
