"""The Tucker solver: a weight of several blocks as a shared right factor, a core and a left factor."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .rank import Spectrum
from .separable import MOST_SWEEPS, SETTLED, Blocks, Halves


@dataclass(frozen=True, eq=False)
class Tucker:
    """A weight as Ŵ[o, b, a] = Σ left[o, s] · core[s, b, q] · right[q, a].

    Attributes:
        left: float64 [outputs, outer rank].
        core: float64 [outer rank, blocks, inner rank].
        right: float64 [inner rank, inputs of a block].
        error: tr((W−Ŵ) H (W−Ŵ)ᵀ).
    """

    left: Array
    core: Array
    right: Array
    error: float

    def weight(self) -> Array:
        """Return Ŵ, float64 [outputs, blocks, inputs of a block]."""
        return np.asarray(self.half() @ self.right)

    def half(self) -> Array:
        """Return what the right factor is multiplied by, float64 [outputs, blocks, inner rank]."""
        return np.asarray(np.tensordot(self.left, self.core, axes=1))


def tucker_errors(blocks: Blocks, inner: int) -> Array:
    """Return what is lost at an inner rank with every outer rank, from 0: float64 [full outer rank + 1].

    For a given right factor, what is lost is what the best left half of `Blocks` loses, plus the tail of a spectrum:
    that half's, in the moments of what the right factor gives (the step of Tucker-2 for convolutions, Kim et al.,
    Compression of Deep Convolutional Neural Networks for Fast and Low Power Mobile Applications, 2015, in H).

    Args:
        blocks: The problem.
        inner: The inner rank.
    """
    found = []
    for right in blocks.starts(inner):
        halves = blocks.halves(right)
        found.append(halves.error + _spectrum(blocks, halves).errors)
    return np.asarray(np.min(found, axis=0))


def solve_tucker(blocks: Blocks, outer: int, inner: int, *, sweeps: int = MOST_SWEEPS) -> Tucker:
    """Return factors of two ranks; never worse than those it starts with, whose right factor is best for all outputs.

    The left factor and the core are the exact best for a right one, by one decomposition; the right one is the best for
    these by least squares. They take turns.

    Args:
        blocks: The problem.
        outer: Rank of the outputs, at most the full one.
        inner: Rank of the inputs of a block, likewise.
        sweeps: The most turns; 0 leaves the start.
    """
    found = min((_given_right(blocks, right, outer) for right in blocks.starts(inner)), key=lambda one: one.error)
    for _ in range(min(sweeps, blocks.affordable)):
        better = _given_right(blocks, blocks.improved(found.half(), found.right), outer)
        gain, found = found.error - better.error, min(better, found, key=lambda one: one.error)
        if gain <= SETTLED * found.error:
            break
    return found


def _given_right(blocks: Blocks, right: Array, outer: int) -> Tucker:
    halves = blocks.halves(right)
    factors = _spectrum(blocks, halves).factors(outer)
    core = factors.right.reshape(factors.rank, -1, len(right))
    return Tucker(factors.left, core, halves.right, halves.error + factors.error)


def _spectrum(blocks: Blocks, halves: Halves) -> Spectrum:
    """Return what the outputs' directions are worth, given the right factor."""
    products, _ = blocks.reduced(halves.right)
    return Spectrum(halves.left.reshape(len(halves.left), -1), products)
