"""Fragments: models of their own made of copies of a few nodes, to be run apart from the rest."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt import walk

_IR_VERSION = 10
Functions = Mapping[ir.OperatorIdentifier, ir.Function]


def fragment(
    nodes: Iterable[ir.Node],
    outputs: Sequence[ir.Value],
    inputs: Sequence[ir.Value],
    imports: Mapping[str, int],
    functions: Functions | None = None,
) -> ir.Model:
    """Return a model that computes values from others by copies of the nodes between them.

    Its inputs are called ``in0``, ``in1``, ..., its outputs ``out0``, ``out1``, ...; constants are shared. Nested
    graphs are copied, what they capture being looked up as the inputs of a node are.

    Args:
        nodes: The nodes, in order.
        outputs: Values they produce, inputs, or constants.
        inputs: Values they read that are neither produced by them nor constant.
        imports: Operator sets.
        functions: The model's functions; those called are carried along.
    """
    copier = _Copier(inputs)
    for node in nodes:
        copier.nodes.append(copier.copy(node))
    ends = [copier.end(value, f"out{index}") for index, value in enumerate(outputs)]
    body = ir.Graph(
        [copier.mapped[value] for value in inputs],
        ends,
        nodes=copier.nodes,
        initializers=copier.constants,
        opset_imports={**_domains(copier.nodes), **imports},
        name="fragment",
    )
    called = [function.clone() for function in _called(copier.nodes, functions or {})]
    return ir.Model(body, ir_version=_IR_VERSION, functions=called)


def _domains(nodes: Iterable[ir.Node]) -> dict[str, int]:
    """Return the domains of nodes: what replaces others may be of one the model does not import yet."""
    return {node.domain: 1 for node in nodes if node.domain not in walk.ONNX_DOMAINS}


def constant_content(value: ir.Value) -> ir.TensorProtocol | None:
    """Return what a constant holds, one that is not in a graph yet included."""
    known = walk.constant_tensor(value)
    if known is None and value.producer() is None and not value.is_graph_input():
        return value.const_value
    return known


def values_read(node: ir.Node) -> Iterator[ir.Value]:
    """Yield what a node reads from around it: its inputs, and what its nested graphs capture."""
    inner = [graph for nested in walk.subgraphs(node) for graph in walk.graphs_within(nested)]
    own = {value for graph in inner for value in _defined(graph)}
    yield from (value for value in walk.values_read(node) if value not in own)


def nodes_between(outputs: Iterable[ir.Value], within: Container[ir.Node]) -> list[ir.Node]:
    """Return those of some nodes that values hang on, each after what it reads."""
    done: dict[ir.Node, None] = {}
    stack = [node for value in outputs if (node := _producer(value, within)) is not None]
    while stack:
        missing = [
            producer
            for value in values_read(stack[-1])
            if (producer := _producer(value, within)) is not None and producer not in done
        ]
        if missing:
            stack.extend(missing)
        else:
            done[stack.pop()] = None
    return list(done)


def _producer(value: ir.Value, within: Container[ir.Node]) -> ir.Node | None:
    producer = value.producer()
    return producer if producer is not None and producer in within and constant_content(value) is None else None


def _defined(graph: ir.Graph | ir.Function) -> Iterator[ir.Value]:
    yield from graph.inputs
    if isinstance(graph, ir.Graph):
        yield from graph.initializers.values()
    for node in graph:
        yield from node.outputs


def _called(nodes: Iterable[ir.Node], functions: Functions) -> list[ir.Function]:
    """Return the functions that some nodes call, and those that these call."""
    found: dict[ir.OperatorIdentifier, ir.Function] = {}
    frontier = list(nodes)
    while frontier:
        node = frontier.pop()
        frontier.extend(walk.nodes_within(node))
        key = node.op_identifier()
        if key in functions and key not in found:
            found[key] = functions[key]
            frontier.extend(functions[key])
    return list(found.values())


class _Copier:
    def __init__(self, inputs: Sequence[ir.Value]) -> None:
        self.mapped = {
            value: ir.Value(name=f"in{i}", type=value.type, shape=value.shape) for i, value in enumerate(inputs)
        }
        self.constants: list[ir.Value] = []
        self.nodes: list[ir.Node] = []
        self._made = 0

    def copy(self, node: ir.Node) -> ir.Node:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [self._lookup(value) if value is not None else None for value in node.inputs],
            [self._copy_attribute(attribute) for attribute in node.attributes.values()],
            overload=node.overload,
            num_outputs=len(node.outputs),
        )
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            # An output left out has no name, and so has its copy: some kernels count the names.
            new.name = self._fresh("v") if old.name != "" else ""
            self.mapped[old] = new
        return copy

    def _copy_attribute(self, attribute: ir.Attr) -> ir.Attr:
        if attribute.is_ref():
            return attribute
        if attribute.type == ir.AttributeType.GRAPH:
            return ir.AttrGraph(attribute.name, self._copy_graph(attribute.as_graph()))
        if attribute.type == ir.AttributeType.GRAPHS:
            return ir.AttrGraphs(attribute.name, [self._copy_graph(graph) for graph in attribute.as_graphs()])
        return attribute

    def _copy_graph(self, graph: ir.Graph) -> ir.Graph:
        inputs = [self._declare(value) for value in graph.inputs]
        for value in graph.initializers.values():
            if value.const_value is not None and not value.is_graph_input():
                self.mapped[value] = self._constant(value.const_value)
        nodes = [self.copy(node) for node in graph]
        inside = set(nodes)
        outputs: list[ir.Value] = []
        for value in graph.outputs:
            own = self._lookup(value)
            if own.producer() not in inside or own in outputs:
                nodes.append(ir.Node("", "Identity", [own]))
                own = nodes[-1].outputs[0]
                own.name = self._fresh("v")
            own.type, own.shape = value.type, value.shape
            outputs.append(own)
        return ir.Graph(inputs, outputs, nodes=nodes, name=self._fresh("g"))

    def _declare(self, value: ir.Value) -> ir.Value:
        self.mapped[value] = ir.Value(name=self._fresh("v"), type=value.type, shape=value.shape)
        return self.mapped[value]

    def _fresh(self, kind: str) -> str:
        self._made += 1
        return f"{kind}{self._made}"

    def end(self, value: ir.Value, name: str) -> ir.Value:
        """Return a value under an output's name; what no copy produces, or is an output already, gets an Identity."""
        own = self._lookup(value)
        if own.producer() is None or (own.name or "").startswith("out"):
            identity = ir.Node("", "Identity", [own])
            self.nodes.append(identity)
            own = identity.outputs[0]
        own.name = name
        return own

    def _lookup(self, value: ir.Value) -> ir.Value:
        if value not in self.mapped:
            content = constant_content(value)
            if content is None:
                raise ValueError(f"`{value.name}` is neither an input, nor produced inside, nor constant")
            self.mapped[value] = self._constant(content)
        return self.mapped[value]

    def _constant(self, content: ir.TensorProtocol) -> ir.Value:
        # A view under a name of its own: the tensor is shared with the model, and a tensor has one name.
        name = f"c{len(self.constants)}"
        shape = ir.Shape(walk.dims(content))
        view = ir.LazyTensor(lambda: content, dtype=content.dtype, shape=shape, name=name)
        value = ir.Value(name=name, type=ir.TensorType(content.dtype), shape=shape, const_value=view)
        self.constants.append(value)
        return value
