"""Operators that compute element by element: arithmetic, powers, roundings, trigonometry."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from .operators import Operator, Table
from .unsigned import in_order, in_wider, narrowed, ordered, quotient, remainder, unordered, widened


def add(a: Tensor, b: Tensor) -> Tensor:
    """Sums."""
    return in_wider(torch.add, a, b)


def sub(a: Tensor, b: Tensor) -> Tensor:
    """Differences."""
    return in_wider(torch.sub, a, b)


def mul(a: Tensor, b: Tensor) -> Tensor:
    """Products."""
    return in_wider(torch.mul, a, b)


def div(a: Tensor, b: Tensor) -> Tensor:
    """Quotients; of integers, rounded towards zero."""
    return a / b if a.is_floating_point() or b.is_floating_point() else quotient(a, b)


def mod(a: Tensor, b: Tensor, *, fmod: int = 0) -> Tensor:
    """Remainders, with the sign of the divisor, or with ``fmod`` that of the dividend."""
    if not a.is_floating_point():
        if a.dtype.is_signed:
            return torch.fmod(a, b) if fmod else torch.remainder(a, b)
        return remainder(a, b)
    if fmod:
        return torch.fmod(a, b)
    rest = torch.remainder(a, b)
    return torch.where(rest == 0, torch.copysign(rest, b), rest)


def pow_(x: Tensor, exponent: Tensor) -> Tensor:
    """Powers, in the type of the base."""
    one = exponent.numel() == 1 and exponent.ndim <= x.ndim and exponent.device.type == "cpu"
    if x.is_floating_point() and one and not exponent.requires_grad:
        return torch.pow(x, exponent.item())  # squares and roots have kernels of their own
    if exponent.is_floating_point() and not x.is_floating_point():
        return torch.pow(x.to(torch.float64), exponent.to(torch.float64)).to(x.dtype)
    return torch.pow(x, widened(exponent)).to(x.dtype)


def neg(x: Tensor) -> Tensor:
    """Negatives."""
    return -x


def abs_(x: Tensor) -> Tensor:
    """Absolute values."""
    return torch.abs(x) if x.dtype.is_signed else x


def sign(x: Tensor) -> Tensor:
    """Signs: -1, 0 or 1; of what is no number, itself."""
    if x.is_floating_point():
        return torch.where(torch.isnan(x), x, torch.sign(x))
    if x.dtype.is_signed:
        return torch.sign(x)
    return narrowed((widened(x) != 0).to(widened(x).dtype), x.dtype)


def reciprocal(x: Tensor) -> Tensor:
    """Reciprocals."""
    return torch.reciprocal(x)


def sqrt(x: Tensor) -> Tensor:
    """Square roots."""
    return torch.sqrt(x)


def exp(x: Tensor) -> Tensor:
    """Powers of e."""
    return torch.exp(x)


def log(x: Tensor) -> Tensor:
    """Natural logarithms."""
    return torch.log(x)


def erf(x: Tensor) -> Tensor:
    """The error function."""
    return torch.erf(x)


def floor(x: Tensor) -> Tensor:
    """Next integers below."""
    return torch.floor(x)


def ceil(x: Tensor) -> Tensor:
    """Next integers above."""
    return torch.ceil(x)


def round_(x: Tensor) -> Tensor:
    """Nearest integers, halves to the even one."""
    return torch.round(x)


def sin(x: Tensor) -> Tensor:
    """Sines."""
    return torch.sin(x)


def cos(x: Tensor) -> Tensor:
    """Cosines."""
    return torch.cos(x)


def tan(x: Tensor) -> Tensor:
    """Tangents."""
    return torch.tan(x)


def asin(x: Tensor) -> Tensor:
    """Inverses of sines."""
    return torch.asin(x)


def acos(x: Tensor) -> Tensor:
    """Inverses of cosines."""
    return torch.acos(x)


def atan(x: Tensor) -> Tensor:
    """Inverses of tangents."""
    return torch.atan(x)


def sinh(x: Tensor) -> Tensor:
    """Hyperbolic sines."""
    return torch.sinh(x)


def cosh(x: Tensor) -> Tensor:
    """Hyperbolic cosines."""
    return torch.cosh(x)


def asinh(x: Tensor) -> Tensor:
    """Inverses of hyperbolic sines."""
    return torch.asinh(x)


def acosh(x: Tensor) -> Tensor:
    """Inverses of hyperbolic cosines."""
    return torch.acosh(x)


def atanh(x: Tensor) -> Tensor:
    """Inverses of hyperbolic tangents."""
    return torch.atanh(x)


def sum_(*inputs: Tensor) -> Tensor:
    """Sums of all inputs."""
    return functools.reduce(torch.add, inputs)


def mean(*inputs: Tensor) -> Tensor:
    """Means of all inputs."""
    return functools.reduce(torch.add, inputs) / len(inputs)


def max_(*inputs: Tensor) -> Tensor:
    """Largest elements of all inputs."""
    return functools.reduce(lambda one, other: in_order(torch.maximum, one, other), inputs)


def min_(*inputs: Tensor) -> Tensor:
    """Smallest elements of all inputs."""
    return functools.reduce(lambda one, other: in_order(torch.minimum, one, other), inputs)


def clip(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Elements kept within two bounds, those of their type by default; the upper one holds where they cross."""
    if not x.is_floating_point():
        if low is None and high is None:
            return x
        bounds = [None if bound is None else ordered(bound).reshape(()) for bound in (low, high)]
        return unordered(torch.clamp(ordered(x), bounds[0], bounds[1]), x.dtype)
    limits = torch.finfo(x.dtype)
    if low is None and high is None:
        return torch.clamp(x, limits.min, limits.max)
    least = torch.full((), limits.min, dtype=x.dtype, device=x.device) if low is None else low.reshape(())
    most = torch.full((), limits.max, dtype=x.dtype, device=x.device) if high is None else high.reshape(())
    return torch.clamp(x, least, most)


