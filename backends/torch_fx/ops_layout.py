"""Operators that put elements elsewhere by sizes, axes and bounds alone: reshapes, cuts, joins, pads.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`. What ONNX gives as
sizes is read as numbers. Results may be views of inputs: nothing here or elsewhere writes into a tensor.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .moved import moving
from .operators import Operator, Table

# Up to it every integer is a float of 64 bits.
_EXACT_INTEGER = 2**53


def identity(data: object) -> object:
    """The input itself, whatever it is."""
    return data


@moving
def reshape(data: Tensor, shape: Tensor, *, allowzero: int = 0) -> Tensor:
    """Zero stands for the input's size there unless `allowzero`, and -1 for what is left."""
    sizes = [data.shape[axis] if size == 0 and not allowzero else int(size) for axis, size in enumerate(shape.tolist())]
    if -1 in sizes:
        known = math.prod(size for size in sizes if size != -1)
        sizes[sizes.index(-1)] = data.numel() // known if known else 0
    return data.reshape(sizes)


@moving
def flatten(data: Tensor, *, axis: int = 1) -> Tensor:
    """A matrix: the axes before `axis`, and the rest."""
    rank = data.dim()
    axis = axis + rank if axis < 0 else axis
    return data.reshape(math.prod(data.shape[:axis]), math.prod(data.shape[axis:]))


@moving
def squeeze(data: Tensor, axes: Tensor | None = None) -> Tensor:
    """Axes of size 1 left out: those given, or all."""
    return _squeezed(data, None if axes is None else axes.tolist())


@moving
def squeeze_1(data: Tensor, *, axes: Sequence[int] | None = None) -> Tensor:
    """Squeeze before opset 13."""
    return _squeezed(data, axes)


def _squeezed(data: Tensor, axes: Sequence[int] | None) -> Tensor:
    if axes is None:
        return data.squeeze()
    dropped = {axis % data.dim() for axis in axes}
    if any(data.shape[axis] != 1 for axis in dropped):
        raise ValueError(f"Squeeze of axes {sorted(dropped)} of a tensor of shape {tuple(data.shape)}")
    return data.reshape([size for axis, size in enumerate(data.shape) if axis not in dropped])


@moving
def unsqueeze(data: Tensor, axes: Tensor) -> Tensor:
    """Axes of size 1 put in, counted in the result."""
    return _unsqueezed(data, axes.reshape(-1).tolist())


@moving
def unsqueeze_1(data: Tensor, *, axes: Sequence[int]) -> Tensor:
    """Unsqueeze before opset 13."""
    return _unsqueezed(data, axes)


def _unsqueezed(data: Tensor, axes: Sequence[int]) -> Tensor:
    rank = data.dim() + len(axes)
    for axis in sorted(axis % rank for axis in axes):
        data = data.unsqueeze(axis)
    return data


@moving
def transpose(data: Tensor, *, perm: Sequence[int] | None = None) -> Tensor:
    """Axes in another order, by default reversed."""
    return data.permute(list(perm) if perm is not None else list(range(data.dim()))[::-1])


@moving
def concat(*inputs: Tensor, axis: int) -> Tensor:
    """Tensors behind one another along an axis."""
    # torch.cat skips one-dimensional empty tensors by tradition, which is right here as well: they add nothing.
    return torch.cat(inputs, axis)


@moving
def split(data: Tensor, sizes: Tensor | None = None, *, axis: int = 0, outputs: int = 1) -> tuple[Tensor, ...]:
    """Pieces of the given sizes, or equal ones."""
    return _pieces(data, None if sizes is None else sizes.tolist(), axis, outputs)


@moving
def split_18(
    data: Tensor,
    sizes: Tensor | None = None,
    *,
    axis: int = 0,
    num_outputs: int | None = None,
    outputs: int = 1,
) -> tuple[Tensor, ...]:
    """Pieces of the given sizes, or equal ones of which the last may be smaller."""
    return _pieces(data, None if sizes is None else sizes.tolist(), axis, num_outputs or outputs)


