"""Attention of ONNX Runtime's own: Attention, MultiHeadAttention, GroupQueryAttention, QAttention, RotaryEmbedding.

Each function is one operator of the domain com.microsoft: inputs by position, attributes by its names; see
`operators.py`. Caches that are written in place on an accelerator are refused where they say that they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table
from .ops_attention import attend, attend_plainly, hidden, join_heads, rotate, split_heads

# What ONNX Runtime adds to the score of a key that a padding mask hides, unless the model says another number.
_HIDDEN_SCORE = -10000.0
# What MultiHeadAttention gives as its fourth output, in `attend`'s terms, and how many outputs come before it.
_PROBABILITIES, _SCORES_AT = 3, 3


def attention(
    data: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    mask_index: Tensor | None = None,
    past: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    *,
    do_rotary: int = 0,
    mask_filter_value: float | None = None,
    num_heads: int,
    past_present_share_buffer: int = 0,
    qkv_hidden_sizes: Sequence[int] | None = None,
    rotary_embedding_dim: int = 0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Tensor, ...]:
    """Self-attention of the projections of one input by one weight for queries, keys and values."""
    if do_rotary or past_present_share_buffer or past_sequence_length is not None:
        raise NotImplementedError("Attention: rotary positions, and a cache of another length than its content")
    projected = data @ weights if bias is None else data @ weights + bias
    sizes = list(qkv_hidden_sizes) if qkv_hidden_sizes else [projected.shape[-1] // 3] * 3
    q, k, v = (split_heads(one, num_heads) for one in projected.split(sizes, -1))  # type: ignore[no-untyped-call]
    before = 0
    if past is not None:
        before = past.shape[3]
        k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
    added = _added(q, k, before, mask_index, attention_bias, bool(unidirectional), mask_filter_value)
    output, _ = attend(q, k, v, added, _root(q, scale))
    same = k.shape == v.shape
    return join_heads(output), *((torch.stack([k, v]),) if same else ())


def q_attention(
    data: Tensor,
    weight: Tensor,
    bias: Tensor,
    input_scale: Tensor,
    weight_scale: Tensor,
    mask_index: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    weight_zero_point: Tensor | None = None,
    past: Tensor | None = None,
    *,
    do_rotary: int = 0,
    mask_filter_value: float | None = None,
    num_heads: int,
    past_present_share_buffer: int = 0,
    scale: float | None = None,
    unidirectional: int = 0,
) -> tuple[Tensor, ...]:
    """Attention of codes: their product is in integers, all behind it in floats."""
    return attention(
        _decoded(data, input_scale, input_zero_point),
        _decoded(weight, weight_scale, weight_zero_point),
        bias,
        mask_index,
        past,
        do_rotary=do_rotary,
        mask_filter_value=mask_filter_value,
        num_heads=num_heads,
        past_present_share_buffer=past_present_share_buffer,
        scale=scale,
        unidirectional=unidirectional,
    )


def _decoded(codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Tensor:
    shifted = codes.to(scale.dtype)
    return (shifted if zero_point is None else shifted - zero_point.to(scale.dtype)) * scale


def multi_head_attention(
    query: Tensor,
    key: Tensor | None = None,
    value: Tensor | None = None,
    bias: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    attention_bias: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    past_sequence_length: Tensor | None = None,
    cache_indirection: Tensor | None = None,
    *,
    mask_filter_value: float | None = None,
    num_heads: int,
    scale: float | None = None,
    unidirectional: int = 0,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Attention of queries, keys and values that are rows of all heads, packed together, or split into heads."""
    if past_sequence_length is not None or cache_indirection is not None:
        raise NotImplementedError("MultiHeadAttention: a cache of another length than its content")
    q, k, v = _heads(query, key, value, bias, num_heads)
    before = 0
    if past_key is not None and past_value is not None:
        before = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    added = _added(q, k, before, key_padding_mask, attention_bias, bool(unidirectional), mask_filter_value)
    if added is None and outputs <= _SCORES_AT:
        return join_heads(attend_plainly(q, k, v, _root(q, scale))), k, v
    output, probabilities = attend(q, k, v, added, _root(q, scale), mode=_PROBABILITIES)
    return join_heads(output), k, v, probabilities


