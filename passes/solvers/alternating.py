"""The mask and the weights at once: alternating directions between what is close and what is sparse."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array

from .sparsity import Constraint

# ρ holds the dense and the sparse copy together. Inputs are scaled to E[x²] = 1, so that a tenth is loose and a few
# are tight; it grows as fast as the mask settles, as in the paper.
_FIRST_RHO = 0.1
_GROWTH = ((0.1, 1.3), (0.005, 1.2), (0.0, 1.1))
# Steps between two looks at how much of the mask still moves.
_LOOK = 3
# Sixty or so settle it.
_MOST_STEPS = 150
# Weights that are searched at once, with some eight copies of them. What a larger layer may lose as a whole is divided
# evenly among its portions, each of them large enough to be like any other.
_ELEMENTS = 1 << 22


def search_mask(weight: Array, constraint: Constraint, second_moment: Array, start: Array) -> Array:
    """Return which weights to keep, bool, so that the kept ones, solved for, come near the least error there is.

    This is the operator splitting of Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
    Large Language Models, 2024. A dense copy minimises tr((W−B) H (W−B)ᵀ) + ρ/2 ‖B−D‖² by the eigenvectors of H, found
    once; a sparse copy D is its projection to the constraint, whichever that is; what they disagree on is held against
    both more and more. Each step is two products with a matrix of H's size.

    Args:
        weight: W, float32 [groups, outputs, inputs]; zeros stay.
        constraint: Which weights may stay, of all groups together.
        second_moment: H, float32 [groups, inputs, inputs], positive definite.
        start: A solution to begin with.
    """
    scale = np.sqrt(np.diagonal(second_moment, axis1=1, axis2=2))
    unit = second_moment / (scale[:, :, None] * scale[:, None, :])
    spectrum = np.linalg.eigh(unit)
    kept = np.empty(weight.shape, bool)
    outputs = weight.shape[1]
    rows = max(_ELEMENTS // max(weight.size // outputs, 1) // constraint.rows, 1) * constraint.rows
    for first in range(0, outputs, rows):
        part = slice(first, first + rows)
        scaled = weight[:, part] * scale[:, None]
        kept[:, part] = _searched(scaled, constraint, unit, *spectrum, start[:, part] * scale[:, None])
    return kept


def _searched(
    weight: Array, constraint: Constraint, unit: Array, values: Array, vectors: Array, sparse: Array
) -> Array:
    """Return the mask of a weight whose inputs are scaled, H having ones on its diagonal, from a sparse copy on."""
    allowed, goal = weight != 0, weight @ unit
    back, values = np.swapaxes(vectors, 1, 2), values[:, None, :]
    dual, rho, before = np.zeros_like(sparse), np.float32(_FIRST_RHO), sparse != 0
    kept: Array = before
    for step in range(_MOST_STEPS):
        dense = (((goal - dual + rho * sparse) @ vectors) / (values + rho)) @ back
        both = dense + dual / rho
        costs = np.where(allowed, np.square(both), np.float32(0))
        kept = np.logical_and(constraint.kept(costs.reshape(-1, costs.shape[-1])).reshape(both.shape), allowed)
        sparse = np.where(kept, both, np.float32(0))
        dual += rho * (dense - sparse)
        if step % _LOOK == _LOOK - 1:
            moved = float(np.count_nonzero(kept != before)) / max(int(np.count_nonzero(kept)), 1)
            if moved == 0:
                break
            before = kept
            rho *= np.float32(next(growth for share, growth in _GROWTH if moved >= share))
    return kept
