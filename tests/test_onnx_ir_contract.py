"""What onnx_ir 1.1 really does where graphopt depends on it or works around it.

A test that fails here after an upgrade says that a workaround can go, or that a new one is needed. Each names the part
of graphopt that cares.
"""

from __future__ import annotations

import collections
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx_ir.passes.common import ShapeInferencePass

SHAPE = (4, 4)


def proto(nodes: list[Any] | None = None, initializers: list[Any] | None = None, **graph: Any) -> Any:
    """Return y = x + w, or other nodes between x and y."""
    body = helper.make_graph(
        nodes or [helper.make_node("Add", ["x", "w"], ["y"])],
        "main",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, SHAPE)],
        [numpy_helper.from_array(np.ones(SHAPE, np.float32), "w")] if initializers is None else initializers,
        **graph,
    )
    return helper.make_model(body, ir_version=8, opset_imports=[helper.make_opsetid("", 17)])


def read(model: Any) -> ir.Model:
    return ir.serde.deserialize_model(model)


def read_and_write(model: Any) -> Any:
    return ir.serde.serialize_model(read(model))


def external_model(folder: Path, count: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    weights = [numpy_helper.from_array(np.ones(SHAPE, np.float32), f"w{index}") for index in range(count)]
    onnx.save(
        proto([helper.make_node("Add", ["x", "w0"], ["y"])], weights),
        folder / "model.onnx",
        save_as_external_data=True,
        location="model.onnx.data",
        size_threshold=0,
    )
    return folder / "model.onnx"


def weight(model: ir.Model, name: str = "w0") -> Any:
    return model.graph.initializers[name].const_value


# External data: graphopt.mapped and graphopt.data_files replace ir.ExternalTensor.


def test_external_data_behind_a_link_that_leaves_the_folder_is_refused(tmp_path: Path) -> None:
    external_model(tmp_path / "blobs")
    (tmp_path / "snapshot").mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        os.symlink(f"../blobs/{name}", tmp_path / "snapshot" / name)
    model = ir.load(tmp_path / "snapshot" / "model.onnx")
    with pytest.raises(ValueError, match="outside the base directory"):
        weight(model).numpy()


def test_external_data_with_a_second_hard_link_is_refused(tmp_path: Path) -> None:
    path = external_model(tmp_path)
    os.link(tmp_path / "model.onnx.data", tmp_path / "second name")
    with pytest.raises(ValueError, match="multiple hard links"):
        weight(ir.load(path)).numpy()


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="descriptors are counted in /proc")
def test_each_external_tensor_holds_a_descriptor_until_released(tmp_path: Path) -> None:
    model = ir.load(external_model(tmp_path, count=20))
    tensors = [weight(model, f"w{index}") for index in range(20)]
    before = len(os.listdir("/proc/self/fd"))
    for tensor in tensors:
        tensor.numpy()
    assert len(os.listdir("/proc/self/fd")) == before + 20
    for tensor in tensors:
        tensor.release()
    assert len(os.listdir("/proc/self/fd")) == before


def test_external_tensor_is_written_as_a_reference() -> None:
    """graphopt.header hands these to onnx_ir in the place of large tensors."""
    tensor = ir.ExternalTensor("\0any text", 3, 64, ir.DataType.FLOAT, shape=ir.Shape(SHAPE), name="w")
    written = ir.serde.serialize_tensor(tensor)
    assert written.data_location == TensorProto.EXTERNAL
    assert [(entry.key, entry.value) for entry in written.external_data] == [
        ("location", "\0any text"), ("offset", "3"), ("length", "64"),
    ]  # fmt: skip
    assert not written.HasField("raw_data")


def test_external_tensor_is_not_opened_when_read() -> None:
    tensor = TensorProto(name="w", data_type=1, dims=SHAPE, data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="\0no such file")
    assert isinstance(weight(read(proto(initializers=[tensor])), "w"), ir.ExternalTensor)


def test_the_base_class_of_tensors_is_not_public() -> None:
    """graphopt.mapped meets the protocol instead of inheriting."""
    assert not hasattr(ir, "TensorBase")


# Serialising: graphopt.header gives onnx_ir stand-ins.


def test_serialising_renames_the_tensor_of_an_initializer() -> None:
    model = read(proto())
    model.graph.initializers["w"].const_value = ir.tensor(np.ones(SHAPE, np.float32), name="other")
    ir.serde.serialize_model(model)
    assert weight(model, "w").name == "w"


