"""Walks over a model that leave nothing out: subgraphs and function bodies included."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir

ONNX_DOMAINS = ("", "ai.onnx")
# Before this IR version every initializer had to be an input too, and was a constant all the same.
FIRST_IR_WITH_PURE_INITIALIZERS = 4

# Operators whose result differs from run to run: never folded, merged or duplicated. See `is_random`.
NONDETERMINISTIC_OPS = frozenset(
    {"Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)


def subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    """Yield the graphs held by a node's attributes (If, Loop, Scan, ...), one level deep."""
    # Most nodes hold none, and every walk asks every node: the plain dict below is what makes this quick.
    for attr in node.attributes.data.values():
        kind = attr.type
        if kind is ir.AttributeType.GRAPH and not attr.is_ref():
            yield attr.as_graph()
        elif kind is ir.AttributeType.GRAPHS and not attr.is_ref():
            yield from attr.as_graphs()


def graphs_within(graph: ir.Graph | ir.Function) -> Iterator[ir.Graph | ir.Function]:
    """Yield a graph, then every graph nested in its nodes, depth first."""
    yield graph
    for node in graph:
        for inner in subgraphs(node):
            yield from graphs_within(inner)


def every_graph(model: ir.Model) -> Iterator[ir.Graph | ir.Function]:
    """Yield the main graph, its nested subgraphs, then every function with its own subgraphs."""
    yield from graphs_within(model.graph)
    for function in model.functions.values():
        yield from graphs_within(function)


def every_node(model: ir.Model) -> Iterator[ir.Node]:
    """Yield every node of every graph of the model."""
    for graph in every_graph(model):
        yield from graph


def nodes_within(node: ir.Node) -> Iterator[ir.Node]:
    """Yield every node nested in the subgraphs of ``node``, not ``node`` itself."""
    for inner in subgraphs(node):
        for graph in graphs_within(inner):
            yield from graph


def values_read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield the values a node reads: its inputs, and what its subgraphs capture or return."""
    yield from (value for value in node.inputs if value is not None)
    for inner in subgraphs(node):
        for graph in graphs_within(inner):
            for nested in graph:
                yield from (value for value in nested.inputs if value is not None)
            yield from graph.outputs


def initializers(model: ir.Model) -> Iterator[ir.Value]:
    """Yield every initializer of every graph."""
    for graph in every_graph(model):
        if isinstance(graph, ir.Graph):
            yield from graph.initializers.values()


def stored_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    """Yield every tensor the model stores, each once: initializers and tensor attributes."""
    seen: set[int] = set()
    for tensor in _all_tensors(model):
        if id(tensor) not in seen:
            seen.add(id(tensor))
            yield tensor


def _all_tensors(model: ir.Model) -> Iterator[ir.TensorProtocol]:
    for value in initializers(model):
        if value.const_value is not None:
            yield value.const_value
    for node in every_node(model):
        for attr in node.attributes.values():
            if attr.is_ref():
                continue
            if attr.type == ir.AttributeType.TENSOR:
                yield attr.as_tensor()
            elif attr.type == ir.AttributeType.TENSORS:
                yield from attr.as_tensors()


def is_random(node: ir.Node) -> bool:
    """Return whether a node's result may differ from run to run: a random operator, or Dropout while training."""
    if node.op_type in NONDETERMINISTIC_OPS:
        return True
    if not is_onnx_op(node, "Dropout") or len(node.inputs) < 3 or node.inputs[2] is None:
        return False
    training = constant_tensor(node.inputs[2])
    return training is None or bool(training.numpy().any())


