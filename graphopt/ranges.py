"""Ranges of values: how one is read off what was observed of a value."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from graphopt.backend import Array
from graphopt.errors import UsageError
from graphopt.statistics import Distribution, Extremes, Histogram, MinMax, MovingAverage, Statistic

RangeKind = Literal["minmax", "average", "percentile", "kl", "mse", "sqnr"]

INT8_CODES = 256
# How much worse a clipped value counts than a rounded one of the same error, in `sqnr`: gamma of AIMET's
# SqnrEncodingAnalyzer. With 1, the ratio of signal to noise is greatest where the squared error is least.
CLIPPING_WEIGHT = 3.0
# Thresholds that are tried are shares of the largest value, equally spaced on a logarithmic scale from 1/1024 on:
# each is 1.056 times the one before, and where the error is least, it is flat.
_SMALLEST_SHARE, _SHARES = 2.0**-10, 128
_SHARES_OF_TWO_SIDES = 48
# Those best by the quick estimate are tried again exactly, as many as take this many bins to look at, and then others
# between the best and the next ones.
_BINS_LOOKED_AT, _TRIED_BETWEEN = 1 << 18, 7
_KL_THRESHOLDS, _KL_ROUNDS = 48, 2


@dataclass(frozen=True)
class Range:
    """The interval an activation is quantized over; contains zero."""

    low: float
    high: float


@dataclass(frozen=True)
class RangeMethod:
    """How a range is read off the observed values.

    Attributes:
        kind: ``minmax``; ``average``, of each sample's minimum and maximum; ``percentile``; ``kl``, which keeps the
            distribution; ``mse``, of least squared error; or ``sqnr``, the same with clipping held for worse.
        percentile: Share of the values, in percent, that lies inside, where the kind is ``percentile``.
    """

    kind: RangeKind = "minmax"
    percentile: float = 99.99

    @classmethod
    def parse(cls, text: str) -> RangeMethod:
        """Return the method a text stands for: one of the kinds, ``p99.99`` or ``percentile:99.99``.

        Raises:
            UsageError: It stands for none.
        """
        share = re.fullmatch(r"(?:p|percentile:)(\d+(?:\.\d+)?)", text)
        if share is not None and 50.0 <= float(share[1]) <= 100.0:
            return cls("percentile", float(share[1]))
        if text in get_args(RangeKind):
            return cls(text)  # type: ignore[arg-type]
        raise UsageError(
            f"ranges cannot be `{text}`", hint="minmax, average, p99.99 (any share from 50 to 100), kl, mse or sqnr"
        )

    def __str__(self) -> str:
        return f"p{self.percentile:g}" if self.kind == "percentile" else self.kind

    def statistic(self, axis: int | None = None) -> Statistic[Extremes | Distribution]:
        """Return what must be observed of a value for this method.

        Args:
            axis: Axis of channels that are told apart, or None.
        """
        match self.kind:
            case "minmax":
                return MinMax(axis)
            case "average":
                return MovingAverage(axis)
            case _:
                return Histogram(axis)


def read_range(
    observed: Extremes | Distribution, method: RangeMethod, *, codes: int = INT8_CODES, symmetric: bool = False
) -> Range:
    """Return the range of one value, or of one channel.

    Args:
        observed: What `RangeMethod.statistic` gave for it.
        method: How to read it.
        codes: Number of codes of the grid the range is for; 256 for eight bits. Only ``kl``, ``mse`` and ``sqnr`` ask.
        symmetric: Whether the grid has as many codes below zero as above, the lowest left out.
    """
    low, high = float(observed.low), float(observed.high)
    if not low <= high:  # nothing was seen
        return Range(0.0, 0.0)
    # Zero must be exact (padding, ReLU), and an empty or constant-zero value still needs a scale.
    widest = Range(min(low, 0.0), max(high, 0.0))
    if isinstance(observed, Extremes) or widest.low == widest.high:
        return widest
    match method.kind:
        case "percentile":
            inner = observed.percentile(method.percentile)
            return Range(min(inner[0], 0.0), max(inner[1], 0.0))
        case "kl":
            return _closest_distribution(observed, widest, codes, symmetric)
        case "mse":
            return _least_error(observed, widest, codes, symmetric, clipping=1.0)
        case "sqnr":
            return _least_error(observed, widest, codes, symmetric, clipping=CLIPPING_WEIGHT)
        case _:
            return widest


def read_ranges(
    observed: Extremes | Distribution, method: RangeMethod, *, codes: int = INT8_CODES, symmetric: bool = False
) -> list[Range]:
    """Return the range of each channel; see `read_range`."""
    channels = [observed.channel(index) for index in range(len(observed.low))]
    return [read_range(channel, method, codes=codes, symmetric=symmetric) for channel in channels]


class _Values:
    """The values a histogram stands for, in order: where its bins that hold any lie, and how many are in each."""

    def __init__(self, observed: Distribution) -> None:
        edges, counts = observed.edges, observed.counts.astype(np.float64)
        self.width = float(edges[1] - edges[0])
        centers = np.clip((edges[:-1] + edges[1:]) / 2, float(observed.low), float(observed.high))
        # The bin above zero holds all that are zero, which every grid holds exactly.
        centers[len(counts) // 2] = max(0.0, float(observed.low))
        seen = counts > 0
        self.at, self.counts = centers[seen], counts[seen]
        rounded = np.where(self.at == 0.0, 0.0, self.counts)
        self.moments = [_running(self.counts * self.at**power) for power in range(3)]
        self.rounded = _running(rounded)

    @property
    def affordable(self) -> int:
        """How many grids may be tried exactly."""
        return max(_BINS_LOOKED_AT // len(self.at), 1)

    def estimates(self, low: Array, high: Array, step: Array, clipping: float) -> Array:
        """Return about the squared error of each grid: of a rounded value, step²/12 on average."""
        first, last = np.searchsorted(self.at, low), np.searchsorted(self.at, high, side="right")
        inside = self.rounded[last] - self.rounded[first]
        zeroth, once, twice = self.moments
        below = twice[first] - 2 * low * once[first] + low**2 * zeroth[first]
        above = (twice[-1] - twice[last]) - 2 * high * (once[-1] - once[last]) + high**2 * (zeroth[-1] - zeroth[last])
        return np.asarray(inside * step**2 / 12 + clipping * (below + above))

    def errors(self, low: Array, high: Array, step: Array, clipping: float) -> Array:
        """Return the squared error of each grid, all values of a bin taken for its middle."""
        errors = np.empty(len(step))
        for index, (bottom, top, one) in enumerate(zip(low, high, step, strict=True)):
            codes = np.rint(self.at / one)
            lowest, highest = np.rint(bottom / one), np.rint(top / one)
            off = np.square(self.at - np.clip(codes, lowest, highest) * one)
            if one < self.width:  # what is inside a bin takes all places between two codes
                off = np.where((codes < lowest) | (codes > highest), off, one**2 / 12)
            weights = np.where((codes < lowest) | (codes > highest), clipping, 1.0)
            errors[index] = np.dot(self.counts, off * weights)
        return errors


def _running(values: Array) -> Array:
    return np.concatenate([[0.0], np.cumsum(values)])


def _least_error(observed: Distribution, widest: Range, codes: int, symmetric: bool, *, clipping: float) -> Range:
    """Return the range whose grid rounds and clips the values with the least squared error.

    Thresholds far and wide are judged by an estimate in constant time, the best of them exactly.
    """
    values = _Values(observed)
    low, high = _candidates(widest, symmetric)
    for tried in range(2):
        step = _steps(low, high, codes, symmetric)
        if not tried:
            best = np.argsort(values.estimates(low, high, step, clipping), kind="stable")[: values.affordable]
            low, high, step = low[best], high[best], step[best]
        best_one = int(np.argmin(values.errors(low, high, step, clipping)))
        chosen = low[best_one], high[best_one]
        if not tried:
            low, high = _around(*chosen, widest, symmetric)
    return Range(float(chosen[0]), float(chosen[1]))


def _candidates(widest: Range, symmetric: bool) -> tuple[Array, Array]:
    """Return thresholds to try, as lows and highs."""
    if symmetric:
        peaks = max(-widest.low, widest.high) * np.geomspace(_SMALLEST_SHARE, 1.0, _SHARES)
        return -peaks, peaks
    if widest.low == 0.0 or widest.high == 0.0:
        shares = np.geomspace(_SMALLEST_SHARE, 1.0, _SHARES)
        return widest.low * shares, widest.high * shares
    shares = np.geomspace(_SMALLEST_SHARE, 1.0, _SHARES_OF_TWO_SIDES)
    lows, highs = np.meshgrid(widest.low * shares, widest.high * shares)
    return lows.reshape(-1), highs.reshape(-1)


def _around(low: float, high: float, widest: Range, symmetric: bool) -> tuple[Array, Array]:
    """Return thresholds about those found, up to the next ones that were tried."""
    two_sided = not symmetric and low < 0.0 < high
    ratio = _SMALLEST_SHARE ** (-1.0 / ((_SHARES_OF_TWO_SIDES if two_sided else _SHARES) - 1))
    factors = np.geomspace(1 / ratio, ratio, _TRIED_BETWEEN)
    if not two_sided:
        peak = max(-widest.low, widest.high)
        return np.maximum(low * factors, -peak), np.minimum(high * factors, peak)
    lows, highs = np.meshgrid(np.maximum(low * factors, widest.low), np.minimum(high * factors, widest.high))
    return lows.reshape(-1), highs.reshape(-1)


def _steps(low: Array, high: Array, codes: int, symmetric: bool) -> Array:
    return high / ((codes - 1) // 2) if symmetric else (high - low) / (codes - 1)


def _closest_distribution(observed: Distribution, widest: Range, codes: int, symmetric: bool) -> Range:
    """Return the range that keeps most of what the values tell (Migacz, 8-bit inference with TensorRT, GTC 2017).

    Values beyond a threshold count to the outermost bin of the distribution itself, but not of the one in codes; the
    two are compared by the Kullback–Leibler divergence. Zero, which every grid holds exactly, does not count.
    Unlike in the original, what is never negative has all codes on one side, and what is not symmetric a threshold
    on each, found in turns.
    """
    counts = observed.counts.astype(np.float64)
    middle = len(counts) // 2
    counts[middle] = 0.0
    width = float(observed.edges[1] - observed.edges[0])
    below, above = counts[middle - 1 :: -1], counts[middle:]
    if symmetric:
        kept = _kl_threshold(below + above, 0, (codes - 1) // 2) * width
        peak = min(kept, max(-widest.low, widest.high))
        return Range(-peak, peak)
    if widest.low == 0.0 or widest.high == 0.0:
        kept = _kl_threshold(above if widest.high else below, 0, codes - 1) * width
        return Range(max(-kept, widest.low), min(kept, widest.high))
    lower, upper = _occupied(below), _occupied(above)
    for _ in range(_KL_ROUNDS):
        upper = _kl_threshold(np.concatenate([_clipped(below, lower)[::-1], above]), lower, codes - 1)
        lower = _kl_threshold(np.concatenate([_clipped(above, upper)[::-1], below]), upper, codes - 1)
    return Range(max(-lower * width, widest.low), min(upper * width, widest.high))


def _occupied(counts: Array) -> int:
    """Return up to where there are values."""
    seen = np.flatnonzero(counts)
    return int(seen[-1]) + 1 if len(seen) else 1


def _clipped(counts: Array, end: int) -> Array:
    kept = counts[:end].copy()
    kept[-1] += counts[end:].sum()
    return kept


def _kl_threshold(counts: Array, start: int, levels: int) -> int:
    """Return up to which bin from ``start`` on, of a distribution that is cut off at its end, it is kept best."""
    most = max(_occupied(counts) - start, 1)
    least = max(levels - start, 1)
    if most <= least:
        return most  # each bin has a code of its own
    tried = np.unique(np.geomspace(least, most, _KL_THRESHOLDS).astype(int))
    best = int(tried[np.argmin([_divergence(counts, start + end, levels) for end in tried])])
    gap = max(int(best * ((most / least) ** (1 / _KL_THRESHOLDS) - 1)), 1)
    between = np.unique(np.clip(np.linspace(best - gap, best + gap, 2 * _TRIED_BETWEEN + 1).astype(int), least, most))
    return int(between[np.argmin([_divergence(counts, start + end, levels) for end in between])])


def _divergence(counts: Array, end: int, levels: int) -> float:
    """Return how far a distribution cut off at a bin, in so many codes, is from what it stands for."""
    inside = counts[:end]
    reference = _clipped(counts, end)
    seen = inside > 0
    starts = -(-np.arange(levels) * end // levels)  # level i holds the bins b with b * levels // end == i
    totals = np.add.reduceat(inside, starts)
    holders = np.add.reduceat(seen, starts, dtype=np.int64)
    spread = np.repeat(totals / np.maximum(holders, 1), np.diff(starts, append=end)) * seen
    total = reference.sum()
    if not total:
        return 0.0
    if not spread.any():
        return float("inf")
    present = reference > 0
    p = reference[present] / total
    # What was seen but cannot be told from nothing counts as if half a value had been seen there.
    q = np.maximum(spread[present] / spread.sum(), 0.5 / total)
    return float(np.dot(p, np.log(p / q)))
