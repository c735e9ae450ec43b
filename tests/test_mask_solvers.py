"""Mask solvers against brute force over all masks, against plain algebra, and against the published algorithm."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from graphopt.passes.solvers import alternating, kept_weights, mask
from graphopt.passes.solvers.kept_weights import solve_kept
from graphopt.passes.solvers.objective import output_error
from graphopt.passes.solvers.sparsegpt import sweep
from graphopt.passes.solvers.sparsity import NOfM, Unstructured

Array = np.ndarray[Any, Any]
HALF = Unstructured(0.5)


def correlated(seed: int, inputs: int, rows: int = 400) -> Array:
    """Return samples whose inputs go together, and are of different sizes: float32 [rows, inputs]."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((rows, inputs)) @ rng.standard_normal((inputs, inputs))
    return (mixed * rng.uniform(0.2, 2, inputs)).astype(np.float32)


def moment_of(samples: Array) -> Array:
    return (samples.T @ samples / len(samples)).astype(np.float32)


def best_of_all_masks(row: Array, moment: Array, kept: int) -> float:
    """Return the least error of any choice of so many weights, each solved for exactly."""
    wide, row = moment.astype(np.float64), row.astype(np.float64)
    errors = []
    for chosen in itertools.combinations(range(len(row)), kept):
        at = list(chosen)
        found = np.zeros(len(row))
        found[at] = np.linalg.solve(wide[np.ix_(at, at)], wide[at] @ row)
        errors.append((row - found) @ wide @ (row - found))
    return float(min(errors))


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_magnitude_is_the_best_of_all_masks(sparsity: float) -> None:
    weight = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    solution = mask.prune(weight, Unstructured(sparsity), method="magnitude")
    count = round(sparsity * weight.size)
    errors = [
        (weight.reshape(-1)[list(chosen)].astype(np.float64) ** 2).sum()
        for chosen in itertools.combinations(range(weight.size), count)
    ]
    assert (solution.weight == 0).sum() == count
    assert solution.error == pytest.approx(min(errors))


def test_wanda_is_the_best_of_all_masks_of_a_diagonal_moment() -> None:
    rng = np.random.default_rng(1)
    weight, moment = rng.standard_normal((1, 8)).astype(np.float32), np.diag(rng.uniform(1, 2, 8)).astype(np.float32)
    solution = mask.prune(weight, Unstructured(0.5, per_output=True), moment, method="wanda")
    costs = weight[0].astype(np.float64) ** 2 * np.diagonal(moment)
    assert solution.error == pytest.approx(np.sort(costs)[:4].sum(), rel=1e-5)


def test_n_of_m_is_the_best_of_all_masks_in_every_group() -> None:
    weight = np.random.default_rng(2).standard_normal((3, 8)).astype(np.float32)
    solution = mask.prune(weight, NOfM(2, 4), method="magnitude")
    assert ((solution.weight != 0).reshape(3, 2, 4).sum(-1) == 2).all()
    best = sum(np.sort(group**2)[:2].sum() for group in weight.astype(np.float64).reshape(-1, 4))
    assert solution.error == pytest.approx(best)


def test_kept_weights_are_the_exact_least_squares_answer() -> None:
    rng = np.random.default_rng(3)
    moment, weight = moment_of(correlated(3, 10)), rng.standard_normal((6, 10)).astype(np.float32)
    kept = rng.random((6, 10)) < 0.5
    found = solve_kept(weight[None], kept[None], moment[None])[0]
    for row, own, solved in zip(weight, kept, found, strict=True):
        exact = np.linalg.solve(moment[np.ix_(own, own)].astype(np.float64), moment[own].astype(np.float64) @ row)
        assert solved[own] == pytest.approx(exact, rel=2e-2, abs=2e-2)
        assert not solved[~own].any()


def test_obs_comes_close_to_the_best_of_all_masks_and_mostly_finds_it() -> None:
    ratios = []
    for seed in range(20):
        moment = moment_of(correlated(seed, 8))
        weight = np.random.default_rng(seed).standard_normal((1, 8)).astype(np.float32)
        found = mask.prune(weight, HALF, moment)
        assert (found.weight == 0).sum() == 4
        ratios.append(found.error / best_of_all_masks(weight[0], moment, 4))
    assert min(ratios) >= 1 - 1e-3
    assert np.median(ratios) < 1.1
    assert max(ratios) < 4


