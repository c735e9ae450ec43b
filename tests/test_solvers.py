"""Solvers against the definition of their objective, and against all answers there are on tiny problems."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest

from graphopt.backend import Array
from graphopt.passes.solvers.awq import awq
from graphopt.passes.solvers.gptq import gptq, inverse_factor
from graphopt.passes.solvers.grid import Grid, GridWeight, round_to_nearest
from graphopt.passes.solvers.hqq import hqq
from graphopt.passes.solvers.objective import output_error
from graphopt.passes.solvers.refinement import refine
from graphopt.passes.solvers.scale_search import mse

INT4 = Grid(4, symmetric=True, block=8, narrow=False, mirrored=True)
GRIDS = [
    Grid(8),
    Grid(7),
    Grid(8, tensor=True),
    Grid(8, symmetric=False),
    INT4,
    Grid(4, symmetric=True, block=8),
    Grid(4, symmetric=True, block=8, narrow=False),
    Grid(4, symmetric=False, block=8),
    Grid(4, symmetric=False, tensor=True),
    Grid(2, symmetric=False, block=4),
    Grid(2, symmetric=True, block=4, narrow=False, mirrored=True),
    Grid(3, symmetric=True, narrow=False, mirrored=True),
]
Solver = Callable[..., GridWeight]
SOLVERS: dict[str, Solver] = {
    "rtn": round_to_nearest,
    "mse": mse,
    "hqq": hqq,
    "gptq": gptq,
    "gptq refined": lambda weight, grid, second_moment: refine(
        weight, gptq(weight, grid, second_moment), second_moment
    ),
    "gptq in order": lambda weight, grid, second_moment: gptq(weight, grid, second_moment, by_importance=False),
}


def problem(seed: int, outputs: int = 12, inputs: int = 24) -> tuple[Array, Array]:
    """A weight with heavy tails, and the second moment of correlated inputs of different sizes."""
    generator = np.random.default_rng(seed)
    weight = generator.standard_t(4, (outputs, inputs)).astype(np.float32)
    mixed = generator.standard_normal((200, inputs)) @ generator.standard_normal((inputs, inputs))
    rows = (mixed * generator.gamma(1.0, 1.0, inputs)).astype(np.float32)
    return weight, rows.T @ rows / len(rows)


def by_definition(weight: Array, values: Array, moment: Array) -> float:
    """tr((W−Ŵ) H (W−Ŵ)ᵀ), spelled out."""
    difference = (weight - values).astype(np.float64)
    return float(np.trace(difference @ moment.astype(np.float64) @ difference.T))


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_answers_lie_on_the_grid_and_cost_what_they_say(name: str, grid: Grid) -> None:
    weight, moment = problem(3)
    found = SOLVERS[name](weight, grid, second_moment=moment)
    blocks = 1 if grid.block is None else weight.shape[1] // grid.block
    assert found.scales.shape == ((1, 1) if grid.tensor else (len(weight), blocks))
    assert found.scales.dtype == np.float32
    assert found.codes.dtype == (np.int8 if grid.symmetric else np.uint8)
    assert grid.lowest <= found.codes.min()
    assert found.codes.max() <= grid.highest
    assert (found.zero_points is None) == grid.symmetric
    scales = np.repeat(found.scales, weight.shape[1] // blocks, axis=1)
    zeros = (
        0 if found.zero_points is None else np.repeat(found.zero_points.astype(int), weight.shape[1] // blocks, axis=1)
    )
    values = (found.codes.astype(int) - zeros) * scales
    np.testing.assert_allclose(found.values(), values, rtol=1e-6)
    assert found.error == pytest.approx(by_definition(weight, values, moment), rel=1e-3)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_each_solver_beats_the_simpler_one(grid: Grid) -> None:
    for seed in range(2):
        weight, moment = problem(seed)
        nearest = round_to_nearest(weight, grid)
        assert mse(weight, grid).error <= nearest.error * 1.0001
        spanned = round_to_nearest(weight, grid, second_moment=moment).error
        searched = mse(weight, grid, second_moment=moment).error
        assert gptq(weight, grid, moment).error <= min(spanned, searched)
        assert gptq(weight, grid, moment, by_importance=False).error <= searched
        scaled = awq([weight], grid, moment, np.sqrt(np.diagonal(moment)))
        assert sum(one.error for one in scaled.solutions) <= searched * 1.0001


def test_columns_make_up_for_what_rounding_loses() -> None:
    """Over random problems GPTQ loses far less than rounding to nearest with the same scales."""
    ratios = []
    for seed in range(10):
        weight, moment = problem(seed, 16, 64)
        ratios.append(gptq(weight, INT4, moment).error / mse(weight, INT4, second_moment=moment).error)
    assert np.median(ratios) < 0.6


def test_with_uncorrelated_inputs_the_sweep_rounds_to_nearest() -> None:
    weight, _ = problem(0)
    moment = np.diag(np.linspace(1, 3, weight.shape[1])).astype(np.float32)
    np.testing.assert_array_equal(gptq(weight, INT4, moment).values(), mse(weight, INT4, second_moment=moment).values())


def test_the_sweep_comes_near_the_best_codes_there_are() -> None:
    """All 3^6 ternary rows tried: the sweep is never better than the best, and near it on average."""
    grid = Grid(2)  # codes −1, 0, 1
    excess = []
    for seed in range(12):
        weight, moment = problem(seed, 1, 6)
        found = gptq(weight, grid, moment, damping=1e-6)
        rows = np.array(list(itertools.product((-1, 0, 1), repeat=6))) * found.scales
        differences = weight - rows
        costs = np.einsum("ri,ij,rj->r", differences, moment, differences)
        assert found.error >= costs.min() * 0.999
        excess.append(found.error / max(costs.min(), 1e-9))
    assert np.median(excess) < 1.5


def test_scales_come_near_the_best_there_are() -> None:
    """A dense search of scales and all zero points finds next to nothing better."""
    generator = np.random.default_rng(0)
    for symmetric in (True, False):
        grid = Grid(3, symmetric=symmetric, narrow=False, mirrored=symmetric)
        excess = []
        for _ in range(12):
            weight = generator.standard_t(3, (1, 8)).astype(np.float32)
            found = mse(weight, grid)
            zeros: list[Array | None] = [None] if symmetric else [np.full((1, 1), z, np.float32) for z in range(8)]
            best = np.inf
            for scale in np.linspace(0.3, 1.1, 150) * np.abs(weight).max() / 3:
                for sign, zero in itertools.product((1, -1) if symmetric else (1,), zeros):
                    scales = np.full((1, 1), sign * scale, np.float32)
                    values = grid.decode(grid.encode(weight, scales, zero), scales, zero)
                    best = min(best, float(np.square(weight - values).sum()))
            excess.append(found.error / best)
        assert np.max(excess) < 1.2
        assert np.mean(excess) < 1.02


def test_a_weight_already_on_the_grid_is_kept_as_it_is() -> None:
    generator = np.random.default_rng(0)
    codes = generator.integers(-8, 8, (4, 16))
    codes[:, ::8] = -8  # each block reaches its end
    weight = (codes * 0.25).astype(np.float32)
    moment = problem(0, 4, 16)[1]
    for name, solve in SOLVERS.items():
        np.testing.assert_allclose(solve(weight, INT4, second_moment=moment).values(), weight, atol=1e-6, err_msg=name)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("name", SOLVERS)
def test_zero_constant_and_tiny_blocks(name: str, grid: Grid) -> None:
    weight = np.zeros((5, 16), np.float32)
    weight[1], weight[2], weight[3], weight[4, 3] = 0.5, -2.0, 1e-42, 7.0
    moment = np.zeros((16, 16), np.float32)  # inputs that never were anything but zero
    found = SOLVERS[name](weight, grid, second_moment=moment)
    assert np.isfinite(found.scales).all()
    assert (found.scales != 0).all()
    assert not found.values()[0].any()
    if not grid.tensor:
        np.testing.assert_allclose(found.values()[1:3], weight[1:3], rtol=1e-5)


def test_inputs_that_are_no_multiple_of_the_block() -> None:
    weight, moment = problem(1, 6, 21)
    for solve in SOLVERS.values():
        found = solve(weight, INT4, second_moment=moment)
        assert found.scales.shape == (6, 3)
        assert found.codes.shape == weight.shape
        assert found.error == pytest.approx(by_definition(weight, found.values(), moment), rel=1e-3)


def test_groups_are_solved_one_by_one() -> None:
    """Outputs in groups, each with a second moment of its own, are as many problems."""
    problems = [problem(seed, 4, 9) for seed in range(3)]
    weight = np.concatenate([weight for weight, _ in problems])
    moments = np.stack([moment for _, moment in problems])
    for name, solve in SOLVERS.items():
        whole = solve(weight, Grid(4), second_moment=moments)
        parts = [solve(weight, Grid(4), second_moment=moment) for weight, moment in problems]
        if not name.startswith("gptq"):  # which falls back to rounding for all groups at once
            np.testing.assert_allclose(whole.values(), np.concatenate([part.values() for part in parts]), rtol=1e-5)
        assert whole.error == pytest.approx(sum(part.error for part in parts), rel=1e-3)


def test_error_of_groups_is_their_sum() -> None:
    problems = [problem(seed, 4, 9) for seed in range(3)]
    differences = np.concatenate([weight for weight, _ in problems])
    expected = sum(by_definition(weight, np.zeros_like(weight), moment) for weight, moment in problems)
    assert output_error(differences, np.stack([moment for _, moment in problems])) == pytest.approx(expected, rel=1e-4)


def test_the_factor_is_that_of_the_inverse() -> None:
    moment = problem(0)[1]
    factor = inverse_factor(moment, 0.01)
    damped = moment + 0.01 * np.diagonal(moment).mean() * np.eye(len(moment))
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(len(moment)), atol=1e-3)
    assert not np.tril(factor, -1).any()


def test_a_singular_or_indefinite_second_moment_is_damped_until_it_works() -> None:
    weight, moment = problem(0)
    broken = moment - 0.2 * np.linalg.eigvalsh(moment)[-1] * np.eye(len(moment), dtype=np.float32)
    assert np.isfinite(inverse_factor(broken, 0.01)).all()
    flat = np.ones_like(moment)  # rank one
    assert np.isfinite(gptq(weight, INT4, flat).values()).all()


def test_least_scales_hold_for_each_solver() -> None:
    weight, moment = problem(0)
    least = np.full(len(weight), 0.5, np.float32)
    for solve in (round_to_nearest, mse):
        found = solve(weight, Grid(8), second_moment=moment, least_scales=least)
        assert (found.scales >= 0.5).all()
        assert found.raised == len(weight)
    assert (gptq(weight, Grid(8), moment, least_scales=least).scales >= 0.5).all()


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_refinement_never_loses_and_ends_where_no_code_alone_can_gain(grid: Grid) -> None:
    weight, moment = problem(4)
    begun = round_to_nearest(weight, grid, second_moment=moment)
    found = refine(weight, begun, moment, damping=0.0)
    assert found.error < begun.error
    for _ in range(20):
        further = refine(weight, found, moment, damping=0.0)
        if further.error >= found.error * (1 - 1e-6):
            break
        found = further
    generator = np.random.default_rng(0)
    for _ in range(200):
        row, column = generator.integers(len(weight)), generator.integers(weight.shape[1])
        for step in (-1, 1):
            codes = found.codes.astype(int)
            codes[row, column] += step
            if grid.lowest <= codes[row, column] <= grid.highest:
                values = grid.decode(codes, found.scales, found.zero_points)
                assert by_definition(weight, values, moment) >= found.error * 0.9999


def test_refinement_finds_the_best_scales_of_codes_that_stay() -> None:
    """Where the codes are right and one scale is not, it comes back."""
    generator = np.random.default_rng(0)
    codes = generator.integers(-8, 8, (4, 32)).astype(np.int8)
    scales = generator.uniform(0.5, 2, (4, 4)).astype(np.float32)
    weight = INT4.decode(codes, scales)
    moment = problem(0, 4, 32)[1]
    wrong = scales * generator.uniform(0.97, 1.03, scales.shape).astype(np.float32)
    error = by_definition(weight, INT4.decode(codes, wrong), moment)
    found = refine(weight, GridWeight(INT4, codes, wrong, None, error), moment)
    assert found.error < 1e-3 * error


def test_awq_keeps_the_product_and_finds_large_inputs() -> None:
    """One input a hundred times as large as the rest: scaling it up pays, and undoing it gives the weight back."""
    weight, _ = problem(0, 32, 32)
    sizes = np.ones(32, np.float32)
    sizes[5] = 100
    moment = np.diag(np.square(sizes))
    plain = round_to_nearest(weight, INT4, second_moment=moment).error
    found = awq([weight], INT4, moment, sizes, round_to_nearest)
    assert found.factors[5] == found.factors.max()
    assert found.exponent > 0
    assert found.solutions[0].error < 0.2 * plain
    values = found.solutions[0].values() / found.factors
    assert found.solutions[0].error == pytest.approx(by_definition(weight, values, moment), rel=1e-3)


def test_awq_without_any_input_leaves_the_weights_alone() -> None:
    weight, _ = problem(0)
    nothing = np.zeros((24, 24), np.float32)
    assert (awq([weight], INT4, nothing, np.zeros(24, np.float32)).factors == 1).all()


@pytest.mark.parametrize("grid", [grid for grid in GRIDS if grid.block], ids=str)
@pytest.mark.parametrize("order", ["C", "F"])
def test_rounding_by_blocks_is_rounding(grid: Grid, order: str) -> None:
    """The fast way, in whatever order a weight is stored, gives what the plain one gives."""
    weight = np.asarray(problem(0, 40, 64)[0], order=order)  # type: ignore[call-overload]
    fast = round_to_nearest(weight, grid)
    plain = round_to_nearest(weight, grid, second_moment=np.eye(64, dtype=np.float32))
    np.testing.assert_array_equal(fast.codes, plain.codes)
    np.testing.assert_array_equal(fast.values(), plain.values())
    assert fast.error == pytest.approx(plain.error, rel=1e-4)


def test_rows_are_worked_on_in_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are taken at a time, the answer is the same."""
    weight, moment = problem(0, 50, 24)
    for name, solve in SOLVERS.items():
        whole = solve(weight, INT4, second_moment=moment)
        with monkeypatch.context() as patch:
            patch.setattr("graphopt.passes.solvers.rows.ELEMENTS", 100)
            split = solve(weight, INT4, second_moment=moment)
        np.testing.assert_array_equal(whole.codes, split.codes, err_msg=name)
        assert whole.error == pytest.approx(split.error, rel=1e-5)


