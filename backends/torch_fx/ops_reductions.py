"""Operators that reduce along axes, or run along one: sums, extremes, norms, running sums."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from .operators import Operator, Table
from .unsigned import in_order, in_wider, ordered

Kernel = Callable[[Tensor, list[int], bool], Tensor]
"""What reduces the elements along some axes, never none, keeping them as axes of size 1 or not."""


def _reduced(kernel: Kernel, x: Tensor, axes: Tensor | None, keepdims: int, noop: int) -> Tensor:
    """Reduce along the axes of an input; without any along all, or along none where that was asked for."""
    return _along(kernel, x, axes.reshape(-1).tolist() if axes is not None else [], keepdims, noop)


def _along(kernel: Kernel, x: Tensor, axes: list[int] | None, keepdims: int, noop: int = 0) -> Tensor:
    every = [] if noop else range(x.ndim)
    chosen = sorted({axis % max(x.ndim, 1) for axis in axes or every})
    if chosen and x.ndim:
        return kernel(x, chosen, bool(keepdims))
    # Along no axis at all each element is reduced by itself, as along one of size 1.
    return kernel(x.unsqueeze(0), [0], False)


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return in_wider(lambda one: torch.sum(one, axes, keepdim=keep, dtype=one.dtype), x)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _sum(x, axes, keep)  # ONNX leaves it open, ONNX Runtime gives 0
    if x.is_floating_point():
        return torch.mean(x, axes, keepdim=keep)
    count = math.prod(x.shape[axis] for axis in axes)
    return in_wider(
        lambda one: torch.div(torch.sum(one, axes, keepdim=keep, dtype=one.dtype), count, rounding_mode="trunc"), x
    )


def _product(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    def multiply(one: Tensor) -> Tensor:
        for axis in reversed(axes):  # torch multiplies along one axis at a time
            one = torch.prod(one, axis, keepdim=keep, dtype=one.dtype)
        return one

    return in_wider(multiply, x)


def _largest(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _of_nothing(x, axes, keep, largest=False)
    return in_order(lambda one: torch.amax(one, axes, keepdim=keep), x)


def _smallest(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.numel() == 0:
        return _of_nothing(x, axes, keep, largest=True)
    return in_order(lambda one: torch.amin(one, axes, keepdim=keep), x)


def _of_nothing(x: Tensor, axes: list[int], keep: bool, *, largest: bool) -> Tensor:
    """Return the extreme of no elements: the other end of what the type holds."""
    shape = torch.sum(x.to(torch.float32), axes, keepdim=keep).shape
    if x.dtype == torch.bool:
        return torch.full(shape, largest, dtype=x.dtype, device=x.device)
    if x.is_floating_point():
        return torch.full(shape, float("inf") if largest else -float("inf"), dtype=x.dtype, device=x.device)
    limits = torch.iinfo(x.dtype)
    return torch.full(shape, limits.max if largest else limits.min, dtype=x.dtype, device=x.device)


def _sum_of_squares(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(in_wider(torch.mul, x, x), axes, keep)


def _sum_of_sizes(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return _sum(torch.abs(x) if x.dtype.is_signed else x, axes, keep)


def _length(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    wide = x if x.is_floating_point() else x.to(torch.float64)
    norm: Tensor = torch.linalg.vector_norm(wide, 2, axes, keepdim=keep)
    return norm.to(x.dtype)


def _log_of_sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.log(_sum(x, axes, keep)).to(x.dtype)


def _log_of_sum_of_powers(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.logsumexp(x if x.is_floating_point() else x.to(torch.float64), axes, keepdim=keep).to(x.dtype)


def reduce_sum(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Sums."""
    return _reduced(_sum, x, axes, keepdims, noop_with_empty_axes)