def _heads(
    query: Tensor, key: Tensor | None, value: Tensor | None, bias: Tensor | None, count: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries, keys and values as batch × head × step × features, their biases added."""
    if query.dim() == 5:  # batch × step × head × all three × features
        rows = [one.flatten(2) for one in query.unbind(3)]
    elif value is None and key is not None:  # batch × step × head × both × features
        rows = [query, *(one.flatten(2) for one in key.unbind(3))]
    else:
        assert key is not None
        assert value is not None
        rows = [query, key, value]
    # What is split already has been through its projection: its part of the bias is not added.
    widths = [one.shape[-1] if one.dim() == 3 else one.shape[1] * one.shape[3] for one in rows]
    if bias is not None:
        parts = bias.split(widths)  # type: ignore[no-untyped-call]
        rows = [one + part if one.dim() == 3 else one for one, part in zip(rows, parts, strict=True)]
    q, k, v = (split_heads(one, count) if one.dim() == 3 else one for one in rows)
    return q, k, v


def _root(q: Tensor, scale: float | None) -> float:
    return math.sqrt(scale or 1 / math.sqrt(q.shape[-1]))


def _added(
    q: Tensor,
    k: Tensor,
    before: int,
    mask: Tensor | None,
    bias: Tensor | None,
    causal: bool,
    filter_value: float | None,
) -> Tensor | None:
    """Return what is added to the scores: a bias, a number where a key is padding, minus infinity for what is ahead."""
    parts = [] if bias is None else [bias]
    if mask is not None:
        padded = ~_unpadded(mask, q, k)
        number = _HIDDEN_SCORE if filter_value is None else filter_value
        parts.append(torch.zeros(padded.shape, dtype=q.dtype, device=q.device).masked_fill(padded, number))
    if causal:
        steps = torch.arange(q.shape[2], device=q.device).unsqueeze(1) + before
        parts.append(hidden(torch.arange(k.shape[2], device=q.device) <= steps, q))
    return sum(parts[1:], parts[0]) if parts else None


def _unpadded(mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
    """Return which keys are no padding, to be broadcast to the scores, of any of the forms a mask has."""
    batch, keys = q.shape[0], torch.arange(k.shape[2], device=q.device)
    if mask.dim() == 1:
        if mask.shape[0] not in (batch, 2 * batch):
            raise NotImplementedError("a padding mask of cumulated lengths")
        ends = mask[:batch].reshape(-1, 1, 1, 1)
        starts = mask[batch:].reshape(-1, 1, 1, 1) if mask.shape[0] == 2 * batch else torch.zeros_like(ends)
        return (keys >= starts) & (keys < ends)
    seen = mask > 0
    if mask.dim() == 2:
        return seen[:, None, None, :]
    if mask.dim() == 3:
        return seen[:, None]
    past = k.shape[2] - q.shape[2]  # of the largest length, as Megatron's
    return seen[:, :, past : k.shape[2], : k.shape[2]]


def group_query_attention(
    query: Tensor,
    key: Tensor | None,
    value: Tensor | None,
    past_key: Tensor | None,
    past_value: Tensor | None,
    seqlens_k: Tensor,
    total_sequence_length: Tensor,
    cos_cache: Tensor | None = None,
    sin_cache: Tensor | None = None,
    position_ids: Tensor | None = None,
    attention_bias: Tensor | None = None,
    head_sink: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    q_norm_weight: Tensor | None = None,
    k_norm_weight: Tensor | None = None,
    query_seqlens: Tensor | None = None,
    *,
    causal: int = 1,
    do_rotary: int = 0,
    k_norm_epsilon: float | None = None,
    k_quant_type: str = "NONE",
    kv_cache_bit_width: int = 0,
    kv_num_heads: int,
    local_window_size: int = -1,
    num_heads: int,
    q_norm_epsilon: float | None = None,
    qk_norm_epsilon: float = 1e-6,
    qk_output: int = 0,
    rotary_interleaved: int = 0,
    scale: float | None = None,
    sliding_window_cache: int = 0,
    smooth_softmax: int = 0,
    softcap: float = 0.0,
    v_quant_type: str = "NONE",
) -> tuple[Tensor, ...]:
    """Attention of groups of queries that share keys and values, with a cache of which each sample fills its part."""
    if sliding_window_cache or k_scale is not None or v_scale is not None or qk_output:
        raise NotImplementedError("GroupQueryAttention: a cache of codes or of a window, or scores as an output")
    q, k, v = _grouped_heads(query, key, value, num_heads, kv_num_heads)
    if q_norm_weight is not None and k_norm_weight is not None:
        q = _normalized(q, q_norm_weight, q_norm_epsilon or qk_norm_epsilon)
        k = _normalized(k, k_norm_weight, k_norm_epsilon or qk_norm_epsilon)
    # For each sample: how many keys there are, how many of them are new, and where these begin.
    totals = seqlens_k.to(q.device, torch.int64).reshape(-1) + 1
    fresh = totals.clamp(max=q.shape[2]) if query_seqlens is None else query_seqlens.to(q.device, torch.int64)
    first = (totals - fresh).reshape(-1, 1, 1, 1)
    places = first + torch.arange(q.shape[2], device=q.device).unsqueeze(1)  # of queries: batch × 1 × step × 1
    if do_rotary:
        assert cos_cache is not None
        assert sin_cache is not None
        at = places[:, 0, :, 0] if position_ids is None else _positions(position_ids, q, past_key is None)
        at = at.clamp(0, cos_cache.shape[0] - 1)
        cos, sin = cos_cache[at].unsqueeze(1), sin_cache[at].unsqueeze(1)
        size = 2 * cos.shape[-1]
        q, k = (rotate(one, cos, sin, bool(rotary_interleaved), size) for one in (q, k))
    length = int(total_sequence_length.item())
    k, v = (_cached(past, new, first, length) for past, new in ((past_key, k), (past_value, v)))
    keys = torch.arange(length, device=q.device)
    seen = keys < totals.reshape(-1, 1, 1, 1)
    if causal:
        seen = seen & (keys <= places)
        if local_window_size >= 0:
            seen = seen & (keys > places - local_window_size)
    added = hidden(seen, q)
    if attention_bias is not None:
        added = added + attention_bias[..., :length]
    sinks = head_sink if head_sink is not None else q.new_zeros(num_heads) if smooth_softmax > 0 else None
    output = _read(q, k[:, :, :length], v[:, :, :length], added, _root(q, scale), softcap, sinks)
    return join_heads(output), k, v


def _grouped_heads(
    query: Tensor, key: Tensor | None, value: Tensor | None, heads: int, groups: int
) -> tuple[Tensor, Tensor, Tensor]:
    if key is None or value is None:  # packed together
        size = query.shape[-1] // (heads + 2 * groups)
        widths = [heads * size, groups * size, groups * size]
        query, key, value = query.split(widths, -1)  # type: ignore[no-untyped-call]
    assert key is not None
    assert value is not None
    return split_heads(query, heads), split_heads(key, groups), split_heads(value, groups)


def _normalized(data: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return F.rms_norm(data, weight.shape, weight, epsilon)


def _positions(position_ids: Tensor, q: Tensor, from_first: bool) -> Tensor:
    """Return positions of queries; of a first prompt ONNX Runtime reads the first one, and counts."""
    given = position_ids.to(q.device, torch.int64)
    return given[:, :1] + torch.arange(q.shape[2], device=q.device) if from_first else given


def _cached(past: Tensor | None, new: Tensor, first: Tensor, length: int) -> Tensor:
    """Return a cache with new rows written from a place of each sample on, long enough for all of them."""
    if past is None:
        return new if new.shape[2] >= length else F.pad(new, (0, 0, 0, length - new.shape[2]))
    whole = F.pad(past, (0, 0, 0, max(0, length - past.shape[2])))
    at = torch.arange(whole.shape[2], device=new.device).reshape(1, 1, -1, 1) - first
    taken = new.gather(2, at.clamp(0, new.shape[2] - 1).expand(whole.shape))
    return torch.where((at >= 0) & (at < new.shape[2]), taken, whole)


def _read(q: Tensor, k: Tensor, v: Tensor, added: Tensor, root: float, softcap: float, sinks: Tensor | None) -> Tensor:
    """Return what queries read; a sink is one more key for each head, whose value is zero."""
    if sinks is None:
        return attend(q, k, v, added, root, softcap)[0]
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    scores = (q * root) @ (k.transpose(-1, -2) * root)
    scores = (softcap * torch.tanh(scores / softcap) if softcap else scores) + added
    column = sinks.to(q.dtype).reshape(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1] @ v


def rotary_embedding(
    data: Tensor,
    position_ids: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    *,
    interleaved: int = 0,
    is_packed_batching: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
    scale: float = 1.0,
) -> Tensor:
    """Pairs of features turned by an angle that grows with the position: one number that counts on, or one each."""
    if is_packed_batching:
        raise NotImplementedError("RotaryEmbedding: samples packed one after the other")
    size = rotary_embedding_dim or 2 * cos_cache.shape[-1]
    packed = data.dim() == 3
    heads = split_heads(data, num_heads or data.shape[-1] // size) if packed else data
    at = position_ids.to(cos_cache.device, torch.int64)
    if at.numel() == 1:
        at = at.reshape(1, 1) + torch.arange(heads.shape[2], device=at.device)
    turned = rotate(heads, cos_cache[at].unsqueeze(1), sin_cache[at].unsqueeze(1), bool(interleaved), size)
    return join_heads(turned) if packed else turned


CONTRIB: Table = {
    "Attention": Operator(attention),
    "GroupQueryAttention": Operator(group_query_attention, sizes=(6,)),
    "MultiHeadAttention": Operator(multi_head_attention),
    "QAttention": Operator(q_attention),
    "RotaryEmbedding": Operator(rotary_embedding),
}
