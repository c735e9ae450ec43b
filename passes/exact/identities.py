"""Identities: operators that give back what they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.authoring import RewritePass
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target

from .bypass import bypass
from .no_op_arithmetic import arithmetic_rules
from .no_op_layouts import layout_rules


@dataclass(frozen=True)
class Identities(RewritePass):
    """Remove operators that give back their input: Identity, Dropout, no-op casts, reshapes and slices, x·1, ..."""

    name = "identities"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return one rule per kind of no-op."""
        return (Identity(), Dropout(), *arithmetic_rules(), *layout_rules())


class Identity(Rule):
    """Identity(x) = x."""

    name = "identity"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Identity(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class Dropout(Rule):
    """Dropout(x) = x at inference."""

    name = "dropout"

    def pattern(self, op: Any, x: Any, ratio: Any = None, training: Any = None) -> Any:
        return op.Dropout(x, ratio, training)

    def check(self, m: Match) -> Miss | None:
        if m.training is not None and not (m.all_constant("training") and not m.array("training").any()):
            return Miss("may be in training mode", m.root)
        if any(value.uses() or value.is_graph_output() for value in m.root.outputs[1:]):
            return Miss("its mask is read", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)
