"""Operators of ONNX Runtime's own on weights that are stored as blocks of codes, several to a byte.

Each function is one operator of the domain com.microsoft: inputs by position, attributes by its names; see
`operators.py`. Codes are taken apart at each run: a gradient flows to what they are multiplied with and to their
scales, and there is none of the codes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table

_BYTE = 8
_BNB_BITS = 4
# What bitsandbytes' codes of 4 bits stand for, by ONNX Runtime's number of the type: floats of 1 bit of sign, 2 of
# exponent and 1 of mantissa, and quantiles of a normal distribution (Dettmers et al. 2023, QLoRA, appendix E).
_BNB_TABLES: Mapping[int, tuple[float, ...]] = MappingProxyType(
    {
        0: (
            *(0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25),
            *(-0.0, -5.208333333e-03, -0.66666667, -1.0, -0.33333333, -0.5, -0.16666667, -0.25),
        ),
        1: (
            *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
            *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
            *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
            *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
        ),
    }
)


def mat_mul_n_bits(
    a: Tensor,
    packed: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    g_idx: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    K: int,
    N: int,
    accuracy_level: int = 0,
    bits: int = 4,
    block_size: int,
    weight_prepacked: int = 0,
) -> Tensor:
    """The product with a weight of N rows, in blocks along each row that have a scale and a zero point of their own."""
    if weight_prepacked:
        raise NotImplementedError("MatMulNBits: the weight is packed for one GPU")
    if packed.numel() == 0:  # a projection that is left out
        none = a.new_zeros(*a.shape[:-1], N)
        return none if bias is None else none + bias
    blocks = -(-K // block_size)
    codes = unpacked(packed.reshape(N, -1), bits).reshape(N, blocks, block_size).to(a.dtype)
    zeros = _zeros_of(zero_points, N, blocks, bits, a.device).to(a.dtype)
    if g_idx is None:
        weight = ((codes - zeros) * scales.reshape(N, blocks, 1)).flatten(1)[:, :K]
    else:  # each column says which group it is of
        group = g_idx.long()
        weight = (codes.flatten(1)[:, :K] - zeros.expand(N, blocks, 1)[:, group, 0]) * scales.reshape(N, blocks)[
            :, group
        ]
    return F.linear(a, weight, bias)


def _zeros_of(zero_points: Tensor | None, rows: int, blocks: int, bits: int, device: torch.device) -> Tensor:
    if zero_points is None:
        return torch.full((1, 1, 1), 1 << (bits - 1), device=device)
    if zero_points.dtype is not torch.uint8:
        return zero_points.reshape(rows, blocks, 1)
    return unpacked(zero_points.reshape(rows, -1), bits)[:, :blocks].unsqueeze(-1)


def unpacked(packed: Tensor, bits: int) -> Tensor:
    """Return codes that are packed along the last axis of bytes, the first of each byte in its lowest bits."""
    if bits == _BYTE:
        return packed
    if _BYTE % bits:
        raise NotImplementedError(f"codes of {bits} bits")
    places = torch.arange(0, _BYTE, bits, device=packed.device, dtype=torch.uint8)
    return ((packed.unsqueeze(-1) >> places) & ((1 << bits) - 1)).flatten(-2)


def mat_mul_bnb4(
    a: Tensor,
    packed: Tensor,
    absmax: Tensor,
    *,
    K: int,
    N: int,
    block_size: int,
    quant_type: int,
    training_mode: int = 0,
    transB: int = 1,
) -> Tensor:
    """The product with a weight in one of bitsandbytes' formats, blocks along all of its rows one after another."""
    codes = torch.stack([packed >> _BNB_BITS, packed & ((1 << _BNB_BITS) - 1)], -1).reshape(-1)[: N * K]
    table = torch.tensor(_BNB_TABLES[quant_type], dtype=a.dtype, device=a.device)
    scales = absmax.reshape(-1).to(a.dtype).repeat_interleave(block_size)[: N * K]
    weight = table[codes.long()] * scales
    return a @ (weight.reshape(N, K).t() if transB else weight.reshape(K, N))


def gather_block_quantized(
    data: Tensor,
    indices: Tensor,
    scales: Tensor,
    zero_points: Tensor | None = None,
    *,
    bits: int = 4,
    block_size: int = 128,
    gather_axis: int = 0,
    input_types: Sequence[int] = (),
    quantize_axis: int = 1,
) -> Tensor:
    """Rows of a table of codes, looked up and decoded; an index outside of it gives zeros."""
    gather_axis, quantize_axis = gather_axis % data.dim(), quantize_axis % data.dim()
    packs = data.dtype is torch.uint8 and (not input_types or input_types[0] == int(ir.DataType.UINT8))
    if data.is_floating_point():
        codes = data.to(scales.dtype)
    else:
        codes = (unpacked(data, bits) if packs else data).to(scales.dtype)
        if zero_points is not None:
            zeros = (unpacked(zero_points, bits) if packs else zero_points).to(scales.dtype)
            zeros = zeros.narrow(-1, 0, scales.shape[-1])
        else:
            zeros = torch.full_like(scales, (1 << (bits - 1)) if packs else 0)
        codes = codes - _spread(zeros, codes, quantize_axis, block_size)
    values = codes * _spread(scales, codes, quantize_axis, block_size)
    size = values.shape[gather_axis]
    flat = indices.reshape(-1).to(values.device, torch.int64)
    counted = torch.where(flat < 0, flat + size, flat)
    found = values.index_select(gather_axis, counted.clamp(0, max(0, size - 1)))
    known = ((counted >= 0) & (counted < size)).reshape([-1] + [1] * (values.dim() - 1 - gather_axis))
    found = torch.where(known, found, torch.zeros_like(found))
    return found.reshape(values.shape[:gather_axis] + indices.shape + values.shape[gather_axis + 1 :])


def _spread(scales: Tensor, codes: Tensor, axis: int, block_size: int) -> Tensor:
    """Return scales once for each code along the axis of blocks."""
    size = codes.shape[axis]
    return scales.repeat_interleave(block_size or size, axis).narrow(axis, 0, size)


CONTRIB: Table = {
    "GatherBlockQuantized": Operator(gather_block_quantized),
    "MatMulBnb4": Operator(mat_mul_bnb4),
    "MatMulNBits": Operator(mat_mul_n_bits),
}
