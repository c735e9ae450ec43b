"""The column solver, against brute force over all subsets and least squares on the data itself."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.passes.solvers import columns
from graphopt.passes.solvers.columns import Reader
from graphopt.passes.solvers.objective import DAMPING, output_error

# A ridge far below what the tests tell apart.
LITTLE = 1e-10


def rows(seed: int, count: int = 400, inputs: int = 6) -> np.ndarray:
    """Samples [rows, inputs] whose inputs go together, some much more than others."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((inputs, inputs)) * rng.uniform(0.2, 2.0, inputs)
    return rng.standard_normal((count, inputs)) @ mix


def moment(x: np.ndarray) -> np.ndarray:
    return x.T @ x / len(x)


def weight_of(seed: int, outputs: int = 4, inputs: int = 6) -> np.ndarray:
    return np.random.default_rng(100 + seed).standard_normal((outputs, inputs))


def least_error(x: np.ndarray, targets: np.ndarray, keep: np.ndarray) -> float:
    """What is left of targets, mean over rows, by the best weights of the inputs kept."""
    solution = np.linalg.lstsq(x[:, keep], targets, rcond=None)[0]
    return float(np.square(targets - x[:, keep] @ solution).sum() / len(x))


@pytest.mark.parametrize("seed", range(4))
def test_compensated_weights_are_those_of_least_squares_on_the_data(seed: int) -> None:
    x, weight = rows(seed), weight_of(seed)
    keep = np.array([True, False, True, True, False, True])
    found = columns.refitted(weight, moment(x), keep=keep[None], damping=LITTLE)
    wanted = np.linalg.lstsq(x[:, keep], x @ weight.T, rcond=None)[0].T
    np.testing.assert_allclose(found[:, keep], wanted, rtol=1e-6)
    assert (found[:, ~keep] == 0).all()
    assert output_error(weight - found, moment(x)) == pytest.approx(least_error(x, x @ weight.T, keep), rel=1e-6)


def test_regressed_weights_give_what_the_layer_gave_before_its_inputs_changed() -> None:
    x = rows(0)
    changed = np.maximum(x @ np.random.default_rng(1).standard_normal((6, 6)), 0)
    targets = x @ weight_of(0).T
    cross = targets.T @ changed / len(x)
    found = columns.refitted(weight_of(0), moment(changed), cross=cross, damping=LITTLE)
    np.testing.assert_allclose(found, np.linalg.lstsq(changed, targets, rcond=None)[0].T, rtol=1e-6)
    keep = np.array([True, True, False, True, False, True])
    wanted = np.linalg.lstsq(changed[:, keep], targets, rcond=None)[0].T
    at_once = columns.refitted(weight_of(0), moment(changed), keep=keep[None], cross=cross, damping=LITTLE)
    one_by_one = columns.refitted(found, moment(changed), keep=keep[None], damping=LITTLE)
    np.testing.assert_allclose(at_once[:, keep], wanted, rtol=1e-6)
    np.testing.assert_allclose(one_by_one[:, keep], wanted, rtol=1e-6)


def test_inputs_without_data_keep_their_weights() -> None:
    x = rows(0)
    x[:, 2] = 0
    weight = weight_of(0)
    found = columns.refitted(weight, moment(x), cross=weight @ moment(x))
    np.testing.assert_allclose(found, weight)
    nothing = np.zeros((6, 6))
    assert np.array_equal(columns.refitted(weight, nothing, cross=weight @ nothing), weight)
    keep = np.array([[True, False, True, True, True, True]])
    assert np.array_equal(columns.refitted(weight, nothing, keep=keep), weight * keep)
    assert len(columns.removal_order([Reader(weight, nothing, np.arange(6)[None])], 6).order) == 5


@pytest.mark.parametrize("seed", range(4))
def test_each_step_removes_the_unit_without_which_the_rest_does_best(seed: int) -> None:
    x, weight = rows(seed, inputs=8), weight_of(seed, inputs=8)
    units = np.array([0, 1, 2, 3, 0, 1, 2, 3])
    removal = columns.removal_order([Reader(weight, moment(x), units[None], damping=LITTLE)], 4)
    gone: list[int] = []
    for unit, error in zip(removal.order, removal.errors[1:], strict=True):
        left = [one for one in range(4) if one not in gone]
        errors = {one: least_error(x, x @ weight.T, ~np.isin(units, [*gone, one])) for one in left}
        assert unit == min(errors, key=lambda one: errors[one])
        assert error == pytest.approx(errors[unit], rel=1e-5)
        gone.append(int(unit))


