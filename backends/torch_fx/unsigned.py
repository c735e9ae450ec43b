"""Arithmetic of uint16, uint32 and uint64, which torch stores and hardly computes in.

They are computed in a signed type that holds them; uint64, for which there is none, in the 64 bits of int64, where sums
and products come out the same. What goes by order is asked of the bits with the sign turned over.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import Tensor

# What each is computed in: wide enough for its values, and for the sum of two of them.
_WIDER: Mapping[torch.dtype, torch.dtype] = MappingProxyType(
    {torch.uint16: torch.int32, torch.uint32: torch.int64, torch.uint64: torch.int64}
)
_SIGN = -(2**63)
_LARGEST = 2**63 - 1


def widened(x: Tensor) -> Tensor:
    """Return an unsigned tensor in a signed type, equal modulo 2⁶⁴; any other as it is."""
    if x.dtype == torch.uint64:
        return x.view(torch.int64)
    return x.to(_WIDER[x.dtype]) if x.dtype in _WIDER else x


def narrowed(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return what was computed of `widened` tensors in their own type, wrapped around as C does."""
    if dtype == torch.uint64 and x.dtype == torch.int64:
        return x.view(dtype)
    return x.to(dtype) if dtype in _WIDER else x


def ordered(x: Tensor) -> Tensor:
    """Return a tensor in a type torch compares in, its elements in the order of those of ``x``."""
    return widened(x) ^ _SIGN if x.dtype == torch.uint64 else widened(x)


def unordered(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Take `ordered` back."""
    return narrowed(x ^ _SIGN if dtype == torch.uint64 else x, dtype)


def in_wider(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Compute sums and products of tensors of one type, in a type torch has kernels for."""
    dtype = inputs[0].dtype
    if dtype not in _WIDER:
        return compute(*inputs)
    return narrowed(compute(*map(widened, inputs)), dtype)


def in_order(compute: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """Choose among the elements of tensors of one type by their order, in a type torch has kernels for."""
    dtype = inputs[0].dtype
    if dtype not in _WIDER:
        return compute(*inputs)
    return unordered(compute(*map(ordered, inputs)), dtype)


def quotient(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a // b`` of integers, rounded towards zero; of uint64, given as such, the unsigned one.

    Source of the unsigned one: H. S. Warren, Hacker's Delight (2nd ed., 2012), 9-3.
    """
    if a.dtype != torch.uint64:
        return in_wider(lambda one, other: torch.div(one, other, rounding_mode="trunc"), a, b)
    dividend, divisor = widened(a), widened(b)
    halved = torch.div((dividend >> 1) & _LARGEST, divisor, rounding_mode="trunc") << 1
    rest = dividend - halved * divisor
    halved = halved + ((rest ^ _SIGN) >= (divisor ^ _SIGN)).to(torch.int64)
    large = (ordered(a) >= ordered(b)).to(torch.int64)  # of a divisor of 2⁶³ and more there is one or none
    return torch.where(divisor < 0, large, halved).view(torch.uint64)


def remainder(a: Tensor, b: Tensor) -> Tensor:
    """Return ``a - a // b * b`` of unsigned integers."""
    if a.dtype == torch.uint64:
        return narrowed(widened(a) - widened(quotient(a, b)) * widened(b), torch.uint64)
    return in_wider(torch.remainder, a, b)
