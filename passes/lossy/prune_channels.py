"""Pruning of channels: whole filters, channels and neurons removed, which leaves a smaller dense model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.backend import Array
from graphopt.errors import UsageError
from graphopt.options import check, opt
from graphopt.summary import count_macs

from ..analyses.channel_groups import Axis, ChannelGroup, Layout, channel_groups
from ..analyses.finite_weights import refuse_not_finite
from ..analyses.quantized import refuse_to_prune_quantized
from ..analyses.selection import Selection, select
from .channel_choice import OF_DATA, Criterion, is_stream, kept_units, order_by_weights
from .channel_latency import refuse_untimed, widths_by_latency
from .channel_sweep import ChannelSweep
from .channel_trial import best_of
from .channel_widths import WidthPlan, Widths, widths_by_ratio
from .order import BEFORE_FACTORS
from .removable_channels import find_channels
from .shrinking import shrink

_NAME = "prune-channels"
_USUAL_RATIO = 0.3


@dataclass(frozen=True)
class PruneChannels(Pass):
    """Remove the channels whose loss costs the outputs least, and solve the kept weights anew where there is data."""

    ratio: float | None = opt(None, help="share of each group's channels to remove; 0.3 where nothing is asked for")
    macs: float | None = opt(None, help="multiplications to be left, as a share of the model's")
    latency: float | None = opt(None, help="time of a run to be left, as a share of the model's, measured here")
    criterion: Literal["l1", "l2", "variance", "obs", "taylor"] | None = opt(
        None,
        help="what a channel counts: its weights (l1, l2), its variance, the error the rest cannot make up for (obs), "
        "or the gradient of the loss, by labels where there are any (taylor)",
    )
    allocate: Literal["uniform", "error"] | None = opt(
        None, help="the same share of each group, or what costs the outputs least; error with data and a target"
    )
    multiple: int | None = opt(
        None,
        help="widths are multiples of this; by default of what the target's kernels take, less in narrow groups",
        low=1,
    )
    rounds: int = opt(
        1, help="on the way to what is asked for, how often channels are chosen and layers solved anew", low=1, high=100
    )
    include: tuple[str, ...] = opt((), help="globs over names and operators of layers whose outputs may shrink; all")
    exclude: tuple[str, ...] = opt((), help="globs over names and operators of layers whose outputs stay")

    name = _NAME
    guarantee = Guarantee.LOSSY
    precedes = BEFORE_FACTORS
    # What units are called, and which side is cut where an axis is two in one: other kinds of groups, the same pass.
    units: ClassVar[str] = "channels"
    layout: ClassVar[Layout | None] = None
    usual_ratio: ClassVar[float] = _USUAL_RATIO

    def __post_init__(self) -> None:
        """Refuse targets that are none, or two at once."""
        check(self, where=f"pass `{self.name}`")
        asked = [name for name in ("ratio", "macs", "latency") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise UsageError(
                f"pass `{self.name}`: `{asked[0]}` and `{asked[1]}` cannot both be given", hint="one of them decides"
            )
        for name in asked:
            value = getattr(self, name)
            if not 0 < value < 1:
                what = "removed" if name == "ratio" else "left"
                raise UsageError(
                    f"pass `{self.name}`: option `{name}` is out of range: `{value:g}`",
                    hint=f"the share to be {what}, between 0 and 1, such as `{name}={0.3 if name == 'ratio' else 0.7}`",
                )
        if self.allocate == "error" and (self.macs is None and self.latency is None):
            raise UsageError(
                f"pass `{self.name}`: `allocate=error` needs something to divide",
                hint="give what is to be left of the model, such as `macs=0.7`",
            )

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form, and data where the criterion looks at it."""
        must = self.criterion in OF_DATA or self.allocate == "error"
        return frozenset({Need.CANONICAL, Need.CALIBRATION if must else Need.CALIBRATION_OPTIONAL})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Find the groups, settle their widths, choose, and cut; as often as there are rounds."""
        refuse_to_prune_quantized(model, self.name)
        if self.latency is not None:
            refuse_untimed(self.name, ctx)
        if self.rounds == 1:
            self._run_once(model, ctx)
        else:
            self._run_in_rounds(model, ctx)

    def _run_in_rounds(self, model: ir.Model, ctx: Context) -> None:
        """Cut in steps, each of which is settled when it begins.

        Each of n rounds leaves the n-th root of what is to be left in the end, so that all take the same share of what
        they find. MACs are counted from the model as it was, so what widths in blocks leave over in one round goes in
        the next; times are measured, and each round goes by its own.
        """
        whole = count_macs(model)
        for number in range(1, self.rounds + 1):
            name, share = self._share(number, count_macs(model) / whole if whole else None)
            if share >= 1:
                ctx.note(f"round {number}: widths in blocks have taken what it was to take")
                continue
            ctx.note(f"round {number}: `{name}={share:.3g}`")
            replace(self, rounds=1, **{name: share}).run(model, ctx)  # type: ignore[arg-type]
        if whole:
            ctx.note(f"{count_macs(model) / whole:.1%} of the MACs left after {self.rounds} rounds")

    def _share(self, number: int, left: float | None) -> tuple[str, float]:
        """Return what a round is asked for, of a model with so much left of its MACs; None where none are known."""
        if self.macs is not None:
            root = self.macs ** (1 / self.rounds)
            return "macs", root if left is None else root**number / left
        if self.latency is not None:
            return "latency", self.latency ** (1 / self.rounds)
        return "ratio", 1 - (1 - (self.ratio or self.usual_ratio)) ** (1 / self.rounds)

    def _run_once(self, model: ir.Model, ctx: Context) -> None:
        groups = self._groups(model, ctx)
        if not groups:
            ctx.note(f"found no {self.units} that can be removed: the model is unchanged")
            return
        _refuse_nan(groups)
        criterion: Criterion = self.criterion or ("obs" if ctx.data is not None else "l2")
        widths = self._widths(groups, ctx)
        cut = {group: width for group, width in widths.of.items() if width < group.size}
        if not cut:
            ctx.note(f"so few {self.units} are asked for, or allowed, to go that none does: the model is unchanged")
            return
        before = {group: group.size for group in cut}
        solved = self.cut(cut, criterion, ctx)
        removed, total = sum(before.values()) - sum(cut.values()), sum(group.size for group in groups)
        text = f"{removed} of {total} {self.units} removed, in {len(cut)} of {len(groups)} groups{self.listed(cut)}"
        text += f"; {solved} layers solved anew for what they gave" if solved else ""
        text += f"; {widths.macs:.1%} of the MACs left" if widths.macs is not None else ""
        ctx.note(text, removed=removed, channels=total, groups=len(cut), solved=solved)

    def cut(self, widths: Mapping[ChannelGroup, int], criterion: Criterion, ctx: Context) -> int:
        """Choose which units of groups stay, and remove the others; return how many layers were solved anew."""
        if ctx.data is None:
            kept = {
                group: kept_units(group.size, order_by_weights(group, criterion), widths[group]) for group in widths
            }
            shrink(ctx, kept)
            return 0
        sweep = ChannelSweep(ctx, widths, criterion)
        shrink(ctx, _as_they_are_now(sweep.run(), ctx, self.layout))
        return sweep.solved

    def listed(self, cut: Mapping[ChannelGroup, int]) -> str:
        """Return what to say of single groups, of which so many units stay; of channels there are too many."""
        return ""

    def _groups(self, model: ir.Model, ctx: Context) -> list[ChannelGroup]:
        """Return the groups that may shrink; the others are said to be left."""
        selection = select(model, self.include, self.exclude, where=f"pass `{self.name}`")
        found = find_channels(ctx, self.layout)
        chosen = [group for group in found.groups if _is_selected(group, selection)]
        if self.include:  # whoever names layers means them
            return chosen
        mixed = [group for group in chosen if group.mixers]
        chosen = [group for group in chosen if not group.mixers]
        streams = [group for group in chosen if not self._by_error(ctx) and is_stream(group)]
        chosen = [group for group in chosen if group not in streams] or streams
        _leave(mixed, "an operator such as a normalization mixes them", ctx)
        if chosen is not streams:
            _leave(streams, "they are the stream of a residual network, cut where errors say that it pays", ctx)
        return chosen

    def _by_error(self, ctx: Context) -> bool:
        asked = self.macs is not None or self.latency is not None
        return asked and self.allocate != "uniform" and ctx.data is not None

    def _widths(self, groups: Sequence[ChannelGroup], ctx: Context) -> Widths:
        """Return what is to stay of each group, and say what that comes to."""
        share = self.macs or self.latency
        if share is None:
            ratio = self.ratio or self.usual_ratio
            return widths_by_ratio(groups, ratio, self.multiple, ctx.target.width_multiple)
        plan = WidthPlan(groups, self.multiple, ctx)
        if self._by_error(ctx):
            plan.look(share)
        if self.macs is not None:
            widths = self._best(plan, groups, share, ctx) if self._by_error(ctx) else plan.at(share)
        else:
            widths, measured = widths_by_latency(plan, share, self.layout, ctx)
            ctx.note(
                f"a run takes {measured:.0%} of its time at {widths.macs:.1%} of the MACs, as timed here for a second: "
                "clocks are noisy, and another run may settle on other widths (`macs` always gives the same)",
                latency=measured,
            )
            widths = replace(widths, holds=measured <= share)
        if not widths.holds:
            what = "MACs" if self.macs is not None else "time"
            ctx.note(f"no more can be removed: {share:.0%} of the {what} cannot be reached", reached=False)
        return widths

    def _best(self, plan: WidthPlan, groups: Sequence[ChannelGroup], share: float, ctx: Context) -> Widths:
        """Return widths by error, with or without streams, or equal shares of the others, whichever loses least."""
        streams = [group for group in groups if is_stream(group)]
        inner = [group for group in groups if group not in streams]
        candidates = {"by error": plan.at(share)}
        if streams and inner:
            candidates["by error, streams whole"] = plan.at(share, whole=streams)
        if inner:
            candidates["evenly"] = WidthPlan(inner, self.multiple, ctx).at(share)
        # Gradients take too long to be measured for each division by itself.
        criterion = "obs" if self.criterion in (None, "taylor") else self.criterion
        return best_of(candidates, criterion, self.layout, ctx)


def _leave(groups: Sequence[ChannelGroup], reason: str, ctx: Context) -> None:
    if groups:
        ctx.left(f"groups of channels left: {len(groups)} (`{groups[0].name}`), as {reason}", left=len(groups))


def _is_selected(group: ChannelGroup, selection: Selection) -> bool:
    return all(selection.allows(layer.node) for layer in group.writers)


def _as_they_are_now(
    kept: Mapping[ChannelGroup, Array], ctx: Context, layout: Layout | None
) -> dict[ChannelGroup, Array]:
    """Return the choice for the groups of the model as it is now, in which layers have biases they had not before."""
    stays: dict[Axis, Array] = {}
    for group, units in kept.items():
        for axis, numbers in group.axes.items():
            own = stays.setdefault(axis, np.ones(len(numbers), bool))
            own &= np.append(units, True)[numbers]
    found = {}
    for group in channel_groups(ctx.model, layout).groups:
        axis = next(axis for axis in group.axes if axis in stays or walk.constant_tensor(axis.value) is None)
        if axis not in stays:
            continue
        units = np.ones(group.size, bool)
        numbers = group.axes[axis]
        units[numbers[(numbers >= 0) & ~stays[axis]]] = False
        if not units.all():
            found[group] = units
    return found


def _refuse_nan(groups: Sequence[ChannelGroup]) -> None:
    for value in dict.fromkeys(layer.weight for group in groups for layer in (*group.writers, *group.readers)):
        tensor = walk.constant_tensor(value)
        if tensor is not None:
            refuse_not_finite(tensor.numpy(), f"weight `{value.name}`")
