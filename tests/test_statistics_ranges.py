"""Ranges read off histograms against what the raw values say."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from graphopt.backend import Array
from graphopt.errors import UsageError
from graphopt.ranges import CLIPPING_WEIGHT, Range, RangeMethod, read_range, read_ranges
from graphopt.statistics import Distribution, Extremes, Histogram

COUNT = 40_000


def draw(kind: str) -> Array:
    rng = np.random.default_rng(7)
    normal = rng.standard_normal(COUNT)
    made = {
        "normal": normal,
        "relu": np.maximum(normal, 0.0),
        "laplace": rng.laplace(size=COUNT),
        "relu of heavy tails": np.maximum(rng.standard_t(3, size=COUNT), 0.0),
        "lopsided": np.concatenate([rng.exponential(3.0, COUNT // 2), -rng.exponential(0.2, COUNT // 2)]),
        "outlier": np.append(normal[:-1], 60.0),
        "negative": -np.abs(normal),
        "uniform": rng.uniform(-1, 3, COUNT),
        "sigmoid": 1 / (1 + np.exp(-4 * normal)),
        "few levels": rng.integers(-3, 4, COUNT).astype(float),
    }
    return made[kind].astype(np.float32)


KINDS = [
    "normal", "relu", "laplace", "relu of heavy tails", "lopsided", "outlier", "negative", "uniform", "sigmoid",
    "few levels",
]  # fmt: skip


def histogram(values: Array) -> Distribution:
    statistic = Histogram(elements=len(values))
    accumulator = statistic.start()
    accumulator.update(values[None], 1)
    return statistic.result(accumulator.arrays())


def squared_error(values: Array, span: Range, codes: int, symmetric: bool, clipping: float = 1.0) -> float:
    """Return what quantizing the raw values costs; clipped values count for more where asked."""
    x = values.astype(np.float64)
    if symmetric:
        half = (codes - 1) // 2
        step, lowest, highest = max(-span.low, span.high) / half, -half, half
    else:
        step = (span.high - span.low) / (codes - 1)
        lowest = round(span.low / step)
        highest = lowest + codes - 1
    code = np.rint(x / step)
    error = np.square(x - np.clip(code, lowest, highest) * step)
    return float(np.sum(error * np.where((code < lowest) | (code > highest), clipping, 1.0)))


def best_by_search(values: Array, codes: int, symmetric: bool, clipping: float) -> float:
    """Return the least error of all ranges of a fine mesh."""
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    shares = np.geomspace(1e-2, 1.0, 200)
    if symmetric:
        spans = [Range(-peak, peak) for peak in max(-low, high) * shares]
    elif low == 0.0 or high == 0.0:
        spans = [Range(low * share, high * share) for share in shares]
    else:
        mesh = np.geomspace(1e-2, 1.0, 24)
        spans = [Range(low * a, high * b) for a, b in itertools.product(mesh, mesh)]
    return min(squared_error(values, span, codes, symmetric, clipping) for span in spans)


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("codes", [256, 16])
@pytest.mark.parametrize("kind", KINDS)
def test_no_range_has_a_lower_squared_error(kind: str, codes: int, symmetric: bool) -> None:
    values = draw(kind)[:8000]
    for method, clipping in ((RangeMethod("mse"), 1.0), (RangeMethod("sqnr"), CLIPPING_WEIGHT)):
        span = read_range(histogram(values), method, codes=codes, symmetric=symmetric)
        found = squared_error(values, span, codes, symmetric, clipping)
        least = best_by_search(values, codes, symmetric, clipping)
        noise = 1e-6 * float(np.square(values, dtype=np.float64).sum())
        # Where codes as few as the levels fall on these or beside them, the error jumps from one range to the next.
        margin = 2.0 if kind == "few levels" and codes == 16 else 1.03
        assert found <= margin * least + noise, (method, span)


@pytest.mark.parametrize("kind", KINDS)
def test_clipping_that_weighs_more_is_clipping_less(kind: str) -> None:
    observed = histogram(draw(kind))
    mse, sqnr = (read_range(observed, RangeMethod(one), codes=16) for one in ("mse", "sqnr"))
    assert sqnr.high - sqnr.low >= 0.99 * (mse.high - mse.low)


def test_with_many_codes_nothing_is_clipped() -> None:
    values = draw("laplace")
    for method in ("mse", "sqnr", "kl"):
        span = read_range(histogram(values), RangeMethod(method), codes=1 << 16)  # type: ignore[arg-type]
        assert span.low == pytest.approx(values.min(), rel=0.02)
        assert span.high == pytest.approx(values.max(), rel=0.02)


def divergence_by_loops(counts: list[float], end: int, levels: int) -> float:
    """Return Migacz's divergence the way his slides write it: bin by bin."""
    reference = counts[:end]
    reference[-1] += sum(counts[end:])
    expanded = [0.0] * end
    for level in range(levels):
        members = [bin_ for bin_ in range(end) if bin_ * levels // end == level]
        held = [bin_ for bin_ in members if counts[bin_] > 0]
        for bin_ in held:
            expanded[bin_] = sum(counts[member] for member in members) / len(held)
    total, inner = sum(reference), sum(expanded)
    if not inner:
        return math.inf
    return sum(
        p / total * math.log((p / total) / max(q / inner, 0.5 / total))
        for p, q in zip(reference, expanded, strict=True)
        if p > 0
    )


@pytest.mark.parametrize("levels", [7, 16])
@pytest.mark.parametrize("kind", ["relu", "relu of heavy tails", "laplace", "negative"])
def test_the_divergence_is_the_least_of_all_thresholds(kind: str, levels: int) -> None:
    values = draw(kind)
    one_sided = kind not in ("laplace",)
    statistic = Histogram(bins=256, elements=COUNT)
    accumulator = statistic.start()
    accumulator.update(values[None], 1)
    observed = statistic.result(accumulator.arrays())
    codes = levels + 1 if one_sided else 2 * levels + 1
    span = read_range(observed, RangeMethod("kl"), codes=codes, symmetric=not one_sided)
    counts = observed.counts.astype(float)
    counts[128] = 0.0
    above, below = counts[128:], counts[127::-1]
    folded = (above + below).tolist()
    last = max(index for index, count in enumerate(folded) if count) + 1
    width = observed.edges[1] - observed.edges[0]
    found = round(max(span.high, -span.low) / width + 0.499) if max(span.high, -span.low) < last * width else last
    every = {end: divergence_by_loops(folded, end, levels) for end in range(levels, last + 1)}
    # Between the thresholds that are tried, the divergence goes up and down a little.
    assert every[min(max(found, levels), last)] <= min(every.values()) * 1.1 + 1e-4


def test_the_divergence_cuts_off_an_outlier_but_not_a_shoulder() -> None:
    outlier = read_range(histogram(draw("outlier")), RangeMethod("kl"))
    assert outlier.high < 10.0
    uniform = read_range(histogram(draw("uniform")), RangeMethod("kl"))
    assert uniform.low == pytest.approx(-1.0, abs=0.02)
    assert uniform.high == pytest.approx(3.0, abs=0.02)


def test_what_is_never_negative_has_all_codes_above_zero() -> None:
    for method in ("kl", "mse", "sqnr", "minmax", "percentile"):
        observed = histogram(draw("relu"))
        assert read_range(observed, RangeMethod(method)).low == 0.0  # type: ignore[arg-type]
        below = read_range(histogram(draw("negative")), RangeMethod(method))  # type: ignore[arg-type]
        assert below.high == 0.0
        assert below.low < -1.0


def test_percentiles_of_a_distribution() -> None:
    values = draw("normal")
    span = read_range(histogram(values), RangeMethod("percentile", 99.0))
    assert (span.low, span.high) == pytest.approx(tuple(np.percentile(values, [0.5, 99.5])), abs=0.02)


def test_zero_is_in_every_range() -> None:
    positive, negative = np.float32([3.0, 5.0]), np.float32([-5.0, -3.0])
    for method in ("minmax", "percentile", "kl", "mse", "sqnr"):
        assert read_range(histogram(positive), RangeMethod(method), codes=16).low == 0.0  # type: ignore[arg-type]
        assert read_range(histogram(negative), RangeMethod(method), codes=16).high == 0.0  # type: ignore[arg-type]
    assert read_range(Extremes(np.array(3.0), np.array(5.0)), RangeMethod("average")) == Range(0.0, 5.0)


@pytest.mark.parametrize("values", [[], [0.0, 0.0], [0.0]], ids=["none", "zeros", "zero"])
def test_nothing_and_zeros_have_an_empty_range(values: list[float]) -> None:
    for method in ("minmax", "percentile", "kl", "mse", "sqnr"):
        assert read_range(histogram(np.float32(values)), RangeMethod(method)) == Range(0.0, 0.0)  # type: ignore[arg-type]


@pytest.mark.parametrize("constant", [1e-30, 2.0, -7.5, 1e30])
@pytest.mark.parametrize("symmetric", [False, True])
def test_a_constant_is_kept(constant: float, symmetric: bool) -> None:
    for method in ("minmax", "percentile", "kl", "mse", "sqnr"):
        span = read_range(histogram(np.full(99, constant, np.float32)), RangeMethod(method), symmetric=symmetric)  # type: ignore[arg-type]
        if span.low == span.high:
            assert abs(constant) < 1e-29
            continue
        assert squared_error(np.float32([constant]), span, 256, symmetric) <= (0.01 * constant) ** 2


def test_channels_are_read_one_by_one() -> None:
    values = np.stack([draw("relu"), 100 * draw("normal")], 1)[:, :, None]
    statistic = Histogram(axis=1, elements=2)
    accumulator = statistic.start()
    accumulator.update(values, len(values))
    observed = statistic.result(accumulator.arrays())
    spans = read_ranges(observed, RangeMethod("mse"))
    alone = [read_range(histogram(values[:, index, 0]), RangeMethod("mse")) for index in range(2)]
    for span, other in zip(spans, alone, strict=True):
        assert (span.low, span.high) == pytest.approx((other.low, other.high), rel=0.05)


@pytest.mark.parametrize("text", ["minmax", "average", "kl", "mse", "sqnr", "p99.99", "p50", "p100"])
def test_methods_are_text_and_back(text: str) -> None:
    assert str(RangeMethod.parse(text)) == text


def test_another_spelling_of_percentiles() -> None:
    assert RangeMethod.parse("percentile:99.9") == RangeMethod("percentile", 99.9)


@pytest.mark.parametrize("text", ["", "p", "p49", "p101", "p-1", "entropie", "percentile:", "pnan", "MSE"])
def test_what_is_no_method_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="ranges cannot be"):
        RangeMethod.parse(text)
