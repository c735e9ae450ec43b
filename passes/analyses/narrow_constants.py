"""What becomes of constants in a half format: what overflows, what is flushed to zero, what is a mask."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array

from .float_risks import format_limits

# Numbers beyond this stand for infinity: what exporters add to scores that must not count.
ENDLESS = 1e9
# Operators that read such a number as a bound, and others that compute with it. Of two masks that are added, half of
# the largest number each is just in range.
_BOUNDED_OPS = frozenset({"Clip", "Greater", "GreaterOrEqual", "Less", "LessOrEqual", "Max", "Min", "Pad"})
_MASKING_OPS = frozenset(
    {"Add", "Concat", "ConstantOfShape", "Expand", "Mul", "ScatterElements", "ScatterND", "Sub", "Tile", "Where"}
)
# A single number is part of the arithmetic (an epsilon, a factor), and may not vanish; of many, some may.
_FEW = 16
# Elements looked at together: temporaries stay small beside a large weight.
_PIECE = 1 << 20
_LOST_SHARE = 0.01


@dataclass(frozen=True)
class Survey:
    """What becomes of a constant in a half format.

    Attributes:
        overflowing: Finite numbers that become infinite.
        endless: How many of these stand for infinity.
        flushed: Numbers that become zero.
        size: How many numbers there are.
        signal: Sum of the squares, as float64.
        noise: Sum of the squared errors, of numbers that do not overflow.
        lost: Whether one of a few numbers loses more than a hundredth of itself.
    """

    overflowing: int
    endless: int
    flushed: int
    size: int
    signal: float
    noise: float
    lost: bool

    @property
    def sqnr(self) -> float:
        """Signal to noise in dB; infinite where nothing is lost."""
        if self.noise == 0:
            return float("inf")
        return 10 * float(np.log10(max(self.signal, 1e-300) / self.noise))


def survey(tensor: ir.TensorProtocol, dtype: ir.DataType) -> Survey:
    """Return what becomes of a float32 tensor in a half format, reading it a piece at a time."""
    flat = np.asarray(tensor.numpy()).reshape(-1)
    narrow = np.dtype(dtype.numpy())
    overflowing = endless = flushed = 0
    signal = noise = 0.0
    lost = False
    for start in range(0, len(flat), _PIECE):
        piece = flat[start : start + _PIECE]
        with np.errstate(over="ignore", invalid="ignore"):
            rounded = piece.astype(narrow).astype(np.float32)
            finite = np.isfinite(piece)
            over = finite & ~np.isfinite(rounded)
            difference = np.where(finite & ~over, piece - rounded, 0).astype(np.float64)
        overflowing += int(np.count_nonzero(over))
        endless += int(np.count_nonzero(over & (np.abs(piece) >= ENDLESS)))
        flushed += int(np.count_nonzero((rounded == 0) & (piece != 0)))
        kept = np.where(finite & ~over, piece, 0).astype(np.float64)
        signal += float(np.vdot(kept, kept))
        noise += float(np.vdot(difference, difference))
        lost = lost or (flat.size <= _FEW and bool((np.abs(difference) > _LOST_SHARE * np.abs(kept)).any()))
    release = getattr(tensor, "release", None)
    if release is not None:
        release()
    return Survey(overflowing, endless, flushed, flat.size, signal, noise, lost)


def mask_bound(node: ir.Node, dtype: ir.DataType) -> float | None:
    """Return what numbers that stand for infinity become where a node reads them, or None where it needs them."""
    largest = float(format_limits(dtype).max)
    if walk.is_onnx_op(node, *_BOUNDED_OPS):
        return largest
    return largest / 2 if walk.is_onnx_op(node, *_MASKING_OPS) else None


def clamped(tensor: ir.TensorProtocol, bound: float) -> Array:
    """Return a float32 array whose numbers that stand for infinity are as large as allowed; infinity itself stays."""
    array = tensor.numpy()
    endless = np.isfinite(array) & (np.abs(array) >= ENDLESS)
    return np.where(endless, np.copysign(np.float32(bound), array), array).astype(np.float32)
