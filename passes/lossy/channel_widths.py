"""How many channels each group is to keep: the same share of each, or where they cost the outputs least."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.channel_groups import ChannelGroup
from ..analyses.width_costs import WidthCosts
from ..solvers.allocation import allocate, allocate_evenly, allowed_widths
from .channel_curves import error_curves

# A share of each group is asked for by number: blocks larger than this part of a group would make another share of it.
_FINEST_SHARE = 16
# A group of which nothing can be seen shrinks once all others cannot: any cut of it counts as so many times all errors.
_DEAR = 1e6


@dataclass(frozen=True, eq=False)
class Widths:
    """Widths of groups.

    Attributes:
        of: Of each group, how many units are to stay.
        macs: What the model then multiplies, as a share of what it did; None where that was not asked for.
        holds: Whether that is no more than was asked for.
    """

    of: Mapping[ChannelGroup, int]
    macs: float | None = None
    holds: bool = True


def widths_of(group: ChannelGroup, multiple: int | None, liked: int) -> list[int]:
    """Return the widths a group may have, falling from the present one.

    Args:
        group: The group.
        multiple: What widths must be multiples of; None for what kernels like, as far as the group is wide enough.
        liked: What the kernels of the target take at a time, as `Target.width_multiple` says.
    """
    if multiple is not None:
        return allowed_widths(group.size, multiple)
    if group.size < liked:  # no kernel takes it in blocks anyway
        return allowed_widths(group.size, 1)
    return allowed_widths(group.size, liked if group.size >= 2 * liked else max(1, liked // 2))


def widths_by_ratio(groups: Sequence[ChannelGroup], ratio: float, multiple: int | None, liked: int) -> Widths:
    """Return widths that leave out the same share of each group, as nearly as allowed.

    Args:
        groups: The groups.
        ratio: The share to be left out.
        multiple: As `widths_of` takes it, but that None gives way where blocks would round the share away.
        liked: As `widths_of` takes it.
    """
    found = {}
    for group in groups:
        step = multiple or liked
        while multiple is None and step > 1 and step * _FINEST_SHARE > group.size:
            step //= 2
        wanted = group.size * (1 - ratio)
        found[group] = min(allowed_widths(group.size, step), key=lambda width: abs(width - wanted))
    return Widths(found)


class WidthPlan:
    """Widths by what the model may cost.

    Args:
        groups: The groups that may shrink.
        multiple: As `widths_of` takes it.
        ctx: The model, and the target whose kernels like some widths.
    """

    def __init__(self, groups: Sequence[ChannelGroup], multiple: int | None, ctx: Context) -> None:
        self._groups, self._ctx = groups, ctx
        self._allowed = [widths_of(group, multiple, ctx.target.width_multiple) for group in groups]
        self._costs = WidthCosts(ctx.model, groups, self._allowed)
        self._whole = self._costs([0] * len(groups))
        self._curves: Sequence[Array | None] = [None] * len(groups)

    def look(self, share: float) -> None:
        """Look at what each group costs the outputs, at about a share of the MACs, and divide by that from now on."""
        even = allocate_evenly(self._shares(), self._costs, self._whole * share)
        self._curves = error_curves(self._groups, self._allowed, even.levels, self._ctx)
        unseen = [group.name for group, curve in zip(self._groups, self._curves, strict=True) if curve is None]
        if unseen:
            reason = "as what reads them cannot be looked at"
            self._ctx.left(
                f"groups of channels that shrink only where no others can: {len(unseen)} (`{unseen[0]}`), {reason}",
                left=len(unseen),
            )

    def at(self, share: float, *, whole: Collection[ChannelGroup] = ()) -> Widths:
        """Return widths with which the model does no more than a share of its MACs, or the least that can be had.

        Args:
            share: The share of the MACs.
            whole: Groups that shrink only where nothing else will do, as do those of which nothing can be seen.
        """
        budget = self._whole * share
        known = [curve for curve in self._curves if curve is not None]
        if known:
            dear = _DEAR * (sum(float(curve.max()) for curve in known) or 1.0)
            curves = [self._weighed(index, whole, dear) for index in range(len(self._curves))]
            found = allocate(curves, self._costs, budget)
        else:
            found = allocate_evenly(self._shares(), self._costs, budget)
        chosen = zip(self._groups, self._allowed, found.levels, strict=True)
        widths = {group: own[level] for group, own, level in chosen}
        return Widths(widths, found.cost / self._whole if self._whole else 1.0, found.holds)

    def _weighed(self, index: int, whole: Collection[ChannelGroup], dear: float) -> Array:
        """Return the curve of a group, with what shrinking it at all costs beyond that."""
        curve, shares = self._curves[index], self._shares()[index]
        if curve is None:
            return np.where(shares > 0, dear * (1 + shares), 0.0)
        return np.where((shares > 0) & (self._groups[index] in whole), curve + dear, curve)

    def _shares(self) -> list[Array]:
        return [1 - np.asarray(own) / own[0] for own in self._allowed]
