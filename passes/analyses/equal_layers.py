"""Layers that are the same as others: one operator, one set of attributes, and the very same weights."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk

from .sameness import PLAIN_ATTRIBUTES, tensor_key

# What is stored in fewer elements is no weight.
_LEAST_ELEMENTS = 64
_LAYERS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "LSTM", "GRU", "RNN", "Einsum")


@dataclass(frozen=True)
class Run:
    """Layers in a row that are equal, each, to layers in a row before them.

    Attributes:
        layers: The layers.
        firsts: Those they equal.
        bytes: What the weights of ``layers`` take, stored once for both.
    """

    layers: Sequence[ir.Node]
    firsts: Sequence[ir.Node]
    bytes: int

    def __str__(self) -> str:
        first, last = (walk.label(node) for node in (self.layers[0], self.layers[-1]))
        same = walk.label(self.firsts[0])
        if len(self.layers) == 1:
            return f"`{first}` is `{same}`"
        return f"`{first}` to `{last}` ({len(self.layers)} layers) are `{same}` to `{walk.label(self.firsts[-1])}`"


def equal_layers(model: ir.Model, same: Mapping[ir.Value, ir.Value] | None = None) -> list[Run]:
    """Return the layers whose weights and biases are all those of an earlier layer, in rows as long as can be.

    A bias that another operator adds behind the layer is no part of it.

    Args:
        model: The model.
        same: Initializers and equal ones that stand for them; without it, large weights are the same where they lie
            in one place, as `merge-initializers` leaves them.
    """
    same = same or {}
    order = [(node, key) for node in walk.every_node(model) if (key := _key(node, same)) is not None]
    first: dict[Hashable, int] = {}
    pairs = [(place, first.setdefault(key, place)) for place, (_, key) in enumerate(order)]
    runs: list[list[tuple[int, int]]] = []
    for place, earlier in pairs:
        if place == earlier:
            continue
        if runs and runs[-1][-1] == (place - 1, earlier - 1):
            runs[-1].append((place, earlier))
        else:
            runs.append([(place, earlier)])
    return [_run([order[place][0] for place, _ in run], [order[earlier][0] for _, earlier in run]) for run in runs]


def _run(layers: Sequence[ir.Node], firsts: Sequence[ir.Node]) -> Run:
    constants = {value for layer in layers for value in layer.inputs if walk.constant_tensor(value) is not None}
    return Run(layers, firsts, sum(value.const_value.nbytes for value in constants if value and value.const_value))


def _key(node: ir.Node, same: Mapping[ir.Value, ir.Value]) -> Hashable:
    """Return what equal layers share, or None where a node is no layer with a weight."""
    if not walk.is_onnx_op(node, *_LAYERS) or walk.has_references(node):
        return None
    attributes = sorted(node.attributes.items())
    if any(attribute.type not in PLAIN_ATTRIBUTES for _, attribute in attributes):
        return None
    said = tuple((name, repr(attribute.value)) for name, attribute in attributes)
    tensors = [walk.constant_tensor(same.get(value, value) if value is not None else None) for value in node.inputs]
    if all(tensor is None or tensor.size < _LEAST_ELEMENTS for tensor in tensors):
        return None
    return node.op_type, said, tuple(tensor_key(tensor) if tensor is not None else None for tensor in tensors)
