"""Attention by operators of a runtime's own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.pattern import Match, Miss, Rule

from ..analyses.quantized import is_rescaled_product
from . import attention, chains, heads

_DOMAIN = "com.microsoft"
# What hides a key for good: no score makes up for it.
_HIDDEN = -1e30
# GroupQueryAttention takes heads whose size is a multiple of this.
_SIZE_STEP = 8
# Masks up to this many bytes are looked into.
_LARGEST_MASK = 64 << 20


class MultiHeadAttention(Rule):
    """Joined heads of softmax(q · kᵀ · s + mask) · v = MultiHeadAttention(q, k, v, mask, scale = s) of the runtime.

    By definition: the operator splits the heads of q, k and v, [batch, length, heads · size] each, by itself, and adds
    their biases.
    """

    name = "multi-head-attention"
    inner_may_be_read = True

    def pattern(self, op: Any, p: Any, v: Any, shape: Any) -> Any:
        return op.Reshape(op.Transpose(op.MatMul(p, v, _id="product"), _id="swap", perm=[0, 2, 1, 3]), shape)

    def applies(self, m: Match) -> bool:
        core = attention.find(m.product, chains.opset(m))
        if core is None:
            return False
        inputs = _inputs(core)
        biased = _biased(inputs) if inputs is not None else None
        around = [*(inputs.nodes if inputs is not None else ()), *(biased.nodes if biased is not None else ())]
        return m.include([*core.nodes, *around])

    def check(self, m: Match) -> Miss | None:
        core = attention.find(m.product, chains.opset(m))
        assert core is not None, "applies"
        why = _obstacle(core, m)
        if why is None and _inputs(core) is None:
            why = "its inputs are not known to be split heads"
        if why is None and core.mask is not None and not _can_be_whole(core.mask, chains.opset(m)):
            why = "its mask has too few axes"
        return Miss(why, m.root) if why is not None else None

    def rewrite(self, op: Any, m: Match) -> Any:
        core = attention.find(m.product, chains.opset(m))
        inputs = _inputs(core) if core is not None else None
        assert core is not None, "applies"
        assert inputs is not None, "checked"
        biased = _biased(inputs)
        bias = op.const(biased.content, f"{m.root.name or 'attention'}.bias") if biased is not None else None
        inputs = biased.inputs if biased is not None else inputs
        mask = (None, _whole(op, core.mask, core, inputs.q)) if core.mask is not None else ()
        whole = op.MultiHeadAttention(
            inputs.q, inputs.k, inputs.v, bias, *mask, num_heads=inputs.count, scale=core.scale, _domain=_DOMAIN
        )
        return whole if heads.is_joined(m.root, core.q) else op.like(m.root, whole, m.shape)


class GroupQueryAttention(Rule):
    """Causal attention of queries in groups = GroupQueryAttention(q, k, v) of the runtime.

    By definition, where the mask hides what comes later and nothing else, q, k and v are of one known length, and each
    head of k and v is that of as many heads of q.
    """

    name = "group-query-attention"
    inner_may_be_read = True

    def pattern(self, op: Any, p: Any, v: Any, shape: Any) -> Any:
        return op.Reshape(op.Transpose(op.MatMul(p, v, _id="product"), _id="swap", perm=[0, 2, 1, 3]), shape)

    def applies(self, m: Match) -> bool:
        core = attention.find(m.product, chains.opset(m))
        inputs = _grouped(core) if core is not None else None
        return core is not None and inputs is not None and m.include((*core.nodes, *inputs.nodes))

    def check(self, m: Match) -> Miss | None:
        core = attention.find(m.product, chains.opset(m))
        assert core is not None, "applies"
        why = _obstacle(core, m)
        length = heads.dim(core.q, 2)
        is_known = isinstance(length, int) and length > 0 and isinstance(heads.dim(core.q, 0), int)
        if why is None and not (is_known and heads.same_dim(length, core.key_length)):
            why = "its batch or length varies"
        size = heads.dim(core.q, 3)
        if why is None and (not isinstance(size, int) or size % _SIZE_STEP):
            why = f"the size of its heads is no multiple of {_SIZE_STEP}, which the operator demands"
        if why is None and not _is_causal(core.mask):
            why = "its mask is not known to be causal"
        return Miss(why, m.root) if why is not None else None

    def rewrite(self, op: Any, m: Match) -> Any:
        core = attention.find(m.product, chains.opset(m))
        inputs = _grouped(core) if core is not None else None
        assert core is not None, "applies"
        assert inputs is not None, "applies"
        batch, length, few = heads.dim(core.q, 0), heads.dim(core.q, 2), heads.unrepeated(core.k)
        assert isinstance(batch, int), "checked"
        assert isinstance(length, int), "checked"
        assert few is not None, "applies"
        last = op.const(np.full(batch, length - 1, np.int32), "last_positions")
        total = op.const(np.array(length, np.int32), "total_length")
        attributes = {"num_heads": inputs.count, "kv_num_heads": heads.dim(few.value, 1), "scale": core.scale}
        whole, *_ = op.GroupQueryAttention(
            inputs.q, inputs.k, inputs.v, None, None, last, total, _outputs=3, _domain=_DOMAIN, **attributes
        )
        return whole if heads.is_joined(m.root, core.q) else op.like(m.root, whole, m.shape)


def _grouped(core: attention.Core) -> heads.Inputs | None:
    """Return q, and k and v before their heads were repeated, all of rank 3."""
    q, k, v = heads.split(core.q), heads.unrepeated(core.k), heads.unrepeated(core.v)
    if q is None or k is None or v is None or core.k_swapped:
        return None
    few_k, few_v = heads.split(k.value), heads.split(v.value)
    if few_k is None or few_v is None or few_k.count != few_v.count or q.count % few_k.count:
        return None
    nodes = (*q.nodes, *k.nodes, *v.nodes, *few_k.nodes, *few_v.nodes)
    return heads.Inputs(q.whole, few_k.whole, few_v.whole, q.count, nodes)


def _is_causal(mask: ir.Value | None) -> bool:
    """Return whether a mask is a constant that hides from each query the keys behind it, and no others."""
    tensor = walk.constant_tensor(mask)
    if tensor is None or tensor.nbytes > _LARGEST_MASK:
        return False
    content = tensor.numpy()
    later = np.triu(np.ones(content.shape[-2:], bool), 1)
    return content.shape[-2] == content.shape[-1] and bool(
        np.all(content[..., ~later] == 0) and np.all(content[..., later] <= _HIDDEN)
    )


def _obstacle(core: attention.Core, m: Match) -> str | None:
    """Return why attention cannot be an operator of the runtime, or None."""
    why = attention.obstacle(core) or attention.in_the_way(core)
    if why is None and not heads.is_joined(m.root, core.q) and not heads.is_free(m.root):
        why = "is not known to join the heads only"
    inner = (m.product.outputs[0], m.swap.outputs[0])
    if why is None and any(len(value.uses()) > 1 or value.is_graph_output() for value in inner):
        why = "its heads feed other nodes"
    return why


def _inputs(core: attention.Core) -> heads.Inputs | None:
    """Return q, k and v as the operator takes them: of rank 3, k and v also as heads that are split already."""
    q, v = heads.split(core.q), heads.split(core.v)
    k = heads.split_before(core.k) if core.k_swapped else heads.split(core.k)
    if q is None:
        return None
    if k is not None and v is not None:
        return heads.Inputs(q.whole, k.whole, v.whole, q.count, (*q.nodes, *k.nodes, *v.nodes))
    return None if core.k_swapped else heads.Inputs(q.whole, core.k, core.v, q.count, q.nodes)


@dataclass(frozen=True)
class Biased:
    """What attention reads before biases are added to q, k and v.

    Attributes:
        inputs: q, k and v without them.
        content: The three biases, one after the other.
        nodes: What added them.
    """

    inputs: heads.Inputs
    content: Array
    nodes: tuple[ir.Node, ...]


def _biased(inputs: heads.Inputs) -> Biased | None:
    """Return q, k and v without the biases added to them, where each has one that nothing else needs.

    The bias of a product in integers stays: its kernel adds it as it rescales.
    """
    values, biases, nodes = [], [], []
    for value in (inputs.q, inputs.k, inputs.v):
        add = chains.made_by(value, "Add")
        found = _bias_of(add) if add is not None and chains.rank_of(value) == 3 else None
        if add is None or found is None or len(value.uses()) > 1 or value.is_graph_output():
            return None
        values.append(found[0])
        biases.append(found[1])
        nodes.append(add)
    q, k, v = values
    return Biased(heads.Inputs(q, k, v, inputs.count, inputs.nodes), np.concatenate(biases), tuple(nodes))


def _bias_of(add: ir.Node) -> tuple[ir.Value, Array] | None:
    """Return x and a bias as long as its last axis, where an Add adds these."""
    for x, bias in chains.sides(add):
        tensor = walk.constant_tensor(bias)
        fits = tensor is not None and chains.rank_of(x) == 3 and walk.dims(tensor) == (heads.dim(x, 2),)
        if tensor is not None and fits and not is_rescaled_product(x):
            return x, tensor.numpy()
    return None


def _can_be_whole(mask: ir.Value, opset: int) -> bool:
    # Unsqueeze takes its axes as an input from opset 13.
    return chains.rank_of(mask) == 4 or opset >= 13


def _whole(op: Any, mask: ir.Value, core: attention.Core, q: ir.Value) -> ir.Value:
    """Return a mask of rank 4 and of the length of the queries, which the operator does not broadcast."""
    rank, length = chains.rank_of(mask), heads.dim(core.q, 2)
    assert rank is not None, "checked"
    known, whole = heads.same_dim(heads.dim(mask, -2), length), mask
    if rank < 4:
        whole = op.Unsqueeze(mask, op.const(np.arange(4 - rank), "axes"))
    if known:
        return whole
    if isinstance(length, int):
        return op.Expand(whole, op.const(np.array([1, 1, length, 1]), "mask_shape"))  # type: ignore[no-any-return]
    count = op.Gather(op.Shape(q), op.const(np.array([1]), "length_axis"), axis=0)
    one = op.const(np.array([1]), "one")
    return op.Expand(whole, op.Concat(one, one, count, one, axis=0))  # type: ignore[no-any-return]
