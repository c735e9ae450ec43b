"""Codes of 1 to 8 bits in whole bytes: as they are where they fill bytes, else split into parts that do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from graphopt.backend import Array

BYTE_CODES = 256
_BYTE_BITS = 8
# Bits of a code, highest first, in parts that fill bytes evenly.
_PARTS: dict[int, tuple[int, ...]] = {
    1: (1,),
    2: (2,),
    3: (2, 1),
    4: (4,),
    5: (4, 1),
    6: (4, 2),
    7: (4, 2, 1),
    8: (8,),
}


def bits_for(entries: int) -> int:
    """Return the bits of a code that tells so many entries apart."""
    return max(1, (entries - 1).bit_length())


def plane_bits(bits: int) -> tuple[tuple[int, int], ...]:
    """Return the planes that codes are split into: (bits, how far they are shifted in the code), highest first."""
    shift, planes = bits, []
    for part in _PARTS[bits]:
        shift -= part
        planes.append((part, shift))
    return tuple(planes)


def codes_per_step(bits: int) -> int:
    """Return how many codes fill whole bytes in every plane: 1, 2, 4 or 8."""
    return _BYTE_BITS // min(_PARTS[bits])


def packed_planes(codes: Array, bits: int) -> list[Array]:
    """Return codes [rows, count] as uint8 [rows, bytes] for each plane; a byte's first code has its high bits.

    What a row lacks to whole bytes is filled with zeros.
    """
    missing = -codes.shape[1] % codes_per_step(bits)
    filled = np.pad(codes, ((0, 0), (0, missing))) if missing else codes
    return [_packed(filled >> np.uint8(shift), part) for part, shift in plane_bits(bits)]


def _packed(codes: Array, bits: int) -> Array:
    each = _BYTE_BITS // bits
    if each == 1:
        return np.ascontiguousarray(codes)
    mask = np.uint8((1 << bits) - 1)
    result = np.zeros((codes.shape[0], codes.shape[1] // each), np.uint8)
    for place in range(each):
        result |= (codes[:, place::each] & mask) << np.uint8(bits * (each - 1 - place))
    return result


def unpacking_table(bits: int, shift: int = 0) -> Array:
    """Return what each byte of a plane adds to its codes, uint8 [256, codes in a byte]."""
    each = _BYTE_BITS // bits
    numbers = np.arange(BYTE_CODES)
    parts = [numbers >> (bits * (each - 1 - place)) & (2**bits - 1) for place in range(each)]
    return (np.stack(parts, axis=1) << shift).astype(np.uint8)


def unpacked_planes(planes: Sequence[Array], bits: int, count: int) -> Array:
    """Return the codes [rows, count] that `packed_planes` put into bytes."""
    total: Any = np.uint8(0)
    for plane, (part, shift) in zip(planes, plane_bits(bits), strict=True):
        total = total + unpacking_table(part, shift)[plane].reshape(len(plane), -1)
    return np.asarray(total, np.uint8)[:, :count]


def stored_bytes(count: int, bits: int) -> int:
    """Return what so many codes take, packed in one go."""
    step = codes_per_step(bits)
    return -(-count // step) * step * bits // _BYTE_BITS
