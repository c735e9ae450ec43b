"""Attention heads: how [batch, length, heads · size] becomes [batch, heads, length, size] and back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from . import chains

SWAP = (0, 2, 1, 3)


@dataclass(frozen=True)
class Heads:
    """A value of [batch, heads, length, size], made from one of [batch, length, heads · size].

    Attributes:
        whole: The value of rank 3.
        count: Number of heads.
        nodes: The Transpose, if there is one, and the Reshape.
    """

    whole: ir.Value
    count: int
    nodes: tuple[ir.Node, ...]


@dataclass(frozen=True)
class Inputs:
    """What attention reads.

    Attributes:
        q: [batch, length, heads · size].
        k: Likewise, or with its heads split; ``v`` too.
        count: Number of heads.
        nodes: What split those that are not.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    count: int
    nodes: tuple[ir.Node, ...]


def same_dim(a: object, b: object) -> bool:
    """Return whether two dimensions are known to be one number, or one symbol."""
    if isinstance(a, int) or isinstance(b, int):
        return isinstance(a, int) and isinstance(b, int) and a == b
    return isinstance(a, ir.SymbolicDim) and isinstance(b, ir.SymbolicDim) and a.value is not None and a == b


def dim(value: ir.Value | None, axis: int) -> int | ir.SymbolicDim | None:
    """Return a dimension of a value, or None."""
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    return value.shape[axis]


def swapped(value: ir.Value | None) -> ir.Node | None:
    """Return the Transpose that exchanges heads and length, if one makes a value."""
    node = chains.made_by(value, "Transpose")
    perm = node.attributes.get_ints("perm") if node is not None else None
    return node if perm is not None and tuple(perm) == SWAP else None


def split(value: ir.Value | None) -> Heads | None:
    """Recognise Transpose(Reshape(x, [batch, length, heads, size])); of one head, a Reshape says the same."""
    node = swapped(value)
    return split_before(node.inputs[0], (node,)) if node is not None else _single(value)


def _single(value: ir.Value | None) -> Heads | None:
    """Recognise Reshape(x, [batch, 1, length, size]), an Unsqueeze included."""
    reshape = chains.made_by(value, "Reshape", "Unsqueeze")
    whole = reshape.inputs[0] if reshape is not None else None
    if reshape is None or whole is None or chains.rank_of(whole) != 3 or chains.rank_of(value) != 4:
        return None
    kept = all(same_dim(dim(whole, a), dim(value, b)) for a, b in ((0, 0), (1, 2), (2, 3)))
    return Heads(whole, 1, (reshape,)) if kept and dim(value, 1) == 1 else None


