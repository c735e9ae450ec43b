"""What loading changes: constant inputs of old models, and outer values that nested graphs return."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import pytest

import graphopt
from graphopt import walk
from graphopt.backends.reference import Reference

RETURNS_OUTER = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[2] x, bool c, bool d) => (float[2] y) {
  z = Neg(x)
  y = If (c) <
    then_branch = t () => (float[2] z) {},
    else_branch = e () => (float[2] q) {
      q = If (d) <
        then_branch = tt () => (float[2] z) {},
        else_branch = ee () => (float[2] r) { r = Abs(z) }
      >
    }
  >
}"""


def load(text: str, tmp_path: Path, ir_version: int | None = None) -> graphopt.ir.Model:
    proto = onnx.parser.parse_model(text)
    if ir_version is not None:
        proto.ir_version = ir_version
    onnx.save(proto, tmp_path / "m.onnx")
    return graphopt.load(tmp_path / "m.onnx")


@pytest.mark.parametrize("c", [True, False])
@pytest.mark.parametrize("d", [True, False])
def test_a_returned_outer_value_becomes_an_identity(c: bool, d: bool, tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    model = load(RETURNS_OUTER, tmp_path)
    feeds = {"x": np.array([-1.0, 2.0], np.float32), "c": np.array(c), "d": np.array(d)}
    with Reference().open(tmp_path / "m.onnx") as session:
        expected = session.run(feeds)["y"]
    result = graphopt.optimize(model, "simplify", output=tmp_path / "out.onnx")
    assert result.report.steps[0].check.ok
    runtime = pytest.importorskip("graphopt.backends.onnxruntime").OnnxRuntime()
    with runtime.open(tmp_path / "out.onnx") as session:
        np.testing.assert_array_equal(session.run(feeds)["y"], expected)


OLD = """<ir_version: 3, opset_import: ["": 9]>
agraph (float[2, 2] x, float[2, 2] w) => (float[2, 2] y) <float[2, 2] w = {1.0, 2.0, 3.0, 4.0}> { y = MatMul(x, w) }"""


def test_initializers_of_an_old_model_are_constants_not_inputs(tmp_path: Path) -> None:
    model = load(OLD, tmp_path, ir_version=3)
    assert [value.name for value in model.graph.inputs] == ["x"]
    assert model.ir_version == 4
    assert walk.constant_tensor(model.graph.initializers["w"]) is not None


def test_from_version_4_on_they_are_defaults_a_caller_may_override(tmp_path: Path) -> None:
    model = load(OLD, tmp_path, ir_version=4)
    assert [value.name for value in model.graph.inputs] == ["x", "w"]
    assert walk.constant_tensor(model.graph.initializers["w"]) is None


def test_an_old_model_is_pruned_like_a_new_one(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    load(OLD, tmp_path, ir_version=3)
    report = graphopt.optimize(tmp_path / "m.onnx", "prune", output=tmp_path / "out.onnx").report
    assert report.after.nonzero == 2
