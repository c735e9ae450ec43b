"""Where samples lie while they are trained on: in memory, or in a file that is mapped once they are too many."""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from graphopt.backend import Array
from graphopt.data import Chunk

# Arrays of a mapped file begin at multiples of this, as processors like them.
_ALIGNMENT = 64


class SampleStore:
    """Arrays kept in memory until they are too many, then in a temporary file that is gone with the process.

    Args:
        bytes_in_memory: How many bytes stay in memory.
    """

    def __init__(self, bytes_in_memory: int) -> None:
        self._left = bytes_in_memory
        self._file: Any = None

    def keep(self, array: Array) -> Array | Place:
        """Return the array, or where it is in the file by now."""
        if array.dtype.hasobject or array.nbytes <= self._left:
            self._left -= array.nbytes
            return array
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="graphopt-samples-")  # noqa: SIM115 (open as long as it is mapped)
        self._file.write(b"\0" * (-self._file.tell() % _ALIGNMENT))
        place = Place(self._file.tell(), array.dtype, array.shape)
        self._file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)
        return place

    def mapped(self) -> Array:
        """Return the file's bytes; nothing where there is none."""
        if self._file is None:
            return np.zeros(0, np.uint8)
        self._file.flush()
        return np.memmap(self._file, np.uint8, mode="r")


@dataclass(frozen=True)
class Place:
    """Where an array is in the temporary file."""

    offset: int
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    def read(self, mapped: Array) -> Array:
        """Return the array, as a view of the file."""
        count = int(np.prod(self.shape)) * self.dtype.itemsize
        view: Array = mapped[self.offset : self.offset + count].view(self.dtype).reshape(self.shape)
        return view


def stored(chunk: Chunk, rows: Array, store: SampleStore) -> Chunk:
    """Return the chosen rows of a chunk, put into a store."""
    if not chunk.divisible:
        picked = chunk.arrays
    else:
        whole = len(rows) == chunk.size
        picked = {n: a if whole or not a.ndim else a[rows] for n, a in chunk.arrays.items()}
    labels = chunk.labels if chunk.labels is None or not chunk.divisible else chunk.labels[rows]
    arrays: dict[str, Any] = {name: store.keep(array) for name, array in picked.items()}
    return replace(chunk, arrays=arrays, labels=labels, size=len(rows))


def resolved(chunk: Chunk, mapped: Array) -> Chunk:
    """Return a chunk whose arrays are all there again, once the file is mapped."""
    arrays = {n: a.read(mapped) if isinstance(a, Place) else a for n, a in chunk.arrays.items()}
    return replace(chunk, arrays=arrays)