@pytest.mark.parametrize("size", [1e25, 1e-25])
@pytest.mark.parametrize("grid", [Grid(4, block=8, narrow=False), Grid(8)])
def test_errors_of_very_large_and_small_weights_are_what_they_are(grid: Grid, size: float) -> None:
    """Squares that float32 cannot hold are summed in float64."""
    weight, moment = problem(0)
    expected, scaled = round_to_nearest(weight, grid), round_to_nearest(weight * np.float32(size), grid)
    assert scaled.error / size / size == pytest.approx(expected.error, rel=1e-3)
    difference = (weight - expected.values()) * np.float32(1e20)
    error = by_definition(weight, expected.values(), moment)
    assert output_error(difference, moment) / 1e20 / 1e20 == pytest.approx(error, rel=1e-2)
    assert not np.isfinite(output_error(np.array([[np.inf, 1.0]], np.float32)))


def test_gptq_leaves_what_was_pruned_at_zero() -> None:
    rng = np.random.default_rng(7)
    weight = rng.standard_normal((6, 32)).astype(np.float32)
    weight[rng.random(weight.shape) < 0.6] = 0
    x = rng.standard_normal((200, 32)) @ rng.standard_normal((32, 32))
    for symmetric in (True, False):
        found = gptq(weight, Grid(bits=8, symmetric=symmetric), (x.T @ x / 200).astype(np.float32))
        assert not found.values()[weight == 0].any()
