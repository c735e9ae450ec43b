"""Splits of values whose declared shape is false: runtimes run such models, so nothing may hang on it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from .pass_runs import loaded, outputs_of, run_passes

pytest.importorskip("onnxruntime")

TEXT = """<ir_version: 8, opset_import: ["" : 18]>
g (float[6] x) => (float[4] z, float[2] p2, float[4] q2)
  <int64[1] zero = {0}, int64[1] two = {2}, int64[1] end = {99}> {
  z = Neg(x)
  p = Slice(z, zero, two)
  q = Slice(z, two, end)
  p2 = Neg(p)
  q2 = Neg(q)
}"""


def test_pieces_are_as_large_as_what_is_inferred_says() -> None:
    proto = onnx.parser.parse_model(TEXT)
    feed = {"x": np.arange(6, dtype=np.float32)}
    run = run_passes(loaded(proto), "split-slices")
    assert [edit.rule for edit in run.edits] == ["split"]
    before, after = outputs_of(proto, feed), outputs_of(run.model, feed)
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected)


SLICES_OF_SLICES = """<ir_version: 8, opset_import: ["" : 18]>
g (float[6] x) => (float[2] a, float[2] b, float[2] c)
  <int64[1] zero = {0}, int64[1] two = {2}, int64[1] four = {4}, int64[1] end = {99}> {
  p = Slice(x, zero, four)
  q = Slice(x, four, end)
  r = Slice(p, zero, two)
  s = Slice(p, two, end)
  a = Neg(q)
  b = Neg(r)
  c = Neg(s)
}"""


def test_a_piece_is_split_again() -> None:
    proto = onnx.parser.parse_model(SLICES_OF_SLICES)
    run = run_passes(loaded(proto), "split-slices")
    first, second = (node for node in run.model.graph if node.op_type == "Split")
    assert second.inputs[0] is first.outputs[0]
    feed = {"x": np.arange(6, dtype=np.float32)}
    before, after = outputs_of(proto, feed), outputs_of(run.model, feed)
    for name, expected in before.items():
        np.testing.assert_array_equal(after[name], expected)
