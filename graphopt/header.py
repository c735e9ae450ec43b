"""A model as a ModelProto without its large tensors, and back, leaving every object of the model as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import onnx
import onnx_ir as ir

from graphopt.errors import GraphoptError, ModelError

Hold = Callable[[ir.TensorProtocol, str, bool], ir.ExternalTensor | None]
"""From a tensor, its name and whether it is an initializer of the main graph to the reference that is written in its
place, or None to write it in full."""


def to_proto(model: ir.Model, hold: Hold) -> onnx.ModelProto:
    """Serialise a model with a reference in place of each tensor that `hold` keeps back.

    onnx_ir renames tensors while it serialises, and writes the data of all of them. It is given stand-ins instead: the
    model's own objects seen through replaced attributes.

    Raises:
        ModelError: The model holds something that ONNX cannot say.
    """
    functions = {key: _seen_function(function, hold) for key, function in model.functions.items()}
    seen = _Seen(model, graph=_seen_graph(model.graph, hold, is_main=True), functions=functions)
    try:
        proto = ir.serde.serialize_model(seen)
    except ir.serde.SerdeError as error:
        cause = root_cause(error)
        if isinstance(cause, GraphoptError | OSError):
            raise cause from error
        raise ModelError(
            f"the model is not valid ONNX: {one_line(cause)}", hint="run onnx.checker on it to see where"
        ) from error
    # An empty graph is a graph: a model without one is none.
    proto.graph.SetInParent()
    return proto


def from_proto(proto: onnx.ModelProto, path: str) -> ir.Model:
    """Deserialise a model whose large tensors are references.

    Raises:
        ModelError: onnx_ir cannot represent the model.
    """
    try:
        return ir.serde.deserialize_model(proto)
    except ir.serde.SerdeError as error:
        cause = one_line(root_cause(error))
        raise ModelError(f"cannot read `{path}`: {cause}", hint=_unsupported_hint(cause)) from error


def graphs(model: ir.Model) -> Iterator[ir.Graph]:
    """Yield every graph: the main one, function bodies, and the subgraphs inside both."""
    yield model.graph
    yield from model.graph.subgraphs()
    for function in model.functions.values():
        yield function.graph
        yield from function.subgraphs()


def each_tensor(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield the tensor of every initializer and every tensor in an attribute; shared ones as often as they are used."""
    found: list[ir.TensorProtocol] = []
    for graph in graphs(model):
        found.extend(value.const_value for value in graph.initializers.values() if value.const_value is not None)
        for node in graph:
            found.extend(_tensors_in(node.attributes))
    for function in model.functions.values():
        found.extend(_tensors_in(function.attributes))
    return iter(found)


def _tensors_in(attributes: Any) -> Iterator[ir.TensorProtocol]:
    for attribute in attributes.values():
        if attribute.is_ref() or attribute.value is None:
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            yield attribute.value
        elif attribute.type == ir.AttributeType.TENSORS:
            yield from attribute.value


