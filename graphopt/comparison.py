"""Numerics between two models: how far outputs of the same name are apart."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from graphopt.backend import Array
from graphopt.errors import ModelError

# EQUIVALENT: |a - b| may reach this share of the largest |a| of the output, plus this much absolutely.
RELATIVE_TOLERANCE = {"float16": 2e-2, "bfloat16": 1e-1, "float32": 2e-4, "float64": 1e-9}
ABSOLUTE_TOLERANCE = {"float16": 1e-3, "bfloat16": 1e-2, "float32": 1e-5, "float64": 1e-12}
SQNR_CEILING_DB = 200.0


@dataclass
class OutputError:
    """Error of one output, accumulated over runs.

    Attributes:
        max_abs: Largest |a - b|.
        peak: Largest |a|.
        equal: Whether every bit agreed, NaN included.
        mismatch: Why values could not be compared at all, or None.
        elements: How many values there were.
        compared: How many of them say something: not NaN, not infinite, not a stand-in for infinity.
    """

    name: str
    dtype: str = ""
    max_abs: float = 0.0
    peak: float = 0.0
    equal: bool = True
    mismatch: str | None = None
    elements: int = 0
    compared: int = 0
    agree: int = 0
    rows: int = 0
    _noise: float = 0.0
    _signal: float = 0.0
    _other: float = 0.0
    _dot: float = 0.0

    @property
    def max_rel(self) -> float:
        """Largest error as a share of the largest value."""
        return self.max_abs / self.peak if self.peak else (0.0 if self.max_abs == 0 else float("inf"))

    @property
    def sqnr_db(self) -> float:
        """Signal to quantization noise ratio in dB, from -200 to 200; minus infinity where values cannot be compared.

        Where there is no signal at all, -200 stands for what has no logarithm.
        """
        if self.mismatch is not None:
            return float("-inf")
        if self._noise == 0:
            return SQNR_CEILING_DB
        if not self._signal:
            return -SQNR_CEILING_DB
        decibels = 10 * (math.log10(self._signal) - math.log10(self._noise))
        return min(SQNR_CEILING_DB, max(-SQNR_CEILING_DB, decibels))

    @property
    def cosine(self) -> float:
        """Cosine of the angle between all values of the two sides."""
        norm = float(np.sqrt(self._signal * self._other))
        return self._dot / norm if norm else (1.0 if self.max_abs == 0 else 0.0)

    @property
    def top1_agreement(self) -> float | None:
        """Share of rows whose largest entry is at the same place; None where rows make no sense."""
        return self.agree / self.rows if self.rows else None

    def update(self, a: Any, b: Any) -> None:
        """Add one run's values of both sides; a sequence is compared item by item."""
        if isinstance(a, (list, tuple)):
            if not isinstance(b, (list, tuple)) or len(a) != len(b):
                self._reject("sequences of different length")
                return
            for x, y in zip(a, b, strict=True):
                self.update(x, y)
            return
        if isinstance(a, dict) or a is None or b is None:  # an ONNX map, or an empty optional
            if type(a) is not type(b) or a != b:
                self._reject("values differ")
            return
        left, right = np.asarray(a), np.asarray(b)
        self.dtype = str(left.dtype)
        if left.dtype != right.dtype or left.shape != right.shape:
            self._reject(f"{left.dtype}{list(left.shape)} against {right.dtype}{list(right.shape)}")
            return
        self.equal = self.equal and same_bits(left, right)
        if left.size == 0 or left.dtype.kind in "OSU":
            if not self.equal:
                self._reject("values differ")
            return
        self.elements += left.size
        self._accumulate(left, right)

    def _accumulate(self, left: Array, right: Array) -> None:
        x, y = (_without_stand_ins(side) for side in (left, right))
        odd = ~np.isfinite(x) | ~np.isfinite(y)
        agree = True
        if odd.any():
            if not np.array_equal(x[odd], y[odd], equal_nan=True):
                agree = False
                self._reject(_oddity(x, y))
            x, y = np.where(odd, 0.0, x), np.where(odd, 0.0, y)
        self.compared += int(x.size - np.count_nonzero(odd))
        difference = x - y
        self.max_abs = max(self.max_abs, float(np.abs(difference).max()))
        self.peak = max(self.peak, float(np.abs(x).max()))
        self._noise += _dot(difference, difference)
        self._signal += _dot(x, x)
        self._other += _dot(y, y)
        self._dot += _dot(x, y)
        if left.ndim >= 2 and left.shape[-1] > 1 and left.dtype.kind not in "biu":
            self.agree += int((x.argmax(-1) == y.argmax(-1)).sum()) if agree else 0
            self.rows += x.size // x.shape[-1]

    def _reject(self, why: str) -> None:
        self.mismatch, self.equal, self.max_abs = self.mismatch or why, False, float("inf")

    def within(self, tolerance: float | None = None) -> bool:
        """Return whether the error is rounding: within the dtype's tolerance, or an absolute one given."""
        if self.equal:
            return True
        if self.mismatch is not None:
            return False
        if tolerance is not None:
            return self.max_abs <= tolerance
        relative, absolute = RELATIVE_TOLERANCE.get(self.dtype, 0.0), ABSOLUTE_TOLERANCE.get(self.dtype, 0.0)
        return self.max_abs <= relative * self.peak + absolute

    def as_dict(self) -> dict[str, Any]:
        """Return the figures for a JSON report."""
        return {
            "max_abs_error": self.max_abs,
            "max_rel_error": self.max_rel,
            "cosine": self.cosine,
            "sqnr_db": self.sqnr_db,
            "top1_agreement": self.top1_agreement,
            "equal": self.equal,
            "mismatch": self.mismatch,
        }


