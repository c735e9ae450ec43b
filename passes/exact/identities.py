"""Identities: operators that give back what they were given."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import RewritePass
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target


@dataclass(frozen=True)
class Identities(RewritePass):
    """Remove operators that give back their input: Identity, Dropout, no-op casts, x·1, x+0, ..."""

    name = "identities"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return one rule per kind of no-op."""
        return (
            Identity(),
            Dropout(),
            NoOpCast(),
            NoOpTranspose(),
            Neutral("Add", 0.0),
            Neutral("Sub", 0.0),
            Neutral("Mul", 1.0),
            Neutral("Div", 1.0),
            InverseTransposes(),
            ReshapeOfReshape(),
            NoOpReshape(),
        )


def _bypass(m: Match) -> Any:
    """Return x in place of the root, or why it must stay."""
    x, root = m.x, m.root
    if not any(value.is_graph_output() for value in root.outputs):
        return x
    producer = x.producer()
    if producer is None or producer.graph is not root.graph or x.is_graph_output():
        return Miss("names a graph output that is an input, a constant or another output", root)
    return x


class Identity(Rule):
    """Identity(x) = x."""

    name = "identity"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Identity(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return _bypass(m)


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
        return _bypass(m)


class NoOpCast(Rule):
    """Cast(x, to=dtype of x) = x."""

    name = "no-op-cast"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Cast(x)

    def applies(self, m: Match) -> bool:
        return m.x.dtype is not None and m.root.attributes.get_int("to", 0) == m.x.dtype.value

    def rewrite(self, op: Any, m: Match) -> Any:
        return _bypass(m)


class NoOpTranspose(Rule):
    """Transpose(x, perm = 0, 1, 2, ...) = x."""

    name = "no-op-transpose"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Transpose(x)

    def applies(self, m: Match) -> bool:
        perm = m.root.attributes.get_ints("perm")
        return perm is not None and list(perm) == sorted(perm)

    def rewrite(self, op: Any, m: Match) -> Any:
        return _bypass(m)


class Neutral(Rule):
    """x ∘ e = x for the neutral element e of an operator, where broadcasting e adds no axes.

    x − 0.0, x · 1 and x / 1 keep every bit; x + 0.0 turns −0.0 into 0.0.
    """

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
        if m.x.shape is None and shape:
            return Miss("may broadcast its input to more axes", m.root)
        if m.x.shape is not None and not _broadcasts_into(shape, m.x.shape):
            return Miss("broadcasts its input", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return _bypass(m)


def _broadcasts_into(small: tuple[int, ...], large: ir.Shape) -> bool:
    """Return whether a shape broadcasts to another without changing it."""
    if len(small) > len(large):
        return False
    tail = list(large)[len(large) - len(small) :]
    return all(a == 1 or (isinstance(b, int) and a == b) for a, b in zip(small, tail, strict=True))


class InverseTransposes(Rule):
    """Transpose(Transpose(x)) = one Transpose, or x where they cancel."""

    name = "transposes"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Transpose(op.Transpose(x, _id="first"))

    def check(self, m: Match) -> Miss | None:
        if "perm" not in m.first.attributes or "perm" not in m.root.attributes:
            return Miss("reverses axes of unknown number", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        first, second = (list(node.attributes["perm"].as_ints()) for node in (m.first, m.root))
        perm = [first[axis] for axis in second]
        return _bypass(m) if perm == sorted(perm) else op.Transpose(m.x, perm=perm)


class ReshapeOfReshape(Rule):
    """Reshape(Reshape(x, a), b) = Reshape(x, b) where b copies no dimension of its input."""

    name = "reshapes"

    def pattern(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Reshape(op.Reshape(x, a), b)

    def check(self, m: Match) -> Miss | None:
        if not m.all_constant("b"):
            return Miss("its shape varies", m.root)
        if (m.array("b") == 0).any():
            return Miss("copies a dimension of the inner Reshape", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.root, m.x, m.b)


class NoOpReshape(Rule):
    """Reshape(x, shape of x) = x."""

    name = "no-op-reshape"

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        return op.Reshape(x, shape)

    def applies(self, m: Match) -> bool:
        known = shapes.static_shape(m.x)
        return known is not None and m.all_constant("shape") and list(m.array("shape")) == list(known)

    def rewrite(self, op: Any, m: Match) -> Any:
        return _bypass(m)
