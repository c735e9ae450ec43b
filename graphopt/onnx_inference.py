"""ONNX's own inference, for one node at a time: what to ask about operators without a rule."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.dims import Dim, Size
from graphopt.shape_rules.shape_facts import Call, Fact, LooseDims

# What it says of these is not so: of the frequencies, a one-sided transform keeps half.
_MISTAKEN = frozenset({"STFT"})
_REFUSALS = (
    onnx.shape_inference.InferenceError,
    onnx.checker.ValidationError,
    onnx.defs.SchemaError,
    RuntimeError,
)


def infer_by_onnx(call: Call, domain: str) -> list[Fact | None]:
    """Return what ONNX infers of a node's outputs; what it refuses is not known."""
    node = call.node
    attributes = node.attributes.values()
    if node.op_type in _MISTAKEN or any(
        a.is_ref() or a.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) for a in attributes
    ):
        return []
    names: dict[str, Dim] = {}
    types: dict[str, onnx.TypeProto] = {}
    data: dict[str, onnx.TensorProto] = {}
    for index, (value, fact) in enumerate(zip(node.inputs, call.inputs, strict=True)):
        if value is None or fact is None or not value.name:
            continue
        types[value.name] = _type_of(fact, names)
        known = call.numbers(index)
        if known is not None and fact.dims is not None and fact.dtype is not None:
            array = np.array(known, fact.dtype.numpy()).reshape([n for n in fact.dims if isinstance(n, int)])
            data[value.name] = onnx.numpy_helper.from_array(array, value.name)
    try:
        schema = onnx.defs.get_schema(node.op_type, *((call.opset,) if call.opset else ()), domain=domain)
        imports = [onnx.helper.make_opsetid(domain, call.opset or schema.since_version)]
        proto = ir.serde.serialize_node(node)
        found = onnx.shape_inference.infer_node_outputs(schema, proto, types, data, opset_imports=imports)
    except _REFUSALS:
        return []
    return [_fact_from(found.get(value.name or ""), names) for value in node.outputs]


def _type_of(fact: Fact, names: dict[str, Dim]) -> onnx.TypeProto:
    if fact.type is not None:
        return ir.serde.serialize_type(fact.type)
    proto = onnx.TypeProto()
    proto.tensor_type.elem_type = fact.dtype.value if fact.dtype is not None else 0
    if fact.dims is not None:
        proto.tensor_type.shape.SetInParent()
        for dim in fact.dims:
            place = proto.tensor_type.shape.dim.add()
            if isinstance(dim, int):
                place.dim_value = dim
            else:
                place.dim_param = str(dim)
                names[place.dim_param] = dim
    return proto


def _fact_from(proto: onnx.TypeProto | None, names: Mapping[str, Dim]) -> Fact | None:
    if proto is None:
        return None
    if not proto.HasField("tensor_type"):
        return Fact(None, None, other=ir.serde.deserialize_type_proto_for_type(proto))
    tensor = proto.tensor_type
    dims: LooseDims | None = None
    if tensor.HasField("shape"):
        dims = [_size_from(dim, names) for dim in tensor.shape.dim]
    dtype = ir.DataType(tensor.elem_type) if tensor.elem_type else None
    return Fact(dtype, tuple(dims) if dims is not None else None)  # type: ignore[arg-type]


def _size_from(dim: onnx.TensorShapeProto.Dimension, names: Mapping[str, Dim]) -> Size | None:
    return dim.dim_value if dim.HasField("dim_value") else names.get(dim.dim_param)
