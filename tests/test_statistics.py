"""Streamed statistics against numpy on all values at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from graphopt.backend import Array
from graphopt.errors import DataError
from graphopt.statistics import Distribution, Histogram, MinMax, Moments, MovingAverage, Statistic

ALL: list[Statistic[Any]] = [MinMax(), MovingAverage(), Histogram(), Moments()]


def collect(statistic: Statistic[Any], values: Array, batches: int = 1) -> Any:
    accumulator = statistic.start()
    for batch in np.array_split(values, batches):
        accumulator.update(batch, len(batch))
    return statistic.result(accumulator.arrays())


def activations(shape: tuple[int, ...] = (12, 6, 5, 7), seed: int = 0) -> Array:
    """Return values of which each channel along axis 1 has a scale and an offset of its own."""
    draw = np.random.default_rng(seed)
    scales = draw.uniform(0.1, 10, (shape[1], *[1] * (len(shape) - 2)))
    return (draw.standard_normal(shape) * scales + draw.uniform(-5, 5, scales.shape)).astype(np.float32)


@pytest.mark.parametrize("batches", [1, 5])
@pytest.mark.parametrize(("axis", "others"), [(None, (0, 1, 2, 3)), (1, (0, 2, 3)), (-1, (0, 1, 2))])
def test_extremes_and_averages_are_numpys(axis: int | None, others: tuple[int, ...], batches: int) -> None:
    values = activations()
    wide = values.astype(np.float64)
    extremes = collect(MinMax(axis), values, batches)
    np.testing.assert_array_equal(extremes.low, values.min(others))
    np.testing.assert_array_equal(extremes.high, values.max(others))
    moments = collect(Moments(axis), values, batches)
    np.testing.assert_allclose(moments.mean, wide.mean(others), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(moments.mean_square, (wide**2).mean(others), rtol=1e-5)
    np.testing.assert_allclose(moments.variance, wide.var(others), rtol=1e-4)
    np.testing.assert_array_equal(moments.absmax, np.abs(values).max(others))


@pytest.mark.parametrize("axis", [None, 1, 3])
def test_moving_averages_do_not_hang_on_the_batches(axis: int | None) -> None:
    values = activations()
    others = tuple(i for i in range(1, 4) if i != axis)
    expected = values.min(others).mean(0, dtype=np.float64), values.max(others).mean(0, dtype=np.float64)
    for batches in (1, 5, 12):
        found = collect(MovingAverage(axis), values, batches)
        np.testing.assert_allclose(found.low, expected[0], rtol=1e-6)
        np.testing.assert_allclose(found.high, expected[1], rtol=1e-6)


def test_samples_folded_into_the_first_axis_are_told_apart() -> None:
    """As heads of attention are: [samples × heads, ...]."""
    values = activations((12, 3))
    accumulator = MovingAverage().start()
    accumulator.update(values.reshape(36, 1), 12)
    found = MovingAverage().result(accumulator.arrays())
    assert float(found.low) == pytest.approx(values.min(1).mean(dtype=np.float64), rel=1e-6)


def test_a_value_that_is_no_list_of_samples_counts_once_a_batch() -> None:
    accumulator = MovingAverage().start()
    for batch in (np.array([1.0, 5.0, 3.0], np.float32), np.array([3.0, 7.0, 3.0], np.float32)):
        accumulator.update(batch, 2)
    found = MovingAverage().result(accumulator.arrays())
    assert (float(found.low), float(found.high)) == (2.0, 6.0)


def test_samples_along_another_axis_are_told_apart_one_at_a_time() -> None:
    """Of [time, samples, channels], whoever gives one sample at a time gets the average over samples."""
    values = activations((16, 4, 8))
    accumulator = MovingAverage().start()
    for index in range(4):
        accumulator.update(values[:, index : index + 1], 1)
    expected = values.max((0, 2)).mean(dtype=np.float64)
    assert float(MovingAverage().result(accumulator.arrays()).high) == pytest.approx(expected, rel=1e-6)


def exact_bins(values: Array, distribution: Distribution) -> Array:
    counts, _ = np.histogram(values.astype(np.float64), distribution.edges)
    return counts


@pytest.mark.parametrize("batches", [1, 7])
def test_histograms_count_as_numpy_does(batches: int) -> None:
    values = activations()
    whole = collect(Histogram(bins=512), values, batches)
    assert whole.counts.sum() == values.size
    # A value within 2^-10 of a bin's edge may count on either side.
    assert np.abs(whole.counts - exact_bins(values, whole)).sum() <= 4
    by_channel = collect(Histogram(axis=1, bins=512), values, batches)
    assert by_channel.counts.shape == (6, 512)
    for index in range(6):
        one = by_channel.channel(index)
        assert np.abs(one.counts - exact_bins(values[:, index], one)).sum() <= 4
        assert (one.low, one.high) == (values[:, index].min(), values[:, index].max())
        assert 2.0 ** (one.exponent - 1) < max(-one.low, one.high) <= 2.0**one.exponent


def test_the_order_of_samples_does_not_matter() -> None:
    values = np.random.default_rng(2).lognormal(size=10_000).astype(np.float32)
    up, down = collect(Histogram(), np.sort(values), 10), collect(Histogram(), np.sort(values)[::-1], 10)
    assert up.exponent == down.exponent
    # About one value in 1,000 lies within 2^-10 of a bin's edge, and may count on either side.
    assert np.abs(up.counts - down.counts).sum() <= 40
    assert up.counts.sum() == len(values)


def test_no_value_is_lost_when_the_range_grows() -> None:
    statistic = Histogram()
    accumulator = statistic.start()
    for scale in (0.0, 1e-30, 1e-3, 1.0, 1e3, -1e5, 2.0**40, 3e38):
        accumulator.update(np.array([scale, scale / 2], np.float32), 2)
    found = statistic.result(accumulator.arrays())
    assert found.counts.sum() == 16
    assert (found.low, found.high) == (-1e5, np.float32(3e38))


def test_of_large_samples_evenly_spaced_elements_are_counted() -> None:
    """Each channel and column gets its share, and the extremes are those of all elements."""
    draw = np.random.default_rng(3)
    values = draw.standard_normal((4, 16, 24, 24)).astype(np.float32)
    values += np.arange(16, dtype=np.float32)[:, None, None] * 10
    values[2, 3, 4, 5] = 1000.0
    found = collect(Histogram(elements=1000), values, 2)
    assert 3000 <= found.counts.sum() <= 4000
    assert found.high == 1000.0
    centers = (found.edges[1:] + found.edges[:-1]) / 2
    share = [
        found.counts[(centers > 10 * c - 5) & (centers < 10 * c + 5)].sum() / found.counts.sum() for c in range(16)
    ]
    np.testing.assert_allclose(share, 1 / 16, rtol=0.1)
    by_channel = collect(Histogram(axis=1, elements=1000), values, 2)
    np.testing.assert_allclose(by_channel.counts.sum(1), by_channel.counts.sum() / 16, rtol=0.1)


@pytest.mark.parametrize("axis", [None, 1, 2, 3])
@pytest.mark.parametrize("shape", [(8, 16, 24, 24), (8, 6, 5000, 2), (8, 2, 3, 700)])
def test_which_elements_are_counted_does_not_hang_on_the_batches(axis: int | None, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(4).standard_normal(shape).astype(np.float32)
    values[0].flat[:] = np.resize(np.float32([-4.5, 4.5]), values[0].size)  # no range grows later
    values = np.clip(values, -7, 7)
    statistic = Histogram(axis, bins=256, elements=1000)
    alone, pairs, whole = (collect(statistic, values, batches) for batches in (8, 4, 1))
    np.testing.assert_array_equal(alone.counts, pairs.counts)
    np.testing.assert_array_equal(alone.counts, whole.counts)
    assert 0 < whole.counts.sum() < values.size


def test_too_many_channels_for_their_histograms_are_refused_before_memory_is_taken() -> None:
    values = np.zeros((1, 5000), np.float32)
    with pytest.raises(DataError, match="5000 channels along axis 1, too many for 8192 bins each") as caught:
        collect(Histogram(1), values)
    assert "`Histogram(axis, bins=4096)`" in (caught.value.hint or "")
    assert collect(Histogram(1, bins=4096), values).counts.shape == (5000, 4096)
    assert collect(Histogram(), values).counts.sum() == 5000


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9])
def test_percentiles_hold_the_share_asked_for(share: float) -> None:
    values = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    low, high = collect(Histogram(elements=200_000), values[None]).percentile(share)
    inside = ((values >= low) & (values <= high)).mean() * 100
    assert inside == pytest.approx(share, abs=0.05)
    assert (values < low).mean() == pytest.approx((values > high).mean(), abs=5e-4)


def test_the_whole_percentile_is_the_extremes() -> None:
    values = activations()
    assert collect(Histogram(), values).percentile(100.0) == (values.min(), values.max())


@pytest.mark.parametrize("statistic", ALL, ids=lambda one: one.key)
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_single_nan_or_infinity_is_an_error(statistic: Statistic[Any], broken: float) -> None:
    values = np.ones((3, 40_000), np.float32)
    values[1, 20_001] = broken
    with pytest.raises(DataError, match="becomes NaN or infinite"):
        collect(statistic, values)


@pytest.mark.parametrize("kind", [MinMax, MovingAverage, Histogram, Moments])
def test_an_axis_that_does_not_exist_is_an_error(kind: Any) -> None:
    with pytest.raises(DataError, match="has 2 axes, and none is number 2"):
        collect(kind(axis=2), np.ones((3, 4), np.float32))


@pytest.mark.parametrize("kind", [MinMax, MovingAverage, Histogram, Moments])
def test_channels_that_come_and_go_are_an_error(kind: Any) -> None:
    accumulator = kind(axis=1).start()
    accumulator.update(np.ones((3, 4), np.float32), 3)
    with pytest.raises(DataError, match="4 channels along axis 1 on one sample and 5 on another"):
        accumulator.update(np.ones((3, 5), np.float32), 3)


@pytest.mark.parametrize("statistic", ALL, ids=lambda one: one.key)
def test_empty_values_are_no_values(statistic: Statistic[Any]) -> None:
    accumulator = statistic.start()
    statistic.result(accumulator.arrays())  # of a value that was never seen
    accumulator.update(np.zeros((0, 4), np.float32), 0)
    accumulator.update(np.full((1, 4), 2.0, np.float32), 1)
    accumulator.update(np.zeros((2, 0), np.float32), 2)
    found = statistic.result(accumulator.arrays())
    if isinstance(statistic, Moments):
        assert (found.mean, found.mean_square, found.absmax) == (2.0, 4.0, 2.0)
    else:
        assert (found.low, found.high) == (2.0, 2.0)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float64, np.int8])
def test_other_dtypes(dtype: Any) -> None:
    values = np.arange(60).reshape(5, 12).astype(dtype)
    for batches in (1, 3):
        assert collect(MinMax(), values, batches).high == 59
        assert collect(Histogram(), values, batches).counts.sum() == 60
        assert collect(Moments(), values, batches).mean == pytest.approx(29.5)


def test_keys_tell_statistics_apart() -> None:
    every = [kind(axis) for kind in (MinMax, MovingAverage, Histogram, Moments) for axis in (None, 0, 1)]
    assert len({one.key for one in [*every, Histogram(bins=64), Histogram(elements=9)]}) == len(every) + 2
    assert len({*every, MinMax()}) == len(every)
