"""Symbolic integers: equal ones look equal, bounds hold, and every form has the value it stands for."""

from __future__ import annotations

import copy

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt import dims as d
from graphopt.dims import Dim, Size, named, unknown
from graphopt.shape_rules.math import divided

A, B, C = named("a"), named("b"), named("past + 1")
ATOMS = (A, B, C)
SIZES = st.fixed_dictionaries({"a": st.integers(0, 9), "b": st.integers(0, 9), "past + 1": st.integers(0, 9)})


def written(depth: int) -> st.SearchStrategy[tuple[Size, str]]:
    """Return sizes, each with the Python expression it was made by."""
    leaf = st.one_of(
        st.integers(-4, 6).map(lambda n: (n, f"({n})")),
        st.sampled_from([(A, "a"), (B, "b"), (C, "c")]),
    )
    if not depth:
        return leaf
    inner = written(depth - 1)

    def join(kind: str, x: tuple[Size, str], y: tuple[Size, str], k: int) -> tuple[Size, str]:
        (p, text), (q, other) = x, y
        made: dict[str, tuple[Size, str]] = {
            "+": (p + q, f"({text} + {other})"),
            "-": (p - q, f"({text} - {other})"),
            "*": (p * q, f"({text} * {other})"),
            "//": (d.floordiv(p, k), f"({text} // {k})"),
            "up": (d.ceildiv(p, k), f"(-(-({text}) // {k}))"),
            "%": (d.mod(p, k), f"({text} % {k})"),
            "min": (d.minimum(p, q), f"min({text}, {other})"),
            "max": (d.maximum(p, q), f"max({text}, {other})"),
            "==": (d.equal(p, q), f"int({text} == {other})"),
            "<": (d.less(p, q), f"int({text} < {other})"),
            "if": (d.choose(p, q, k), f"(({other}) if {text} else {k})"),
            "/": (divided(p, k), f"int(({text}) / {k})"),
        }
        return made[kind]

    kinds = st.sampled_from(["+", "-", "*", "//", "up", "%", "min", "max", "==", "<", "if", "/"])
    return st.one_of(leaf, st.builds(join, kinds, inner, inner, st.integers(1, 5)))


def meant(text: str, sizes: dict[str, int]) -> int:
    return int(eval(text, {}, {"a": sizes["a"], "b": sizes["b"], "c": sizes["past + 1"], "min": min, "max": max}))


@given(written(3), SIZES)
def test_value_and_bounds_are_those_of_the_expression(made: tuple[Size, str], sizes: dict[str, int]) -> None:
    size, text = made
    value = d.evaluate(size, sizes)
    assert value == meant(text, sizes)
    low, high = d.bounds(size)
    assert low is None or low <= value
    assert high is None or value <= high


@given(written(2), written(2), SIZES)
def test_equal_sizes_have_equal_values(one: tuple[Size, str], other: tuple[Size, str], sizes: dict[str, int]) -> None:
    if one[0] == other[0]:
        assert hash(one[0]) == hash(other[0])
        assert meant(one[1], sizes) == meant(other[1], sizes)
    if d.differ(one[0], other[0]):
        assert meant(one[1], sizes) != meant(other[1], sizes)


@given(written(1), written(1), SIZES)
def test_joined_is_what_broadcasts(one: tuple[Size, str], other: tuple[Size, str], sizes: dict[str, int]) -> None:
    first, second = (d.as_dimension(size) for size, _ in (one, other))
    x, y = meant(one[1], sizes), meant(other[1], sizes)
    joined = d.joined(first, second)
    if x < 0 or y < 0 or (x != y and 1 not in (x, y)):
        return  # no run has these
    assert joined is not None
    assert d.evaluate(joined, sizes) == (y if x == 1 else x)


@given(written(2), st.integers(1, 6))
def test_exact_division_is_undone_by_a_product(made: tuple[Size, str], divisor: int) -> None:
    assert d.divide_exactly(made[0] * divisor, divisor) == made[0]
    quotient = d.divide_exactly(made[0] * A, A)
    assert quotient == made[0]


def test_forms_are_canonical() -> None:
    assert (A + B) * (A - B) == A * A - B * B
    assert A - A == 0
    assert d.floordiv(2 * A + 7, 2) == A + 3
    assert d.floordiv(d.floordiv(A, 2), 3) == d.floordiv(A, 6)
    assert d.ceildiv(4 * A, 4) == A
    assert d.mod(4 * A + 6, 4) == 2
    assert d.minimum(A, A + 1) == A
    assert d.maximum(d.maximum(A, B), A) == d.maximum(B, A)
    assert d.joined(d.minimum(A, 512), A) == A
    assert d.equal(A, -1) == 0


def test_unknown_sizes_equal_nothing_but_themselves() -> None:
    first, second = unknown(), unknown()
    assert first + second == second + first
    assert first != second
    assert first + 1 != second + 1
    assert d.evaluate(first, {}) is None
    assert first.unknowns.isdisjoint(second.unknowns)
    assert d.at_least(first, 0)
    assert not d.at_least(unknown(signed=True), 0)


def test_what_grows_without_end_becomes_unknown() -> None:
    size: Size = A + B
    for _ in range(200):
        size = d.maximum(size * size + C, 2 * size - 1)
    assert len(str(size)) < 3 * d.TEXT_LIMIT


def test_what_a_shape_shows() -> None:
    assert A.symbol.value == "a"
    assert C.symbol.value == "past + 1"
    twice = 2 * A
    assert isinstance(twice, Dim)
    assert twice.symbol.value == "=2*a"
    assert copy.deepcopy(twice.symbol) is twice.symbol


def test_a_name_is_no_arithmetic() -> None:
    assert named("past + 1") != named("past") + 1


@pytest.mark.parametrize(("a", "b", "expected"), [(7, 2, 3), (-7, 2, -3), (7, -2, -3), (-7, -2, 3), (0, 5, 0)])
def test_integers_divide_toward_zero(a: int, b: int, expected: int) -> None:
    assert divided(a, b) == expected
