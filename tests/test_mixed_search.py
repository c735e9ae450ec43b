"""The search for the fewest raised layers: against brute force, with few trials, and when it is cut short."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.passes.lossy.mixed_search import Move, OutOfTrials, after, fewest, in_order

COSTS = st.lists(st.integers(1, 1000).map(float), min_size=1, max_size=9)


def one_rung(costs: Sequence[float]) -> list[Move]:
    """Return the moves of layers that are either quantized or not."""
    return [Move(index, 1, cost, 1.0) for index, cost in enumerate(costs)]


class Additive:
    """Holds where the costs of the layers that are not raised add up to no more than a budget."""

    def __init__(self, costs: Sequence[float], budget: float, limit: int = 10**9) -> None:
        self.costs, self.budget, self.left, self.tried = costs, budget, limit, 0

    def __call__(self, raised: Mapping[int, int]) -> bool:
        if self.tried == self.left:
            raise OutOfTrials
        self.tried += 1
        return sum(cost for index, cost in enumerate(self.costs) if index not in raised) <= self.budget


def fewest_by_brute_force(costs: Sequence[float], holds: Additive) -> int:
    for count in range(len(costs) + 1):
        if any(holds(dict.fromkeys(chosen, 1)) for chosen in itertools.combinations(range(len(costs)), count)):
            return count
    raise AssertionError("all raised holds")


@given(COSTS, st.floats(0, 1.2))
def test_fewest_is_what_brute_force_finds_where_costs_add_up(costs: list[float], share: float) -> None:
    budget = share * sum(costs)
    if sum(costs) <= budget:
        return  # nothing needs to be raised, which is tried before any search
    found = fewest(in_order(one_rung(costs)), Additive(costs, budget))
    assert found is not None
    assert Additive(costs, budget)(found)
    assert len(found) == fewest_by_brute_force(costs, Additive(costs, budget))


def test_outliers_among_a_thousand_layers_cost_few_trials() -> None:
    costs = [1.0] * 1000
    costs[17] = costs[803] = 1e6
    holds = Additive(costs, 1000.0)
    found = fewest(in_order(one_rung(costs)), holds)
    assert found is not None
    assert set(found) == {17, 803}
    assert holds.tried < 10


def test_a_layer_ranked_too_high_is_taken_back() -> None:
    truth = [0.0, 50.0, 60.0, 1.0]
    misranked = one_rung([1000.0, 50.0, 60.0, 1.0])  # the first one looks worst, and is harmless
    found = fewest(in_order(misranked), Additive(truth, 5.0))
    assert found == {1: 1, 2: 1}


def test_none_where_not_even_all_raised_holds() -> None:
    assert fewest(in_order(one_rung([3.0, 2.0])), lambda raised: False) is None


@pytest.mark.parametrize("limit", range(12))
def test_when_trials_run_out_what_is_returned_holds(limit: int) -> None:
    costs = [float(2**index) for index in range(10)]
    found = fewest(in_order(one_rung(costs)), Additive(costs, 20.0, limit))
    assert found is None or Additive(costs, 20.0)(found)
    assert found is not None or limit < 4


def test_the_path_goes_by_error_saved_per_byte() -> None:
    moves = [Move(0, 1, 100.0, 50.0), Move(1, 1, 90.0, 10.0), Move(2, 1, 1.0, 1.0), Move(3, 1, 5.0, 0.0)]
    assert [move.layer for move in in_order(moves)] == [3, 1, 0, 2]


def test_rungs_of_a_layer_stay_in_order_also_where_the_second_step_is_worth_more() -> None:
    moves = [Move(0, 2, 100.0, 1.0), Move(0, 1, 1.0, 1.0), Move(1, 1, 30.0, 1.0), Move(1, 2, 0.1, 3.0)]
    path = in_order(moves)
    assert [(move.layer, move.rung) for move in path] == [(0, 1), (0, 2), (1, 1), (1, 2)]
    assert after(path, 2) == {0: 2}


def test_a_layer_goes_back_only_as_far_as_still_holds() -> None:
    path = in_order([Move(0, 1, 10.0, 1.0), Move(0, 2, 9.0, 1.0), Move(1, 1, 1.0, 1.0)])
    found = fewest(path, lambda raised: raised.get(0, 0) >= 1 and raised.get(1, 0) >= 1)
    assert found == {0: 1, 1: 1}
