"""Copies of a function's body for one of its calls: attributes resolved, names fresh, origins kept."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.authoring import Context
from graphopt.mapped import renamed

# Constants up to this many elements are copied with the body; larger ones are stored once for all calls.
COPIED_ELEMENTS = 1024

# What stands, in the main graph, for a large constant in a function.
Shared = dict[ir.Value, ir.Value]


@dataclass
class BodyCopy:
    """Copies the nodes of a function for one call.

    Attributes:
        ctx: The context.
        call: The node that calls.
        function: What it calls.
        shared: Large constants stored already; None where the call stands in a function, which can read none.
        values: What values of the function stand for.
    """

    ctx: Context
    call: ir.Node
    function: ir.Function
    shared: Shared | None
    values: dict[ir.Value, ir.Value | None] = field(default_factory=dict)

    def insert(self) -> tuple[list[ir.Node], list[ir.Value | None]]:
        """Put copies before the call; return them, and what the outputs of the function stand for."""
        given = list(self.call.inputs) + [None] * (len(self.function.inputs) - len(self.call.inputs))
        self.values.update(zip(self.function.inputs, given, strict=True))
        copies = self._nodes(self.function)
        for copy in copies:
            self.ctx.rewriter.insert(copy, before=self.call)
        return copies, [self._value(value) for value in self.function.outputs]

    def _nodes(self, nodes: Iterable[ir.Node]) -> list[ir.Node]:
        return [self._node(node) for node in nodes if not self._is_stored(node)]

    def _is_stored(self, node: ir.Node) -> bool:
        """Store a large Constant in the main graph, rather than once for each call."""
        tensor = walk.constant_tensor(node.outputs[0]) if walk.is_onnx_op(node, "Constant") else None
        if tensor is None or node.outputs[0].is_graph_output():
            return False
        return self._stores(node.outputs[0], tensor)

    def _stores(self, value: ir.Value, tensor: ir.TensorProtocol) -> bool:
        if self.shared is None or tensor.size <= COPIED_ELEMENTS:
            return False
        if value not in self.shared:
            name = f"{self.function.name}/{value.name}"
            self.shared[value] = self.ctx.rewriter.const(renamed(tensor, name), name, near=self.call)
        self.values[value] = self.shared[value]
        return True

    def _node(self, node: ir.Node) -> ir.Node:
        attributes = [found for one in node.attributes.values() if (found := self._attribute(one)) is not None]
        copy = ir.Node(
            node.domain,
            node.op_type,
            [self._value(value) for value in node.inputs],
            attributes,
            overload=node.overload,
            num_outputs=len(node.outputs),
            name=self._name(node.name),
            doc_string=node.doc_string,
            metadata_props={**self.call.metadata_props, **node.metadata_props},
        )
        provenance.record(copy, [node, self.call])
        for old, new in zip(node.outputs, copy.outputs, strict=True):
            self._describe(new, old)
        return copy

    def _attribute(self, attribute: ir.Attr) -> ir.Attr | None:
        """Return an attribute with what the call gives, or the function's default; None where there is neither."""
        if not attribute.is_ref():
            return self._copied(attribute)
        wanted = attribute.ref_attr_name or ""
        given = self.call.attributes.get(wanted)
        if given is None:
            given = self.function.attributes.get(wanted)
            if given is None or given.type == ir.AttributeType.UNDEFINED:
                return None
        if given.is_ref():
            return ir.RefAttr(attribute.name, given.ref_attr_name or "", given.type)
        return self._copied(ir.Attr(attribute.name, given.type, given.value))

    def _copied(self, attribute: ir.Attr) -> ir.Attr:
        match attribute.type:
            case ir.AttributeType.GRAPH:
                return ir.AttrGraph(attribute.name, self._graph(attribute.as_graph()))
            case ir.AttributeType.GRAPHS:
                return ir.AttrGraphs(attribute.name, [self._graph(graph) for graph in attribute.as_graphs()])
            case _:
                return attribute

    def _graph(self, graph: ir.Graph) -> ir.Graph:
        ports = {value: self._describe(ir.Value(), value) for value in graph.inputs}
        constants = [copy for value in graph.initializers.values() if (copy := self._initializer(value)) is not None]
        nodes = self._nodes(graph)
        outputs = [self._nested_output(value) for value in graph.outputs]
        return ir.Graph(
            list(ports.values()),
            outputs,
            nodes=nodes,
            initializers=constants,
            doc_string=graph.doc_string,
            name=graph.name,
            metadata_props=dict(graph.metadata_props),
        )

    def _initializer(self, value: ir.Value) -> ir.Value | None:
        """Return a copy of an initializer of a nested graph, or None where the main graph stores it."""
        tensor = value.const_value
        if tensor is None:
            return None
        is_port = value.is_graph_input() or value.is_graph_output()
        if not is_port and self._stores(value, tensor):
            return None
        # One that is an input too was copied as such.
        known = self.values[value] if value.is_graph_input() else None
        copy = known if known is not None else self._describe(ir.Value(), value)
        copy.const_value = renamed(tensor, copy.name or "")
        return copy

    def _nested_output(self, value: ir.Value) -> ir.Value:
        copy = self._value(value)
        assert copy is not None, "a nested graph returns what it makes itself"
        return copy

    def _describe(self, copy: ir.Value, value: ir.Value) -> ir.Value:
        """Give a copy a name and what is declared of the value; its symbolic sizes may be others in each call."""
        copy.name = self._name(value.name)
        copy.type = value.type
        if value.shape is not None:
            copy.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])
        copy.doc_string = value.doc_string
        copy.metadata_props.update(value.metadata_props)
        self.values[value] = copy
        return copy

    def _value(self, value: ir.Value | None) -> ir.Value | None:
        return self.values.get(value, value) if value is not None else None

    def _name(self, name: str | None) -> str:
        """Return a fresh name that begins with that of the call; what has none gets none."""
        if not name:
            return ""
        call = self.call.name or self.call.outputs[0].name or self.function.name
        return self.ctx.rewriter.fresh_name(f"{call}/{name}")
