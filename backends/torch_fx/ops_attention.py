"""Attention and what belongs to it: Attention, RotaryEmbedding, LinearAttention, FlexAttention.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`. Heads are
products and softmaxes as ONNX defines them, written out where scores are masked or read: rows without any key give
zeros.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from .operators import Operator, Table
from .tensors import torch_dtype

# A graph of the model, and what it captures besides its own inputs.
Graph: TypeAlias = tuple[Any, tuple[Any, ...]]
# What the fourth output of Attention holds.
_RAW, _CAPPED, _BIASED, _PROBABILITIES = range(4)
_RAW_AT = 3  # outputs before it
_EINSUM_READ = "bhd,bhdm->bhm"  # a vector for each head, times that head's matrix


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    nonpad_kv_seqlen: Tensor | None = None,
    *,
    is_causal: int = 0,
    kv_num_heads: int | None = None,
    left_window_size: int = -1,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: int = 0,
    right_window_size: int = -1,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Scaled dot-product attention, of 4-D heads or of 3-D rows that are split into heads; keys and values cached."""
    packed = q.dim() == 3
    if packed:
        assert q_num_heads is not None
        assert kv_num_heads is not None
        q, k, v = split_heads(q, q_num_heads), split_heads(k, kv_num_heads), split_heads(v, kv_num_heads)
    offset: Tensor | int = 0
    if past_key is not None and past_value is not None:
        offset = past_key.shape[2]
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    elif nonpad_kv_seqlen is not None:
        offset = nonpad_kv_seqlen.to(q.device).reshape(-1, 1, 1, 1) - q.shape[2]
    root = math.sqrt(1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    square = not is_causal or (k.shape[2] == q.shape[2] and nonpad_kv_seqlen is None)
    masked = attn_mask is not None or nonpad_kv_seqlen is not None or left_window_size >= 0 or right_window_size >= 0
    if outputs <= _RAW_AT and square and not masked and not softcap and softmax_precision is None:
        read = attend_plainly(q, k, v, root, causal=bool(is_causal))
        return (join_heads(read) if packed else read), k, v
    bias = _seen(q, k, offset, bool(is_causal), left_window_size, right_window_size, nonpad_kv_seqlen)
    bias = _with_mask(bias, attn_mask, q, k)
    output, scores = attend(q, k, v, bias, root, softcap, softmax_precision, qk_matmul_output_mode)
    return (join_heads(output) if packed else output), k, v, scores


def split_heads(data: Tensor, heads: int) -> Tensor:
    """Return batch × step × features as batch × head × step × features of the head."""
    return data.reshape(*data.shape[:-1], heads, data.shape[-1] // heads).transpose(1, 2)


def join_heads(data: Tensor) -> Tensor:
    """Return batch × head × step × features as batch × step × features."""
    return data.transpose(1, 2).flatten(2)


def _seen(
    q: Tensor, k: Tensor, offset: Tensor | int, causal: bool, left: int, right: int, lengths: Tensor | None
) -> Tensor | None:
    """Return which keys a query may see by their places alone, or None where it may see all."""
    keys = torch.arange(k.shape[2], device=q.device)
    ahead = keys - (torch.arange(q.shape[2], device=q.device).unsqueeze(1) + offset)
    rules = []
    if causal:
        rules.append(ahead <= 0)
    if left >= 0:
        rules.append(ahead >= -left)
    if right >= 0:
        rules.append(ahead <= right)
    if lengths is not None:
        rules.append(keys < lengths.to(q.device).reshape(-1, 1, 1, 1))
    if not rules:
        return None
    seen = rules[0]
    for rule in rules[1:]:
        seen = seen & rule
    return seen


def _with_mask(seen: Tensor | None, mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Return what is added to the scores: minus infinity where a key may not be seen, and a mask of numbers."""
    if mask is None:
        return None if seen is None else hidden(seen, q)
    missing = k.shape[2] - mask.shape[-1]
    if mask.dtype is torch.bool:
        mask = functional.pad(mask, (0, missing), value=False) if missing > 0 else mask
        return hidden(mask if seen is None else seen & mask, q)
    mask = functional.pad(mask, (0, missing), value=-math.inf) if missing > 0 else mask
    return mask if seen is None else mask + hidden(seen, q)


def hidden(seen: Tensor, like: Tensor) -> Tensor:
    """Return 0 where keys are seen and minus infinity elsewhere."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill(~seen, -math.inf)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    root: float,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    mode: int = _RAW,
) -> tuple[Tensor, Tensor]:
    """Return what the queries read, and the scores in the form that `mode` says.

    Args:
        q: Queries, batch × head × step × features.
        k: Keys; of fewer heads than the queries where several of these share one.
        v: Values, of the keys' heads.
        bias: What is added to the scores; a row of minus infinity reads zeros.
        root: The root of the scale: queries and keys are both multiplied by it, which keeps 16-bit floats in range.
        softcap: The limit of scores, or 0.
        softmax_precision: ONNX's code of the element type of the softmax; None for that of the queries.
        mode: Scores as they are, capped, with the bias, or as probabilities.
    """
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    raw = (q * root) @ (k.transpose(-1, -2) * root)
    capped = softcap * torch.tanh(raw / softcap) if softcap else raw
    biased = capped if bias is None else capped + bias
    wide = biased if softmax_precision is None else biased.to(torch_dtype(softmax_precision))
    if bias is None:
        probabilities = torch.softmax(wide, -1)
    else:
        # Rows without a key: zeros in front of the softmax, and behind it, so that no gradient is NaN.
        empty = bias.amax(-1, keepdim=True) == -math.inf
        probabilities = torch.softmax(wide.masked_fill(empty, 0), -1).masked_fill(empty, 0)
    probabilities = probabilities.to(q.dtype)
    shown = {_RAW: raw, _CAPPED: capped, _BIASED: biased, _PROBABILITIES: probabilities}[mode]
    return probabilities @ v, shown.to(q.dtype)


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, root: float, *, causal: bool = False) -> Tensor:
    """Return what queries read where nobody asks for scores, in kernels that keep none where they are as exact.

    Causal is from the first key on. In float16 these kernels round elsewhere than ONNX says, but for autocast's.
    """
    if q.dtype is torch.float16 and not torch.is_autocast_enabled(q.device.type):
        steps = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        return attend(q, k, v, hidden(steps.tril(), q) if causal else None, root)[0]
    shared = q.shape[1] // k.shape[1]
    if shared > 1:
        k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    return functional.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=root * root)


