"""Inputs of fixed sizes: what is asked for is done, reported and compared with, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import DataError, UsageError
from graphopt.specialise import parse_dims, parse_shapes, specialise

from .command_line import run
from .pass_runs import outputs_of

TEXT = """
<ir_version: 8, opset_import: ["" : 17]>
net (float[batch, seq, 4] x, float[batch, total] mask, float[N, 3] free) =>
    (float[batch, seq, 4] y, float[rows, K] z, float[M, 3] w)
<float[batch, seq, 4] doubled>
{
    shape = Shape (x)
    doubled = Add (x, x)
    y = Reshape (doubled, shape)
    z = Neg (mask)
    w = Relu (free)
}
"""
NESTED = """
<ir_version: 8, opset_import: ["" : 17]>
net (bool c, float[batch, 4] x) => (float[batch, 4] y)
{
    y = If (c) <
        then_branch = yes () => (float[batch, 4] a) { a = Relu (x) },
        else_branch = no () => (float[batch, 4] b) { b = Neg (x) }
    >
}
"""


def proto() -> onnx.ModelProto:
    model = onnx.parser.parse_model(TEXT)
    model.graph.input[1].type.tensor_type.shape.dim[1].dim_param = "past + seq"
    return model


def model() -> ir.Model:
    return ir.from_proto(proto())


def dims_of(value: ir.Value) -> list[Any]:
    assert value.shape is not None
    return [dim if isinstance(dim, int) else dim.value for dim in value.shape]


def test_named_dimensions_get_one_size_everywhere() -> None:
    net = model()
    done = specialise(net, {"batch": 2, "seq": 3}, {})
    graph = net.graph
    assert [dims_of(value) for value in graph.inputs] == [[2, 3, 4], [2, "past + seq"], ["N", 3]]
    assert [dims_of(value) for value in graph.outputs] == [[2, 3, 4], [2, "K"], ["M", 3]]
    assert dims_of(graph.node(1).outputs[0]) == [2, 3, 4]
    assert done.dims == {"batch": 2, "seq": 3}
    assert [one.name for one in done.inputs] == ["x", "mask"]
    assert [one.name for one in done.outputs] == ["y", "z"]
    assert done.outputs[0].before == ("batch", "seq", 4)
    assert done.outputs[0].after == (2, 3, 4)


def test_expressions_of_names_follow() -> None:
    net = model()
    specialise(net, {"seq": 3, "past": 5}, {})
    assert dims_of(net.graph.inputs[1]) == ["batch", 8]


def test_shapes_name_dimensions_too() -> None:
    net = model()
    done = specialise(net, {}, {"x": (2, 3, 4), "free": (7, 3)})
    assert done.dims == {"batch": 2, "seq": 3, "N": 7}
    assert [dims_of(value) for value in net.graph.outputs] == [[2, 3, 4], [2, "K"], [7, 3]]


def test_names_mean_the_same_in_nested_graphs() -> None:
    net = ir.from_proto(onnx.parser.parse_model(NESTED))
    specialise(net, {"batch": 2}, {})
    branches = [attribute.as_graph() for attribute in net.graph.node(0).attributes.values()]
    assert [dims_of(branch.outputs[0]) for branch in branches] == [[2, 4], [2, 4]]


@pytest.mark.parametrize(
    ("dims", "shapes", "message", "hint"),
    [
        ({"bath": 1}, {}, "no dimension of an input is called `bath`", "did you mean `batch`"),
        ({"K": 1}, {}, "no dimension of an input is called `K`", "known: "),
        ({"batch": 0}, {}, "dimension `batch` cannot be `0`", "1 or more"),
        ({"batch": True}, {}, "dimension `batch` cannot be `True`", "1 or more"),
        ({"batch": 1.5}, {}, "dimension `batch` cannot be `1.5`", "whole number"),
        ({}, {"x": (1, -2, 4)}, "of input `x` cannot be `-2`", "1 or more"),
        ({}, {"masc": (1, 2)}, "no input `masc`", "did you mean `mask`"),
        ({}, {"x": (1, 2)}, "`x` has 3 dimensions", "--set-shape"),
        ({}, {"x": (1, 2, 5)}, "a dimension that is always 4 cannot be 5", "without a fixed size"),
        ({"batch": 2}, {"x": (1, 2, 4)}, "`batch` cannot be both 2 and 1", "one size"),
        ({}, {"x": (1, 2, 4), "mask": (2, 3)}, "`batch` cannot be both 1 and 2", "one size"),
        ({"seq": 3, "past": 4}, {"mask": (2, 8)}, "`past . seq` cannot be both 8 and 7", "fit each other"),
    ],
)
def test_what_does_not_fit_is_refused(dims: Any, shapes: Any, message: str, hint: str) -> None:
    with pytest.raises(UsageError, match=message) as refused:
        specialise(model(), dims, shapes)
    assert hint in (refused.value.hint or "")


def test_static_model_says_that_it_is() -> None:
    net = ir.from_proto(onnx.parser.parse_model(NESTED.replace("batch", "2")))
    with pytest.raises(UsageError) as refused:
        specialise(net, {"batch": 2}, {})
    assert "has a fixed size" in (refused.value.hint or "")


def test_defaults_of_inputs_keep_their_shape() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[N] x, float[N] b) => (float[N] y) <float[2] b = {1, 2}> { y = Add (x, b) }
    """
    with pytest.raises(UsageError, match="`b` has a default of shape 2"):
        specialise(ir.from_proto(onnx.parser.parse_model(text)), {"N": 3}, {})


