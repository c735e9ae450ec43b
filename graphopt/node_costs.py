"""What a few nodes take at least: multiplications and additions, and the bytes they must read and write."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.shapes import static_bytes, static_shape
from graphopt.summary import node_macs

_MICROSOFT = "com.microsoft"
# A runtime hands these on without touching an element.
_VIEWS = frozenset({"Flatten", "Identity", "Reshape", "Shape", "Size", "Squeeze", "Unsqueeze"})
# Of their first input these read only what they give.
_PICKERS = frozenset({"Gather", "GatherBlockQuantized", "GatherElements", "GatherND", "Slice"})


@dataclass(frozen=True)
class Cost:
    """The least work of some nodes, at the sizes their shapes say.

    Attributes:
        operations: Multiplications and additions of products; None where that is not known. What is done element by
            element counts nothing: its bytes take longer.
        bytes: What they read from outside, and of what they make what others read; weights as stored. None likewise.
    """

    operations: int | None
    bytes: int | None


def cost_of(nodes: Collection[ir.Node]) -> Cost:
    """Return the cost of nodes that run as one: what they hand to each other is neither read nor written.

    Args:
        nodes: Nodes of a model whose shapes were inferred with inputs of fixed sizes.
    """
    macs = [_macs(node) for node in nodes]
    known = [count for count in macs if count is not None]
    return Cost(2 * sum(known) if len(known) == len(macs) else None, _bytes(nodes))


def _bytes(nodes: Collection[ir.Node]) -> int | None:
    if all(node.op_type in _VIEWS for node in nodes):
        return 0
    inside = set(nodes)
    read = {value: None for node in nodes for value in walk.values_read(node) if value.producer() not in inside}
    made = {value: None for node in nodes for value in node.outputs if _leaves(value, inside)}
    sizes = [*(_read_size(value, inside) for value in read), *(_size(value) for value in made)]
    return None if None in sizes else sum(size or 0 for size in sizes)


def _leaves(value: ir.Value, inside: Collection[ir.Node]) -> bool:
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())


def _read_size(value: ir.Value, inside: Collection[ir.Node]) -> int | None:
    size = _size(value)
    uses = [use for use in value.uses() if use.node in inside]
    if size is None or not all(use.node.op_type in _PICKERS and use.idx == 0 for use in uses):
        return size
    picked = [_size(use.node.outputs[0]) for use in uses]
    return None if None in picked else min(size, sum(one or 0 for one in picked))


def _size(value: ir.Value) -> int | None:
    tensor = walk.constant_tensor(value)
    return tensor.nbytes if tensor is not None else static_bytes(value)


def _macs(node: ir.Node) -> int | None:
    domain = "" if node.domain in walk.ONNX_DOMAINS else node.domain
    rule = _RULES.get((domain, node.op_type))
    if rule is not None:
        return rule(node)
    count = node_macs(node)
    if not count:
        return count
    # There a dynamic dimension counts as 1.
    shapes = [static_shape(value) for value in (*node.inputs[:2], node.outputs[0])]
    return None if None in shapes else count


def _shape(node: ir.Node, place: int) -> tuple[int, ...] | None:
    return static_shape(node.inputs[place]) if place < len(node.inputs) else None


def _times_output(node: ir.Node, each: int | None) -> int | None:
    made = static_shape(node.outputs[0])
    return None if made is None or each is None else math.prod(made) * each


def _convolution(weight: int) -> Callable[[ir.Node], int | None]:
    """Return the rule of convolutions whose weight is this input."""

    def macs(node: ir.Node) -> int | None:
        shape = _shape(node, weight)
        return _times_output(node, None if shape is None else math.prod(shape[1:]))

    return macs


def _product(node: ir.Node) -> int | None:
    """Return the multiplications of a product whose left factor is the first input."""
    left = _shape(node, 0)
    inner = -2 if node.attributes.get_int("transA", 0) else -1
    return _times_output(node, left[inner] if left is not None and len(left) >= -inner else None)


def _packed_product(node: ir.Node) -> int | None:
    return _times_output(node, node.attributes.get_int("K", 0) or None)


def _attention(past: int) -> Callable[[ir.Node], int | None]:
    """Return the rule of attention: each query with each key, each weight with each value; none is masked out."""

    def macs(node: ir.Node) -> int | None:
        query, key, made = _shape(node, 0), _shape(node, 1), static_shape(node.outputs[0])
        if query is None or key is None or made is None or len(key) < 3:
            return None
        before = _shape(node, past)
        keys = key[-2] + (before[-2] if before is not None and len(before) == 4 else 0)
        return keys * (math.prod(query) + math.prod(made))

    return macs


def _unknown(node: ir.Node) -> None:
    """Return None: it multiplies, and how much is not worked out."""


_RULES: dict[tuple[str, str], Callable[[ir.Node], int | None]] = {
    ("", "Attention"): _attention(past=4),
    ("", "DeformConv"): _convolution(1),
    ("", "Einsum"): _unknown,
    ("", "QLinearConv"): _convolution(3),
    ("", "QLinearMatMul"): _product,
    (_MICROSOFT, "Attention"): _unknown,
    (_MICROSOFT, "DynamicQuantizeLSTM"): _unknown,
    (_MICROSOFT, "DynamicQuantizeMatMul"): _product,
    (_MICROSOFT, "FusedConv"): _convolution(1),
    (_MICROSOFT, "FusedGemm"): _product,
    (_MICROSOFT, "FusedMatMul"): _product,
    (_MICROSOFT, "GroupQueryAttention"): _attention(past=3),
    (_MICROSOFT, "MatMulIntegerToFloat"): _product,
    (_MICROSOFT, "MatMulNBits"): _packed_product,
    (_MICROSOFT, "MultiHeadAttention"): _attention(past=6),
    (_MICROSOFT, "QAttention"): _unknown,
    (_MICROSOFT, "QGemm"): _product,
}
