"""What loading changes, so that nothing behind it needs to know two ways to say one thing."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import walk


def normalize(model: ir.Model) -> None:
    """Bring a freshly loaded model into normal form; what it computes and how it is called stay the same.

    * Before IR version 4 every initializer had to be listed as an input, and runtimes took it for a constant. Such
      inputs go, and the model becomes one of IR version 4.
    * A nested graph that returns a value of the graph around it gets an Identity: onnx_ir loses the link between the
      two, and ONNX Runtime refuses such a model.
    """
    if model.ir_version < walk.FIRST_IR_WITH_PURE_INITIALIZERS:
        _drop_constant_inputs(model)
    _own_returned_values(model.graph, {})
    for function in model.functions.values():
        _own_returned_values(function, {})


def _drop_constant_inputs(model: ir.Model) -> None:
    for graph in walk.every_graph(model):
        for value in [value for value in graph.inputs if value.is_initializer()]:
            graph.inputs.remove(value)
    model.ir_version = walk.FIRST_IR_WITH_PURE_INITIALIZERS


def _own_returned_values(graph: ir.Graph | ir.Function, outer: dict[str, ir.Value]) -> None:
    """Give outputs of nested graphs that no node produces an Identity of the outer value of their name."""
    visible = dict(outer)
    visible.update((value.name or "", value) for value in graph.inputs)
    if isinstance(graph, ir.Graph):
        visible.update(graph.initializers)
    for node in graph:
        for inner in walk.subgraphs(node):
            _own_returned_values(inner, visible)
        visible.update((value.name or "", value) for value in node.outputs)
    if outer and isinstance(graph, ir.Graph):
        for index, value in enumerate(graph.outputs):
            source = outer.get(value.name or "")
            if source is not None and value.producer() is None and value is not visible[value.name or ""]:
                graph.outputs[index] = _identity(graph, value, source, visible)


def _identity(graph: ir.Graph, returned: ir.Value, source: ir.Value, taken: dict[str, ir.Value]) -> ir.Value:
    node = ir.Node("", "Identity", [source], num_outputs=1)
    output = node.outputs[0]
    # A name of its own: inside, the outer value keeps the one it has.
    name = f"{source.name}_returned"
    while name in taken:
        name += "_"
    taken[name], output.name = output, name
    output.type = returned.type if returned.type is not None else source.type
    output.shape = returned.shape if returned.shape is not None else source.shape
    graph.append(node)
    return output
