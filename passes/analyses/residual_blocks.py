"""Residual blocks: branches of which a sum is all that is ever read, so that a model without them is still whole."""

from __future__ import annotations

import heapq
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import shapes, walk

from .linear_layers import as_linear_layer

_ATTENTION = ("Softmax", "Attention", "MultiHeadAttention", "GroupQueryAttention")


@dataclass(frozen=True, eq=False)
class ResidualBlock:
    """x + f(x), of which f can be left out.

    Attributes:
        total: The Add.
        branch: Which input of it is f(x).
        nodes: What computes nothing but f(x), in graph order.
        layers: Those of them that are linear layers.
    """

    total: ir.Node
    branch: int
    nodes: Sequence[ir.Node]
    layers: Sequence[ir.Node]

    @property
    def skip(self) -> ir.Value:
        """What the sum would be without the branch: x."""
        value = self.total.inputs[1 - self.branch]
        assert value is not None, "both terms are there"
        return value

    @property
    def output(self) -> ir.Value:
        """What the branch adds: f(x)."""
        value = self.total.inputs[self.branch]
        assert value is not None, "both terms are there"
        return value

    @property
    def name(self) -> str:
        """What users call it: its first layer."""
        return walk.label(self.layers[0])

    @property
    def kind(self) -> str:
        """What it is made of: attention, convolutions or other layers."""
        if any(node.op_type in _ATTENTION for node in self.nodes):
            return "attention"
        return "convolutions" if any(node.op_type == "Conv" for node in self.layers) else "feed-forward"

    @property
    def feature_axis(self) -> int:
        """The axis of the sum that its last layer makes, counted from the end; of images the channels."""
        return -(self._rank - 1) if self.layers[-1].op_type.startswith("Conv") else -1

    @property
    def _rank(self) -> int:
        dims = shapes.dims_of(self.output)
        assert dims is not None, "shapes of both terms are known to be the same"
        return len(dims)


def residual_blocks(model: ir.Model) -> list[ResidualBlock]:
    """Return the innermost residual blocks of the main graph, in graph order of their sums.

    A block is an Add of two tensors of one shape, x and f(x), where f holds linear layers, hangs on x, or on what x is
    itself a sum of, as where two branches start from one value, and is read by nothing else; it gives no output of the
    model. A sum whose other term is a layer, as where a network changes its width, is none.

    Args:
        model: A model with inferred shapes, in canonical form.
    """
    order = list(model.graph)
    places = {node: place for place, node in enumerate(order)}
    found: list[ResidualBlock] = []
    for node in order:
        if walk.is_onnx_op(node, "Add"):
            blocks = [block for branch in (0, 1) if (block := _block(node, branch, order, places)) is not None]
            found += blocks[:1]
    sums = {block.total for block in found}
    return [block for block in found if sums.isdisjoint(block.nodes)]


def _block(
    total: ir.Node, branch: int, order: Sequence[ir.Node], places: Mapping[ir.Node, int]
) -> ResidualBlock | None:
    skip, output = total.inputs[1 - branch], total.inputs[branch]
    if skip is None or output is None or walk.constant_tensor(skip) is not None or output.producer() is None:
        return None
    dims = shapes.dims_of(total.outputs[0])
    if dims is None or shapes.dims_of(skip) != dims or shapes.dims_of(output) != dims:
        return None
    nodes = _read_by_nothing_else(total, branch, order, places)
    layers = [node for node in nodes if as_linear_layer(node) is not None]
    if not layers or not _hangs_on(nodes, _terms(skip), places):
        return None
    return ResidualBlock(total, branch, nodes, layers)


def _read_by_nothing_else(
    total: ir.Node, branch: int, order: Sequence[ir.Node], places: Mapping[ir.Node, int]
) -> list[ir.Node]:
    """Return the nodes that would be dead without the branch, in graph order."""
    own: set[ir.Node] = set()
    waiting: list[int] = []  # places, negated: the last node comes first, when all that reads it was looked at
    queued: set[int] = set()

    def wait_for(value: ir.Value | None) -> None:
        producer = value.producer() if value is not None else None
        place = places.get(producer) if producer is not None else None
        if place is not None and place not in queued:
            queued.add(place)
            heapq.heappush(waiting, -place)

    wait_for(total.inputs[branch])
    while waiting:
        node = order[-heapq.heappop(waiting)]
        uses = [use for value in node.outputs for use in value.uses()]
        is_own = all(use.node in own or (use.node is total and use.idx == branch) for use in uses)
        if is_own and not any(value.is_graph_output() for value in node.outputs):
            own.add(node)
            for value in walk.values_read(node):
                wait_for(value)
    return sorted(own, key=places.__getitem__)


def _terms(skip: ir.Value) -> set[ir.Value]:
    """Return a value and what it is a sum of."""
    producer = skip.producer()
    is_sum = producer is not None and walk.is_onnx_op(producer, "Add")
    return {skip, *(value for value in (producer.inputs if is_sum and producer else ()) if value is not None)}


def _hangs_on(nodes: Sequence[ir.Node], sources: Collection[ir.Value], places: Mapping[ir.Node, int]) -> bool:
    """Return whether what some nodes read hangs on one of some values."""
    first = min(_place(value, places) for value in sources)
    own = set(nodes)
    waiting = [value for node in nodes for value in walk.values_read(node) if value.producer() not in own]
    seen = set(waiting)
    while waiting:
        value = waiting.pop()
        if value in sources:
            return True
        producer = value.producer()
        if producer is None or places.get(producer, -1) <= first:
            continue
        fresh = [one for one in _unique(walk.values_read(producer)) if one not in seen]
        seen.update(fresh)
        waiting += fresh
    return False


def _place(value: ir.Value, places: Mapping[ir.Node, int]) -> int:
    producer = value.producer()
    return places.get(producer, -1) if producer is not None and walk.constant_tensor(value) is None else -1


def _unique(values: Iterable[ir.Value]) -> list[ir.Value]:
    return list(dict.fromkeys(values))
