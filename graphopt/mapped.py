"""Tensors whose bytes stay in a file: one mapping per file, arrays without a copy."""

from __future__ import annotations

import errno
import math
import mmap
import os
import stat
import sys
import weakref
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
import onnx
import onnx_ir as ir

from graphopt.derived import DerivedTensor
from graphopt.errors import ModelError

COPY_CHUNK = 1 << 20
"""Bytes copied at a time through memory: large enough for full disk speed, small enough not to be felt."""

_KERNEL_COPY_UNSUPPORTED = {errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EXDEV}
_BYTE_BITS = 8


class MappedFile:
    """A read-only mapping of a whole file, shared by all tensors in it.

    A mapping costs one file descriptor. A pinned file keeps its mapping, and with it the data, even when the path is
    replaced. Any other file is mapped again when an array of it is asked for, and must not have changed since.
    """

    __slots__ = ("__weakref__", "_identity", "_mapping", "_pinned", "path", "size")

    def __init__(self, path: str, *, pinned: bool = True) -> None:
        self.path = path
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise ModelError(f"`{path}` is not a regular file", hint="give the path of a file on disk")
            self._identity = _identity(status)
            self.size = status.st_size
            mapping = _map(file, self.size)
        self._mapping = weakref.ref(mapping)
        self._pinned = mapping if pinned else None

    def mapping(self) -> mmap.mmap:
        """Return the mapping, made again if nothing held it."""
        mapping = self._mapping()
        if mapping is None:
            with open(self.path, "rb") as file:
                if _identity(os.fstat(file.fileno())) != self._identity:
                    raise ModelError(f"`{self.path}` has changed since it was loaded", hint="load the model again")
                mapping = _map(file, self.size)
            self._mapping = weakref.ref(mapping)
        return mapping

    def writable(self) -> mmap.mmap | None:
        """Return a mapping of its own whose pages are copied when they are written, so that the file never is.

        None where there can be none: the path leads to another file by now, or the system does not promise the memory.
        """
        try:
            with open(self.path, "rb") as file:
                if _identity(os.fstat(file.fileno())) != self._identity or not self.size:
                    return None
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        except OSError:
            return None

    def copy_to(self, file: BinaryIO, offset: int, length: int) -> None:
        """Append bytes of this file to another, inside the kernel where it can."""
        copied = self._copy_in_kernel(file, offset, length)
        with memoryview(self.mapping()) as view:
            for start in range(offset + copied, offset + length, COPY_CHUNK):
                file.write(view[start : min(start + COPY_CHUNK, offset + length)])
        self.release(offset, length)

    def _copy_in_kernel(self, file: BinaryIO, offset: int, length: int) -> int:
        """Return how many bytes the kernel copied; the rest is for the caller."""
        copy = getattr(os, "copy_file_range", None)
        if copy is None or not _is_regular(file):
            return 0
        try:
            source = os.open(self.path, os.O_RDONLY)
        except OSError:
            return 0
        copied = 0
        try:
            # The path may name another file by now, for example the model just saved over its own source.
            if _identity(os.fstat(source)) != self._identity:
                return 0
            file.flush()
            target = file.tell()
            while copied < length:
                done = copy(source, file.fileno(), length - copied, offset + copied, target + copied)
                if done == 0:
                    break
                copied += done
        except OSError as error:
            if error.errno not in _KERNEL_COPY_UNSUPPORTED:
                raise
        finally:
            os.close(source)
            if copied:
                # Explicit offsets leave the position of the file where it was.
                file.seek(target + copied)
        return copied

    def release(self, offset: int = 0, length: int | None = None) -> None:
        """Let the system take back the memory of these pages; they are read again when touched."""
        mapping = self._mapping()
        if mapping is None or not hasattr(mapping, "madvise"):
            return
        end = self.size if length is None else offset + length
        start = -(-offset // mmap.PAGESIZE) * mmap.PAGESIZE
        if end > start:
            mapping.madvise(mmap.MADV_DONTNEED, start, end - start)

    def __repr__(self) -> str:
        return f"MappedFile({self.path!r})"


class MappedTensor(ir.TensorProtocol):
    """An immutable tensor that is a range of a mapped file.

    onnx_ir's base class for tensors is not public, so the protocol is met in full here.

    Args:
        file: The file that holds the bytes.
        offset: Where in the file they begin.
        length: How many they are.
        dtype: The element type.
        shape: The shape; frozen here.
        name: The name, as for every tensor of the IR.
        doc_string: The documentation kept with the tensor.
        metadata_props: The metadata kept with the tensor.

    Raises:
        ModelError: The range lies outside the file, or does not hold exactly this dtype and shape.
    """

    def __init__(
        self,
        file: MappedFile,
        offset: int,
        length: int,
        dtype: ir.DataType,
        shape: ir.Shape,
        *,
        name: str | None = None,
        doc_string: str | None = None,
        metadata_props: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.doc_string = doc_string
        self.metadata_props = {} if metadata_props is None else metadata_props
        self.meta: dict[str, Any] = {}
        self.file = file
        self.offset = offset
        self.length = length
        self._dtype = dtype
        self._shape = shape
        self._shape.freeze()
        _check_range(self)

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        """The element type."""
        return self._dtype

    @property
    def shape(self) -> ir.Shape:  # type: ignore[override]
        """The shape."""
        return self._shape

    @property
    def raw(self) -> MappedFile:
        """The file behind this tensor."""
        return self.file

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self._shape.numpy())

    @property
    def nbytes(self) -> int:
        """The number of bytes that the dtype and shape need, packed as ONNX packs them."""
        return -(-self.size * self._dtype.bitwidth // _BYTE_BITS)

    def numpy(self) -> npt.NDArray[Any]:
        """Return a read-only array on the mapped bytes; types below 8 bits are unpacked into a new array."""
        if self._dtype.bitwidth < _BYTE_BITS:
            return self._unpacked()
        if self.length == 0:
            return np.empty(self._shape.numpy(), np.dtype(self._dtype.numpy()))
        return self.array_on(self.file.mapping())

    def array_on(self, mapping: mmap.mmap) -> npt.NDArray[Any]:
        """Return an array on the bytes in a mapping of its file, of a type of 8 bits and more."""
        dtype = np.dtype(self._dtype.numpy()).newbyteorder("<")
        return np.frombuffer(mapping, dtype, count=self.size, offset=self.offset).reshape(self._shape.numpy())

    def _unpacked(self) -> npt.NDArray[Any]:
        proto = onnx.TensorProto(data_type=self._dtype.value, dims=self._shape.numpy(), raw_data=self.tobytes())
        array: npt.NDArray[Any] = ir.serde.TensorProtoTensor(proto).numpy()
        return array

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        array = self.numpy()
        if dtype is not None and array.dtype != dtype:
            return array.astype(dtype)
        return array.copy() if copy else array

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.numpy().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def tobytes(self) -> bytes:
        """Return a copy of the bytes, as ONNX stores them."""
        return self.file.mapping()[self.offset : self.offset + self.length]

    def tofile(self, file: BinaryIO) -> None:
        """Append the bytes to a binary file without holding them in memory."""
        self.file.copy_to(file, self.offset, self.length)

    def release(self) -> None:
        """Let the system take back the memory of this tensor's pages; arrays on it stay valid."""
        self.file.release(self.offset, self.length)

    def __repr__(self) -> str:
        kind = f"{self._dtype.name},{self._shape}"
        return f"MappedTensor<{kind}>(name={self.name!r}, file={self.file.path!r}, offset={self.offset})"


def renamed(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    """Return a tensor of the same content under another name; clones of a model share theirs."""
    shape = ir.Shape(tensor.shape.numpy())
    if isinstance(tensor, MappedTensor):
        return MappedTensor(tensor.file, tensor.offset, tensor.length, tensor.dtype, shape, name=name)
    if tensor.dtype == ir.DataType.STRING:
        return ir.StringTensor(tensor.numpy().reshape(-1).tolist(), shape=shape, name=name)
    if isinstance(tensor, DerivedTensor):
        return tensor.under(name)
    return ir.LazyTensor(
        lambda: ir.Tensor(tensor.numpy(), dtype=tensor.dtype), dtype=tensor.dtype, shape=shape, name=name
    )


def _check_range(tensor: MappedTensor) -> None:
    if tensor.dtype in (ir.DataType.STRING, ir.DataType.UNDEFINED):
        raise ModelError(
            f"tensor `{tensor.name}` of type {tensor.dtype.name} has raw bytes, which ONNX does not allow",
            hint="export the model again",
        )
    if tensor.length != tensor.nbytes:
        raise ModelError(
            f"tensor `{tensor.name}` ({tensor.dtype.name}{list(tensor.shape.numpy())}) needs {tensor.nbytes} bytes"
            f" and `{tensor.file.path}` gives it {tensor.length}",
            hint="the model is damaged, or its data belongs to another model: get both files again",
        )
    if tensor.offset < 0 or tensor.offset + tensor.length > tensor.file.size:
        raise ModelError(
            f"tensor `{tensor.name}` lies at bytes {tensor.offset} to {tensor.offset + tensor.length}"
            f" of `{tensor.file.path}`, which has only {tensor.file.size}",
            hint="the data file is cut short or belongs to another model: get it again",
        )


def _map(file: BinaryIO, size: int) -> mmap.mmap:
    if size == 0:
        # An empty file cannot be mapped; only tensors without elements can lie in one.
        return mmap.mmap(-1, 1, access=mmap.ACCESS_READ)
    if sys.version_info >= (3, 13):
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ, trackfd=False)
    return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def _identity(status: os.stat_result) -> tuple[int, int, int, int]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _is_regular(file: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, AttributeError):
        return False
