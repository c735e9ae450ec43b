"""Operators that change element types: Cast, CastLike, BitCast.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`. Element types are
ONNX's codes; `tensors.py` says what torch holds each in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor

from .operators import Operator, Table
from .parameters import TRAINABLE
from .tensors import torch_dtype

# Floats of 8 bits: the largest value, and beyond which value torch's own conversion, which saturates some, differs from
# ONNX's without saturation: half a step above the largest.
_LARGEST: Mapping[ir.DataType, float] = MappingProxyType(
    {
        ir.DataType.FLOAT8E4M3FN: 448.0,
        ir.DataType.FLOAT8E4M3FNUZ: 240.0,
        ir.DataType.FLOAT8E5M2: 57344.0,
        ir.DataType.FLOAT8E5M2FNUZ: 57344.0,
    }
)
_E4M3FN_OVERFLOW = 464.0
# Magnitudes of a float of 4 bits, in the order of their codes.
_FLOAT4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
# A float32 is 1 bit of sign, 8 of exponent and 23 of mantissa; a float8e8m0 is such an exponent.
_MANTISSA_BITS = 23
_EXPONENT_MASK = 0xFF
# Significant digits with which floats are written as text: as few as give the number back, though not less than C's
# own, and at most so many that all can be told apart.
_FEWEST_DIGITS = 6
_DIGITS: Mapping[torch.dtype, int] = MappingProxyType(
    {torch.float64: 17, torch.float32: 9, torch.float16: 5, torch.bfloat16: 4}
)


def cast(data: Any, *, to: int, saturate: int = 1, round_mode: str = "up") -> Any:
    """The same numbers in another element type; floats lose their fractions, those of 8 bits may saturate."""
    return _cast(data, ir.DataType(to), bool(saturate), round_mode)


def cast_like(
    data: Any, like: Any, *, saturate: int = 1, round_mode: str = "up", input_types: Sequence[int] = ()
) -> Any:
    """The same numbers in another tensor's element type."""
    known = ir.DataType(input_types[1]) if len(input_types) > 1 and input_types[1] else _type_of(like)
    # A float is what it is by now: somebody may have put the whole module into another type.
    to = _type_of(like) if known in TRAINABLE else known
    return _cast(data, to, bool(saturate), round_mode)


def _cast(data: Any, to: ir.DataType, saturate: bool, round_mode: str) -> Any:
    if to is ir.DataType.STRING:
        return data if isinstance(data, np.ndarray) else _texts(data)
    target = torch_dtype(to)
    if isinstance(data, np.ndarray):
        data = _numbers(data, target)
    if to.bitwidth < torch.iinfo(torch.int8).bits and to is not ir.DataType.FLOAT4E2M1:
        return _narrow(data, to, target)
    if to is ir.DataType.FLOAT4E2M1:
        return _float4(data)
    if to is ir.DataType.FLOAT8E8M0:
        return _exponent(data, saturate, round_mode)
    if to in _LARGEST:
        return _float8(data, to, target, saturate)
    return data.to(target)


def _type_of(like: Any) -> ir.DataType:
    if isinstance(like, np.ndarray):
        return ir.DataType.STRING
    held = (one for one in ir.DataType if one not in (ir.DataType.UNDEFINED, ir.DataType.STRING))
    return next(one for one in held if one.bitwidth >= torch.iinfo(torch.int8).bits and torch_dtype(one) == like.dtype)


def _narrow(data: Tensor, to: ir.DataType, target: torch.dtype) -> Tensor:
    """Return integers of a few bits, the bits above them dropped as C does."""
    codes = data.to(torch.int64) & ((1 << to.bitwidth) - 1)
    if target.is_signed:
        half = 1 << (to.bitwidth - 1)
        codes = (codes ^ half) - half
    return codes.to(target)


