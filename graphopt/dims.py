"""Symbolic integers: polynomials over named sizes, in a form in which equal ones look equal."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from operator import itemgetter
from typing import TypeAlias

import onnx_ir as ir

_PLAIN_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_.]*")
Bound: TypeAlias = int | None  # None: no bound is known
# Sizes are products of few factors. What grows beyond this, as hashes and counters do, becomes an unknown size.
TERMS_LIMIT, DEGREE_LIMIT, FACTOR_LIMIT, TEXT_LIMIT = 48, 16, 2**63, 4000


class Atom(str):
    """What a polynomial is made of: a named size, an unknown one, or an operation that is no polynomial.

    Atoms are equal where their text is. The text of an unknown one is made from the identity of a token the atom
    keeps alive, so that no two living ones share it.

    Attributes:
        kind: ``name``, ``unknown``, or the operation.
        args: The operands of an operation; the name of a named size.
        low, high: Bounds of its value.
        unknowns: The unknown atoms it is made of.
    """

    __slots__ = ("args", "high", "kind", "low", "token", "unknowns")

    kind: str
    args: tuple[Size | str, ...]
    low: Bound
    high: Bound
    unknowns: frozenset[Atom]
    token: object


Monomial: TypeAlias = tuple[Atom, ...]


class Dim:
    """An integer that is not known: a sum of products of atoms, with whole coefficients.

    Immutable; `+`, `-` and `*` with each other and with `int` give a `Dim`, or an `int` where everything cancels. Two
    that are equal are equal numbers in every run of the model; two that differ may still be.
    """

    __slots__ = ("_bounds", "_hash", "_symbol", "terms")

    def __init__(self, terms: tuple[tuple[Monomial, int], ...], bounds: tuple[Bound, Bound] | None = None) -> None:
        self.terms = terms
        self._hash = hash(terms)
        self._bounds = bounds
        self._symbol: ir.SymbolicDim | None = None

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Dim) and self._hash == other._hash and self.terms == other.terms)

    def __hash__(self) -> int:
        return self._hash

    def __add__(self, other: Size) -> Size:
        sums = dict(self.terms)
        for monomial, factor in _terms(other):
            sums[monomial] = sums.get(monomial, 0) + factor
        return _polynomial(sums)

    __radd__ = __add__

    def __neg__(self) -> Size:
        return Dim(tuple((monomial, -factor) for monomial, factor in self.terms))

    def __sub__(self, other: Size) -> Size:
        return self + -other

    def __rsub__(self, other: Size) -> Size:
        return -self + other

    def __mul__(self, other: Size) -> Size:
        if isinstance(other, int):
            if other in (0, 1):
                return self if other else 0
            return Dim(tuple((monomial, factor * other) for monomial, factor in self.terms))
        products: dict[Monomial, int] = {}
        for first, factor in self.terms:
            for second, other_factor in other.terms:
                monomial = tuple(sorted(first + second))
                products[monomial] = products.get(monomial, 0) + factor * other_factor
        return _polynomial(products)

    __rmul__ = __mul__

    @property
    def bounds(self) -> tuple[Bound, Bound]:
        """The least and the largest value it can have, as far as known."""
        if self._bounds is None:
            ranges = [_scaled(_range_of(monomial), factor) for monomial, factor in self.terms]
            self._bounds = _sum(low for low, _ in ranges), _sum(high for _, high in ranges)
        return self._bounds

    @property
    def unknowns(self) -> frozenset[Atom]:
        """The unknown atoms it is made of."""
        return frozenset().union(*(atom.unknowns for monomial, _ in self.terms for atom in monomial))

    @property
    def atom(self) -> Atom | None:
        """The one atom it is, if it is no more than that."""
        (monomial, factor), *more = self.terms
        return monomial[0] if not more and factor == 1 and len(monomial) == 1 else None

    @property
    def symbol(self) -> ir.SymbolicDim:
        """The dimension as a shape of the IR holds it."""
        if self._symbol is None:
            atom = self.atom
            named = atom is not None and atom.kind == "name"
            self._symbol = ir.SymbolicDim(str(atom.args[0])) if named and atom is not None else Symbol(self)
        return self._symbol

    def __str__(self) -> str:
        ordered = sorted(self.terms, key=lambda term: (-len(term[0]), term[0]))
        text = " + ".join(_term_text(monomial, factor) for monomial, factor in ordered)
        return text.replace(" + -", " - ")

    __repr__ = __str__


Size: TypeAlias = int | Dim


class Symbol(ir.SymbolicDim):
    """A dimension that was inferred: it carries what it stands for, so that its text is for reading only."""

    __slots__ = ("dim",)

    def __init__(self, dim: Dim) -> None:
        # No name an exporter gives starts like this: equal texts must be equal sizes.
        super().__init__(f"={dim}")
        self.dim = dim

    def __deepcopy__(self, memo: object) -> Symbol:
        return self


def _terms(size: Size) -> Iterable[tuple[Monomial, int]]:
    return size.terms if isinstance(size, Dim) else (((), size),)


def _polynomial(sums: dict[Monomial, int]) -> Size:
    terms = sorted((term for term in sums.items() if term[1]), key=itemgetter(0))
    if not terms:
        return 0
    if len(terms) == 1 and not terms[0][0]:
        return terms[0][1]
    if len(terms) > TERMS_LIMIT or any(len(one) > DEGREE_LIMIT or abs(by) >= FACTOR_LIMIT for one, by in terms):
        return unknown(signed=True)
    return Dim(tuple(terms))


def _term_text(monomial: Monomial, factor: int) -> str:
    if not monomial:
        return str(factor)
    text = "*".join(monomial)
    return text if factor == 1 else f"-{text}" if factor == -1 else f"{factor}*{text}"


# Bounds


def _range_of(monomial: Monomial) -> tuple[Bound, Bound]:
    if len(monomial) == 1:
        return monomial[0].low, monomial[0].high
    low, high = 1, 1
    bounded = True
    for atom in monomial:
        if atom.low is None or atom.low < 0:
            return None, None
        low *= atom.low
        bounded = bounded and atom.high is not None
        high *= atom.high if atom.high is not None else 1
    return low, high if bounded else None


def _scaled(bounds: tuple[Bound, Bound], factor: int) -> tuple[Bound, Bound]:
    low, high = (None if bound is None else bound * factor for bound in bounds)
    return (low, high) if factor > 0 else (high, low)


def _sum(bounds: Iterable[Bound]) -> Bound:
    total = 0
    for bound in bounds:
        if bound is None:
            return None
        total += bound
    return total


def bounds(size: Size) -> tuple[Bound, Bound]:
    """Return the least and the largest value a size can have, as far as known."""
    return size.bounds if isinstance(size, Dim) else (size, size)


def at_least(size: Size, limit: int) -> bool:
    """Return whether a size provably is no less than a limit."""
    low = size if isinstance(size, int) else size.bounds[0]
    return low is not None and low >= limit


def at_most(size: Size, limit: int) -> bool:
    """Return whether a size provably is no more than a limit."""
    high = size if isinstance(size, int) else size.bounds[1]
    return high is not None and high <= limit


def differ(a: Size, b: Size) -> bool:
    """Return whether two sizes provably differ."""
    if isinstance(a, int) and isinstance(b, int):
        return a != b
    gap = a - b
    return at_least(gap, 1) or at_most(gap, -1)


def as_dimension(size: Size) -> Size:
    """Return a size that is a dimension of a tensor, and therefore not negative."""
    if isinstance(size, int) or at_least(size, 0):
        return size
    return Dim(size.terms, (0, size.bounds[1]))


# Atoms


@lru_cache(maxsize=1 << 14)
def named(name: str) -> Dim:
    """Return the size that a model calls by a name; equal names are equal sizes.

    A name that reads like arithmetic (``past + 1``) is a name all the same: runtimes do not compute with it either.
    """
    text = name if _PLAIN_NAME.fullmatch(name) else f"`{name}`"
    return _single(_atom(text, "name", (name,), 0, None, frozenset()))


def unknown(*, signed: bool = False) -> Dim:
    """Return a size that equals nothing but itself; not negative unless it is signed."""
    token = object()
    atom = _atom(f"?{id(token):x}", "unknown", (), None if signed else 0, None, frozenset())
    atom.token = token
    atom.unknowns = frozenset((atom,))
    return _single(atom)


def operation(kind: str, args: tuple[Size, ...], low: Bound = None, high: Bound = None) -> Dim:
    """Return the result of an operation that is kept as it is; equal operands give equal results."""
    text = f"{kind}({', '.join(map(str, args))})"
    if len(text) > TEXT_LIMIT:
        return unknown(signed=low is None or low < 0)
    unknowns = frozenset().union(*(arg.unknowns for arg in args if isinstance(arg, Dim)))
    return _single(_atom(text, kind, args, low, high, unknowns))


def _single(atom: Atom) -> Dim:
    return Dim((((atom,), 1),))


def _atom(
    text: str, kind: str, args: tuple[Size | str, ...], low: Bound, high: Bound, unknowns: frozenset[Atom]
) -> Atom:
    atom = Atom(text)
    atom.kind, atom.args, atom.low, atom.high, atom.unknowns, atom.token = kind, args, low, high, unknowns, None
    return atom


# Operations


def product(sizes: Iterable[Size]) -> Size:
    """Return the product of sizes."""
    total: Size = 1
    for size in sizes:
        total = total * size
    return total


def divide_exactly(a: Size, b: Size) -> Size | None:
    """Return the polynomial q with a = q · b, or None where there is none; b must not be zero in any run."""
    if isinstance(b, int):
        if b == 0 or any(factor % b for _, factor in _terms(a)):
            return None
        return _polynomial({monomial: factor // b for monomial, factor in _terms(a)})
    if a == b:
        return 1
    if a == 0:
        return 0
    if len(b.terms) != 1:
        return None
    divisor, by = b.terms[0]
    quotient: dict[Monomial, int] = {}
    for monomial, factor in _terms(a):
        left = list(monomial)
        for atom in divisor:
            if atom not in left:
                return None
            left.remove(atom)
        if factor % by:
            return None
        quotient[tuple(left)] = factor // by
    return _polynomial(quotient)


def floordiv(a: Size, b: Size) -> Size:
    """Return a / b rounded down; b must not be zero in any run."""
    if isinstance(a, int) and isinstance(b, int):
        return a // b
    exact = divide_exactly(a, b)
    if exact is not None:
        return exact
    if isinstance(b, int):
        return _floordiv_by_number(a, b)
    low, high = (0, bounds(a)[1]) if at_least(a, 0) and at_least(b, 0) else (None, None)
    return operation("floordiv", (a, b), low, high)


def _floordiv_by_number(a: Size, b: int) -> Size:
    """Divide by a number: what it divides comes out, and a quotient of a quotient is one quotient."""
    if b < 0:
        a, b = -a, -b
    whole = _polynomial({monomial: factor // b for monomial, factor in _terms(a) if factor % b == 0})
    rest = _polynomial({monomial: factor for monomial, factor in _terms(a) if factor % b})
    # Of a number, the part below b stays: floor((x + 7) / 2) = 3 + floor((x + 1) / 2).
    constant = next((factor for monomial, factor in _terms(rest) if not monomial), 0)
    whole, rest = whole + constant // b, rest - constant + constant % b
    if isinstance(rest, int):
        return whole + rest // b
    inner = rest.atom
    if inner is not None and inner.kind == "floordiv" and isinstance(inner.args[1], int) and inner.args[1] > 0:
        numerator = inner.args[0]
        assert not isinstance(numerator, str)
        return whole + floordiv(numerator, inner.args[1] * b)
    low, high = (None if bound is None else bound // b for bound in rest.bounds)
    return whole + operation("floordiv", (rest, b), low, high)


def ceildiv(a: Size, b: int) -> Size:
    """Return a / b rounded up; b > 0."""
    return floordiv(a + (b - 1), b)


def mod(a: Size, b: Size) -> Size:
    """Return a modulo b with the sign of b; b must not be zero in any run."""
    if isinstance(a, int) and isinstance(b, int):
        return a % b
    if isinstance(b, int) and b > 0:
        rest = _polynomial({monomial: factor % b for monomial, factor in _terms(a)})
        if isinstance(rest, int):
            return rest % b
        return rest if at_least(rest, 0) and at_most(rest, b - 1) else operation("mod", (rest, b), 0, b - 1)
    if divide_exactly(a, b) is not None:
        return 0
    return operation("mod", (a, b), 0 if at_least(b, 1) else None)


def minimum(a: Size, b: Size) -> Size:
    """Return the smaller of two sizes."""
    return _extreme("min", a, b)


def maximum(a: Size, b: Size) -> Size:
    """Return the larger of two sizes."""
    return _extreme("max", a, b)


def _extreme(kind: str, a: Size, b: Size) -> Size:
    gap = a - b
    if at_least(gap, 0):
        return b if kind == "min" else a
    if at_most(gap, 0):
        return a if kind == "min" else b
    operands = sorted({*_operands(kind, a), *_operands(kind, b)}, key=str)
    lows, highs = [bounds(size)[0] for size in operands], [bounds(size)[1] for size in operands]
    return operation(kind, tuple(operands), _bound(lows, kind == "max", max), _bound(highs, kind == "min", min))


def _bound(limits: list[Bound], any_will_do: bool, pick: Callable[[list[int]], int]) -> Bound:
    known = [limit for limit in limits if limit is not None]
    if any_will_do:
        return pick(known) if known else None
    opposite = min if pick is max else max
    return opposite(known) if len(known) == len(limits) else None


def _operands(kind: str, size: Size) -> tuple[Size, ...]:
    atom = size.atom if isinstance(size, Dim) else None
    if atom is None or atom.kind != kind:
        return (size,)
    return tuple(arg for arg in atom.args if not isinstance(arg, str))


def equal(a: Size, b: Size) -> Size:
    """Return 1 where two sizes are equal, 0 where they differ."""
    if a == b:
        return 1
    if differ(a, b):
        return 0
    gap = a - b
    assert isinstance(gap, Dim)
    return operation("zero", (gap if gap.terms[-1][1] > 0 else -gap,), 0, 1)


def less(a: Size, b: Size) -> Size:
    """Return 1 where a < b, else 0."""
    gap = b - a
    if at_least(gap, 1):
        return 1
    return 0 if at_most(gap, 0) else operation("positive", (gap,), 0, 1)


def choose(condition: Size, a: Size, b: Size) -> Size:
    """Return a where a condition is not zero, else b."""
    if a == b or (isinstance(condition, int) and condition):
        return a
    if at_least(condition, 1):
        return a
    if isinstance(condition, int):
        return b
    lows, highs = [bounds(a)[0], bounds(b)[0]], [bounds(a)[1], bounds(b)[1]]
    return operation("choose", (condition, a, b), _bound(lows, False, max), _bound(highs, False, min))


def joined(a: Size, b: Size) -> Size | None:
    """Return the size that two dimensions broadcast to, or None where they cannot."""
    if a == b or b == 1:
        return a
    if a == 1:
        return b
    for one, other in ((a, b), (b, a)):
        if isinstance(one, int):
            return one if isinstance(other, Dim) and not _exclude_each_other(one, other) else None
        # Beyond its limit c ≥ 1, min(n, c) would be no 1 to broadcast, nor n, unless c is 1.
        if other in (operands := _operands("min", one)) and all(at_least(o, 1) for o in operands if o != other):
            return other
    for one, other in ((a, b), (b, a)):
        if at_least(one, 2):
            return None if _exclude_each_other(one, other) else one
    operands = tuple(sorted({*_operands("joined", a), *_operands("joined", b)}, key=str))
    return operation("joined", operands, 0)


def _exclude_each_other(one: Size, other: Size) -> bool:
    """Return whether a dimension that is not 1 never broadcasts with another."""
    return differ(one, other) and differ(other, 1)


_MEANINGS: Mapping[str, Callable[..., int]] = {
    "floordiv": lambda a, b: a // b,
    "mod": lambda a, b: a % b,
    "quotient": lambda a, b: int(math.copysign(abs(a) // abs(b), a * b)),
    "remainder": lambda a, b: int(math.fmod(a, b)),
    "min": lambda *sizes: min(sizes),
    "max": lambda *sizes: max(sizes),
    "zero": lambda a: int(a == 0),
    "positive": lambda a: int(a > 0),
    "choose": lambda condition, a, b: a if condition else b,
    "joined": lambda *sizes: next((size for size in sizes if size != 1), 1),
}


def evaluate(size: Size, sizes: Mapping[str, int]) -> int | None:
    """Return what a size is for given named sizes, or None where it hangs on one that is not given.

    Unknown sizes may be given too, under the text of their atoms.

    Raises:
        ZeroDivisionError: A divisor in it becomes zero: no run of the model gets there.
    """
    if isinstance(size, int):
        return size
    total = 0
    for monomial, factor in size.terms:
        values = [_atom_value(atom, sizes) for atom in monomial]
        if None in values:
            return None
        total += factor * math.prod(value for value in values if value is not None)
    return total


def _atom_value(atom: Atom, sizes: Mapping[str, int]) -> int | None:
    if atom.kind == "name":
        return sizes.get(str(atom.args[0]))
    if atom.kind == "unknown":
        return sizes.get(str(atom))
    values = [evaluate(arg, sizes) for arg in atom.args if not isinstance(arg, str)]
    if atom.kind not in _MEANINGS or None in values:
        return None
    return _MEANINGS[atom.kind](*values)
