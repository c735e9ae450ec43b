"""Attention from softmax(q · kᵀ · scale + mask) · v, in the spellings of exporters."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.pattern import Match, Miss, Rule

from . import chains, heads

# What is added to hide a key is below this in every spelling, and no other mask is.
_HIDDEN = -1e4
# Masks up to this many bytes are looked into.
_LARGEST_MASK = 64 << 20


@dataclass(frozen=True)
class Core:
    """softmax(q · kᵀ · scale + mask) · v, found at its last MatMul.

    Attributes:
        q: Queries, [batch, heads, length, size].
        k: Keys, [batch, heads, length, size]; or [batch, length, heads, size] if ``k_swapped``.
        v: Values, [batch, heads, length, size].
        scale: The number scores are multiplied by.
        mask: What is added to the scores, or None.
        nodes: The nodes that compute it.
        k_swapped: Whether ``k`` has the layout before heads and length are exchanged.
    """

    q: ir.Value
    k: ir.Value
    v: ir.Value
    scale: float
    mask: ir.Value | None
    nodes: tuple[ir.Node, ...]
    k_swapped: bool

    @property
    def key_length(self) -> int | ir.SymbolicDim | None:
        """The number of keys, a dimension."""
        return heads.dim(self.k, 1 if self.k_swapped else 2)


def find(root: ir.Node, opset: int) -> Core | None:
    """Recognise attention at the MatMul that applies the probabilities to the values."""
    softmax = chains.made_by(root.inputs[0], "Softmax")
    v = root.inputs[1]
    if softmax is None or v is None or chains.rank_of(v) != 4 or softmax.inputs[0] is None:
        return None
    if softmax.attributes.get_int("axis", -1 if opset >= 13 else 1) not in (-1, 3):
        return None
    add = chains.made_by(softmax.inputs[0], "Add")
    if add is None:
        return _scores(root, softmax, softmax.inputs[0], v, None, ())
    for scores, mask in chains.sides(add):
        found = _scores(root, softmax, scores, v, mask, (add,))
        if found is not None:
            return found
    return None


def _scores(
    root: ir.Node, softmax: ir.Node, scores: ir.Value, v: ir.Value, mask: ir.Value | None, between: tuple[ir.Node, ...]
) -> Core | None:
    scaled = _scaled(scores)
    product = chains.made_by(scaled.values[0], "MatMul")
    if product is None or product.inputs[0] is None or product.inputs[1] is None:
        return None
    left, right = _scaled(product.inputs[0]), _scaled(product.inputs[1])
    turned = _turned(right.values[0])
    if turned is None:
        return None
    inner = _scaled(turned.value)
    q, k = left.values[0], inner.values[0]
    if chains.rank_of(q) != 4 or chains.rank_of(k) != 4:
        return None
    scale = scaled.factor * left.factor * right.factor * inner.factor
    of_keys = (*right.nodes, *turned.nodes, *inner.nodes)
    nodes = (root, softmax, *between, *scaled.nodes, product, *left.nodes, *of_keys)
    return Core(q, k, v, scale, mask, nodes, turned.swapped)


@dataclass(frozen=True)
class _Turned:
    """Keys before their two last axes were exchanged; ``swapped`` if length and heads were, too."""

    value: ir.Value
    swapped: bool
    nodes: tuple[ir.Node, ...]


def _turned(value: ir.Value) -> _Turned | None:
    """Recognise kᵀ: by one Transpose, or by one of rank 3 between two Reshapes."""
    reshape = chains.made_by(value, "Reshape")
    turn = chains.made_by(value if reshape is None else reshape.inputs[0], "Transpose")
    perm = tuple(turn.attributes.get_ints("perm") or ()) if turn is not None else ()
    if turn is None or turn.inputs[0] is None:
        return None
    if reshape is None:
        is_turn = perm in ((0, 1, 3, 2), (0, 2, 3, 1))
        return _Turned(turn.inputs[0], perm == (0, 2, 3, 1), (turn,)) if is_turn else None
    flat = chains.made_by(turn.inputs[0], "Reshape")
    if perm != (0, 2, 1) or flat is None or flat.inputs[0] is None:
        return None
    sizes = shapes.dims_of(flat.inputs[0])
    rows, whole = shapes.contents(flat.inputs[1]), shapes.contents(reshape.inputs[1])
    if sizes is None or len(sizes) != 4 or rows is None or whole is None:
        return None
    fits = tuple(rows.entries) == (-1, *sizes[2:]) and tuple(whole.entries) == (*sizes[:2], sizes[3], sizes[2])
    return _Turned(flat.inputs[0], False, (reshape, turn, flat)) if fits else None


def _scaled(value: ir.Value) -> chains.Product:
    found = chains.product(value)
    return found if len(found.values) == 1 else chains.Product(1.0, (value,), ())


def obstacle(core: Core) -> str | None:
    """Return why attention that was found cannot be one operator, or None."""
    if not all(value.dtype == ir.DataType.FLOAT for value in (core.q, core.k, core.v)):
        return "is not known to be in float32"
    if core.scale <= 0:
        return "its scale is not positive"
    if core.mask is None:
        return None
    if core.mask.dtype != ir.DataType.FLOAT or not heads.broadcasts_to_scores(core.mask, core.q, core.key_length):
        return "its mask is not known to have the shape of its scores"
    return None


class AttentionCore(Rule):
    """Softmax(q · kᵀ · s + mask) · v = Attention(q, k, v, mask, scale = s).

    By definition, from opset 23, for heads of rank 4 in float32; heads of k and v that are repeated for several of q
    (grouped queries) are given once. Kernels differ on empty inputs, and on a row of the mask that hides every key:
    the first are known not to be, and the mask is known.
    """

    name = "attention"
    inner_may_be_read = True

    def pattern(self, op: Any, p: Any, v: Any) -> Any:
        return op.MatMul(p, v)

    def applies(self, m: Match) -> bool:
        core = find(m.root, chains.opset(m)) if chains.opset(m) >= 23 else None
        if core is None:
            return False
        repeats = [few.nodes for few in (heads.unrepeated(core.k), heads.unrepeated(core.v)) if few is not None]
        return m.include((*core.nodes, *(node for nodes in repeats for node in nodes)))

    def check(self, m: Match) -> Miss | None:
        core = find(m.root, chains.opset(m))
        assert core is not None, "applies"
        why = obstacle(core) or in_the_way(core) or _doubt(core)
        return Miss(why, m.root) if why is not None else None

    def rewrite(self, op: Any, m: Match) -> Any:
        core = find(m.root, chains.opset(m))
        assert core is not None, "applies"
        k = op.Transpose(core.k, perm=heads.SWAP) if core.k_swapped else core.k
        v = core.v
        few_k, few_v = heads.unrepeated(core.k), heads.unrepeated(core.v)
        if few_k is not None and few_v is not None and _count_of(few_k) == _count_of(few_v):
            k, v = _with_heads(op, few_k), _with_heads(op, few_v)
        mask = () if core.mask is None else (core.mask,)
        return op.Attention(core.q, k, v, *mask, scale=core.scale)


def _count_of(few: heads.Few) -> object:
    return heads.dim(few.value, 1) if chains.rank_of(few.value) == 4 else 1


def _with_heads(op: Any, few: heads.Few) -> ir.Value:
    """Return heads of rank 4."""
    if chains.rank_of(few.value) == 4:
        return few.value
    value: ir.Value = op.Unsqueeze(few.value, op.const(np.array([1]), "axis_of_heads"))
    dims = list(few.value.shape) if few.value.shape is not None else []
    value.type, value.shape = few.value.type, ir.Shape([dims[0], 1, *dims[1:]])
    return value


def in_the_way(core: Core) -> str | None:
    """Return why attention cannot be taken out of the graph around it, or None."""
    if not _alone(core):
        return "its scores or probabilities feed other nodes"
    return None if _heads_agree(core) else "its batches or heads are not known to be as many"


def _doubt(core: Core) -> str | None:
    """Return why kernels may give something else than the parts do, or None."""
    sizes = (heads.dim(core.q, 0), heads.dim(core.q, 2), core.key_length)
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        return "its batch or a length varies, and may be zero, which kernels refuse"
    if core.mask is None:
        return None
    if not heads.same_dim(heads.dim(core.mask, -2), heads.dim(core.q, 2)):
        return "its mask has not the length of its queries, which kernels demand"
    tensor = walk.constant_tensor(core.mask)
    if tensor is None or tensor.nbytes > _LARGEST_MASK:
        return "its mask varies: where it hides every key, kernels give zeros"
    return None if bool((tensor.numpy().max(axis=-1) > _HIDDEN).all()) else "its mask hides every key of a query"


def _alone(core: Core) -> bool:
    """Return whether nobody else reads what the operator would not give: the scores and probabilities."""
    inside = set(core.nodes)
    computed = [node for node in core.nodes[1:] if node.op_type in ("Softmax", "MatMul")]
    return not any(
        value.is_graph_output() or any(use.node not in inside for use in value.uses())
        for node in computed
        for value in node.outputs
    )


def _heads_agree(core: Core) -> bool:
    """Return whether q, k and v have one batch and number of heads: MatMul broadcasts these, the operator does not."""
    batch_of_k, heads_of_k = heads.dim(core.k, 0), heads.dim(core.k, 2 if core.k_swapped else 1)
    batches = (batch_of_k, heads.dim(core.v, 0))
    if not all(heads.same_dim(heads.dim(core.q, 0), other) for other in batches):
        return False
    counts = [_count(core.q), _count(core.v)]
    counts.append(heads_of_k if isinstance(heads_of_k, int) else _count(core.k, swapped=core.k_swapped))
    return None not in counts and len(set(counts)) == 1


def _count(value: ir.Value, *, swapped: bool = False) -> int | None:
    """Return how many heads a value has: its dimension, or what splitting makes of its width."""
    known = heads.dim(value, 2 if swapped else 1)
    if isinstance(known, int):
        return known
    found = heads.split_before(value) if swapped else heads.split(value)
    return found.count if found is not None else None


class HeadsInAttention(Rule):
    """Attention of split heads, joined again = Attention(x, ...) with the number of heads as attributes.

    Given rank 3, the operator itself splits [batch, length, heads · size] and joins what comes out. A Reshape that does
    more than join stays behind it.
    """

    name = "heads-in-attention"
    inner_may_be_read = True

    def pattern(self, op: Any, q: Any, k: Any, v: Any, shape: Any, mask: Any = None) -> Any:
        return op.Reshape(
            op.Transpose(op.Attention(q, k, v, mask, _id="attention"), _id="swap", perm=[0, 2, 1, 3]), shape
        )

    def applies(self, m: Match) -> bool:
        if "q_num_heads" in m.attention.attributes:
            return False
        parts = [found.nodes for found in map(heads.split, (m.q, m.k, m.v)) if found is not None]
        return m.include(node for nodes in parts for node in nodes)

    def check(self, m: Match) -> Miss | None:
        if not heads.is_joined(m.root, m.q) and not heads.is_free(m.root):
            return Miss("is not known to join the heads only", m.root)
        if any(heads.split(value) is None for value in (m.q, m.k, m.v)):
            return Miss("its inputs are not known to be split heads", m.root)
        if any(node.outputs[0].is_graph_output() or len(node.outputs[0].uses()) > 1 for node in (m.attention, m.swap)):
            return Miss("its heads feed other nodes", m.root)
        if any(value.uses() or value.is_graph_output() for value in m.attention.outputs[1:]):
            return Miss("its other outputs are read", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        q, k, v = (heads.split(value) for value in (m.q, m.k, m.v))
        assert q is not None, "checked"
        assert k is not None, "checked"
        assert v is not None, "checked"
        attributes = {**dict(m.attention.attributes), "q_num_heads": q.count, "kv_num_heads": k.count}
        mask = () if m.mask is None else (m.mask,)
        whole = op.Attention(q.whole, k.whole, v.whole, *mask, _name=m.attention.name, **attributes)
        return whole if heads.is_joined(m.root, m.q) else op.like(m.root, whole, m.shape)
