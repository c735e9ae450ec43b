"""Reciprocals: a product with a reciprocal is a division, the form that runtimes know normalisations by."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from graphopt import walk
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


def _is_root(m: Match) -> bool:
    """Return whether the divisor is a square root: the reciprocal of another number may overflow, the quotient not."""
    producer = m.y.producer()
    return producer is not None and walk.is_onnx_op(producer, "Sqrt")


class ProductWithReciprocal(Rule):
    """x · Reciprocal(y) = x / y, where y is a square root.

    One rounding instead of two. Where y is zero both give an infinity, or NaN for x = 0; no other root is so small that
    its reciprocal overflows.
    """

    name = "product-with-reciprocal"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.Mul(x, op.Reciprocal(y))

    def applies(self, m: Match) -> bool:
        return _is_root(m)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Div(m.x, m.y)


class ProductWithQuotient(Rule):
    """x · (1 / y) = x / y, where y is a square root.

    As for Reciprocal.
    """

    name = "product-with-quotient"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.Mul(x, op.Div(1.0, y, _id="quotient"))

    def applies(self, m: Match) -> bool:
        one = m.quotient.inputs[0]
        return _is_root(m) and one.shape is not None and len(one.shape) == 0

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Div(m.x, m.y)