@pytest.mark.parametrize(
    "constraint", [HALF, Unstructured(0.7, per_output=True), NOfM(2, 4), Unstructured(0.5, block=(2, 4))]
)
def test_obs_is_never_worse_than_the_others(constraint: Unstructured | NOfM) -> None:
    for seed in range(5):
        moment = moment_of(correlated(seed, 16))
        weight = np.random.default_rng(seed).standard_normal((12, 16)).astype(np.float32)
        errors = {name: mask.prune(weight, constraint, moment, method=name).error for name in ("magnitude", "wanda")}
        swept = sweep(weight[None], constraint, moment[None] + 1e-3 * np.eye(16, dtype=np.float32))[0]
        found = mask.prune(weight, constraint, moment)
        assert found.error <= min(*errors.values(), output_error(weight - swept, moment)) * (1 + 1e-5)
        assert found.error < 0.7 * errors["magnitude"]


def test_the_error_is_what_outputs_lose_on_the_samples() -> None:
    samples = correlated(4, 12)
    weight = np.random.default_rng(4).standard_normal((5, 12)).astype(np.float32)
    found = mask.prune(weight, HALF, moment_of(samples))
    lost = samples @ (weight - found.weight).T
    assert found.error == pytest.approx(float(np.mean(np.sum(lost**2, axis=1))), rel=1e-3)


