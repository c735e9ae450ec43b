"""The separable solver: a weight of several blocks as blocks of one factor times another that all blocks share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .rank import Spectrum

# Sweeps of least squares until one lowers the error by less than this share of it; a curve is content with fewer.
SETTLED, MOST_SWEEPS = 1e-3, 30
# Steps of conjugate gradients in each: started from the last sweep's factor, they need not go to the end.
_STEPS = 8
# Share of the mean diagonal that is added where a system is solved, for directions the data never excite.
_JITTER = 1e-10
# A preconditioner may be rougher, and is divided by.
_ROUGHLY = 1e-6
# Of so many inputs, products with H are of float32: half the time, and H is not known better.
_WIDE_INPUTS = 2048
# Multiplications that the sweeps of one solution may take, some seconds; of layers of thousands of inputs, a sweep or
# two.
_MOST_WORK = 2e11


@dataclass(frozen=True, eq=False)
class Halves:
    """A weight as Ŵ[o, b, a] = Σ_q left[o, b, q] · right[q, a].

    Attributes:
        left: float64 [outputs, blocks, rank].
        right: float64 [rank, inputs of a block].
        error: tr((W−Ŵ) H (W−Ŵ)ᵀ).
    """

    left: Array
    right: Array
    error: float

    def weight(self) -> Array:
        """Return Ŵ, float64 [outputs, blocks, inputs of a block]."""
        return np.asarray(self.left @ self.right)


class Blocks:
    """The problem min tr((W−Ŵ) H (W−Ŵ)ᵀ), where Ŵ's blocks of inputs are all made of the same few directions.

    A convolution whose kernel is taken apart is one: the first of two convolutions, which reads the input, is the same
    wherever the second one reads it. With the columns of a k×k kernel as blocks these are k×1 and 1×k (Jaderberg et
    al., Speeding up Convolutional Neural Networks with Low Rank Expansions, 2014), with all its positions 1×1 and k×k.
    Were H the same in each block and zero between them, the best would be that of rank r of the matrix [outputs ×
    blocks, inputs of a block]; that is where it starts. From there the two factors take turns, each by least squares in
    all of H, so that the error never rises: the left one solved, the right one, of which all numbers hang together,
    by conjugate gradients, with H's mean block and the left one's own products as a preconditioner.

    Args:
        weight: W, [outputs, blocks, inputs of a block], finite.
        moment: H, [inputs, inputs], blocks slowest. None stands for the identity, with which the start is the best.

    Attributes:
        power: tr(W H Wᵀ), the error of no weight at all.
    """

    def __init__(self, weight: Array, moment: Array | None = None) -> None:
        self.weight = weight.astype(np.float64)
        outputs, blocks, each = self.weight.shape
        self._work = float(outputs) * (blocks * each) ** 2
        self._moment: Array | None = None
        self._mean: Array | None = None
        if moment is not None and moment.any():
            of_blocks = moment.reshape(blocks, each, blocks, each)
            self._mean = np.asarray(np.mean([of_blocks[at, :, at] for at in range(blocks)], axis=0, dtype=np.float64))
            if blocks > 1:
                wide = np.float64 if blocks * each <= _WIDE_INPUTS else np.float32
                self._moment = moment.astype(wide, copy=False)
        flat = self.weight.reshape(-1, each)
        spectra = [Spectrum(flat, self._mean)]
        if self._moment is not None:
            spectra.append(Spectrum(flat))
        self.full_rank = spectra[0].full_rank
        self._starts = [one.factors(one.full_rank).right for one in spectra]
        self._seen = self._times(self.weight)
        self.power = float(np.vdot(self.weight, self._seen))

    def starts(self, rank: int) -> list[Array]:
        """Return right factors to begin with, [rank, inputs of a block]: by the mean block of H, and without H."""
        return [one[: min(rank, self.full_rank)] for one in self._starts]

    def start(self, rank: int) -> Halves:
        """Return the better of the right factors to begin with, and the best left one for it."""
        return min((self.halves(right) for right in self.starts(rank)), key=_error)

    def solve(self, rank: int, *, sweeps: int = MOST_SWEEPS) -> Halves:
        """Return factors of a rank, at most of the full rank; never worse than any it starts with.

        Args:
            rank: The rank.
            sweeps: The most turns of both factors, from each start where they are many; 0 leaves the start.
        """
        if self._moment is None or not 0 < rank < self.full_rank:
            return self.start(rank)  # the best there is
        begun = [self.halves(right) for right in self.starts(rank)]
        sweeps = min(sweeps, self.affordable)
        if sweeps < MOST_SWEEPS:
            begun = [min(begun, key=_error)]
        return min((self._settled(one, sweeps) for one in begun), key=_error)

    def _settled(self, found: Halves, sweeps: int) -> Halves:
        """Return factors from which another sweep leads nowhere.

        Turns of least squares creep along valleys: so after each the right factor is tried further along, twice as
        far as long as that is better (line search, as Harshman, Foundations of the PARAFAC procedure, 1970, has it).
        """
        reach = 1.0
        for _ in range(sweeps):
            better = self.halves(self.improved(found.left, found.right))
            further = self.halves(better.right + reach * (better.right - found.right))
            reach, better = (2 * reach, further) if further.error < better.error else (max(reach / 2, 1.0), better)
            gain, found = found.error - better.error, min(better, found, key=_error)
            if gain <= SETTLED * found.error:
                break
        return found

    @property
    def affordable(self) -> int:
        """How many sweeps are made at most."""
        return 1 + int(_MOST_WORK / (_STEPS * self._work))

    def errors(self, ranks: Sequence[int], *, sweeps: int = 2) -> Array:
        """Return what is lost at some ranks, rising, after a few sweeps: float64 [ranks], never rising."""
        found = np.array([self.solve(rank, sweeps=sweeps).error for rank in ranks])
        return np.minimum.accumulate(found)

    def halves(self, right: Array) -> Halves:
        """Return the best left factor for a right one, with it."""
        products, goal = self.reduced(right)
        solved = _solved(products, goal)
        error = self.power - 2 * float(np.vdot(solved, goal)) + float(np.vdot(solved, solved @ products))
        left = solved.reshape(len(goal), self.weight.shape[1], len(right))
        # Each direction's length is shared evenly, so that neither factor needs more of a short float's range.
        ours, theirs = np.linalg.norm(left, axis=(0, 1)), np.linalg.norm(right, axis=1)
        known = (ours > 0) & (theirs > 0)
        shares = np.sqrt(np.where(known, ours, 1.0) / np.where(known, theirs, 1.0))
        return Halves(left / shares, right * shares[:, None], max(error, 0.0))

    def reduced(self, right: Array) -> tuple[Array, Array]:
        """Return M H Mᵀ, [blocks × rank, same], and W H Mᵀ, [outputs, blocks × rank]; Ŵ = left · M."""
        blocks, each = self.weight.shape[1:]
        goal = (self._seen @ right.T).reshape(len(self.weight), blocks * len(right))
        if self._moment is None:
            own = right @ (right.T if self._mean is None else self._mean @ right.T)
            return np.kron(np.eye(blocks), own), goal
        # H from its right side: [inputs, blocks, each] · [each, rank].
        half = self._moment.reshape(-1, blocks, each) @ right.T.astype(self._moment.dtype)
        half = half.reshape(blocks, each, blocks * len(right))
        products = right.astype(half.dtype) @ half
        size = blocks * len(right)
        products = products.reshape(size, size).astype(np.float64)
        return (products + products.T) / 2, goal

    def improved(self, left: Array, right: Array) -> Array:
        """Return a better right factor for a left one, from another, by some steps of conjugate gradients."""
        outputs, blocks, rank = left.shape
        goal = np.tensordot(left, self._seen, axes=((0, 1), (0, 1)))
        flat: Array = left.reshape(outputs, -1)
        if outputs > flat.shape[1]:  # the same products of fewer rows
            flat = np.asarray(np.linalg.qr(flat, mode="r"))
        own: Array = flat.reshape(-1, blocks, rank)

        def curve(step: Array) -> Array:
            return np.tensordot(own, self._times(own @ step), axes=((0, 1), (0, 1)))

        squares = np.einsum("kbq,kbp->qp", own, own)
        inner = _inverse(squares)
        outer = np.eye(right.shape[1]) if self._mean is None else _inverse(self._mean)
        found, rest = right, goal - curve(right)
        ready = inner @ rest @ outer
        way, size = ready, float(np.vdot(rest, ready))
        for _ in range(_STEPS):
            if not size > 0:
                break
            bent = curve(way)
            across = float(np.vdot(way, bent))
            if not across > 0:
                break
            found = found + size / across * way
            rest = rest - size / across * bent
            ready = inner @ rest @ outer
            size, before = float(np.vdot(rest, ready)), size
            way = ready + size / before * way
        return found

    def _times(self, weight: Array) -> Array:
        """Return a weight [any, blocks, inputs of a block] times H."""
        if self._moment is None:
            return weight if self._mean is None else np.asarray(weight @ self._mean)
        flat = weight.reshape(len(weight), -1).astype(self._moment.dtype)
        return np.asarray((flat @ self._moment).reshape(weight.shape), np.float64)


def _error(halves: Halves) -> float:
    return halves.error


def _solved(products: Array, goal: Array) -> Array:
    """Return X with X · products = goal, where products are symmetric and may be singular."""
    try:
        return np.asarray(np.linalg.solve(_steadied(products, _JITTER), goal.T).T)
    except np.linalg.LinAlgError:
        return np.asarray(goal @ np.linalg.pinv(products, hermitian=True))


def _inverse(products: Array) -> Array:
    """Return the inverse of symmetric products, roughly where they are nearly singular."""
    return np.asarray(np.linalg.inv(_steadied(products, _ROUGHLY)))


def _steadied(products: Array, share: float) -> Array:
    """Return products with a share of their mean diagonal added to it, and something where that is zero."""
    mean = float(np.trace(products)) / max(len(products), 1)
    return products + share * max(mean, float(np.finfo(np.float32).tiny)) * np.eye(len(products))
