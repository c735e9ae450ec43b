"""Layers as a user names them: what reads one stored weight, in words that `include` and `exclude` take."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk

# What only hands a weight on: who reads the weight reads behind it.
_HANDS_ON = ("Cast", "Identity", "Reshape", "Transpose")
# A constant that is longer than 1 along fewer axes is a bias, a scale or a table of sizes.
_WEIGHT_AXES = 2


@dataclass(frozen=True)
class Layer:
    """Every node that reads one weight; a weight that several share is one decision.

    Attributes:
        name: How messages call it: its first node, as `walk.label` says it.
        operators: Operators of the nodes that compute with the weight.
        nodes: Names of its nodes, those between the weight and a reader included.
        elements: How many numbers the weight holds.
        globs: What `include` and `exclude` take for exactly these nodes; none where names do not tell them apart.
    """

    name: str
    operators: tuple[str, ...]
    nodes: tuple[str, ...]
    elements: int
    globs: tuple[str, ...]


def layers_of(model: ir.Model) -> list[Layer]:
    """Return the layers of every graph of a model, in graph order; each node belongs to one at most."""
    groups: dict[ir.Value, list[ir.Node]] = {}
    taken: set[ir.Node] = set()
    for node in walk.every_node(model):
        found = None if walk.is_onnx_op(node, *_HANDS_ON) else _first_weight(node)
        if found is None or node in taken:
            continue
        weight, between = found
        new = [one for one in (node, *between) if one not in taken]
        taken.update(new)
        groups.setdefault(weight, []).extend(new)
    counts = Counter(node.name for node in walk.every_node(model))
    counts.update({node.op_type for node in walk.every_node(model)})
    return [_layer(weight, nodes, counts) for weight, nodes in groups.items()]


def _first_weight(node: ir.Node) -> tuple[ir.Value, list[ir.Node]] | None:
    """Return the first weight a node reads, and the nodes that hand it on."""
    for value in node.inputs:
        between: list[ir.Node] = []
        stored = value
        while stored is not None and walk.constant_tensor(stored) is None:
            producer = stored.producer()
            if producer is None or not walk.is_onnx_op(producer, *_HANDS_ON) or not producer.inputs:
                stored = None
                break
            between.append(producer)
            stored = producer.inputs[0]
        if stored is not None and _is_weight(stored):
            return stored, between
    return None


def _is_weight(value: ir.Value) -> bool:
    tensor = walk.constant_tensor(value)
    if tensor is None or not tensor.dtype.is_floating_point():
        return False
    return sum(dim > 1 for dim in walk.dims(tensor)) >= _WEIGHT_AXES


def _layer(weight: ir.Value, nodes: list[ir.Node], counts: Counter[str | None]) -> Layer:
    tensor = walk.constant_tensor(weight)
    assert tensor is not None, "a weight is a constant"
    names = tuple(node.name or "" for node in nodes)
    told_apart = all(name and counts[name] == 1 for name in names)
    computing = [node for node in nodes if not walk.is_onnx_op(node, *_HANDS_ON)]
    return Layer(
        name=walk.label(nodes[0]),
        operators=tuple(dict.fromkeys(node.op_type for node in computing)),
        nodes=names,
        elements=tensor.size,
        globs=tuple(map(as_glob, names)) if told_apart else (),
    )


def as_glob(name: str) -> str:
    """Return the glob that matches a name and nothing else."""
    return "".join(f"[{character}]" if character in "*?[" else character for character in name)


def name_nodes(model: ir.Model) -> None:
    """Give nodes of a model of one's own that have no name, or another's or an operator's, one of their own."""
    taken: set[str] = {node.op_type for node in walk.every_node(model)}
    names = {node.name for node in walk.every_node(model) if node.name}
    for node in walk.every_node(model):
        if not node.name or node.name in taken:
            node.name = _fresh(node.name or walk.label(node), taken | names)
        taken.add(node.name)


def _fresh(base: str, taken: set[str]) -> str:
    return next(name for suffix in itertools.count(1) if (name := f"{base}_{suffix}") not in taken)
