"""Operators that pick elements by indices, or put them where indices say.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`. Negative indices
count from the end, as ONNX allows nearly everywhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .moved import moving, taken
from .operators import Operator, Table
from .unsigned import in_order, in_wider, widened

# What torch calls ONNX's reductions of scattered elements.
_REDUCTIONS: Mapping[str, str] = MappingProxyType({"add": "sum", "mul": "prod", "max": "amax", "min": "amin"})


def _counted(indices: Tensor, size: int, device: torch.device) -> Tensor:
    """Return indices from the beginning, as torch wants them."""
    indices = indices.to(device, torch.int64)
    return torch.where(indices < 0, indices + size, indices)


@moving
def gather(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """Whole slices along an axis, in the shape of the indices."""
    axis %= data.dim()
    flat = _counted(indices, data.shape[axis], data.device).reshape(-1)
    picked = data.index_select(axis, flat)
    return picked.reshape(data.shape[:axis] + indices.shape + data.shape[axis + 1 :])


@moving
def gather_elements(data: Tensor, indices: Tensor, *, axis: int = 0) -> Tensor:
    """One element for each index, which says its place along an axis."""
    return data.gather(axis, _counted(indices, data.shape[axis], data.device))


@moving
def gather_nd(data: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    """Slices at tuples of indices: the last axis of `indices`."""
    return data[_tuples(data, indices, batch_dims)]


def _tuples(data: Tensor, indices: Tensor, batch_dims: int) -> tuple[Tensor, ...]:
    """Return an index for each leading axis of the data, those of the batch counted off."""
    rank = indices.dim() - 1
    batch = (
        torch.arange(data.shape[axis], device=data.device).reshape([-1] + [1] * (rank - axis - 1))
        for axis in range(batch_dims)
    )
    sizes = data.shape[batch_dims:]
    return *batch, *(_counted(at, sizes[axis], data.device) for axis, at in enumerate(indices.unbind(-1)))


def scatter_elements(
    data: Tensor, indices: Tensor, updates: Tensor, *, axis: int = 0, reduction: str = "none"
) -> Tensor:
    """The data with each update at the place along an axis that its index says."""
    if reduction == "none":
        placed: Tensor = _scattered(data, indices, updates, axis=axis)
        return placed
    at = _counted(indices, data.shape[axis], data.device)
    if data.dtype is torch.bool:  # add is or, mul is and: those of 0 and 1
        kind = {"add": "amax", "mul": "amin"}.get(reduction, _REDUCTIONS[reduction])
        return data.byte().scatter_reduce(axis, at, updates.byte(), kind).bool()
    compute = in_wider if reduction in ("add", "mul") else in_order
    return compute(lambda one, other: one.scatter_reduce(axis, at, other, _REDUCTIONS[reduction]), data, updates)


@moving
def _scattered(data: Tensor, indices: Tensor, updates: Tensor, *, axis: int) -> Tensor:
    return data.scatter(axis, _counted(indices, data.shape[axis], data.device), updates)


def scatter_nd(data: Tensor, indices: Tensor, updates: Tensor, *, reduction: str = "none") -> Tensor:
    """The data with slices of updates at tuples of indices."""
    if reduction == "none":
        placed: Tensor = _scattered_slices(data, indices, updates)
        return placed
    depth = indices.shape[-1]
    # Slices are numbered, so that one index names each; torch reduces by such.
    flat = torch.zeros(indices.shape[:-1], dtype=torch.int64, device=data.device)
    for at in range(depth):
        flat = flat * data.shape[at] + _counted(indices[..., at], data.shape[at], data.device)
    count, width = math.prod(data.shape[:depth]), math.prod(data.shape[depth:])
    rows = flat.reshape(-1, 1).expand(-1, width)
    found = scatter_elements(data.reshape(count, width), rows, updates.reshape(rows.shape), reduction=reduction)
    return found.reshape(data.shape)


@moving
def _scattered_slices(data: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
    return data.index_put(_tuples(data, indices, 0), updates)


@moving
def tensor_scatter(
    past_cache: Tensor,
    update: Tensor,
    write_indices: Tensor | None = None,
    *,
    axis: int = -2,
    mode: str = "linear",
) -> Tensor:
    """A cache with new entries written from an index of each batch on."""
    axis %= past_cache.dim()
    batch, length = update.shape[0], update.shape[axis]
    at = torch.arange(length, device=past_cache.device).unsqueeze(0).expand(batch, length)
    if write_indices is not None:
        at = at + write_indices.to(past_cache.device, torch.int64).unsqueeze(1)
    if mode == "circular":
        at = at.remainder(past_cache.shape[axis])
    shape = [1] * update.dim()
    shape[0], shape[axis] = batch, length
    return past_cache.scatter(axis, at.reshape(shape).expand(update.shape), update)


def nonzero(data: Tensor) -> Tensor:
    """Where elements are not zero: a row of indices for each axis."""
    return widened(data).nonzero().t()


def one_hot(indices: Tensor, depth: Tensor, values: Any, *, axis: int = -1) -> Any:
    """The second value where the index along a new axis is, the first everywhere else."""
    if isinstance(values, np.ndarray):
        hot = one_hot(indices, depth, torch.tensor([0, 1]), axis=axis)
        return taken(values.tolist(), hot)
    size = int(depth.reshape(()).item())
    axis = axis % (indices.dim() + 1)
    shape = [1] * (indices.dim() + 1)
    shape[axis] = size
    places = torch.arange(size, device=indices.device).reshape(shape)
    # Indices may be fractional numbers; what lies outside of [-depth, depth) is nowhere.
    given = indices.to(torch.int64)
    counted = torch.where(given < 0, given + size, given).unsqueeze(axis)
    return torch.where(places == counted, values[1], values[0])


def top_k(
    data: Tensor, k: Tensor, *, axis: int = -1, largest: int = 1, sorted: int = 1, outputs: int = 2
) -> tuple[Tensor, Tensor]:
    """The k largest or smallest elements and their indices; of equal ones the first come first."""
    return _extremes(data, int(k.item()), axis, bool(largest))


def top_k_1(data: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    """TopK before opset 10."""
    return _extremes(data, k, axis, True)


def _extremes(data: Tensor, count: int, axis: int, largest: bool) -> tuple[Tensor, Tensor]:
    # torch.topk leaves open which of equal elements it takes; a stable sort does not.
    ordered = data.to(torch.float32) if data.dtype in (torch.float16, torch.bfloat16) else data
    ordered = ordered.to(torch.int64) if ordered.dtype in (torch.uint16, torch.uint32) else ordered
    if ordered.dtype is torch.uint64:  # of the same order as signed numbers, once the first bit is turned
        ordered = ordered.view(torch.int64) ^ torch.iinfo(torch.int64).min
    indices = torch.sort(ordered, dim=axis, descending=largest, stable=True).indices.narrow(axis, 0, count)
    return gather_elements(data, indices, axis=axis), indices


@moving
def compress(data: Tensor, condition: Tensor, *, axis: int | None = None) -> Tensor:
    """The slices whose condition is true; a condition that ends early is false from there on."""
    data, axis = (data.reshape(-1), 0) if axis is None else (data, axis)
    return data.index_select(axis, condition.nonzero().reshape(-1).to(data.device))


def unique(data: Any, *, axis: int | None = None, sorted: int = 1) -> tuple[Any, Tensor, Tensor, Tensor]:
    """Distinct slices, where each is first, which of them each slice is, and how many there are of each."""
    if isinstance(data, np.ndarray):
        strings = ["", *np.unique(data.astype(str)).tolist()]
        codes = torch.from_numpy(np.searchsorted(np.array(strings[1:]), data.astype(str)) + 1)
        found, first, inverse, counts = unique(codes, axis=axis, sorted=sorted)
        return taken(strings, found), first, inverse, counts
    data, along = (data.reshape(-1), 0) if axis is None else (data, axis)
    rows = None if data.dim() == 1 else along  # along an axis torch puts nothing in order where there is a NaN
    found, inverse, counts = torch.unique(data, dim=rows, sorted=True, return_inverse=True, return_counts=True)
    places = torch.arange(inverse.numel(), device=inverse.device)
    first = torch.full_like(counts, inverse.numel()).scatter_reduce(0, inverse, places, "amin")
    if not sorted:  # in the order in which they are met
        order = first.argsort()
        rank = torch.empty_like(order).scatter(0, order, torch.arange(order.numel(), device=order.device))
        found, first, counts, inverse = found.index_select(along, order), first[order], counts[order], rank[inverse]
    return found, first, inverse, counts


OPERATORS: Table = {
    "Compress": Operator(compress, since=9),
    "Gather": Operator(gather),
    "GatherElements": Operator(gather_elements, since=11),
    "GatherND": Operator(gather_nd, since=11),
    "NonZero": Operator(nonzero, since=9),
    "OneHot": Operator(one_hot, since=9, sizes=(1,)),
    "Scatter": Operator(scatter_elements, since=9),
    "ScatterElements": Operator(scatter_elements, since=11),
    "ScatterND": Operator(scatter_nd, since=11),
    "TensorScatter": Operator(tensor_scatter, since=24),
    "TopK": (Operator(top_k_1), Operator(top_k, since=10, sizes=(1,))),
    "Unique": Operator(unique, since=11),
}
