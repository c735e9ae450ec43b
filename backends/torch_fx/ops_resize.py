"""Resize and Upsample, in all their modes.

Both resample one axis after the other: each output element is a weighted sum of a few input elements, of which the
weights depend on the axis alone. Coordinates are computed in float32, as ONNX Runtime computes them: of what lies
halfway between two elements, the last bit decides. What torch has a faster kernel for is left to it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table

# How far the filters of the modes reach, in elements.
_LINEAR_REACH, _CUBIC_REACH = 1, 2
# Torch's own kernels of linear interpolation, by the rank of the input.
_LINEAR_KERNELS: Mapping[int, str] = MappingProxyType({3: "linear", 4: "bilinear", 5: "trilinear"})


@dataclass(frozen=True)
class _Sampling:
    """How Resize's attributes have elements found between others."""

    mode: str
    coordinates: str
    nearest: str = "round_prefer_floor"
    cubic: float = -0.75
    antialias: bool = False
    exclude_outside: bool = False
    extrapolation: float = 0.0


@dataclass(frozen=True)
class _Axis:
    """One axis that is resampled: its size before and after, its scale, and the part of it that is looked at."""

    at: int
    size: int
    wanted: int
    scale: float
    start: float = 0.0
    end: float = 1.0

    def positions(self, coordinates: str, device: torch.device) -> Tensor:
        """Return where among the input's elements each of the output's lies."""
        x = torch.arange(self.wanted, dtype=torch.float32, device=device)
        last, wanted_last = self.size - 1, self.wanted - 1
        match coordinates:
            case "half_pixel":
                return (x + 0.5) / self.scale - 0.5
            case "half_pixel_symmetric":
                adjustment = self.wanted / (self.scale * self.size)
                return self.size / 2 * (1 - adjustment) + (x + 0.5) / self.scale - 0.5
            case "pytorch_half_pixel":
                return (x + 0.5) / self.scale - 0.5 if self.wanted > 1 else torch.zeros_like(x)
            case "align_corners":
                return x * last / wanted_last if self.wanted > 1 else torch.zeros_like(x)
            case "asymmetric":
                return x / self.scale
            case "tf_crop_and_resize":
                if self.wanted == 1:
                    return torch.full_like(x, 0.5 * (self.start + self.end) * last)
                return self.start * last + x * (self.end - self.start) * last / wanted_last
            case "tf_half_pixel_for_nn":
                return (x + 0.5) / self.scale
        raise NotImplementedError(f"Resize: coordinates `{coordinates}`")


def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Tensor | None = None,
    sizes: Tensor | None = None,
    *,
    antialias: int = 0,
    axes: list[int] | None = None,
    coordinate_transformation_mode: str = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: int = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: str = "stretch",
    mode: str = "nearest",
    nearest_mode: str = "round_prefer_floor",
) -> Tensor:
    """Resample a tensor to given sizes, or by given scales."""
    along = [axis % x.ndim for axis in axes] if axes else list(range(x.ndim))
    cropped = coordinate_transformation_mode == "tf_crop_and_resize"
    region = roi.tolist() if cropped and roi is not None else [0.0] * len(along) + [1.0] * len(along)
    if sizes is not None and sizes.numel():
        wanted, factors = _sizes(x, along, sizes.tolist(), keep_aspect_ratio_policy)
    else:
        assert scales is not None, "ONNX wants one of the two"
        factors = scales.tolist()
        # The part looked at does not count here, whatever ONNX's text says: nor does it in ONNX Runtime.
        wanted = [_scaled(x.shape[axis], factor) for axis, factor in zip(along, factors, strict=True)]
    sampling = _Sampling(
        mode,
        coordinate_transformation_mode,
        nearest_mode,
        cubic_coeff_a,
        bool(antialias),
        bool(exclude_outside),
        extrapolation_value,
    )
    return _resampled(
        x,
        [
            _Axis(axis, x.shape[axis], count, factor, region[index], region[index + len(along)])
            for index, (axis, count, factor) in enumerate(zip(along, wanted, factors, strict=True))
        ],
        sampling,
    )


