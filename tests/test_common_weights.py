"""One weight for several layers: the objective by definition, by brute force, and where it has no inverse."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.passes.solvers import common_weights
from graphopt.passes.solvers.common_weights import Pool, merges, pool_of, shrunk


def moment_of(rows: np.ndarray) -> np.ndarray:
    """Return E[x xᵀ] of [groups, rows, inputs]."""
    return (rows.transpose(0, 2, 1) @ rows / rows.shape[1]).astype(np.float32)


def pools(count: int, groups: int = 1, *, seed: int = 0, near: float = 1.0, diagonal: bool = False) -> list[Pool]:
    """Return pools of 5 outputs a group and 7 inputs around one weight, each reading inputs of its own kind."""
    rng = np.random.default_rng(seed)
    base, found = rng.standard_normal((groups, 5, 7)), []
    for _ in range(count):
        moment = moment_of(rng.standard_normal((groups, 40, 7)) @ rng.standard_normal((groups, 7, 7)))
        weight = (base + near * rng.standard_normal(base.shape)).astype(np.float32)
        found.append(pool_of(weight, np.diagonal(moment, axis1=1, axis2=2) if diagonal else moment))
    return found


def total(pools: list[Pool], weight: np.ndarray) -> float:
    """Return Σ tr((Wᵢ−W) Aᵢ (Wᵢ−W)ᵀ) by its definition."""
    error = 0.0
    for pool in pools:
        for own, at, moment in zip(pool.weight, weight, pool.moment, strict=True):
            difference = own.astype(np.float64) - at
            full = np.diag(moment) if moment.ndim == 1 else moment
            error += float(np.trace(difference @ full @ difference.T))
    return error


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("groups", [1, 3])
def test_the_common_weight_is_the_best_one(groups: int, diagonal: bool) -> None:
    three = pools(3, groups, diagonal=diagonal)
    first, one = three[0].join(three[1])
    joined, two = first.join(three[2])
    best = total(three, joined.weight)
    assert best == pytest.approx(one + two, rel=1e-5)
    rng = np.random.default_rng(1)
    for size in (1e-3, 1e-1, 1.0):
        step = size * rng.standard_normal(joined.weight.shape)
        assert total(three, joined.weight + step) > best
        # What is left is a quadratic around it.
        assert total(three, joined.weight + step) - best == pytest.approx(
            joined.error_at(joined.weight + step), rel=1e-3
        )
    average = np.mean([pool.weight for pool in three], axis=0)
    assert best < (0.99 if diagonal else 0.9) * total(three, average)


def test_the_order_of_joining_makes_no_difference() -> None:
    a, b, c = pools(3)
    one, _ = a.join(b)[0].join(c)
    other, _ = c.join(a)[0].join(b)
    assert np.allclose(one.weight, other.weight, atol=1e-5)
    assert np.allclose(one.moment, other.moment)


def test_shares_decide_whose_error_counts() -> None:
    a, b = pools(2)
    mostly, _ = a.scaled(1e6).join(b)
    assert np.allclose(mostly.weight, a.weight, atol=1e-3)


def test_the_quick_cost_is_exact_where_inputs_go_by_themselves() -> None:
    a, b = pools(2, groups=2, diagonal=True)
    assert a.quick_cost(b) == pytest.approx(a.join(b)[1], rel=1e-5)
    assert b.quick_cost(a) == pytest.approx(a.quick_cost(b))


def test_equal_weights_cost_nothing() -> None:
    (a,) = pools(1)
    again = Pool(a.weight.copy(), 3 * a.moment)
    joined, cost = a.join(again)
    assert cost == 0
    assert np.array_equal(joined.weight, a.weight)


@pytest.mark.parametrize("rows", [0, 1, 3])
def test_moments_without_an_inverse_are_no_trouble(rows: int) -> None:
    rng = np.random.default_rng(2)
    seen = np.zeros((1, 7, 7), np.float32) if rows == 0 else moment_of(rng.standard_normal((1, rows, 7)))
    weights = rng.standard_normal((2, 1, 5, 7)).astype(np.float32)
    a, b = (pool_of(weight, seen) for weight in weights)
    joined, cost = a.join(b)
    assert np.isfinite(joined.weight).all()
    assert np.allclose(joined.weight, weights.mean(0), atol=1e-5), "of one H, the best is the average"
    assert cost > 0


def test_wide_numbers_stay_wide() -> None:
    weights = np.random.default_rng(3).standard_normal((2, 1, 5, 7))
    a, b = (pool_of(weight, None) for weight in weights)
    assert a.join(b)[0].weight.dtype == np.float64
    assert pool_of(weights[0].astype(np.float16), None).weight.dtype == np.float32


def test_what_goes_together_by_chance_is_taken_back() -> None:
    rng = np.random.default_rng(4)
    mix = rng.standard_normal((60, 60)) * (rng.random((60, 60)) < 0.03) + np.eye(60)
    true = moment_of((rng.standard_normal((1, 20_000, 60)) @ mix).astype(np.float32))
    few = moment_of((rng.standard_normal((1, 40, 60)) @ mix).astype(np.float32))
    steadied = shrunk(few, 40)
    assert np.allclose(np.diagonal(steadied[0]), np.diagonal(few[0]))
    assert np.linalg.norm(steadied - true) < 0.8 * np.linalg.norm(few - true)
    # Of many rows hardly anything is noise.
    assert np.linalg.norm(shrunk(true, 20_000) - true) < 0.05 * np.linalg.norm(true)
    assert np.array_equal(shrunk(np.zeros((1, 3, 3), np.float32), 5), np.zeros((1, 3, 3)))


def test_each_merge_is_the_cheapest_there_is() -> None:
    found = pools(6, near=1.0)
    found[4] = Pool(found[1].weight + np.float32(0.01), found[4].moment)
    done = list(merges([range(6)], found, np.inf))
    assert len(done) == 5
    assert done[0].members == (1, 4)
    assert done[-1].members == (0, 1, 2, 3, 4, 5)
    cheapest = min(a.join(b)[1] for a, b in itertools.combinations(found, 2))
    assert found[1].join(found[4])[1] == cheapest


def test_no_more_is_merged_than_is_to_be_saved() -> None:
    found = pools(6)
    size = found[0].weight.size
    assert len(list(merges([range(6)], found, size / 2))) == 1
    assert not list(merges([range(6)], found, size / 5)), "that is another model than was asked for"
    assert len(list(merges([range(6)], found, 2 * size))) == 2
    assert not list(merges([range(6)], found, 0))
    assert not list(merges([[0], [1]], found, np.inf)), "one alone has no other"
    assert not list(merges([], found, np.inf))


def test_what_is_saved_beyond_the_goal_does_not_count() -> None:
    rng = np.random.default_rng(5)
    small = [pool_of(rng.standard_normal((1, 2, 3)).astype(np.float32) * 0.3, None) for _ in range(2)]
    large = [pool_of(rng.standard_normal((1, 20, 30)).astype(np.float32), None) for _ in range(2)]
    # A number less costs less in the large ones, but six are enough, which the small ones have.
    dear, cheap = small[0].join(small[1])[1] / 6, large[0].join(large[1])[1] / 600
    if cheap > dear:
        large = [pool.scaled(0.5 * dear / cheap) for pool in large]
    (merge,) = merges([(0, 1), (2, 3)], [*small, *large], 6)
    assert merge.members == (0, 1)


def test_of_many_pools_all_come_together_in_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common_weights, "_NEIGHBOURS", 1)
    done = list(merges([range(9)], pools(9), np.inf))
    assert done[-1].members == tuple(range(9))
    assert len(done) == 8