def test_greedy_choice_is_close_to_the_best_of_all_subsets() -> None:
    ratios = []
    for seed in range(20):
        x, weight = rows(seed, inputs=8), weight_of(seed, inputs=8)
        removal = columns.removal_order([Reader(weight, moment(x), np.arange(8)[None], damping=LITTLE)], 8, most=3)
        errors = [
            least_error(x, x @ weight.T, ~np.isin(np.arange(8), gone)) for gone in itertools.combinations(range(8), 3)
        ]
        assert removal.errors[3] >= min(errors) * (1 - 1e-6)
        ratios.append(removal.errors[3] / min(errors))
    assert np.median(ratios) < 1.05
    assert max(ratios) < 3


def test_one_choice_serves_all_readers() -> None:
    first, second = rows(0, inputs=5), rows(1, inputs=10)
    small, large = weight_of(0, inputs=5), weight_of(1, inputs=10)
    of_second = np.array([-1, 0, 1, 2, 3, 4, 0, 1, 2, -1])  # units of different widths, and inputs of none
    readers = [
        Reader(small, moment(first), np.arange(5)[None], importance=2.0, damping=LITTLE),
        Reader(large, moment(second), of_second[None], damping=LITTLE),
    ]
    removal = columns.removal_order(readers, 5, most=2)
    for count in (1, 2):
        gone = removal.order[:count]
        apart = 2 * least_error(first, first @ small.T, ~np.isin(np.arange(5), gone))
        apart += least_error(second, second @ large.T, ~np.isin(of_second, gone))
        assert removal.errors[count] == pytest.approx(apart, rel=1e-5)


def test_groups_read_inputs_of_their_own() -> None:
    """A grouped convolution: unit 0 is the first input of either group."""
    halves = [rows(0, inputs=3), rows(1, inputs=3)]
    moments = np.stack([moment(half) for half in halves])
    weight = weight_of(0, outputs=4, inputs=3)
    removal = columns.removal_order([Reader(weight, moments, np.tile(np.arange(3), (2, 1)), damping=LITTLE)], 3)
    keep = np.ones((2, 3), bool)
    keep[:, removal.order[0]] = False
    found = columns.refitted(weight, moments, keep=keep, damping=LITTLE)
    for half, own, new in zip(halves, (weight[:2], weight[2:]), (found[:2], found[2:]), strict=True):
        wanted = np.linalg.lstsq(half[:, keep[0]], half @ own.T, rcond=None)[0].T
        np.testing.assert_allclose(new[:, keep[0]], wanted, rtol=1e-6)
    assert output_error(weight - found, moments) == pytest.approx(removal.errors[1], rel=1e-5)
    cross = np.concatenate([weight[:2] @ moments[0], weight[2:] @ moments[1]])
    unchanged = columns.refitted(weight, moments, cross=cross)
    np.testing.assert_allclose(unchanged, weight)


def test_units_nobody_reads_go_first_and_cost_nothing() -> None:
    x, weight = rows(0), weight_of(0)
    weight[:, 3] = 0
    removal = columns.removal_order([Reader(weight, moment(x), np.array([[0, 1, 2, 3, -1, 5]]))], 6, most=2)
    assert set(removal.order) == {3, 4}
    assert removal.errors.tolist() == pytest.approx([0, 0, 0], abs=1e-12)


def test_all_but_one_can_go_and_no_more() -> None:
    x, weight = rows(0), weight_of(0)
    removal = columns.removal_order([Reader(weight, moment(x), np.arange(6)[None])], 6, most=10)
    assert len(removal.order) == 5
    assert (np.diff(removal.errors) >= 0).all()
    assert len(columns.removal_order([], 3, most=0).order) == 0


def test_few_rows_are_damped_more_and_errors_on_others_fall() -> None:
    """Of 12 rows, 30 inputs can be explained by any 12: what is left out seems to cost nothing."""
    rng = np.random.default_rng(0)
    mix = rng.standard_normal((30, 30)) * np.geomspace(2, 0.1, 30)
    few, many = rng.standard_normal((12, 30)) @ mix, rng.standard_normal((4000, 30)) @ mix
    weight = rng.standard_normal((3, 30))
    dampings = [columns.damping_for(moment(few), rows) for rows in (12, 120, 12_000)]
    assert dampings[0] > dampings[1] > dampings[2] == DAMPING
    assert columns.damping_for(np.zeros((2, 5, 5)), 10) == DAMPING
    keep = np.arange(30)[None] % 2 == 0
    firm = columns.refitted(weight, moment(few), keep=keep, damping=dampings[0])
    loose = columns.refitted(weight, moment(few), keep=keep, damping=LITTLE)
    assert output_error(weight - loose, moment(few)) < output_error(weight - firm, moment(few))
    assert output_error(weight - loose, moment(many)) > output_error(weight - firm, moment(many))
