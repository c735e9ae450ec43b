"""Layers that read the same rows, factored together: one shared first product, where that loses less for its size."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .objective import output_error
from .tall_rank import TallSpectrum

# Ranks a product [outputs, inputs] may have, where that pays.
Allowed = Callable[[int, int], Sequence[int]]
# Of so many layers every way to put them together is looked at, 15 for four; of more, all together or each by itself.
_MOST_PARTED = 4
# Levels kept of a group, evenly spaced: their costs then differ by less than half a percent of the whole.
_MOST_LEVELS = 256
# No layer counts less than this share of the one that counts most: its factor is still asked for.
_LEAST_SCALE = 1e-9
# Share of H's mean diagonal that plain distance counts, as in `rank`.
_TIE_BREAK = 1e-12


@dataclass(frozen=True)
class Part:
    """Layers of a stack that are treated alike.

    Attributes:
        members: Their places in the stack; several share a first product.
        rank: Its rank; None for a single layer that stays as it is.
    """

    members: tuple[int, ...]
    rank: int | None


@dataclass(frozen=True, eq=False)
class StackLevels:
    """What can be done with a stack, from nothing to the most; no level is both dearer and worse than another.

    Attributes:
        errors: float64 [levels], rising from 0: weighed errors, summed over the layers.
        costs: float64 [levels], falling: parameters.
        plans: What each level is, the parts of the stack in the order of their first members.
    """

    errors: Array
    costs: Array
    plans: tuple[tuple[Part, ...], ...]


def stack_levels(
    weights: Sequence[Array], second_moment: Array | None, scales: Sequence[float], allowed: Allowed
) -> StackLevels:
    """Return what can be done with a stack: joint factors, separate ones, layers as they are, the best for each size.

    Together, layers W₁, W₂, … of rank r cost r · (inputs + Σ outputs), and by themselves Σ rᵢ · (inputs + outputs i).
    Of all ways to divide the stack, and of all ranks, those are kept that no other beats in both error and size.

    Args:
        weights: Wᵢ, [outputs of i, inputs] each.
        second_moment: H, [inputs, inputs], of what they read; None for the identity.
        scales: What an error tr((Wᵢ−Ŵᵢ) H (Wᵢ−Ŵᵢ)ᵀ) of each layer counts.
        allowed: The ranks a product of so many outputs and inputs may have.
    """
    inputs = weights[0].shape[1]
    outputs = [len(weight) for weight in weights]
    held = _held(scales)
    options: dict[tuple[int, ...], _Options] = {}
    for members in {part for way in _ways(len(weights)) for part in way}:
        together = sum(outputs[one] for one in members)
        spectrum = _spectrum(weights, held, members, second_moment)
        ranks = [rank for rank in allowed(together, inputs) if rank < min(together, inputs)]
        found = [
            (float(spectrum.errors[rank]), float(rank * (inputs + together)), (Part(members, rank),)) for rank in ranks
        ]
        whole = [(0.0, float(inputs * together), (Part(members, None),))] if len(members) == 1 else []
        options[members] = _best([*whole, *found])
    ways = [_sum([options[part] for part in way]) for way in _ways(len(weights)) if all(options[part] for part in way)]
    levels = _thinned(_best([level for way in ways for level in way]))
    untouched = tuple(Part((one,), None) for one in range(len(weights)))
    if levels[0][2] != untouched:  # beaten by what loses nothing, such as factors of zeros
        levels = [(0.0, float(inputs * sum(outputs)), untouched), *levels]
    errors, costs = (np.array([level[side] for level in levels]) for side in (0, 1))
    return StackLevels(errors, costs, tuple(tuple(sorted(level[2], key=lambda part: part.members)) for level in levels))


def joint_factors(
    weights: Sequence[Array], moments: Sequence[Array | None], scales: Sequence[float], rank: int
) -> tuple[list[Array], Array]:
    """Return Wᵢ ≈ Aᵢ B with one B for all: A of each [outputs of i, rank], and B [rank, inputs], float64.

    Where all H are the same, this is the least Σ sᵢ tr((Wᵢ−AᵢB) H (Wᵢ−AᵢB)ᵀ) there is: the best rank of the weights
    stacked upon each other, each times √sᵢ. Where they differ a little, as steadied ones do, B is that for their mean,
    and each A the best for its own H, Wᵢ Hᵢ Bᵀ (B Hᵢ Bᵀ)⁻¹.

    Args:
        weights: Wᵢ, [outputs of i, inputs] each.
        moments: Hᵢ, [inputs, inputs] each; or None for the identity, for all of them.
        scales: What an error of each layer counts.
        rank: The rank.
    """
    held = _held(scales)
    known = [one for one in moments if one is not None]
    same = not known or all(one is known[0] or np.array_equal(one, known[0]) for one in known[1:])
    moment = (known[0] if known else None) if same else np.average(known, axis=0, weights=held)
    found = _spectrum(weights, held, range(len(weights)), moment).factors(rank)
    ends = np.cumsum([len(weight) for weight in weights])[:-1]
    lefts = np.split(found.left, ends)
    if not same:
        lefts = [_fitted(*one, found.right) for one in zip(weights, moments, lefts, strict=True)]
    return lefts, found.right


def _fitted(weight: Array, moment: Array | None, left: Array, right: Array) -> Array:
    """Return the best A for a B, or the one there is where rounding makes it no better."""
    assert moment is not None, "all layers of a stack have a second moment, or none has"
    wide = moment.astype(np.float64)
    wide.reshape(-1)[:: len(wide) + 1] += _TIE_BREAK * np.diagonal(wide).mean()
    try:
        better = np.linalg.solve(right @ wide @ right.T, right @ wide @ weight.astype(np.float64).T).T
    except np.linalg.LinAlgError:
        return left
    errors = [output_error(weight - one @ right, moment) for one in (better, left)]
    return better if errors[0] <= errors[1] else left


def _held(scales: Sequence[float]) -> Array:
    """Return scales none of which is zero."""
    given = np.asarray(scales, np.float64)
    return np.maximum(given, _LEAST_SCALE * (given.max(initial=0.0) or 1.0))


def _spectrum(
    weights: Sequence[Array], scales: Array, members: Sequence[int], second_moment: Array | None
) -> TallSpectrum:
    """Return the spectrum of some layers, stacked."""
    return TallSpectrum([weights[one] for one in members], [float(scales[one]) for one in members], second_moment)


# An error, a cost, and the parts these are of.
_Level = tuple[float, float, tuple[Part, ...]]
_Options = list[_Level]


def _ways(count: int) -> list[list[tuple[int, ...]]]:
    """Return the ways to divide so many layers into parts."""
    if count > _MOST_PARTED:
        return [[(one,) for one in range(count)], [tuple(range(count))]]
    return list(_partitions(count))


def _partitions(count: int) -> Iterator[list[tuple[int, ...]]]:
    if not count:
        yield []
        return
    last = count - 1
    for parts in _partitions(last):
        yield [*parts, (last,)]
        for place, part in enumerate(parts):
            yield [*parts[:place], (*part, last), *parts[place + 1 :]]


def _sum(options: Sequence[_Options]) -> _Options:
    """Return the best of what parts can be together."""
    found: _Options = [(0.0, 0.0, ())]
    for own in options:
        errors = np.add.outer([one[0] for one in found], [one[0] for one in own])
        costs = np.add.outer([one[1] for one in found], [one[1] for one in own])
        kept = _unbeaten(errors.ravel(), costs.ravel())
        pairs = [divmod(int(place), len(own)) for place in kept]
        found = _thinned([(float(errors[a, b]), float(costs[a, b]), (*found[a][2], *own[b][2])) for a, b in pairs])
    return found


def _best(levels: _Options) -> _Options:
    kept = _unbeaten(np.array([one[0] for one in levels]), np.array([one[1] for one in levels]))
    return [levels[int(place)] for place in kept]


def _unbeaten(errors: Array, costs: Array) -> Array:
    """Return the places of what nothing else beats in both, costs falling."""
    order = np.lexsort((errors, costs))
    before = np.minimum.accumulate(np.concatenate([[np.inf], errors[order][:-1]])) if len(order) else errors
    return order[errors[order] < before][::-1]


def _thinned(levels: _Options) -> _Options:
    """Return some of many levels, evenly spaced in cost, the first and the last among them."""
    if len(levels) <= _MOST_LEVELS:
        return levels
    costs = np.array([one[1] for one in levels])
    wanted = np.linspace(costs[0], costs[-1], _MOST_LEVELS)
    # The dearest that costs no more than each.
    places = np.searchsorted(-costs, -wanted)
    return [levels[int(place)] for place in np.unique(np.minimum(places, len(levels) - 1))]
