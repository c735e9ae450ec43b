"""Tensors derived from stored ones by moving or casting elements: made when they are written, not before."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt
import onnx_ir as ir

Array = npt.NDArray[Any]

BLOCK_BYTES = 4 << 20
"""Bytes of a derived tensor that are made at a time while it is written."""

# A transpose is copied in tiles so small that the cache keeps both sides: five times the speed of numpy's own copy.
_TILE_ROWS, _TILE_COLUMNS = 512, 16
_BYTE_BITS = 8


class DerivedTensor(ir.TensorProtocol):
    """An immutable tensor that is another one transposed, sliced, reshaped or cast.

    It costs nothing until its bytes are asked for, and then a block of rows at a time; a reshape of a transpose, and a
    tensor whose first axis is short, are made whole. Use `transposed`,
    `sliced`, `reshaped`, `cast` and `thinned` to make one.

    Args:
        source: The tensor it is derived from.
        view: Takes the source's array to the derived one; elements are cast apart from it.
        dtype: The element type.
        shape: The shape that ``view`` gives.
    """

    def __init__(
        self, source: ir.TensorProtocol, view: Callable[[Array], Array], dtype: ir.DataType, shape: Sequence[int]
    ) -> None:
        self.source = source
        self.name: str | None = None
        self.doc_string: str | None = None
        self.metadata_props: dict[str, str] = {}
        self.meta: dict[str, Any] = {}
        self._view = view
        self._dtype = dtype
        self._shape = ir.Shape(shape)
        self._shape.freeze()

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        """The element type."""
        return self._dtype

    @property
    def shape(self) -> ir.Shape:  # type: ignore[override]
        """The shape."""
        return self._shape

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self._shape.numpy())

    @property
    def nbytes(self) -> int:
        """The number of bytes that the dtype and shape need."""
        return -(-self.size * self._dtype.bitwidth // _BYTE_BITS)

    @property
    def raw(self) -> ir.TensorProtocol:
        """The tensor behind this one."""
        return self.source

    def under(self, name: str) -> Self:
        """Return the same tensor under another name."""
        same = copy.copy(self)
        same.name, same.metadata_props, same.meta = name, {}, {}
        return same

    def numpy(self) -> Array:
        """Return the array: a view of the source's, unless elements are cast."""
        array = self._view(self.source.numpy())
        wanted = np.dtype(self._dtype.numpy())
        return array if array.dtype == wanted else array.astype(wanted)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> Array:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return np.ascontiguousarray(self.numpy()).__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def tobytes(self) -> bytes:
        """Return the bytes, as ONNX stores them."""
        return b"".join(bytes(block) for block in self._blocks())

    def tofile(self, file: BinaryIO) -> None:
        """Append the bytes to a binary file, the next block being made while one is written."""
        blocks = self._blocks()
        with ThreadPoolExecutor(1) as maker:
            made = maker.submit(next, blocks, None)
            while (block := made.result()) is not None:
                made = maker.submit(next, blocks, None)
                file.write(block)
        self.release()

    def release(self) -> None:
        """Let the system take back the memory of the source's pages."""
        release = getattr(self.source, "release", None)
        if release is not None:
            release()

    def _blocks(self) -> Iterator[memoryview]:
        """Yield the bytes in order, in pieces of about `BLOCK_BYTES`."""
        array = self._view(self.source.numpy())
        dtype = np.dtype(self._dtype.numpy()).newbyteorder("<")
        if array.ndim == 0 or array.size == 0:
            yield _bytes_of(np.asarray(array, dtype, order="C"))
            return
        row = max(array.nbytes // len(array), 1)
        rows = max(BLOCK_BYTES // row, 1)
        for start in range(0, len(array), rows):
            yield _bytes_of(_contiguous(array[start : start + rows], dtype))

    def __repr__(self) -> str:
        return f"DerivedTensor<{self._dtype.name},{self._shape}>(name={self.name!r}, source={self.source!r})"


class _Thinned(DerivedTensor):
    """Some elements of some axes of a tensor, gathered a block of rows at a time."""

    def __init__(self, source: ir.TensorProtocol, kept: Mapping[int, Array]) -> None:
        shape = [len(kept[axis]) if axis in kept else size for axis, size in enumerate(source.shape.numpy())]
        super().__init__(source, self._gathered, source.dtype, shape)
        self._kept = kept

    def _gathered(self, array: Array) -> Array:
        # The first axis first: of what is not kept of it, nothing is read.
        for axis in sorted(self._kept):
            array = array.take(self._kept[axis], axis)
        return array

    def _blocks(self) -> Iterator[memoryview]:
        array = self.source.numpy()
        dtype = np.dtype(self._dtype.numpy()).newbyteorder("<")
        first = self._kept.get(0, np.arange(len(array)))
        rows = max(BLOCK_BYTES // max(array.nbytes // max(len(array), 1), 1), 1)
        for start in range(0, len(array), rows):
            chosen = first[np.searchsorted(first, start) : np.searchsorted(first, start + rows)]
            if not len(chosen):
                continue
            # Rows of a transposed tensor are far apart: they are brought together before any are taken.
            block = _contiguous(array[start : start + rows], dtype).take(chosen - start, 0)
            for axis in sorted(self._kept.keys() - {0}):
                block = block.take(self._kept[axis], axis)
            yield _bytes_of(block)


def transposed(source: ir.TensorProtocol, perm: Sequence[int]) -> DerivedTensor:
    """Return a tensor with its axes permuted, as Transpose does."""
    shape = source.shape.numpy()
    return DerivedTensor(source, lambda array: array.transpose(perm), source.dtype, [shape[axis] for axis in perm])


def reshaped(source: ir.TensorProtocol, shape: Sequence[int]) -> DerivedTensor:
    """Return a tensor under another shape of as many elements."""
    if math.prod(shape) != source.size:
        raise ValueError(f"{source.size} elements have no shape {list(shape)}")
    return DerivedTensor(source, lambda array: array.reshape(shape), source.dtype, shape)


def sliced(source: ir.TensorProtocol, slices: Sequence[slice]) -> DerivedTensor:
    """Return a part of a tensor: one slice for each axis."""
    shape = [len(range(*piece.indices(size))) for piece, size in zip(slices, source.shape.numpy(), strict=True)]
    return DerivedTensor(source, lambda array: array[tuple(slices)], source.dtype, shape)


def thinned(source: ir.TensorProtocol, kept: Mapping[int, Array]) -> DerivedTensor:
    """Return some elements of a tensor.

    Args:
        source: The tensor, of one axis or more.
        kept: Axis, counted from the front, to the indices of the elements kept, int64 and ascending.
    """
    return _Thinned(source, kept)


def cast(source: ir.TensorProtocol, dtype: ir.DataType) -> DerivedTensor:
    """Return a tensor with its elements cast as numpy casts them."""
    return DerivedTensor(source, lambda array: array, dtype, source.shape.numpy())


def _contiguous(array: Array, dtype: np.dtype[Any]) -> Array:
    """Return an array in C order and of a dtype, copied only if it is neither."""
    is_transposed = array.ndim == 2 and 0 < array.strides[0] < array.strides[1]
    if not is_transposed:
        return np.asarray(array, dtype, order="C")
    copy = np.empty(array.shape, dtype)
    for row in range(0, array.shape[0], _TILE_ROWS):
        for column in range(0, array.shape[1], _TILE_COLUMNS):
            tile = np.s_[row : row + _TILE_ROWS, column : column + _TILE_COLUMNS]
            copy[tile] = array[tile]
    return copy


def _bytes_of(array: Array) -> memoryview:
    # Types of ml_dtypes have no buffer of their own.
    return array.reshape(-1).view(np.uint8).data