def test_serialising_is_duck_typed() -> None:
    class Seen:
        def __init__(self, base: Any, **replaced: Any) -> None:
            self.__dict__.update(replaced, base=base)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.base, name)

        def __iter__(self) -> Iterator[Any]:
            return iter(self.base)

    model = read(proto())
    tensor = ir.tensor(np.zeros(SHAPE, np.float32))
    value = Seen(model.graph.initializers["w"], const_value=tensor)
    seen: Any = Seen(model, graph=Seen(model.graph, initializers={"w": value}))
    written = ir.serde.serialize_model(seen)
    np.testing.assert_array_equal(numpy_helper.to_array(written.graph.initializer[0]), np.zeros(SHAPE))
    np.testing.assert_array_equal(weight(model, "w").numpy(), np.ones(SHAPE))


def test_metadata_of_a_parsed_tensor_is_written_twice() -> None:
    tensor = numpy_helper.from_array(np.ones(SHAPE, np.float32), "w")
    tensor.metadata_props.add(key="a", value="1")
    written = read_and_write(proto(initializers=[tensor]))
    assert len(written.graph.initializer[0].metadata_props) == 2


def test_tensors_of_typed_fields_are_kept_in_them() -> None:
    written = read_and_write(proto(initializers=[helper.make_tensor("w", TensorProto.FLOAT, SHAPE, [1.0] * 16)]))
    assert len(written.graph.initializer[0].float_data) == 16


def test_an_empty_graph_is_not_written_as_one() -> None:
    model = ir.Model(ir.Graph([], [], nodes=[]), ir_version=8)
    assert not ir.serde.serialize_model(model).HasField("graph")


def test_the_error_of_a_bad_external_tensor_is_hidden_by_another() -> None:
    """graphopt.header.root_cause looks at the context, too."""
    tensor = TensorProto(name="w", data_type=1, dims=SHAPE, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "a"), ("offset", "-1")):
        tensor.external_data.add(key=key, value=value)
    with pytest.raises(ir.serde.SerdeError) as caught:
        read(proto(initializers=[tensor]))
    errors, error = [], caught.value.__cause__
    while error is not None:
        errors.append(str(error))
        error = error.__cause__ or error.__context__
    assert "base_path" in errors[0]
    assert "must be non-negative" in errors[-1]


# What is not read: graphopt.fidelity refuses it.


def with_sparse_initializer() -> Any:
    model = proto()
    sparse = model.graph.sparse_initializer.add(dims=[4])
    sparse.values.CopyFrom(numpy_helper.from_array(np.ones(1, np.float32), "s"))
    sparse.indices.CopyFrom(numpy_helper.from_array(np.zeros(1, np.int64)))
    return model


def with_training_info() -> Any:
    model = proto()
    model.training_info.add()
    return model


def with_doubled_initializer() -> Any:
    model = proto()
    model.graph.initializer.append(model.graph.initializer[0])
    return model


def with_nameless_initializer() -> Any:
    model = proto()
    model.graph.initializer.add(data_type=1)
    return model


def with_doubled_attribute() -> Any:
    model = proto()
    model.graph.node[0].attribute.extend([helper.make_attribute("a", 1), helper.make_attribute("a", 2)])
    return model


def with_doubled_opset() -> Any:
    model = proto()
    model.opset_import.append(helper.make_opsetid("", 18))
    return model


def with_stale_value_info() -> Any:
    return proto(value_info=[helper.make_tensor_value_info("gone", TensorProto.FLOAT, SHAPE)])


def with_stale_annotation() -> Any:
    model = proto()
    model.graph.quantization_annotation.add(tensor_name="gone").quant_parameter_tensor_names.add(key="a", value="b")
    return model


def with_opaque_type() -> Any:
    model = proto()
    model.graph.output[0].type.opaque_type.name = "secret"
    return model


def with_shape_without_type() -> Any:
    model = proto()
    model.graph.output[0].type.tensor_type.ClearField("elem_type")
    return model


def with_devices_of_a_later_version() -> Any:
    model = proto()
    model.configuration.add(name="two", num_devices=2)
    return model