def _float4(data: Tensor) -> Tensor:
    """Return the nearest values of a float of 4 bits, as float32; of two as near, that of the even code."""
    magnitudes = torch.tensor(_FLOAT4, device=data.device)
    middles = (magnitudes[1:] + magnitudes[:-1]) / 2
    wide = data.to(torch.float32)
    below, above = (torch.bucketize(wide.abs(), middles, right=right) for right in (False, True))
    nearest = magnitudes[torch.where(below % 2 == 0, below, above)]
    # There is no NaN among them; ml_dtypes, and so ONNX's reference, makes it a negative zero.
    return torch.where(wide.isnan(), -0.0, torch.copysign(nearest, wide))


def _float8(data: Tensor, to: ir.DataType, target: torch.dtype, saturate: bool) -> Tensor:
    wide = data if data.dtype.is_floating_point and data.dtype.itemsize > 1 else data.to(torch.float32)
    if saturate:
        return wide.clamp(-_LARGEST[to], _LARGEST[to]).to(target)
    if to is ir.DataType.FLOAT8E4M3FN:
        wide = torch.where(wide.abs() > _E4M3FN_OVERFLOW, torch.full_like(wide, torch.nan), wide)
    return wide.to(target)


def _exponent(data: Tensor, saturate: bool, round_mode: str) -> Tensor:
    """Return powers of two: of each number's float32 the exponent alone, moved by what the mantissa rounds to."""
    bits = data.to(torch.float32).view(torch.int32)
    exponents, mantissas = (bits >> _MANTISSA_BITS) & _EXPONENT_MASK, bits & ((1 << _MANTISSA_BITS) - 1)
    half = 1 << (_MANTISSA_BITS - 1)
    if round_mode == "nearest":
        up = (mantissas > half) | ((mantissas == half) & (exponents > 0))
    else:
        up = (mantissas > 0) & (round_mode == "up")
    up = up & (exponents < _EXPONENT_MASK - int(saturate))  # the last code is NaN, which only overflow may reach
    return (exponents + up).to(torch.uint8).view(torch.float8_e8m0fnu)


def _numbers(texts: np.ndarray, target: torch.dtype) -> Tensor:
    read: Callable[[str], Any] = float if target.is_floating_point else int
    wide = torch.float64 if target.is_floating_point else torch.int64
    return torch.tensor([read(text) for text in texts.reshape(-1)], dtype=wide).reshape(texts.shape)


def _texts(data: Tensor) -> np.ndarray:
    """Return numbers as text: integers in full, floats in as many digits as it takes to read them back."""
    found = np.empty(data.numel(), dtype=object)
    found[:] = [_text(number, data.dtype) for number in data.reshape(-1).tolist()]
    return found.reshape(tuple(data.shape))


def _text(number: float, dtype: torch.dtype) -> str:
    if not dtype.is_floating_point:
        return str(int(number))
    if number != number:
        return "NaN"
    if number in (float("inf"), float("-inf")):
        return "INF" if number > 0 else "-INF"
    most = _DIGITS.get(dtype, _DIGITS[torch.float32])
    texts = [f"{number:.{digits}g}" for digits in range(min(_FEWEST_DIGITS, most), most + 1)]
    return next((one for one in texts if torch.tensor(float(one), dtype=dtype).item() == number), texts[-1])


def bit_cast(data: Tensor, *, to: int, input_types: Sequence[int] = ()) -> Tensor:
    """The same bits as another element type of the same width."""
    wanted = ir.DataType(to)
    if wanted.bitwidth >= torch.iinfo(torch.int8).bits:
        return data.view(torch_dtype(to))
    if ir.DataType.FLOAT4E2M1 in (wanted, *input_types):
        raise NotImplementedError("BitCast: floats of 4 bits are held as their values, not as their bits")
    return _narrow(data, wanted, torch_dtype(to))


OPERATORS: Table = {
    "BitCast": Operator(bit_cast, since=26),
    "Cast": Operator(cast, since=6),
    "CastLike": Operator(cast_like, since=15),
}
