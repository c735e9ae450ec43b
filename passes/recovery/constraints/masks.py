"""Zeros that stay zeros: which ones of a weight were made on purpose, and a module that holds them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from graphopt.backend import Array

# Patterns that kernels know: at most so many of so many consecutive numbers are not zero.
_PATTERNS = ((1, 4), (2, 4), (4, 8))
# Weights were pruned to a pattern if they hold about as many numbers as it lets them; others keep to it by chance.
_LEAST_OF_PATTERN = 0.75
# Rounding a smooth distribution to 8 bits makes about as many codes 0 as 1 or -1. Pruning leaves few beside the zeros.
_MADE_BY_PRUNING = 4
# With fewer codes than these, rounding alone makes that many zeros of weights of which a few are large. But what has
# one peak, at zero, gives each code no more often than the one before it; what was pruned has a gap beside its zeros.
_MANY_CODES = 64


@dataclass(frozen=True)
class Pattern:
    """At most `kept` of `group` consecutive numbers along an axis are not zero."""

    kept: int
    group: int
    axis: int

    def __str__(self) -> str:
        """Return it as users write it."""
        return f"{self.kept}:{self.group}"

    def holds(self, array: Array) -> bool:
        """Return whether an array keeps to it."""
        moved = np.moveaxis(array, self.axis, -1)
        return bool((np.count_nonzero(moved.reshape(-1, self.group), axis=1) <= self.kept).all())


def pattern_of(array: Array) -> Pattern | None:
    """Return the strictest pattern that the zeros of an array keep to, or None."""
    if array.ndim < 2 or 2 * np.count_nonzero(array) > array.size:
        return None
    for kept, group in _PATTERNS:
        for axis, size in enumerate(array.shape):
            pattern = Pattern(kept, group, axis)
            is_filled = np.count_nonzero(array) >= _LEAST_OF_PATTERN * array.size * kept / group
            if size and size % group == 0 and is_filled and pattern.holds(array):
                return pattern
    return None


def kept_of_floats(array: Array) -> Array | None:
    """Return where an array of floats is not zero, bool; None where it nowhere is."""
    kept = np.asarray(array) != 0
    return None if kept.all() else kept


def kept_of_codes(codes: Array, *, on_purpose: bool) -> Array | None:
    """Return where codes, zero points taken off, are not zero; None where rounding alone may have made the zeros.

    Args:
        codes: int32, codes less their zero points.
        on_purpose: Whether all zeros were made on purpose, and need not stand out.
    """
    kept = codes != 0
    if kept.all():
        return None
    return kept if on_purpose or _stand_out(codes) or pattern_of(codes) is not None else None


def _stand_out(codes: Array) -> bool:
    """Return whether there are more zeros among codes than rounding makes."""
    counts = np.bincount(np.abs(codes).reshape(-1))
    if 2 * counts[0] <= _MADE_BY_PRUNING * counts[1]:
        return False
    return len(counts) >= _MANY_CODES or counts[1] < counts[2:].max(initial=0)


class Masked(nn.Module):
    """Gives a weight, with zeros where they are held; no gradient goes there.

    Args:
        kept: bool, shaped like the weight; False where it stays zero.
    """

    kept: torch.Tensor

    def __init__(self, kept: Array) -> None:
        super().__init__()
        # It follows from the model: no checkpoint needs it.
        self.register_buffer("kept", torch.from_numpy(np.ascontiguousarray(kept)), persistent=False)

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight; a product with a mask would make some of the zeros negative ones."""
        return torch.where(self.kept, weight, torch.zeros((), dtype=weight.dtype, device=weight.device))
