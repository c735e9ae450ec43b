"""Arithmetic, logic, casts and reductions that give back what they were given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.pattern import Match, Miss, Rule

from .arguments import axes_of, has_axes, rank_of, size_of
from .bypass import bypass

INVOLUTIONS = ("Neg", "Not", "BitwiseNot")
IDEMPOTENTS = ("Abs", "Ceil", "Floor", "Relu", "Round", "Sign")
VARIADIC = ("Max", "Mean", "Min", "Sum")
# Of two equal operands they give back one; Max and Min do so for NaN too.
SELECTIONS = ("And", "BitwiseAnd", "BitwiseOr", "Max", "Min", "Or")
# Reductions of a single number that are that number.
PLAIN_REDUCTIONS = ("ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum")


def arithmetic_rules() -> Sequence[Rule]:
    """Return one rule per kind of no-op."""
    return (
        NoOpCast(),
        NoOpCastLike(),
        *(Neutral(op_type, element) for op_type, element in Neutral.ELEMENTS),
        *(Involution(op_type) for op_type in INVOLUTIONS),
        *(Idempotent(op_type) for op_type in IDEMPOTENTS),
        *(OnlyOperand(op_type) for op_type in VARIADIC),
        *(EqualOperands(op_type) for op_type in SELECTIONS),
        EqualBranches(),
        ConstantCondition(),
        *(ReductionOfNothing(op_type) for op_type in PLAIN_REDUCTIONS),
    )


class NoOpCast(Rule):
    """Cast(x, to=dtype of x) = x."""

    name = "no-op-cast"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Cast(x)

    def applies(self, m: Match) -> bool:
        return m.x.dtype is not None and m.root.attributes.get_int("to", 0) == m.x.dtype.value

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class NoOpCastLike(Rule):
    """CastLike(x, y) = x where both have one dtype."""

    name = "no-op-castlike"

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return op.CastLike(x, y)

    def applies(self, m: Match) -> bool:
        return m.x.dtype is not None and m.x.dtype == m.y.dtype

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class Neutral(Rule):
    """x ∘ e = x for the neutral element e of an operator, where broadcasting e adds no axes.

    x − 0.0, x · 1, x / 1, x¹, and the larger of x and −∞ keep every bit, NaN included; x + 0.0 turns −0.0 into 0.0.
    """

    ELEMENTS = (
        ("Add", 0.0),
        ("Sub", 0.0),
        ("Mul", 1.0),
        ("Div", 1.0),
        ("Pow", 1.0),
        ("And", 1.0),
        ("Or", 0.0),
        ("Xor", 0.0),
        ("Max", -math.inf),
        ("Min", math.inf),
    )

    def __init__(self, op_type: str, element: float) -> None:
        self.name = f"neutral-{op_type.lower()}"
        self._op_type, self._element = op_type, element

    def pattern(self, op: Any, x: Any) -> Any:
        return getattr(op, self._op_type)(x, self._element)

    def check(self, m: Match) -> Miss | None:
        first, second = m.root.inputs
        tensor = walk.constant_tensor(second if first is m.x else first)
        assert tensor is not None, "the pattern matched a constant"
        shape = walk.dims(tensor)
        dims = shapes.dims_of(m.x)
        if dims is None and shape:
            return Miss("may broadcast its input to more axes", m.root)
        if dims is not None and not _broadcasts_into(shape, dims):
            return Miss("broadcasts its input", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


def _broadcasts_into(small: Sequence[int], large: Sequence[object]) -> bool:
    """Return whether a shape broadcasts to another without changing it."""
    if len(small) > len(large):
        return False
    tail = list(large)[len(large) - len(small) :]
    return all(a in (1, b) for a, b in zip(small, tail, strict=True))


class Involution(Rule):
    """f(f(x)) = x for an f that undoes itself, bit by bit: a sign, a truth or all bits flipped twice."""

    name = "involution"
    inner_may_be_read = True

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any) -> Any:
        function = getattr(op, self._op_type)
        return function(function(x))

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class Idempotent(Rule):
    """f(f(x)) = f(x) for an f that leaves its own results alone."""

    name = "idempotent"
    inner_may_be_read = True

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any) -> Any:
        function = getattr(op, self._op_type)
        return function(function(x, _id="first"))

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m, m.first.outputs[0])


class OnlyOperand(Rule):
    """Sum(x) = Mean(x) = Max(x) = Min(x) = x: of one operand there is nothing to combine."""

    name = "only-operand"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any) -> Any:
        return getattr(op, self._op_type)(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class EqualOperands(Rule):
    """Max(x, x) = Min(x, x) = And(x, x) = Or(x, x) = x, NaN included."""

    name = "equal-operands"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any) -> Any:
        return getattr(op, self._op_type)(x, x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class EqualBranches(Rule):
    """Where(c, x, x) = x where c broadcasts x to nothing larger."""

    name = "where-same"

    def pattern(self, op: Any, c: Any, x: Any) -> Any:
        return op.Where(c, x, x)

    def check(self, m: Match) -> Miss | None:
        return None if shapes.same_shape(m.x, m.root.outputs[0]) else Miss("may broadcast what it chooses", m.root)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class ConstantCondition(Rule):
    """Where(true, x, y) = x and Where(false, x, y) = y, where the others broadcast it to nothing larger."""

    name = "where-constant"

    def pattern(self, op: Any, c: Any, x: Any, y: Any) -> Any:
        return op.Where(c, x, y)

    def applies(self, m: Match) -> bool:
        tensor = walk.constant_tensor(m.c)
        # A mask that is one everywhere is small, or would have been folded into something small.
        return tensor is not None and 0 < tensor.size <= 4096 and len(set(m.array("c").reshape(-1).tolist())) == 1

    def check(self, m: Match) -> Miss | None:
        return None if shapes.same_shape(_chosen(m), m.root.outputs[0]) else Miss("may broadcast its choice", m.root)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m, _chosen(m))


def _chosen(m: Match) -> ir.Value:
    value: ir.Value = m.x if m.array("c").all() else m.y
    return value


class ReductionOfNothing(Rule):
    """Reduce(x) = x over axes of size 1 that are kept, over none where it is told so, and for a single number.

    It holds for sum, mean, maximum, minimum and product, which of one number are that number.
    """

    name = "reduction-of-nothing"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any, axes: Any = None) -> Any:
        return getattr(op, self._op_type)(x, axes)

    def applies(self, m: Match) -> bool:
        rank = rank_of(m.x)
        given = axes_of(m.root, rank) if has_axes(m.root) else ()
        if given is None:
            return False
        if not given and m.root.attributes.get_int("noop_with_empty_axes", 0) != 0:
            return True
        if rank == 0:
            return True
        kept = m.root.attributes.get_int("keepdims", 1) == 1
        return kept and rank is not None and all(size_of(m.x, axis) == 1 for axis in given or range(rank))

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)
