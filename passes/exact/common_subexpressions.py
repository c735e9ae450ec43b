"""Common subexpressions: nodes that compute the same from the same, computed once."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass

# Constants up to this size are compared by content; larger duplicates are the business of weight sharing.
CONTENT_LIMIT = 1024
# Attributes whose text is all there is to them.
_PLAIN = frozenset(
    {
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)


@dataclass(frozen=True)
class CommonSubexpressions(Pass):
    """Merge nodes of a graph that have equal operators, attributes and inputs."""

    name = "common-subexpressions"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "merge": "nodes of one graph with equal operators, attributes and inputs have equal outputs",
        "replace": "constants with equal dtype, shape and bytes are the same",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Merge graph by graph; a nested graph does not look into the one around it."""
        random = walk.random_functions(model)
        for graph in list(walk.every_graph(model)):
            _merge_constants(graph, ctx)
            _merge_nodes(graph, ctx, random)


def _merge_constants(graph: ir.Graph | ir.Function, ctx: Context) -> None:
    if not isinstance(graph, ir.Graph):
        return
    first: dict[Any, ir.Value] = {}
    for value in list(graph.initializers.values()):
        tensor = walk.constant_tensor(value)
        if tensor is None or tensor.size > CONTENT_LIMIT or value.is_graph_output() or not value.uses():
            continue
        same = first.setdefault(_tensor_key(tensor), value)
        if same is not value:
            ctx.rewriter.replace(value, same)


def _merge_nodes(graph: ir.Graph | ir.Function, ctx: Context, random: Container[ir.OperatorIdentifier]) -> None:
    first: dict[Any, ir.Node] = {}
    for node in list(graph):
        key = _key(node)
        if key is None or node.op_identifier() in random:
            continue
        same = first.setdefault(key, node)
        if same is not node and not any(value.is_graph_output() for value in node.outputs):
            with ctx.rewriter.edit("merge", node, same):
                for old, new in zip(node.outputs, same.outputs, strict=True):
                    ctx.rewriter.replace(old, new)
                ctx.rewriter.erase(node)


def _key(node: ir.Node) -> Any:
    """Return what two nodes share if and only if they compute the same, or None where that cannot be told."""
    if walk.is_random(node) or any(True for _ in walk.subgraphs(node)):
        return None
    attributes: list[tuple[str, str, Any]] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.is_ref():
            attributes.append((name, "ref", attribute.ref_attr_name))
        elif attribute.type == ir.AttributeType.TENSOR:
            tensor = attribute.as_tensor()
            content = _tensor_key(tensor) if tensor.size <= CONTENT_LIMIT else id(tensor)
            attributes.append((name, "tensor", content))
        elif attribute.type in _PLAIN:
            attributes.append((name, attribute.type.name, repr(attribute.value)))
        else:
            return None
    inputs = tuple(id(value) if value is not None else None for value in node.inputs)
    return node.op_identifier(), inputs, tuple(attributes), tuple(bool(value.name) for value in node.outputs)


def _tensor_key(tensor: ir.TensorProtocol) -> Any:
    if tensor.dtype == ir.DataType.STRING:
        return tensor.dtype, tuple(tensor.shape), tuple(tensor.numpy().reshape(-1).tolist())
    digest = hashlib.sha256(tensor.tobytes()).digest()
    return tensor.dtype, tuple(tensor.shape), digest
