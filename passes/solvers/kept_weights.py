"""What kept weights become once it is settled which these are: the least-squares answer, by conjugate gradients."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array

# Masks of half the weights are solved to a hundredth of a per cent of their error after ten to thirty steps.
_STEPS = 40
# A residual that small a share of the first one tells no more in float32.
_SETTLED = 1e-6
# Weights solved at once, with some six copies of them.
_ELEMENTS = 1 << 22


def solve_kept(
    weight: Array,
    kept: Array,
    second_moment: Array,
    *,
    start: Array | None = None,
    goal: Array | None = None,
    steps: int = _STEPS,
) -> Array:
    """Return Ŵ, zero where nothing is kept, of the least tr((W−Ŵ) H (W−Ŵ)ᵀ).

    Each output is a system of its own over the inputs it keeps. All of them are solved at once by conjugate gradients
    with the gradient masked (as in Meng et al., ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for
    Large Language Models, 2024), preconditioned by the diagonal: one product with H a step, and nothing is inverted.

    Args:
        weight: W, float32 [groups, outputs, inputs].
        kept: bool, likewise.
        second_moment: H, float32 [groups, inputs, inputs], positive definite.
        start: Ŵ to begin with; W where nothing is known.
        goal: W H, where W itself is not known: the weight given is then only where to begin.
        steps: The most steps.
    """
    outputs = weight.shape[1]
    rows = max(_ELEMENTS // max(weight.size // outputs, 1), 1)
    first = weight if start is None else start
    parts = [slice(at, at + rows) for at in range(0, outputs, rows)]
    solved = []
    for at in parts:
        found = np.where(kept[:, at], first[:, at], np.float32(0))
        residual = (weight[:, at] - found) @ second_moment if goal is None else goal[:, at] - found @ second_moment
        solved.append(_descended(found, residual, kept[:, at], second_moment, steps))
    return np.concatenate(solved, axis=1)


def _descended(found: Array, residual: Array, kept: Array, second_moment: Array, steps: int) -> Array:
    """Return where steps of conjugate gradients lead from a solution whose residual is given."""
    residual = np.where(kept, residual, np.float32(0))
    scale = 1 / np.diagonal(second_moment, axis1=1, axis2=2)[:, None, :]
    direction = residual * scale
    size = _products(residual, direction)
    enough = _SETTLED**2 * size.max(initial=0.0)
    for _ in range(steps):
        if size.max(initial=0.0) <= enough:
            break
        image = np.where(kept, direction @ second_moment, np.float32(0))
        step = size / np.maximum(_products(direction, image), np.finfo(np.float32).tiny)
        found += step * direction
        residual -= step * image
        preconditioned = residual * scale
        before, size = size, _products(residual, preconditioned)
        direction *= size / np.maximum(before, np.finfo(np.float32).tiny)
        direction += preconditioned
    return found


def _products(one: Array, other: Array) -> Array:
    """Return the inner product of each row, [groups, outputs, 1]."""
    found: Array = np.einsum("goi,goi->go", one, other)[..., None]
    return found
