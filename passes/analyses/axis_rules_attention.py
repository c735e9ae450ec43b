"""Rules of the channel analysis for attention in one operator: whole heads go, what is inside of one stays."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from .axis_ties import Axis, AxisRule, Emit, NodeAxes, length_of

_INSIDE = "it lies inside of the heads of an attention operator"
_ALONG = "an attention operator goes along it"
_ROTATED = "it lies inside of the heads of a rotary embedding"
_UNEVEN = "it does not divide into heads"
_MICROSOFT = "com.microsoft"


class _Heads:
    """The heads of an attention operator: a head of keys and values goes with those of queries that read it.

    Where heads of keys cannot go, as when there is a single one for all queries (Shazeer, Fast Transformer Decoding,
    2019), of the queries of each as many go.

    Args:
        query: How many heads the queries have.
        key: How many heads keys and values have.
        emit: Where ties are put.
        inside: Why what is inside of a head stays.
    """

    def __init__(self, query: int, key: int, emit: Emit, inside: str = _INSIDE) -> None:
        if not query or not key or query % key:
            raise ValueError(f"{query} heads of queries for {key} of keys")
        self.query, self.emit, self.inside = query, emit, inside
        self.by_count = {key: emit.between(key)}
        if query != key:
            self.by_count[query] = emit.between(query)
            emit.split(self.by_count[query], [self.by_count[key], emit.between(query // key)], "heads")
        self.tied: set[Axis] = set()

    def tie(self, axis: Axis, heads: int) -> None:
        """Tie an axis along which so many heads lie one behind the other."""
        self.tied.add(axis)
        length = length_of(axis)
        if length is None or length % heads:
            self.emit.freeze(axis, _UNEVEN)
            self.freeze(_UNEVEN)
        elif length == heads:
            self.emit.tie(axis, self.by_count[heads])
        else:
            # Said as a split, it is the same as that of a Reshape before or behind it.
            within = self.emit.between(length // heads)
            self.emit.freeze(within, self.inside)
            self.emit.split(axis, [self.by_count[heads], within], "heads")

    def tie_elements(self, axis: Axis, start: int, length: int, heads: int) -> None:
        """Tie so many elements of an axis, along which so many heads lie one behind the other."""
        self.tied.add(axis)
        places = np.arange(length)
        self.emit.tie(axis, self.by_count[heads], start + places, places // (length // heads))

    def freeze(self, reason: str) -> None:
        """Freeze all heads."""
        for axis in self.by_count.values():
            self.emit.freeze(axis, reason)

    def tie_tensor(self, node: NodeAxes, index: int, heads: int, *, output: bool = False) -> None:
        """Tie what is [batch, rows, heads · size] or [batch, heads, rows, size], if it is there."""
        if not (node.gives(index) if output else node.has(index)):
            return
        sizes = node.sizes_out(index) if output else node.sizes_in(index)
        place = node.output if output else node.input
        if len(sizes) == 3:
            return self.tie(place(index, 2), heads)
        self.tie(place(index, 1), heads)
        self.emit.freeze(place(index, 3), self.inside)

    def tie_scores(self, node: NodeAxes, index: int, *, output: bool = False) -> None:
        """Tie what is [..., heads, rows, columns] and may broadcast over heads, if it is there."""
        if not (node.gives(index) if output else node.has(index)):
            return
        sizes = node.sizes_out(index) if output else node.sizes_in(index)
        if len(sizes) > 2 and sizes[-3] != 1:
            self.tie((node.output if output else node.input)(index, -3), self.query)

    def freeze_others(self, node: NodeAxes) -> None:
        """Freeze the axes that are no heads."""
        for value in (*node.node.inputs, *node.node.outputs):
            if value is not None:
                self.emit.freeze_value(value, _ALONG, skip={axis.axis for axis in self.tied if axis.value is value})


def attention(node: NodeAxes, emit: Emit) -> None:
    """ONNX's own attention, since version 23."""
    is_flat = len(node.sizes_in(0)) == 3
    query, key = (node.integer("q_num_heads"), node.integer("kv_num_heads")) if is_flat else _second_axes(node)
    heads = _Heads(query, key, emit)
    for index, count in ((0, query), (1, key), (2, key), (4, key), (5, key)):
        heads.tie_tensor(node, index, count)
    heads.tie_scores(node, 3)
    for index, count in ((0, query), (1, key), (2, key)):
        heads.tie_tensor(node, index, count, output=True)
    heads.tie_scores(node, 3, output=True)
    heads.freeze_others(node)


def _second_axes(node: NodeAxes) -> tuple[int, int]:
    query, key = node.sizes_in(0)[1], node.sizes_in(1)[1]
    return query or 0, key or 0


