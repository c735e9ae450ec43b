"""Loading and saving: nothing lost, nothing copied without need, nothing half written, and errors that help."""

from __future__ import annotations

import errno
import io
import os
import runpy
import stat
import subprocess
import sys
import textwrap
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from graphopt import data_files, mapped, model_io
from graphopt.errors import ModelError
from graphopt.header import each_tensor, graphs
from graphopt.mapped import MappedTensor
from graphopt.walk import FIRST_IR_WITH_PURE_INITIALIZERS
from graphopt.wire import WireError, fields, length_delimited, open_holes, strip_payloads

ROOT = Path(__file__).resolve().parents[1]
SHARED = Path(os.environ.get("GRAPHOPT_SHARED", ROOT.parent / "shared"))
MODELS = sorted((SHARED / "assets" / "models").glob("*.onnx"))
LARGE, SMALL = (32, 32), (2, 2)


# Models to load and save


def floats(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def constant(output: str, array: Any) -> Any:
    return helper.make_node("Constant", [], [output], value=numpy_helper.from_array(array, f"{output}_value"))


def add_model(weights: dict[str, Any] | None = None, *, ir_version: int = 8) -> Any:
    """Return y = x + w0 + w1 + …"""
    arrays = {"w0": floats(*LARGE), "w1": floats(*LARGE, seed=1)} if weights is None else weights
    nodes, last = [], "x"
    for name in arrays:
        nodes.append(helper.make_node("Add", [last, name], [f"after_{name}"]))
        last = f"after_{name}"
    nodes.append(helper.make_node("Identity", [last], ["y"]))
    graph = helper.make_graph(
        nodes,
        "adds",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, LARGE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, LARGE)],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, ir_version=ir_version, opset_imports=[helper.make_opsetid("", 17)])


def nested_model(shape: tuple[int, ...] = LARGE) -> Any:
    """Return a model with a large tensor everywhere ONNX allows one, and something in every field that can be kept."""
    value_info = helper.make_tensor_value_info
    then = helper.make_graph(
        [constant("inner", floats(*shape, seed=2)), helper.make_node("Sum", ["x", "inner", "held"], ["then_out"])],
        "then",
        [],
        [value_info("then_out", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(floats(*shape, seed=3), "held")],
        doc_string="the branch taken",
    )
    other = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["else_out"])],
        "else",
        [],
        [value_info("else_out", TensorProto.FLOAT, shape)],
    )
    function = helper.make_function(
        "custom",
        "Shift",
        ["a"],
        ["b"],
        [
            constant("shift", floats(*shape, seed=4)),
            helper.make_node("Mul", ["a", "shift"], ["t"]),
            helper.make_node("LeakyRelu", ["t"], ["b"]),
        ],
        [helper.make_opsetid("", 17)],
        attributes=["alpha"],
    )
    leak = function.node[2].attribute.add(name="alpha", ref_attr_name="alpha", type=onnx.AttributeProto.FLOAT)
    leak.doc_string = "how much gets through"
    function.doc_string = "a function"
    graph = helper.make_graph(
        [
            helper.make_node("If", ["c"], ["chosen"], "choose", then_branch=then, else_branch=other),
            helper.make_node("Shift", ["chosen"], ["shifted"], domain="custom", alpha=0.5),
            helper.make_node("Add", ["shifted", "w"], ["sum"], doc_string="adds"),
            helper.make_node("Dropout", ["sum"], ["y", ""]),
        ],
        "main",
        [value_info("x", TensorProto.FLOAT, shape, "the input"), value_info("c", TensorProto.BOOL, [])],
        [value_info("y", TensorProto.FLOAT, ["rows", None])],
        [numpy_helper.from_array(floats(*shape, seed=5), "w"), numpy_helper.from_array(floats(*SMALL), "small")],
        doc_string="a graph",
        value_info=[value_info("sum", TensorProto.FLOAT, ["rows", shape[1]])],
    )
    graph.initializer[0].doc_string = "a weight"
    graph.initializer[0].metadata_props.add(key="b", value="2")
    graph.initializer[1].metadata_props.add(key="a", value="1")
    graph.node[2].metadata_props.add(key="origin", value="7")
    annotation = graph.quantization_annotation.add(tensor_name="sum")
    annotation.quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="small")
    model = helper.make_model(
        graph,
        ir_version=10,
        functions=[function],
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("custom", 1)],
        producer_name="tests",
        producer_version="1",
        domain="example",
        model_version=3,
        doc_string="a model",
    )
    helper.set_model_props(model, {"second": "2", "first": "1"})
    return model


