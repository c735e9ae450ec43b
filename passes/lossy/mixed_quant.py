"""Quantization in mixed precision, as a pass: every option of `quant`, and what a layer that costs too much gets."""

from __future__ import annotations

from dataclasses import dataclass, fields
from itertools import pairwise
from typing import Any

import onnx_ir as ir

from graphopt.authoring import Context, Need
from graphopt.errors import UsageError
from graphopt.options import opt

from ..analyses.selection import Selection
from .mixed import Rung, quantize_mixed
from .quant import Quant

# Bits of the formats weights may have; what is not listed is float32.
_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "int8": 8, "uint8": 8, "float8e4m3fn": 8, "float8e5m2": 8}
_FLOAT, _FLOAT_BITS = "float", 32
# What weights are in where the option leaves it to the target.
_USUAL = "int8"


@dataclass(frozen=True)
class MixedQuant(Quant):
    """Quantize all layers but the fewest that must be in more bits, so that the run's budget holds."""

    higher: tuple[str, ...] = opt(
        (_FLOAT,), help="what layers that cost too much are in, from few bits to many: float, or int8+float"
    )

    name = "mixed-quant"

    def __post_init__(self) -> None:
        """Refuse formats that are none, or that do not get finer."""
        widths = [_bits(self.weights or _USUAL), *(_bits(name) for name in self.higher)]
        if not self.higher or any(a >= b for a, b in pairwise(widths)):
            raise UsageError(
                f"pass `mixed-quant`: option `higher` cannot be `{'+'.join(self.higher)}`",
                hint=f"formats of more and more bits than `weights`, such as `{_FLOAT}` or `int8+{_FLOAT}`",
            )

    @property
    def needs(self) -> frozenset[Need]:
        """What the mode needs, a budget, and samples to choose by."""
        return (super().needs - {Need.CALIBRATION_OPTIONAL}) | {Need.CALIBRATION, Need.BUDGET}

    def lower(self, model: ir.Model, ctx: Context, selection: Selection) -> None:
        """Look for the fewest layers in more bits, and quantize accordingly.

        Raises:
            PassError: As for `quant`; or no choice of layers keeps the budget.
        """
        mode = self.mode if self.mode != "auto" else self._choose(model, ctx)
        base = self._plain(mode, self.weights)
        rungs = [Rung(base.weights or _USUAL, base.lower, 1.0, _bits(base.weights or _USUAL))]
        for name in self.higher:
            bits = _bits(name)
            finer = self._plain(base.mode, name).lower if name != _FLOAT else None
            rungs.append(Rung(name, finer, 4.0 ** (rungs[0].bits - bits) if finer is not None else 0.0, bits))
        quantize_mixed(model, ctx, selection, rungs, by_bytes=mode == "weights")

    def _plain(self, mode: str, weights: str | None) -> Quant:
        """Return the pass that quantizes all it is given alike."""
        options: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(Quant)}
        return Quant(**{**options, "mode": mode, "weights": weights})


def _bits(name: str) -> int:
    if name != _FLOAT and name not in _BITS:
        raise UsageError(
            f"pass `mixed-quant`: option `higher` cannot be `{name}`", hint=f"one of: {', '.join(_BITS)}, {_FLOAT}"
        )
    return _BITS.get(name, _FLOAT_BITS)
