"""The rank solver: the matrix of rank r that changes a layer's outputs least, at every rank from one decomposition."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

# Share of H's mean diagonal that plain distance counts: it decides only where the data leave open what is nearest.
_TIE_BREAK = 1e-12
# Numbers of H brought to float64 at once, 8 MB.
_AT_ONCE = 1 << 20


@dataclass(frozen=True, eq=False)
class Factors:
    """A weight as a product of two, Ŵ = left · right, of each group by itself.

    Attributes:
        left: float64 [outputs, rank].
        right: float64 [groups × rank, inputs]: the outputs of group g take the g-th so many rows.
        error: tr((W−Ŵ) H (W−Ŵ)ᵀ), summed over groups.
    """

    left: Array
    right: Array
    error: float

    @property
    def rank(self) -> int:
        """Rank of each group."""
        return int(self.left.shape[1])

    def matrix(self) -> Array:
        """Return Ŵ, float64 [outputs, inputs]."""
        inputs, rank = self.right.shape[1], self.rank
        if not rank:
            return np.zeros((len(self.left), inputs))
        right = self.right.reshape(-1, rank, inputs)
        left = self.left.reshape(len(right), -1, rank)
        return np.asarray((left @ right).reshape(-1, inputs))


class Spectrum:
    """What a weight is worth to its layer's outputs, direction by direction.

    Of all matrices of rank r, Ŵ = U Uᵀ W has the least tr((W−Ŵ) H (W−Ŵ)ᵀ), U the r leading eigenvectors of W H Wᵀ;
    what is lost is the sum of the other eigenvalues (Eckart and Young, The approximation of one matrix by another of
    lower rank, 1936, on W S with H = S Sᵀ; Wang et al., SVD-LLM, 2024, whitens by a Cholesky factor to get there). In
    this form H is neither factored nor inverted, so that it may be singular, or zero. Directions that cost nothing
    are settled by plain distance.

    W H Wᵀ is [outputs, outputs]; of a weight with more outputs than inputs, W = Q R, the same is R H Rᵀ, and U is Q
    times its eigenvectors: the smaller of two symmetric problems, an order of magnitude faster than the decomposition
    of W S itself. Eigenvalues are right to float64's rounding of the largest, about 1e-16 of it, and H is known to
    float32's at best: so errors below a ten-billionth of the whole are rounding, and larger ones right to a millionth.

    Args:
        weight: W, [outputs, inputs], finite.
        second_moment: H, [inputs, inputs], or [groups, inputs, inputs] where outputs come in groups of equal size that
            read inputs of their own, or [inputs] for a diagonal one. None stands for the identity: plain SVD.

    Attributes:
        errors: float64 [full rank + 1]: what is lost at every rank of each group, from all of it at rank 0 to nothing.
    """

    def __init__(self, weight: Array, second_moment: Array | None = None) -> None:
        moments = [None] if second_moment is None else list(_by_group(second_moment))
        wide = weight.astype(np.float64).reshape(len(moments), -1, weight.shape[1])
        self._parts = [_Part(own, moment) for own, moment in zip(wide, moments, strict=True)]
        self.errors: Array = np.sum([part.errors for part in self._parts], axis=0)

    @property
    def full_rank(self) -> int:
        """The rank of each group at which nothing is lost: its smaller dimension."""
        return len(self.errors) - 1

    def factors(self, rank: int) -> Factors:
        """Return the best factors of a rank, whose columns and rows are of equal length; at most of the full rank."""
        rank = min(rank, self.full_rank)
        pairs = [part.factors(rank) for part in self._parts]
        left, right = (np.concatenate(side) for side in zip(*pairs, strict=True))
        return Factors(left, right, float(self.errors[rank]))

    def rank_within(self, share: float) -> int:
        """Return the least rank that loses no more than a share of the whole."""
        return int(np.argmax(self.errors <= share * self.errors[0]))


class _Part:
    """The spectrum of one group.

    Args:
        weight: float64 [outputs, inputs].
        moment: Its H, or None.
    """

    def __init__(self, weight: Array, moment: Array | None) -> None:
        outputs, inputs = weight.shape
        self._basis: Array | None = None
        self._rest = weight
        if outputs > inputs:
            self._basis, self._rest = np.linalg.qr(weight)
        is_zero = moment is not None and not moment.any()
        values, vectors = np.linalg.eigh(_product(self._rest, None if is_zero else moment))
        self._vectors = vectors[:, ::-1]
        lost = np.cumsum(np.maximum(values, 0.0))[::-1]
        self.errors: Array = np.append(lost * (not is_zero), 0.0)

    def factors(self, rank: int) -> tuple[Array, Array]:
        """Return [outputs, rank] and [rank, inputs]."""
        own = self._vectors[:, :rank]
        right = own.T @ self._rest
        left = own if self._basis is None else self._basis @ own
        # Each direction's length is shared evenly, so that neither factor needs more of a short float's range.
        lengths = np.sqrt(np.linalg.norm(right, axis=1))
        return left * lengths, right / np.where(lengths > 0, lengths, 1.0)[:, None]


def _product(weight: Array, moment: Array | None) -> Array:
    """Return W H Wᵀ."""
    plain: Array = weight @ weight.T
    if moment is None:
        return plain
    diagonal = moment if moment.ndim == 1 else np.diagonal(moment)
    found: Array = plain * (_TIE_BREAK * float(diagonal.mean(dtype=np.float64)))
    if moment.ndim == 1:
        found += (weight * moment) @ weight.T
        return found
    step = max(1, _AT_ONCE // len(moment))
    for start in range(0, len(moment), step):
        piece = moment[start : start + step].astype(np.float64)
        found += weight[:, start : start + step] @ (piece @ weight.T)
    return np.asarray((found + found.T) / 2)


def _by_group(second_moment: Array) -> Array:
    return second_moment.reshape(-1, *second_moment.shape[-2:]) if second_moment.ndim > 1 else second_moment[None]
