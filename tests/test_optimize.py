"""The Python API: what it takes, what it refuses, and what it gives back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry
from graphopt.data import open_data
from graphopt.errors import DataError, UsageError
from graphopt.evaluation import Judge
from graphopt.passes import Prune

pytest.importorskip("onnxruntime")

TEXT = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[n, 4] x) => (float[n, 3] y)
    <float[4, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}> { a = Identity(x) [product] y = MatMul(a, w) }"""
SAMPLES = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)


def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


def test_passes_as_objects_text_or_both_give_the_same() -> None:
    results = [
        graphopt.optimize(model(), passes) for passes in ("simplify,prune:sparsity=0.25", ["simplify", Prune(0.25)])
    ]
    first, second = (result.model.graph.initializers["w"].const_value.numpy() for result in results)
    assert np.array_equal(first, second)
    assert results[0].report.pipeline == results[1].report.pipeline


def test_a_path_and_a_model_in_memory_give_the_same(tmp_path: Path) -> None:
    graphopt.save(model(), tmp_path / "m.onnx")
    loaded = graphopt.optimize(tmp_path / "m.onnx", "simplify", output=tmp_path / "a.onnx")
    given = graphopt.optimize(model(), "simplify", output=tmp_path / "b.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()
    assert loaded.report.after.nodes == given.report.after.nodes


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"verify": "rewrite"}, "verify cannot be `rewrite`"),
        ({"verify": None}, "verify cannot be `None`"),
        ({"threads": -2}, "threads cannot be `-2`"),
        ({"seed": "x"}, "seed cannot be `x`"),
        ({"budget": {"top1": 0.01}}, "budget `top1` has no `=`"),
        ({"passes": None}, "passes cannot be `None`"),
        ({"passes": Prune}, "passes cannot be"),
        ({"model": onnx.ModelProto()}, "a model cannot be a `ModelProto`"),
        ({"model": b"bytes"}, "a model cannot be a `bytes`"),
    ],
)
def test_wrong_arguments_are_usage_errors_with_a_hint(arguments: dict[str, Any], message: str) -> None:
    call: dict[str, Any] = {"model": model(), "passes": "simplify", **arguments}
    with pytest.raises(UsageError) as caught:
        graphopt.optimize(call.pop("model"), call.pop("passes"), **call)
    assert message in caught.value.message
    assert caught.value.hint


def test_labels_outside_the_classes_are_refused() -> None:
    with pytest.raises(DataError, match="label 3 for outputs of 3 classes"):
        graphopt.optimize(model(), "prune", data={"x": SAMPLES, "labels": np.full(40, 3)})


def test_rewritten_nodes_keep_their_names() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y)
        <float[2, 2, 1, 1] w = {1, 2, 3, 4}, float[2] g = {1, 2}, float[2] b = {0, 1}, float[2] m = {0, 0},
         float[2] v = {1, 1}> {
      [conv1] c = Conv(x, w)
      [bn1] n = BatchNormalization(c, g, b, m, v)
      [act] y = Relu(n)
    }"""
    result = graphopt.optimize(ir.from_proto(onnx.parser.parse_model(text)), "simplify")
    assert [(node.name, node.outputs[0].name) for node in result.model.graph] == [("conv1", "n"), ("act", "y")]


@pytest.mark.parametrize(("other", "hangs"), [(1000.001, True), (1.0, False)])
def test_an_error_is_excused_where_rounding_alone_moves_the_original_as_far(other: float, hangs: bool) -> None:
    text = f"""<ir_version: 8, opset_import: ["" : 18]>
    g (float[4] x) => (float[4] y) <float a = {{1000.0}}, float b = {{{other}}}> {{
      p = Add(x, a)
      q = Add(x, b)
      d = Sub(q, p)
      y = Reciprocal(d)
    }}"""
    backend = registry.backend("onnxruntime")
    data = open_data({"x": np.zeros((4, 4), np.float32)}, ir.from_onnx_text(text), labels=None)
    judge = Judge(ir.from_onnx_text(text), backend, data, [], seed=0, threads=1)
    why = judge.hangs_on_rounding(1e-4)
    assert (why is not None) == hangs, why
