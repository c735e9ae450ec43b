"""Products of matrices, and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table
from .unsigned import in_wider
from .windows import Windows

_CONVOLUTIONS: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.conv1d, 2: F.conv2d, 3: F.conv3d})
_TRANSPOSED: Mapping[int, Callable[..., Tensor]] = MappingProxyType(
    {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}
)


def mat_mul(a: Tensor, b: Tensor) -> Tensor:
    """Products of matrices, as numpy's matmul."""
    return in_wider(partial(_summed, torch.matmul), a, b)


def _summed(compute: Callable[..., Tensor], *factors: Tensor) -> Tensor:
    """Compute sums of products, also of integers where torch has none.

    On GPUs it multiplies no matrices of integers; up to 2⁵³ floats of 64 bits hold the sums.
    """
    dtype = factors[0].dtype
    if dtype.is_floating_point or dtype.is_complex or factors[0].device.type == "cpu":
        return compute(*factors)
    return compute(*(one.to(torch.float64) for one in factors)).to(dtype)


def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: int = 0,
    transB: int = 0,
) -> Tensor:
    """Return alpha A B + beta C, of A and B as they are or transposed."""
    left = a.T if transA else a
    if transB and alpha == 1 and beta == 1 and a.is_floating_point() and (c is None or c.ndim == 1):
        whole = c is None or c.shape[0] == b.shape[0]
        if whole:
            return F.linear(left, b, c)
    product = mat_mul(left, b.T if transB else b)
    product = product if alpha == 1 else (alpha * product).to(product.dtype)
    if c is None:
        return product
    return in_wider(torch.add, product, c if beta == 1 else (beta * c).to(c.dtype))


def einsum(*inputs: Tensor, equation: str) -> Tensor:
    """Sums of products by Einstein's convention."""
    return in_wider(lambda *ones: _summed(partial(torch.einsum, equation), *ones), *inputs)


def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolutions over up to three spatial axes."""
    kernel = weight.shape[2:]
    windows = Windows.of(x.shape[2:], kernel, strides=strides, dilations=dilations, pads=pads, auto_pad=auto_pad)
    convolve = _of_rank(_CONVOLUTIONS, len(kernel), "Conv")
    # Torch puts as much on either side, and never less than nothing.
    inside = windows.even and min(windows.before, default=0) >= 0
    padding = windows.before if inside else (0,) * len(kernel)
    given = x if inside else windows.pad(x, 0.0)
    return convolve(given, weight, bias, windows.strides, padding, windows.dilations, group)


def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: str = "NOTSET",
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    output_padding: list[int] | None = None,
    output_shape: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Transposed convolutions over up to three spatial axes."""
    rank = weight.ndim - 2
    steps, gaps = strides or [1] * rank, dilations or [1] * rank
    more = output_padding or [0] * rank
    convolve = _of_rank(_TRANSPOSED, rank, "ConvTranspose")
    full = [
        (size - 1) * step + (taps - 1) * gap + 1
        for size, step, taps, gap in zip(x.shape[2:], steps, weight.shape[2:], gaps, strict=True)
    ]
    before, after = _cut(full, more, x.shape[2:], steps, pads, auto_pad, output_shape)
    if before == after and not any(more) and min(before, default=0) >= 0:
        return convolve(x, weight, bias, steps, before, 0, group, gaps)
    product = convolve(x, weight, None, steps, 0, 0, group, gaps)
    # What is cut off is less than nothing here; what is left over is nothing but bias.
    product = F.pad(product, [-one for pair in zip(reversed(before), reversed(after), strict=True) for one in pair])
    return product if bias is None else product + bias.reshape(-1, *[1] * rank)