def random_functions(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Return the functions whose result may differ from run to run, as do those that call them."""
    found: set[ir.OperatorIdentifier] = set()
    while True:
        more = {
            key
            for key, function in model.functions.items()
            if key not in found
            and any(is_random(n) or n.op_identifier() in found for graph in graphs_within(function) for n in graph)
        }
        if not more:
            return found
        found |= more


def called_functions(model: ir.Model) -> set[ir.OperatorIdentifier]:
    """Return the functions the main graph calls, directly or by way of others."""
    called: set[ir.OperatorIdentifier] = set()
    frontier = list(graphs_within(model.graph))
    while frontier:
        for node in frontier.pop():
            key = node.op_identifier()
            if key in model.functions and key not in called:
                called.add(key)
                frontier.extend(graphs_within(model.functions[key]))
    return called


def is_onnx_op(node: ir.Node, *op_types: str) -> bool:
    """Return whether a node is one of the given operators of the standard ONNX domain."""
    return node.op_type in op_types and node.domain in ONNX_DOMAINS


def has_references(node: ir.Node) -> bool:
    """Return whether an attribute of a node, inside a function, is what the caller gives it: unknown here."""
    return any(attribute.is_ref() for attribute in node.attributes.values())


def all_imports(model: ir.Model) -> dict[str, int]:
    """Return every operator set the model or one of its functions imports; the model's own version wins."""
    imports: dict[str, int] = {}
    for function in model.functions.values():
        imports.update(function.opset_imports)
    return imports | dict(model.opset_imports)


def opset(model: ir.Model, domain: str = "") -> int:
    """Return the version of an operator set the model imports; 1 where it imports none."""
    return imported(model.opset_imports, domain)


def imported(imports: Mapping[str, int], domain: str = "") -> int:
    """Return the version of an operator set among imports, a model's or a function's; 1 where it is not there."""
    if domain in ONNX_DOMAINS:
        return imports.get("", imports.get("ai.onnx", 1))
    return imports.get(domain, 1)


def every_graph_with_opset(model: ir.Model) -> Iterator[tuple[ir.Graph | ir.Function, int]]:
    """Yield every graph and the version of the ONNX operators in it; a function imports its own."""
    for graph in graphs_within(model.graph):
        yield graph, opset(model)
    for function in model.functions.values():
        for graph in graphs_within(function):
            yield graph, imported(function.opset_imports)


def constant_tensor(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the tensor a value always holds, or None where it may vary.

    An initializer that is also a graph input is a default a caller may override: not constant.
    """
    if value is None:
        return None
    if value.is_initializer():
        return None if value.is_graph_input() else value.const_value
    producer = value.producer()
    if producer is not None and is_onnx_op(producer, "Constant"):
        attr = next(iter(producer.attributes.values()), None)
        if attr is not None and not attr.is_ref():
            return constant_of(attr)
    return None


def dims(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    """Return the shape of a tensor; it is always static."""
    return tuple(int(dim) for dim in tensor.shape)  # type: ignore[arg-type]


def body(graph: ir.Graph | ir.Function) -> ir.Graph:
    """Return the graph of a function, or the graph itself."""
    return graph.graph if isinstance(graph, ir.Function) else graph


def is_read(node: ir.Node) -> bool:
    """Return whether anything reads an output of a node; graph outputs are read from outside."""
    return any(value.uses() or value.is_graph_output() for value in node.outputs)


def constant_of(attr: ir.Attr) -> ir.TensorProtocol | None:
    """Return the tensor an attribute of a Constant stands for, or None for a sparse one."""
    match attr.name:
        case "value":
            return attr.as_tensor()
        case "value_float" | "value_floats":
            return ir.tensor(attr.value, dtype=ir.DataType.FLOAT)
        case "value_int" | "value_ints":
            return ir.tensor(attr.value, dtype=ir.DataType.INT64)
        case "value_string" | "value_strings":
            return _string_tensor(attr.value)
        case _:
            return None  # sparse_value: kept as the node it is


def _string_tensor(value: str | Sequence[str]) -> ir.StringTensor:
    # ir.tensor takes no tuple of strings, which is what onnx_ir keeps.
    strings = np.array(value, dtype=object)
    encoded = [text.encode() for text in strings.reshape(-1)]
    return ir.StringTensor(encoded, shape=ir.Shape(strings.shape))


def label(node: ir.Node) -> str:
    """Return how messages call a node: its name, else its operator and first output."""
    return node.name or f"{node.op_type}->{node.outputs[0].name if node.outputs else '?'}"
