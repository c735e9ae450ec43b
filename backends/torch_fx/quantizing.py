"""Codes of numbers and numbers of codes: the arithmetic that quantized operators share."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import onnx_ir as ir
import torch
from torch import Tensor

from .ops_casts import cast
from .tensors import torch_dtype

_SIGNED = frozenset({ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8, ir.DataType.INT16, ir.DataType.INT32})


class _RoundStraightThrough(torch.autograd.Function):
    """Rounding to even whose gradient is one (Bengio et al. 2013, "Estimating or Propagating Gradients")."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        """Round."""
        return x.round()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """Hand the gradient on."""
        return gradient


class _CastStraightThrough(torch.autograd.Function):
    """The nearest values of a narrow float, as wide ones, with a gradient of one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dtype: int, saturate: int) -> Tensor:
        """Cast there and back."""
        narrow: Tensor = cast(x, to=dtype, saturate=saturate)
        return narrow.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        """Hand the gradient on."""
        return gradient, None, None


def code_limits(dtype: ir.DataType) -> tuple[int, int]:
    """Return the least and the largest code of an integer type."""
    bits = int(dtype.bitwidth)
    return (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if dtype in _SIGNED else (0, 2**bits - 1)


def spread(parameter: Tensor, x: Tensor, axis: int, block_size: int) -> Tensor:
    """Return a scale or zero point in a shape that goes with a tensor: one for all, for each slice, or for each block.

    Source: ONNX, QuantizeLinear.
    """
    if parameter.numel() == 1 and not (block_size and parameter.ndim == x.ndim):
        return parameter.reshape(())
    if block_size:
        return parameter.repeat_interleave(block_size, dim=axis).narrow(axis, 0, x.shape[axis])
    if parameter.ndim != 1:
        return parameter
    shape = [1] * x.ndim
    shape[axis] = parameter.numel()
    return parameter.reshape(shape)


def codes_of(scaled: Tensor, zero_point: Tensor | None, dtype: ir.DataType, saturate: int = 1) -> Tensor:
    """Return the codes of numbers already divided by their scale, as numbers: rounded to even, moved, cut."""
    if dtype.is_floating_point():
        largest = float(ml_dtypes.finfo(dtype.numpy()).max)
        within = scaled.clamp(-largest, largest) if saturate else scaled
        nearest: Tensor = _CastStraightThrough.apply(within, int(dtype), saturate)  # type: ignore[no-untyped-call]
        return nearest
    wide = torch.promote_types(scaled.dtype, torch.float32)  # codes of 16 bits are none of float16's whole numbers
    rounded = _RoundStraightThrough.apply(scaled).to(wide)  # type: ignore[no-untyped-call]
    moved = rounded if zero_point is None else rounded + zero_point.to(wide)
    codes: Tensor = moved.clamp(*code_limits(dtype))
    return codes


def quantized(scaled: Tensor, zero_point: Tensor | None, dtype: ir.DataType, saturate: int = 1) -> Tensor:
    """Return the codes of numbers already divided by their scale, in the type torch holds them in."""
    if dtype.is_floating_point():
        codes: Tensor = cast(scaled, to=int(dtype), saturate=saturate)
        return codes
    return codes_of(scaled, zero_point, dtype).to(torch_dtype(dtype))


def shifted(codes: Tensor, zero_point: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return codes less their zero point, in another type that holds the difference."""
    if zero_point is None:
        return codes.to(dtype)
    if codes.dtype.is_floating_point:
        wide = torch.promote_types(codes.dtype if codes.dtype.itemsize > 1 else dtype, dtype)
        return (codes.to(wide) - zero_point.to(wide)).to(dtype)
    return (codes.to(torch.int32) - zero_point.to(torch.int32)).to(dtype)
