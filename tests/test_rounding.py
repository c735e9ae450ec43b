"""Rounding by coordinate descent, against all codes of small problems."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from graphopt.passes.solvers.gptq import gptq
from graphopt.passes.solvers.grid import Grid, GridWeight, round_to_nearest
from graphopt.passes.solvers.objective import output_error
from graphopt.passes.solvers.refinement import refine
from graphopt.passes.solvers.rounding import descend

RNG = np.random.default_rng(0)


def problem(outputs: int, inputs: int, groups: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Return a weight, and a second moment of inputs that hang together."""
    mixing = RNG.normal(size=(groups, inputs, inputs))
    rows = RNG.normal(size=(groups, 200, inputs)) @ mixing
    weight = RNG.normal(size=(groups * outputs, inputs)).astype(np.float32)
    return weight, (rows.transpose(0, 2, 1) @ rows / 200).astype(np.float32)


def error_of(weight: np.ndarray, found: GridWeight, moment: np.ndarray) -> float:
    return output_error(weight - found.values(), moment)


@pytest.mark.parametrize("grid", [Grid(bits=2, narrow=False), Grid(bits=3), Grid(bits=2, symmetric=False)])
def test_no_single_code_can_be_changed_for_the_better(grid: Grid) -> None:
    weight, moment = problem(5, 6)
    found = descend(weight, round_to_nearest(weight, grid), moment, damping=0.0)
    least = error_of(weight, found, moment)
    for output, column in np.ndindex(*weight.shape):
        for code in range(grid.lowest, grid.highest + 1):
            codes = found.codes.copy()
            codes[output, column] = code
            changed = GridWeight(grid, codes, found.scales, found.zero_points, 0.0)
            assert error_of(weight, changed, moment) >= least * (1 - 1e-4)


def test_finds_nearly_the_best_of_all_codes() -> None:
    grid, gained = Grid(bits=2, narrow=False), []
    for _ in range(10):
        weight, moment = problem(1, 4)
        start = gptq(weight, grid, moment)
        found = descend(weight, start, moment, damping=0.0)
        every = itertools.product(range(grid.lowest, grid.highest + 1), repeat=4)
        errors = [
            error_of(weight, GridWeight(grid, np.array([codes], np.int8), start.scales, None, 0.0), moment)
            for codes in every
        ]
        assert found.error >= min(errors) * (1 - 1e-4)
        gained.append(found.error / max(min(errors), 1e-9))
    assert np.median(gained) < 1.5


@pytest.mark.parametrize(
    "grid", [Grid(), Grid(bits=4, block=3), Grid(bits=4, symmetric=False, block=4), Grid(tensor=True)]
)
@pytest.mark.parametrize("groups", [1, 3])
def test_is_never_worse_than_the_start_and_says_its_error(grid: Grid, groups: int) -> None:
    weight, moment = problem(4, 8, groups)
    for start in (round_to_nearest(weight, grid, second_moment=moment), gptq(weight, grid, moment)):
        found = descend(weight, start, moment)
        assert found.error <= error_of(weight, start, moment)
        assert found.error == pytest.approx(error_of(weight, found, moment))
        assert found.codes.min() >= grid.lowest
        assert found.codes.max() <= grid.highest
        np.testing.assert_array_equal(found.scales, start.scales)


def test_beats_rounding_to_nearest_where_inputs_hang_together() -> None:
    weight, moment = problem(64, 32)  # many outputs: single ones can be lucky to begin with
    start = round_to_nearest(weight, Grid(bits=4), second_moment=moment)
    assert descend(weight, start, moment).error < 0.7 * start.error


def test_inputs_that_are_never_seen_leave_the_codes_alone() -> None:
    weight, _ = problem(3, 4)
    start = round_to_nearest(weight, Grid())
    np.testing.assert_array_equal(descend(weight, start, np.zeros((4, 4), np.float32)).codes, start.codes)


def test_pruned_weights_stay_zero_though_others_could_use_them() -> None:
    weight, moment = problem(8, 12)
    weight[RNG.random(weight.shape) < 0.5] = 0
    for grid in (Grid(bits=2, narrow=False), Grid(bits=3, symmetric=False)):
        found = refine(weight, gptq(weight, grid, moment[0]), moment[0])
        assert not found.values()[weight == 0].any()
