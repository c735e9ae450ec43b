"""Operators that look at places of an image: grids, regions, centres, columns put back."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType

import torch
import torch.nn.functional as F
from torch import Tensor

from .moved import moving
from .operators import Operator, Table

# Torch's names of modes, which were ONNX's before version 20.
_GRID_MODES: Mapping[str, str] = MappingProxyType({"cubic": "bicubic", "linear": "bilinear"})


def grid_sample(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "linear", padding_mode: str = "zeros"
) -> Tensor:
    """Elements at places of a grid, given from -1 to 1, of an image or a volume."""
    torch_mode = _GRID_MODES.get(mode, mode)
    if x.ndim not in (4, 5) or (x.ndim == 5 and torch_mode == "bicubic"):
        raise NotImplementedError(f"GridSample: `{mode}` over {x.ndim - 2} spatial axes")
    wide = torch.promote_types(x.dtype, torch.float32)
    if x.numel() == 0 or grid.numel() == 0:
        return x.new_zeros(x.shape[0], x.shape[1], *grid.shape[1:-1])
    found = F.grid_sample(x.to(wide), grid.to(wide), torch_mode, padding_mode, bool(align_corners))
    return found.to(x.dtype)


def grid_sample_before_20(
    x: Tensor, grid: Tensor, *, align_corners: int = 0, mode: str = "bilinear", padding_mode: str = "zeros"
) -> Tensor:
    """Elements at places of a grid, given from -1 to 1, of an image."""
    return grid_sample(x, grid, align_corners=align_corners, mode=mode, padding_mode=padding_mode)


def affine_grid(theta: Tensor, size: Tensor, *, align_corners: int = 0) -> Tensor:
    """Return the grid of places that affine maps give for an image or a volume of a size."""
    return F.affine_grid(theta, size.tolist(), bool(align_corners))


def roi_align(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    coordinate_transformation_mode: str = "half_pixel",
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Regions of an image, resampled to one size (He et al. 2017)."""
    half = coordinate_transformation_mode == "half_pixel"
    pooled = (output_height, output_width)
    found = [
        _aligned(x[batch], region, pooled, sampling_ratio, half, mode)
        for batch, region in zip(batch_indices.tolist(), (rois * spatial_scale).tolist(), strict=True)
    ]
    return torch.stack(found) if found else x.new_zeros(0, x.shape[1], *pooled)


def roi_align_before_16(
    x: Tensor,
    rois: Tensor,
    batch_indices: Tensor,
    *,
    mode: str = "avg",
    output_height: int = 1,
    output_width: int = 1,
    sampling_ratio: int = 0,
    spatial_scale: float = 1.0,
) -> Tensor:
    """Regions of an image, resampled to one size, their coordinates taken as they are."""
    return roi_align(
        x,
        rois,
        batch_indices,
        coordinate_transformation_mode="output_half_pixel",
        mode=mode,
        output_height=output_height,
        output_width=output_width,
        sampling_ratio=sampling_ratio,
        spatial_scale=spatial_scale,
    )


def _aligned(image: Tensor, region: list[float], pooled: tuple[int, int], ratio: int, half: bool, mode: str) -> Tensor:
    """Return one region of an image (channels, height, width), of bins as many as asked for."""
    shift = 0.5 if half else 0.0
    rows, columns = (
        _samples(region[1 - axis] - shift, region[3 - axis] - shift, pooled[axis], ratio, half, image)
        for axis in (0, 1)
    )
    if rows.numel() == 0 or columns.numel() == 0:
        return image.new_zeros(image.shape[0], *pooled)  # a region of no size has no samples
    if mode == "avg":
        ys = _hats(rows, image.shape[1]).mean(1).to(image.dtype)
        xs = _hats(columns, image.shape[2]).mean(1).to(image.dtype)
        return torch.einsum("chw,ph,qw->cpq", image, ys, xs)
    # The largest of the weighted neighbours, not of their sums: so do ONNX Runtime and ONNX's own cases.
    products = [
        image.index_select(1, row).index_select(2, column) * (down[:, None] * right).to(image.dtype)
        for row, down in _neighbours(rows, image.shape[1])
        for column, right in _neighbours(columns, image.shape[2])
    ]
    largest = torch.stack(products).amax(0)
    return largest.reshape(image.shape[0], *rows.shape, *columns.shape).amax((2, 4))


def _samples(start: float, end: float, bins: int, ratio: int, half: bool, like: Tensor) -> Tensor:
    """Return where along an axis the samples of each bin lie: bins, samples of each."""
    dtype = torch.promote_types(like.dtype, torch.float32)  # 16 bits do not tell places of a large image apart
    width = (end - start if half else max(end - start, 1.0)) / bins
    count = ratio if ratio > 0 else max(math.ceil(width), 0)
    at = torch.arange(bins, dtype=dtype, device=like.device)[:, None] * width
    return start + at + (torch.arange(count, dtype=dtype, device=like.device) + 0.5) * width / count