def _cut(
    full: list[int],
    more: list[int],
    sizes: torch.Size,
    steps: list[int],
    pads: list[int] | None,
    auto_pad: str,
    output_shape: list[int] | None,
) -> tuple[list[int], list[int]]:
    """Return how much of what all windows cover is cut off before and behind, for each axis."""
    rank = len(full)
    if output_shape is None and auto_pad not in ("SAME_UPPER", "SAME_LOWER"):
        given = pads or [0] * (2 * rank)
        return given[:rank], [cut - extra for cut, extra in zip(given[rank:], more, strict=True)]
    wanted = output_shape[-rank:] if output_shape else [size * step for size, step in zip(sizes, steps, strict=True)]
    total = [max(size + extra - want, 0) for size, extra, want in zip(full, more, wanted, strict=True)]
    half, rest = [one // 2 for one in total], [one - one // 2 for one in total]
    before = half if auto_pad == "SAME_UPPER" else rest
    return before, [size - low - want for size, low, want in zip(full, before, wanted, strict=True)]


def deform_conv(
    x: Tensor,
    weight: Tensor,
    offset: Tensor,
    bias: Tensor | None = None,
    mask: Tensor | None = None,
    *,
    dilations: list[int] | None = None,
    group: int = 1,
    kernel_shape: list[int] | None = None,
    offset_group: int = 1,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Convolutions that look where they are told (Dai et al. 2017; with a mask, Zhu et al. 2019), over two axes."""
    if weight.ndim != 4:
        raise NotImplementedError("DeformConv: of other than two spatial axes")
    windows = Windows.of(x.shape[2:], weight.shape[2:], strides=strides, dilations=dilations, pads=pads)
    batch, channels = x.shape[:2]
    dtype = x.dtype
    # In 16 bits there is no telling places of a large image apart.
    x, offset = (one.to(torch.promote_types(dtype, torch.float32)) for one in (x, offset))
    high, wide = windows.counts
    taps = weight.shape[2] * weight.shape[3]
    shifts = offset.reshape(batch, offset_group, taps, 2, high, wide)
    ys = _places(windows, 0, x).repeat_interleave(weight.shape[3], 0)[None, None, :, :, None]
    xs = _places(windows, 1, x).repeat(weight.shape[2], 1)[None, None, :, None, :]
    sampled = _bilinear(
        x.reshape(batch * offset_group, channels // offset_group, *x.shape[2:]),
        (shifts[:, :, :, 0] + ys).reshape(batch * offset_group, taps * high * wide),
        (shifts[:, :, :, 1] + xs).reshape(batch * offset_group, taps * high * wide),
    ).reshape(batch, offset_group, channels // offset_group, taps, high * wide)
    if mask is not None:
        sampled = sampled * mask.reshape(batch, offset_group, 1, taps, high * wide)
    columns = sampled.to(dtype).reshape(batch, group, channels // group * taps, high * wide)
    kernels = weight.reshape(group, weight.shape[0] // group, -1)
    product = torch.matmul(kernels, columns).reshape(batch, weight.shape[0], high, wide)
    return product if bias is None else product + bias.reshape(-1, 1, 1)


def _places(windows: Windows, axis: int, like: Tensor) -> Tensor:
    """Return where each element of each window lies along an axis: elements, windows."""
    taps = torch.arange(windows.kernel[axis], device=like.device) * windows.dilations[axis]
    starts = torch.arange(windows.counts[axis], device=like.device) * windows.strides[axis] - windows.before[axis]
    return (taps[:, None] + starts[None, :]).to(like.dtype)


def _bilinear(x: Tensor, ys: Tensor, xs: Tensor) -> Tensor:
    """Return the values between the elements, zeros beyond: batch, channels, places."""
    top, left = torch.floor(ys), torch.floor(xs)
    found = torch.zeros(x.shape[0], x.shape[1], ys.shape[1], dtype=x.dtype, device=x.device)
    flat = x.reshape(x.shape[0], x.shape[1], -1)
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        row, column = top + down, left + right
        weight = (1 - torch.abs(ys - row)) * (1 - torch.abs(xs - column))
        inside = (row >= 0) & (row < x.shape[2]) & (column >= 0) & (column < x.shape[3])
        place = torch.where(inside, row * x.shape[3] + column, 0).to(torch.int64)
        values = torch.gather(flat, 2, place[:, None].expand(-1, x.shape[1], -1))
        found = found + values * torch.where(inside, weight, 0)[:, None]
    return found


def causal_conv_with_state(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    past: Tensor | None = None,
    *,
    activation: str = "none",
) -> tuple[Tensor, Tensor]:
    """Convolutions of each channel over what has come so far, and what of it the next step needs."""
    kept = weight.shape[2] - 1
    start = x.new_zeros(x.shape[0], x.shape[1], kept) if past is None else past
    whole = torch.cat([start, x], 2)
    found = F.conv1d(whole, weight, bias, groups=x.shape[1])
    state = whole.narrow(2, whole.shape[2] - kept, kept)
    return (found if activation == "none" else F.silu(found)), state


def _of_rank(kernels: Mapping[int, Callable[..., Tensor]], rank: int, name: str) -> Callable[..., Tensor]:
    if rank not in kernels:
        raise NotImplementedError(f"{name}: over {rank} spatial axes, torch knows one to three")
    return kernels[rank]


OPERATORS: Table = {
    "CausalConvWithState": Operator(causal_conv_with_state, since=27),
    "Conv": Operator(conv),
    "ConvTranspose": Operator(conv_transpose),
    "DeformConv": Operator(deform_conv, since=19),
    "Einsum": Operator(einsum, since=12),
    "Gemm": Operator(gemm, since=7),
    "MatMul": Operator(mat_mul),
}
