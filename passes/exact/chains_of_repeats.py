"""The same operator twice in a row: Transpose, Cast, Expand, Tile and Pad."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.pattern import Match, Miss, Rule
from graphopt.shape_rules.shape_facts import Dims

from .arguments import integers, rank_of
from .bypass import bypass

_FLOAT_BITS = {  # digits of the mantissa, the hidden one included, and of the exponent
    ir.DataType.BFLOAT16: (8, 8),
    ir.DataType.FLOAT16: (11, 5),
    ir.DataType.FLOAT: (24, 8),
    ir.DataType.DOUBLE: (53, 11),
}
_SIGNED = {ir.DataType.INT8: 8, ir.DataType.INT16: 16, ir.DataType.INT32: 32, ir.DataType.INT64: 64}
_UNSIGNED = {ir.DataType.UINT8: 8, ir.DataType.UINT16: 16, ir.DataType.UINT32: 32, ir.DataType.UINT64: 64}


def repeat_rules() -> Sequence[Rule]:
    """Return one rule per operator."""
    expanded = (NeedlessExpand(op_type) for op_type in NeedlessExpand.BROADCASTING)
    return (Transposes(), Casts(), Expands(), Tiles(), Pads(), *expanded)


class Transposes(Rule):
    """Transpose(Transpose(x)) = one Transpose, or x where they cancel."""

    name = "transposes"
    # Moved once instead of twice; the first stays for those that read it.
    inner_may_be_read = True

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Transpose(op.Transpose(x, _id="first"))

    def check(self, m: Match) -> Miss | None:
        if _perm(m.first, m.x) is None or _perm(m.root, m.x) is None:
            return Miss("reverses axes of unknown number", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        first, second = _perm(m.first, m.x), _perm(m.root, m.x)
        assert first is not None, "checked"
        assert second is not None, "checked"
        perm = [first[axis] for axis in second]
        return bypass(m) if perm == sorted(perm) else op.Transpose(m.x, perm=perm)


def _perm(transpose: ir.Node, x: ir.Value) -> list[int] | None:
    """Return the permutation of a Transpose; by default it reverses the axes."""
    if "perm" in transpose.attributes:
        return list(transpose.attributes["perm"].as_ints())
    rank = rank_of(x)
    return None if rank is None else list(range(rank))[::-1]


class Casts(Rule):
    """Cast(Cast(x, a), b) = Cast(x, b), or x where b is its dtype, if dtype a holds every number x can hold.

    From there the second cast starts with the number x had.
    """

    name = "casts"
    inner_may_be_read = True

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Cast(op.Cast(x, _id="first"))

    def applies(self, m: Match) -> bool:
        return m.x.dtype is not None

    def check(self, m: Match) -> Miss | None:
        between, to = (ir.DataType(node.attributes.get_int("to", 0)) for node in (m.first, m.root))
        if not _holds(between, m.x.dtype):
            return Miss(f"{between} may not hold what it casts", m.root)
        return Miss("text tells numbers by their type", m.root) if to == ir.DataType.STRING else None

    def rewrite(self, op: Any, m: Match) -> Any:
        if m.root.attributes.get_int("to", 0) == m.x.dtype.value:
            return bypass(m)
        return op.like(m.root, m.x)


def _holds(wide: ir.DataType, narrow: ir.DataType) -> bool:
    """Return whether every number of one dtype is a number of another."""
    if wide == narrow:
        return narrow != ir.DataType.STRING
    if narrow == ir.DataType.BOOL:
        return wide in _FLOAT_BITS or wide in _SIGNED or wide in _UNSIGNED
    if narrow in _FLOAT_BITS:
        pairs = zip(_FLOAT_BITS.get(wide, (0, 0)), _FLOAT_BITS[narrow], strict=True)
        return all(large >= small for large, small in pairs)
    digits = _SIGNED.get(narrow, 1) - 1 if narrow in _SIGNED else _UNSIGNED.get(narrow)
    if digits is None:
        return False
    if wide in _FLOAT_BITS:
        # A signed integer of n digits goes down to −2ⁿ, a power of two.
        return digits <= _FLOAT_BITS[wide][0]
    if wide in _UNSIGNED:
        return narrow in _UNSIGNED and digits <= _UNSIGNED[wide]
    return wide in _SIGNED and digits <= _SIGNED[wide] - 1


class Expands(Rule):
    """Expand(Expand(x, a), b) = Expand(x, a and b broadcast) where both are constant."""

    name = "expands"

    def pattern(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Expand(op.Expand(x, a), b)

    def check(self, m: Match) -> Miss | None:
        return Miss("its shape varies", m.root) if _broadcast(m) is None else None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.root, m.x, op.const(np.array(_broadcast(m), np.int64), m.b.name))


def _broadcast(m: Match) -> tuple[int, ...] | None:
    a, b = integers(m.a), integers(m.b)
    if a is None or b is None or any(size < 0 for size in (*a, *b)):
        return None
    try:
        return np.broadcast_shapes(a, b)
    except ValueError:
        return None  # refused by runtimes too


class NeedlessExpand(Rule):
    """f(Expand(x, shape), y) = f(x, y) where f broadcasts x all the same, as y has every size that Expand gives."""

    name = "needless-expand"
    # What reads the smaller value has no more to do.
    inner_may_be_read = True
    BROADCASTING = (
        *("Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater"),
        *("GreaterOrEqual", "Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "Pow", "Sub", "Sum"),
        *("Where", "Xor"),
    )

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any) -> Any:
        return getattr(op, self._op_type)(...)

    def applies(self, m: Match) -> bool:
        index = self._needless(m.root)
        if index is None:
            return False
        m.include([_expand_before(m.root, index)])
        return True

    def rewrite(self, op: Any, m: Match) -> Any:
        index = self._needless(m.root)
        assert index is not None, "it applies"
        inputs = list(m.root.inputs)
        inputs[index] = _expand_before(m.root, index).inputs[0]
        return op.like(m.root, *inputs)

    def _needless(self, root: ir.Node) -> int | None:
        """Return the index of an operand that need not be expanded, or None."""
        for index, value in enumerate(root.inputs):
            expand = value.producer() if value is not None else None
            if expand is None or not walk.is_onnx_op(expand, "Expand") or expand.graph is not root.graph:
                continue
            before, behind = shapes.dims_of(expand.inputs[0]), shapes.dims_of(value)
            others = [shapes.dims_of(other) for place, other in enumerate(root.inputs) if place != index]
            known = [dims for dims in others if dims is not None]
            if before is not None and behind is not None and _is_given(behind, [before, *known]):
                return index
        return None


def _expand_before(root: ir.Node, index: int) -> ir.Node:
    value = root.inputs[index]
    expand = value.producer() if value is not None else None
    assert expand is not None, "it was found"
    return expand


def _is_given(wanted: Dims, given: Sequence[Dims]) -> bool:
    """Return whether each axis wanted, counted from the end, is there with its size in one of some shapes.

    An axis of size 1 may have any size in the others.
    """
    for place in range(1, len(wanted) + 1):
        size = wanted[-place]
        there = [dims[-place] for dims in given if len(dims) >= place]
        if not there or (size != 1 and size not in there):
            return False
    return True


class Tiles(Rule):
    """Tile(Tile(x, a), b) = Tile(x, a · b) where both are constant."""

    name = "tiles"

    def pattern(self, op: Any, x: Any, a: Any, b: Any) -> Any:
        return op.Tile(op.Tile(x, a), b)

    def check(self, m: Match) -> Miss | None:
        a, b = integers(m.a), integers(m.b)
        return None if a is not None and b is not None and len(a) == len(b) else Miss("its repeats vary", m.root)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.root, m.x, op.const(m.array("a") * m.array("b"), m.b.name))


class Pads(Rule):
    """Pad(Pad(x, a), b) = Pad(x, a + b) with one constant value, where neither takes anything away.

    The second pads around the first, with the same number.
    """

    name = "pads"

    def pattern(self, op: Any, x: Any, a: Any, b: Any, v: Any = None, w: Any = None) -> Any:
        return op.Pad(op.Pad(x, a, v, mode="constant"), b, w, mode="constant")

    def check(self, m: Match) -> Miss | None:
        a, b = integers(m.a), integers(m.b)
        if a is None or b is None or len(a) != len(b):
            return Miss("its widths vary", m.root)
        if any(width < 0 for width in (*a, *b)):
            return Miss("takes elements away", m.root)
        first, second = _fill(m.v), _fill(m.w)
        return None if first is not None and first == second else Miss("may pad with another number", m.root)

    def rewrite(self, op: Any, m: Match) -> Any:
        widths = op.const(m.array("a") + m.array("b"), m.b.name)
        return op.like(m.root, m.x, widths, *([m.w] if m.w is not None else []))


def _fill(value: ir.Value | None) -> bytes | None:
    """Return the bytes of the number a Pad fills with, zeros where it is left out; None where it varies."""
    if value is None:
        return b""
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.size != 1 or tensor.dtype == ir.DataType.STRING:
        return None
    return tensor.tobytes().strip(b"\0") and tensor.tobytes()
