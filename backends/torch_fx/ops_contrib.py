"""Operators of ONNX Runtime's own: activations, fused products, normalizations.

Each function is one operator of the domain com.microsoft: inputs by position, attributes by its names; see
`operators.py`. Attention is in `ops_contrib_attention.py`, weights in blocks of codes in `ops_contrib_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table
from .ops_activations import elu, gelu, hard_sigmoid, leaky_relu, softmax
from .ops_indexing import gather_nd
from .ops_layout import trilu
from .ops_normalization import group_normalization, layer_normalization, rms_normalization
from .ops_products import conv, gemm
from .ops_recurrent import lstm

# Activations that are fused behind convolutions, of their parameters in order.
_FUSED: Mapping[str, Callable[..., Tensor]] = MappingProxyType(
    {
        "Clip": lambda x, low, high: x.clamp(low, high),
        "Elu": lambda x, alpha=1.0: elu(x, alpha=alpha),
        "HardSigmoid": lambda x, alpha=0.2, beta=0.5: hard_sigmoid(x, alpha=alpha, beta=beta),
        "HardSwish": lambda x, *_: F.hardswish(x),
        "LeakyRelu": lambda x, alpha=0.01: leaky_relu(x, alpha=alpha),
        "Relu": lambda x: torch.relu(x),
        "Sigmoid": lambda x: torch.sigmoid(x),
        "Softplus": lambda x: F.softplus(x),
        "Softsign": lambda x: F.softsign(x),
        "Tanh": lambda x: torch.tanh(x),
    }
)


def _activated(x: Tensor, name: str | None, parameters: Sequence[float | None] = ()) -> Tensor:
    if not name:
        return x
    if name not in _FUSED:
        raise NotImplementedError(f"a fused activation `{name}` is not known")
    return _FUSED[name](x, *(one for one in parameters if one is not None))


def gelu_1(x: Tensor) -> Tensor:
    """Return x times the normal distribution function of x."""
    return gelu(x)


def bias_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """Gelu of a sum."""
    return gelu(x + bias)


def fast_gelu(x: Tensor, bias: Tensor | None = None) -> Tensor:
    """Gelu by tanh's approximation, of a sum where there is a bias."""
    return gelu(x if bias is None else x + bias, approximate="tanh")


