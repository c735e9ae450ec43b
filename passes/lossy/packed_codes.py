"""Codes of few bits packed into bytes, as ONNX Runtime's operators on blocks read them."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array

from ..solvers.grid import Grid

_BYTE_BITS = 8


def packed_codes(codes: Array, grid: Grid) -> Array:
    """Return codes as uint8 [outputs, blocks, bytes of a block], the first code of each byte in its lowest bits.

    Args:
        codes: [outputs, inputs] on the grid; signed ones are moved up, so that the middle code stands for zero. A
            short last block is filled with the code of zero.
        grid: Their grid, with blocks.
    """
    assert grid.block is not None, "only blocks are packed"
    outputs, inputs = codes.shape
    middle = 1 << grid.bits - 1
    unsigned = codes.astype(np.int8, copy=False).view(np.uint8) + np.uint8(middle) if grid.symmetric else codes
    if inputs % grid.block:
        # What is multiplied by these is zero, or not there, so any code does; the middle one reads best.
        unsigned = np.pad(unsigned, ((0, 0), (0, -inputs % grid.block)), constant_values=middle)
    return packed(unsigned & np.uint8((1 << grid.bits) - 1), grid.bits).reshape(
        outputs, -1, grid.block * grid.bits // 8
    )


def packed(codes: Array, bits: int) -> Array:
    """Return unsigned codes [..., count] as uint8 [..., bytes], low bits first; the last byte is filled with zeros."""
    each = _BYTE_BITS // bits
    if each == 1:
        return codes
    if codes.shape[-1] % each:
        codes = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % each)])
    result = codes[..., ::each].copy()
    for place in range(1, each):
        result |= codes[..., place::each] << np.uint8(bits * place)
    return result


def unpacked(data: Array, bits: int, count: int) -> Array:
    """Return uint8 [..., count], the codes that `packed` put into bytes."""
    each = _BYTE_BITS // bits
    places = [(data >> np.uint8(bits * place)) & np.uint8((1 << bits) - 1) for place in range(each)]
    return np.stack(places, axis=-1).reshape(*data.shape[:-1], -1)[..., :count]