def write(model: Any, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def write_external(model: Any, path: Path, location: str = "weights.bin") -> Path:
    onnx.save(model, path, save_as_external_data=True, location=location, size_threshold=0)
    return path


def normalised(model: Any) -> Any:
    """Return a copy without the liberties that `graphopt.fidelity` allows, written apart from it on purpose."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    _normalise(copy)
    return copy


def _normalise(message: Any) -> None:
    for field, value in message.ListFields():
        if field.name in ("metadata_props", "quant_parameter_tensor_names"):
            pairs = sorted((pair.key, pair.value) for pair in value)
            del value[:]
            for key, text in pairs:
                value.add(key=key, value=text)
        elif field.message_type is not None:
            for part in value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else [value]:
                _normalise(part)
            if field.name == "type" and not value.ByteSize():
                message.ClearField("type")
        elif field.name in ("domain", "overload", "doc_string", "name", "producer_version") and value == "":
            message.ClearField(field.name)
    if isinstance(message, onnx.GraphProto):
        described = {tensor.name for tensor in message.initializer}
        described |= {entry.name for entry in (*message.input, *message.output)}
        infos = sorted((entry for entry in message.value_info if entry.name not in described), key=lambda e: e.name)
        message.ClearField("value_info")
        message.value_info.extend(infos)
    if isinstance(message, onnx.NodeProto):
        while message.output and not message.output[-1]:
            del message.output[-1]


def same_proto(left: Any, right: Any) -> bool:
    # Bytes, because a NaN is not equal to itself.
    return bool(
        normalised(left).SerializeToString(deterministic=True)
        == normalised(right).SerializeToString(deterministic=True)
    )


def weights_of(path: Path) -> dict[str, Any]:
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def listing(folder: Path) -> dict[str, bytes]:
    return {entry.name: entry.read_bytes() for entry in folder.iterdir() if entry.is_file()}


@pytest.fixture
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda _: None)


# Round trips


@pytest.mark.usefixtures("no_fsync")
def test_every_onnx_node_case_survives_a_round_trip(tmp_path: Path) -> None:
    from onnx.backend.test.case.node import collect_testcases

    cases = [case for case in collect_testcases(None) if case.model is not None]
    assert len(cases) > 1000
    changed = []
    for case in cases:
        source = write(case.model, tmp_path / "in.onnx")
        model_io.save(model_io.load(source), tmp_path / "out.onnx")
        case.model.ir_version = max(case.model.ir_version, FIRST_IR_WITH_PURE_INITIALIZERS)
        if not same_proto(case.model, onnx.load(tmp_path / "out.onnx")):
            changed.append(case.name)
    assert changed == []


@pytest.mark.skipif(not MODELS, reason="the shared models are not here")
@pytest.mark.parametrize("path", MODELS, ids=lambda path: path.stem)
def test_real_models_survive_round_trips(path: Path, tmp_path: Path) -> None:
    model = model_io.load(path)
    original = onnx.load(path)
    model_io.save(model, tmp_path / "inline.onnx", external=False)
    assert same_proto(original, onnx.load(tmp_path / "inline.onnx"))
    model_io.save(model, tmp_path / "external.onnx", external=True)
    assert (tmp_path / "external.onnx").stat().st_size < path.stat().st_size
    back = model_io.load(tmp_path / "external.onnx")
    model_io.save(back, tmp_path / "inline_again.onnx", external=False)
    assert (tmp_path / "inline_again.onnx").read_bytes() == (tmp_path / "inline.onnx").read_bytes()
    for name in ("inline.onnx", "external.onnx"):
        onnx.checker.check_model(str(tmp_path / name))
        open_session(tmp_path / name)


def open_session(path: Path) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    return runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("external", [False, True])
def test_nested_model_survives_and_runs(tmp_path: Path, external: bool) -> None:
    proto = nested_model()
    model_io.save(model_io.load(write(proto, tmp_path / "in.onnx")), tmp_path / "out.onnx", external=external)
    assert same_proto(proto, model_proto_with_raw_data(tmp_path / "out.onnx"))
    onnx.checker.check_model(str(tmp_path / "out.onnx"))
    feeds = {"x": floats(*LARGE, seed=9), "c": np.array(True)}
    expected = open_session(tmp_path / "in.onnx").run(None, feeds)
    np.testing.assert_array_equal(open_session(tmp_path / "out.onnx").run(None, feeds), expected)


def model_proto_with_raw_data(path: Path) -> Any:
    proto = onnx.load(path)
    for tensor in onnx.external_data_helper._get_all_tensors(proto):
        # onnx leaves an explicit default where it has read external data.
        tensor.ClearField("data_location")
    return proto


def test_every_large_tensor_is_mapped_and_equal(tmp_path: Path) -> None:
    model = model_io.load(write(nested_model(), tmp_path / "in.onnx"))
    mapped_tensors = [tensor for tensor in each_tensor(model) if isinstance(tensor, MappedTensor)]
    assert len(mapped_tensors) == 4
    expected = [floats(*LARGE, seed=seed) for seed in (5, 3, 2, 4)]
    for tensor, array in zip(mapped_tensors, expected, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
    assert len({id(tensor.file) for tensor in mapped_tensors}) == 1
    weight = model.graph.initializers["w"].const_value
    assert weight is not None
    assert (weight.name, weight.doc_string, weight.metadata_props) == ("w", "a weight", {"b": "2"})


# Tensors

DTYPES = [dtype for dtype in ir.DataType if dtype not in (ir.DataType.UNDEFINED, ir.DataType.STRING)]


@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.name)
def test_every_dtype_reads_as_onnx_ir_reads_it(tmp_path: Path, dtype: ir.DataType, external: bool) -> None:
    # 2,001 elements: the last byte of a packed tensor is only half used.
    count = 2001 * 3
    size = -(-count * dtype.bitwidth // 8)
    raw = bytearray(np.random.default_rng(0).integers(0, 2 if dtype == ir.DataType.BOOL else 256, size, np.uint8))
    used = count * dtype.bitwidth % 8
    if used:
        raw[-1] &= (1 << used) - 1
    tensor = TensorProto(name="w", data_type=dtype.value, dims=[3, 2001], raw_data=bytes(raw))
    expected = ir.serde.TensorProtoTensor(tensor).numpy()
    graph = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["y"])],
        "one",
        [],
        [helper.make_tensor_value_info("y", dtype.value, [3, 2001])],
        [tensor],
    )
    path = tmp_path / "in.onnx"
    (write_external if external else write)(helper.make_model(graph, ir_version=10), path)
    weight = model_io.load(path).graph.initializers["w"].const_value
    assert isinstance(weight, MappedTensor)
    array = weight.numpy()
    assert array.dtype == expected.dtype
    assert array.shape == (3, 2001)
    assert array.tobytes() == expected.tobytes()
    assert weight.tobytes() == bytes(raw)
    assert weight.nbytes == size
    np.testing.assert_array_equal(np.asarray(weight).view(np.uint8), expected.view(np.uint8))


def load_weight(folder: Path) -> MappedTensor:
    weight = model_io.load(write(add_model(), folder / "in.onnx")).graph.initializers["w0"].const_value
    assert isinstance(weight, MappedTensor)
    return weight


def test_arrays_are_read_only_views_of_one_mapping(tmp_path: Path) -> None:
    weight = load_weight(tmp_path)
    first, second = weight.numpy(), weight.numpy()
    assert np.shares_memory(first, second)
    with pytest.raises(ValueError, match="read-only"):
        first[0, 0] = 1
    with pytest.raises(ValueError, match="cannot set WRITEABLE"):
        first.flags.writeable = True


def test_released_pages_are_read_again(tmp_path: Path) -> None:
    weight = load_weight(tmp_path)
    array = weight.numpy()
    weight.release()
    weight.file.release()
    np.testing.assert_array_equal(array, floats(*LARGE))


def test_tofile_writes_to_memory_and_to_files(tmp_path: Path) -> None:
    weight = load_weight(tmp_path)
    memory = io.BytesIO()
    weight.tofile(memory)
    assert memory.getvalue() == floats(*LARGE).tobytes()
    with open(tmp_path / "out", "wb") as file:
        file.write(b"before")
        weight.tofile(file)
        file.write(b"after")
    assert (tmp_path / "out").read_bytes() == b"before" + floats(*LARGE).tobytes() + b"after"


@pytest.mark.parametrize("code", [errno.EXDEV, errno.ENOSYS])
def test_tofile_falls_back_when_the_kernel_cannot_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    def refuse(*_: Any) -> int:
        raise OSError(code, os.strerror(code))

    weight = load_weight(tmp_path)
    monkeypatch.setattr(os, "copy_file_range", refuse, raising=False)
    with open(tmp_path / "out", "wb") as file:
        weight.tofile(file)
    assert (tmp_path / "out").read_bytes() == floats(*LARGE).tobytes()


def test_tofile_goes_on_where_the_kernel_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def copy_a_little(source: int, target: int, count: int, offset_src: int, offset_dst: int) -> int:
        if offset_dst > 0:
            return 0
        return os.pwrite(target, os.pread(source, min(count, 100), offset_src), offset_dst)

    weight = load_weight(tmp_path)
    monkeypatch.setattr(os, "copy_file_range", copy_a_little, raising=False)
    with open(tmp_path / "out", "wb") as file:
        weight.tofile(file)
    assert (tmp_path / "out").read_bytes() == floats(*LARGE).tobytes()


def test_dlpack_and_copies(tmp_path: Path) -> None:
    weight = load_weight(tmp_path)
    assert weight.__dlpack_device__() == (1, 0)
    assert np.array(weight).flags.writeable
    assert np.asarray(weight, np.float64).dtype == np.float64


# Files that are no models


def tensor_file() -> bytes:
    return bytes(numpy_helper.from_array(floats(4, 4), "input_0").SerializeToString())


def without_graph() -> bytes:
    return bytes(onnx.ModelProto(ir_version=8, producer_name="nobody").SerializeToString())


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "is empty"),
        (b"hello, this is no model\n", "a text file"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"PK\x03\x04" + bytes(100), "a zip archive"),
        (b"\x80\x02}q\x00." + bytes(50), "a Python pickle"),
        (b"\x1f\x8b" + bytes(50), "gzip"),
        (b"\x89HDF\r\n\x1a\n" + bytes(50), "HDF5"),
        (b"GGUF" + bytes(50), "GGUF"),
        (b"\x18\0\0\0ORTM" + bytes(50), "ONNX Runtime's own format"),
        (bytes(64), "not ONNX"),
        (os.urandom(0) + b"\xff" * 64, "not ONNX"),
        (tensor_file(), "a single tensor, `input_0`"),
        (without_graph(), "a model without a graph"),
        (add_model().SerializeToString()[:-10], "damaged or cut short"),
        (add_model().SerializeToString()[:3000], "damaged or cut short"),
    ],
)
def test_files_that_are_no_models_are_refused_in_one_line(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "in.onnx"
    path.write_bytes(content)
    assert_refused(path, says)


def assert_refused(path: Path, says: str) -> None:
    with pytest.raises(ModelError) as caught:
        model_io.load(path)
    assert says in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    assert_refused(tmp_path / "none.onnx", "there is no file")
    write(add_model(), tmp_path / "in.onnx")
    assert_refused(tmp_path / "in.onnx" / "deeper.onnx", "there is no file")
    assert_refused(tmp_path, "is a folder")


def test_special_files_are_refused_without_waiting(tmp_path: Path) -> None:
    if not Path("/dev/null").exists():
        pytest.skip("no /dev/null here")
    assert_refused(Path("/dev/null"), "is not a regular file")


def test_unreadable_file_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(add_model(), tmp_path / "in.onnx")

    def refuse(*_: Any, **__: Any) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(mapped, "open", refuse, raising=False)
    assert_refused(path, "cannot open")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(min_value=0, max_value=10_000))
def test_a_model_cut_anywhere_is_refused(tmp_path: Path, cut: int) -> None:
    content = nested_model(SMALL).SerializeToString()
    path = tmp_path / "in.onnx"
    path.write_bytes(content[: cut % len(content)])
    try:
        model_io.load(path)
    except ModelError as error:
        assert error.hint  # noqa: PT017 - loading is fine where the cut falls between two top-level fields
    else:
        assert onnx.load(path).HasField("graph")


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(st.integers(0, 1 << 20), st.integers(0, 255)), min_size=1, max_size=4))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_damaged_model_loads_or_is_refused(tmp_path: Path, changes: list[tuple[int, int]]) -> None:
    content = bytearray(nested_model(SMALL).SerializeToString())
    for position, byte in changes:
        content[position % len(content)] = byte
    path = tmp_path / "in.onnx"
    path.write_bytes(content)
    try:
        model_io.load(path)
    except ModelError as error:
        assert "\n" not in error.message  # noqa: PT017 - a model that still loads is fine


# What would be lost


def refuse_training(model: Any) -> None:
    model.training_info.add()


def refuse_sparse_attribute(model: Any) -> None:
    attribute = model.graph.node[0].attribute.add(name="a", type=onnx.AttributeProto.SPARSE_TENSOR)
    attribute.sparse_tensor.dims.append(1)


def refuse_map_type(model: Any) -> None:
    model.graph.output[0].type.map_type.key_type = TensorProto.INT64
    model.graph.output[0].type.map_type.value_type.tensor_type.elem_type = TensorProto.FLOAT


def refuse_opaque_type(model: Any) -> None:
    model.graph.output[0].type.opaque_type.name = "secret"


def refuse_shape_without_type(model: Any) -> None:
    model.graph.output[0].type.tensor_type.ClearField("elem_type")


def refuse_doubled_initializer(model: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(floats(*LARGE, seed=7), "w0"))


def refuse_nameless_initializer(model: Any) -> None:
    model.graph.initializer.append(numpy_helper.from_array(floats(3)))


def refuse_doubled_input(model: Any) -> None:
    model.graph.input.append(model.graph.input[0])


def refuse_doubled_output_of_nodes(model: Any) -> None:
    model.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))


def refuse_doubled_attribute(model: Any) -> None:
    for value in (1, 2):
        model.graph.node[0].attribute.append(helper.make_attribute("twice", value))


def refuse_doubled_opset(model: Any) -> None:
    model.opset_import.append(helper.make_opsetid("", 18))


def refuse_doubled_metadata(model: Any) -> None:
    for value in ("1", "2"):
        model.metadata_props.add(key="key", value=value)


def refuse_doubled_function(model: Any) -> None:
    for op in ("Relu", "Abs"):
        body = [helper.make_node(op, ["a"], ["b"])]
        model.functions.append(helper.make_function("d", "F", ["a"], ["b"], body, [helper.make_opsetid("", 17)]))


def refuse_attribute_without_type(model: Any) -> None:
    model.graph.node[0].attribute.add(name="old", i=3)


def refuse_unknown_external_key(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    for key, value in (("location", "in.onnx"), ("length", "4096"), ("compression", "zstd")):
        tensor.external_data.add(key=key, value=value)


def refuse_raw_and_external(model: Any) -> None:
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "in.onnx"), ("length", "4096")):
        tensor.external_data.add(key=key, value=value)


def refuse_output_hiding_its_input(model: Any) -> None:
    """An input that is an output too is one value, and the output's entry, here without a shape, would win."""
    model.graph.output.add(name="x").type.tensor_type.elem_type = TensorProto.FLOAT


def refuse_devices_before_they_existed(model: Any) -> None:
    model.configuration.add(name="two", num_devices=2)


def refuse_data_of_wrong_size(model: Any) -> None:
    model.graph.initializer[0].dims[0] += 1


def refuse_small_data_of_wrong_size(model: Any) -> None:
    model.graph.initializer.append(TensorProto(name="s", data_type=1, dims=[3], raw_data=b"12345"))


def refuse_raw_strings(model: Any) -> None:
    model.graph.initializer.append(TensorProto(name="s", data_type=TensorProto.STRING, dims=[3], raw_data=bytes(5000)))


def refuse_unknown_dtype(model: Any) -> None:
    model.graph.node.append(constant("k", floats(2)))
    model.graph.node[-1].attribute[0].t.data_type = 99


REFUSED: list[tuple[Callable[[Any], None], str]] = [
    (refuse_training, "training_info"),
    (refuse_sparse_attribute, "Sparse tensors are not supported"),
    (refuse_map_type, "Map types are not supported"),
    (refuse_opaque_type, "opaque_type"),
    (refuse_shape_without_type, "graph.output[0].type"),
    (refuse_doubled_initializer, "2 entries of initializer with the same name `w0`"),
    (refuse_nameless_initializer, "an initializer without a name"),
    (refuse_doubled_input, "two inputs named `x`"),
    (refuse_doubled_output_of_nodes, "Output 'y' is redeclared"),
    (refuse_doubled_attribute, "2 entries of attribute with the same name `twice`"),
    (refuse_doubled_opset, "2 entries of opset_import"),
    (refuse_doubled_metadata, "2 entries of metadata_props with the same name `key`"),
    (refuse_doubled_function, "2 entries of functions with the same name `d::F:`"),
    (refuse_attribute_without_type, "Unsupported attribute type"),
    (refuse_unknown_external_key, "compression"),
    (refuse_raw_and_external, "raw_data"),
    (refuse_output_hiding_its_input, "graph.input[0].type.tensor_type.shape"),
    (refuse_devices_before_they_existed, "configuration"),
    (refuse_data_of_wrong_size, "needs 4224 bytes"),
    (refuse_small_data_of_wrong_size, "needs 12 bytes"),
    (refuse_raw_strings, "raw bytes, which ONNX does not allow"),
    (refuse_unknown_dtype, "99 is not a valid DataType"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_what_would_be_lost_is_refused(tmp_path: Path, change: Callable[[Any], None], says: str) -> None:
    model = add_model()
    change(model)
    assert_refused(write(model, tmp_path / "in.onnx"), says)


@pytest.mark.parametrize(
    ("number", "place"),
    [((99,), "model, field number 99"), ((7, 98), "graph, field number 98"), ((7, 1, 97), "graph.node[0], field")],
)
def test_unknown_fields_are_refused(tmp_path: Path, number: tuple[int, ...], place: str) -> None:
    content = b"new"
    for step in reversed(number):
        content = length_delimited(step, len(content)) + content
    model = onnx.ModelProto()
    model.CopyFrom(add_model())
    if number[:2] == (7, 1):
        node = length_delimited(97, 3) + b"new"
        model.graph.node[0].MergeFromString(node)
        content = b""
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString() + content)
    assert_refused(path, place)


def test_entries_about_names_that_do_not_exist_are_dropped(tmp_path: Path) -> None:
    model = add_model()
    model.graph.value_info.append(helper.make_tensor_value_info("gone", TensorProto.FLOAT, [1]))
    model.graph.quantization_annotation.add(tensor_name="gone")
    model_io.save(model_io.load(write(model, tmp_path / "in.onnx")), tmp_path / "out.onnx")
    assert same_proto(add_model(), onnx.load(tmp_path / "out.onnx"))


def test_an_output_that_is_its_own_input_is_kept(tmp_path: Path) -> None:
    model = add_model()
    model.graph.output.append(model.graph.input[0])
    model_io.save(model_io.load(write(model, tmp_path / "in.onnx")), tmp_path / "out.onnx")
    assert same_proto(model, onnx.load(tmp_path / "out.onnx"))


def test_typed_data_and_strings_are_kept_as_they_are(tmp_path: Path) -> None:
    model = add_model()
    model.graph.initializer.append(helper.make_tensor("typed", TensorProto.FLOAT, [2000], [0.5] * 2000))
    model.graph.initializer.append(helper.make_tensor("text", TensorProto.STRING, [300], [b"a\0b"] * 300))
    loaded = model_io.load(write(model, tmp_path / "in.onnx"))
    model_io.save(loaded, tmp_path / "out.onnx")
    assert same_proto(model, onnx.load(tmp_path / "out.onnx"))
    model_io.save(loaded, tmp_path / "external.onnx", external=True)
    np.testing.assert_array_equal(weights_of(tmp_path / "external.onnx")["typed"], np.full(2000, 0.5, np.float32))


# External data


def test_external_data_is_mapped_once_for_each_file(tmp_path: Path) -> None:
    model = model_io.load(write_external(add_model(), tmp_path / "in.onnx"))
    tensors = [tensor for tensor in each_tensor(model) if isinstance(tensor, MappedTensor)]
    assert len(tensors) == 2
    assert len({id(tensor.file) for tensor in tensors}) == 1
    assert model_io.source(model) == model_io.Source(str(tmp_path / "in.onnx"), (str(tmp_path / "weights.bin"),))
    np.testing.assert_array_equal(model.graph.initializers["w1"].const_value, floats(*LARGE, seed=1))


def test_external_data_in_a_folder_below(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    model = model_io.load(write_external(add_model(), tmp_path / "in.onnx", "deep/weights.bin"))
    np.testing.assert_array_equal(model.graph.initializers["w0"].const_value, floats(*LARGE))


def hugging_face_cache(folder: Path) -> Path:
    """Return the model's path in a copy of the layout: snapshots hold links into one folder of blobs."""
    (folder / "blobs").mkdir()
    (folder / "snapshots" / "abc" / "onnx").mkdir(parents=True)
    (folder / "made").mkdir()
    write_external(add_model(), folder / "made" / "model.onnx", "model.onnx.data")
    for blob, name in (("0123", "model.onnx"), ("4567", "model.onnx.data")):
        os.rename(folder / "made" / name, folder / "blobs" / blob)
        os.symlink(f"../../../blobs/{blob}", folder / "snapshots" / "abc" / "onnx" / name)
    return folder / "snapshots" / "abc" / "onnx" / "model.onnx"


def test_hugging_face_cache_loads_and_is_never_written_through(tmp_path: Path) -> None:
    path = hugging_face_cache(tmp_path)
    model = model_io.load(path)
    np.testing.assert_array_equal(model.graph.initializers["w0"].const_value, floats(*LARGE))
    blobs = listing(tmp_path / "blobs")
    model_io.save(model, path)
    assert listing(tmp_path / "blobs") == blobs
    assert not path.is_symlink()
    np.testing.assert_array_equal(weights_of(path)["w0"], floats(*LARGE))


def test_model_behind_a_link_finds_the_data_beside_the_real_file(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "links").mkdir()
    write_external(add_model(), tmp_path / "real" / "in.onnx")
    os.symlink("../real/in.onnx", tmp_path / "links" / "in.onnx")
    model = model_io.load(tmp_path / "links" / "in.onnx")
    np.testing.assert_array_equal(model.graph.initializers["w0"].const_value, floats(*LARGE))


def test_hard_linked_data_is_fine(tmp_path: Path) -> None:
    path = write_external(add_model(), tmp_path / "in.onnx")
    os.link(tmp_path / "weights.bin", tmp_path / "second name")
    np.testing.assert_array_equal(model_io.load(path).graph.initializers["w0"].const_value, floats(*LARGE))


def with_external(path: Path, **entries: str) -> Path:
    """Write a model whose first initializer says these external data entries."""
    proto = onnx.load(write_external(add_model(), path), load_external_data=False)
    tensor = proto.graph.initializer[0]
    kept = {entry.key: entry.value for entry in tensor.external_data} | entries
    tensor.ClearField("external_data")
    for key, value in kept.items():
        tensor.external_data.add(key=key, value=value)
    return write(proto, path)


@pytest.mark.parametrize(
    ("entries", "says"),
    [
        ({"location": "none.bin"}, "holds no such file"),
        ({"location": ""}, "not a path inside"),
        ({"location": "../outside.bin"}, "not a path inside"),
        ({"location": "deep/../weights.bin"}, "not a path inside"),
        ({"location": "..\\outside.bin"}, "not a path inside"),
        ({"location": "/etc/hostname"}, "not a path inside"),
        ({"location": "link.bin"}, "outside the model's folder"),
        ({"location": "deep"}, "not a regular file"),
        ({"offset": "1000000"}, "which has only"),
        ({"offset": "-1"}, "must be non-negative"),
        ({"offset": "many"}, "many"),
        ({"length": "8192"}, "needs 4096 bytes"),
        ({"length": "8"}, "needs 4096 bytes"),
    ],
)
def test_bad_external_data_is_refused(tmp_path: Path, entries: dict[str, str], says: str) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (tmp_path / "outside.bin").write_bytes(bytes(1 << 16))
    os.symlink("../outside.bin", folder / "link.bin")
    with pytest.raises(ModelError) as caught:
        model_io.load(with_external(folder / "in.onnx", **entries))
    assert says in caught.value.message


def test_short_data_file_is_refused(tmp_path: Path) -> None:
    path = write_external(add_model(), tmp_path / "in.onnx")
    os.truncate(tmp_path / "weights.bin", 5000)
    assert_refused(path, "which has only 5000")


def test_missing_offset_and_length_mean_the_whole_tensor(tmp_path: Path) -> None:
    path = with_external(tmp_path / "in.onnx", checksum="0", location="w0.bin")
    (tmp_path / "w0.bin").write_bytes(floats(*LARGE).tobytes())
    proto = onnx.load(path, load_external_data=False)
    for entry in [entry for entry in proto.graph.initializer[0].external_data if entry.key in ("offset", "length")]:
        proto.graph.initializer[0].external_data.remove(entry)
    np.testing.assert_array_equal(
        model_io.load(write(proto, path)).graph.initializers["w0"].const_value, floats(*LARGE)
    )


MANY_TENSORS = """
    import resource, sys
    resource.setrlimit(resource.RLIMIT_NOFILE, (1024, 1024))
    import numpy as np
    from graphopt import model_io
    model = model_io.load(sys.argv[1])
    tensors = [value.const_value for value in model.graph.initializers.values()]
    arrays = [tensor.numpy() for tensor in tensors[:900]]
    assert all(float(tensor.numpy().ravel()[0]) == index for index, tensor in enumerate(tensors))
    model_io.save(model, sys.argv[2], external=True)
    print(len(tensors))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("one_file_each", [False, True])
def test_thousands_of_external_tensors_stay_below_the_descriptor_limit(tmp_path: Path, one_file_each: bool) -> None:
    count, size = 3000, 1024
    proto = add_model({})
    for index in range(count):
        tensor = proto.graph.initializer.add(name=f"w{index}", data_type=1, dims=[size // 4])
        tensor.data_location = TensorProto.EXTERNAL
        location, offset = (f"{index}.bin", 0) if one_file_each else ("all.bin", index * size)
        for key, value in (("location", location), ("offset", str(offset)), ("length", str(size))):
            tensor.external_data.add(key=key, value=value)
        with open(tmp_path / location, "ab") as file:
            file.write(np.full(size // 4, index, np.float32).tobytes())
    path = write(proto, tmp_path / "in.onnx")
    assert run(MANY_TENSORS, path, tmp_path / "out.onnx").strip() == str(count)


def run(code: str, *arguments: object) -> str:
    """Run code in a new process and return what it printed."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_data_file_that_changed_is_not_read_as_if_it_had_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_files, "MAX_PINNED_FILES", 0)
    model = model_io.load(write_external(add_model(), tmp_path / "in.onnx"))
    content = (tmp_path / "weights.bin").read_bytes()
    (tmp_path / "new").write_bytes(content)
    os.replace(tmp_path / "new", tmp_path / "weights.bin")
    weight = model.graph.initializers["w0"].const_value
    assert weight is not None
    with pytest.raises(ModelError, match="has changed since it was loaded"):
        weight.numpy()


# Very large and very nested


def test_a_file_above_two_gigabytes_loads_without_being_read(tmp_path: Path) -> None:
    rows = 800_000
    path = tmp_path / "large.onnx"
    write_with_hole(path, rows, 1024)
    if path.stat().st_blocks * 512 > 1 << 28:
        pytest.skip("the file system has no sparse files")
    model = model_io.load(path)
    weight = model.graph.initializers["w"].const_value
    assert isinstance(weight, MappedTensor)
    assert weight.nbytes > 1 << 31
    assert weight.numpy()[rows - 1, 1023] == 7.0
    assert model.graph.initializers["after"].const_value is not None
    with pytest.raises(ModelError, match="more than protobuf's 2 GB"):
        model_io.save(model, tmp_path / "out.onnx", external=False)
    assert sorted(os.listdir(tmp_path)) == ["large.onnx"]


def write_with_hole(path: Path, rows: int, columns: int) -> None:
    """Write a model with one initializer of zeros but for its last element, as a sparse file."""
    tensor = TensorProto(name="w", data_type=1, dims=[rows, columns]).SerializeToString()
    size = rows * columns * 4
    tensor += length_delimited(9, size)
    small = helper.make_tensor("after", TensorProto.FLOAT, [1], [1.0]).SerializeToString()
    after = length_delimited(5, len(small)) + small
    graph = onnx.GraphProto(name="g").SerializeToString() + length_delimited(5, len(tensor) + size) + tensor
    head = onnx.ModelProto(ir_version=8).SerializeToString() + length_delimited(7, len(graph) + size + len(after))
    with open(path, "wb") as file:
        file.write(head + graph)
        file.seek(size - 4, os.SEEK_CUR)
        file.write(np.float32(7.0).tobytes() + after)


def test_loading_leaves_the_weights_on_disk(tmp_path: Path) -> None:
    if not Path("/proc/self/status").exists():
        pytest.skip("no /proc here")
    code = """
        import sys
        from graphopt import model_io
        def memory(key):
            return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(key)) * 1024
        before = memory("VmRSS")
        model = model_io.load(sys.argv[1])
        model_io.save(model, sys.argv[2])
        print(memory("VmHWM") - before)
    """
    arrays = {f"w{index}": floats(1 << 20, seed=index) for index in range(25)}
    path = write(add_model(arrays), tmp_path / "in.onnx")
    assert path.stat().st_size > 100_000_000
    assert int(run(code, path, tmp_path / "out.onnx")) < 40_000_000


# Saving


def test_saving_is_deterministic_and_says_what_it_wrote(tmp_path: Path) -> None:
    path = write(nested_model(), tmp_path / "in.onnx")
    for external in (False, True):
        names = []
        for folder in ("one", "two"):
            (tmp_path / folder).mkdir(exist_ok=True)
            written = model_io.save(model_io.load(path), tmp_path / folder / "out.onnx", external=external)
            names.append([name.name for name in written])
        assert listing(tmp_path / "one") == listing(tmp_path / "two")
        assert names == [["out.onnx", "out.onnx.data"] if external else ["out.onnx"]] * 2


def test_saving_changes_nothing_in_the_model(tmp_path: Path) -> None:
    model = model_io.load(write(nested_model(), tmp_path / "in.onnx"))
    clone = model.clone()
    clone.graph.initializers["w"].name = "renamed"
    clone.graph.initializers["small"].name = "also_renamed"
    names = [tensor.name for tensor in each_tensor(model)]
    tensors = [id(tensor) for tensor in each_tensor(model)]
    for number, external in enumerate((False, True)):
        model_io.save(clone, tmp_path / f"clone{number}.onnx", external=external)
        model_io.serialize(clone)
    assert [tensor.name for tensor in each_tensor(model)] == names
    assert [id(tensor) for tensor in each_tensor(model)] == tensors
    assert set(weights_of(tmp_path / "clone0.onnx")) == {"renamed", "also_renamed"}
    assert set(weights_of(tmp_path / "clone1.onnx")) == {"renamed", "also_renamed"}
    model_io.save(model, tmp_path / "out.onnx")
    assert same_proto(nested_model(), onnx.load(tmp_path / "out.onnx"))


@pytest.mark.parametrize("external", [False, True])
def test_saving_over_the_source_is_safe(tmp_path: Path, external: bool) -> None:
    path = tmp_path / "in.onnx"
    if external:
        write_external(add_model(), path, "in.onnx.data")
    else:
        write(add_model(), path)
    model = model_io.load(path)
    for _ in range(2):
        model_io.save(model, path)
        assert {name: array.tolist() for name, array in weights_of(path).items()} == {
            "w0": floats(*LARGE).tolist(),
            "w1": floats(*LARGE, seed=1).tolist(),
        }
    np.testing.assert_array_equal(model.graph.initializers["w0"].const_value, floats(*LARGE))
    assert sorted(os.listdir(tmp_path)) == (["in.onnx", "in.onnx.data"] if external else ["in.onnx"])


def test_a_model_loaded_with_a_data_file_keeps_one_even_as_a_clone(tmp_path: Path) -> None:
    model = model_io.load(write_external(add_model(), tmp_path / "in.onnx"))
    for number, one in enumerate((model, model.clone(), model.clone(deep_copy=True))):
        assert len(model_io.save(one, tmp_path / f"out{number}.onnx")) == 2


def test_a_large_model_gets_a_data_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_io.load(write(add_model(), tmp_path / "in.onnx"))
    assert len(model_io.save(model, tmp_path / "small.onnx")) == 1
    monkeypatch.setattr(model_io, "EXTERNAL_THRESHOLD", 8000)
    assert len(model_io.save(model, tmp_path / "large.onnx")) == 2
    assert len(model_io.save(model, tmp_path / "forced.onnx", external=False)) == 1


def test_data_layout_is_aligned_and_shared(tmp_path: Path) -> None:
    big = floats(600, 600)
    model = model_io.load(write(add_model({"a": floats(300), "b": floats(301), "c": big}), tmp_path / "in.onnx"))
    graph = model.graph
    same = graph.initializers["a"].const_value
    for name in ("a2", "a3"):
        graph.register_initializer(ir.Value(name=name, const_value=same))
    graph.register_initializer(ir.Value(name="tiny", const_value=ir.tensor(floats(4), name="tiny")))
    model_io.save(model, tmp_path / "out.onnx", external=True)
    places = {}
    for tensor in onnx.load(tmp_path / "out.onnx", load_external_data=False).graph.initializer:
        places[tensor.name] = {entry.key: entry.value for entry in tensor.external_data}
    assert places["a"] == places["a2"] == places["a3"] == {"location": "out.onnx.data", "offset": "0", "length": "1200"}
    assert places["b"]["offset"] == "1216"
    assert int(places["c"]["offset"]) % 4096 == 0
    assert places["tiny"] == {}
    assert (tmp_path / "out.onnx.data").stat().st_size == int(places["c"]["offset"]) + big.nbytes
    assert len(weights_of(tmp_path / "out.onnx")) == 6
    reloaded = model_io.load(tmp_path / "out.onnx")
    model_io.save(reloaded, tmp_path / "again.onnx")
    assert (tmp_path / "again.onnx.data").read_bytes() == (tmp_path / "out.onnx.data").read_bytes()


def lazy(array: Any, log: list[str], name: str, shape: tuple[int, ...] | None = None) -> ir.LazyTensor:
    def make() -> ir.TensorProtocol:
        log.append(name)
        return ir.tensor(array)

    return ir.LazyTensor(make, ir.DataType.FLOAT, ir.Shape(array.shape if shape is None else shape), name=name)


@pytest.mark.parametrize("external", [False, True])
def test_tensors_made_by_passes_are_written_one_at_a_time(tmp_path: Path, external: bool) -> None:
    model = model_io.load(write(add_model(), tmp_path / "in.onnx"))
    log: list[str] = []
    model.graph.initializers["w0"].const_value = lazy(floats(*LARGE, seed=8), log, "w0")
    model.graph.initializers["w1"].const_value = ir.tensor(floats(*LARGE, seed=9).T.copy().T, name="w1")
    model.graph.register_initializer(ir.Value(name="tiny", const_value=lazy(floats(3, seed=3), log, "tiny")))
    half = ir.tensor(floats(1000).astype(ml_dtypes.bfloat16), name="half")
    packed = ir.tensor((np.arange(3001) % 7 - 3).astype(ml_dtypes.int4), name="packed")
    for tensor in (half, packed):
        model.graph.register_initializer(ir.Value(name=tensor.name, const_value=tensor))
    model_io.save(model, tmp_path / "out.onnx", external=external)
    assert sorted(log) == ["tiny", "w0"]
    weights = weights_of(tmp_path / "out.onnx")
    np.testing.assert_array_equal(weights["w0"], floats(*LARGE, seed=8))
    np.testing.assert_array_equal(weights["w1"], floats(*LARGE, seed=9))
    np.testing.assert_array_equal(weights["tiny"], floats(3, seed=3))
    np.testing.assert_array_equal(weights["half"].view(np.uint16), half.numpy().view(np.uint16))
    np.testing.assert_array_equal(weights["packed"].astype(int), np.arange(3001) % 7 - 3)


def test_a_model_read_by_onnx_ir_saves_too(tmp_path: Path) -> None:
    write_external(add_model({"w0": floats(*LARGE), "s": floats(1, 32)}), tmp_path / "in.onnx")
    model = ir.load(tmp_path / "in.onnx")
    for external in (False, True):
        model_io.save(model, tmp_path / "out.onnx", external=external)
        np.testing.assert_array_equal(weights_of(tmp_path / "out.onnx")["w0"], floats(*LARGE))
        np.testing.assert_array_equal(weights_of(tmp_path / "out.onnx")["s"], floats(1, 32))


def test_strings_behind_a_lazy_tensor_are_written(tmp_path: Path) -> None:
    model = model_io.load(write(add_model(), tmp_path / "in.onnx"))
    text = ir.StringTensor([b"a\0", b"b"], shape=ir.Shape([2]))
    tensor = ir.LazyTensor(lambda: text, ir.DataType.STRING, ir.Shape([2]), name="text")
    model.graph.register_initializer(ir.Value(name="text", const_value=tensor))
    model_io.save(model, tmp_path / "out.onnx")
    assert list(onnx.load(tmp_path / "out.onnx").graph.initializer[-1].string_data) == [b"a\0", b"b"]


# Saving that fails


def broken_by_disk(monkeypatch: pytest.MonkeyPatch, model: ir.Model) -> type[BaseException]:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    return ModelError


def broken_by_user(monkeypatch: pytest.MonkeyPatch, model: ir.Model) -> type[BaseException]:
    def stop() -> ir.TensorProtocol:
        raise KeyboardInterrupt

    tensor = ir.LazyTensor(stop, ir.DataType.FLOAT, ir.Shape(LARGE))
    model.graph.initializers["w1"].const_value = tensor
    return KeyboardInterrupt


def broken_by_pass(monkeypatch: pytest.MonkeyPatch, model: ir.Model) -> type[BaseException]:
    model.graph.initializers["w1"].const_value = lazy(floats(5), [], "w1", LARGE)
    return ModelError


def broken_by_missing_data(monkeypatch: pytest.MonkeyPatch, model: ir.Model) -> type[BaseException]:
    model.graph.initializers["w1"].const_value = None
    return ModelError


def broken_at_the_end(monkeypatch: pytest.MonkeyPatch, model: ir.Model) -> type[BaseException]:
    replace, calls = os.replace, []

    def fail_for_the_model(source: Any, target: Any) -> None:
        calls.append(target)
        if str(target).endswith("out.onnx"):
            raise PermissionError(errno.EACCES, "Permission denied")
        replace(source, target)

    monkeypatch.setattr(os, "replace", fail_for_the_model)
    return ModelError


BROKEN = [broken_by_disk, broken_by_user, broken_by_pass, broken_by_missing_data, broken_at_the_end]


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("external", [False, True])
@pytest.mark.parametrize("breaks", BROKEN, ids=lambda breaks: breaks.__name__)
def test_a_save_that_fails_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, breaks: Any, external: bool, existing: bool
) -> None:
    folder = tmp_path / "out"
    folder.mkdir()
    if existing:
        other = model_io.load(write(add_model({"old": floats(*LARGE)}), tmp_path / "old.onnx"))
        model_io.save(other, folder / "out.onnx", external=external)
    model = model_io.load(write(add_model(), tmp_path / "in.onnx"))
    before = listing(folder)
    expected = breaks(monkeypatch, model)
    with pytest.raises(expected) as caught:
        model_io.save(model, folder / "out.onnx", external=external)
    assert listing(folder) == before
    if isinstance(caught.value, ModelError):
        assert caught.value.hint
        assert "\n" not in caught.value.message


@pytest.mark.parametrize("external", [False, True])
def test_a_save_that_fails_where_files_have_one_name_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    test_a_save_that_fails_leaves_everything_as_it_was(tmp_path, monkeypatch, broken_at_the_end, external, True)


def test_a_full_disk_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_io.load(write(add_model(), tmp_path / "in.onnx"))
    broken_by_disk(monkeypatch, model)
    with pytest.raises(ModelError) as caught:
        model_io.save(model, tmp_path / "out.onnx")
    assert caught.value.message == f"cannot write `{tmp_path / 'out.onnx'}`: No space left on device"
    assert caught.value.hint == "free some space, or save to another disk"


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no such limit")
@pytest.mark.parametrize("external", [False, True])
def test_a_real_limit_on_file_size_leaves_nothing_behind(tmp_path: Path, external: bool) -> None:
    code = """
        import resource, sys
        from graphopt import model_io
        from graphopt.errors import ModelError
        model = model_io.load(sys.argv[1])
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        try:
            model_io.save(model, sys.argv[2], external=sys.argv[3] == "True")
        except ModelError as error:
            print(error.message, "|", error.hint)
    """
    path = write(add_model({"w": floats(1 << 18)}), tmp_path / "in.onnx")
    (tmp_path / "out").mkdir()
    said = run(code, path, tmp_path / "out" / "out.onnx", external)
    assert "File too large | raise the limit" in said
    assert os.listdir(tmp_path / "out") == []


def test_places_that_cannot_be_written_are_refused(tmp_path: Path) -> None:
    model = model_io.load(write(add_model(), tmp_path / "in.onnx"))
    (tmp_path / "folder.onnx").mkdir()
    for target, says in (
        (tmp_path / "none" / "out.onnx", "there is no folder"),
        (tmp_path / "folder.onnx", "not a regular file"),
        (Path("/dev/null"), "not a regular file"),
        (tmp_path / ("n" * 300 + ".onnx"), "File name too long"),
    ):
        with pytest.raises(ModelError, match=says) as caught:
            model_io.save(model, target)
        assert caught.value.hint
    assert sorted(os.listdir(tmp_path)) == ["folder.onnx", "in.onnx"]
    assert not stat.S_ISREG(os.stat("/dev/null").st_mode)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_unwritable_folder_and_file_are_refused(tmp_path: Path) -> None:
    model = model_io.load(write(add_model(), tmp_path / "in.onnx"))
    (tmp_path / "in.onnx").chmod(0o444)
    with pytest.raises(ModelError, match="write-protected"):
        model_io.save(model, tmp_path / "in.onnx")
    (tmp_path / "closed").mkdir(mode=0o555)
    with pytest.raises(ModelError, match="Permission denied"):
        model_io.save(model, tmp_path / "closed" / "out.onnx")


def test_data_of_another_model_is_not_overwritten(tmp_path: Path) -> None:
    model = model_io.load(write_external(add_model(), tmp_path / "in.onnx", "out.onnx.data"))
    with pytest.raises(ModelError, match="keeps its tensors there"):
        model_io.save(model, tmp_path / "out.onnx")
    assert len(weights_of(tmp_path / "in.onnx")) == 2


def test_mode_of_the_file_replaced_is_kept(tmp_path: Path) -> None:
    path = write(add_model(), tmp_path / "in.onnx")
    path.chmod(0o640)
    model_io.save(model_io.load(path), path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    umask = os.umask(0o027)
    try:
        model_io.save(model_io.load(path), tmp_path / "new.onnx")
    finally:
        os.umask(umask)
    assert stat.S_IMODE((tmp_path / "new.onnx").stat().st_mode) == 0o640


# For a runtime in this process


def runtime_value(tensor: ir.TensorProtocol) -> Any:
    runtime = pytest.importorskip("onnxruntime")
    array = tensor.numpy()
    if array.dtype.kind == "V" or tensor.dtype in (ir.DataType.BFLOAT16, ir.DataType.FLOAT8E4M3FN):
        return runtime.OrtValue.ortvalue_from_numpy_with_onnx_type(array, tensor.dtype.value)
    return runtime.OrtValue.ortvalue_from_numpy(array)


@pytest.mark.parametrize("optimized", [False, True])
@pytest.mark.parametrize(
    "dtype", ["FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE", "INT8", "UINT8", "INT64", "BOOL", "FLOAT8E4M3FN", "INT4"]
)
def test_runtime_takes_initializers_beside_the_model(tmp_path: Path, dtype: str, optimized: bool) -> None:
    runtime = pytest.importorskip("onnxruntime")
    kind = ir.DataType[dtype]
    values = np.random.default_rng(0).integers(0, 2 if dtype == "BOOL" else 7, (64, 64)).astype(np.float32)
    tensor = helper.make_tensor("w", kind.value, [64, 64], ir.tensor(values.astype(kind.numpy())).tobytes(), raw=True)
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)],
        "cast",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [64, 64])],
        [tensor],
    )
    proto = helper.make_model(graph, ir_version=10, opset_imports=[helper.make_opsetid("", 21)])
    model = model_io.load(write(proto, tmp_path / "in.onnx"))
    content, beside = model_io.serialize(model)
    assert list(beside) == ([] if dtype == "INT4" else ["w"])
    if beside:
        assert len(content) < 1000
        assert isinstance(beside["w"], MappedTensor)
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    levels = runtime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimized else levels.ORT_DISABLE_ALL
    held = [runtime_value(one) for one in beside.values()]
    options.add_external_initializers(list(beside), held)
    session = runtime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    np.testing.assert_array_equal(session.run(None, {})[0], values)