def gemm_fast_gelu(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """FastGelu of a product of matrices."""
    return fast_gelu(x @ weight, bias)


def quick_gelu(x: Tensor, *, alpha: float = 1.702) -> Tensor:
    """Return x sigmoid(alpha x)."""
    return x * torch.sigmoid(alpha * x)


def bias_split_gelu(x: Tensor, bias: Tensor) -> Tensor:
    """The first half of a sum's last axis times Gelu of the second."""
    value, gate = (x + bias).chunk(2, -1)
    return value * gelu(gate)


def bias_add(x: Tensor, bias: Tensor, skip: Tensor) -> Tensor:
    """The sum of all three."""
    return x + bias + skip


def fused_conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    added: Tensor | None = None,
    *,
    activation: str | None = None,
    activation_params: Sequence[float] = (),
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolution, a sum and an activation."""
    found = conv(x, weight, bias, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return _activated(found if added is None else found + added, activation, activation_params)


def fused_gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    activation: str | None = None,
    activation_alpha: float | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Gemm and an activation."""
    found = gemm(a, b, c, alpha=alpha, beta=beta, transA=transA, transB=transB)
    return _activated(found, activation, (activation_alpha, activation_beta, activation_gamma))


def fused_mat_mul(
    a: Tensor,
    b: Tensor,
    *,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """A scaled product of matrices, each with its last two axes swapped, or its batch behind its rows."""
    return alpha * (_turned(a, transA, transBatchA) @ _turned(b, transB, transBatchB))


def _turned(matrix: Tensor, swapped: int, batch_inside: int) -> Tensor:
    if matrix.dim() < 2:
        return matrix
    if batch_inside:  # the batch lies before the columns: rows × batch × columns
        matrix = matrix.movedim(0, -2)
    return matrix.transpose(-1, -2) if swapped else matrix


def fused_mat_mul_activation(
    a: Tensor,
    b: Tensor,
    *,
    activation: str,
    activation_alpha: float | None = None,
    activation_axis: int | None = None,
    activation_beta: float | None = None,
    activation_gamma: float | None = None,
    alpha: float = 1.0,
    transA: int = 0,
    transB: int = 0,
    transBatchA: int = 0,
    transBatchB: int = 0,
) -> Tensor:
    """FusedMatMul and an activation."""
    found = fused_mat_mul(
        a, b, alpha=alpha, transA=transA, transB=transB, transBatchA=transBatchA, transBatchB=transBatchB
    )
    if activation == "Softmax":
        return softmax(found, axis=-1 if activation_axis is None else activation_axis)
    return _activated(found, activation, (activation_alpha, activation_beta, activation_gamma))


def skip_layer_normalization(
    data: Tensor,
    skip: Tensor,
    gamma: Tensor,
    beta: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """LayerNormalization of a sum, which is the fourth output."""
    total = _sum(data, skip, bias)
    found = layer_normalization(total, gamma, beta, epsilon=epsilon, outputs=3 if outputs > 1 else 1)
    return *found, *(total,) * (4 - len(found))


def skip_simplified_layer_normalization(
    data: Tensor,
    skip: Tensor,
    gamma: Tensor,
    bias: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
) -> tuple[Tensor, ...]:
    """RMSNormalization of a sum, which is the fourth output; the second stays empty."""
    total = _sum(data, skip, bias)
    inverse = _inverse_root(total, epsilon)
    return rms_normalization(total, gamma, epsilon=epsilon), torch.zeros_like(inverse), inverse, total


def _sum(data: Tensor, skip: Tensor, bias: Tensor | None) -> Tensor:
    return data + skip if bias is None else data + skip + bias


def _inverse_root(data: Tensor, epsilon: float) -> Tensor:
    return torch.rsqrt(data.float().square().mean(-1, keepdim=True) + epsilon)


def simplified_layer_normalization(
    data: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: int = 1
) -> tuple[Tensor, Tensor]:
    """RMSNormalization, and the reciprocal of the root; ONNX Runtime has it in ONNX's own domain."""
    inverse = torch.rsqrt(data.float().square().mean(list(range(axis % data.dim(), data.dim())), True) + epsilon)
    return rms_normalization(data, scale, axis=axis, epsilon=epsilon, stash_type=stash_type), inverse


def embed_layer_normalization(
    input_ids: Tensor,
    segment_ids: Tensor | None,
    word_embedding: Tensor,
    position_embedding: Tensor,
    segment_embedding: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    *,
    epsilon: float = 1e-12,
    mask_index_type: int | None = None,
) -> tuple[Tensor, ...]:
    """Embeddings of words, positions and segments, summed and normalized; how many words are no padding; the sum."""
    batch, length = input_ids.shape
    places = torch.arange(length, device=input_ids.device).unsqueeze(0) if position_ids is None else position_ids
    total = F.embedding(input_ids.long(), word_embedding) + F.embedding(places.long(), position_embedding)
    if segment_ids is not None and segment_embedding is not None:
        total = total + F.embedding(segment_ids.long(), segment_embedding)
    words = torch.zeros(batch, dtype=torch.int32, device=input_ids.device)
    if mask is not None:
        words = mask.long().cumprod(1).sum(1).int()  # up to the first that is masked
    return layer_normalization(total, gamma, beta, epsilon=epsilon)[0], words, total


def group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    *,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
    groups: int,
) -> Tensor:
    """GroupNormalization, by default of channels that come last, and where `activation` is 1 a Swish behind it."""
    inner = x.movedim(-1, 1) if channels_last else x
    found = group_normalization(inner, gamma.to(x.dtype), beta.to(x.dtype), num_groups=groups, epsilon=epsilon)
    found = F.silu(found) if activation else found
    return found.movedim(1, -1) if channels_last else found


def skip_group_norm(
    x: Tensor,
    gamma: Tensor,
    beta: Tensor,
    skip: Tensor,
    bias: Tensor | None = None,
    *,
    activation: int,
    channels_last: int = 1,
    epsilon: float = 1e-5,
    groups: int,
) -> tuple[Tensor, Tensor]:
    """GroupNorm of a sum, and the sum."""
    if skip.dim() == 2:  # batch × channels
        around = x.dim() - 2
        skip = skip[(slice(None), *(None,) * around)] if channels_last else skip[(..., *(None,) * around)]
    total = _sum(x, skip, bias)
    normal: Tensor = group_norm(
        total, gamma, beta, activation=activation, channels_last=channels_last, epsilon=epsilon, groups=groups
    )
    return normal, total


def dynamic_quantize_lstm(
    data: Tensor,
    w: Tensor,
    r: Tensor,
    b: Tensor | None,
    sequence_lens: Tensor | None,
    initial_h: Tensor | None,
    initial_c: Tensor | None,
    p: Tensor | None,
    w_scale: Tensor,
    w_zero_point: Tensor,
    r_scale: Tensor,
    r_zero_point: Tensor,
    *,
    activation_alpha: Sequence[float] = (),
    activation_beta: Sequence[float] = (),
    activations: Sequence[str] = ("Sigmoid", "Tanh", "Tanh") * 2,
    clip: float | None = None,
    direction: str = "forward",
    hidden_size: int | None = None,
    input_forget: int = 0,
) -> tuple[Tensor, ...]:
    """LSTM with weights of codes; what ONNX Runtime rounds to 8 bits on the way, inputs and states, stays in floats."""
    weights = (_gates(w, w_scale, w_zero_point), _gates(r, r_scale, r_zero_point))
    return lstm(
        *(data, *weights, b, sequence_lens, initial_h, initial_c, p),
        activation_alpha=activation_alpha,
        activation_beta=activation_beta,
        activations=activations,
        clip=clip,
        direction=direction,
        input_forget=input_forget,
    )


def _gates(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """Return weights of gates as LSTM takes them, of codes that lie the other way round."""
    ways = codes.shape[0]
    shifted = codes.to(scale.dtype) - zero_point.reshape(ways, 1, -1).to(scale.dtype)
    return (shifted * scale.reshape(ways, 1, -1)).transpose(1, 2)


def inverse(x: Tensor) -> Tensor:
    """Inverses of matrices."""
    return torch.inverse(x)


def c_dist(a: Tensor, b: Tensor, *, metric: str = "sqeuclidean") -> Tensor:
    """Distances of each row of one matrix from each of another, squared by default."""
    squares = (a.unsqueeze(-2) - b.unsqueeze(-3)).square().sum(-1)
    return squares.sqrt() if metric == "euclidean" else squares


def expand_dims(data: Tensor, axis: Tensor) -> Tensor:
    """An axis of size 1 put in."""
    return data.unsqueeze(int(axis.item()))


OPERATORS: Table = {"SimplifiedLayerNormalization": Operator(simplified_layer_normalization)}
"""What ONNX Runtime has put into ONNX's own domain."""

CONTRIB: Table = {
    "BiasAdd": Operator(bias_add),
    "BiasGelu": Operator(bias_gelu),
    "BiasSplitGelu": Operator(bias_split_gelu),
    "CDist": Operator(c_dist),
    "DynamicQuantizeLSTM": Operator(dynamic_quantize_lstm),
    "EmbedLayerNormalization": Operator(embed_layer_normalization),
    "ExpandDims": Operator(expand_dims, sizes=(1,)),
    "FastGelu": Operator(fast_gelu),
    "FusedConv": Operator(fused_conv),
    "FusedGemm": Operator(fused_gemm),
    "FusedMatMul": Operator(fused_mat_mul),
    "FusedMatMulActivation": Operator(fused_mat_mul_activation),
    "GatherND": Operator(gather_nd),
    "Gelu": Operator(gelu_1),
    "GemmFastGelu": Operator(gemm_fast_gelu),
    "GroupNorm": Operator(group_norm),
    "Inverse": Operator(inverse),
    "LayerNormalization": Operator(layer_normalization),
    "QuickGelu": Operator(quick_gelu),
    "SimplifiedLayerNormalization": Operator(simplified_layer_normalization),
    "SkipGroupNorm": Operator(skip_group_norm),
    "SkipLayerNormalization": Operator(skip_layer_normalization),
    "SkipSimplifiedLayerNormalization": Operator(skip_simplified_layer_normalization),
    "TransposeMatMul": Operator(fused_mat_mul),
    "Trilu": Operator(trilu, sizes=(1,)),
}