def clip_by_attributes(x: Tensor, *, min: float | None = None, max: float | None = None) -> Tensor:
    """Elements kept within two bounds, as they were given before version 11."""
    limits = torch.finfo(x.dtype)
    low = limits.min if min is None or min < limits.min else min
    return torch.clamp(x, low, limits.max if max is None or max > limits.max else max)


def det(x: Tensor) -> Tensor:
    """Determinants of square matrices."""
    found: Tensor = torch.linalg.det(x.to(torch.promote_types(x.dtype, torch.float32)))
    return found.to(x.dtype)


OPERATORS: Table = {
    "Abs": Operator(abs_, since=6),
    "Acos": Operator(acos, since=7),
    "Acosh": Operator(acosh, since=9),
    "Add": Operator(add, since=7),
    "Asin": Operator(asin, since=7),
    "Asinh": Operator(asinh, since=9),
    "Atan": Operator(atan, since=7),
    "Atanh": Operator(atanh, since=9),
    "Ceil": Operator(ceil, since=6),
    "Clip": (Operator(clip_by_attributes, since=6), Operator(clip, since=11)),
    "Cos": Operator(cos, since=7),
    "Cosh": Operator(cosh, since=9),
    "Det": Operator(det, since=11),
    "Div": Operator(div, since=7),
    "Erf": Operator(erf, since=9),
    "Exp": Operator(exp, since=6),
    "Floor": Operator(floor, since=6),
    "Log": Operator(log, since=6),
    "Max": Operator(max_, since=6),
    "Mean": Operator(mean, since=6),
    "Min": Operator(min_, since=6),
    "Mod": Operator(mod, since=10),
    "Mul": Operator(mul, since=7),
    "Neg": Operator(neg, since=6),
    "Pow": Operator(pow_, since=7),
    "Reciprocal": Operator(reciprocal, since=6),
    "Round": Operator(round_, since=11),
    "Sign": Operator(sign, since=9),
    "Sin": Operator(sin, since=7),
    "Sinh": Operator(sinh, since=9),
    "Sqrt": Operator(sqrt, since=6),
    "Sub": Operator(sub, since=7),
    "Sum": Operator(sum_, since=6),
    "Tan": Operator(tan, since=7),
}
