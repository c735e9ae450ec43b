"""Statistics of values, streamed: what each one keeps of a value is bounded, however many samples go by."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol, TypeVar

import numpy as np

from graphopt.backend import Array
from graphopt.errors import DataError

Result = TypeVar("Result", covariant=True)

# Bins over a range up to twice as wide as needed on either side: of a value that is never negative, 2,048 and more
# lie below its largest one, eight to each of 256 codes.
HISTOGRAM_BINS = 8192
# Histograms start at this power of two: smaller values are zero to any grid, and bins stay normal in float32.
SMALLEST_EXPONENT = -100
# Counted of a sample: 64 samples make 2 million, of which the percentile 99.999 cuts off 20.
HISTOGRAM_ELEMENTS = 1 << 15
# Elements looked at together, few enough to stay in a core's cache through all steps.
_CHUNK = 1 << 16
# What the histograms of a value may take: 4,096 channels of the usual number of bins.
HISTOGRAM_BYTES_LIMIT = 256 << 20
# Counting one by one takes about as long as adding this many zeros.
_BINS_FOR_ONE_PLACE = 8


class Accumulator(Protocol):
    """What has been seen of one value so far."""

    def update(self, values: Array, samples: int) -> None:
        """Add what the value is on some samples.

        Args:
            values: Finite numbers, the samples along the first axis.
            samples: How many these are.

        Raises:
            DataError: The array has no such axis as the statistic is asked for along.
        """

    def arrays(self) -> dict[str, Array]:
        """Return all that was learned, as it is stored."""


class Statistic(Protocol[Result]):
    """A statistic: a frozen dataclass whose fields are its options; equal ones are the same statistic."""

    @property
    def key(self) -> str:
        """Text that tells this statistic, options included, from all others; part of the names of cached results."""

    def start(self) -> Accumulator:
        """Return what collects it."""

    def result(self, arrays: Mapping[str, Array]) -> Result:
        """Return the statistic from what an accumulator learned, or a cache kept of it.

        Raises:
            KeyError, ValueError: The arrays are not those of this statistic.
        """


@dataclass(frozen=True)
class Extremes:
    """Smallest and largest values, float64: one each, or one for each channel."""

    low: Array
    high: Array

    def channel(self, index: int) -> Extremes:
        """Return what was seen of one channel."""
        return Extremes(self.low[index], self.high[index])


@dataclass(frozen=True)
class MinMax:
    """The smallest and largest value seen.

    Attributes:
        axis: Axis of channels that are told apart, or None.
    """

    axis: int | None = None

    @property
    def key(self) -> str:
        """Name and options."""
        return f"minmax(axis={self.axis})"

    def start(self) -> Accumulator:
        """Return what collects it."""
        return _MinMax(self.axis)

    def result(self, arrays: Mapping[str, Array]) -> Extremes:
        """Return the statistic from what was learned."""
        return Extremes(arrays["low"], arrays["high"])


@dataclass(frozen=True)
class MovingAverage:
    """The mean over the samples of each one's smallest and largest value.

    Other tools average over batches. An average over samples does not hang on how they are batched, nor on their
    order. Where the first axis is not samples, all that is given at once counts as one sample: whoever observes such a
    value gives one sample at a time.

    Attributes:
        axis: Axis of channels that are told apart, or None.
    """

    axis: int | None = None

    @property
    def key(self) -> str:
        """Name and options."""
        return f"average(axis={self.axis})"

    def start(self) -> Accumulator:
        """Return what collects it."""
        return _MovingAverage(self.axis)

    def result(self, arrays: Mapping[str, Array]) -> Extremes:
        """Return the statistic from what was learned."""
        count = max(int(arrays["count"]), 1)
        return Extremes(arrays["low"] / count, arrays["high"] / count)


@dataclass(frozen=True)
class Averages:
    """Mean, mean of squares and largest magnitude, float64: one each, or one for each channel."""

    mean: Array
    mean_square: Array
    absmax: Array

    @property
    def variance(self) -> Array:
        """The mean squared distance from the mean."""
        return np.asarray(np.maximum(self.mean_square - self.mean**2, 0.0))


@dataclass(frozen=True)
class Moments:
    """The mean, the mean of the squares, and the largest magnitude.

    Attributes:
        axis: Axis of channels that are told apart, or None.
    """

    axis: int | None = None

    @property
    def key(self) -> str:
        """Name and options."""
        return f"moments(axis={self.axis})"

    def start(self) -> Accumulator:
        """Return what collects it."""
        return _Moments(self.axis)

    def result(self, arrays: Mapping[str, Array]) -> Averages:
        """Return the statistic from what was learned."""
        count = max(int(arrays["count"]), 1)
        return Averages(arrays["sum"] / count, arrays["squares"] / count, arrays["absmax"])


@dataclass(frozen=True)
class Distribution:
    """Counts of values in equal bins over [−2^exponent, 2^exponent], and the smallest and largest value.

    Of one value or one channel, counts are [bins] and the rest scalars; of channels, all have one more axis in front.
    """

    low: Array
    high: Array
    exponent: Array
    counts: Array

    def channel(self, index: int) -> Distribution:
        """Return what was seen of one channel."""
        return Distribution(self.low[index], self.high[index], self.exponent[index], self.counts[index])

    @property
    def edges(self) -> Array:
        """Edges of the bins, one more than there are bins; of one channel."""
        half = float(np.ldexp(1.0, int(self.exponent)))
        return np.linspace(-half, half, self.counts.shape[-1] + 1)

    def percentile(self, share: float) -> tuple[float, float]:
        """Return the interval that holds ``share`` percent of the values, as much cut off below as above."""
        cumulative, edges = np.cumsum(self.counts), self.edges
        if not cumulative[-1]:
            return 0.0, 0.0
        tail = cumulative[-1] * (100.0 - share) / 200.0
        low = edges[np.searchsorted(cumulative, tail, side="right")] if tail else self.low
        high = edges[np.searchsorted(cumulative, cumulative[-1] - tail, side="left") + 1] if tail else self.high
        return max(float(low), float(self.low)), min(float(high), float(self.high))


@dataclass(frozen=True)
class Histogram:
    """How often values of each size are seen.

    Bins are counted over a symmetric range, a power of two wide, that doubles as larger values arrive: bins are then
    merged in pairs, exactly, so that no value is lost and the order of samples does not matter.

    Attributes:
        axis: Axis of channels that are told apart, or None.
        bins: Number of bins, a power of two; each channel has as many.
        elements: How many elements of a sample are counted, evenly spaced, where there are more; the smallest and
            largest value are always those of all. Which ones does not hang on how samples are batched.
    """

    axis: int | None = None
    bins: int = HISTOGRAM_BINS
    elements: int = HISTOGRAM_ELEMENTS

    @property
    def key(self) -> str:
        """Name and options."""
        return f"histogram(axis={self.axis},bins={self.bins},elements={self.elements})"

    def start(self) -> Accumulator:
        """Return what collects it."""
        return _Histogram(self.axis, self.bins, self.elements)

    def result(self, arrays: Mapping[str, Array]) -> Distribution:
        """Return the statistic from what was learned."""
        if arrays["counts"].shape[-1:] != (self.bins,):
            raise ValueError("another number of bins")
        return Distribution(arrays["low"], arrays["high"], arrays["exponent"], arrays["counts"])


def by_channel(values: Array, axis: int | None) -> Array:
    """Return an array as [outer, channels, inner], without a copy where it lies in order; None is one channel.

    Raises:
        DataError: There is no such axis.
    """
    if axis is None:
        return values.reshape(1, 1, -1)
    if not -values.ndim <= axis < values.ndim:
        raise DataError(f"has {values.ndim} axes, and none is number {axis}", hint="name an axis that it has")
    axis %= values.ndim
    inner = int(np.prod(values.shape[axis + 1 :]))
    return values.reshape(-1, values.shape[axis], inner) if values.size else np.zeros((0, values.shape[axis], 0))


def _by_sample(values: Array, samples: int, axis: int | None) -> Array:
    """Return an array as [samples, outer, channels, inner]; as one sample where its first axis is not samples."""
    split = samples if values.ndim and samples and len(values) % samples == 0 and axis not in (0, -values.ndim) else 1
    whole = by_channel(values, axis)
    if axis is None:
        return whole.reshape(split, 1, 1, -1) if values.size else np.zeros((0, 1, 1, 0))
    outer, channels, inner = whole.shape
    return whole.reshape(split, outer // split, channels, inner) if values.size else np.zeros((0, 0, channels, 0))


class _Channels:
    """What accumulators share: one entry, or one for each channel, their number known from the first array."""

    def __init__(self, axis: int | None) -> None:
        self.axis = axis
        self.channels: int | None = None

    def enter(self, channels: int) -> bool:
        """Return whether this is the first array, after which the number of channels must stay.

        Raises:
            DataError: There are more or fewer channels than before.
        """
        if self.channels is None:
            self.channels = channels
            return True
        if channels != self.channels:
            found = f"{self.channels} channels along axis {self.axis} on one sample and {channels} on another"
            raise DataError(f"has {found}", hint="give samples of one size")
        return False

    def stored(self, array: Array) -> Array:
        """Return one number for each channel, or the only one."""
        return array if self.axis is not None else array[0]


class _MinMax(_Channels):
    def __init__(self, axis: int | None) -> None:
        super().__init__(axis)
        self.low, self.high = np.full(1, np.inf), np.full(1, -np.inf)

    def update(self, values: Array, samples: int) -> None:
        parts = by_channel(values, self.axis)
        if self.enter(parts.shape[1]):
            self.low, self.high = np.full(parts.shape[1], np.inf), np.full(parts.shape[1], -np.inf)
        for piece in _pieces(parts):
            low, high = _finite(piece.min((0, 2)), piece.max((0, 2)))
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)

    def arrays(self) -> dict[str, Array]:
        return {"low": self.stored(self.low), "high": self.stored(self.high)}


class _MovingAverage(_Channels):
    def __init__(self, axis: int | None) -> None:
        super().__init__(axis)
        self.low, self.high, self.count = np.zeros(1), np.zeros(1), 0

    def update(self, values: Array, samples: int) -> None:
        parts = _by_sample(values, samples, self.axis)
        if self.enter(parts.shape[2]):
            self.low, self.high = np.zeros(parts.shape[2]), np.zeros(parts.shape[2])
        for sample in parts if values.size else ():
            low, high = _finite(sample.min((0, 2)), sample.max((0, 2)))
            self.low, self.high, self.count = self.low + low, self.high + high, self.count + 1

    def arrays(self) -> dict[str, Array]:
        return {"low": self.stored(self.low), "high": self.stored(self.high), "count": np.array(self.count)}


class _Moments(_Channels):
    def __init__(self, axis: int | None) -> None:
        super().__init__(axis)
        self.sum, self.squares, self.absmax, self.count = np.zeros(1), np.zeros(1), np.zeros(1), 0

    def update(self, values: Array, samples: int) -> None:
        parts = by_channel(values, self.axis)
        if self.enter(parts.shape[1]):
            self.sum, self.squares, self.absmax = (np.zeros(parts.shape[1]) for _ in range(3))
        # Sums in float32 are kept short, and added up in float64.
        for piece in _pieces(parts):
            low, high = _finite(piece.min((0, 2)), piece.max((0, 2)))
            self.absmax = np.maximum(self.absmax, np.maximum(np.abs(low), np.abs(high)))
            self.sum += piece.sum(2).sum(0, dtype=np.float64)
            self.squares += np.square(piece, dtype=np.float32).sum(2, dtype=np.float64).sum(0)
        self.count += parts.shape[0] * parts.shape[2]

    def arrays(self) -> dict[str, Array]:
        return {
            "sum": self.stored(self.sum),
            "squares": self.stored(self.squares),
            "absmax": self.stored(self.absmax),
            "count": np.array(self.count),
        }


class _Histogram(_Channels):
    def __init__(self, axis: int | None, bins: int, elements: int) -> None:
        super().__init__(axis)
        self.bins, self.elements = bins, elements
        self._begin(1)

    def _begin(self, channels: int) -> None:
        most = HISTOGRAM_BYTES_LIMIT // (channels * np.dtype(np.int64).itemsize)
        if self.bins > most:
            # A power of two, as numbers of bins are.
            fewer = f"`Histogram(axis, bins={1 << max(most.bit_length() - 1, 0)})`, or " if most else ""
            found = f"{channels} channels along axis {self.axis}, too many for {self.bins} bins each"
            raise DataError(f"has {found}", hint=f"ask for {fewer}one histogram of all channels")
        self.low, self.high = np.full(channels, np.inf), np.full(channels, -np.inf)
        self.exponent = np.full(channels, SMALLEST_EXPONENT)
        # One bin more holds what lies on the upper edge itself.
        self.counts = np.zeros((channels, self.bins + 1), np.int64)

    def update(self, values: Array, samples: int) -> None:
        parts = by_channel(values, self.axis)
        if self.enter(parts.shape[1]):
            self._begin(parts.shape[1])
        for piece in _pieces(parts):
            low, high = _finite(piece.min((0, 2)), piece.max((0, 2)))
            self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        if values.size:
            self._cover(np.maximum(np.abs(self.low), np.abs(self.high)))
            by_sample = _by_sample(values, samples, self.axis)
            alike = max(samples // len(by_sample), 1)
            shape = len(values) // len(by_sample) if values.ndim else 1, *values.shape[1:]
            for piece in _pieces(_thinned(by_sample, shape, self.elements * alike)):
                self._count(piece)

    def _count(self, piece: Array) -> None:
        # Bins are a power of two wide, so the scaling is exact. Rounding towards zero is rounding down once the
        # middle was added; all that it moves lies within 2^-10 of a bin's edge.
        middle = np.float32(self.bins / 2)
        scaled = piece * np.ldexp(middle, -self.exponent).astype(np.float32)[:, None]
        scaled += middle
        places = scaled.astype(np.int64)
        if len(self.exponent) > 1:
            places += (np.arange(len(self.exponent)) * (self.bins + 1))[:, None]
        flat = self.counts.reshape(-1)
        if places.size * _BINS_FOR_ONE_PLACE < len(flat):
            np.add.at(flat, places.reshape(-1), 1)
        else:
            flat += np.bincount(places.reshape(-1), minlength=len(flat))

    def _cover(self, peaks: Array) -> None:
        """Double the range of each channel until it holds the largest magnitude."""
        with np.errstate(divide="ignore"):
            needed = np.maximum(np.ceil(np.log2(peaks)), SMALLEST_EXPONENT).astype(np.int64)
        for channel in np.flatnonzero(needed > self.exponent):
            # After as many doublings as halve the bins to one, all counts are in the two in the middle, and stay.
            for _ in range(min(needed[channel] - self.exponent[channel], self.bins.bit_length())):
                self._double(int(channel))
            self.exponent[channel] = needed[channel]

    def _double(self, channel: int) -> None:
        counts = self.counts[channel]
        counts[self.bins - 1] += counts[self.bins]
        pairs = counts[: self.bins].reshape(-1, 2).sum(1)
        counts[:] = 0
        counts[self.bins // 4 : self.bins // 4 + len(pairs)] = pairs

    def arrays(self) -> dict[str, Array]:
        counts = self.counts[:, : self.bins].copy()
        counts[:, -1] += self.counts[:, self.bins]
        return {
            "low": self.stored(self.low),
            "high": self.stored(self.high),
            "exponent": self.stored(self.exponent),
            "counts": self.stored(counts),
        }


def _finite(low: Array, high: Array) -> tuple[Array, Array]:
    """Return extremes in float64; a single NaN or infinity shows in them.

    Raises:
        DataError: There is one.
    """
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise DataError("becomes NaN or infinite", hint="check the model on these samples")
    return low.astype(np.float64), high.astype(np.float64)


def _pieces(parts: Array) -> Iterator[Array]:
    """Yield [outer, channels, inner] in float32, in pieces of about `_CHUNK` elements."""
    outer, channels, inner = parts.shape
    if not parts.size:
        return
    rows = max(1, _CHUNK // (channels * inner))
    wide = inner if rows > 1 else max(1, _CHUNK // channels)
    for start in range(0, outer, rows):
        for left in range(0, inner, wide):
            yield parts[start : start + rows, :, left : left + wide].astype(np.float32, copy=False)


def _thinned(by_sample: Array, shape: tuple[int, ...], most: int) -> Array:
    """Return about so many elements of each sample, evenly spaced, or all if there are no more.

    Args:
        by_sample: [samples, outer, channels, inner].
        shape: Shape of one sample.
        most: How many elements of each.

    Returns:
        [outer, channels, inner].
    """
    samples, outer, channels, inner = by_sample.shape
    step = max(1, outer * channels * inner // max(most, 1))
    # A step that shares no factor with any axis comes by every row, column and channel alike.
    while step > 1 and any(math.gcd(step, size) > 1 for size in shape if size > 1):
        step += 1
    if channels == 1:
        return by_sample.reshape(samples, 1, -1)[:, :, ::step]
    kept = by_sample[..., ::step] if inner >= outer else by_sample[:, ::step]
    return kept.reshape(-1, channels, kept.shape[-1])
