"""Covariances, against numpy in float64: also where the mean is far larger than the spread."""

from __future__ import annotations

import numpy as np
import pytest

from graphopt.passes.analyses.covariance import Covariance
from graphopt.passes.solvers import grid
from graphopt.passes.solvers.gptq import gptq
from graphopt.passes.solvers.rounding import descend

RNG = np.random.default_rng(0)


def streamed(rows: np.ndarray) -> Covariance:  # type: ignore[type-arg]
    found = Covariance()
    for part in np.array_split(rows, 5, axis=1):
        found.update(part)
    return found


@pytest.mark.parametrize(("mean", "spread"), [(0.0, 1.0), (30.0, 0.01), (1000.0, 1.0), (1000.0, 0.1)])
def test_it_is_numpys(mean: float, spread: float) -> None:
    rows = (mean + spread * RNG.standard_normal((2, 500, 6))).astype(np.float32)
    found = streamed(rows)
    for group, part in enumerate(rows.astype(np.float64)):
        expected = np.cov(part.T, bias=True)
        np.testing.assert_allclose(found.covariance()[group], expected, atol=1e-3 * spread**2)
        np.testing.assert_allclose(found.mean()[group], part.mean(0), rtol=1e-6, atol=1e-6)
        np.testing.assert_allclose(found.second()[group], part.T @ part / len(part), rtol=1e-4, atol=1e-4)


def test_nothing_is_known_without_rows_or_with_infinity() -> None:
    found = Covariance()
    found.update(np.zeros((1, 0, 3), np.float32))
    assert not found.is_known
    found.update(np.full((1, 2, 3), np.inf, np.float32))
    assert not found.is_known


@pytest.mark.parametrize(("mean", "spread"), [(1000.0, 1.0), (1000.0, 0.1), (30.0, 0.01)])
def test_solvers_are_not_misled_by_a_large_mean(mean: float, spread: float) -> None:
    mixing = RNG.standard_normal((16, 16)).astype(np.float32)
    rows = (mean + spread * RNG.standard_normal((1, 2000, 16)).astype(np.float32) @ mixing).astype(np.float32)
    weight = RNG.standard_normal((8, 16)).astype(np.float32)
    moment = streamed(rows).covariance()
    centred = rows[0].astype(np.float64) - rows[0].astype(np.float64).mean(0)

    def error(values: np.ndarray) -> float:  # type: ignore[type-arg]
        return float(np.square(centred @ (weight - values).astype(np.float64).T).mean())

    own = grid.Grid()
    nearest = grid.round_to_nearest(weight, own)
    found = gptq(weight, own, moment)
    improved = descend(weight, found, moment)
    assert error(found.values()) <= error(nearest.values())
    assert error(improved.values()) <= 1.001 * error(found.values())
    assert found.error >= 0
