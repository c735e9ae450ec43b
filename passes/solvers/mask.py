"""The mask solver: which weights to zero so that the layer's output changes least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array


@dataclass(frozen=True)
class Masked:
    """A pruned weight.

    Attributes:
        weight: [outputs, inputs], like the weight given, with zeros.
        zeroed: How many weights became zero that were not.
        error: Predicted output error tr((W−Ŵ) H (W−Ŵ)ᵀ); H = I here, so the sum of squares removed.
    """

    weight: Array
    zeroed: int
    error: float


def unstructured(weight: Array, sparsity: float) -> Masked:
    """Zero the share of a weight that is smallest in magnitude.

    With H = I each weight costs its square, so the smallest magnitudes are the exact minimiser
    (Han et al., Learning both Weights and Connections, 2015).

    Args:
        weight: [outputs, inputs], any float dtype.
        sparsity: Share of all weights to be zero, 0 to 1; zeros already there count.
    """
    count = round(sparsity * weight.size)
    keep = np.ones(weight.size, bool)
    if count:
        magnitude = np.abs(weight.astype(np.float32, copy=False)).reshape(-1)
        threshold = np.partition(magnitude, count - 1)[count - 1]
        keep = magnitude > threshold
        # Of equal magnitudes the first ones go, on every machine.
        ties = np.flatnonzero(magnitude == threshold)
        keep[ties[count - np.count_nonzero(magnitude < threshold) :]] = True
    return _apply(weight, keep.reshape(weight.shape))


def n_of_m(weight: Array, n: int, m: int) -> Masked:
    """Keep the n largest of every m consecutive weights along the inputs.

    Sparse kernels (NVIDIA's 2:4: n=2, m=4) take the groups along input channels, so these must run fastest.

    Args:
        weight: [outputs, inputs], inputs divisible by m.
        n: Weights kept in each group.
        m: Size of a group.
    """
    outputs, inputs = weight.shape
    groups = np.abs(weight.astype(np.float32, copy=False)).reshape(outputs, inputs // m, m)
    order = np.argsort(-groups, axis=-1, kind="stable")
    keep = np.zeros(groups.shape, bool)
    np.put_along_axis(keep, order[..., :n], True, axis=-1)
    return _apply(weight, keep.reshape(weight.shape))


def _apply(weight: Array, keep: Array) -> Masked:
    removed = weight[~keep].astype(np.float64)
    masked = np.where(keep, weight, weight.dtype.type(0))
    return Masked(masked, int(np.count_nonzero(removed)), float(np.vdot(removed, removed)))
