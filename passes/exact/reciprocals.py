"""Reciprocals: a product with a reciprocal is a division, the form that runtimes know normalisations by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.authoring import RewritePass
from graphopt.pattern import Match, Rule
from graphopt.target import Target


@dataclass(frozen=True)
class Reciprocals(RewritePass):
    """Turn products with reciprocals into divisions."""

    name = "reciprocals"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return the rules."""
        return (ProductWithReciprocal(), ProductWithQuotient())


class ProductWithReciprocal(Rule):
    """x · Reciprocal(y) = x / y.

    One rounding instead of two. Where y is zero both give an infinity, or NaN for x = 0.
    """

    name = "product-with-reciprocal"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.Mul(x, op.Reciprocal(y))

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Div(m.x, m.y)


class ProductWithQuotient(Rule):
    """x · (1 / y) = x / y, of floats.

    As for Reciprocal; of integers 1 / y is mostly zero.
    """

    name = "product-with-quotient"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.Mul(x, op.Div(1.0, y, _id="quotient"))

    def applies(self, m: Match) -> bool:
        dtype = m.x.dtype
        one = m.quotient.inputs[0]
        return dtype is not None and dtype.is_floating_point() and one.shape is not None and len(one.shape) == 0

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Div(m.x, m.y)
