"""How far outputs may be off, of how far they were: the tolerances of emitted tests."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.comparison import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE, OutputError

# How much more than was measured is allowed: of errors between runs that should agree, which hang on the machine, and
# of errors against the original, which do not.
RUN_MARGIN, ORIGINAL_MARGIN = 2.0, 1.5
# Weights are nudged by this share of themselves: some ten roundings of float32. What is quantized then rounds to other
# codes here and there, as it does on a machine with other kernels.
RUN_NUDGE = 1e-6
_DIGITS = 3


@dataclass(frozen=True)
class Bound:
    """How far an output may be off; None leaves it open.

    Attributes:
        max_abs_error: The largest absolute error of an element.
        sqnr_db: The least signal to noise ratio, in dB.
    """

    max_abs_error: float | None = None
    sqnr_db: float | None = None

    def fault(self, error: OutputError) -> str | None:
        """Return what an error breaks of it, in words, or None."""
        # Where nothing is asked for, NaN may be at other places. Another dtype or shape may not: it has no elements.
        if error.mismatch is not None and (self != Bound() or not error.elements):
            return error.mismatch
        if self.max_abs_error is not None and not error.max_abs <= self.max_abs_error:
            return f"off by {error.max_abs:.3g} of {error.peak:.3g}; at most {self.max_abs_error} is allowed"
        if self.sqnr_db is not None and not error.sqnr_db >= self.sqnr_db:
            return f"{error.sqnr_db:.1f} dB; at least {self.sqnr_db} dB are asked for"
        return None


@dataclass(frozen=True)
class Noise:
    """How far outputs of runs that should agree are apart: the largest error, the lowest ratio, and of what."""

    dtype: str
    peak: float
    max_abs: float
    sqnr_db: float

    @classmethod
    def of(cls, errors: Sequence[OutputError]) -> Noise:
        """Return the worst of several comparisons of one output."""
        return cls(
            errors[0].dtype,
            max(error.peak for error in errors),
            max(error.max_abs for error in errors),
            min(error.sqnr_db for error in errors),
        )

    @property
    def rounding(self) -> float:
        """The largest error that rounding of the dtype makes."""
        relative, absolute = RELATIVE_TOLERANCE.get(self.dtype, 0.0), ABSOLUTE_TOLERANCE.get(self.dtype, 0.0)
        return relative * self.peak + absolute

    @property
    def is_rounding(self) -> bool:
        """Whether all that is allowed for it is rounding."""
        return RUN_MARGIN * self.max_abs <= self.rounding


def bound(noise: Noise) -> Bound:
    """Return how far outputs may be off that should agree: rounding of the dtype, or `RUN_MARGIN` times the noise."""
    if not math.isfinite(noise.max_abs):
        return Bound()
    relative, absolute = RELATIVE_TOLERANCE.get(noise.dtype, 0.0), ABSOLUTE_TOLERANCE.get(noise.dtype, 0.0)
    largest = max(noise.rounding, RUN_MARGIN * noise.max_abs)
    if not relative or relative * noise.peak < absolute:  # integers, or all so small that no ratio means anything
        return Bound(_up(largest))
    return Bound(_up(largest), _down(min(_decibels(1 / relative), noise.sqnr_db - _decibels(RUN_MARGIN))))


def lossy_bound(loss: Noise, steady: Bound) -> Bound:
    """Return how far outputs may be off the original's: `ORIGINAL_MARGIN` times what they are, and what runs differ."""
    if not math.isfinite(loss.max_abs) or steady.max_abs_error is None:
        return Bound()
    largest = max(ORIGINAL_MARGIN * loss.max_abs, loss.max_abs + steady.max_abs_error)
    if steady.sqnr_db is None:
        return Bound(_up(largest))
    share, apart = (10 ** (-decibels / 20) for decibels in (loss.sqnr_db, steady.sqnr_db))
    return Bound(_up(largest), _down(-_decibels(max(ORIGINAL_MARGIN * share, share + apart))))


def _decibels(ratio: float) -> float:
    return 20 * math.log10(ratio)


def _up(value: float) -> float:
    """Round up to a few digits."""
    if value <= 0:
        return 0.0
    unit = 10.0 ** (math.floor(math.log10(value)) - _DIGITS + 1)
    return float(f"{math.ceil(value / unit) * unit:.{_DIGITS}g}")


def _down(decibels: float) -> float:
    return math.floor(decibels * 10) / 10