def reduce_mean(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Means."""
    return _reduced(_mean, x, axes, keepdims, noop_with_empty_axes)


def reduce_prod(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Products."""
    return _reduced(_product, x, axes, keepdims, noop_with_empty_axes)


def reduce_max(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Largest elements; True is more than False."""
    return _reduced(_largest, x, axes, keepdims, noop_with_empty_axes)


def reduce_min(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Smallest elements; False is less than True."""
    return _reduced(_smallest, x, axes, keepdims, noop_with_empty_axes)


def reduce_l1(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Sums of absolute values."""
    return _reduced(_sum_of_sizes, x, axes, keepdims, noop_with_empty_axes)


def reduce_l2(x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0) -> Tensor:
    """Roots of sums of squares."""
    return _reduced(_length, x, axes, keepdims, noop_with_empty_axes)


def reduce_sum_square(
    x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Sums of squares."""
    return _reduced(_sum_of_squares, x, axes, keepdims, noop_with_empty_axes)


def reduce_log_sum(
    x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Logarithms of sums."""
    return _reduced(_log_of_sum, x, axes, keepdims, noop_with_empty_axes)


def reduce_log_sum_exp(
    x: Tensor, axes: Tensor | None = None, *, keepdims: int = 1, noop_with_empty_axes: int = 0
) -> Tensor:
    """Logarithms of sums of powers of e."""
    return _reduced(_log_of_sum_of_powers, x, axes, keepdims, noop_with_empty_axes)


# The same with axes as an attribute: ReduceSum before version 13, the others before 18.


def reduce_sum_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Sums."""
    return _along(_sum, x, axes, keepdims)


def reduce_mean_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Means."""
    return _along(_mean, x, axes, keepdims)


def reduce_prod_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Products."""
    return _along(_product, x, axes, keepdims)


def reduce_max_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Largest elements."""
    return _along(_largest, x, axes, keepdims)


def reduce_min_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Smallest elements."""
    return _along(_smallest, x, axes, keepdims)


def reduce_l1_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Sums of absolute values."""
    return _along(_sum_of_sizes, x, axes, keepdims)


def reduce_l2_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Roots of sums of squares."""
    return _along(_length, x, axes, keepdims)


def reduce_sum_square_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Sums of squares."""
    return _along(_sum_of_squares, x, axes, keepdims)


def reduce_log_sum_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Logarithms of sums."""
    return _along(_log_of_sum, x, axes, keepdims)


def reduce_log_sum_exp_by_attribute(x: Tensor, *, axes: list[int] | None = None, keepdims: int = 1) -> Tensor:
    """Logarithms of sums of powers of e."""
    return _along(_log_of_sum_of_powers, x, axes, keepdims)


def arg_max(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Places of the largest elements along an axis: of equal ones the first, or the last."""
    return _place(torch.argmax, x, axis, keepdims, select_last_index)


def arg_min(x: Tensor, *, axis: int = 0, keepdims: int = 1, select_last_index: int = 0) -> Tensor:
    """Places of the smallest elements along an axis: of equal ones the first, or the last."""
    return _place(torch.argmin, x, axis, keepdims, select_last_index)


def _place(find: Callable[..., Tensor], x: Tensor, axis: int, keepdims: int, last: int) -> Tensor:
    x = ordered(x)
    if x.ndim == 0 or not last:
        return find(x, axis, keepdim=bool(keepdims))
    return x.shape[axis] - 1 - find(torch.flip(x, (axis,)), axis, keepdim=bool(keepdims))


def cum_sum(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Sums of what came so far along an axis, each element itself included or not."""
    return _running(torch.cumsum, 0, x, axis, exclusive, reverse)


def cum_prod(x: Tensor, axis: Tensor, *, exclusive: int = 0, reverse: int = 0) -> Tensor:
    """Products of what came so far along an axis, each element itself included or not."""
    return _running(torch.cumprod, 1, x, axis, exclusive, reverse)


def _running(kernel: Callable[..., Tensor], first: int, x: Tensor, axis: Tensor, exclusive: int, back: int) -> Tensor:
    at = int(axis.item())

    def run(one: Tensor) -> Tensor:
        one = torch.flip(one, (at,)) if back else one
        if exclusive and one.shape[at]:
            start = torch.full_like(one.narrow(at, 0, 1), first)
            one = torch.cat([start, one.narrow(at, 0, one.shape[at] - 1)], at)
        found = kernel(one, at, dtype=one.dtype)
        return torch.flip(found, (at,)) if back else found

    return in_wider(run, x)


def _versions(
    by_attribute: Callable[..., Tensor], by_input: Callable[..., Tensor], turn: int = 18
) -> tuple[Operator, ...]:
    return Operator(by_attribute), Operator(by_input, since=turn, sizes=(1,))


OPERATORS: Table = {
    "ArgMax": Operator(arg_max),
    "ArgMin": Operator(arg_min),
    "CumProd": Operator(cum_prod, since=26, sizes=(1,)),
    "CumSum": Operator(cum_sum, since=11, sizes=(1,)),
    "ReduceL1": _versions(reduce_l1_by_attribute, reduce_l1),
    "ReduceL2": _versions(reduce_l2_by_attribute, reduce_l2),
    "ReduceLogSum": _versions(reduce_log_sum_by_attribute, reduce_log_sum),
    "ReduceLogSumExp": _versions(reduce_log_sum_exp_by_attribute, reduce_log_sum_exp),
    "ReduceMax": _versions(reduce_max_by_attribute, reduce_max),
    "ReduceMean": _versions(reduce_mean_by_attribute, reduce_mean),
    "ReduceMin": _versions(reduce_min_by_attribute, reduce_min),
    "ReduceProd": _versions(reduce_prod_by_attribute, reduce_prod),
    "ReduceSum": _versions(reduce_sum_by_attribute, reduce_sum, turn=13),
    "ReduceSumSquare": _versions(reduce_sum_square_by_attribute, reduce_sum_square),
}