def with_output_that_is_an_input() -> Any:
    model = proto()
    model.graph.output.add(name="x").type.tensor_type.elem_type = TensorProto.FLOAT
    return model


def with_checksum() -> Any:
    tensor = TensorProto(name="w", data_type=1, dims=SHAPE, data_location=TensorProto.EXTERNAL)
    for key, value in (("location", "a"), ("checksum", "0")):
        tensor.external_data.add(key=key, value=value)
    return proto(initializers=[tensor])


LOST = [
    with_sparse_initializer,
    with_training_info,
    with_doubled_initializer,
    with_nameless_initializer,
    with_doubled_attribute,
    with_doubled_opset,
    with_stale_value_info,
    with_stale_annotation,
    with_opaque_type,
    with_shape_without_type,
    with_devices_of_a_later_version,
    with_output_that_is_an_input,
    with_checksum,
]


@pytest.mark.parametrize("make", LOST, ids=lambda make: make.__name__)
def test_what_onnx_ir_loses_without_an_error(make: Any) -> None:
    model = make()
    assert read_and_write(model).ByteSize() < model.ByteSize() + len(added_by(model))


def added_by(model: Any) -> bytes:
    """Return what onnx_ir adds to every model: value_info of the initializers that have none."""
    added = onnx.GraphProto()
    names = {entry.name for entry in model.graph.value_info}
    for tensor in model.graph.initializer:
        if tensor.name and tensor.name not in names:
            names.add(tensor.name)
            added.value_info.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    return bytes(added.SerializeToString())


def test_value_info_of_initializers_is_added_and_nothing_else() -> None:
    model = proto()
    assert read_and_write(model).ByteSize() == model.ByteSize() + len(added_by(model))


def map_type(model: Any) -> None:
    model.graph.output[0].type.map_type.key_type = TensorProto.INT64


def sparse_attribute(model: Any) -> None:
    model.graph.node[0].attribute.add(name="a", type=onnx.AttributeProto.SPARSE_TENSOR)


def doubled_output(model: Any) -> None:
    model.graph.node.append(helper.make_node("Relu", ["x"], ["y"]))


@pytest.mark.parametrize("change", [map_type, sparse_attribute, doubled_output], ids=lambda change: change.__name__)
def test_what_onnx_ir_refuses_itself(change: Any) -> None:
    model = proto()
    change(model)
    with pytest.raises(ir.serde.SerdeError):
        read(model)


def test_two_inputs_with_one_name_are_not_refused() -> None:
    """graphopt.model_io refuses them."""
    model = proto()
    model.graph.input.append(model.graph.input[0])
    assert len(read(model).graph.inputs) == 2


def test_unknown_dtypes_of_constants_are_noticed_late() -> None:
    tensor = numpy_helper.from_array(np.ones(SHAPE, np.float32), "value")
    model = proto([helper.make_node("Constant", [], ["y"], value=tensor)], [])
    model.graph.node[0].attribute[0].t.data_type = 99
    loaded = read(model)
    with pytest.raises(ValueError, match="99 is not a valid DataType"):
        _ = loaded.graph[0].attributes["value"].value.dtype


# Clones


def test_clones_share_tensors_and_renaming_reaches_them() -> None:
    model = read(proto())
    clone = model.clone()
    assert weight(clone, "w") is weight(model, "w")
    clone.graph.initializers["w"].name = "renamed"
    assert weight(model, "w").name == "renamed"
    assert list(model.graph.initializers) == ["w"]


def test_clones_keep_what_graphs_remember_but_not_what_models_do() -> None:
    """graphopt.model_io remembers where a model came from on its graph."""
    model = read(proto())
    model.meta["key"] = model.graph.meta["key"] = 1
    clone = model.clone()
    assert "key" not in clone.meta
    assert clone.graph.meta["key"] == 1


# Edits: graphopt.rewriter does without these.


def test_replace_nodes_and_values_stamps_the_old_type_on_the_new_value() -> None:
    model = read(proto())
    old = model.graph[0]
    new = ir.node("Cast", [model.graph.inputs[0]], {"to": 10})
    new.outputs[0].type = ir.TensorType(ir.DataType.FLOAT16)
    new.outputs[0].shape = ir.Shape([1])
    ir.convenience.replace_nodes_and_values(model.graph, old, [old], [new], old.outputs, new.outputs)
    assert new.outputs[0].dtype == ir.DataType.FLOAT
    assert new.outputs[0].shape == SHAPE