def test_the_sweep_is_the_published_one() -> None:
    """SparseGPT as in the paper, by the Cholesky factor of the inverse, gives the same weights."""
    moment = moment_of(correlated(5, 20)) + 0.1 * np.eye(20, dtype=np.float32)
    weight = np.random.default_rng(5).standard_normal((6, 20)).astype(np.float32)
    upper = np.linalg.cholesky(np.linalg.inv(moment.astype(np.float64))).T
    left = weight.astype(np.float64)
    scores = (left / np.diagonal(upper)) ** 2
    kept = scores > np.sort(scores.reshape(-1))[scores.size // 2 - 1]
    for column in range(20):
        new = np.where(kept[:, column], left[:, column], 0)
        error = (left[:, column] - new) / upper[column, column]
        left[:, column:] -= np.outer(error, upper[column, column:])
        left[:, column] = new
    assert sweep(weight[None], HALF, moment[None])[0] == pytest.approx(left, rel=1e-2, abs=1e-3)


def test_a_share_for_each_output_is_held_by_each() -> None:
    weight = np.random.default_rng(6).standard_normal((7, 20)).astype(np.float32)
    found = mask.prune(weight, Unstructured(0.6, per_output=True), moment_of(correlated(6, 20)))
    assert ((found.weight == 0).sum(axis=1) == 12).all()


@pytest.mark.parametrize("block", [(1, 4), (4, 1), (2, 2), (16, 16), (3, 5), (10**5, 10**5)])
def test_blocks_go_as_a_whole_those_at_the_edges_too(block: tuple[int, int]) -> None:
    weight = np.random.default_rng(7).standard_normal((9, 14)).astype(np.float32)
    for method in ("magnitude", "obs"):
        found = mask.prune(weight, Unstructured(0.5, block=block), moment_of(correlated(7, 14)), method=method)
        pieces = [
            found.weight[row : row + block[0], column : column + block[1]]
            for row in range(0, 9, block[0])
            for column in range(0, 14, block[1])
        ]
        kept = [bool((piece != 0).all()) for piece in pieces]
        assert kept == [bool((piece != 0).any()) for piece in pieces]
        assert len(pieces) - sum(kept) == round(0.5 * len(pieces))


def test_groups_of_outputs_with_inputs_of_their_own_are_solved_like_layers_of_their_own() -> None:
    """With a share for each output, nothing ties the groups of a depthwise convolution together."""
    moments = np.stack([moment_of(correlated(seed, 9)) for seed in (8, 9, 10)])
    weight = np.random.default_rng(8).standard_normal((6, 9)).astype(np.float32)
    constraint = Unstructured(0.5, per_output=True)
    found = mask.prune(weight, constraint, moments)
    alone = [mask.prune(weight[2 * g : 2 * g + 2], constraint, moments[g]) for g in range(3)]
    assert found.error == pytest.approx(sum(one.error for one in alone), rel=0.2)
    assert found.error == pytest.approx(output_error(weight - found.weight, moments))


def test_zeros_stay_and_count() -> None:
    weight = np.array([[0, 0, 1, 2, 0, 0, 3, 1]], np.float32)
    for method in ("magnitude", "wanda", "obs"):
        found = mask.prune(weight, HALF, moment_of(correlated(11, 8)), method=method)
        assert np.array_equal(found.weight, weight)
        assert (found.zeroed, found.error) == (0, 0.0)


def test_equal_magnitudes_fall_the_same_way_every_time() -> None:
    weight = np.ones((4, 4), np.float32)
    first, second = (mask.prune(weight.copy(), HALF, method="magnitude") for _ in range(2))
    assert np.array_equal(first.weight, second.weight)
    assert (first.weight == 0).sum() == 8


@pytest.mark.parametrize("samples", [np.zeros((5, 8), np.float32), correlated(12, 8, rows=2)], ids=["none", "two"])
def test_moments_that_say_little_do_no_harm(samples: Array) -> None:
    weight = np.random.default_rng(12).standard_normal((4, 8)).astype(np.float32)
    found = mask.prune(weight, HALF, moment_of(samples))
    assert np.isfinite(found.weight).all()
    assert (found.weight == 0).sum() >= 16
    assert found.error <= mask.prune(weight, HALF, moment_of(samples), method="magnitude").error + 1e-12


def test_inputs_that_are_always_zero_are_no_obstacle() -> None:
    samples = correlated(13, 8)
    samples[:, 2:5] = 0
    weight = np.random.default_rng(13).standard_normal((4, 8)).astype(np.float32)
    found = mask.prune(weight, HALF, moment_of(samples))
    assert (found.weight[:, [0, 1, 5, 6, 7]] == 0).sum() <= 6  # what is never multiplied goes first
    assert np.isfinite(found.weight).all()


def test_the_dtype_of_the_weight_stays() -> None:
    weight = np.random.default_rng(14).standard_normal((4, 8)).astype(np.float16)
    assert mask.prune(weight, HALF, moment_of(correlated(14, 8))).weight.dtype == np.float16


@pytest.mark.parametrize("constraint", [HALF, NOfM(2, 4), Unstructured(0.5, block=(2, 4))])
def test_large_layers_are_solved_in_portions(constraint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    moment = moment_of(correlated(15, 16))
    weight = np.random.default_rng(15).standard_normal((10, 16)).astype(np.float32)
    whole = mask.prune(weight, constraint, moment)
    monkeypatch.setattr(alternating, "_ELEMENTS", 64)
    monkeypatch.setattr(kept_weights, "_ELEMENTS", 64)
    found = mask.prune(weight, constraint, moment)
    assert (found.weight == 0).sum() == (whole.weight == 0).sum()
    assert found.error < 1.5 * whole.error


def test_without_eigenvectors_the_sweep_is_solved_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mask, "_MOST_INPUTS", 4)
    moment = moment_of(correlated(16, 16))
    weight = np.random.default_rng(16).standard_normal((8, 16)).astype(np.float32)
    found = mask.prune(weight, HALF, moment)
    assert (found.weight == 0).sum() == 64
    assert found.error < 0.8 * mask.prune(weight, HALF, moment, method="wanda").error


def test_a_quick_look_tells_about_the_error_of_the_solution() -> None:
    moment = moment_of(correlated(17, 32))
    weight = np.random.default_rng(17).standard_normal((16, 32)).astype(np.float32)
    quick, found = mask.prune_quickly(weight, HALF, moment), mask.prune(weight, HALF, moment)
    assert found.error <= quick.error < mask.prune(weight, HALF, moment, method="magnitude").error
    assert mask.prune_quickly(weight, HALF, None).error == pytest.approx(
        mask.prune(weight, HALF, method="magnitude").error
    )