def multi_head_attention(node: NodeAxes, emit: Emit) -> None:
    """ONNX Runtime's attention of equally many heads of queries, keys and values."""
    count = node.integer("num_heads")
    heads = _Heads(count, count, emit)
    for index in (0, 1, 2):
        if len(node.sizes_in(index)) == 5:  # packed: [batch, rows, heads, 2 or 3, size]
            heads.tie(node.input(index, 2), count)
            for axis in (3, 4):
                emit.freeze(node.input(index, axis), _INSIDE)
        else:
            heads.tie_tensor(node, index, count)
    if node.has(3):
        _tie_packed(heads, node.input(3, 0), [count] * 3, _rows_of_bias(node, count))
    heads.tie_scores(node, 5)
    for index in (6, 7):
        heads.tie_tensor(node, index, count)
    heads.tie_tensor(node, 0, count, output=True)
    for index in (1, 2):
        heads.tie_tensor(node, index, count, output=True)
    heads.tie_scores(node, 3, output=True)
    heads.freeze_others(node)


def _rows_of_bias(node: NodeAxes, heads: int) -> list[int | None]:
    """Return how much of a bias is for queries, keys and values."""
    sizes, total = node.sizes_in(0), node.sizes_in(3)[0]
    width = sizes[2] if len(sizes) == 3 else heads * (sizes[4] or 0) if len(sizes) == 5 else None
    return [width, width, total - 2 * width if total is not None and width is not None else None]


def _tie_packed(heads: _Heads, axis: Axis, counts: list[int], widths: list[int | None]) -> None:
    """Tie an axis on which queries, keys and values lie one behind the other, each in heads."""
    known = [width for width in widths if width]
    if len(known) < len(widths) or any(width % count for width, count in zip(known, counts, strict=True)):
        heads.emit.freeze(axis, _UNEVEN)
        return heads.freeze(_UNEVEN)
    start = 0
    for width, count in zip(known, counts, strict=True):
        heads.tie_elements(axis, start, width, count)
        start += width
    return None


def group_query_attention(node: NodeAxes, emit: Emit) -> None:
    """ONNX Runtime's attention of several heads of queries for each of keys and values."""
    query, key = node.integer("num_heads"), node.integer("kv_num_heads")
    heads = _Heads(query, key, emit)
    if node.has(1):
        for index, count in ((0, query), (1, key), (2, key)):
            heads.tie_tensor(node, index, count)
    else:
        total = node.sizes_in(0)[2]
        size = total // (query + 2 * key) if total is not None else None
        widths = [count * size if size is not None else None for count in (query, key, key)]
        _tie_packed(heads, node.input(0, 2), [query, key, key], widths)
    for index in (3, 4):
        heads.tie_tensor(node, index, key)
    heads.tie_scores(node, 10)
    if node.has(11):
        heads.tie(node.input(11, 0), query)
    for index, count in ((0, query), (1, key), (2, key)):
        heads.tie_tensor(node, index, count, output=True)
    heads.freeze_others(node)


def packed_attention(node: NodeAxes, emit: Emit) -> None:
    """ONNX Runtime's attention with the weights of queries, keys and values in it."""
    count = node.integer("num_heads")
    heads = _Heads(count, count, emit)
    emit.tie(node.input(0, -1), node.input(1, 0))
    emit.mixes(node.input(0, -1))
    total = node.sizes_in(1)[1]
    widths = list(node.integers("qkv_hidden_sizes") or [total // 3 if total is not None else None] * 3)
    for index, axis in ((1, 1), (2, 0)):
        if node.has(index):
            _tie_packed(heads, node.input(index, axis), [count] * 3, widths)
    if node.has(4):
        emit.freeze_value(node.node.inputs[4], _INSIDE)
        heads.freeze(_INSIDE)
    heads.tie_scores(node, 5)
    heads.tie_tensor(node, 0, count, output=True)
    if node.gives(1):
        emit.freeze_value(node.node.outputs[1], _INSIDE)
        heads.freeze(_INSIDE)
    heads.tied |= {node.input(0, -1), node.input(1, 0)}
    heads.freeze_others(node)


def rotary_embedding(node: NodeAxes, emit: Emit) -> None:
    """Every head is turned by the same angles."""
    cosines = 1 if node.node.domain != _MICROSOFT else 2
    for value in node.node.inputs[1:]:
        emit.freeze_value(value, "it is a table of angles, or a position in it")
    data, result = node.node.inputs[0], node.node.outputs[0]
    if data is None:
        raise LookupError("no input")
    emit.tie_values(data, result)
    sizes = node.sizes_in(0)
    if len(sizes) == 4:
        return emit.freeze(node.input(0, 3), _ROTATED)
    count = node.integer("num_heads")
    width, turned = sizes[2], node.sizes_in(cosines)[-1]
    if not count and width is not None and turned is not None:
        count = width // (2 * turned)
    return _Heads(count, count, emit, _ROTATED).tie(node.input(0, 2), count)


ATTENTION_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        ("", "Attention"): attention,
        ("", "RotaryEmbedding"): rotary_embedding,
        (_MICROSOFT, "RotaryEmbedding"): rotary_embedding,
        (_MICROSOFT, "MultiHeadAttention"): multi_head_attention,
        (_MICROSOFT, "GroupQueryAttention"): group_query_attention,
        (_MICROSOFT, "Attention"): packed_attention,
    }
)