def replace_tensors(model: ir.Model, replace: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    """Put `replace(tensor)` in the place of every initializer and every tensor in an attribute."""
    for graph in graphs(model):
        for value in graph.initializers.values():
            if value.const_value is not None:
                value.const_value = replace(value.const_value)
        for node in graph:
            _replace_in_attributes(node.attributes, replace)
    for function in model.functions.values():
        _replace_in_attributes(function.attributes, replace)


def _replace_in_attributes(attributes: Any, replace: Callable[[ir.TensorProtocol], ir.TensorProtocol]) -> None:
    for name, attribute in list(attributes.items()):
        if attribute.is_ref() or attribute.value is None:
            continue
        if attribute.type == ir.AttributeType.TENSOR:
            value: Any = replace(attribute.value)
        elif attribute.type == ir.AttributeType.TENSORS:
            value = tuple(replace(tensor) for tensor in attribute.value)
        else:
            continue
        attributes[name] = ir.Attr(name, attribute.type, value, doc_string=attribute.doc_string)


def reference(tensor: ir.TensorProtocol, name: str, location: str, offset: int) -> ir.ExternalTensor:
    """Return the tensor that onnx_ir writes as a reference to bytes held at a location."""
    return ir.ExternalTensor(
        location,
        offset,
        tensor.nbytes,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def root_cause(error: BaseException) -> BaseException:
    """Return the first error of a chain: onnx_ir wraps one error in a message for each level of nesting.

    The context counts too: one of its wrappers fails while it words the message.
    """
    while (earlier := error.__cause__ or error.__context__) is not None:
        error = earlier
    return error


def one_line(error: BaseException) -> str:
    """Return the first sentence of an error."""
    if isinstance(error, UnicodeError):
        return "it holds text that is not UTF-8"
    if isinstance(error, KeyError):
        return f"nothing defines `{error.args[0]}`"
    text = " ".join(str(error).split()) or type(error).__name__
    return text.split(". ")[0].rstrip(".")


class _Seen:
    """An object seen through replaced attributes; what is set on it stays on it."""

    def __init__(self, base: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _base=base)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)


def _seen_graph(graph: ir.Graph, hold: Hold, *, is_main: bool = False) -> _Seen:
    initializers = {name: _seen_initializer(value, hold, is_main) for name, value in graph.initializers.items()}
    return _Seen(graph, initializers=initializers, nodes=[_seen_node(node, hold) for node in graph])


def _seen_function(function: ir.Function, hold: Hold) -> _Seen:
    nodes = [_seen_node(node, hold) for node in function]
    return _Seen(function, nodes=nodes, attributes=_seen_attributes(function.attributes, hold))


def _seen_initializer(value: ir.Value, hold: Hold, is_main: bool) -> _Seen:
    if value.const_value is None or not value.name:
        raise ModelError(
            f"initializer `{value.name}` has no data or no name", hint="set its `const_value`, or remove it"
        )
    tensor = _seen_tensor(value.const_value, value.name, hold, is_main)
    if _is_declared_as(value, value.const_value):
        # The tensor says it all: no value_info, which onnx_ir would write for each initializer.
        return _Seen(value, const_value=tensor, type=None, shape=None)
    return _Seen(value, const_value=tensor)


def _is_declared_as(value: ir.Value, tensor: ir.TensorProtocol) -> bool:
    """Return whether a value's type and shape are its tensor's and nothing more is known of it."""
    same_type = value.type is None or (type(value.type) is ir.TensorType and value.dtype == tensor.dtype)
    same_shape = value.shape is None or tuple(value.shape) == tuple(tensor.shape)
    said = value.doc_string or value.metadata_props or (value.type is not None and value.type.denotation)
    return bool(same_type and same_shape and not said)


def _seen_node(node: ir.Node, hold: Hold) -> Any:
    for attribute in node.attributes.values():
        if attribute.type in _HOLDING_TENSORS:
            return _Seen(node, attributes=_seen_attributes(node.attributes, hold))
    return node


def _seen_attributes(attributes: Any, hold: Hold) -> dict[str, ir.Attr]:
    return {name: _seen_attribute(attribute, hold) for name, attribute in attributes.items()}


def _seen_attribute(attribute: ir.Attr, hold: Hold) -> ir.Attr:
    if attribute.is_ref() or attribute.value is None or attribute.type not in _HOLDING_TENSORS:
        return attribute
    see = _HOLDING_TENSORS[attribute.type]
    several = attribute.type in (ir.AttributeType.TENSORS, ir.AttributeType.GRAPHS)
    value = [see(item, hold) for item in attribute.value] if several else see(attribute.value, hold)
    return ir.Attr(attribute.name, attribute.type, value, doc_string=attribute.doc_string)


def _seen_tensor(tensor: ir.TensorProtocol, name: str, hold: Hold, is_main: bool) -> Any:
    """Return what onnx_ir serialises for a tensor: a reference, or a stand-in that carries the name."""
    held = hold(tensor, name, is_main)
    if held is not None:
        return held
    if isinstance(tensor, ir.serde.TensorProtoTensor):
        return _renamed_proto_tensor(tensor, name)
    if tensor.dtype == ir.DataType.STRING:
        return _renamed_string_tensor(tensor, name)
    return _Seen(tensor, name=name)


def _renamed_proto_tensor(tensor: ir.serde.TensorProtoTensor, name: str) -> ir.serde.TensorProtoTensor:
    if tensor.name == name and not tensor.metadata_props:
        return tensor
    proto = onnx.TensorProto()
    proto.CopyFrom(tensor.raw)
    renamed = ir.serde.TensorProtoTensor(proto)
    renamed.name = name
    renamed.metadata_props.update(tensor.metadata_props)
    # onnx_ir copies the proto and then writes the metadata once more.
    proto.ClearField("metadata_props")
    return renamed


def _renamed_string_tensor(tensor: Any, name: str) -> ir.StringTensor:
    while isinstance(tensor, ir.LazyTensor):
        tensor = tensor.raw()
    return ir.StringTensor(
        list(tensor.string_data()),
        shape=ir.Shape(tensor.shape.numpy()),
        name=name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


_HOLDING_TENSORS: dict[ir.AttributeType, Callable[[Any, Hold], Any]] = {
    ir.AttributeType.TENSOR: lambda tensor, hold: _seen_tensor(tensor, tensor.name or "", hold, False),
    ir.AttributeType.TENSORS: lambda tensor, hold: _seen_tensor(tensor, tensor.name or "", hold, False),
    ir.AttributeType.GRAPH: lambda graph, hold: _seen_graph(graph, hold),
    ir.AttributeType.GRAPHS: lambda graph, hold: _seen_graph(graph, hold),
}


def _unsupported_hint(cause: str) -> str:
    if "Map types" in cause:
        return "export without maps, for example with zipmap=False in skl2onnx"
    if "Sparse" in cause:
        return "store the tensor densely"
    return "run onnx.checker on the file; if it passes there, report the model"
