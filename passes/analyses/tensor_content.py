"""Which tensors hold the same: told from where they lie, a few first bytes, a digest, and last from all bytes."""

from __future__ import annotations

import hashlib
import itertools
import sys
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.mapped import COPY_CHUNK, MappedTensor

T = TypeVar("T")

# Weights differ in their first few numbers; what begins alike is read whole.
PREFIX_BYTES = 1024
# Tensors that must be made before they can be read are not, beyond this size.
LARGEST_MADE = 1 << 20
# The system maps more than the page it is asked for, up to one of its huge pages, before and behind.
MAPPED_AROUND = 2 << 20
_PREFIX, _DIGEST = "graphopt.prefix", "graphopt.digest"
_BYTE_BITS = 8
_UNSIGNED = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


def equal_tensors(tensors: Sequence[ir.TensorProtocol]) -> list[list[int]]:
    """Return which of some tensors, all of one dtype and shape, hold the same bytes.

    A tensor is read only as far as it begins like another one, in pieces whose memory is given back. What was learned
    stays with the tensor, so that asking again costs nothing.

    Returns:
        Groups of two and more indices, each in order.
    """
    by_place = grouped(range(len(tensors)), lambda index: _place(tensors[index]))
    if len(by_place) == 1:
        return [by_place[0]] if len(by_place[0]) > 1 else []
    readable = [group for group in by_place if _is_readable(tensors[group[0]])]
    found = [group for group in by_place if len(group) > 1 and not _is_readable(tensors[group[0]])]
    for alike in grouped(readable, lambda group: _prefix(tensors[group[0]])):
        for same in grouped(alike, lambda group: _digest(tensors[group[0]])) if len(alike) > 1 else [alike]:
            first = same[0]
            proven = [other for other in same[1:] if _same_bytes(tensors[first[0]], tensors[other[0]])]
            group = sorted(itertools.chain(first, *proven))
            if len(group) > 1:
                found.append(group)
    return found


def grouped(items: Iterable[T], key: Callable[[T], Hashable]) -> list[list[T]]:
    """Return items in lists, one for each key, in the order in which keys appear."""
    groups: dict[Hashable, list[T]] = {}
    for item in items:
        groups.setdefault(key(item), []).append(item)
    return list(groups.values())


def _place(tensor: ir.TensorProtocol) -> Hashable:
    """Return where the bytes of a tensor are."""
    return (id(tensor.file), tensor.offset) if isinstance(tensor, MappedTensor) else id(tensor)


def _is_readable(tensor: ir.TensorProtocol) -> bool:
    if tensor.dtype == ir.DataType.STRING:
        return False
    return isinstance(tensor, MappedTensor | ir.Tensor) or tensor.nbytes <= LARGEST_MADE


def _prefix(tensor: ir.TensorProtocol) -> bytes:
    known: bytes | None = tensor.meta.get(_PREFIX)
    if known is None:
        known = tensor.meta[_PREFIX] = next(_pieces(tensor, PREFIX_BYTES), b"")
    return known


def _digest(tensor: ir.TensorProtocol) -> bytes:
    known: bytes | None = tensor.meta.get(_DIGEST)
    if known is None:
        state = hashlib.blake2b(digest_size=16)
        for piece in _pieces(tensor, COPY_CHUNK):
            state.update(piece)
        known = tensor.meta[_DIGEST] = state.digest()
    return known


def _same_bytes(one: ir.TensorProtocol, other: ir.TensorProtocol) -> bool:
    if one.nbytes <= PREFIX_BYTES:
        return True  # the prefix was all of it
    pairs = itertools.zip_longest(_pieces(one, COPY_CHUNK), _pieces(other, COPY_CHUNK))
    return all(a == b for a, b in pairs)


def _pieces(tensor: ir.TensorProtocol, size: int) -> Iterator[bytes]:
    """Yield the bytes as ONNX stores them, a piece at a time."""
    if isinstance(tensor, MappedTensor):
        mapping = tensor.file.mapping()
        for start in range(tensor.offset, tensor.offset + tensor.length, size):
            length = min(size, tensor.offset + tensor.length - start)
            piece = mapping[start : start + length]
            tensor.file.release(max(start - MAPPED_AROUND, 0), length + 2 * MAPPED_AROUND)
            yield piece
        return
    whole = _flat(tensor).data
    for start in range(0, len(whole), size):
        yield bytes(whole[start : start + size])


def elements_of(tensor: ir.TensorProtocol) -> Array:
    """Return the elements of a tensor of whole bytes; those of a file are mapped, and not in memory until read."""
    array = tensor.numpy()
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def bits_of(array: Array) -> Array:
    """Return the bits of numbers of whole bytes as unsigned integers, without a copy."""
    return array.view(_UNSIGNED[array.dtype.itemsize])


def _flat(tensor: ir.TensorProtocol) -> Array:
    """Return the bytes of a tensor in memory, without a copy where it lies there as ONNX stores it."""
    if isinstance(tensor, ir.Tensor) and tensor.dtype.bitwidth >= _BYTE_BITS and sys.byteorder == "little":
        return np.ascontiguousarray(tensor.numpy()).reshape(-1).view(np.uint8)
    return np.frombuffer(tensor.tobytes(), np.uint8)
