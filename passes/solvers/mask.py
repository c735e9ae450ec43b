"""The mask solver: which weights to zero, and what the others become, so that the layer's output changes least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from graphopt.backend import Array

from .alternating import search_mask
from .kept_weights import solve_kept
from .objective import by_group, importance, output_error
from .sparsegpt import sweep
from .sparsity import Constraint

Method = Literal["magnitude", "wanda", "obs"]

# Share of the mean E[x²] added to each input's. Less than a grid's hundredth: zeros are chosen by what weights can make
# up for, and that much damping forbids most of it.
DAMPING = 0.001
# Eigenvectors of more inputs take minutes on two cores; there the sweep's mask stays.
_MOST_INPUTS = 6144


@dataclass(frozen=True)
class Masked:
    """A pruned weight.

    Attributes:
        weight: [outputs, inputs], in the dtype of the weight given, with zeros.
        zeroed: How many weights became zero that were not.
        error: Predicted output error tr((W−Ŵ) H (W−Ŵ)ᵀ); where no H was given, the sum of squares removed.
    """

    weight: Array
    zeroed: int
    error: float


def prune(
    weight: Array, constraint: Constraint, second_moment: Array | None = None, *, method: Method = "obs"
) -> Masked:
    """Zero what a constraint does not let stay; weights that are zero stay so, and count.

    * magnitude: the smallest go, which is exact for H = I (Han et al., Learning both Weights and Connections, 2015).
    * wanda: those go that cost least by the diagonal of H, |w|·√E[x²], which is exact for a diagonal H (Sun et al., A
      Simple and Effective Pruning Approach for Large Language Models, 2024, there for each output by itself).
    * obs: the column sweep of SparseGPT, its mask improved by alternating directions (ALPS), and the kept weights
      solved for; never worse, by the predicted error, than the other two or than the sweep.

    Args:
        weight: [outputs, inputs], finite, any float dtype.
        constraint: What may stay.
        second_moment: H = E[x xᵀ], [inputs, inputs], or [groups, inputs, inputs] where outputs come in groups of equal
            size that read inputs of their own; None, for magnitude alone, stands for the identity.
        method: Who decides.
    """
    matrix = weight.astype(np.float32, copy=False)
    if method == "obs":
        assert second_moment is not None, "obs looks at what the inputs do together"
        found = _best(matrix, constraint, second_moment)
    else:
        weights = importance(second_moment, len(matrix)) if method == "wanda" else None
        found = _smallest(matrix, constraint, weights)
    return _masked(weight, found, second_moment)


def prune_quickly(weight: Array, constraint: Constraint, second_moment: Array | None) -> Masked:
    """Return about what `prune` would, from one sweep: enough to tell how much a layer would lose.

    Args:
        weight: As `prune` takes it.
        constraint: Likewise.
        second_moment: Likewise; without it, the smallest go.
    """
    if second_moment is None:
        return prune(weight, constraint, method="magnitude")
    matrix = weight.astype(np.float32, copy=False)
    grouped = by_group(matrix, second_moment)
    swept = sweep(grouped, constraint, _damped(second_moment.reshape(len(grouped), *second_moment.shape[-2:])))
    return _masked(weight, swept.reshape(matrix.shape), second_moment)


def _masked(weight: Array, found: Array, second_moment: Array | None) -> Masked:
    stored = found.astype(weight.dtype, copy=False)
    zeroed = int(np.count_nonzero(weight) - np.count_nonzero(stored))
    difference = weight.astype(np.float32, copy=False) - stored.astype(np.float32, copy=False)
    return Masked(stored, zeroed, output_error(difference, second_moment))


def _smallest(matrix: Array, constraint: Constraint, weights: Array | None) -> Array:
    """Return a matrix without what is smallest, counted by weights [1 or outputs, inputs]."""
    costs = np.square(matrix.astype(np.float64))  # squares of small float32 would all be zero
    if weights is not None:
        costs *= weights
    return np.where(constraint.kept(costs), matrix, np.float32(0))


def _best(matrix: Array, constraint: Constraint, second_moment: Array) -> Array:
    """Return the best that all methods find, by the predicted error."""
    grouped = by_group(matrix, second_moment)
    moments = _damped(second_moment.reshape(len(grouped), *second_moment.shape[-2:]))
    weights = importance(second_moment, len(matrix))
    tried = [_smallest(matrix, constraint, None), _smallest(matrix, constraint, weights)]
    swept = sweep(grouped, constraint, moments)
    tried.append(solve_kept(grouped, swept != 0, moments, start=swept).reshape(matrix.shape))
    if matrix.shape[1] <= _MOST_INPUTS:
        kept = search_mask(grouped, constraint, moments, swept)
        tried.append(solve_kept(grouped, kept, moments).reshape(matrix.shape))
    return min(tried, key=lambda found: _measured(matrix - found, second_moment))


def _measured(difference: Array, second_moment: Array) -> float:
    """Return the predicted error, infinite where it is no number."""
    error = output_error(difference, second_moment)
    return error if np.isfinite(error) else np.inf


def _damped(moments: Array) -> Array:
    """Return H, float32 [groups, inputs, inputs], with enough on its diagonal to be positive definite."""
    found = moments.astype(np.float32)
    diagonal = np.arange(found.shape[1])
    means = found[:, diagonal, diagonal].mean(axis=1, dtype=np.float64)
    # Of inputs that are always zero all weights cost the same: nothing.
    added = np.where(means > np.finfo(np.float32).tiny, DAMPING * means, 1.0)
    found[:, diagonal, diagonal] += added[:, None].astype(np.float32)
    return found
