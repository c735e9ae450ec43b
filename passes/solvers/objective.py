"""The one objective of lossy passes: how much an approximated weight changes its layer's output."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array

# Share of the mean E[x²] that is added to every input's: what data never excite must stay about right all the same.
DAMPING = 0.01
# Below this, squares in float32 have lost their precision, or are gone.
_SMALLEST_SUM = 1e-30


def output_error(difference: Array, second_moment: Array | None = None) -> float:
    """Return tr(Δ H Δᵀ), the mean squared change of a layer's output, summed over its outputs.

    Args:
        difference: Δ = W − Ŵ, [outputs, inputs].
        second_moment: H = E[x xᵀ], [inputs, inputs], or [groups, inputs, inputs] where outputs come in groups of
            equal size that read inputs of their own. None stands for the identity.
    """
    if second_moment is None:
        flat = difference.ravel(order="K")  # no copy, whichever axis runs fastest
        return sum_of_squares(flat)
    grouped = by_group(difference, second_moment)
    moments = second_moment.reshape(len(grouped), *second_moment.shape[-2:])
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.sum((grouped @ moments) * grouped, dtype=np.float64))
    if np.isfinite(found):
        return found
    wide = grouped.astype(np.float64)
    return float(np.sum((wide @ moments.astype(np.float64)) * wide))


def sum_of_squares(flat: Array) -> float:
    """Return x·x of a vector; in float64 where squares are too large or too small for its own type."""
    with np.errstate(over="ignore", invalid="ignore"):
        found = float(np.dot(flat, flat))
    if _SMALLEST_SUM <= found < np.inf:
        return found
    wide = flat.astype(np.float64)
    return float(np.dot(wide, wide))


def by_group(matrix: Array, second_moment: Array | None) -> Array:
    """Return a matrix [outputs, inputs] as [groups, outputs of a group, inputs], a view where it can be."""
    groups = 1 if second_moment is None or second_moment.ndim == 2 else len(second_moment)
    return matrix.reshape(groups, len(matrix) // groups, matrix.shape[1])


def importance(second_moment: Array | None, outputs: int) -> Array | None:
    """Return what an error of each input costs, as seen by each output: [1 or outputs, inputs], or None for None.

    That is E[x²], the diagonal of H; a hundredth of its mean is added, so that inputs the data never excite count too.
    """
    if second_moment is None:
        return None
    diagonal = np.diagonal(second_moment, axis1=-2, axis2=-1).astype(np.float32)
    diagonal = diagonal + np.float32(DAMPING) * diagonal.mean(axis=-1, keepdims=True)
    return diagonal[None] if diagonal.ndim == 1 else np.repeat(diagonal, outputs // len(diagonal), axis=0)
