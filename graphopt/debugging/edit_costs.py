"""Which edits of a lossy run cost most: what is lost between states of the run, looked into where most is."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass, replace

from graphopt.rewriter import Edit

# The search ends once the edits found make up this share of what is lost,
ENOUGH = 0.9
# or where no stretch that is left makes up this much,
NEGLIGIBLE = 0.02
# or after this many states.
MOST_STATES = 96
# What is lost where no metric has a budget: the outputs' noise, as a share of their signal.
NOISE = "noise"
# An edit that makes up this share of what is lost is to blame by itself.
DOMINANT = 0.5


@dataclass(frozen=True)
class EditCost:
    """What one edit costs behind those before it.

    Attributes:
        edit: The edit.
        cost: What is lost by it.
        share: The share of the most that is lost at any state looked at.
    """

    edit: Edit
    cost: float
    share: float


@dataclass(frozen=True)
class EditCosts:
    """What is lost, and by which edits.

    Attributes:
        what: What was measured, for people.
        total: What is lost by all edits together.
        worst: The most that is lost at any state looked at; more than in the end where later edits make up for others.
        costs: The costliest edits, the worst first; not all of them.
    """

    what: str
    total: float
    worst: float
    costs: tuple[EditCost, ...]

    @property
    def lost(self) -> str:
        """What is lost, in words."""
        return NOISE if self.what == NOISE else f"{self.what} that is lost"

    @property
    def found(self) -> float:
        """The share of what is lost that the edits listed make up."""
        return min(1.0, sum(one.share for one in self.costs))

    @property
    def is_made_up_for(self) -> bool:
        """Whether later edits make up for much of what others cost."""
        return self.worst > self.total / DOMINANT

    @property
    def dominant(self) -> Edit | None:
        """The edit that is to blame by itself, or None where the damage is spread."""
        return self.costs[0].edit if self.costs and self.costs[0].share >= DOMINANT else None

    def describe(self) -> str:
        """Return one line that says how the damage is spread."""
        if not self.costs:
            return f"the {self.lost} comes of many edits, none of which costs {NEGLIGIBLE:.0%} of it"
        worst = self.costs[0].share
        if self.dominant is not None:
            text = f"one edit costs {worst:.0%} of the {self.lost}"
        else:
            text = f"the damage is spread: no edit costs more than {worst:.0%} of the {self.lost}"
        return f"{text}, for which later edits make up" if self.is_made_up_for else text


def costly_edits(edits: list[Edit], loss: Callable[[int], float], what: str) -> EditCosts:
    """Return the edits that cost most.

    What is lost after half of the edits tells how much each half costs; the stretch that costs most is halved next. An
    edit's cost hangs on those before it, and two that make up for each other are not seen where both lie in a stretch.

    Args:
        edits: The edits of a run.
        loss: What is lost after a number of edits, compared with the original.
        what: What that is, for people.
    """
    lost = {0: 0.0, len(edits): loss(len(edits))}
    total = worst = lost[len(edits)]
    stretches = [(-total, 0, len(edits))]
    found: list[EditCost] = []
    while stretches and total > 0 and len(lost) < MOST_STATES:
        negative, low, high = heapq.heappop(stretches)
        if -negative < NEGLIGIBLE * worst or sum(one.cost for one in found) >= ENOUGH * worst:
            break
        if high - low == 1:
            found.append(EditCost(edits[low], -negative, 0.0))
            continue
        middle = (low + high) // 2
        lost[middle] = _or_all(loss(middle))
        worst = max(worst, lost[middle])
        for start, end in ((low, middle), (middle, high)):
            heapq.heappush(stretches, (-_cost(lost[start], lost[end]), start, end))
    found.sort(key=lambda one: one.cost, reverse=True)
    return EditCosts(what, total, worst, tuple(replace(one, share=_share(one.cost, worst)) for one in found))


def _or_all(loss: float) -> float:
    """Return a loss; infinity where it cannot be told, as of a state that gives NaN, which later edits make up for."""
    return math.inf if math.isnan(loss) else loss


def _cost(before: float, after: float) -> float:
    return 0.0 if before == after else after - before  # both may be infinite


def _share(cost: float, worst: float) -> float:
    return 1.0 if math.isinf(cost) else cost / worst


def is_measurable(loss: float) -> bool:
    """Return whether edits can be compared by what is lost."""
    return math.isfinite(loss) and loss > 0
