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
        nodes: Transpose and Reshape, in this order.
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
    """Recognise Transpose(Reshape(x, [batch, length, heads, size]))."""
    node = swapped(value)
    return split_before(node.inputs[0], (node,)) if node is not None else None


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


def joined(reshape: ir.Node) -> ir.Node | None:
    """Return the Transpose of Reshape(Transpose(y), [batch, length, heads · size]), the root given, if it is that."""
    transpose = swapped(reshape.inputs[0])
    if transpose is None or chains.rank_of(reshape.outputs[0]) != 3:
        return None
    before, after = reshape.inputs[0], reshape.outputs[0]
    return transpose if all(same_dim(dim(before, axis), dim(after, axis)) for axis in (0, 1)) else None


def unrepeated(value: ir.Value) -> tuple[ir.Value, tuple[ir.Node, ...]]:
    """Return k and the nodes, where a value is each head of k repeated: grouped-query attention; else the value."""
    reshape = chains.made_by(value, "Reshape")
    expand = chains.made_by(reshape.inputs[0], "Expand") if reshape is not None else None
    unsqueeze = chains.made_by(expand.inputs[0], "Unsqueeze", "Reshape") if expand is not None else None
    if reshape is None or expand is None or unsqueeze is None or unsqueeze.inputs[0] is None:
        return value, ()
    few, one, many = unsqueeze.inputs[0], unsqueeze.outputs[0], expand.outputs[0]
    if (chains.rank_of(few), chains.rank_of(one), chains.rank_of(many), chains.rank_of(value)) != (4, 5, 5, 4):
        return value, ()
    kept = [(few, 0, one, 0), (few, 1, one, 1), (few, 2, one, 3), (few, 3, one, 4)]
    kept += [(one, axis, many, axis) for axis in (0, 1, 3, 4)]
    kept += [(many, 0, value, 0), (many, 3, value, 2), (many, 4, value, 3)]
    counts = dim(many, 1), dim(many, 2), dim(value, 1)
    if dim(one, 2) != 1 or not all(same_dim(dim(a, i), dim(b, j)) for a, i, b, j in kept):
        return value, ()
    if not all(isinstance(count, int) for count in counts) or counts[0] * counts[1] != counts[2]:  # type: ignore[operator]
        return value, ()
    return few, (reshape, expand, unsqueeze)


def broadcasts_to_scores(mask: ir.Value, q: ir.Value, length: int | ir.SymbolicDim | None) -> bool:
    """Return whether a mask adds no axes to scores of [batch, heads, length of q, length], and fills the last."""
    rank = chains.rank_of(mask)
    if rank is None or not 2 <= rank <= 4 or not same_dim(dim(mask, -1), length):
        return False
    wanted = [dim(q, 0), dim(q, 1), dim(q, 2)][4 - rank :]
    return all(dim(mask, axis) == 1 or same_dim(dim(mask, axis), one) for axis, one in enumerate(wanted))


def split_again(op: Any, whole: ir.Value, like: Heads) -> Any:
    """Return the heads of a value split as those of another of the same shape are."""
    transpose, reshape = like.nodes
    whole.type, whole.shape = like.whole.type, like.whole.shape
    parts = op.Reshape(whole, reshape.inputs[1], **dict(reshape.attributes))
    parts.type, parts.shape = reshape.outputs[0].type, reshape.outputs[0].shape
    return op.Transpose(parts, **dict(transpose.attributes))
