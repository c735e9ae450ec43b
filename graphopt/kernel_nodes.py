"""Which kernel does the work of which node: by the names runtimes keep, then by what lies in between."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence

import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Kernel
from graphopt.summary import mac_terms

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})


def nodes_of_kernels(
    kernels: Sequence[Kernel], nodes: Sequence[ir.Node], named: Mapping[int, Sequence[Kernel]]
) -> list[list[ir.Node]]:
    """Return the nodes of each kernel in graph order; each node is given to one kernel, or to none.

    Runtimes drop names when they put nodes together. What all goes into one kernel is part of it, as far back as its
    matrix product or convolution; what is left behind a kernel, such as the sum of a residual branch, is part of it,
    too.

    Args:
        kernels: What ran.
        nodes: The nodes, as `graphopt.explaining.proof.numbered` gives them, with inferred dtypes.
        named: The kernels of each node that are known by name, by the node's place.
    """
    places = {id(kernel): place for place, kernel in enumerate(kernels)}
    owner: dict[ir.Node, int] = {}
    for number, own in named.items():
        owner[nodes[number]] = places[id(max(own, key=lambda kernel: kernel.milliseconds))]
    _take_what_leads_in(nodes, owner)
    _take_what_is_left_behind(nodes, owner)
    groups: list[list[ir.Node]] = [[] for _ in kernels]
    for node in nodes:
        if node in owner:
            groups[owner[node]].append(node)
    return groups


def _take_what_leads_in(nodes: Sequence[ir.Node], owner: dict[ir.Node, int]) -> None:
    has_product: defaultdict[int, bool] = defaultdict(bool)
    for node, place in owner.items():
        has_product[place] |= bool(_is_product(node))
    for node in reversed(nodes):
        if node in owner or node.op_type == "Constant":
            continue
        places = _places(_readers(node), owner)
        if len(places) == 1 and not has_product[place := places.pop()]:
            owner[node] = place
            has_product[place] |= _is_product(node)


def _take_what_is_left_behind(nodes: Sequence[ir.Node], owner: dict[ir.Node, int]) -> None:
    for node in nodes:
        if node in owner or _is_product(node) or not all(value.dtype in _FLOATS for value in node.outputs):
            continue
        makers = [value.producer() for value in node.inputs if value is not None]
        places = [owner[maker] for maker in makers if maker in owner]
        if places:
            owner[node] = max(places)


def _readers(node: ir.Node) -> list[ir.Node] | None:
    """Return what reads a node's outputs; None where others do as well."""
    if any(value.is_graph_output() for value in node.outputs):
        return None
    return [use.node for value in node.outputs for use in value.uses()]


def _places(readers: Collection[ir.Node] | None, owner: Mapping[ir.Node, int]) -> set[int]:
    """Return the kernels of some nodes; none where one of them has none."""
    if not readers or any(reader not in owner for reader in readers):
        return set()
    return {owner[reader] for reader in readers}


def _is_product(node: ir.Node) -> bool:
    return mac_terms(node) != [] or any(True for _ in walk.subgraphs(node))
