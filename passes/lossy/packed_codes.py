"""Codes of few bits packed into bytes, as ONNX Runtime's operators on blocks read them."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array

from ..solvers.grid import Grid
from ..solvers.rows import by_rows

_BYTE_BITS = 8


def packed_codes(codes: Array, grid: Grid) -> Array:
    """Return codes as uint8 [outputs, blocks, bytes of a block], the first code of each byte in its lowest bits.

    Args:
        codes: [outputs, inputs] on the grid; signed ones are moved up, so that the middle code stands for zero. A
            short last block is filled with the code of zero.
        grid: Their grid, with blocks.
    """
    assert grid.block is not None, "only blocks are packed"
    middle = np.uint8(1 << grid.bits - 1)
    if codes.flags.f_contiguous and codes.shape[1] % grid.block == 0 and grid.bits < _BYTE_BITS:
        return _packed_columns(codes.T, grid, middle).reshape(len(codes), -1, grid.block * grid.bits // _BYTE_BITS)
    parts = by_rows(_packed_rows, codes, grid=grid, middle=middle)
    return np.concatenate(parts).reshape(len(codes), -1, grid.block * grid.bits // _BYTE_BITS)


def _packed_columns(columns: Array, grid: Grid, middle: np.uint8) -> Array:
    """Return packed codes [outputs, bytes] of codes stored [inputs, outputs]: packed first, a byte is moved once."""
    each = _BYTE_BITS // grid.bits
    unsigned = columns.view(np.uint8).reshape(-1, each, columns.shape[1])
    moved = middle if grid.symmetric else np.uint8(0)
    mask = np.uint8((1 << grid.bits) - 1)
    result = (unsigned[:, 0] + moved) & mask
    for place in range(1, each):
        result |= ((unsigned[:, place] + moved) & mask) << np.uint8(grid.bits * place)
    return np.ascontiguousarray(result.T)


def _packed_rows(codes: Array, *, grid: Grid, middle: np.uint8) -> Array:
    unsigned = codes.view(np.uint8)
    if grid.symmetric:
        unsigned = (unsigned + middle) & np.uint8((1 << grid.bits) - 1)
    missing = -codes.shape[1] % (grid.block or 1)
    if missing:
        # What is multiplied by these is zero, or not there, so any code does; the middle one reads best.
        unsigned = np.pad(unsigned, ((0, 0), (0, missing)), constant_values=middle)
    return packed(unsigned, grid.bits)


def packed(codes: Array, bits: int) -> Array:
    """Return unsigned codes [..., count] as uint8 [..., bytes], low bits first; the last byte is filled with zeros."""
    each = _BYTE_BITS // bits
    if each == 1:
        return codes
    if codes.shape[-1] % each:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    # As many codes as go into a byte are one number of as many bytes, whose codes are moved together.
    wide = np.ascontiguousarray(codes).view(f"<u{each}")
    result = wide.copy()
    for place in range(1, each):
        result |= wide >> wide.dtype.type((_BYTE_BITS - bits) * place)
    return result.astype(np.uint8)


def unpacked(data: Array, bits: int, count: int) -> Array:
    """Return uint8 [..., count], the codes that `packed` put into bytes."""
    each = _BYTE_BITS // bits
    places = [(data >> np.uint8(bits * place)) & np.uint8((1 << bits) - 1) for place in range(each)]
    return np.stack(places, axis=-1).reshape(*data.shape[:-1], -1)[..., :count]
