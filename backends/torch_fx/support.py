"""Which models torch can compute: what is said of one before it is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import onnx_ir as ir

from graphopt import walk
from graphopt.errors import BackendError

from . import catalog

# Nodes of one operator that are named; the rest is counted.
NAMED_NODES = 3


def refuse_unsupported(model: ir.Model) -> None:
    """Refuse a model with operators that torch cannot compute.

    Raises:
        BackendError: Names all of them, and nodes of each.
    """
    found: dict[str, list[str]] = {}
    for node, opsets in _nodes(model):
        if node.op_identifier() in model.functions:
            continue
        lack = _lack(node, opsets)
        if lack is not None:
            found.setdefault(lack, []).append(walk.label(node))
    if found:
        told = "; ".join(f"{lack} ({_some(nodes)})" for lack, nodes in sorted(found.items()))
        raise BackendError(
            f"backend `torch` cannot compute: {told}",
            hint="`--backend onnxruntime` may run it; docs/torch-operators.md lists what is known",
        )


def _nodes(model: ir.Model) -> Iterator[tuple[ir.Node, Mapping[str, int]]]:
    """Yield every node that runs, with the versions of operator sets where it stands."""
    for graph in walk.graphs_within(model.graph):
        yield from ((node, model.opset_imports) for node in graph)
    for key in walk.called_functions(model):
        function = model.functions[key]
        for graph in walk.graphs_within(function):
            yield from ((node, function.opset_imports) for node in graph)


def _lack(node: ir.Node, opsets: Mapping[str, int]) -> str | None:
    """Return what torch lacks for a node, or None."""
    version = walk.imported(opsets, node.domain)
    called = node.op_type if node.domain in walk.ONNX_DOMAINS else f"{node.domain}::{node.op_type}"
    if walk.is_onnx_op(node, "Constant"):
        sparse = any(attribute.type == ir.AttributeType.SPARSE_TENSOR for attribute in node.attributes.values())
        return "`Constant` with `sparse_value`" if sparse else None
    found = catalog.find(node.domain, node.op_type, version)
    if found is None:
        return f"`{called}` of version {version}"
    unknown = sorted(set(node.attributes) - found.keywords)
    return f"`{called}` with `{'`, `'.join(unknown)}`" if unknown else None


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(f"`{name}`" for name in names[:NAMED_NODES])
    return f"{shown} and {len(names) - NAMED_NODES} more" if len(names) > NAMED_NODES else shown