def _hats(places: Tensor, size: int) -> Tensor:
    """Return how much each of the elements of an axis counts at each place; beyond the axis none does."""
    inside = ((places >= -1) & (places <= size)).to(places.dtype)
    distance = torch.clamp(places, 0, size - 1)[..., None] - torch.arange(size, device=places.device)
    return torch.clamp(1 - torch.abs(distance), min=0) * inside[..., None]


def _neighbours(places: Tensor, size: int) -> list[tuple[Tensor, Tensor]]:
    """Return the elements below and above each place, and how much they count."""
    flat = places.reshape(-1)
    inside = ((flat >= -1) & (flat <= size)).to(places.dtype)
    held = torch.clamp(flat, 0, size - 1)
    below = torch.floor(held)
    above = torch.clamp(below + 1, max=size - 1)
    rest = held - below
    return [(below.to(torch.int64), (1 - rest) * inside), (above.to(torch.int64), rest * inside)]


def max_roi_pool(x: Tensor, rois: Tensor, *, pooled_shape: list[int], spatial_scale: float = 1.0) -> Tensor:
    """Largest elements of the bins of regions (Girshick 2015)."""
    found = [_pooled(x[int(roi[0])], roi[1:], pooled_shape, spatial_scale) for roi in rois.tolist()]
    return torch.stack(found) if found else x.new_zeros(0, x.shape[1], *pooled_shape)


def _pooled(image: Tensor, region: list[float], pooled: list[int], scale: float) -> Tensor:
    """Return the largest elements of the bins of one region; of a bin without elements zero."""
    left, top, right, bottom = (math.floor(one * scale + 0.5) for one in region)
    rows = _bins(top, bottom, pooled[0], image.shape[1])
    columns = _bins(left, right, pooled[1], image.shape[2])
    nothing = image.new_zeros(image.shape[0])
    found = [
        image[:, row, column].amax((1, 2)) if row.start < row.stop and column.start < column.stop else nothing
        for row in rows
        for column in columns
    ]
    return torch.stack(found, 1).reshape(-1, *pooled)


def _bins(first: int, last: int, count: int, size: int) -> list[slice]:
    """Return the elements of each bin of an axis, those of the image."""
    width = max(last - first + 1, 1) / count
    bounds = ((math.floor(at * width) + first, math.ceil((at + 1) * width) + first) for at in range(count))
    return [slice(min(max(start, 0), size), min(max(stop, 0), size)) for start, stop in bounds]


@moving
def center_crop_pad(x: Tensor, shape: Tensor, *, axes: list[int] | None = None) -> Tensor:
    """Cut off or pad around the centre until the axes have the sizes asked for."""
    padding = [0, 0] * x.ndim
    for axis, wanted in zip(axes or range(x.ndim), shape.tolist(), strict=True):
        size = x.shape[axis]
        before = (wanted - size) // 2 if wanted >= size else -((size - wanted) // 2)
        place = 2 * (x.ndim - 1 - axis % x.ndim)
        padding[place : place + 2] = [before, wanted - size - before]
    return F.pad(x, padding)


def col2im(
    x: Tensor,
    image_shape: Tensor,
    block_shape: Tensor,
    *,
    dilations: list[int] | None = None,
    pads: list[int] | None = None,
    strides: list[int] | None = None,
) -> Tensor:
    """Columns put back to where they were taken from an image, added up where they overlap."""
    sizes, block = image_shape.tolist(), block_shape.tolist()
    rank = len(sizes)
    gaps, steps, given = dilations or [1] * rank, strides or [1] * rank, pads or [0] * (2 * rank)
    place = torch.zeros((1, 1), dtype=torch.int64, device=x.device)
    inside = torch.ones((1, 1), dtype=torch.bool, device=x.device)
    for axis, size in enumerate(sizes):
        room = size + given[axis] + given[rank + axis] - gaps[axis] * (block[axis] - 1) - 1
        starts = torch.arange(room // steps[axis] + 1, device=x.device) * steps[axis] - given[axis]
        along = (torch.arange(block[axis], device=x.device) * gaps[axis])[:, None] + starts
        place = (place[:, None, :, None] * size + along[None, :, None, :]).flatten(2).flatten(0, 1)
        inside = (inside[:, None, :, None] & ((along >= 0) & (along < size))[None, :, None, :]).flatten(2).flatten(0, 1)
    whole = math.prod(sizes)
    columns = x.reshape(x.shape[0], -1, place.numel())
    # What lies outside the image is added to one element more, which is then left off.
    places = torch.where(inside, place, whole).reshape(-1)
    found = torch.zeros(x.shape[0], columns.shape[1], whole + 1, dtype=x.dtype, device=x.device)
    return found.index_add(2, places, columns)[..., :whole].reshape(x.shape[0], -1, *sizes)


OPERATORS: Table = {
    "AffineGrid": Operator(affine_grid, since=20, sizes=(1,)),
    "CenterCropPad": Operator(center_crop_pad, since=18, sizes=(1,)),
    "Col2Im": Operator(col2im, since=18, sizes=(1, 2)),
    "GridSample": (Operator(grid_sample_before_20, since=16), Operator(grid_sample, since=20)),
    "MaxRoiPool": Operator(max_roi_pool),
    "RoiAlign": (Operator(roi_align_before_16, since=10), Operator(roi_align, since=16)),
}