@moving
def split_2(data: Tensor, *, axis: int = 0, split: Sequence[int] | None = None, outputs: int = 1) -> tuple[Tensor, ...]:
    """Split before opset 13."""
    return _pieces(data, split, axis, outputs)


def _pieces(data: Tensor, sizes: Sequence[int] | None, axis: int, count: int) -> tuple[Tensor, ...]:
    if sizes is None:
        length = data.shape[axis]
        size = -(-length // count)
        sizes = [max(0, min(size, length - size * at)) for at in range(count)]
    return tuple(torch.split(data, list(sizes), axis))


@moving
def slice_(
    data: Tensor, starts: Tensor, ends: Tensor, axes: Tensor | None = None, steps: Tensor | None = None
) -> Tensor:
    """Every `steps`th element between bounds that are clamped as in NumPy."""
    return _sliced(
        data,
        starts.tolist(),
        ends.tolist(),
        None if axes is None else axes.tolist(),
        None if steps is None else steps.tolist(),
    )


@moving
def slice_1(data: Tensor, *, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None = None) -> Tensor:
    """Slice before opset 10."""
    return _sliced(data, starts, ends, axes, None)


def _sliced(
    data: Tensor, starts: Sequence[int], ends: Sequence[int], axes: Sequence[int] | None, steps: Sequence[int] | None
) -> Tensor:
    axes = range(len(starts)) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        bounds = slice(start, end, step).indices(data.shape[axis])
        if step > 0:
            data = data.narrow(axis, bounds[0], max(0, bounds[1] - bounds[0]))
            if step > 1:  # torch has no steps of its own outside indexing
                data = data[(slice(None),) * (axis % data.dim()) + (slice(None, None, step),)]
            continue
        data = data.index_select(axis, torch.arange(*bounds, device=data.device))
    return data


@moving
def pad(
    data: Tensor,
    pads: Tensor,
    constant_value: Tensor | None = None,
    axes: Tensor | None = None,
    *,
    mode: str = "constant",
) -> Tensor:
    """Elements put before and behind, or taken away where their number is negative."""
    value = constant_value.item() if constant_value is not None and constant_value.numel() else 0
    return _padded(data, pads.tolist(), None if axes is None else axes.tolist(), mode, value)


def pad_2(data: Tensor, *, pads: Sequence[int], mode: str = "constant", value: float = 0.0) -> Tensor:
    """Pad before opset 11."""
    return _padded(data, pads, None, mode, value)


def _padded(data: Tensor, pads: Sequence[int], axes: Sequence[int] | None, mode: str, value: float) -> Tensor:
    axes = list(range(data.dim())) if axes is None else [axis % data.dim() for axis in axes]
    around = {axis: (pads[at], pads[at + len(axes)]) for at, axis in enumerate(axes)}
    if mode == "constant":
        flat = [count for axis in reversed(range(data.dim())) for count in around.get(axis, (0, 0))]
        padded = torch.nn.functional.pad(data, flat, value=value)
        if data.dtype.is_floating_point or abs(value) <= _EXACT_INTEGER:
            return padded
        # Torch takes the value for a float, of which not every large integer is one.
        inside = torch.nn.functional.pad(torch.ones_like(data, dtype=torch.bool), flat)
        return torch.where(inside, padded, torch.full((), int(value), dtype=data.dtype, device=data.device))
    for axis, (before, after) in around.items():
        if before or after:
            data = data.index_select(axis, _mirror(data, data.shape[axis], before, after, mode))
    return data


def _mirror(data: Tensor, size: int, before: int, after: int, mode: str) -> Tensor:
    """Return which element stands at each place of a padded axis."""
    places = torch.arange(-before, size + after, device=data.device)
    if mode == "edge":
        return places.clamp(0, size - 1)
    if mode == "wrap":
        return places.remainder(size)
    period = max(1, 2 * (size - 1))  # there and back, the ends met once
    places = places.remainder(period)
    return torch.minimum(places, (period - places)) if size > 1 else places


@moving
def tile(data: Tensor, repeats: Tensor) -> Tensor:
    """The whole tensor again and again along each axis."""
    return data.repeat(repeats.tolist())


@moving
def expand(data: Tensor, shape: Tensor) -> Tensor:
    """Broadcast to a shape, whose own sizes of 1 leave the input's as they are."""
    return data.expand(torch.broadcast_shapes(tuple(data.shape), tuple(shape.tolist())))  # type: ignore[no-untyped-call]


def depth_to_space(data: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Blocks of channels spread over rows and columns; columns of depths first (DCR), or of channels (CRD)."""
    batch, channels, height, width = data.shape
    depth = channels // blocksize**2
    if mode == "DCR":
        split = data.reshape(batch, blocksize, blocksize, depth, height, width).permute(0, 3, 4, 1, 5, 2)
    else:
        split = data.reshape(batch, depth, blocksize, blocksize, height, width).permute(0, 1, 4, 2, 5, 3)
    return split.reshape(batch, depth, height * blocksize, width * blocksize)


def space_to_depth(data: Tensor, *, blocksize: int, mode: str = "DCR") -> Tensor:
    """Blocks of rows and columns stacked as channels: the inverse of DepthToSpace."""
    batch, channels, height, width = data.shape
    rows, columns = height // blocksize, width // blocksize
    split = data.reshape(batch, channels, rows, blocksize, columns, blocksize)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return split.permute(order).reshape(batch, channels * blocksize**2, rows, columns)


@moving
def reverse_sequence(data: Tensor, sequence_lens: Tensor, *, batch_axis: int = 1, time_axis: int = 0) -> Tensor:
    """The first elements along time turned round, as many for each batch as its length says."""
    steps = torch.arange(data.shape[time_axis], device=data.device)
    lengths = sequence_lens.to(data.device, torch.int64).unsqueeze(1)
    order = torch.where(steps < lengths, lengths - 1 - steps, steps)  # batch × time
    order = order.t() if time_axis < batch_axis else order
    shape = [1] * data.dim()
    shape[batch_axis], shape[time_axis] = data.shape[batch_axis], data.shape[time_axis]
    return data.gather(time_axis, order.reshape(shape).expand(data.shape))


@moving
def trilu(data: Tensor, k: Tensor | None = None, *, upper: int = 1) -> Tensor:
    """The upper or lower triangle of each matrix, zeros elsewhere; `k` is the diagonal it ends at."""
    diagonal = 0 if k is None else int(k.item())
    # A mask and not torch.triu: NaN and infinity outside must become zero, in every dtype.
    rows = torch.arange(data.shape[-2], device=data.device).unsqueeze(1)
    columns = torch.arange(data.shape[-1], device=data.device)
    kept = columns - rows >= diagonal if upper else columns - rows <= diagonal
    return torch.where(kept, data, torch.zeros((), dtype=data.dtype, device=data.device))


OPERATORS: Table = {
    "Concat": Operator(concat),
    "DepthToSpace": Operator(depth_to_space),
    "Expand": Operator(expand, sizes=(1,)),
    "Flatten": Operator(flatten),
    "Identity": Operator(identity),
    "Pad": (Operator(pad_2, since=2), Operator(pad, since=11, sizes=(1, 2, 3))),
    "Reshape": Operator(reshape, since=5, sizes=(1,)),
    "ReverseSequence": Operator(reverse_sequence),
    "Slice": (Operator(slice_1), Operator(slice_, since=10, sizes=(1, 2, 3, 4))),
    "SpaceToDepth": Operator(space_to_depth),
    "Split": (
        Operator(split_2, since=2),
        Operator(split, since=13, sizes=(1,)),
        Operator(split_18, since=18, sizes=(1,)),
    ),
    "Squeeze": (Operator(squeeze_1), Operator(squeeze, since=13, sizes=(1,))),
    "Tile": Operator(tile, since=6, sizes=(1,)),
    "Transpose": Operator(transpose),
    "Trilu": Operator(trilu, sizes=(1,)),
    "Unsqueeze": (Operator(unsqueeze_1), Operator(unsqueeze, since=13, sizes=(1,))),
}
