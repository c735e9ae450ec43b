"""Numbers of groups, heads and hidden units in attributes, mended for what is cut: one function per operator."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array

from .cuts import mistake
from .shrunk_shapes import Mending

# Rank of a query whose heads lie side by side on its last axis.
_HEADS_TOGETHER = 3
# Where heads lie on an axis of their own: [batch, heads, rows, width], [batch, rows, heads, parts, width].
_AXIS_OF_HEADS: Mapping[int, int] = MappingProxyType({4: 1, 5: 2})

Rule = Callable[[ir.Node, Mending], None]


def mend_attributes(node: ir.Node, mending: Mending) -> None:
    """Mend the numbers of groups, heads and hidden units that a node is told; call it before any constant is cut.

    Raises:
        PassCrash: What is left of them is uneven.
    """
    domain = "" if node.domain in walk.ONNX_DOMAINS else node.domain
    rule = _RULES.get(domain, {}).get(node.op_type)
    if rule is not None:
        rule(node, mending)


def _rows(stays: Array, rows: int, node: ir.Node) -> tuple[Array, int]:
    """Return which rows are left of an axis that is several in one, bool [rows], and how much of each.

    Raises:
        PassCrash: Of one row more is left than of another.
    """
    left = stays.reshape(rows, -1).sum(1)
    lengths = np.unique(left[left > 0])
    if len(lengths) != 1:
        raise mistake(f"of {rows} groups of channels, {', '.join(map(str, left))} are left", node)
    return left > 0, int(lengths[0])


def _convolution(node: ir.Node, mending: Mending) -> None:
    """Count the groups: either some go as they are, or all lose as many channels."""
    groups, cuts = node.attributes.get_int("group", 1), mending.cuts
    if groups == 1:
        return
    source, weight, result = node.inputs[0], node.inputs[1], node.outputs[0]
    transposed = node.op_type == "ConvTranspose"
    inputs, channels = _rows(cuts.stays(source, 1), groups, node)
    outputs, filters = _rows(cuts.stays(result, 1), groups, node)
    in_weight, _ = _rows(cuts.stays(weight, 0), groups, node)
    within = cuts.stays(weight, 1)
    uneven = any(
        not np.array_equal(row, within)
        for row in (cuts.stays(result if transposed else source, 1)).reshape(groups, -1)[inputs]
    )
    if uneven or not (np.array_equal(inputs, outputs) and np.array_equal(inputs, in_weight)):
        raise mistake(f"its weight keeps other channels ({int(within.sum())}) than it reads and gives", node)
    if int(within.sum()) != (filters if transposed else channels):
        raise mistake("its weight keeps another number of channels than a group has", node)
    mending.ctx.rewriter.set_attribute(node, "group", int(inputs.sum()))


def _recurrent(node: ir.Node, mending: Mending) -> None:
    length = mending.cuts.new_length(node.inputs[2], 2)
    if "hidden_size" in node.attributes and length is not None:
        mending.ctx.rewriter.set_attribute(node, "hidden_size", length)


def _group_normalization(node: ir.Node, mending: Mending) -> None:
    groups = node.attributes.get_int("num_groups", 1)
    left, _ = _rows(mending.cuts.stays(node.inputs[0], 1), groups, node)
    mending.ctx.rewriter.set_attribute(node, "num_groups", int(left.sum()))


def _attention(heads: str, heads_of_keys: str | None) -> Rule:
    """Return a rule for attention over query, key and value.

    Each is [batch, sequence, heads · width], or has its heads on an axis of their own: [batch, heads, sequence, width],
    or packed [batch, sequence, heads, parts, width]. A query of three axes without a key is all three, one behind the
    other.

    Args:
        heads: The attribute for the number of heads of the query.
        heads_of_keys: That for key and value, or None where they have as many.
    """

    def rule(node: ir.Node, mending: Mending) -> None:
        rewriter, query = mending.ctx.rewriter, node.inputs[0]
        key = node.inputs[1] if len(node.inputs) > 1 else None
        count = node.attributes.get_int(heads, 0)
        keys = node.attributes.get_int(heads_of_keys, count) if heads_of_keys is not None else count
        if key is None and len(mending.cuts.dims(query) or ()) == _HEADS_TOGETHER:
            stays, rows = mending.cuts.stays(query, 2), count + 2 * keys
            left, width_left = _rows(stays, rows, node)
            _keep_scale(node, len(stays) // rows, width_left, mending)
            after, after_keys = int(left[:count].sum()), int(left[count : count + keys].sum())
        else:
            after, before, width = _heads(query, count, node, mending)
            _keep_scale(node, before, width, mending)
            after_keys = _heads(key, keys, node, mending)[0] if key is not None else after
        # Where the heads have an axis of their own, an attribute need not say how many there are.
        if heads in node.attributes:
            rewriter.set_attribute(node, heads, after)
        if heads_of_keys is not None and heads_of_keys in node.attributes:
            rewriter.set_attribute(node, heads_of_keys, after_keys)

    return rule


def _heads(value: ir.Value | None, count: int, node: ir.Node, mending: Mending) -> tuple[int, int | None, int | None]:
    """Return how many of so many heads of a tensor are left, and how wide one was and is."""
    cuts = mending.cuts
    rank = len(cuts.dims(value) or ())
    if rank == _HEADS_TOGETHER:
        stays = cuts.stays(value, 2)
        left, width = _rows(stays, count, node)
        return int(left.sum()), len(stays) // count, width
    left_of_axis = cuts.new_length(value, _AXIS_OF_HEADS.get(rank, 1))
    return left_of_axis or count, cuts.length(value, rank - 1), cuts.new_length(value, rank - 1)


def _keep_scale(node: ir.Node, before: int | None, after: int | None, mending: Mending) -> None:
    """State the factor of scores, by default 1/√width, where the width of a head changes."""
    if before is not None and before != after and not node.attributes.get_float("scale", 0.0):
        mending.ctx.rewriter.set_attribute(node, "scale", 1.0 / math.sqrt(before))


def _projected_attention(node: ir.Node, mending: Mending) -> None:
    """Mend the contrib Attention, whose weight [inputs, query | key | value] makes its own three."""
    count, rewriter = node.attributes.get_int("num_heads", 0), mending.ctx.rewriter
    if not count:
        return
    stays = mending.cuts.stays(node.inputs[1], 1)
    sizes = node.attributes.get_ints("qkv_hidden_sizes", [len(stays) // 3] * 3)
    parts = np.split(stays, np.cumsum(sizes)[:-1])
    left, width = _rows(parts[0], count, node)
    if any(not np.array_equal(_rows(part, count, node)[0], left) for part in parts):
        raise mistake("query, key and value keep other heads", node)
    _keep_scale(node, sizes[0] // count, width, mending)
    rewriter.set_attribute(node, "num_heads", int(left.sum()))
    after = [int(part.sum()) for part in parts]
    if "qkv_hidden_sizes" in node.attributes or len(set(after)) > 1:
        rewriter.set_attribute(node, "qkv_hidden_sizes", after)


def _rotary(node: ir.Node, mending: Mending) -> None:
    count = node.attributes.get_int("num_heads", 0)
    if count:
        mending.ctx.rewriter.set_attribute(node, "num_heads", _heads(node.inputs[0], count, node, mending)[0])


_STANDARD: Mapping[str, Rule] = {
    "Attention": _attention("q_num_heads", "kv_num_heads"),
    "Conv": _convolution,
    "ConvTranspose": _convolution,
    "GRU": _recurrent,
    "GroupNormalization": _group_normalization,
    "LSTM": _recurrent,
    "RNN": _recurrent,
    "RotaryEmbedding": _rotary,
}
_CONTRIB: Mapping[str, Rule] = {
    "Attention": _projected_attention,
    "FusedConv": _convolution,
    "GroupQueryAttention": _attention("num_heads", "kv_num_heads"),
    "MultiHeadAttention": _attention("num_heads", None),
    "RotaryEmbedding": _rotary,
}
_RULES: Mapping[str, Mapping[str, Rule]] = {"": _STANDARD, "com.microsoft": _CONTRIB}
