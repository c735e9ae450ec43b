"""Weights in integer codes while they train: floats behind the codes, rounded anew in every step."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from graphopt.backend import Array

from ...solvers.grid import FULL_RANGE_BITS, LARGEST_BIAS_CODE, REDUCED_RANGE_BITS
from .scales import rounded

# Of int32, the largest that is a float32.
_LARGEST_INT32 = 2.0**31 - 2.0**7
_BIAS = ir.DataType.INT32
FLOAT_CODES = {
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
}
"""Codes that are floats themselves, and what torch rounds to them by; it has no kernels for those of 4 bits."""


@dataclass(frozen=True)
class CodeGrid:
    """Which codes there are, and how scales are laid out along them.

    Attributes:
        low: The lowest code.
        high: The highest one.
        axis: Axis of the codes along which scales run.
        block: Codes along that axis that share a scale; 0 where each place along it has its own.
        floats: The type of codes that are floats themselves; None for integers.
        layout: The shape of the codes where they meet their scales, which broadcast to it; None where scales lie as
            DequantizeLinear has them.
    """

    low: float
    high: float
    axis: int = 0
    block: int = 0
    floats: torch.dtype | None = None
    layout: tuple[int, ...] | None = None

    def spread(self, per_scale: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Return scales or zero points in a shape that broadcasts to the codes'."""
        if per_scale.numel() == 1:
            return per_scale.reshape(())
        if self.layout is not None:
            return per_scale.broadcast_to(self.layout).reshape(like.shape)
        axis = self.axis % like.dim()
        if self.block:
            return per_scale.repeat_interleave(self.block, dim=axis).narrow(axis, 0, like.shape[axis])
        return per_scale.reshape([-1 if one == axis else 1 for one in range(like.dim())])

    def nearest(self, wide: torch.Tensor) -> torch.Tensor:
        """Return the nearest codes, as floats; the gradient goes straight through where nothing is clipped."""
        clipped = torch.clamp(wide, self.low, self.high)
        if self.floats is None:
            return rounded(clipped)
        return clipped + (clipped.to(self.floats).to(clipped.dtype) - clipped).detach()


def grid_of(codes: Array, dtype: ir.DataType, axis: int, block: int) -> CodeGrid:
    """Return the grid of a constant's codes: no wider than the codes that are there say its kernel takes.

    Codes of 8 bits that all fit into 7 were made for a kernel that takes no more, and symmetric ones without the lowest
    code for one that negates them.

    Args:
        codes: As they are stored.
        dtype: Their ONNX dtype.
        axis: Axis along which scales run.
        block: Codes that share a scale, or 0.
    """
    floats = FLOAT_CODES.get(dtype)
    if floats is not None:
        highest = float(torch.finfo(floats).max)
        return CodeGrid(-highest, highest, axis, block, floats)
    if dtype == _BIAS:
        # Larger ones that are there already are not cut.
        is_within = np.abs(codes.astype(np.float64)).max(initial=0) <= LARGEST_BIAS_CODE
        largest = float(LARGEST_BIAS_CODE) if is_within else _LARGEST_INT32
        return CodeGrid(-largest, largest, axis, block)
    bits, signed = dtype.bitwidth, dtype.is_signed()
    wide = codes.astype(np.int32)
    if not signed:
        return CodeGrid(0.0, float(2**bits - 1), axis, block)
    reduced = 2 ** (REDUCED_RANGE_BITS - 1)
    if bits == FULL_RANGE_BITS and wide.size and -reduced <= wide.min() <= wide.max() < reduced:
        bits = REDUCED_RANGE_BITS
    lowest = -(2 ** (bits - 1))
    is_narrow = not wide.size or int(wide.min()) > lowest
    return CodeGrid(float(lowest + is_narrow), float(2 ** (bits - 1) - 1), axis, block)


class LatentCodes(nn.Module):
    """Gives codes, as floats that hold integers, of a weight that trains in float behind them.

    With DequantizeLinear behind it this is the quantizer of LSQ (Esser et al. 2020, equation 1): what autograd gives
    the weight is 1 where it is not clipped, and the scale, where it learns, code − weight / scale, or the code it is
    clipped at.

    Args:
        start: Codes less their zero points, times scales: float32.
        grid: Which codes there are.
        kept: bool, False where the weight stays zero; or None.
        trains: Whether the weight trains; else it is only rounded anew as its scale changes.
        adapter: What trains in place of the weight, or None.
    """

    kept: torch.Tensor | None

    def __init__(
        self,
        start: torch.Tensor,
        grid: CodeGrid,
        kept: Array | None,
        *,
        trains: bool = True,
        adapter: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.latent = nn.Parameter(start, requires_grad=trains and adapter is None)
        self.grid = grid
        self.adapter = adapter
        mask = None if kept is None else torch.from_numpy(np.ascontiguousarray(kept))
        self.register_buffer("kept", mask, persistent=False)

    def forward(self, scale: torch.Tensor, zero_point: torch.Tensor | None = None) -> torch.Tensor:
        """Return the codes, float32.

        Args:
            scale: As DequantizeLinear reads it.
            zero_point: Likewise, of any dtype; None for 0.
        """
        weight = self.latent if self.adapter is None else self.adapter(self.latent)
        wide = weight / self.grid.spread(scale.to(weight.dtype), weight)
        zero = None if zero_point is None else self.grid.spread(zero_point.to(weight.dtype), weight)
        codes = self.grid.nearest(wide if zero is None else wide + zero)
        if self.kept is None:
            return codes
        return torch.where(self.kept, codes, torch.zeros_like(codes) if zero is None else zero)
