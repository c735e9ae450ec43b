"""Nested graphs dissolved: what a branch or body computes moves to where its If, Loop or Scan stood."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context

Finish = Callable[[list[ir.Value]], Sequence[ir.Value]]


def can_dissolve(body: ir.Graph, arguments: Mapping[ir.Value, ir.Value | None]) -> bool:
    """Return whether nothing stands against it: inputs with defaults of their own, or types that contradict."""
    if any(value.is_graph_input() for value in body.initializers.values()):
        return False
    pairs = ((port.dtype, argument.dtype) for port, argument in arguments.items() if argument is not None)
    return all(one is None or other is None or one == other for one, other in pairs)


def dissolve(
    node: ir.Node,
    body: ir.Graph,
    ctx: Context,
    *,
    arguments: Mapping[ir.Value, ir.Value] | None = None,
    finish: Finish = list,
) -> None:
    """Replace a node by what one of its nested graphs computes.

    Nodes are moved, not copied: they keep their names and origins. Call it inside an edit.

    Args:
        node: The If, Loop or Scan.
        body: The nested graph.
        ctx: The context.
        arguments: What each input of the body that is read stands for.
        finish: Makes the node's outputs of the body's, new nodes included; the node is still there then.
    """
    arguments = arguments or {}
    outputs = [arguments.get(value, value) for value in body.outputs]
    returned = set(outputs)
    body.outputs.clear()
    for port, argument in arguments.items():
        ctx.rewriter.replace(port, argument)
    for value in list(body.initializers.values()):
        if value.uses() or value in returned:
            ctx.rewriter.lift(value, near=node)
    if arguments:
        _forget_sizes(body)
    for inner in list(body):
        ctx.rewriter.move(inner, before=node)
    take_place(node, finish(outputs), ctx)


def take_place(node: ir.Node, values: Sequence[ir.Value], ctx: Context) -> None:
    """Let values stand for the outputs of a node, under the names of these, and erase it."""
    heirs = []
    for old, new in zip(node.outputs, values, strict=True):
        if old.uses() or old.is_graph_output():
            is_free = not (old.is_graph_output() or new.is_graph_output() or old.graph is not new.graph)
            ctx.rewriter.replace(old, new)
            heirs += [(old.name, new)] if is_free and new.producer() is not None else []
    ctx.rewriter.erase(node)
    # Readers find again what they read; a value that two outputs returned keeps the last name.
    for name, new in heirs:
        if not new.is_graph_output():
            new.name = name


def _forget_sizes(body: ir.Graph) -> None:
    """Forget symbolic sizes inside a body: a symbol there means another number in each iteration, if not outside."""
    for graph in walk.graphs_within(body):
        for node in graph:
            for value in node.outputs:
                if value.shape is not None and not value.shape.is_static():
                    value.shape = None
