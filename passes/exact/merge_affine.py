"""Chains of Mul, Div, Add, Sub and Neg by constants, made as short as they can be."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import RewritePass
from graphopt.backend import Array
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target

from ..analyses.composites import comes_from_a_normalization, ends_a_gelu

_FACTORS = ("Mul", "Div", "Neg")
_TERMS = ("Add", "Sub", "-Sub", "Neg")
_INTEGERS = (ir.DataType.INT32, ir.DataType.INT64)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
# A merged constant may take this many bytes more than those it frees.
_GROWTH_LIMIT = 4096
# Constants larger than this are weights, not factors.
_LARGEST = 1 << 20
# Beyond these a product of two factors comes near the ends of float32's range, where it matters which comes first.
_FAR = 1e15
# Where terms cancel to less than this share, what is left of x between them has lost digits, maybe on purpose ...
_CANCELLED = 0.25
# ... unless both are as small as this, so that these digits are nobody's concern.
_SMALL_TERM = 8.0


@dataclass(frozen=True)
class MergeAffine(RewritePass):
    """Merge consecutive Mul, Div, Add, Sub and Neg by constants."""

    name = "merge-affine"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return a rule for each pair of steps, and for a scale behind a shift behind a scale."""
        return (
            *(Factors(*pair) for pair in product(_FACTORS, _FACTORS) if pair != ("Neg", "Neg")),
            *(Terms(*pair) for pair in product(_TERMS, _TERMS) if pair != ("Neg", "Neg")),
            *(ScaledShift(*three) for three in product(("Mul", "Div"), ("Add", "Sub"), ("Mul", "Div"))),
            NegatedTerm("Add"),
            NegatedTerm("Sub"),
        )


