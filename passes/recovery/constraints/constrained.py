"""Constraints held while training: what a model may not lose is built into the module, so that no step can break it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from torch import fx, nn

from graphopt.backend import Array
from graphopt.errors import PassError
from graphopt.reporting.rows import counted

from ..held import ADAPTERS, Held
from .constant_kinds import BIAS, NORM, SCALE, TABLE, WEIGHT, ZERO_POINT
from .kept_constants import Kept
from .kept_floats import keep_floats
from .kept_integers import keep_codes, keep_scales
from .surgery import Surgery
from .trainable import constants, idle, trainables

# Decay pulls towards zero, which for all else is no neutral place.
_DECAYING = (WEIGHT, ADAPTERS)
_ORDER = (WEIGHT, ADAPTERS, BIAS, NORM, TABLE, SCALE, ZERO_POINT)
# A product of two float32 that is rounded to one is off by no more.
_ROUNDING = 1e-6


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that are trained alike.

    Attributes:
        name: What they are, of `KINDS`.
        rate: What the learning rate is multiplied by.
        decay: Whether weight decay applies.
        names: What each is called: the constant it stands for, with ``.A`` and ``.B`` for adapters.
        tensors: The parameters, float32 or float64, in memory of their own.
    """

    name: str
    rate: float
    decay: bool
    names: tuple[str, ...]
    tensors: tuple[nn.Parameter, ...]


@dataclass(frozen=True, eq=False)
class Constrained:
    """A lowered module of which some constants train, and what holds them.

    Attributes:
        kept: The constants that may change.
        left: Why others do not although they were asked for: reason to how many.
        scale_rate: Learning rate of scales, as a share of that of all else.
    """

    kept: Sequence[Kept]
    left: Counter[str]
    scale_rate: float = 1.0

    def parameters(self) -> list[ParameterGroup]:
        """Return what trains, in groups; none is empty."""
        groups: dict[str, dict[str, nn.Parameter]] = {}
        for one in self.kept:
            for name, tensor in one.parameters().items():
                if tensor.requires_grad:
                    kind = ADAPTERS if name != one.name else one.kind
                    groups.setdefault(kind, {})[name] = tensor
        return [
            ParameterGroup(
                kind,
                self.scale_rate if kind in (SCALE, ZERO_POINT) else 1.0,
                kind in _DECAYING,
                tuple(groups[kind]),
                tuple(groups[kind].values()),
            )
            for kind in _ORDER
            if kind in groups
        ]

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the weights that train, in the layout of their constants; of codes, the floats behind them."""
        return {
            one.name: tensor
            for one in self.kept
            for name, tensor in one.parameters().items()
            if one.kind == WEIGHT and name == one.name and tensor.requires_grad
        }

    def stored(self) -> Iterator[tuple[str, Array]]:
        """Yield the name and the content of each constant that is not what it was, in its own dtype and shape."""
        for one in self.kept:
            array = one.stored()
            before = np.asarray(one.before.numpy())
            if array.dtype != before.dtype or array.tobytes() != before.tobytes():
                yield one.name, array

    def check(self) -> None:
        """Check that all that is to be stored keeps to its bounds, against the model as it still is.

        Raises:
            PassError: A constraint is broken.
        """
        scales: dict[ir.Value, Array] = {}
        for one in self.kept:
            array = one.stored()
            one.check(array)
            if one.kind == SCALE:
                scales[one.value] = array
        for one in self.kept:
            if one.factors:
                _check_product(one, scales)

    def describe(self) -> list[str]:
        """Return what trained and what was held, in sentences."""
        # An adapter is two parameters.
        counts = {one.name: len(one.names) // (1 + (one.name == ADAPTERS)) for one in self.parameters()}
        trained = ", ".join(_counted(count, kind) for kind, count in counts.items())
        lines = [f"trained: {trained or 'nothing'}"]
        zeros = [one for one in self.kept if one.zeros is not None]
        if zeros:
            share = sum(int(one.zeros.sum()) for one in zeros if one.zeros is not None)
            total = sum(one.before.size for one in zeros)
            patterns = sorted({str(one.pattern) for one in zeros if one.pattern is not None})
            text = f"zeros held in {counted(len(zeros), 'weight')}, {share / total:.1%} of their numbers"
            lines.append(text + (f" (in patterns of {', '.join(patterns)})" if patterns else ""))
        codes = [one for one in self.kept if one.grid is not None and one.kind != ZERO_POINT]
        if codes:
            lines.append(f"codes held on their grids: {counted(len(codes), 'constant')}")
        lines += [f"{counted(count, 'constant')} left: {reason}" for reason, count in sorted(self.left.items())]
        return lines

    def facts(self) -> dict[str, Any]:
        """Return the same as figures."""
        return {
            "trained": dict(Counter(one.kind for one in self.kept)),
            "zeros_held": sum(int(one.zeros.sum()) for one in self.kept if one.zeros is not None),
            "codes_held": sum(one.before.size for one in self.kept if one.grid is not None),
            "left": dict(self.left),
        }


def constrain(module: fx.GraphModule, model: ir.Model, held: Held) -> Constrained:
    """Let the chosen constants of a lowered model train, within bounds that modules behind them hold.

    Args:
        module: What the backend ``torch`` lowered the model to, differentiable; changed in place: what trains is in
            memory of its own then, in float32 (float64 for double), and a state dict holds all of it.
        model: The model; not changed.
        held: What trains.
    """
    surgery, left = Surgery(module, constants(model)), idle(model)
    found = trainables(model, held)
    scales = {one.value: one for one in keep_scales(surgery, model, found, left)}
    codes = list(keep_codes(surgery, model, found, held, scales, left))
    kept = [*keep_floats(surgery, found, held, left), *codes, *scales.values()]
    surgery.finish()
    return Constrained(kept, left, held.scale_rate)


def _counted(count: int, kind: str) -> str:
    """Return a count of a kind: biases are no plural of `biase`."""
    return f"1 {'bias' if kind == BIAS else kind.removesuffix('s')}" if count == 1 else f"{count} {kind}"


def _check_product(one: Kept, scales: dict[ir.Value, Array]) -> None:
    first, second = (
        np.asarray(scales[value] if value in scales else _constant(value), np.float64).reshape(-1)
        for value in one.factors
    )
    if not np.allclose(scales[one.value].reshape(-1), first * second, rtol=_ROUNDING, atol=0.0):
        raise PassError(
            f"training broke a constraint: `{one.name}` is no longer the product of `{one.factors[0].name}` and "
            f"`{one.factors[1].name}`",
            hint="this is a mistake of `recover`, not yours; the model was left as it was",
        )


def _constant(value: ir.Value) -> Array:
    assert value.const_value is not None, "scales are constant"
    return np.asarray(value.const_value.numpy())
