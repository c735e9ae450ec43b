"""Steps of integer codes, learned: positive by construction, their gradients scaled as LSQ has it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn


class _Damped(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a number."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, factor: float) -> torch.Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient * ctx.factor, None


class _Rounded(torch.autograd.Function):
    """To the nearest integer, half to even; the gradient goes straight through."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return torch.round(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def rounded(x: torch.Tensor) -> torch.Tensor:
    """Return a tensor rounded to integers, half to even, its gradient straight through (Bengio et al., 2013)."""
    return _Rounded.apply(x)  # type: ignore[no-any-return, no-untyped-call]


def gradient_factor(elements: float, highest: float) -> float:
    """Return what a scale's gradient is multiplied by (Esser et al., Learned Step Size Quantization, 2020, eq. 2.2).

    A scale collects the gradients of all it scales. Divided by √(elements · highest code), its steps are as large for
    its size as those of the weights.

    Args:
        elements: How many numbers share the scale; of an activation, of one sample.
        highest: The highest code.
    """
    return 1.0 / math.sqrt(max(elements, 1.0) * max(highest, 1.0))


class LearnedScale(nn.Module):
    """Gives a scale: what it was to begin with, times the exponential of what is learned.

    The logarithm is what trains (Jain et al., Trained Quantization Thresholds, 2020), so that it stays positive, and a
    learning rate means a share of the scale however small it is.

    Args:
        start: float32, any shape, positive.
        dtype: What the scale is stored in and read as.
        factor: As `gradient_factor` gives it.
    """

    start: torch.Tensor

    def __init__(self, start: torch.Tensor, dtype: torch.dtype, factor: float) -> None:
        super().__init__()
        self.register_buffer("start", start, persistent=False)
        # FSDP takes no parameters without axes.
        self.logarithm = nn.Parameter(torch.zeros_like(start.reshape(-1)))
        self._dtype, self._factor = dtype, factor

    def forward(self) -> torch.Tensor:
        """Return the scale as it is now."""
        moved: torch.Tensor = _Damped.apply(self.logarithm, self._factor)  # type: ignore[no-untyped-call]
        return (self.start * torch.exp(moved).reshape(self.start.shape)).to(self._dtype)


class LearnedZeroPoint(nn.Module):
    """Gives a zero point: an integer as a float, its gradient straight through (LSQ+, Bhalgat et al. 2020).

    Args:
        start: float32, any shape, integers.
        low: The lowest code.
        high: The highest one.
        factor: As `gradient_factor` gives it.
    """

    start: torch.Tensor

    def __init__(self, start: torch.Tensor, low: float, high: float, factor: float) -> None:
        super().__init__()
        self.register_buffer("start", start, persistent=False)
        # In all codes there are, so that a learning rate means a share of them, as it does for scales.
        self.shift = nn.Parameter(torch.zeros_like(start.reshape(-1)))
        self._low, self._high, self._factor = low, high, factor

    def forward(self) -> torch.Tensor:
        """Return the zero point as it is now."""
        moved: torch.Tensor = _Damped.apply(self.shift, self._factor)  # type: ignore[no-untyped-call]
        wide = self.start + moved.reshape(self.start.shape) * (self._high - self._low)
        return rounded(torch.clamp(wide, self._low, self._high))


def product_of_scales(first: torch.Tensor, second: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Return the scale of sums of products, float32: the only one that integer kernels take a bias in."""
    return (first.reshape(-1) * second.reshape(-1)).reshape(shape)