class Factors(Rule):
    """(x·a)·b = x·(a·b), (x/a)/b = x/(a·b), (x·a)/b = x·(a/b), (x/a)·b = x·(b/a), −(x·a) = (−x)·a = x·(−a).

    Of integers, products wrap around whichever comes first, and quotients are left alone. The half of a Gelu is left
    where runtimes look for it.
    """

    name = "factors"

    def __init__(self, outer: str, inner: str) -> None:
        self._outer, self._inner = outer, inner

    def pattern(self, op: Any, x: Any, a: Any = None, b: Any = None) -> Any:
        return _step(op, self._outer, _step(op, self._inner, x, a), b)

    def applies(self, m: Match) -> bool:
        return _is_a_chain(m, {"a": self._inner, "b": self._outer})

    def check(self, m: Match) -> Miss | None:
        dtype = _dtype(m, "a", "b")
        if dtype not in _FLOATS and (dtype not in _INTEGERS or "Div" in (self._inner, self._outer)):
            return Miss("is not exact in its dtype", m.root)
        if dtype in _FLOATS and any(_is_far(m.array(name)) for name in _bound(m, "a", "b")):
            return Miss("its factors are too near the ends of the range", m.root)
        if dtype is ir.DataType.FLOAT16 and not _go_the_same_way(m, self._inner, self._outer):
            return Miss("may overflow on the way, or lose digits", m.root)
        if ends_a_gelu(m.x):
            return Miss("may be the half of a Gelu", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        with np.errstate(over="ignore"):
            return self._merged(op, m, _dtype(m, "a", "b"))

    def _merged(self, op: Any, m: Match, dtype: ir.DataType) -> Any:
        divides = {"Div"} >= {self._inner, self._outer} - {"Neg"}
        factor = _one(dtype)
        for op_type, name in ((self._inner, "a"), (self._outer, "b")):
            match op_type:
                case "Neg":
                    factor = -factor
                case "Mul":
                    factor = factor * _exact(m, name)
                case "Div":
                    factor = factor * _exact(m, name) if divides else factor / _exact(m, name)
        constant = _constant(op, m, factor, dtype, "a", "b")
        if isinstance(constant, Miss):
            return constant
        return op.Div(m.x, constant) if divides else op.Mul(m.x, constant)


class Terms(Rule):
    """(x ± a) ± b = x + (±a ± b), b − (x ± a) = (b ∓ a) − x, b − (a − x) = x + (b − a), (−x) + a = a − x.

    Of integers, sums wrap around whichever comes first.
    """

    name = "terms"

    def __init__(self, outer: str, inner: str) -> None:
        self._outer, self._inner = outer, inner

    def pattern(self, op: Any, x: Any, a: Any = None, b: Any = None) -> Any:
        return _step(op, self._outer, _step(op, self._inner, x, a), b)

    def applies(self, m: Match) -> bool:
        return _is_a_chain(m, {"a": self._inner, "b": self._outer})

    def check(self, m: Match) -> Miss | None:
        dtype = _dtype(m, "a", "b")
        if dtype not in _INTEGERS and dtype not in _FLOATS:
            return Miss("is not exact in its dtype", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        with np.errstate(over="ignore"):
            return self._merged(op, m, _dtype(m, "a", "b"))

    def _merged(self, op: Any, m: Match, dtype: ir.DataType) -> Any:
        sign, term = 1, _zero(dtype)
        largest = _zero(dtype)
        for op_type, name in ((self._inner, "a"), (self._outer, "b")):
            constant = _zero(dtype) if op_type == "Neg" else _exact(m, name)
            largest = np.maximum(largest, np.abs(constant))
            match op_type:
                case "Add":
                    term = term + constant
                case "Sub":
                    term = term - constant
                case _:
                    sign, term = -sign, constant - term
        if dtype in _FLOATS and _cancels(term, largest, dtype):
            return Miss("its terms cancel, and what they round away would be back", m.root)
        merged = _constant(op, m, term, dtype, "a", "b")
        if isinstance(merged, Miss):
            return merged
        return op.Add(m.x, merged) if sign > 0 else op.Sub(merged, m.x)


class ScaledShift(Rule):
    """(x·a + b)·c = x·(a·c) + b·c; the same for /, and for − b.

    The gain and shift of a normalization are left where runtimes look for them.
    """

    name = "scaled-shift"

    def __init__(self, outer: str, shift: str, inner: str) -> None:
        self._outer, self._shift, self._inner = outer, shift, inner

    def pattern(self, op: Any, x: Any, a: Any, b: Any, c: Any) -> Any:
        shifted = _step(op, self._shift, _step(op, self._inner, x, a), b)
        return _step(op, self._outer, shifted, c)

    def applies(self, m: Match) -> bool:
        return _is_a_chain(m, {"a": self._inner, "b": self._shift, "c": self._outer})

    def check(self, m: Match) -> Miss | None:
        if _dtype(m, "a", "b", "c") not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return Miss("is not exact in its dtype", m.root)
        if any(_is_far(m.array(name)) for name in ("a", "c")):
            return Miss("its factors are too near the ends of the range", m.root)
        if comes_from_a_normalization(m.x):
            return Miss("may be part of a normalization", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        dtype = _dtype(m, "a", "b", "c")
        inner = 1 / _exact(m, "a") if self._inner == "Div" else _exact(m, "a")
        outer = 1 / _exact(m, "c") if self._outer == "Div" else _exact(m, "c")
        shift = _exact(m, "b") * outer
        factor = _constant(op, m, inner * outer, dtype, "a", "c")
        term = _constant(op, m, shift, dtype, "b")
        for constant in (factor, term):
            if isinstance(constant, Miss):
                return constant
        return (op.Add if self._shift == "Add" else op.Sub)(op.Mul(m.x, factor), term)


class NegatedTerm(Rule):
    """x + (−y) = x − y, and x − (−y) = x + y, to the bit."""

    name = "negated-term"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any, y: Any) -> Any:
        return getattr(op, self._op_type)(x, op.Neg(y))

    def check(self, m: Match) -> Miss | None:
        dtype = m.y.dtype
        return None if dtype in _FLOATS or dtype in _INTEGERS else Miss("its dtype is unknown, or unusual", m.root)

    def rewrite(self, op: Any, m: Match) -> Any:
        return (op.Sub if self._op_type == "Add" else op.Add)(m.x, m.y)


def _step(op: Any, op_type: str, x: Any, constant: Any) -> Any:
    match op_type:
        case "Neg":
            return op.Neg(x)
        case "-Sub":
            return op.Sub(constant, x)
        case _:
            return getattr(op, op_type)(x, constant)


def _bound(m: Match, *names: str) -> list[str]:
    """Return the names of the constants a match has; a Neg has none."""
    return [name for name in names if m.values.get(name) is not None]


def _is_a_chain(m: Match, steps: dict[str, str]) -> bool:
    """Return whether x varies and every step but a Neg has a small constant."""
    if walk.constant_tensor(m.x) is not None:
        return False
    tensors = [walk.constant_tensor(m.values.get(name)) for name, op_type in steps.items() if op_type != "Neg"]
    return all(tensor is not None and 0 < tensor.size <= _LARGEST for tensor in tensors)


def _dtype(m: Match, *names: str) -> ir.DataType:
    tensor = walk.constant_tensor(m.values[_bound(m, *names)[0]])
    assert tensor is not None, "checked"
    return tensor.dtype


def _exact(m: Match, name: str) -> Array:
    """Return a constant in float64; integers keep their dtype, in which they wrap around as they do at run time."""
    array = m.array(name)
    return array.astype(np.float64) if array.dtype.kind == "f" else array


def _one(dtype: ir.DataType) -> Array:
    return np.ones((), np.float64 if dtype in _FLOATS else dtype.numpy())


def _zero(dtype: ir.DataType) -> Array:
    return np.zeros((), np.float64 if dtype in _FLOATS else dtype.numpy())


def _is_far(factor: Array) -> bool:
    """Return whether a factor is zero, not finite, or so large or small that products may leave the range."""
    size = np.abs(factor.astype(np.float64))
    return not bool(((size <= _FAR) & (size >= 1 / _FAR)).all())


def _go_the_same_way(m: Match, inner: str, outer: str) -> bool:
    """Return whether both factors shrink x, or both let it grow, everywhere: then nothing is lost in between."""
    sizes = [
        np.abs(1 / _exact(m, name) if op_type == "Div" else _exact(m, name))
        for op_type, name in ((inner, "a"), (outer, "b"))
        if op_type != "Neg"
    ]
    return all(bool((size <= 1).all()) for size in sizes) or all(bool((size >= 1).all()) for size in sizes)


def _cancels(term: Array, largest: Array, dtype: ir.DataType) -> bool:
    """Return whether terms are large next to their sum, so that adding them one by one rounds x in between."""
    if dtype is ir.DataType.FLOAT16:  # which overflows on the way, too, unless all terms have one sign
        return bool((np.abs(term) < largest).any())
    return bool(((largest > _SMALL_TERM) & (np.abs(term) < _CANCELLED * largest)).any())


def _constant(op: Any, m: Match, content: Array, dtype: ir.DataType, *freed: str) -> ir.Value | Miss:
    """Return a merged constant, unless it leaves the range of its dtype or makes the model larger."""
    with np.errstate(all="ignore"):
        array = np.asarray(content).astype(dtype.numpy())
    if dtype in _FLOATS and not np.isfinite(array).all():
        return Miss("would leave the range of its dtype", m.root)
    sources = [source for name in freed if (source := m.values.get(name)) is not None]
    if array.nbytes > sum(map(_bytes_freed, sources)) + _GROWTH_LIMIT:
        return Miss("its merged constant would be larger", m.root)
    value: ir.Value = op.const(array, sources[0].name)
    return value


def _bytes_freed(constant: ir.Value) -> int:
    """Return the bytes of a constant nothing else reads."""
    tensor = walk.constant_tensor(constant)
    assert tensor is not None, "checked"
    return tensor.nbytes if len(constant.uses()) == 1 and not constant.is_graph_output() else 0
