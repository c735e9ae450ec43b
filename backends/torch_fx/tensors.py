"""Tensors of torch and arrays of numpy, in all of ONNX's element types.

Torch has no type of less than a byte: such integers are held one to a byte, and floats of 4 bits, of which torch only
knows pairs, as float32. Strings are arrays of objects.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from graphopt.backend import Array

_TORCH_DTYPES: Mapping[ir.DataType, torch.dtype] = {
    ir.DataType.FLOAT: torch.float32,
    ir.DataType.DOUBLE: torch.float64,
    ir.DataType.FLOAT16: torch.float16,
    ir.DataType.BFLOAT16: torch.bfloat16,
    ir.DataType.FLOAT8E4M3FN: torch.float8_e4m3fn,
    ir.DataType.FLOAT8E4M3FNUZ: torch.float8_e4m3fnuz,
    ir.DataType.FLOAT8E5M2: torch.float8_e5m2,
    ir.DataType.FLOAT8E5M2FNUZ: torch.float8_e5m2fnuz,
    ir.DataType.FLOAT8E8M0: torch.float8_e8m0fnu,
    ir.DataType.FLOAT4E2M1: torch.float32,
    ir.DataType.INT64: torch.int64,
    ir.DataType.INT32: torch.int32,
    ir.DataType.INT16: torch.int16,
    ir.DataType.INT8: torch.int8,
    ir.DataType.INT4: torch.int8,
    ir.DataType.INT2: torch.int8,
    ir.DataType.UINT64: torch.uint64,
    ir.DataType.UINT32: torch.uint32,
    ir.DataType.UINT16: torch.uint16,
    ir.DataType.UINT8: torch.uint8,
    ir.DataType.UINT4: torch.uint8,
    ir.DataType.UINT2: torch.uint8,
    ir.DataType.BOOL: torch.bool,
    ir.DataType.COMPLEX64: torch.complex64,
    ir.DataType.COMPLEX128: torch.complex128,
}
# Types of as many bits that numpy itself has: through them numpy's and torch's arrays share memory.
_CARRIERS: Mapping[int, tuple[Any, torch.dtype]] = {1: (np.uint8, torch.uint8), 2: (np.int16, torch.int16)}
_BYTE = 8
_NATIVE_KINDS = "?bBhHiIlLqQefdFD"


def torch_dtype(code: int) -> torch.dtype:
    """Return what torch holds an ONNX element type in, given by ONNX's code.

    Raises:
        NotImplementedError: Torch has nothing for it; strings are no tensors.
    """
    found = _TORCH_DTYPES.get(ir.DataType(code))
    if found is None:
        raise NotImplementedError(f"torch has no tensors of {ir.DataType(code).name}")
    return found


def onnx_dtype(dtype: torch.dtype) -> ir.DataType:
    """Return the element type torch has one of its own for; those of less than a byte are held in others."""
    return next(one for one, held in _TORCH_DTYPES.items() if held == dtype and one.bitwidth >= _BYTE)


def to_torch(array: Array) -> Any:
    """Return a tensor on the memory of an array, without a copy where there can be none; strings stay as they are.

    An array that may not be written, such as one of a mapped file, gives a tensor that must not be either.
    """
    if array.dtype.kind in "OSUT":
        return array if array.dtype == object else _texts(array)
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    dtype = ir.DataType.from_numpy(array.dtype)
    target = torch_dtype(dtype)
    if any(stride < 0 or stride % array.itemsize for stride in array.strides):
        array = np.ascontiguousarray(array)
    if dtype.bitwidth < _BYTE:
        held = np.float32 if target == torch.float32 else np.int8 if target == torch.int8 else np.uint8
        return torch.from_numpy(array.astype(held))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it cannot be written is meant
        if array.dtype.char in _NATIVE_KINDS:
            return torch.from_numpy(array)
        carrier, _ = _CARRIERS[array.dtype.itemsize]
        return torch.from_numpy(array.view(carrier)).view(target)


def _texts(array: Array) -> Any:
    """Return strings, or bytes of UTF-8, as objects."""
    return (np.char.decode(array, "utf-8") if array.dtype.kind == "S" else array.astype(str)).astype(object)


def to_numpy(tensor: Any, dtype: ir.DataType | None = None) -> Any:
    """Return what a model gives as arrays: of tensors, lists of them, and None.

    Args:
        tensor: The tensor, list, or array of strings.
        dtype: The element type that ONNX declares, which tells those of less than a byte apart; None for torch's own.
    """
    if tensor is None or isinstance(tensor, np.ndarray):
        return tensor
    if isinstance(tensor, (list, tuple)):
        return [to_numpy(one, dtype) for one in tensor]
    tensor = tensor.detach().resolve_conj().resolve_neg().cpu()
    if dtype is not None and dtype.bitwidth < _BYTE:
        return tensor.numpy().astype(dtype.numpy())
    if tensor.dtype in _PLAIN:
        return tensor.numpy()
    _, carrier = _CARRIERS[tensor.element_size()]
    return tensor.contiguous().view(carrier).numpy().view(onnx_dtype(tensor.dtype).numpy())


_PLAIN = frozenset(
    {torch.bool, torch.uint8, torch.int8, torch.uint16, torch.int16, torch.uint32, torch.int32, torch.uint64}
    | {torch.int64, torch.float16, torch.float32, torch.float64, torch.complex64, torch.complex128}
)
