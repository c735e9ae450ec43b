"""The column solver: which inputs to remove, and what the kept weights become so that outputs change least."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .objective import DAMPING, by_group

# Inverses are float64 up to so many inputs, 0.5 GB; beyond, float32 does with half.
_WIDE_INPUTS = 8192
# Of almost no rows, the identity has this weight in the estimate of a covariance.
_MOST_SHRUNK = 0.95


@dataclass(frozen=True, eq=False)
class Reader:
    """A linear layer, as seen by the units it reads.

    Attributes:
        weight: [outputs, inputs], only the outputs that stay whatever is removed.
        second_moment: H = E[x xᵀ], or the covariance where a bias takes the mean: [inputs, inputs], or [groups, inputs,
            inputs] where outputs come in groups of equal size that read inputs of their own.
        units: int64 [groups, inputs]: the unit each input belongs to, -1 for an input of no unit.
        importance: What an error of this layer counts.
        damping: Share of the mean of H's diagonal that is added to the diagonal.
    """

    weight: Array
    second_moment: Array
    units: Array
    importance: float = 1.0
    damping: float = DAMPING


@dataclass(frozen=True, eq=False)
class Removal:
    """Units in the order in which they are best removed.

    Attributes:
        order: int64 [removed].
        errors: float64 [removed + 1]: the predicted error once so many are gone and the rest makes up for them,
            tr((W−Ŵ) H (W−Ŵ)ᵀ) summed over the readers; from 0.
    """

    order: Array
    errors: Array


def removal_order(readers: Sequence[Reader], size: int, *, most: int | None = None) -> Removal:
    """Return the order in which units cost least, each time the one without which the kept weights do best.

    Removing the inputs u of a layer that has already been made up for costs tr(W_u [(H⁻¹)_uu]⁻¹ W_uᵀ), once all other
    weights take the optimal share of it (the block form of Optimal Brain Surgeon, Hassibi and Stork, 1993; for whole
    structures Kurtić et al., ZipLM, 2023). It is summed over all readers, so that one choice serves them all. The
    inverse is never updated: what removals take from it, V Vᵀ, is kept as V, the block-pivoted Cholesky factor of
    what is gone, which costs a third of the time and no second matrix.

    Args:
        readers: All layers that read the units.
        size: How many units there are.
        most: How many to remove at most; all but one by default.
    """
    most = size - 1 if most is None else min(most, size - 1)
    eliminations = [one for reader in readers for one in _eliminations(reader, size, most)]
    alive = np.ones(size, bool)
    order, errors = np.zeros(most, np.int64), np.zeros(most + 1)
    for step in range(most):
        costs = np.zeros(size)
        for one in eliminations:
            costs += one.importance * one.costs()
        unit = int(np.argmin(np.where(alive, costs, np.inf)))
        alive[unit] = False
        order[step], errors[step + 1] = unit, errors[step] + max(costs[unit], 0.0)
        for one in eliminations if step + 1 < most else ():
            one.remove(unit)
    return Removal(order, errors)


def damping_for(second_moment: Array, rows: int) -> float:
    """Return the damping that a moment of so many rows needs, so that what few rows agree on is not taken for true.

    This is the weight the identity has in the estimate of a covariance that is expected to be nearest, of rows drawn
    from a normal distribution (the oracle approximating shrinkage of Chen et al., Shrinkage Algorithms for MMSE
    Covariance Estimation, 2010): about the number of directions the rows spread over, against the number of rows.

    Args:
        second_moment: H, [inputs, inputs] or [groups, inputs, inputs].
        rows: How many rows it was taken over.

    Returns:
        A share of the mean of H's diagonal; `DAMPING` at least.
    """
    moments = _by_group(second_moment)
    inputs = moments.shape[-1]
    trace = np.trace(moments, axis1=1, axis2=2).astype(np.float64)
    squares = np.sum(np.square(moments, dtype=np.float64), axis=(1, 2))
    spread = squares - trace**2 / inputs
    with np.errstate(divide="ignore", invalid="ignore"):
        shares = ((1 - 2 / inputs) * squares + trace**2) / ((rows + 1 - 2 / inputs) * spread)
    share = float(np.clip(np.nan_to_num(shares, nan=0.0), 0.0, _MOST_SHRUNK).max())
    return max(DAMPING, share / (1 - share))


def refitted(
    weight: Array,
    second_moment: Array,
    *,
    keep: Array | None = None,
    cross: Array | None = None,
    damping: float = DAMPING,
) -> Array:
    """Return the weights that give what a layer gave, by least squares on the inputs kept: Ŵ_K = E[y x̂ᵀ]_:K (H_KK)⁻¹.

    Where the inputs x̂ are those the layer always had, E[y x̂ᵀ] = W H, and this is the closed-form update of Optimal
    Brain Surgeon for all that is removed at once; where they changed with earlier layers, that is made up for too
    (He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017). The ridge pulls towards the weights
    there were, not towards zero: inputs the data never excite keep theirs.

    Args:
        weight: W, [outputs, inputs].
        second_moment: H = E[x̂ x̂ᵀ], [inputs, inputs] or [groups, inputs, inputs]; or the covariance where a bias takes
            the mean.
        keep: bool [groups, inputs]: which inputs are still read; all by default.
        cross: E[y x̂ᵀ], [outputs, inputs], or their covariance; None where y = W x̂.
        damping: Share of the mean of H's diagonal that is added to the diagonal.

    Returns:
        float64 [outputs, inputs], zero where an input is not kept.
    """
    moments = _by_group(second_moment)
    wide = by_group(weight.astype(np.float64), second_moment)
    targets = by_group(cross, second_moment) if cross is not None else [None] * len(moments)
    stays = keep if keep is not None else np.ones(moments.shape[:2], bool)
    found = np.zeros(wide.shape)
    for own, wanted, moment, kept, new in zip(wide, targets, moments, stays, found, strict=True):
        damped, ridge = _damped(moment, damping)
        goal = own @ damped if wanted is None else wanted + ridge * own
        chosen = np.flatnonzero(kept)
        new[:, chosen] = np.linalg.solve(damped[np.ix_(chosen, chosen)], goal[:, chosen].T).T
    return found.reshape(weight.shape)


class _Elimination:
    """The inputs of a layer, one group of them, of which units are removed one by one.

    Args:
        weight: W, [outputs, inputs].
        inverse: H⁻¹.
        columns: int64 [units, width]: the inputs of each unit, -1 where it has fewer.
        importance: What an error counts.
        most: How many units will be removed at most.
    """

    def __init__(self, weight: Array, inverse: Array, columns: Array, importance: float, most: int) -> None:
        self.importance = importance
        self._inverse, self._columns = inverse, columns
        self._missing = columns < 0
        self._weight = weight.astype(inverse.dtype)  # a copy
        self._taken = np.zeros((len(inverse), min(most * columns.shape[1], len(inverse))), inverse.dtype)
        self._count = 0
        blocks = inverse[columns[:, :, None], columns[:, None, :]]
        blocks[self._missing[:, :, None] | self._missing[:, None, :]] = 0.0
        units, places = np.nonzero(self._missing)
        blocks[units, places, places] = 1.0  # of an input that is not there, which costs nothing
        self._blocks = blocks

    def costs(self) -> Array:
        """Return what removing each unit would cost, float64 [units]."""
        own = self._weight[:, self._columns]
        own[:, self._missing] = 0.0
        if own.shape[2] == 1:
            return np.asarray(np.einsum("ou,ou->u", own[:, :, 0], own[:, :, 0]) / self._blocks[:, 0, 0], np.float64)
        squares = own.transpose(1, 2, 0) @ own.transpose(1, 0, 2)
        found = np.trace(np.linalg.solve(self._blocks, squares), axis1=1, axis2=2)
        return np.asarray(found, np.float64)

    def remove(self, unit: int) -> None:
        """Remove a unit; all weights left take their share."""
        chosen = self._columns[unit][~self._missing[unit]]
        if not len(chosen):
            return
        taken = self._taken[:, : self._count]
        left = self._inverse[:, chosen] - taken @ taken[chosen].T
        lower = np.linalg.cholesky(left[chosen])
        new = np.linalg.solve(lower, left.T).T
        self._weight -= np.linalg.solve(lower, self._weight[:, chosen].T).T @ new.T
        rows = new[self._columns]
        rows[self._missing] = 0.0
        self._blocks -= rows @ rows.transpose(0, 2, 1)
        # What is gone is all taken: rounding must not leave it a little.
        self._weight[:, chosen] = 0.0
        self._blocks[unit] = np.eye(self._columns.shape[1])
        self._taken[:, self._count : self._count + len(chosen)] = new
        self._count += len(chosen)


def _eliminations(reader: Reader, size: int, most: int) -> list[_Elimination]:
    found = []
    rows = by_group(reader.weight, reader.second_moment)
    for weight, moment, units in zip(rows, _by_group(reader.second_moment), reader.units, strict=True):
        if not (units >= 0).any() or not len(weight):
            continue
        damped, _ = _damped(moment, reader.damping)
        inverse = np.linalg.inv(damped)
        found.append(_Elimination(weight, (inverse + inverse.T) / 2, _columns_of(units, size), reader.importance, most))
    return found


def _columns_of(units: Array, size: int) -> Array:
    """Return the inputs of each unit, int64 [size, most inputs of one], -1 where it has fewer."""
    order = np.argsort(units, kind="stable")
    order = order[units[order] >= 0]
    counts = np.bincount(units[order], minlength=size)
    found = np.full((size, max(int(counts.max(initial=0)), 1)), -1)
    places = np.arange(len(order)) - np.repeat(np.cumsum(counts) - counts, counts)
    found[units[order], places] = order
    return found


def _damped(moment: Array, damping: float) -> tuple[Array, float]:
    """Return H with a ridge on its diagonal, and that ridge."""
    dtype = np.float64 if len(moment) <= _WIDE_INPUTS else np.float32
    damped = moment.astype(dtype)  # a copy
    mean = float(np.trace(damped)) / max(len(damped), 1)
    ridge = damping * mean if mean > 0 else 1.0
    np.fill_diagonal(damped, np.diagonal(damped) + ridge)
    return damped, ridge


def _by_group(second_moment: Array) -> Array:
    return second_moment.reshape(-1, *second_moment.shape[-2:])
