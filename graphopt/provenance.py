"""Where every node comes from: a set of origins, each the id of a node of the model as loaded."""

from __future__ import annotations

from collections.abc import Iterable

import onnx_ir as ir

from graphopt import walk

_KEY = "graphopt.origins"

Origins = frozenset[str]


def stamp(model: ir.Model) -> None:
    """Give every node that has no origin yet an id of its own: its name, made unique by a suffix."""
    taken: set[str] = set()
    for node in walk.every_node(model):
        if _KEY in node.meta:
            continue
        base = node.name or f"{node.op_type}:{node.outputs[0].name if node.outputs else ''}"
        name, suffix = base, 1
        while name in taken:
            suffix += 1
            name = f"{base}#{suffix}"
        taken.add(name)
        node.meta[_KEY] = frozenset({name})


def origins(node: ir.Node) -> Origins:
    """Return the origins of a node; empty where it was made outside a Rewriter."""
    known: Origins = node.meta.get(_KEY, frozenset())
    return known


def record(node: ir.Node, sources: Iterable[ir.Node]) -> None:
    """Set the origins of a new node to the union of its sources'."""
    node.meta[_KEY] = frozenset().union(*(origins(source) for source in sources))
