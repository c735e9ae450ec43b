"""Sparse storage: what is written, who reads it, and what is said of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import model_io
from graphopt.errors import ModelError
from graphopt.sparse import SparselyStored

onnxruntime = pytest.importorskip("onnxruntime")
RNG = np.random.default_rng(0)


def with_zeros(zeros: float, shape: tuple[int, int] = (64, 48), dtype: Any = np.float32) -> Any:
    found = RNG.standard_normal(shape).astype(dtype)
    found[RNG.random(shape) < zeros] = 0
    return found


def product(weight: Any, ir_version: int = 8) -> onnx.ModelProto:
    """y = x W."""
    kind = helper.np_dtype_to_tensor_dtype(weight.dtype)
    x = helper.make_tensor_value_info("x", kind, ["N", weight.shape[0]])
    y = helper.make_tensor_value_info("y", kind, ["N", weight.shape[1]])
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "product")],
        "g",
        [x],
        [y],
        [numpy_helper.from_array(weight, "w")],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=ir_version)


def sparsified(weight: Any, tmp_path: Path, **options: Any) -> tuple[onnx.ModelProto, list[str]]:
    path = tmp_path / "out.onnx"
    result = graphopt.optimize(ir.from_proto(product(weight)), "sparsify", output=path, **options)
    return onnx.load(path), [note.text for note in result.report.steps[-1].notes]


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_mostly_zeros_are_stored_without_them_and_a_runtime_reads_it(tmp_path: Path, dtype: Any) -> None:
    weight = with_zeros(0.95, dtype=dtype)
    proto, notes = sparsified(weight, tmp_path)
    assert [one.values.name for one in proto.graph.sparse_initializer] == ["w"]
    assert not proto.graph.initializer
    assert (tmp_path / "out.onnx").stat().st_size < 0.6 * len(product(weight).SerializeToString())
    onnx.checker.check_model(proto)
    x = RNG.standard_normal((3, 64)).astype(dtype)
    options = {"providers": ["CPUExecutionProvider"]}
    got = onnxruntime.InferenceSession(str(tmp_path / "out.onnx"), **options).run(None, {"x": x})[0]
    want = onnxruntime.InferenceSession(product(weight).SerializeToString(), **options).run(None, {"x": x})[0]
    assert np.array_equal(got, want)
    assert any("1 of 1 weights" in note and "stored without them" in note for note in notes)
    assert any("no faster" in note for note in notes)


def test_a_half_of_zeros_is_left_dense_and_the_report_says_why(tmp_path: Path) -> None:
    proto, notes = sparsified(with_zeros(0.5), tmp_path)
    assert not proto.graph.sparse_initializer
    assert any("0 of 1 weights" in note and "two in three" in note and "gzip" in note for note in notes)


def test_what_was_written_is_read_again_to_the_bit(tmp_path: Path) -> None:
    weight = with_zeros(0.95)
    weight[0, :4] = [-0.0, np.nan, np.inf, 1e-42]
    sparsified(weight, tmp_path)
    value = model_io.load(tmp_path / "out.onnx").graph.initializers["w"]
    assert value.const_value is not None
    assert value.const_value.numpy().tobytes() == weight.tobytes()


def test_a_data_file_is_written_without_them_too(tmp_path: Path) -> None:
    weight = with_zeros(0.95)
    model = ir.from_proto(product(weight))
    value = model.graph.initializers["w"]
    assert value.const_value is not None
    value.const_value = SparselyStored(value.const_value)
    model_io.save(model, tmp_path / "out.onnx", external=True)
    again = model_io.load(tmp_path / "out.onnx").graph.initializers["w"].const_value
    assert again is not None
    assert np.array_equal(again.numpy(), weight)
    assert model_io.stored_bytes(tmp_path / "out.onnx") < 0.6 * weight.nbytes
    assert model_io.saved_bytes(model) < 0.6 * weight.nbytes


@pytest.mark.parametrize("target", ["portable", "openvino"])
def test_runtimes_not_known_to_read_it_get_dense_weights(tmp_path: Path, target: str) -> None:
    proto, notes = sparsified(with_zeros(0.95), tmp_path, target=target, backend="onnxruntime")
    assert not proto.graph.sparse_initializer
    assert any("is known to read" in note for note in notes)
    assert not any("two in three" in note for note in notes)


def test_before_there_were_sparse_initializers_weights_stay_dense(tmp_path: Path) -> None:
    model = ir.from_proto(product(with_zeros(0.95), ir_version=5))
    result = graphopt.optimize(model, "sparsify", output=tmp_path / "out.onnx")
    assert any("IR version 5" in note.text for note in result.report.steps[-1].notes)


def test_nothing_to_leave_out_is_said_and_no_error(tmp_path: Path) -> None:
    _, notes = sparsified(with_zeros(0.0), tmp_path)
    assert any("the model is unchanged" in note for note in notes)


def test_weights_with_an_input_of_their_name_stay() -> None:
    proto = product(with_zeros(0.95))
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [64, 48]))
    result = graphopt.optimize(ir.from_proto(proto), "sparsify")
    assert result.report.steps[-1].edits == 0


def test_two_of_four_is_marked_for_sparse_kernels(tmp_path: Path) -> None:
    model = graphopt.optimize(ir.from_proto(product(with_zeros(0.0))), "prune:pattern=2of4,sparsify")
    (note,) = [note for note in model.report.steps[-1].notes if "trt_sparsity_enable" in note.text]
    assert note.facts["two_of_four"] == ["product"]
    _, notes = sparsified(with_zeros(0.5), tmp_path)
    assert not any("trt_sparsity_enable" in note for note in notes)


def with_sparse(indices: Any, values: Any, dims: list[int]) -> onnx.ModelProto:
    proto = product(with_zeros(0.9, (2, 3)))
    del proto.graph.initializer[:]
    sparse = proto.graph.sparse_initializer.add(dims=dims)
    sparse.values.CopyFrom(numpy_helper.from_array(np.array(values, np.float32), "w"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.array(indices, np.int64)))
    return proto


@pytest.mark.parametrize("indices", [[0, 5], [[0, 0], [1, 2]]], ids=["flat", "by axis"])
def test_models_of_others_are_read(tmp_path: Path, indices: Any) -> None:
    onnx.save(with_sparse(indices, [1, 2], [2, 3]), tmp_path / "in.onnx")
    tensor = model_io.load(tmp_path / "in.onnx").graph.initializers["w"].const_value
    assert tensor is not None
    assert tensor.numpy().tolist() == [[1, 0, 0], [0, 0, 2]]


@pytest.mark.parametrize(
    ("indices", "values", "says"),
    [([0, 6], [1, 2], "outside"), ([-1, 2], [1, 2], "outside"), ([0], [1, 2], "places"), ([[0, 3]], [1], "invalid")],
)
def test_what_contradicts_itself_is_refused(tmp_path: Path, indices: Any, values: Any, says: str) -> None:
    onnx.save(with_sparse(indices, values, [2, 3]), tmp_path / "in.onnx")
    with pytest.raises(ModelError, match=says) as caught:
        model_io.load(tmp_path / "in.onnx")
    assert caught.value.hint
