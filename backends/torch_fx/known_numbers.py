"""Constants that are only read as numbers, as Python has them: torch.compile and torch.export know what they are."""

from __future__ import annotations

import math
from typing import Any

import torch


class Numbers:
    """What an operator reads of a tensor on the host (`Operator.sizes`), of one that is known.

    Args:
        values: The numbers, nested as the tensor's axes are.
        dtype: The tensor's dtype.
        shape: Its shape.
    """

    def __init__(self, values: Any, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        self._values, self.dtype, self.shape, self.ndim = values, dtype, shape, len(shape)

    def tolist(self) -> Any:
        """Return the numbers, a list of the caller's own where there is an axis."""
        return self._values.copy() if self.ndim else self._values

    def item(self) -> Any:
        """Return the one number."""
        found = self._values
        for _ in range(self.ndim):
            (found,) = found
        return found

    def numel(self) -> int:
        """Return how many there are."""
        return math.prod(self.shape)

    def reshape(self, shape: Any) -> Numbers:
        """Return them in a row, or the one of them by itself."""
        if shape == ():
            return Numbers(self.item(), self.dtype, ())
        assert (shape, self.ndim < 2) == (-1, True), "sizes and axes are in a row"
        return Numbers(self._values if self.ndim else [self._values], self.dtype, (self.numel(),))

    def __int__(self) -> int:
        return int(self.item())

    def __float__(self) -> float:
        return float(self.item())

    def __bool__(self) -> bool:
        return bool(self.item())
