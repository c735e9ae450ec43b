"""Operators that make sizes of tensors, or tensors of sizes.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .moved import CARRIERS, moving
from .operators import Operator, Table
from .tensors import torch_dtype


def shape(data: Any, *, start: int = 0, end: int | None = None) -> Tensor:
    """Sizes, those of axes from `start` to `end`: int64, never on an accelerator."""
    return torch.tensor(tuple(data.shape)[start:end], dtype=torch.int64)


def size(data: Any) -> Tensor:
    """The number of elements: int64, never on an accelerator."""
    return torch.tensor(math.prod(data.shape), dtype=torch.int64)


@moving
def _filled(value: Tensor, sizes: tuple[int, ...]) -> Tensor:
    return value.reshape(()).expand(sizes)


def constant_of_shape(sizes: Tensor, *, device: torch.device, value: Any = None) -> Any:
    """One value throughout, by default the float zero."""
    value = torch.zeros(1) if value is None else value
    return _filled(value if isinstance(value, np.ndarray) else value.to(device), tuple(sizes.tolist()))


def range_(start: Tensor, limit: Tensor, delta: Tensor, *, device: torch.device, stash_type: int = 1) -> Tensor:
    """Numbers from `start` in steps, none at `limit` or beyond; floats of 16 bits are counted in wider ones."""
    first, end, step = start.item(), limit.item(), delta.item()
    if not start.dtype.is_floating_point:
        count = max(0, -((first - end) // step))  # a quotient of floats would be off for large integers
        return (torch.arange(count, device=device) * step + first).to(start.dtype)
    count = max(0, math.ceil((end - first) / step))
    # Written as ONNX defines it, start + i × delta; torch.arange adds up in another dtype.
    wide = start.dtype if start.dtype in (torch.float32, torch.float64) else torch_dtype(stash_type)
    steps = torch.arange(count, device=device, dtype=wide)
    return (start.to(device, wide) + steps * delta.to(device, wide)).to(start.dtype)


def eye_like(data: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    """Ones on a diagonal of a matrix of the input's shape."""
    wanted = data.dtype if dtype is None else torch_dtype(dtype)
    rows = torch.arange(data.shape[0], device=data.device).unsqueeze(1)
    columns = torch.arange(data.shape[1], device=data.device)
    ones = columns - rows == k
    return (ones.byte() if wanted in CARRIERS else ones).to(wanted)


OPERATORS: Table = {
    "ConstantOfShape": Operator(constant_of_shape, since=9, sizes=(0,)),
    "EyeLike": Operator(eye_like, since=9),
    "Range": Operator(range_, since=11, sizes=(0, 1, 2)),
    "Shape": Operator(shape),
    "Size": Operator(size),
}
