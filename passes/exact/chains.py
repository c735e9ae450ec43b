"""Chains: operators in a row that are one operator, or none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.authoring import Guarantee, RewritePass
from graphopt.pattern import Rule
from graphopt.target import Target

from .chains_of_pieces import piece_rules
from .chains_of_repeats import repeat_rules
from .chains_of_views import view_rules


@dataclass(frozen=True)
class Chains(RewritePass):
    """Merge reshapes, transposes, slices, concats, casts and the like in a row into one of them, or none."""

    name = "chains"
    # Elements are moved, never computed with.
    guarantee = Guarantee.EXACT

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return one rule per kind of chain; those that keep the more telling operator come first."""
        return (*repeat_rules(), *piece_rules(), *view_rules())