def split_before(value: ir.Value | None, after: tuple[ir.Node, ...] = ()) -> Heads | None:
    """Recognise Reshape(x, [batch, length, heads, size]), the two first dimensions those of x."""
    reshape = chains.made_by(value, "Reshape")
    whole = reshape.inputs[0] if reshape is not None else None
    if reshape is None or whole is None or chains.rank_of(whole) != 3 or chains.rank_of(value) != 4:
        return None
    width, size = dim(whole, 2), dim(value, 3)
    if not all(same_dim(dim(whole, axis), dim(value, axis)) for axis in (0, 1)):
        return None
    if not isinstance(width, int) or not isinstance(size, int) or size <= 0 or width % size or width <= 0:
        return None
    return Heads(whole, width // size, (*after, reshape))


def is_joined(reshape: ir.Node, q: ir.Value) -> bool:
    """Return whether Reshape(Transpose(y)) joins heads and nothing else: [batch, length, heads · size].

    Args:
        reshape: The Reshape.
        q: A value of the batch and length of y, in heads.
    """
    before, after = reshape.inputs[0], reshape.outputs[0]
    batches, lengths = (dim(before, 0), dim(q, 0)), (dim(before, 1), dim(q, 2))
    kept = (any(same_dim(dim(after, i), one) for one in known) for i, known in enumerate((batches, lengths)))
    return chains.rank_of(after) == 3 and all(kept)


def is_free(reshape: ir.Node) -> bool:
    """Return whether a Reshape gives the same whatever shape its input has: it copies no dimension."""
    if reshape.attributes.get_int("allowzero", 0) == 1:
        return True
    sizes = chains.integers(reshape.inputs[1])
    return sizes is not None and 0 not in sizes


@dataclass(frozen=True)
class Few:
    """Heads before each was repeated for a group of queries.

    Attributes:
        value: [batch, heads, length, size]; of a single head perhaps [batch, length, size].
        nodes: What repeated them.
    """

    value: ir.Value
    nodes: tuple[ir.Node, ...]


def unrepeated(value: ir.Value) -> Few | None:
    """Recognise heads of which each is repeated as often as any other: grouped-query attention."""
    gather = chains.made_by(value, "Gather")
    if gather is not None and gather.inputs[0] is not None:
        return Few(gather.inputs[0], (gather,)) if _repeats(gather) else None
    reshape = chains.made_by(value, "Reshape")
    expand = chains.made_by(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = chains.made_by(expand.inputs[0], "Unsqueeze", "Reshape") if expand is not None else None
    if reshape is None or expand is None or unsqueeze is None or unsqueeze.inputs[0] is None:
        return None
    few, one, many = unsqueeze.inputs[0], unsqueeze.outputs[0], expand.outputs[0]
    ranks = [chains.rank_of(each) for each in (few, one, many, value)]
    if ranks not in ([4, 5, 5, 4], [3, 5, 5, 4]):
        return None
    own = (0, 1, 3, 4) if ranks[0] == 4 else (0, 3, 4)
    kept = [(few, axis, one, place) for axis, place in enumerate(own)]
    kept += [(one, axis, many, axis) for axis in (0, 1, 3, 4)]
    kept += [(many, 0, value, 0), (many, 3, value, 2), (many, 4, value, 3)]
    if dim(one, 2) != 1 or (ranks[0] == 3 and dim(one, 1) != 1):
        return None
    if not all(same_dim(dim(a, i), dim(b, j)) for a, i, b, j in kept) or not _multiplies(many, value):
        return None
    return Few(few, (reshape, expand, unsqueeze))


def _multiplies(many: ir.Value, value: ir.Value) -> bool:
    heads, times, count = dim(many, 1), dim(many, 2), dim(value, 1)
    return isinstance(heads, int) and isinstance(times, int) and isinstance(count, int) and heads * times == count


def _repeats(gather: ir.Node) -> bool:
    """Return whether a Gather takes each head as often as any other, one after the other."""
    indices, count = chains.integers(gather.inputs[1]), dim(gather.inputs[0], 1)
    if indices is None or not isinstance(count, int) or count <= 0 or gather.attributes.get_int("axis", 0) != 1:
        return False
    return chains.rank_of(gather.outputs[0]) == 4 and indices == sorted([*range(count)] * (len(indices) // count))


def broadcasts_to_scores(mask: ir.Value, q: ir.Value, length: int | ir.SymbolicDim | None) -> bool:
    """Return whether a mask adds no axes to scores of [batch, heads, length of q, length], and fills the last."""
    rank = chains.rank_of(mask)
    if rank is None or not 2 <= rank <= 4 or not same_dim(dim(mask, -1), length):
        return False
    wanted = [dim(q, 0), dim(q, 1), dim(q, 2)][4 - rank :]
    return all(dim(mask, axis) == 1 or same_dim(dim(mask, axis), one) for axis, one in enumerate(wanted))


def split_again(op: Any, whole: ir.Value, like: Heads) -> Any:
    """Return the heads of a value split as those of another of the same shape are."""
    *transposes, reshape = like.nodes
    whole.type, whole.shape = like.whole.type, like.whole.shape
    parts = op.like(reshape, whole, *reshape.inputs[1:])
    parts.type, parts.shape = reshape.outputs[0].type, reshape.outputs[0].shape
    return op.Transpose(parts, **dict(transposes[0].attributes)) if transposes else parts
