"""Pooling over windows and over whole spatial axes, and the way back of MaxPool."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table
from .windows import Windows

_LARGEST: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d})
_MEANS: Mapping[int, Callable[..., Tensor]] = MappingProxyType({1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d})


def max_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    storage_order: int = 0,
    strides: list[int] | None = None,
    outputs: int = 1,
) -> tuple[Tensor, Tensor | None]:
    """Largest elements of windows, and where they lie in the whole input, counted through its rows or its columns."""
    windows = Windows.of(
        x.shape[2:],
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    if outputs == 1 and _has_kernel(windows, x, _LARGEST):
        pool = _LARGEST[len(kernel_shape)]
        return pool(x, kernel_shape, windows.strides, windows.before, windows.dilations, bool(ceil_mode)), None
    lowest = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    elements = windows.over(x, lowest).flatten(-len(kernel_shape))
    if outputs == 1:
        return torch.amax(elements, -1), None
    values, taps = torch.max(elements, -1)
    return values, _whole_places(windows, x, taps, bool(storage_order))


def _has_kernel(windows: Windows, x: Tensor, kernels: Mapping[int, Callable[..., Tensor]]) -> bool:
    """Tell whether torch has a kernel for these windows: as much before as behind, and at most half of one.

    Where the last windows are cut short, torch's rule for how many there are is ONNX's.
    """
    inside = all(0 <= pad * 2 <= size for pad, size in zip(windows.before, windows.kernel, strict=True))
    return x.is_floating_point() and windows.even and inside and len(windows.kernel) in kernels and x.numel() > 0


def _whole_places(windows: Windows, x: Tensor, taps: Tensor, by_columns: bool) -> Tensor:
    """Return the places in the whole input of the elements chosen of each window."""
    place = torch.zeros_like(taps)
    sizes = list(windows.sizes)
    for axis, size in reversed(list(enumerate(sizes))):
        tap = taps % windows.kernel[axis]
        taps = torch.div(taps, windows.kernel[axis], rounding_mode="trunc")
        starts = torch.arange(windows.counts[axis], device=x.device) * windows.strides[axis] - windows.before[axis]
        starts = starts.reshape(-1, *[1] * (len(sizes) - 1 - axis))
        step = math.prod(sizes[:axis]) if by_columns else math.prod(sizes[axis + 1 :])
        place = place + torch.clamp(starts + tap * windows.dilations[axis], 0, size - 1) * step
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device) * math.prod(sizes)
    return place + planes.reshape(x.shape[0], x.shape[1], *[1] * len(sizes))


def average_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    count_include_pad: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Means of windows; what is put around the input counts as zeros or does not count."""
    windows = Windows.of(
        x.shape[2:],
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    # On CPUs torch has no means over three axes in types of 16 bits.
    held = len(kernel_shape) < 3 or x.dtype.itemsize > 2
    if held and _has_kernel(windows, x, _MEANS) and set(windows.dilations) == {1}:
        pool = _MEANS[len(kernel_shape)]
        return pool(x, kernel_shape, windows.strides, windows.before, bool(ceil_mode), bool(count_include_pad))
    elements = windows.over(x, 0.0)
    axes = windows.axes(elements)
    counted = torch.ones((1, 1, *x.shape[2:]), dtype=x.dtype, device=x.device)
    if count_include_pad:
        counts = torch.sum(windows.over(windows.pad(counted, 1.0), 0.0, padded=True), axes)
    else:
        counts = torch.sum(windows.over(counted, 0.0), axes)
    return torch.sum(elements, axes) / counts


def lp_pool(
    x: Tensor,
    *,
    auto_pad: str = "NOTSET",
    ceil_mode: int = 0,
    dilations: list[int] | None = None,
    kernel_shape: list[int],
    p: int = 2,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """p-norms of windows."""
    windows = Windows.of(
        x.shape[2:],
        kernel_shape,
        strides=strides,
        dilations=dilations,
        pads=pads,
        auto_pad=auto_pad,
        ceil_mode=ceil_mode,
    )
    elements = windows.over(x, 0.0)
    norms: Tensor = torch.linalg.vector_norm(elements, p, windows.axes(elements))
    return norms


def global_average_pool(x: Tensor) -> Tensor:
    """Means over all spatial axes."""
    return torch.mean(x, _spatial(x), keepdim=True) if x.ndim > 2 else x


def global_max_pool(x: Tensor) -> Tensor:
    """Largest elements over all spatial axes."""
    return torch.amax(x, _spatial(x), keepdim=True) if x.ndim > 2 else x


def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    """p-norms over all spatial axes."""
    return torch.linalg.vector_norm(x, p, _spatial(x), keepdim=True) if x.ndim > 2 else torch.abs(x)


def _spatial(x: Tensor) -> list[int]:
    return list(range(2, x.ndim))


def max_unpool(
    x: Tensor,
    places: Tensor,
    output_shape: Tensor | None = None,
    *,
    kernel_shape: list[int],
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Elements put back to where MaxPool took them from, zeros elsewhere.

    Places count through the whole output, of the shape asked for if there is one, so that it undoes MaxPool. So it is
    in ONNX Runtime; in ONNX's own case they count through what the windows cover, and zeros are put behind it.
    """
    rank = len(kernel_shape)
    given = pads or [0] * (2 * rank)
    sizes = [
        (size - 1) * step + taps - before - after
        for size, step, taps, before, after in zip(
            x.shape[2:], strides or [1] * rank, kernel_shape, given[:rank], given[rank:], strict=True
        )
    ]
    shape = [*x.shape[:2], *sizes] if output_shape is None else output_shape.tolist()
    found = torch.zeros(math.prod(shape), dtype=x.dtype, device=x.device)
    return found.scatter(0, places.reshape(-1), x.reshape(-1)).reshape(shape)


OPERATORS: Table = {
    "AveragePool": Operator(average_pool),
    "GlobalAveragePool": Operator(global_average_pool),
    "GlobalLpPool": Operator(global_lp_pool, since=2),
    "GlobalMaxPool": Operator(global_max_pool),
    "LpPool": Operator(lp_pool, since=2),
    "MaxPool": Operator(max_pool),
    "MaxUnpool": Operator(max_unpool, since=9, sizes=(2,)),
}
