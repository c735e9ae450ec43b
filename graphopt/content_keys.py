"""Content keys: values that are computed in the same way from the same inputs have equal ones, in any model."""

from __future__ import annotations

import hashlib
from collections import ChainMap
from collections.abc import Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt import walk
from graphopt.fragment import nodes_between
from graphopt.mapped import COPY_CHUNK, MappedTensor

_KEY_BYTES = 16
_DIGEST = "graphopt.content"

# The key of a value, or None where nobody can tell what it will be; one map for each graph around it.
Keys = ChainMap[ir.Value, str | None]


class ContentKeys:
    """The keys of values of a model's main graph as it was when made, each computed when first asked for.

    A key stands for all that computes a value: operators and their versions, attributes, the bytes of constants, and
    the names and dtypes of the model's inputs. Names of nodes and other values, and what else is in the model, do not
    matter.

    Args:
        model: The model; must not be edited between two questions.
    """

    def __init__(self, model: ir.Model) -> None:
        self._functions = model.functions
        self._random = walk.random_functions(model)
        self._bodies: dict[ir.OperatorIdentifier, str | None] = {}
        self._imports = model.opset_imports
        self._keys: Keys = ChainMap()
        self._left = set(model.graph)
        for value in model.graph.inputs:
            default = tensor_digest(value.const_value) if value.const_value is not None else ""
            self._keys[value] = _hashed("input", value.name, str(value.dtype), default)

    def of(self, values: Iterable[ir.Value]) -> dict[ir.Value, str | None]:
        """Return the keys of values, None where one may differ from run to run; only what they hang on is read."""
        asked = list(values)
        nodes = nodes_between(asked, self._left)
        for node in nodes:
            self._visit(node, self._keys, self._imports)
        self._left.difference_update(nodes)
        return {value: self._of(value, self._keys) for value in asked}

    def _of(self, value: ir.Value, keys: Keys) -> str | None:
        if value not in keys:
            tensor = walk.constant_tensor(value)
            keys[value] = tensor_digest(tensor) if tensor is not None else None
        return keys[value]

    def _visit(self, node: ir.Node, keys: Keys, imports: Mapping[str, int]) -> None:
        if all(walk.constant_tensor(value) is not None for value in node.outputs):
            return  # a Constant has the key of what it holds
        key = self._node(node, keys, imports)
        for index, value in enumerate(node.outputs):
            keys[value] = _hashed("output", key, str(index)) if key is not None else None

    def _node(self, node: ir.Node, keys: Keys, imports: Mapping[str, int]) -> str | None:
        """Return the key of what a node computes, or None where it may differ from run to run."""
        if walk.is_random(node) or node.op_identifier() in self._random:
            return None
        operands = [self._of(value, keys) if value is not None else "" for value in node.inputs]
        attributes = [self._attribute(one, keys, imports) for _, one in sorted(node.attributes.items())]
        body = self._function(node.op_identifier()) if node.op_identifier() in self._functions else ""
        parts = [body, *operands, *attributes]
        if any(part is None for part in parts):
            return None
        # How many outputs there are decides how some operators split their input.
        counts = f"{walk.imported(imports, node.domain)} {len(operands)} {len(node.outputs)}"
        return _hashed("node", *node.op_identifier(), counts, *parts)

    def _attribute(self, attribute: ir.Attr, keys: Keys, imports: Mapping[str, int]) -> str | None:
        if attribute.is_ref():
            return _hashed("reference", attribute.name, attribute.ref_attr_name)
        match attribute.type:
            case ir.AttributeType.TENSOR:
                parts: Sequence[str | None] = [tensor_digest(attribute.as_tensor())]
            case ir.AttributeType.TENSORS:
                parts = [tensor_digest(tensor) for tensor in attribute.as_tensors()]
            case ir.AttributeType.GRAPH:
                parts = [self._graph(attribute.as_graph(), keys, imports)]
            case ir.AttributeType.GRAPHS:
                parts = [self._graph(graph, keys, imports) for graph in attribute.as_graphs()]
            case _:
                parts = [repr(attribute.value)]
        if any(part is None for part in parts):
            return None
        return _hashed("attribute", attribute.name, attribute.type.name, *parts)

    def _graph(self, graph: ir.Graph | ir.Function, keys: Keys, imports: Mapping[str, int]) -> str | None:
        """Return the key of a nested graph, or of a function; what it captures counts by its own key."""
        inner = keys.new_child()
        for index, value in enumerate(graph.inputs):
            # The depth tells the parameters of a graph from those of graphs around it.
            inner[value] = _hashed("parameter", str(len(inner.maps)), str(index), str(value.type))
        for node in graph:
            self._visit(node, inner, imports)
        outputs = [self._of(value, inner) for value in graph.outputs]
        # A node none of whose results leaves the graph computes nothing, yet may end the run.
        return None if None in outputs else _hashed("graph", str(len(graph.inputs)), *outputs)

    def _function(self, identifier: ir.OperatorIdentifier) -> str | None:
        if identifier not in self._bodies:
            function = self._functions[identifier]
            # Attributes that a call leaves out are what the function says.
            defaults = [self._attribute(one, ChainMap(), {}) for _, one in sorted(function.attributes.items())]
            body = self._graph(function, ChainMap(), function.opset_imports)
            known = body is not None and None not in defaults
            self._bodies[identifier] = _hashed("function", body, *defaults) if known else None
        return self._bodies[identifier]


def tensor_digest(tensor: ir.TensorProtocol) -> str:
    """Return what all tensors of the same dtype, shape and content share; read once, in pieces given back."""
    known: str | None = tensor.meta.get(_DIGEST)
    if known is None:
        state = hashlib.blake2b(f"{tensor.dtype} {walk.dims(tensor)} ".encode(), digest_size=_KEY_BYTES)
        for piece in _pieces(tensor):
            state.update(piece)
        known = tensor.meta[_DIGEST] = state.hexdigest()
    return known


def _pieces(tensor: ir.TensorProtocol) -> Iterator[bytes]:
    if tensor.dtype == ir.DataType.STRING:
        yield repr(tensor.numpy().tolist()).encode()
    elif isinstance(tensor, MappedTensor):
        for start in range(tensor.offset, tensor.offset + tensor.length, COPY_CHUNK):
            length = min(COPY_CHUNK, tensor.offset + tensor.length - start)
            yield tensor.file.mapping()[start : start + length]
            tensor.file.release(start, length)
    else:
        yield tensor.tobytes()


def _hashed(*parts: str | None) -> str:
    state = hashlib.blake2b(digest_size=_KEY_BYTES)
    for part in parts:
        state.update(f"{len(part or '')}:{part or ''}".encode())
    return state.hexdigest()
