"""What torch trained as the arrays a model stores: in each constant's own dtype, sparse where it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.sparse import SparselyStored

if TYPE_CHECKING:
    import torch

# Codes are of 32 bits at the most.
_LARGEST_CODE = 2.0**32


def as_array(tensor: torch.Tensor, dtype: ir.DataType) -> Array:
    """Return a tensor as an array of an ONNX dtype.

    Args:
        tensor: Floats as a model computes with them, or codes as floats that hold integers.
        dtype: What the constant is stored in; integers of 4 bits and floats of 8 are ml_dtypes' own.

    Raises:
        OverflowError: A code is none that the dtype holds, or no number.
    """
    plain = tensor.detach().cpu()
    if dtype.is_integer():
        wide = np.rint(plain.double().numpy())
        if not (np.abs(wide) <= _LARGEST_CODE).all():
            raise OverflowError("codes that are no numbers, or no codes")
        codes: Array = wide.astype(np.int64).astype(dtype.numpy())
        if (codes.astype(np.int64) != wide).any():
            raise OverflowError(f"codes of {wide.min():g} to {wide.max():g} in {dtype.name.lower()}")
        return codes
    if dtype == ir.DataType.DOUBLE:
        return np.array(plain.double().numpy())
    # Every other float fits into float32 exactly; a number that was rounded already is not rounded again.
    return np.array(plain.float().numpy().astype(dtype.numpy()))


def as_floats(tensor: ir.TensorProtocol) -> torch.Tensor:
    """Return what a constant holds in memory of its own: float64 for double, else float32."""
    import torch

    wide = np.float64 if tensor.dtype == ir.DataType.DOUBLE else np.float32
    return torch.from_numpy(np.array(tensor.numpy()).astype(wide))


def stored_tensor(value: ir.Value, array: Array) -> ir.TensorProtocol:
    """Return the tensor a constant is to hold, stored as the present one is: sparse ones stay sparse."""
    tensor = ir.tensor(array, name=value.name)
    return SparselyStored(tensor) if isinstance(walk.constant_tensor(value), SparselyStored) else tensor
