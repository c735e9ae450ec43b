"""Fragments: models of their own made of copies of a few nodes, to be run apart from the rest."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import onnx_ir as ir

from graphopt import walk

_IR_VERSION = 10


def fragment(
    nodes: Iterable[ir.Node], outputs: Sequence[ir.Value], inputs: Sequence[ir.Value], imports: Mapping[str, int]
) -> ir.Model:
    """Return a model that computes values from others by copies of the nodes between them.

    Its inputs are called ``in0``, ``in1``, ..., its outputs ``out0``, ``out1``, ...; constants are shared.

    Args:
        nodes: The nodes, in order; none may hold nested graphs.
        outputs: Values they produce, inputs, or constants.
        inputs: Values they read that are neither produced by them nor constant.
        imports: Operator sets.
    """
    copier = _Copier(inputs)
    for node in nodes:
        copier.copy(node)
    ends = [copier.end(value, f"out{index}") for index, value in enumerate(outputs)]
    body = ir.Graph(
        [copier.mapped[value] for value in inputs],
        ends,
        nodes=copier.nodes,
        initializers=copier.constants,
        opset_imports=dict(imports),
        name="fragment",
    )
    return ir.Model(body, ir_version=_IR_VERSION)


def constant_content(value: ir.Value) -> ir.TensorProtocol | None:
    """Return what a constant holds, one that is not in a graph yet included."""
    known = walk.constant_tensor(value)
    if known is None and value.producer() is None and not value.is_graph_input():
        return value.const_value
    return known


class _Copier:
    def __init__(self, inputs: Sequence[ir.Value]) -> None:
        self.mapped = {
            value: ir.Value(name=f"in{i}", type=value.type, shape=value.shape) for i, value in enumerate(inputs)
        }
        self.constants: list[ir.Value] = []
        self.nodes: list[ir.Node] = []

    def copy(self, node: ir.Node) -> None:
        copy = ir.Node(
            node.domain,
            node.op_type,
            [self._lookup(value) if value is not None else None for value in node.inputs],
            tuple(node.attributes.values()),
            num_outputs=len(node.outputs),
        )
        for index, (old, new) in enumerate(zip(node.outputs, copy.outputs, strict=True)):
            new.name = f"v{len(self.nodes)}_{index}"
            self.mapped[old] = new
        self.nodes.append(copy)

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
