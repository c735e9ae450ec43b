"""At which ranks: what each candidate would lose, and the division of what may be lost that costs the outputs least."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.summary import count_macs

from ..analyses.linear_layers import LinearLayer
from ..analyses.output_damage import Change, error_weights, say_curve, tried_of
from ..analyses.second_moments import ROWS_PER_SAMPLE
from ..solvers.allocation import Separable, allocate
from .factor_forms import Candidate, Curve, Level, Method, Reads
from .pair_latency import PairClock
from .sequential_moments import Moments, SequentialMoments

# Share of a candidate at which it is tried what its error does to the outputs, where no share is asked for.
_USUAL_SHARE = 0.8
# Numbers of approximated weights held until all are tried, 64 MB.
_HELD = 16 << 20
# Halvings of the interval of budgets, by which the fewest numbers are found that keep within an error.
_HALVINGS = 20

What = Literal["params", "macs", "energy", "error", "rank"]


@dataclass(frozen=True)
class Goal:
    """What is asked for.

    Attributes:
        what: ``params`` of the candidates, or ``macs`` of the model, are to be left; ``energy`` is to stay of each
            candidate's outputs, or all together are to lose no more than an ``error``, the mean of their shares; or
            each has the same ``rank``.
        amount: How much: a share between 0 and 1, or the rank.
    """

    what: What
    amount: float


@dataclass(frozen=True)
class Plan:
    """A level for each candidate.

    Attributes:
        levels: In the order of the candidates.
        left: The share of the candidates' parameters that is left.
        holds: Whether that is what was asked for; if not, it is the most that can be had.
        unpaid: How many levels were given up as they are no faster by the clock.
        slower: The places of candidates that are slower at their levels, by the clock.
        untimed: How many candidates are changed whose levels the clock could not time.
    """

    levels: Sequence[Level]
    left: float
    holds: bool = True
    unpaid: int = 0
    slower: Sequence[int] = ()
    untimed: int = 0


@dataclass(frozen=True, eq=False)
class _Ladder:
    """What a candidate can be.

    Attributes:
        levels: The first is the candidate as it is.
        weight: What an error of it counts.
        layers: Of how many layers its errors are the sum.
    """

    levels: Sequence[Level]
    weight: float
    layers: int

    def undominated(self, what: What) -> _Ladder:
        """Return the levels that no other one beats in both cost and error, the dearest first."""
        return replace(self, levels=_undominated(self.levels, what))

    @property
    def errors(self) -> Array:
        """What each level adds to the error of all."""
        return np.array([self.weight * level.error for level in self.levels])

    def costs(self, what: What) -> Array:
        """What each level costs."""
        return np.array([_cost(level, what) for level in self.levels])


def plan_levels(candidates: Sequence[Candidate], goal: Goal, method: Method, ctx: Context) -> Plan:
    """Return the levels with which the outputs of the model are expected to lose least.

    Where multiplications are what is asked for, it is for time: then only levels count that are faster by the clock.

    Args:
        candidates: In graph order, none changed yet.
        goal: What is asked for.
        method: Whether data are looked at.
        ctx: The model and its data.
    """
    ladders = _ladders(candidates, goal, method, ctx)
    budget = _budget(candidates, goal, ctx)
    levels, holds = _chosen(ladders, goal, budget)
    unpaid, clock = 0, PairClock(ctx, candidates)
    while goal.what == "macs":
        paying = [_paying(*one, clock) for one in zip(ladders, levels, candidates, strict=True)]
        gone = sum(len(old.levels) - len(new.levels) for old, new in zip(ladders, paying, strict=True))
        if not gone:
            break
        unpaid, ladders = unpaid + gone, paying
        levels, holds = _chosen(ladders, goal, budget)
    whole = sum(candidate.parameters for candidate in candidates)
    times = [clock.ratio(candidate, level) for candidate, level in zip(candidates, levels, strict=True)]
    slower = [place for place, ratio in enumerate(times) if ratio is not None and ratio > 1]
    untimed = sum(ratio is None for ratio in times)
    return Plan(levels, sum(level.parameters for level in levels) / whole, holds, unpaid, slower, untimed)


def _ladders(candidates: Sequence[Candidate], goal: Goal, method: Method, ctx: Context) -> list[_Ladder]:
    """Return the levels of each candidate, and what its errors count."""
    share = goal.amount if goal.what in ("params", "macs") else _USUAL_SHARE
    tried = _tried(candidates) if method == "whitened" and goal.what not in ("rank", "energy") else set()
    found, changes = [], []
    with ExitStack() as stack:
        reads = _reads(method, ctx, stack)
        for place, candidate in enumerate(ctx.track(candidates, "looking at every rank")):
            curve = candidate.curve(reads, ctx)
            found.append(curve.levels)
            levels = _undominated(curve.levels, goal.what)
            whole = _cost(curve.levels[0], goal.what)
            say_curve(ctx, candidate.nodes[0], {1 - _cost(one, goal.what) / whole: one.error for one in levels})
            # Next to no weights may go: yet how much each layer matters is known only of one that lost some.
            smaller = [one for one in levels if one is not curve.levels[0]] or levels
            level = min(smaller, key=lambda one: abs(_cost(one, goal.what) - share * whole))
            contents = None
            if place in tried and level is not curve.levels[0]:
                contents = curve.approximate(_place(curve, level))
            changes.append(Change(walk.label(candidate.nodes[0]), candidate.kind, level.error, contents))
    weights = error_weights(ctx, changes) if tried else [1.0] * len(found)
    pairs = zip(found, weights, candidates, strict=True)
    return [_Ladder(levels, weight, candidate.layers) for levels, weight, candidate in pairs]


def _tried(candidates: Sequence[Candidate]) -> set[int]:
    """Return the places of candidates to be tried: some of each kind, as many as can be held at once."""
    mean = max(sum(candidate.parameters for candidate in candidates) // len(candidates), 1)
    kinds = [candidate.kind for candidate in candidates]
    return set(tried_of(kinds)) & set(tried_of(kinds, max(1, _HELD // mean)))


def _reads(method: Method, ctx: Context, stack: ExitStack) -> Reads:
    """Return what tells what layers read in the model as it is."""
    if method == "svd" or ctx.data is None:
        return _nothing
    moments = stack.enter_context(SequentialMoments(ctx, compare=False, limit=ROWS_PER_SAMPLE))
    return lambda layer: moments.of(layer, layer.input.name or "")


def _nothing(_layer: LinearLayer) -> Moments | None:
    return None


def _undominated(levels: Sequence[Level], what: What) -> list[Level]:
    """Return the levels that no other one beats in both cost and error, the dearest first."""
    found: list[Level] = []
    for level in sorted(levels, key=lambda one: (_cost(one, what), one.error)):
        if not found or level.error < found[-1].error:
            found.append(level)
    whole = levels[0]
    if found[-1] is not whole:  # nothing is lost by another one
        found.append(whole)
    return found[::-1]


def _place(curve: Curve, level: Level) -> int:
    return next(place for place, one in enumerate(curve.levels) if one is level)


def _cost(level: Level, what: What) -> float:
    return level.macs if what == "macs" else float(level.parameters)


def _paying(ladder: _Ladder, level: Level, candidate: Candidate, clock: PairClock) -> _Ladder:
    """Return a ladder without the level chosen, and those of its form that cost more, where that is no faster."""
    if level.form == "whole" or clock.pays(candidate, level):
        return ladder
    stay = [one for one in ladder.levels if one.form != level.form or one.macs < level.macs]
    return replace(ladder, levels=stay)


def _chosen(ladders: Sequence[_Ladder], goal: Goal, budget: float) -> tuple[list[Level], bool]:
    """Return which level of each ladder to take, and whether that is what was asked for."""
    if goal.what == "rank":
        return [_of_rank(ladder.levels, round(goal.amount)) for ladder in ladders], True
    best, holds = [ladder.undominated(goal.what) for ladder in ladders], True
    match goal.what:
        case "energy":
            places = [_last_within(ladder.levels, 1 - goal.amount) for ladder in best]
        case "error":
            places = _within(best, goal.amount * sum(ladder.weight * ladder.layers for ladder in best))
        case _:
            found = allocate([one.errors for one in best], Separable([one.costs(goal.what) for one in best]), budget)
            places, holds = list(found.levels), found.holds
    return [ladder.levels[place] for ladder, place in zip(best, places, strict=True)], holds


def _budget(candidates: Sequence[Candidate], goal: Goal, ctx: Context) -> float:
    """Return what candidates may cost: a share of their parameters, or what others leave of the model's MACs."""
    if goal.what != "macs":
        return goal.amount * sum(candidate.parameters for candidate in candidates)
    everything = count_macs(ctx.model)
    return goal.amount * everything - (everything - sum(candidate.macs for candidate in candidates))


def _of_rank(levels: Sequence[Level], rank: int) -> Level:
    """Return the level of two factors whose rank is nearest to one; the first where these would save nothing."""
    pairs = [level for level in levels if len(level.ranks) == 1 and level.ranks[0] > 0]
    if not pairs or rank * min(level.parameters / level.ranks[0] for level in pairs) >= levels[0].parameters:
        return levels[0]
    return min(pairs, key=lambda level: (abs(level.ranks[0] - rank), level.ranks[0], level.error))


def _last_within(levels: Sequence[Level], error: float) -> int:
    """Return the cheapest level that loses no more than an error."""
    return max(place for place, level in enumerate(levels) if level.error <= error)


def _within(ladders: Sequence[_Ladder], error: float) -> list[int]:
    """Return the levels of fewest numbers whose errors add up to no more than one."""
    errors, costs = [ladder.errors for ladder in ladders], Separable([ladder.costs("params") for ladder in ladders])
    best = [0] * len(ladders)
    low, high = costs([len(ladder.levels) - 1 for ladder in ladders]), costs(best)
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = allocate(errors, costs, middle)
        if found.error <= error:
            best, high = list(found.levels), middle
        else:
            low = middle
    return best
