"""Comparison of outputs agrees with plain formulas, whatever the outputs are."""

from __future__ import annotations

import math
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from graphopt.comparison import ABSOLUTE_TOLERANCE, RELATIVE_TOLERANCE, Comparison, OutputError, same_bits
from graphopt.errors import ModelError

RNG = np.random.default_rng(0)
A = RNG.standard_normal((20, 6)).astype(np.float32)
B = A + RNG.standard_normal((20, 6)).astype(np.float32) / 10


def error(*pairs: tuple[Any, Any]) -> OutputError:
    one = OutputError("y")
    for a, b in pairs:
        one.update(a, b)
    return one


def test_formulas_over_several_runs() -> None:
    found = error((A[:5], B[:5]), (A[5:], B[5:]))
    a, b = A.astype(float), B.astype(float)
    assert found.max_abs == pytest.approx(np.abs(a - b).max())
    assert found.max_rel == pytest.approx(np.abs(a - b).max() / np.abs(a).max())
    assert found.cosine == pytest.approx((a * b).sum() / np.linalg.norm(a) / np.linalg.norm(b))
    assert found.sqnr_db == pytest.approx(10 * np.log10((a**2).sum() / ((a - b) ** 2).sum()))
    assert found.top1_agreement == (a.argmax(1) == b.argmax(1)).mean()
    assert found.elements == a.size
    assert not found.equal


def test_equal_outputs() -> None:
    found = error((A, A.copy()))
    assert found.equal
    assert found.within(0)
    assert (found.max_abs, found.max_rel, found.sqnr_db, found.top1_agreement) == (0, 0, 200, 1)
    assert found.cosine == pytest.approx(1)


def test_zeros() -> None:
    zeros = np.zeros((2, 3), np.float32)
    both = error((zeros, zeros))
    assert (both.cosine, both.max_rel, both.sqnr_db) == (1, 0, 200)
    one = error((zeros, zeros + 1))
    assert (one.cosine, one.max_rel) == (0, math.inf)
    assert one.sqnr_db == -200


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_rounding_is_judged_by_dtype(dtype: str) -> None:
    a = np.linspace(-8, 8, 17).astype(dtype)
    allowed = RELATIVE_TOLERANCE[dtype] * 8 + ABSOLUTE_TOLERANCE[dtype]
    for share, within in ((0.8, True), (1.2, False)):
        b = a.copy()
        b[3] += np.asarray(share * allowed, dtype)
        assert error((a, b)).within() is within


def test_whole_numbers_are_not_rounded() -> None:
    a = np.arange(5)
    assert not error((a, a + (a == 2))).within()
    assert error((a, a + (a == 2))).within(1)
    assert error((a, a)).within()


def test_an_absolute_tolerance_is_one() -> None:
    found = error((A, A + np.float32(0.5)))
    assert found.within(0.6)
    assert not found.within(0.4)


@pytest.mark.parametrize(
    ("a", "b", "why"),
    [
        (A, A.astype(np.float64), "float32[20, 6] against float64[20, 6]"),
        (A, A[:3], "float32[20, 6] against float32[3, 6]"),
        ([A, A], [A], "sequences of different length"),
        ([A], A, "sequences of different length"),
        ({"a": 1}, {"a": 2}, "values differ"),
        (None, A, "values differ"),
        (A, None, "values differ"),
        ({"a": 1}, A, "values differ"),
        (np.array(["a"], object), np.array(["b"], object), "values differ"),
        (np.array([1.0, np.nan]), np.array([1.0, 2.0]), "NaN or infinity at different places"),
        (np.array([1.0, np.inf]), np.array([1.0, -np.inf]), "NaN or infinity at different places"),
    ],
)
def test_what_cannot_be_compared_is_never_within(a: Any, b: Any, why: str) -> None:
    found = error((a, b))
    assert found.mismatch == why
    assert not found.equal
    assert not found.within(math.inf)