def test_a_graph_output_is_no_use() -> None:
    output = read(proto()).graph.outputs[0]
    assert len(output.uses()) == 0
    assert output.is_graph_output()


def test_the_recursive_iterator_does_not_visit_functions() -> None:
    body = helper.make_function(
        "d", "F", ["a"], ["b"], [helper.make_node("Relu", ["a"], ["b"])], [helper.make_opsetid("", 17)]
    )
    model = proto([helper.make_node("F", ["x"], ["y"], domain="d")], [])
    model.functions.append(body)
    loaded = read(model)
    assert [node.op_type for node in ir.traversal.RecursiveGraphIterator(loaded.graph)] == ["F"]
    assert [graph.name for graph in loaded.graphs()] == ["main"]
    assert [node.op_type for node in loaded.functions["d", "F", ""]] == ["Relu"]


def test_the_onnx_domain_has_two_names_of_which_nodes_keep_one() -> None:
    model = proto([helper.make_node("Relu", ["x"], ["y"], domain="ai.onnx")])
    model.opset_import[0].domain = "ai.onnx"
    loaded = read(model)
    assert loaded.graph[0].domain == ""
    assert loaded.opset_imports == {"ai.onnx": 17}


# Shape inference: graphopt.shapes does without it.


def test_shape_inference_only_logs_that_it_failed(caplog: pytest.LogCaptureFixture) -> None:
    model = read(proto([helper.make_node("Reshape", ["x"], ["y"])]))
    with caplog.at_level(logging.WARNING):
        result = ShapeInferencePass()(model)
    assert not result.modified
    assert "Shape inference failed" in caplog.text


def test_shape_inference_serialises_the_whole_model(monkeypatch: pytest.MonkeyPatch) -> None:
    serialised = []
    serialize_model = ir.serde.serialize_model

    def listen(model: Any) -> Any:
        serialised.append(model)
        return serialize_model(model)

    monkeypatch.setattr(ir.serde, "serialize_model", listen)
    ShapeInferencePass()(read(proto()))
    assert len(serialised) == 1


def test_a_failed_serialisation_in_shape_inference_leaves_the_model_stripped() -> None:
    model = read(proto([helper.make_node("Add", ["x", "w"], ["y"])], [numpy_helper.from_array(np.ones((20, 20)), "w")]))
    model.graph[0].attributes["odd"] = ir.Attr("odd", ir.AttributeType.SPARSE_TENSOR, object())
    ShapeInferencePass()(model)
    assert list(model.graph.initializers) == []
    assert [value.name for value in model.graph.inputs] == ["x", "w"]


def test_shape_inference_skips_function_bodies() -> None:
    body = helper.make_function(
        "d", "F", ["a"], ["b"],
        [helper.make_node("Relu", ["a"], ["t"]), helper.make_node("Relu", ["t"], ["b"])],
        [helper.make_opsetid("", 17)],
    )  # fmt: skip
    model = proto([helper.make_node("F", ["x"], ["y"], domain="d")], [])
    model.functions.append(body)
    model.opset_import.append(helper.make_opsetid("d", 1))
    model.ir_version = 10
    loaded = read(model)
    ShapeInferencePass()(loaded)
    inner = loaded.functions["d", "F", ""][0].outputs[0]
    assert inner.shape is None


def test_attributes_are_a_plain_dict_inside() -> None:
    """`walk` and `verify` look into that dict: the way around it takes several times as long."""
    node = ir.Node("", "Transpose", [None], [ir.AttrInt64s("perm", [1, 0])])
    assert type(node.attributes.data) in (dict, collections.OrderedDict)
    assert list(node.attributes.data.values()) == [node.attributes["perm"]]


def test_removing_a_node_looks_through_all_outputs_of_its_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """So `Rewriter.erase` takes a node out of the list of nodes itself."""
    model = read(proto([helper.make_node("Add", ["x", "w"], ["y"]), helper.make_node("Abs", ["x"], ["dead"])]))
    looked_at = []
    outputs = type(model.graph.outputs)
    get = outputs.__getitem__
    monkeypatch.setattr(outputs, "__getitem__", lambda self, index: looked_at.append(index) or get(self, index))
    model.graph.remove(model.graph[1], safe=True)
    assert looked_at
