"""The rank solver against alternating least squares, random factors, whitened SVD, and what its error is."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.backend import Array
from graphopt.passes.solvers.objective import by_group, output_error
from graphopt.passes.solvers.rank import Spectrum

RNG = np.random.default_rng
# What a result may be above the closed-form optimum, as a share of it.
NEAR = 1e-6


def moment_of(rng: np.random.Generator, inputs: int, rows: int | None = None, groups: int = 1) -> Array:
    """Return H of correlated rows, [groups, inputs, inputs]; singular where there are fewer rows than inputs."""
    spread = np.geomspace(1, 0.01, inputs)
    x = rng.normal(size=(groups, rows or 4 * inputs, inputs)) * spread @ rng.normal(size=(inputs, inputs))
    return np.asarray(x.transpose(0, 2, 1) @ x / x.shape[1], np.float64)


def least_errors(weight: Array, moment: Array | None) -> Array:
    """Return the tails of the squared singular values of W S, H = S Sᵀ: the closed form, written plainly."""
    whitener = np.eye(weight.shape[1])
    if moment is not None:
        values, vectors = np.linalg.eigh(moment.reshape(moment.shape[-2:]))
        whitener = vectors * np.sqrt(np.maximum(values, 0))
    squares = np.linalg.svd(weight @ whitener, compute_uv=False) ** 2
    return np.append(np.cumsum(squares[::-1])[::-1], 0.0)


def by_turns(weight: Array, moment: Array, rank: int, rng: np.random.Generator) -> Array:
    """Return what alternating least squares comes to from a random start."""
    right = rng.normal(size=(rank, weight.shape[1]))
    left = np.zeros((len(weight), rank))
    for _ in range(400):
        left = np.linalg.lstsq((right @ moment @ right.T).T, (weight @ moment @ right.T).T, rcond=None)[0].T
        # H drops out: the normal equations hold with A W for each column of H alike.
        right = np.linalg.lstsq(left, weight, rcond=None)[0]
    return left @ right


@pytest.mark.parametrize(("outputs", "inputs"), [(7, 12), (12, 7), (9, 9), (1, 5), (5, 1)])
@pytest.mark.parametrize("rows", [None, 4, 0])
def test_every_rank_is_optimal(outputs: int, inputs: int, rows: int | None) -> None:
    rng = RNG(1)
    weight = rng.normal(size=(outputs, inputs))
    moment = None if rows == 0 else moment_of(rng, inputs, rows)
    spectrum = Spectrum(weight, moment)
    expected = least_errors(weight, moment)
    floor = 1e-10 * expected[0]
    np.testing.assert_allclose(spectrum.errors, expected, rtol=NEAR, atol=floor)
    for rank in range(min(outputs, inputs) + 1):
        factors = spectrum.factors(rank)
        assert factors.left.shape == (outputs, rank)
        assert factors.right.shape == (rank, inputs)
        assert factors.rank == rank
        reached = output_error(weight - factors.matrix(), moment)
        assert reached <= expected[rank] * (1 + NEAR) + floor
        assert factors.error == pytest.approx(reached, rel=NEAR, abs=floor)


@pytest.mark.parametrize("rank", [1, 3, 5])
def test_no_other_way_is_better(rank: int) -> None:
    rng = RNG(2)
    weight, moment = rng.normal(size=(8, 6)), moment_of(rng, 6)[0]
    best = Spectrum(weight, moment).factors(rank)
    assert output_error(weight - by_turns(weight, moment, rank, rng), moment) >= best.error * (1 - NEAR)
    for step in (1e-3, 1e-1):
        for _ in range(50):
            left = best.left + step * rng.normal(size=best.left.shape)
            right = best.right + step * rng.normal(size=best.right.shape)
            assert output_error(weight - left @ right, moment) >= best.error


def test_singular_moment_settles_the_rest_by_distance() -> None:
    rng = RNG(3)
    weight = rng.normal(size=(6, 8))
    moment = moment_of(rng, 8, rows=2)[0]
    spectrum = Spectrum(weight, moment)
    assert spectrum.errors[2] == pytest.approx(0, abs=1e-9 * spectrum.errors[0])
    # Two directions serve the data; a third one has none to serve, and comes as near to W as it can.
    two, three = (spectrum.factors(rank).matrix() for rank in (2, 3))
    gain = output_error(weight - two) - output_error(weight - three)
    assert gain == pytest.approx(np.linalg.svd(weight - two, compute_uv=False)[0] ** 2, rel=1e-3)


def test_zero_moment_is_plain_distance() -> None:
    weight = RNG(4).normal(size=(5, 7))
    spectrum = Spectrum(weight, np.zeros((7, 7)))
    assert not spectrum.errors.any()
    np.testing.assert_allclose(spectrum.factors(2).matrix(), Spectrum(weight).factors(2).matrix(), atol=1e-12)


@pytest.mark.parametrize("moment", [None, np.eye(4), np.ones(4), np.zeros((4, 4))])
def test_zero_weight(moment: Array | None) -> None:
    spectrum = Spectrum(np.zeros((6, 4)), moment)
    assert not spectrum.errors.any()
    factors = spectrum.factors(2)
    assert np.isfinite(factors.left).all()
    assert np.isfinite(factors.right).all()
    assert not factors.matrix().any()


def test_rank_beyond_the_full_one_is_the_weight() -> None:
    weight = RNG(5).normal(size=(5, 9))
    factors = Spectrum(weight, moment_of(RNG(5), 9)).factors(50)
    assert factors.rank == 5
    assert factors.error == 0
    np.testing.assert_allclose(factors.matrix(), weight, atol=1e-12)


def test_rank_zero_is_nothing() -> None:
    weight = RNG(5).normal(size=(5, 9))
    factors = Spectrum(weight).factors(0)
    assert factors.error == pytest.approx(np.sum(weight**2))
    assert not factors.matrix().any()


def test_groups_are_factored_each_by_itself() -> None:
    rng = RNG(6)
    weight, moment = rng.normal(size=(12, 5)), moment_of(rng, 5, groups=3)
    spectrum = Spectrum(weight, moment)
    parts = [Spectrum(own, one) for own, one in zip(by_group(weight, moment), moment, strict=True)]
    np.testing.assert_allclose(spectrum.errors, sum(part.errors for part in parts))
    factors = spectrum.factors(2)
    assert factors.left.shape == (12, 2)
    assert factors.right.shape == (6, 5)
    expected = np.concatenate([part.factors(2).matrix() for part in parts])
    np.testing.assert_allclose(factors.matrix(), expected, atol=1e-12)
    assert output_error(weight - factors.matrix(), moment) == pytest.approx(factors.error, rel=NEAR)


def test_diagonal_moment() -> None:
    rng = RNG(7)
    weight, diagonal = rng.normal(size=(5, 40)), rng.uniform(0, 2, 40)
    thin, whole = Spectrum(weight, diagonal), Spectrum(weight, np.diag(diagonal))
    np.testing.assert_allclose(thin.errors, whole.errors, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(thin.factors(3).matrix(), whole.factors(3).matrix(), atol=1e-9)


def test_single_precision_in() -> None:
    rng = RNG(8)
    weight, moment = rng.normal(size=(64, 48)), moment_of(rng, 48)
    single = Spectrum(weight.astype(np.float32), moment.astype(np.float32)).factors(20)
    expected = least_errors(weight, moment)[20]
    assert output_error(weight - single.matrix(), moment) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_extreme_scales(scale: float) -> None:
    weight = RNG(9).normal(size=(6, 4))
    factors = Spectrum(weight * scale, np.eye(4) * scale).factors(2)
    np.testing.assert_allclose(factors.matrix(), Spectrum(weight).factors(2).matrix() * scale, rtol=1e-6)


def test_factors_share_lengths() -> None:
    factors = Spectrum(RNG(10).normal(size=(30, 20)) * 100, moment_of(RNG(10), 20)).factors(8)
    np.testing.assert_allclose(np.linalg.norm(factors.left, axis=0), np.linalg.norm(factors.right, axis=1))


def test_rank_within_a_share() -> None:
    weight = np.diag([3.0, 2.0, 1.0])
    spectrum = Spectrum(weight)
    assert spectrum.errors.tolist() == pytest.approx([14, 5, 1, 0])
    assert [spectrum.rank_within(share) for share in (1, 0.4, 5 / 14, 0.1, 0)] == [0, 1, 1, 2, 3]
    assert Spectrum(np.zeros((3, 3))).rank_within(0) == 0
