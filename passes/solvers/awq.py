"""AWQ: inputs that matter are scaled up before rounding and down again by what comes before the layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .grid import Grid, GridWeight
from .scale_search import mse

# Exponents α of the search, as in the paper: 0 leaves the inputs alone, 1 scales each by its own size.
_EXPONENTS = 20


@dataclass(frozen=True)
class ScaledWeights:
    """Weights on grids, after their shared inputs were scaled.

    Attributes:
        factors: float32 [inputs], positive: each weight was multiplied by them, column by column, and the input of
            the layers has to be divided by them.
        solutions: The weights times the factors, on their grids; ``error`` is that of the layer as a whole.
        exponent: α of the factors, 0 for all ones.
    """

    factors: Array
    solutions: tuple[GridWeight, ...]
    exponent: float


def awq(
    weights: Sequence[Array],
    grid: Grid,
    second_moment: Array,
    magnitudes: Array,
    solve: Callable[..., GridWeight] = mse,
) -> ScaledWeights:
    """Search the scaling of the inputs, s = E|x|^α, with which all weights that read them lose least.

    Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration, 2024. Dividing the
    input by s is another node, unless an operator before it takes the factors in: that is for the caller to see to.

    Args:
        weights: [outputs, inputs] each; all multiply the same input.
        grid: The grid.
        second_moment: H = E[x xᵀ], [inputs, inputs].
        magnitudes: E|x| of each input, or any other measure of size such as √E[x²], [inputs].
        solve: What puts a weight on the grid: `mse`, `round_to_nearest`, or one that takes the same arguments.
    """
    best: ScaledWeights | None = None
    for exponent in np.linspace(0.0, 1.0, _EXPONENTS, endpoint=False):
        factors = scaling(magnitudes, float(exponent))
        found = _scaled(weights, grid, second_moment, factors, float(exponent), solve)
        if best is None or _total(found) < _total(best):
            best = found
    assert best is not None, "there is at least one exponent"
    return best


def scaling(magnitudes: Array, exponent: float) -> Array:
    """Return factors magnitude^α, centred on 1; inputs that are always zero keep the least factor there is."""
    sizes = magnitudes.astype(np.float64)
    seen = sizes > 0
    if not seen.any():
        return np.ones(len(sizes), np.float32)
    factors = np.where(seen, sizes, sizes[seen].min()) ** exponent
    return np.asarray(factors / np.sqrt(factors.max() * factors.min()), np.float32)


def _scaled(
    weights: Sequence[Array],
    grid: Grid,
    second_moment: Array,
    factors: Array,
    exponent: float,
    solve: Callable[..., GridWeight],
) -> ScaledWeights:
    # H of the scaled input: with it, the error of the scaled weight is that of the layer.
    moment = second_moment / np.outer(factors, factors)
    return ScaledWeights(factors, tuple(solve(w * factors, grid, second_moment=moment) for w in weights), exponent)


def _total(found: ScaledWeights) -> float:
    return sum(solution.error for solution in found.solutions)
