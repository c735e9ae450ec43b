"""Streamed ranges against numpy on all values at once."""

from __future__ import annotations

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.data import open_data
from graphopt.errors import DataError
from graphopt.statistics import Histogram, RangeMethod, collect_ranges, with_outputs

pytest.importorskip("onnxruntime")


def model() -> ir.Model:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1.0, -2.0, 3.0, 0.5}> {
      a = Mul(x, w)
      r = Relu(a)
      y = Log(r)
    }"""
    return ir.from_proto(onnx.parser.parse_model(text))


def test_ranges_equal_numpys_over_all_samples() -> None:
    x = np.random.default_rng(0).standard_normal((100, 4)).astype(np.float32)
    subject = model()
    found = collect_ranges(subject, ["x", "a", "r"], open_data({"x": x}, subject), OnnxRuntime(), RangeMethod())
    a = x * np.array([1.0, -2.0, 3.0, 0.5], np.float32)
    assert found["x"].low == pytest.approx(x.min())
    assert (found["a"].low, found["a"].high) == pytest.approx((a.min(), a.max()))
    # Zero is always inside.
    assert (found["r"].low, found["r"].high) == pytest.approx((0.0, a.max()))


def test_a_value_that_is_never_negative_still_has_zero_in_its_range() -> None:
    x = np.full((3, 4), 5.0, np.float32)
    subject = model()
    found = collect_ranges(subject, ["x"], open_data({"x": x}, subject), OnnxRuntime(), RangeMethod())
    assert (found["x"].low, found["x"].high) == (0.0, 5.0)


def test_infinity_on_the_way_is_an_error_that_names_the_value() -> None:
    subject = model()
    data = open_data({"x": np.full((3, 4), -1.0, np.float32)}, subject)
    with pytest.raises(DataError, match="`y` becomes NaN or infinite"):
        collect_ranges(subject, ["y"], data, OnnxRuntime(), RangeMethod())


def test_with_outputs_leaves_the_model_alone() -> None:
    subject = model()
    copy = with_outputs(subject, ["a", "r"])
    assert [value.name for value in copy.graph.outputs] == ["a", "r"]
    assert [value.name for value in subject.graph.outputs] == ["y"]
    assert copy.graph.initializers["w"].const_value is subject.graph.initializers["w"].const_value


@pytest.mark.parametrize("share", [90.0, 99.0, 99.9])
def test_percentiles_hold_the_share_asked_for(share: float) -> None:
    values = np.random.default_rng(1).standard_normal(200_000).astype(np.float32)
    histogram = Histogram()
    for part in np.array_split(values, 7):
        histogram.update(part)
    low, high = histogram.percentile(share)
    inside = ((values >= low) & (values <= high)).mean() * 100
    assert inside == pytest.approx(share, abs=0.05)
    below, above = (values < low).mean(), (values > high).mean()
    assert below == pytest.approx(above, abs=5e-4)


def test_the_order_of_samples_does_not_matter() -> None:
    values = np.random.default_rng(2).lognormal(size=10_000).astype(np.float32)
    up, down = Histogram(), Histogram()
    for part in np.array_split(np.sort(values), 10):
        up.update(part)
    for part in np.array_split(np.sort(values)[::-1], 10):
        down.update(part)
    assert up.exponent == down.exponent
    # Exact powers of two of a bin's width may round to either side; nothing else may move.
    assert np.abs(up.counts - down.counts).sum() <= 2
    assert up.counts.sum() == len(values)


def test_no_value_is_lost_when_the_range_grows() -> None:
    histogram = Histogram()
    for scale in (1e-3, 1.0, 1e3, -1e5):
        histogram.update(np.array([scale, scale / 2], np.float32))
    assert histogram.counts.sum() == 8
    assert (histogram.low, histogram.high) == (-1e5, 1e3)


def test_all_zero_and_empty_values_have_a_range() -> None:
    histogram = Histogram()
    histogram.update(np.zeros(0, np.float32))
    histogram.update(np.zeros(5, np.float32))
    assert histogram.percentile(99.0) == (0.0, 0.0)
