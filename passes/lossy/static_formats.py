"""Formats of static quantization: what codes can say, and the grid an activation is put on."""

from __future__ import annotations

import math
from dataclasses import dataclass

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.fusion_rules import Code
from graphopt.ranges import Range
from graphopt.target import IntegerScheme

from ..solvers import grid

# First opset of the ONNX domain whose QuantizeLinear and DequantizeLinear take a format.
_FIRST_OPSETS: dict[str, int] = {
    "int8": 10,
    "uint8": 10,
    "float8e4m3fn": 19,
    "float8e5m2": 19,
    "int16": 21,
    "uint16": 21,
    "int4": 21,
    "uint4": 21,
}
_BITS: dict[str, int] = {"int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "int16": 16, "uint16": 16}
_DTYPES: dict[str, ir.DataType] = {
    "int4": ir.DataType.INT4,
    "uint4": ir.DataType.UINT4,
    "int8": ir.DataType.INT8,
    "uint8": ir.DataType.UINT8,
    "int16": ir.DataType.INT16,
    "uint16": ir.DataType.UINT16,
    "float8e4m3fn": ir.DataType.FLOAT8E4M3FN,
    "float8e5m2": ir.DataType.FLOAT8E5M2,
}


def is_float(code: Code) -> bool:
    """Return whether the codes of a format are floats themselves."""
    return code.startswith("float")


def dtype_of(code: Code) -> ir.DataType:
    """Return the dtype tensors of a format have."""
    return _DTYPES[code]


def first_opset(code: Code) -> int:
    """Return the first opset that quantizes to a format."""
    return _FIRST_OPSETS[code]


def limits(code: Code) -> tuple[float, float]:
    """Return the lowest and the highest code."""
    if is_float(code):
        largest = float(ml_dtypes.finfo(_DTYPES[code].numpy()).max)
        return -largest, largest
    bits = _BITS[code]
    return (0, 2**bits - 1) if code.startswith("u") else (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def encode(scaled: Array, code: Code) -> Array:
    """Return the codes nearest to values given in steps of the grid, zero point added; beyond the ends, the ends."""
    low, high = limits(code)
    whole = scaled if is_float(code) else np.rint(scaled)
    codes: Array = np.clip(whole, low, high).astype(_DTYPES[code].numpy())
    return codes


@dataclass(frozen=True)
class ActivationGrid:
    """The grid of an activation: x = (code − zero_point) * scale; zero is on it exactly."""

    scale: np.float32
    zero_point: int


def activation_grid(span: Range, scheme: IntegerScheme) -> ActivationGrid:
    """Return the grid that covers a range.

    Symmetric grids leave out the lowest code, and floats are always symmetric: their largest code stands for the
    largest magnitude (Micikevicius et al., FP8 Formats for Deep Learning, 2022). A range that holds only zero gets
    the scale 1.
    """
    low, high = limits(scheme.activation)
    if scheme.activation_symmetric or is_float(scheme.activation):
        # Of unsigned codes the middle one stands for zero.
        middle = 0.0 if low < 0 else (high + 1) / 2
        return ActivationGrid(_usable(max(-span.low, span.high) / (high - middle)), int(middle))
    scale = (span.high - span.low) / (high - low)
    zero_point = round(low - span.low / scale) if scale > 0 else low
    return ActivationGrid(_usable(scale), int(np.clip(zero_point, low, high)))


def _usable(scale: float) -> np.float32:
    if not math.isfinite(scale):
        raise ValueError(f"no grid has the scale {scale}")
    return np.float32(max(scale, grid.SMALLEST_SCALE)) if scale > 0 else np.float32(1.0)
