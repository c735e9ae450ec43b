"""Rows of linear layers: the vectors that a layer's weight multiplies, as `LinearLayer.matrix` orders them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.backend import Array

from .linear_layers import LinearLayer


def takes_rows(layer: LinearLayer) -> bool:
    """Return whether a layer is one matrix, or one for each group, applied to rows of its input.

    Not where it sums over the first axis of its input: that is taken for samples, and cut into batches.
    """
    if _sums_over_samples(layer):
        return False
    if layer.node.op_type in ("MatMul", "Gemm"):
        return len(layer.dims) == 2
    return layer.node.op_type == "Conv" or _groups(layer) == 1


def layer_rows(layer: LinearLayer, x: Array, *, limit: int | None = None, blocks: int = 1) -> Array:
    """Return the vectors a layer's weight multiplies, one for each position of its output.

    A convolution is unfolded: what lies under its kernel, padding included, is one row (im2col, Chellapilla et al.,
    High Performance Convolutional Neural Networks for Document Processing, 2006). A ConvTranspose is the convolution
    of its input spread out by its strides.

    Args:
        layer: A layer of which `takes_rows` holds.
        x: The layer's input, samples first.
        limit: The most rows of each sample, evenly spaced; None for all.
        blocks: Into how many blocks of channels the inputs are divided, each of them given as a group is; for layers
            of one group, and no ConvTranspose.

    Returns:
        float32 [groups, rows, inputs], ordered so that ``rows[g] @ matrix[outputs of g].T`` is what the layer computes
        without its bias.
    """
    x = np.asarray(x, np.float32)
    match layer.node.op_type:
        case "MatMul" | "Gemm":
            rows = _rows_of_product(layer, x)
            rows = rows[_evenly(len(rows), limit and limit * len(x))]
            return rows.reshape(len(rows), blocks, -1).transpose(1, 0, 2)
        case "Conv":
            return _unfold(x, _window(layer, x.shape[2:]), _groups(layer) * blocks, limit)
        case _:
            return _unfold_transposed(layer, x, limit)


def output_rows(layer: LinearLayer, y: Array, *, limit: int | None = None) -> Array:
    """Return what a layer gives at the positions whose inputs `layer_rows` gives, float32 [rows, outputs].

    Args:
        layer: A layer of which `takes_rows` holds.
        y: Its output, or another value of that shape, samples first.
        limit: The most rows of each sample, evenly spaced; None for all.
    """
    y = np.asarray(y, np.float32)
    if layer.node.op_type in ("MatMul", "Gemm"):
        if layer.weight_index == 0 and y.ndim > 1:
            y = np.moveaxis(y, -2, -1)
        rows = y.reshape(-1, y.shape[-1])
        return rows[_evenly(len(rows), limit and limit * len(y))]
    # Of a ConvTranspose, what its output is padded with has no rows.
    flat = y.reshape(*y.shape[:2], -1)
    positions = math.prod(y.shape[2:])
    taken: Array = flat[:, :, _evenly(positions, limit)]
    return taken.transpose(0, 2, 1).reshape(-1, y.shape[1])


def summed_rows(layer: LinearLayer, x: Array) -> tuple[Array, int]:
    """Return the sum of all rows that `layer_rows` gives, float32 [groups, inputs], and how many these are."""
    if layer.node.op_type != "Conv":
        rows = layer_rows(layer, x)
        return rows.sum(axis=1), rows.shape[1]
    views = _windows(np.asarray(x, np.float32), _window(layer, x.shape[2:]))
    rank = (views.ndim - 2) // 2
    places = (0, *range(2, 2 + rank))
    sums = views.sum(axis=places).reshape(_groups(layer), -1, math.prod(views.shape[2 + rank :]))
    return sums.transpose(0, 2, 1).reshape(len(sums), -1), math.prod(views.shape[place] for place in places)


def _sums_over_samples(layer: LinearLayer) -> bool:
    if layer.node.op_type == "Gemm":
        across = layer.node.attributes.get_int("transA" if layer.weight_index == 1 else "transB", 0)
        return (across == 1) == (layer.weight_index == 1)
    shape = layer.input.shape
    return layer.node.op_type == "MatMul" and layer.weight_index == 0 and (shape is None or len(shape) == 2)


def _rows_of_product(layer: LinearLayer, x: Array) -> Array:
    """Return the rows of a matrix product; where the weight is the left factor, these are columns of the other."""
    if layer.node.op_type == "Gemm":
        across = layer.node.attributes.get_int("transA" if layer.weight_index == 1 else "transB", 0)
        return x.T if across == (layer.weight_index == 1) else x
    if layer.weight_index == 0 and x.ndim > 1:
        x = np.moveaxis(x, -2, -1)
    return x.reshape(-1, x.shape[-1])


def _evenly(count: int, limit: int | None) -> Array | slice:
    if not limit or count <= limit:
        return slice(None)
    return np.linspace(0, count - 1, limit).astype(np.int64)


class _Window:
    """How a kernel moves over an input.

    Args:
        kernel: Its size along each spatial axis.
        strides: Steps between positions.
        dilations: Steps between its own points.
        pads: (Before, behind) along each axis.
    """

    def __init__(
        self, kernel: Sequence[int], strides: Sequence[int], dilations: Sequence[int], pads: Sequence[tuple[int, int]]
    ) -> None:
        self.kernel, self.strides, self.dilations, self.pads = kernel, strides, dilations, pads


def _window(layer: LinearLayer, sizes: Sequence[int]) -> _Window:
    attributes = layer.node.attributes
    rank = len(sizes)
    kernel = layer.dims[2:]
    strides = attributes.get_ints("strides", [1] * rank)
    dilations = attributes.get_ints("dilations", [1] * rank)
    extents = [(k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True)]
    mode = attributes.get_string("auto_pad", "NOTSET")
    if mode.startswith("SAME"):
        needed = [max((-(-n // s) - 1) * s + e - n, 0) for n, s, e in zip(sizes, strides, extents, strict=True)]
        # The odd one goes behind for SAME_UPPER, before for SAME_LOWER.
        less, more = [total // 2 for total in needed], [total - total // 2 for total in needed]
        pads = list(zip(less, more, strict=True) if mode == "SAME_UPPER" else zip(more, less, strict=True))
    else:
        flat = attributes.get_ints("pads", [0] * (2 * rank)) if mode == "NOTSET" else [0] * (2 * rank)
        pads = list(zip(flat[:rank], flat[rank:], strict=True))
    return _Window(kernel, list(strides), list(dilations), pads)


def _unfold(x: Array, window: _Window, groups: int, limit: int | None) -> Array:
    """Return [groups, samples × positions, kernel positions × channels of a group]."""
    views: Array = _windows(x, window)
    rank = len(window.kernel)
    samples, channels, *positions = views.shape[: 2 + rank]
    chosen = np.unravel_index(np.arange(math.prod(positions))[_evenly(math.prod(positions), limit)], positions)
    # [samples, channels, positions, kernel...] of the chosen positions alone
    at: tuple[Any, ...] = (slice(None), slice(None), *chosen)
    taken = views[at]
    count, size = len(chosen[0]), math.prod(window.kernel)
    split = taken.reshape(samples, groups, channels // groups, count, size)
    ordered = split.transpose(1, 0, 3, 4, 2)
    return np.ascontiguousarray(ordered).reshape(groups, samples * count, size * (channels // groups))


def _windows(x: Array, window: _Window) -> Array:
    """Return a view [samples, channels, positions ..., kernel ...] of an input and its padding."""
    padded = np.pad(x, [(0, 0), (0, 0), *window.pads]) if np.any(window.pads) else x
    extents = [(k - 1) * d + 1 for k, d in zip(window.kernel, window.dilations, strict=True)]
    views = np.lib.stride_tricks.sliding_window_view(padded, extents, axis=tuple(range(2, 2 + len(extents))))
    steps = tuple(slice(None, None, stride) for stride in window.strides)
    points = tuple(slice(None, None, dilation) for dilation in window.dilations)
    found: Array = views[(slice(None), slice(None), *steps, *points)]
    return found


def _unfold_transposed(layer: LinearLayer, x: Array, limit: int | None) -> Array:
    """Return the rows of a ConvTranspose of one group; output padding, where only the bias is, is left out."""
    attributes, rank = layer.node.attributes, x.ndim - 2
    kernel = layer.dims[2:]
    strides = attributes.get_ints("strides", [1] * rank)
    dilations = attributes.get_ints("dilations", [1] * rank)
    spread = np.zeros((*x.shape[:2], *((n - 1) * s + 1 for n, s in zip(x.shape[2:], strides, strict=True))), np.float32)
    spread[(slice(None), slice(None), *(slice(None, None, s) for s in strides))] = x
    flat = attributes.get_ints("pads", [0] * (2 * rank))
    cuts = zip(flat[:rank], flat[rank:], strict=True)
    margins = [(k - 1) * d for k, d in zip(kernel, dilations, strict=True)]
    # Padding of a ConvTranspose cuts its output, and may cut more than the margins of the spread input hold.
    pads, crops = [], []
    for margin, (before, behind) in zip(margins, cuts, strict=True):
        pads.append((max(margin - before, 0), max(margin - behind, 0)))
        crops.append((max(before - margin, 0), max(behind - margin, 0)))
    inner = tuple(slice(low, size - high) for (low, high), size in zip(crops, spread.shape[2:], strict=True))
    window = _Window(kernel, [1] * rank, dilations, pads)
    rows = _unfold(spread[(slice(None), slice(None), *inner)], window, 1, limit)
    # It reads the kernel backwards.
    size = math.prod(kernel)
    return rows.reshape(rows.shape[1], size, -1)[:, ::-1].reshape(1, rows.shape[1], -1)


def _groups(layer: LinearLayer) -> int:
    return layer.node.attributes.get_int("group", 1)