@pytest.mark.parametrize(
    "value",
    [
        np.array([1.0, np.nan, np.inf, -np.inf], np.float32),
        np.array(["a", "b"], object),
        [A, B],
        {"a": 1.0},
        np.zeros((0, 3), np.float32),
        np.float32(3),
        np.array([True, False]),
        A.astype(ml_dtypes.bfloat16),
    ],
    ids=["odd numbers", "strings", "sequence", "map", "nothing", "scalar", "bool", "bfloat16"],
)
def test_everything_equals_itself(value: Any) -> None:
    found = error((value, value))
    assert found.equal
    assert found.mismatch is None
    assert found.within(0)


def test_odd_numbers_do_not_spoil_the_rest() -> None:
    a, b = np.array([1.0, np.nan, 3.0]), np.array([1.5, np.nan, 3.0])
    found = error((a, b))
    assert found.max_abs == 0.5
    assert found.mismatch is None


def test_bits() -> None:
    zero = np.zeros(2, np.float32)
    assert not same_bits(zero, -zero)
    assert error((zero, -zero)).within(0)
    quiet, other = np.array([0x7FC00000, 0x7FC00001], np.uint32).view(np.float32)
    assert same_bits(np.array([quiet]), np.array([other])), "all NaNs count as one"


def test_scalars_may_differ() -> None:
    found = error((np.array(2.0, np.float32), np.array(2.5, np.float32)))
    assert (found.equal, found.max_abs) == (False, 0.5)


def test_outputs_are_matched_by_name() -> None:
    comparison = Comparison()
    comparison.update({"p": A, "q": B}, {"q": B, "p": A})
    assert comparison.equal
    assert comparison.runs == 1
    with pytest.raises(ModelError, match="different outputs: `p`, `r`"):
        comparison.update({"p": A, "q": A}, {"q": A, "r": A})


def test_the_worst_output_speaks_for_all() -> None:
    comparison = Comparison()
    comparison.update({"good": A, "bad": A, "odd": A}, {"good": A, "bad": B, "odd": A[:1]})
    assert comparison.worst is comparison.outputs["odd"]
    assert comparison.max_abs_error == math.inf
    assert not comparison.within(1e9)
    comparison = Comparison()
    comparison.update({"good": A, "bad": A}, {"good": A, "bad": B})
    assert comparison.worst is comparison.outputs["bad"]
    assert comparison.sqnr_db == comparison.outputs["bad"].sqnr_db < 200


def test_nothing_to_compare_is_equal() -> None:
    assert Comparison().equal
    assert Comparison().worst is None
    assert Comparison().max_abs_error == 0


def test_rows_without_classes_have_no_agreement() -> None:
    assert error((A[:, 0], B[:, 0])).top1_agreement is None
    assert error((A[:, :1], B[:, :1])).top1_agreement is None


def test_outputs_that_cannot_be_compared_have_the_worst_sqnr() -> None:
    error = OutputError("y")
    error.update(np.ones(3, np.float32), np.full(3, np.nan, np.float32))
    assert error.sqnr_db == float("-inf")


def test_a_mask_value_does_not_hide_other_errors() -> None:
    lowest = np.finfo(np.float32).min
    error = OutputError("y")
    error.update(np.array([lowest, 1.0], np.float32), np.array([lowest, 40.0], np.float32))
    assert not error.within()
    error = OutputError("y")
    error.update(np.array([lowest, 1.0], np.float32), np.array([0.0, 1.0], np.float32))
    assert not error.within()
    error = OutputError("y")
    error.update(np.array([lowest, 1.0], np.float32), np.array([-np.inf, 1.0], np.float32))
    assert error.within()


def test_nothing_but_nan_says_nothing() -> None:
    comparison = Comparison()
    comparison.update({"y": np.full(3, np.nan, np.float32)}, {"y": np.full(3, np.nan, np.float32)})
    assert comparison.says_nothing
    comparison.update({"y": np.ones(3, np.float32)}, {"y": np.ones(3, np.float32)})
    assert not comparison.says_nothing