def test_words_of_the_command_line() -> None:
    assert parse_dims(["batch=1,seq_len=128", "a + b=3"]) == {"batch": 1, "seq_len": 128, "a + b": 3}
    assert parse_shapes(["input:0:1x3", "scalar:"]) == {"input:0": (1, 3), "scalar": ()}
    for texts in (["batch"], ["=1"], ["batch=x"], ["batch=1=", "b=2"], ["batch=1,batch=2"], [""]):
        with pytest.raises(UsageError):
            parse_dims(texts)
    for texts in (["x"], [":1x2"], ["x:1x"], ["x:axb"], ["x:1", "x:2"]):
        with pytest.raises(UsageError):
            parse_shapes(texts)


# Whole runs


SIZES = {"batch": 2, "seq": 3, "past": 5}


def test_run_compares_and_reports() -> None:
    result = graphopt.optimize(model(), "simplify", set_dims=SIZES, set_shapes={"free": (1, 3)})
    assert [dims_of(value) for value in result.model.graph.inputs] == [[2, 3, 4], [2, 8], [1, 3]]
    assert "Shape" not in [node.op_type for node in result.model.graph]
    specialised = result.report.as_dict()["specialised"]
    assert specialised["dims"]["past"] == 5
    assert specialised["outputs"]["z"] == {"before": ["rows", "K"], "after": [2, 8]}
    assert result.report.steps[0].check.ok
    assert result.report.deployed is not None
    assert result.report.deployed.ok
    rng = np.random.default_rng(0)
    feed = {"x": rng.random((2, 3, 4)), "mask": rng.random((2, 8)), "free": rng.random((1, 3))}
    feed = {name: array.astype(np.float32) for name, array in feed.items()}
    before, after = outputs_of(proto(), feed), outputs_of(result.model, feed)
    assert all(np.array_equal(before[name], after[name]) for name in before)


def test_given_model_is_not_changed() -> None:
    given = model()
    graphopt.optimize(given, "simplify", set_dims=SIZES)
    assert dims_of(given.graph.inputs[0]) == ["batch", "seq", 4]


def test_nothing_asked_nothing_reported() -> None:
    assert graphopt.optimize(model(), "simplify").report.as_dict()["specialised"] is None


def test_data_must_be_of_the_sizes() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[batch, seq] x) => (float[batch, seq] y) { y = Relu (x) }
    """
    net = ir.from_proto(onnx.parser.parse_model(text))
    data = {"x": np.ones((8, 5), np.float32)}
    done = graphopt.optimize(net, "simplify", set_dims={"batch": 1, "seq": 5}, data=data)
    assert done.report.ok
    with pytest.raises(DataError, match=r"array of shape 8x5 for input `x` .float32, 1x4."):
        graphopt.optimize(net, "simplify", set_dims={"batch": 1, "seq": 4}, data=data)


def test_whole_feeds_must_be_of_the_sizes() -> None:
    text = """
    <ir_version: 8, opset_import: ["" : 17]>
    net (float[batch] x, float[rows] r) => (float[batch] y) { s = ReduceSum (r) y = Add (x, s) }
    """
    net = ir.from_proto(onnx.parser.parse_model(text))
    data = [{"x": np.ones(2, np.float32), "r": np.ones(3, np.float32)}] * 4
    assert graphopt.optimize(net, "simplify", set_dims={"batch": 2, "rows": 3}, data=data).report.ok
    with pytest.raises(DataError, match="array of shape 3 for input `r`"):
        graphopt.optimize(net, "simplify", set_dims={"batch": 2, "rows": 4}, data=data)


def test_command_line(tmp_path: Path) -> None:
    file, report = tmp_path / "net.onnx", tmp_path / "report.json"
    onnx.save(proto(), file)
    words = ("--set-dim", "batch=2,seq=3", "--set-dim", "past=5", "--set-shape", "free:7x3")
    outcome = run("optimize", file, "--passes", "simplify", *words, "--report", report)
    assert outcome.code == 0, outcome.err
    assert " input `x`: batch×seq×4 → 2×3×4, as asked\n" in outcome.out
    assert " output `w`: M×3 → 7×3, as asked\n" in outcome.out
    assert json.loads(report.read_text())["specialised"]["inputs"]["free"]["after"] == [7, 3]
    assert dims_of(graphopt.load(tmp_path / "net.opt.onnx").graph.inputs[1]) == [2, 8]


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (("--set-dim", "batch"), "`--set-dim batch` is no size"),
        (("--set-shape", "x"), "`--set-shape x` is no shape"),
        (("--set-dim", "bath=1"), "no dimension of an input is called `bath`"),
    ],
)
def test_wrong_words(tmp_path: Path, words: tuple[str, ...], error: str) -> None:
    file = tmp_path / "net.onnx"
    onnx.save(proto(), file)
    outcome = run("optimize", file, "--passes", "simplify", *words)
    assert outcome.code == 2
    assert error in outcome.error
    assert not (tmp_path / "net.opt.onnx").exists()
