"""Repeats: elements of an axis repeated by way of an axis of their own, as the one Gather they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt import shapes
from graphopt.authoring import Guarantee, RewritePass
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target

from .arguments import axes_of

# Indices cost eight bytes each; longer repeats would cost more than the nodes they replace.
MOST_INDICES = 1024


@dataclass(frozen=True)
class Repeats(RewritePass):
    """Turn Unsqueeze–Expand–Reshape that repeats each element of an axis into a Gather."""

    name = "repeats"
    guarantee = Guarantee.EXACT

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return the one rule."""
        return (RepeatedElements(),)


class RepeatedElements(Rule):
    """Reshape(Expand(Unsqueeze(x, a), n times along a)) = Gather(x, 0 .. 0, 1 .. 1, ..., axis=a−1).

    Exporters write so to repeat each head of keys and values for the queries that share it; both sides copy elements.
    """

    name = "repeated-elements"

    def pattern(self, op: Any, x: Any, sizes: Any, shape: Any, axes: Any = None) -> Any:
        unsqueezed = op.Unsqueeze(x, axes, _id="unsqueeze")
        return op.Reshape(op.Expand(unsqueezed, sizes, _id="expand"), shape)

    def check(self, m: Match) -> Miss | None:
        before, wide, after = (shapes.static_shape(v) for v in (m.x, m.expand.outputs[0], m.root.outputs[0]))
        if before is None or wide is None or after is None:
            return Miss("sizes vary", m.root)
        axes = axes_of(m.unsqueeze, len(wide))
        if axes is None or len(axes) != 1 or axes[0] == 0:
            return Miss("does not repeat along one axis", m.root)
        axis = axes[0]
        if wide != (*before[:axis], wide[axis], *before[axis:]):
            return Miss("does not repeat along one axis", m.root)
        if after != (*before[: axis - 1], before[axis - 1] * wide[axis], *before[axis:]):
            return Miss("does not join the repeats with the axis before", m.root)
        if after[axis - 1] > MOST_INDICES:
            return Miss("its indices would take more room than it does", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        wide = shapes.static_shape(m.expand.outputs[0])
        assert wide is not None, "checked"
        (axis,) = axes_of(m.unsqueeze, len(wide)) or ()
        indices = np.repeat(np.arange(wide[axis - 1], dtype=np.int64), wide[axis])
        return op.Gather(m.x, op.const(indices, f"{m.root.name or 'repeat'}_indices"), axis=axis - 1)
