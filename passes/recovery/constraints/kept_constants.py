"""Constants of a model that change while it trains: what each is by now, and what it must stay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
import torch
from torch import nn

from graphopt import walk
from graphopt.backend import Array
from graphopt.errors import PassError
from graphopt.stored_weights import as_array

from .latent_codes import CodeGrid
from .masks import Pattern


@dataclass(frozen=True, eq=False)
class Kept:
    """A constant that may change, and its bounds.

    Attributes:
        value: The constant; the model holds what it was.
        name: What it is called in the whole model.
        kind: What it is, of `KINDS`.
        now: Returns what it is by now, as the module computes it.
        parameters: Returns what trains, by name; the same tensors while nothing wraps the module.
        zeros: bool, True where it stays zero (codes: at their zero point); or None.
        pattern: What the zeros keep to, or None.
        zero_points: Of codes, in a shape that broadcasts; or None.
        grid: Which codes there are; None for floats.
        positive: Whether it is above zero everywhere.
        factors: Constants it is the product of, or none.
    """

    value: ir.Value
    name: str
    kind: str
    now: Callable[[], torch.Tensor]
    parameters: Callable[[], Mapping[str, nn.Parameter]]
    zeros: Array | None = None
    pattern: Pattern | None = None
    zero_points: Array | None = None
    grid: CodeGrid | None = None
    positive: bool = False
    factors: tuple[ir.Value, ...] = field(default=())

    @property
    def before(self) -> ir.TensorProtocol:
        """What the model holds."""
        tensor = walk.constant_tensor(self.value)
        assert tensor is not None, "it is a constant"
        return tensor

    def stored(self) -> Array:
        """Return what the model is to hold, in the constant's own dtype.

        Raises:
            PassError: Training made it infinite, or its dtype holds no such numbers.
        """
        with torch.no_grad():
            now = self.now()
        if not torch.isfinite(now).all():
            raise PassError(
                f"training made `{self.name}` infinite or no number", hint="a lower `rate`, or `precision=fp32`"
            )
        try:
            return as_array(now, self.before.dtype)
        except OverflowError as error:
            raise self._broken(f"has {error}") from error

    def check(self, stored: Array) -> None:
        """Check what is to be stored against what the model held.

        Raises:
            PassError: A bound is broken.
        """
        if stored.shape != walk.dims(self.before) or stored.dtype != self.before.dtype.numpy():
            raise self._broken(f"is {stored.dtype} {list(stored.shape)} now")
        numbers = stored.astype(np.float64)
        if self.positive and not (numbers > 0).all():
            raise self._broken("is a scale that is not above zero")
        if self.zero_points is not None:
            numbers = numbers - self.zero_points
        if self.zeros is not None and (numbers[self.zeros].any() or np.signbit(numbers[self.zeros]).any()):
            raise self._broken("has numbers where there were zeros")
        if self.pattern is not None and not self.pattern.holds(numbers):
            raise self._broken(f"no longer keeps to {self.pattern}")
        if self.grid is not None:
            codes = stored.astype(np.float64)
            if codes.min(initial=self.grid.high) < self.grid.low or codes.max(initial=self.grid.low) > self.grid.high:
                raise self._broken(f"has codes beyond {self.grid.low:g} to {self.grid.high:g}")

    def _broken(self, what: str) -> PassError:
        return PassError(
            f"training broke a constraint: `{self.name}` {what}",
            hint="this is a mistake of `recover`, not yours; the model was left as it was",
        )
