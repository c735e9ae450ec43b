"""What each constant of a model is called where several share a name, as they may in nested graphs and functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import onnx_ir as ir

from . import walk


def constant_names(model: ir.Model) -> dict[ir.Value, str]:
    """Return all that a model stores and reads, by a name that nothing else has: initializers, and what Constants give.

    In the main graph that is the constant's own name, and in a nested graph, too, unless another constant has it. Else
    the place goes before it: `choose.then_branch/weight` in a branch of node `choose`, `Block/weight` in function
    `Block`, which is one constant however often the function is called. Functions that nothing calls are left out.
    """
    graphs = list(_constants(model.graph, ""))
    shared = Counter(value.name for _, value in graphs)
    own = [("", value) if not place or shared[value.name] == 1 else (place, value) for place, value in graphs]
    for key in sorted(walk.called_functions(model)):
        own += _constants(model.functions[key], key[1])
    found: dict[ir.Value, str] = {}
    taken: set[str] = set()
    for place, value in sorted(own, key=lambda one: one[0] != ""):
        name = f"{place}/{value.name}" if place else value.name or ""
        while name in taken:
            name += "_"
        taken.add(name)
        found[value] = name
    return found


def _constants(graph: ir.Graph | ir.Function, place: str) -> Iterator[tuple[str, ir.Value]]:
    """Yield the constants of a graph and of those nested in it, with the place of each."""
    if isinstance(graph, ir.Graph):
        yield from ((place, value) for value in graph.initializers.values())
    for node in graph:
        if walk.is_onnx_op(node, "Constant"):
            yield place, node.outputs[0]
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                inner = f"{walk.label(node)}.{attribute.name}"
                yield from _constants(attribute.as_graph(), f"{place}/{inner}" if place else inner)
