"""The solvers of factored convolutions, against their definition, brute force, exactly low ranks and plain forms."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from graphopt.passes.lossy.convolution_forms import Division, Piece, Shape, Way, forms_of, ways_of, ways_with_errors
from graphopt.passes.solvers.objective import output_error
from graphopt.passes.solvers.rank import Spectrum
from graphopt.passes.solvers.separable import Blocks
from graphopt.passes.solvers.tucker import solve_tucker, tucker_errors

OUTPUTS, BLOCKS, EACH = 5, 3, 4
SEEDS = range(4)


def moment_of(seed: int, inputs: int, *, directions: int | None = None) -> np.ndarray:
    """H of inputs that go together, some much more than others; singular where they have fewer directions."""
    rng = np.random.default_rng(seed)
    mix = rng.standard_normal((directions or inputs, inputs)) * np.logspace(0, -1.5, inputs)
    x = rng.standard_normal((10 * inputs, len(mix))) @ mix
    return (x.T @ x / len(x)).astype(np.float32)


def weight_of(seed: int, dims: tuple[int, ...] = (OUTPUTS, BLOCKS, EACH)) -> np.ndarray:
    return np.random.default_rng(100 + seed).standard_normal(dims)


def error_of(weight: np.ndarray, near: np.ndarray, moment: np.ndarray | None) -> float:
    return output_error((weight - near).reshape(len(weight), -1), None if moment is None else moment.astype(np.float64))


def dense_right(weight: np.ndarray, left: np.ndarray, moment: np.ndarray) -> np.ndarray:
    """The right factor of least error for a left one, all its numbers in one system of equations."""
    outputs, blocks, each = weight.shape
    rank = left.shape[2]
    # Ŵ[o, b, a] is linear in R[q, a].
    maps = np.einsum("obq,ac->obaqc", left, np.eye(each)).reshape(outputs, blocks * each, rank * each)
    products = sum(one.T @ moment @ one for one in maps)
    goal = sum(one.T @ moment @ own for one, own in zip(maps, weight.reshape(outputs, -1), strict=True))
    return np.linalg.solve(products, goal).reshape(rank, each)


def dense_left(weight: np.ndarray, right: np.ndarray, moment: np.ndarray) -> np.ndarray:
    outputs, blocks, each = weight.shape
    rank = len(right)
    spread = np.einsum("bc,qa->bqca", np.eye(blocks), right).reshape(blocks * rank, blocks * each)
    return np.linalg.solve(spread @ moment @ spread.T, spread @ moment @ weight.reshape(outputs, -1).T).T.reshape(
        outputs, blocks, rank
    )


def least_error(weight: np.ndarray, moment: np.ndarray, rank: int, tries: int = 12) -> float:
    """The least error that turns of least squares find from many starts."""
    rng, least = np.random.default_rng(0), math.inf
    wide = moment.astype(np.float64)
    for _ in range(tries):
        right = rng.standard_normal((rank, weight.shape[2]))
        for _ in range(150):
            left = dense_left(weight, right, wide)
            right = dense_right(weight, left, wide)
        least = min(least, error_of(weight, left @ right, moment))
    return least


@pytest.mark.parametrize("seed", SEEDS)
def test_errors_are_those_of_the_definition(seed: int) -> None:
    weight, moment = weight_of(seed), moment_of(seed, BLOCKS * EACH)
    blocks = Blocks(weight, moment)
    assert blocks.power == pytest.approx(error_of(weight, 0 * weight, moment), rel=1e-5)
    for rank in range(1, 4):
        found = blocks.solve(rank)
        assert found.left.shape == (OUTPUTS, BLOCKS, rank)
        assert found.error == pytest.approx(error_of(weight, found.weight(), moment), rel=1e-4)
        for outer in range(1, min(OUTPUTS, BLOCKS * rank)):
            three = solve_tucker(blocks, outer, rank)
            assert three.core.shape == (outer, BLOCKS, rank)
            assert three.error == pytest.approx(error_of(weight, three.weight(), moment), rel=1e-4)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("rank", [1, 2])
def test_nothing_much_better_is_found_by_many_random_starts(seed: int, rank: int) -> None:
    weight, moment = weight_of(seed), moment_of(seed, BLOCKS * EACH)
    found = Blocks(weight, moment).solve(rank).error
    # Turns of least squares end in one of several valleys, and the start decides which.
    assert found <= 1.02 * least_error(weight, moment, rank)


def test_a_turn_is_least_squares() -> None:
    weight, moment = weight_of(7), moment_of(7, BLOCKS * EACH)
    blocks = Blocks(weight, moment)
    start = blocks.start(2)
    wide = moment.astype(np.float64)
    np.testing.assert_allclose(start.left, dense_left(weight, start.right, wide), rtol=1e-4, atol=1e-6)
    # Of 2 × 4 unknowns, eight steps of conjugate gradients reach the end.
    np.testing.assert_allclose(
        blocks.improved(start.left, start.right), dense_right(weight, start.left, wide), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("directions", [None, 5])
@pytest.mark.parametrize("seed", SEEDS)
def test_what_is_exactly_low_in_rank_is_recovered(seed: int, directions: int | None) -> None:
    rng = np.random.default_rng(seed)
    moment = moment_of(seed, BLOCKS * EACH, directions=directions)
    right = rng.standard_normal((2, EACH))
    two = rng.standard_normal((OUTPUTS, BLOCKS, 2)) @ right
    blocks = Blocks(two, moment)
    assert blocks.solve(2).error < 1e-6 * blocks.power
    if directions is None:
        np.testing.assert_allclose(blocks.solve(2).weight(), two, atol=1e-3)
    core = np.tensordot(rng.standard_normal((OUTPUTS, 3)), rng.standard_normal((3, BLOCKS, 2)), axes=1)
    blocks = Blocks(core @ right, moment)
    assert solve_tucker(blocks, 3, 2).error < 1e-6 * blocks.power
    assert tucker_errors(blocks, 2)[3] < 1e-6 * blocks.power


@pytest.mark.parametrize("directions", [None, 7])
@pytest.mark.parametrize("seed", SEEDS)
def test_never_worse_than_the_start_or_than_plainly(seed: int, directions: int | None) -> None:
    weight, moment = weight_of(seed), moment_of(seed, BLOCKS * EACH, directions=directions)
    blocks, plain = Blocks(weight, moment), Blocks(weight)
    for rank in range(1, EACH):
        found = [blocks.solve(rank, sweeps=sweeps).error for sweeps in (0, 1, 5, 30)]
        assert all(later <= earlier * (1 + 1e-9) for earlier, later in itertools.pairwise(found))
        assert found[0] <= error_of(weight, plain.solve(rank).weight(), moment) * (1 + 1e-5)
        hosvd = solve_tucker(plain, 3, rank, sweeps=0).weight()
        assert solve_tucker(blocks, 3, rank).error <= error_of(weight, hosvd, moment) * (1 + 1e-5)
        assert solve_tucker(blocks, 3, rank).error <= tucker_errors(blocks, rank)[3] * (1 + 1e-5)


def test_curves_fall_from_all_to_nothing() -> None:
    weight, moment = weight_of(0), moment_of(0, BLOCKS * EACH)
    blocks = Blocks(weight, moment)
    errors = blocks.errors(range(EACH + 1))
    assert errors[0] == pytest.approx(blocks.power)
    assert errors[-1] < 1e-9 * blocks.power
    assert (np.diff(errors) <= 0).all()
    assert (np.diff(tucker_errors(blocks, 2)) <= 1e-9 * blocks.power).all()


def test_without_moments_two_pieces_are_the_singular_value_decomposition() -> None:
    weight = weight_of(3)
    values = np.linalg.svd(weight.reshape(-1, EACH), compute_uv=False)
    for rank in range(1, EACH):
        assert Blocks(weight).solve(rank).error == pytest.approx(np.square(values[rank:]).sum())


def test_with_one_block_it_is_the_whitened_decomposition() -> None:
    weight, moment = weight_of(3, (OUTPUTS, 1, 6)), moment_of(3, 6) + np.eye(6, dtype=np.float32)
    for rank in range(1, 5):
        exact = Spectrum(weight[:, 0], moment).errors[rank]
        assert Blocks(weight, moment).solve(rank).error == pytest.approx(exact, rel=1e-6)


def test_a_zero_weight_or_dead_inputs_are_no_trouble() -> None:
    moment = moment_of(1, BLOCKS * EACH)
    for weight, own in ((0 * weight_of(1), moment), (weight_of(1), 0 * moment)):
        blocks = Blocks(weight, own)
        assert np.isfinite(blocks.solve(2).weight()).all()
        assert np.isfinite(solve_tucker(blocks, 2, 2).weight()).all()
    assert blocks.power == pytest.approx(np.square(weight).sum()), "without data, plain distance"


SQUARE = Shape(6, 4, 1, (3, 3), (8, 8), (8, 8), transposed=False)


def test_pieces_cost_what_convolutions_do() -> None:
    halved = Shape(6, 4, 2, (3, 5), (8, 10), (4, 5), transposed=False)
    assert halved.parameters() == 2 * 6 * 4 * 15
    assert halved.macs() == 2 * 6 * 4 * 15 * 20
    spatial = Way("spatial", (3,), (0,)).pieces(halved)
    assert spatial == [Piece(3, 4, (0,)), Piece(6, 3, (1,))]
    assert halved.macs(spatial) == 2 * 3 * 4 * 3 * (4 * 10) + 2 * 6 * 3 * 5 * 20
    tucker = Way("tucker", (2, 3), ()).pieces(halved)
    assert halved.macs(tucker) == 2 * (2 * 4 * 80 + 3 * 2 * 15 * 20 + 6 * 3 * 20)
    wider = Shape(6, 4, 1, (2, 2), (4, 4), (8, 8), transposed=True)
    assert wider.macs(Way("input", (2,), ()).pieces(wider)) == 2 * 4 * 16 + 6 * 2 * 4 * 16


def test_forms_fit_the_kernel() -> None:
    assert [form for form, _ in forms_of(SQUARE, "auto")] == ["channel", "input", "spatial", "spatial", "tucker"]
    assert [form for form, _ in forms_of(SQUARE, "channel")] == ["channel", "input"]
    pointwise = Shape(6, 4, 1, (1, 1), (8, 8), (8, 8), transposed=False)
    assert [form for form, _ in forms_of(pointwise, "auto")] == ["channel"]
    line = Shape(6, 4, 1, (5,), (8,), (8,), transposed=False)
    assert [form for form, _ in forms_of(line, "auto")] == ["channel", "input", "tucker"]
    assert not forms_of(line, "spatial")
    raised = Shape(6, 4, 1, (2, 2), (4, 4), (8, 8), transposed=True)
    assert [form for form, _ in forms_of(raised, "auto")] == ["input"]


def test_ranks_save_and_are_multiples() -> None:
    wide = Shape(64, 64, 1, (3, 3), (8, 8), (8, 8), transposed=False)
    for form, first in forms_of(wide, "auto"):
        ways = ways_of(wide, form, first, 16)
        assert ways
        for way in ways:
            assert all(rank % 8 == 0 for rank in way.ranks)
            assert wide.macs(way.pieces(wide)) < wide.macs()
            assert wide.parameters(way.pieces(wide)) < wide.parameters()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_division_gives_kernels_that_come_to_its_matrix(groups: int) -> None:
    rng = np.random.default_rng(groups)
    shape = Shape(6, 4, groups, (3, 2), (8, 8), (6, 7), transposed=False)
    matrix = rng.standard_normal((6 * groups, 24))
    moments = np.stack([moment_of(group, 24) for group in range(groups)])
    for form, first in forms_of(shape, "auto"):
        way = Way(form, (3, 5) if form == "tucker" else (3,), first)
        division = Division(shape, first, matrix, moments)
        found = division.solve(way)
        assert found.error == pytest.approx(output_error(matrix - found.matrix, moments.astype(np.float64)), rel=1e-4)
        assert division.power == pytest.approx(output_error(matrix, moments.astype(np.float64)), rel=1e-4)
        np.testing.assert_allclose(composed(found.weights, groups), kernels(found.matrix, shape), atol=1e-8)


def kernels(matrix: np.ndarray, shape: Shape) -> np.ndarray:
    """A matrix [outputs, positions × channels] as [outputs, channels, kernel ...]."""
    return np.moveaxis(matrix.reshape(len(matrix), *shape.kernel, shape.inputs), -1, 1)


def composed(weights: tuple[np.ndarray, ...], groups: int) -> np.ndarray:
    """What 2-D convolutions in a row come to, where no two of them move along the same axis."""
    whole = []
    for group in range(groups):
        own = [weight.reshape(groups, -1, *weight.shape[1:])[group] for weight in weights]
        found = own[0]
        for weight in own[1:]:
            found = np.einsum("oqij,qckl->ocikjl", weight, found)
            found = found.reshape(len(weight), -1, weight.shape[2] * found.shape[3], found.shape[4] * found.shape[5])
        whole.append(found)
    return np.concatenate(whole)


def test_all_ways_with_their_shares() -> None:
    rng = np.random.default_rng(0)
    matrix, moments = rng.standard_normal((6, 36)), moment_of(0, 36)[None]
    found = ways_with_errors(SQUARE, "auto", matrix, moments, 4)
    assert {way.form for way, _ in found} == {"channel", "input", "spatial", "tucker"}
    assert all(0 <= error <= 1 for _, error in found)
    exact = Spectrum(matrix, moments)
    for way, error in found:
        if way.form == "channel":
            assert error == pytest.approx(exact.errors[way.ranks[0]] / exact.errors[0], rel=1e-5)