def rotary_embedding(
    data: Tensor,
    cos_cache: Tensor,
    sin_cache: Tensor,
    position_ids: Tensor | None = None,
    *,
    interleaved: int = 0,
    num_heads: int = 0,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    """Pairs of features turned by an angle that grows with the position."""
    heads = split_heads(data, num_heads) if data.dim() == 3 else data
    if position_ids is not None:
        at = position_ids.to(cos_cache.device, torch.int64)
        cos_cache, sin_cache = cos_cache[at], sin_cache[at]
    turned = rotate(heads, cos_cache.unsqueeze(1), sin_cache.unsqueeze(1), bool(interleaved), rotary_embedding_dim)
    return join_heads(turned) if data.dim() == 3 else turned


def rotate(data: Tensor, cos: Tensor, sin: Tensor, interleaved: bool, size: int) -> Tensor:
    """Return the first features (all where `size` is 0) turned, in pairs of neighbours or of halves."""
    size = size or data.shape[-1]
    turned, rest = data[..., :size], data[..., size:]
    first, second = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * first - sin * second, sin * first + cos * second
    parts = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    return torch.cat([parts, rest], -1) if rest.shape[-1] else parts


def linear_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    past_state: Tensor | None = None,
    decay: Tensor | None = None,
    beta: Tensor | None = None,
    *,
    kv_num_heads: int,
    q_num_heads: int,
    chunk_size: int = 64,
    scale: float = 0.0,
    update_rule: str = "gated_delta",
) -> tuple[Tensor, Tensor]:
    """A matrix for each head, to which each step adds key ⊗ value and from which its query reads; float32 inside."""
    q, k, v = (
        split_heads(one, heads).float()
        for one, heads in ((query, q_num_heads), (key, kv_num_heads), (value, kv_num_heads))
    )
    gates = None if decay is None else split_heads(decay, kv_num_heads).float()
    rates = None if beta is None else split_heads(beta, beta.shape[-1]).float()
    state = q.new_zeros(q.shape[0], kv_num_heads, k.shape[-1], v.shape[-1])
    state = state if past_state is None else past_state.float()
    factor, shared = scale or 1 / math.sqrt(q.shape[-1]), q_num_heads // kv_num_heads
    outputs = []
    for at in range(q.shape[2]):
        added = v[:, :, at]
        if gates is not None:
            state = state * gates[:, :, at].exp().unsqueeze(-1)
        if rates is not None:
            added = rates[:, :, at] * (added - torch.einsum(_EINSUM_READ, k[:, :, at], state))
        state = state + k[:, :, at].unsqueeze(-1) * added.unsqueeze(-2)
        outputs.append(factor * torch.einsum(_EINSUM_READ, q[:, :, at], state.repeat_interleave(shared, 1)))
    output = torch.stack(outputs, 2) if outputs else q.new_zeros(*q.shape[:3], v.shape[-1])
    return join_heads(output).to(query.dtype), state.to(query.dtype if past_state is None else past_state.dtype)


def flex_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    prob_mod: Graph | None = None,
    scale: float | None = None,
    score_mod: Graph | None = None,
    softmax_precision: int | None = None,
) -> Tensor:
    """Attention of heads whose scores and probabilities graphs of the model change."""
    shared = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(shared, 1), v.repeat_interleave(shared, 1)
    usual = torch.float64 if q.dtype is torch.float64 else torch.float32
    wide = usual if softmax_precision is None else torch_dtype(softmax_precision)
    factor = 1 / math.sqrt(q.shape[-1]) if scale is None else scale
    scores = _changed(score_mod, (q.to(wide) @ k.to(wide).transpose(-1, -2)) * factor)
    probabilities = _changed(prob_mod, torch.softmax(scores, -1))
    return (probabilities @ v.to(wide)).to(q.dtype)


def _changed(graph: Graph | None, scores: Tensor) -> Tensor:
    if graph is None:
        return scores
    module, captured = graph
    (found,) = module(scores, *captured)
    return torch.as_tensor(found)


OPERATORS: Table = {
    "Attention": Operator(attention, since=23),
    "LinearAttention": Operator(linear_attention, since=27),
    "RotaryEmbedding": Operator(rotary_embedding, since=23),
}

PREVIEW: Table = {"FlexAttention": Operator(flex_attention)}
"""Operators of ai.onnx.preview."""
