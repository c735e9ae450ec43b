"""Operators of truth, comparison and bits."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from .moved import moving
from .operators import Operator, Table
from .unsigned import in_wider, narrowed, ordered, widened

_LARGEST = 2**63 - 1  # of int64


def and_(a: Tensor, b: Tensor) -> Tensor:
    """Whether both are true."""
    return torch.logical_and(a, b)


def or_(a: Tensor, b: Tensor) -> Tensor:
    """Whether either is true."""
    return torch.logical_or(a, b)


def xor(a: Tensor, b: Tensor) -> Tensor:
    """Whether one of the two is true."""
    return torch.logical_xor(a, b)


def not_(x: Tensor) -> Tensor:
    """Whether it is false."""
    return torch.logical_not(x)


def equal(a: Any, b: Any) -> Tensor:
    """Whether elements are equal, strings too."""
    if isinstance(a, np.ndarray):
        return torch.as_tensor(np.equal(a, b).astype(bool))
    return torch.eq(widened(a), widened(b))


def less(a: Tensor, b: Tensor) -> Tensor:
    """Whether the first is less."""
    return torch.lt(ordered(a), ordered(b))


def less_or_equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether the first is not more."""
    return torch.le(ordered(a), ordered(b))


def greater(a: Tensor, b: Tensor) -> Tensor:
    """Whether the first is more."""
    return torch.gt(ordered(a), ordered(b))


def greater_or_equal(a: Tensor, b: Tensor) -> Tensor:
    """Whether the first is not less."""
    return torch.ge(ordered(a), ordered(b))


def is_nan(x: Tensor) -> Tensor:
    """Whether it is no number."""
    return torch.isnan(_computable(x))


def is_inf(x: Tensor, *, detect_negative: int = 1, detect_positive: int = 1) -> Tensor:
    """Whether it is infinite, on the side asked for."""
    x = _computable(x)
    low = torch.isneginf(x) if detect_negative else torch.zeros_like(x, dtype=torch.bool)
    return low | torch.isposinf(x) if detect_positive else low


@moving
def _choose(a: Tensor, b: Tensor, condition: Tensor) -> Tensor:
    return torch.where(condition, a, b)


def where(condition: Tensor, a: Any, b: Any) -> Any:
    """Elements of the first where the condition holds, of the second elsewhere."""
    return _choose(a, b, condition)


def bitwise_and(a: Tensor, b: Tensor) -> Tensor:
    """Bits that are set in both."""
    return in_wider(torch.bitwise_and, a, b)


def bitwise_or(a: Tensor, b: Tensor) -> Tensor:
    """Bits that are set in either."""
    return in_wider(torch.bitwise_or, a, b)


def bitwise_xor(a: Tensor, b: Tensor) -> Tensor:
    """Bits that are set in one of the two."""
    return in_wider(torch.bitwise_xor, a, b)


def bitwise_not(x: Tensor) -> Tensor:
    """Bits turned over."""
    return narrowed(torch.bitwise_not(widened(x)), x.dtype)


def bit_shift(x: Tensor, by: Tensor, *, direction: str) -> Tensor:
    """Bits moved to the left, or to the right, where signed numbers keep their sign.

    Moved by more bits than there are, or by less than none, nothing but the sign remains.
    """
    right = direction == "RIGHT"
    none, all_ = (ordered(torch.tensor(number).to(by.dtype)) for number in (0, torch.iinfo(x.dtype).bits))
    fits = (ordered(by) >= none) & (ordered(by) < all_)
    bits = widened(x)
    places = torch.where(fits, widened(by), 0).to(bits.dtype)
    if right and x.dtype == torch.uint64:
        # One place first, without the sign: what is left is no longer negative.
        rest = torch.bitwise_right_shift((bits >> 1) & _LARGEST, (places - 1).clamp(min=0))
        moved = torch.where(places == 0, bits, rest)
    else:
        moved = torch.bitwise_right_shift(bits, places) if right else torch.bitwise_left_shift(bits, places)
    left = -(bits < 0).to(bits.dtype) if right and x.dtype.is_signed else torch.zeros_like(bits)
    return narrowed(torch.where(fits, moved, left), x.dtype)


def _computable(x: Tensor) -> Tensor:
    """Return floats of 8 bits in a type torch has kernels for."""
    return x.to(torch.float32) if x.dtype.itemsize == 1 else x


OPERATORS: Table = {
    "And": Operator(and_, since=7),
    "BitShift": Operator(bit_shift, since=11),
    "BitwiseAnd": Operator(bitwise_and, since=18),
    "BitwiseNot": Operator(bitwise_not, since=18),
    "BitwiseOr": Operator(bitwise_or, since=18),
    "BitwiseXor": Operator(bitwise_xor, since=18),
    "Equal": Operator(equal, since=7),
    "Greater": Operator(greater, since=7),
    "GreaterOrEqual": Operator(greater_or_equal, since=12),
    "IsInf": Operator(is_inf, since=10),
    "IsNaN": Operator(is_nan, since=9),
    "Less": Operator(less, since=7),
    "LessOrEqual": Operator(less_or_equal, since=12),
    "Not": Operator(not_),
    "Or": Operator(or_, since=7),
    "Where": Operator(where, since=9),
    "Xor": Operator(xor, since=7),
}