def resize_by_scales(x: Tensor, scales: Tensor, *, mode: str = "nearest") -> Tensor:
    """Resample a tensor by scales, as Resize of version 10 and Upsample of version 9 do."""
    return _upsampled(x, scales.tolist(), mode)


def upsample_by_attribute(x: Tensor, *, mode: str = "nearest", scales: list[float]) -> Tensor:
    """Resample a tensor by scales, as Upsample did before version 9."""
    return _upsampled(x, scales, mode)


def _upsampled(x: Tensor, scales: Sequence[float], mode: str) -> Tensor:
    # What is nearest was not said then: ONNX Runtime takes the element below, and above where it samples down.
    for at, scale in enumerate(scales):
        sampling = _Sampling(mode, "asymmetric", nearest="ceil" if scale < 1 else "floor")
        x = _resampled(x, [_Axis(at, x.shape[at], _scaled(x.shape[at], scale), scale)], sampling)
    return x


def _scaled(size: int, scale: float) -> int:
    """Return a size times a scale, rounded down; in float32, in which ten times 0.7 are seven and not a bit less."""
    return math.floor(np.float32(size) * np.float32(scale))


def _sizes(x: Tensor, along: list[int], sizes: list[int], policy: str) -> tuple[list[int], list[float]]:
    """Return the sizes and scales that a policy about the ratio of the sides makes of the sizes asked for."""
    scales = [size / max(x.shape[axis], 1) for axis, size in zip(along, sizes, strict=True)]
    if policy == "stretch":
        return sizes, scales
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [math.floor(scale * x.shape[axis] + 0.5) for axis in along], [scale] * len(along)


def _resampled(x: Tensor, axes: Sequence[_Axis], sampling: _Sampling) -> Tensor:
    cropped = sampling.coordinates == "tf_crop_and_resize"
    changed = [axis for axis in axes if axis.wanted != axis.size or axis.scale != 1 or cropped]
    if not changed:
        return x
    kernel = _kernel(x, changed, sampling)
    if kernel is not None:
        sizes = [next((axis.wanted for axis in changed if axis.at == at), x.shape[at]) for at in range(2, x.ndim)]
        corners = sampling.coordinates == "align_corners" if kernel != "nearest" else None
        return F.interpolate(x, sizes, mode=kernel, align_corners=corners)
    if sampling.mode == "nearest":
        found = functools.reduce(lambda one, axis: _nearest(one, axis, sampling), changed, x)
    else:
        wide = x if x.dtype in (torch.float32, torch.float64) else x.to(torch.float32)
        found = functools.reduce(lambda one, axis: _weighted(one, axis, sampling), changed, wide)
        found = _back(found, x.dtype, rounded=sampling.antialias)
    return _extrapolated(found, changed, sampling.extrapolation) if cropped else found


def _kernel(x: Tensor, axes: Sequence[_Axis], sampling: _Sampling) -> str | None:
    """Return torch's name for what is asked for, where it has a kernel that gives the same; they are much faster."""
    spatial = all(axis.at >= 2 and math.isclose(axis.scale * axis.size, axis.wanted, rel_tol=1e-6) for axis in axes)
    if not spatial or x.dtype not in (torch.float32, torch.float64) or x.numel() == 0:
        return None
    if sampling.mode == "nearest":
        # By powers of two no place lies so near to a border that rounding decides.
        exact = all(math.frexp(axis.scale)[0] == 0.5 for axis in axes)
        same = exact and (sampling.coordinates, sampling.nearest) == ("asymmetric", "floor")
        return "nearest" if same and x.ndim in _LINEAR_KERNELS else None
    shared = sampling.coordinates in ("half_pixel", "pytorch_half_pixel", "align_corners")
    if not shared or sampling.antialias or sampling.exclude_outside or min(axis.wanted for axis in axes) < 2:
        return None
    # Its cubic kernel is faster one way only: the way back takes twice the time of ours.
    return _LINEAR_KERNELS.get(x.ndim) if sampling.mode == "linear" else None