def test_serialize_keeps_nested_tensors_inline(tmp_path: Path) -> None:
    model = model_io.load(write(nested_model(), tmp_path / "in.onnx"))
    content, beside = model_io.serialize(model)
    assert list(beside) == ["w"]
    assert len(content) > 3 * 4096
    everything, nothing = model_io.serialize(model, inline_limit=1 << 20)
    assert nothing == {}
    assert same_proto(nested_model(), onnx.ModelProto.FromString(everything))


# Sizes


def test_sizes_count_the_data_file(tmp_path: Path) -> None:
    path = write_external(add_model(), tmp_path / "in.onnx")
    (tmp_path / "unrelated.bin").write_bytes(bytes(1000))
    both = path.read_bytes() + (tmp_path / "weights.bin").read_bytes()
    assert model_io.stored_bytes(path) == len(both)
    assert model_io.gzip_bytes(path) == len(zlib.compress(both, 1))
    assert model_io.stored_bytes(write(add_model(), tmp_path / "one.onnx")) == (tmp_path / "one.onnx").stat().st_size


def test_compressed_size_of_large_files_is_not_computed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_io, "GZIP_LIMIT", 100)
    assert model_io.gzip_bytes(write(add_model(), tmp_path / "in.onnx")) is None


# The wire


@st.composite
def graph_protos(draw: Any, depth: int = 2) -> Any:
    graph = onnx.GraphProto(name=draw(st.sampled_from(["g", "a longer name"])))
    for index, size in enumerate(draw(st.lists(st.integers(0, 700), max_size=3))):
        graph.initializer.append(numpy_helper.from_array(np.arange(size, dtype=np.float32), f"w{index}"))
    for index in range(draw(st.integers(0, 2))):
        node = graph.node.add(op_type="Custom", domain="d", output=[f"o{index}"])
        kind = draw(st.sampled_from(["tensor", "tensors", "graph", "graphs", "none"] if depth else ["tensor", "none"]))
        array = numpy_helper.from_array(np.arange(draw(st.integers(0, 2000)), dtype=np.int8))
        if kind == "tensor":
            node.attribute.add(name="a", type=onnx.AttributeProto.TENSOR, t=array)
        elif kind == "tensors":
            node.attribute.add(name="a", type=onnx.AttributeProto.TENSORS, tensors=[array, array])
        elif kind == "graph":
            node.attribute.add(name="a", type=onnx.AttributeProto.GRAPH, g=draw(graph_protos(depth - 1)))
        elif kind == "graphs":
            node.attribute.add(name="a", type=onnx.AttributeProto.GRAPHS, graphs=[draw(graph_protos(depth - 1))])
    return graph


