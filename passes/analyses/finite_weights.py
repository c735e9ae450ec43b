"""Weights that hold NaN or infinity: refused by whatever solves for weights, in the same words everywhere."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array
from graphopt.errors import PassError

from .linear_layers import LinearLayer


def finite_matrix(layer: LinearLayer) -> Array:
    """Return the weight of a layer as `LinearLayer.matrix` gives it.

    Raises:
        PassError: It holds NaN or infinity.
    """
    matrix = layer.matrix()
    refuse_not_finite(matrix, f"weight `{layer.weight.name}`")
    return matrix


def refuse_not_finite(values: Array, what: str) -> None:
    """Refuse numbers that solvers, which compute in float32, cannot take.

    Args:
        values: The numbers, of any float dtype and shape.
        what: What they are, for a person: ``weight `w```.

    Raises:
        PassError: One of them is NaN or infinite, or is as float32.
    """
    with np.errstate(over="ignore"):
        finite = bool(np.isfinite(values.astype(np.float32, copy=False)).all())
    if not finite:
        raise not_finite(what)


def not_finite(what: str) -> PassError:
    """Return the error for numbers known not to be finite."""
    return PassError(f"{what} holds NaN or infinity", hint="repair the model first")