@dataclass
class Comparison:
    """Errors of all outputs of two models, by output name.

    Attributes:
        runs: How many feeds were run.
        samples: How many samples were in them.
        source: Where the samples came from; None where they were made up.
        metrics: Metric name to its value on each side, None on the left where it compares with the left.
        metric_types: Metric name to its class, for showing values.
    """

    outputs: dict[str, OutputError] = field(default_factory=dict)
    runs: int = 0
    samples: int = 0
    source: str | None = None
    metrics: dict[str, tuple[float | None, float | None]] = field(default_factory=dict)
    metric_types: Mapping[str, Any] = field(default_factory=dict)

    @property
    def equal(self) -> bool:
        """Whether every bit of every output agreed."""
        return all(output.equal for output in self.outputs.values())

    @property
    def says_nothing(self) -> bool:
        """Whether there were values and none of them was a number to compare."""
        outputs = self.outputs.values()
        return any(one.elements for one in outputs) and not any(one.compared for one in outputs)

    @property
    def max_abs_error(self) -> float:
        """The largest absolute error of any output."""
        return max((output.max_abs for output in self.outputs.values()), default=0.0)

    @property
    def sqnr_db(self) -> float:
        """The SQNR of the worst output, in dB."""
        return min((output.sqnr_db for output in self.outputs.values()), default=SQNR_CEILING_DB)

    @property
    def worst(self) -> OutputError | None:
        """The output with the largest error relative to its own values."""
        return max(
            self.outputs.values(), key=lambda output: (output.mismatch is not None, output.max_rel), default=None
        )

    def within(self, tolerance: float | None = None) -> bool:
        """Return whether every output is within tolerance."""
        return all(output.within(tolerance) for output in self.outputs.values())

    def update(self, a: Mapping[str, Any], b: Mapping[str, Any]) -> None:
        """Add one run: outputs of both sides by name.

        Raises:
            ModelError: The two sides have different output names.
        """
        require_same_names("output", a, b)
        for name, value in a.items():
            self.outputs.setdefault(name, OutputError(name)).update(value, b[name])
        self.runs += 1


NEW_NAN = "NaN where there was none"


def _oddity(x: Array, y: Array) -> str:
    return NEW_NAN if (np.isnan(y) & ~np.isnan(x)).any() else "NaN or infinity at different places"


def _dot(x: Array, y: Array) -> float:
    """Return the sum of products; a BLAS would split it between threads, which waits for them longer than it takes."""
    return float(np.einsum("i,i->", x.reshape(-1), y.reshape(-1)))


def _without_stand_ins(values: Array) -> Array:
    """Return values as float64, those near the end of their dtype's range as infinities.

    Masks write the lowest number for minus infinity; as a number it would make any other error look like rounding.
    """
    wide = values.astype(np.float64)
    if values.dtype.kind in "biu" or values.dtype == np.float64:
        return wide
    limit = float(ml_dtypes.finfo(values.dtype).max) / 4
    return np.where(np.abs(wide) >= limit, np.copysign(np.inf, wide), wide)


def require_same_names(kind: str, a: Iterable[str], b: Iterable[str]) -> None:
    """Raise a ModelError unless both sides have the same names."""
    left, right = set(a), set(b)
    if left != right:
        only = ", ".join(f"`{name}`" for name in sorted(left ^ right))
        raise ModelError(f"the two models have different {kind}s: {only}", hint=f"{kind}s are matched by name")


def same_bits(a: Array, b: Array) -> bool:
    """Return whether two arrays of one dtype agree in every bit; all NaNs count as one."""
    if a.dtype.kind in "OSU":
        return bool(np.array_equal(a, b))
    if a.tobytes() == b.tobytes():
        return True
    if a.dtype.kind in "biu":
        return False
    a, b = a.reshape(-1), b.reshape(-1)  # rows of bytes have no view of a scalar
    bytes_a, bytes_b = (np.ascontiguousarray(one).view(np.uint8).reshape(one.size, -1) for one in (a, b))
    return bool((~(bytes_a != bytes_b).any(axis=1) | (np.isnan(a) & np.isnan(b))).all())