@pytest.mark.usefixtures("no_fsync")
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(graph=graph_protos())
def test_any_nesting_survives_a_round_trip(tmp_path: Path, graph: Any) -> None:
    model = onnx.ModelProto(ir_version=8, graph=graph)
    model.opset_import.add(domain="d", version=1)
    loaded = model_io.load(write(model, tmp_path / "in.onnx"))
    for one in graphs(loaded):
        for value in one.initializers.values():
            assert value.const_value is not None
            assert isinstance(value.const_value, MappedTensor) == (value.const_value.nbytes >= 1024)
    model_io.save(loaded, tmp_path / "out.onnx")
    assert same_proto(model, onnx.load(tmp_path / "out.onnx"))
    model_io.save(loaded, tmp_path / "external.onnx", external=True)
    model_io.save(model_io.load(tmp_path / "external.onnx"), tmp_path / "again.onnx", external=False)
    assert (tmp_path / "again.onnx").read_bytes() == (tmp_path / "out.onnx").read_bytes()


@settings(max_examples=200, deadline=None)
@given(content=st.binary(max_size=300))
def test_any_bytes_are_fields_or_a_wire_error(content: bytes) -> None:
    def read() -> Iterator[int]:
        for _, _, _, _, end in fields(content, 0, len(content)):
            yield end

    try:
        ends = list(read())
    except WireError:
        return
    assert (ends[-1] if ends else 0) == len(content)


def test_stripping_and_refilling_give_back_the_same_bytes() -> None:
    content = add_model().SerializeToString()
    assert open_holes(content) == [content]
    assert strip_payloads(content, 1 << 20) == content
    stripped = strip_payloads(content, 1024)
    assert len(stripped) < 1000
    pieces = open_holes(stripped)
    assert [type(piece).__name__ for piece in pieces] == ["bytes", "Hole", "bytes", "Hole", "bytes"]


def test_benchmark_model_runs(tmp_path: Path) -> None:
    benchmark = runpy.run_path(str(ROOT / "benchmarks" / "load.py"))
    path = write(benchmark["Llama"](layers=1, hidden=32).proto(), tmp_path / "llama.onnx")
    onnx.checker.check_model(str(path), full_check=True)
    assert len(benchmark["measure"]("graphopt, data file", path, tmp_path)) == 4
