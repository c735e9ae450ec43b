"""Codes and factors of one weight, W ≈ A B + R with R on a grid: each in turn the best there is."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .gptq import gptq
from .grid import Grid, GridWeight
from .objective import output_error
from .rank import Factors, Spectrum
from .refinement import refine
from .scale_search import mse

# Rounds of codes and factors at the most, and the share of the error that another round has to gain.
_ROUNDS, _GAIN = 6, 0.005


@dataclass(frozen=True, eq=False)
class LowRankCodes:
    """A weight as factors and codes.

    Attributes:
        factors: Of the low-rank part.
        codes: Of what it leaves.
        error: tr((W − A B − R) H (W − A B − R)ᵀ).
    """

    factors: Factors
    codes: GridWeight
    error: float

    def values(self) -> Array:
        """Return Ŵ, float32 [outputs, inputs]."""
        return np.asarray(self.factors.matrix() + self.codes.values(), np.float32)


def low_rank_codes(
    weight: Array, grid: Grid, rank: int, second_moment: Array | None = None, *, rounds: int = _ROUNDS
) -> LowRankCodes:
    """Return factors of a rank and codes of the rest that together come near to a weight.

    In turn, codes are found for W − A B (GPTQ with the scales refined where there is an H, else the best scales), and
    factors for W − R, exactly (`Spectrum`); as long as that gains. Two starts are tried, and the better result is
    taken: codes of the whole weight first, so that factors make up for what is rounded (Li et al., LoftQ:
    LoRA-Fine-Tuning-Aware Quantization for Large Language Models, 2023), and factors first, so that codes need not
    reach as far (CALDERA, Saha et al., Compressing Large Language Models using Low Rank and Low Precision
    Decomposition, 2024, who minimise the same objective).

    Args:
        weight: W, [outputs, inputs], finite.
        grid: What codes may be.
        rank: Of the factors; with 0 there are codes alone.
        second_moment: H, [inputs, inputs]; None for the identity.
        rounds: The most rounds of each start.
    """
    wide = weight.astype(np.float64)
    alone = _coded(wide, grid, second_moment)
    if rank == 0:
        return LowRankCodes(Spectrum(wide).factors(0), alone, alone.error)
    first = Spectrum(wide, second_moment).factors(rank)
    starts = (alone, _coded(wide - first.matrix(), grid, second_moment))
    found = [_alternated(wide, start, grid, rank, second_moment, rounds) for start in starts]
    return min(found, key=lambda one: one.error)


def _alternated(
    weight: Array, codes: GridWeight, grid: Grid, rank: int, second_moment: Array | None, rounds: int
) -> LowRankCodes:
    found = _with_factors(weight, codes, rank, second_moment)
    for _ in range(rounds - 1):
        again = _coded(weight - found.factors.matrix(), grid, second_moment)
        better = _with_factors(weight, again, rank, second_moment)
        gained = better.error < (1 - _GAIN) * found.error
        found = better if better.error < found.error else found
        if not gained:
            break
    return found


def _with_factors(weight: Array, codes: GridWeight, rank: int, second_moment: Array | None) -> LowRankCodes:
    rest = weight - codes.values()
    factors = Spectrum(rest, second_moment).factors(rank)
    return LowRankCodes(factors, codes, output_error(rest - factors.matrix(), second_moment))


def _coded(weight: Array, grid: Grid, second_moment: Array | None) -> GridWeight:
    single = weight.astype(np.float32)
    if second_moment is None:
        return mse(single, grid)
    moment = np.asarray(second_moment, np.float32)
    return refine(single, gptq(single, grid, moment), moment)