def _nearest(x: Tensor, axis: _Axis, sampling: _Sampling) -> Tensor:
    positions = axis.positions(sampling.coordinates, x.device)
    match sampling.nearest:
        case "round_prefer_floor":
            places = torch.ceil(positions - 0.5)
        case "round_prefer_ceil":
            places = torch.floor(positions + 0.5)
        case "floor":
            places = torch.floor(positions)
        case _:
            places = torch.ceil(positions)
    return torch.index_select(x, axis.at, torch.clamp(places.to(torch.int64), 0, max(axis.size - 1, 0)))


def _weighted(x: Tensor, axis: _Axis, sampling: _Sampling) -> Tensor:
    positions = axis.positions(sampling.coordinates, x.device)
    # A filter against aliasing is stretched until it covers all elements that one of the output stands for.
    narrow = min(axis.scale, 1.0) if sampling.antialias else 1.0
    reach = (_LINEAR_REACH if sampling.mode == "linear" else _CUBIC_REACH) / narrow
    first = torch.floor(positions) - math.ceil(reach) + 1
    places = first[:, None] + torch.arange(2 * math.ceil(reach), device=x.device)
    distance = torch.abs(places - positions[:, None]) * narrow
    weights = torch.clamp(1 - distance, min=0) if sampling.mode == "linear" else _cubic(distance, sampling.cubic)
    if sampling.exclude_outside:
        weights = torch.where((places >= 0) & (places < axis.size), weights, 0.0)
    if sampling.exclude_outside or sampling.antialias:
        weights = weights / torch.sum(weights, 1, keepdim=True)
    taken = torch.clamp(places.to(torch.int64), 0, axis.size - 1)
    shape = (-1, *[1] * (x.ndim - 1 - axis.at))
    parts = [
        torch.index_select(x, axis.at, taken[:, tap]) * weights[:, tap].to(x.dtype).reshape(shape)
        for tap in range(taken.shape[1])
    ]
    return functools.reduce(torch.add, parts)


def _cubic(distance: Tensor, a: float) -> Tensor:
    """Return the weights of cubic convolution (Keys 1981, equation 4)."""
    near = ((a + 2) * distance - (a + 3)) * distance * distance + 1
    far = ((a * distance - 5 * a) * distance + 8 * a) * distance - 4 * a
    return torch.where(distance <= 1, near, torch.where(distance < _CUBIC_REACH, far, 0.0))


def _back(found: Tensor, dtype: torch.dtype, *, rounded: bool) -> Tensor:
    """Return what was computed in floats in the input's type, kept within what it holds."""
    if dtype.is_floating_point:
        return found.to(dtype)
    limits = torch.iinfo(dtype)
    return torch.clamp(torch.round(found) if rounded else found, limits.min, limits.max).to(dtype)


def _extrapolated(found: Tensor, axes: Sequence[_Axis], value: float) -> Tensor:
    """Put a value wherever a position lies outside the input."""
    for axis in axes:
        positions = axis.positions("tf_crop_and_resize", found.device)
        outside = (positions < 0) | (positions > axis.size - 1)
        filler = torch.full((), value, dtype=found.dtype, device=found.device)
        found = torch.where(outside.reshape(-1, *[1] * (found.ndim - 1 - axis.at)), filler, found)
    return found


OPERATORS: Table = {
    "Resize": (Operator(resize_by_scales, since=10, sizes=(1,)), Operator(resize, since=11, sizes=(1, 2, 3))),
    "Upsample": (Operator(upsample_by_attribute, since=7), Operator(resize_by_scales, since=9, sizes=(1,))),
}
