"""The widest groups of channels with which a model is as fast as asked for, by the clock."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from graphopt import latency
from graphopt.authoring import Context
from graphopt.backend import Array, is_timed
from graphopt.errors import PassError
from graphopt.generated import generated_feeds

from ..analyses.channel_groups import Layout, channel_groups
from .channel_choice import kept_units
from .channel_widths import WidthPlan, Widths
from .shrinking import shrink

# Shares of the MACs tried; the last two lie a fiftieth apart.
_TRIES = 6
# Seconds each is timed for, in turn with the model as it is.
_SECONDS = 1.0
_LEAST_RUNS = 20


def refuse_untimed(name: str, ctx: Context) -> None:
    """Refuse runtimes whose time means nothing.

    Raises:
        PassError: This is one.
    """
    if not is_timed(ctx.backend):
        raise PassError(
            f"pass `{name}`: `latency` cannot be measured with the backend `{ctx.backend.name}`: its time says nothing",
            hint="`--backend onnxruntime`, or a share of the multiplications, such as `macs=0.7`",
        )


def widths_by_latency(plan: WidthPlan, share: float, layout: Layout | None, ctx: Context) -> tuple[Widths, float]:
    """Return widths with which a run takes no more than a share of its time, and what it took.

    What a channel costs a runtime is not what it costs on paper: so shares of the MACs are halved in on, each tried on
    a copy that is as wide, whichever channels it holds.

    Args:
        plan: Gives widths for shares of the MACs.
        share: The share of the time of a run to be left.
        layout: Which side is cut where an axis is two in one.
        ctx: The model, what runs it, and data.
    """
    low, high = 0.0, 1.0
    fastest: tuple[Widths, float] | None = None
    found: tuple[Widths, float] | None = None
    # To begin with, as if time went by MACs.
    middle = share
    for _ in range(_TRIES):
        widths = plan.at(middle)
        measured = _share_of_time(widths, layout, ctx)
        if fastest is None or measured < fastest[1]:
            fastest = widths, measured
        if measured <= share:
            low, found = middle, (widths, measured)
        else:
            high = middle
        middle = (low + high) / 2
    assert fastest is not None, "something was tried"
    return found or fastest


def _share_of_time(widths: Widths, layout: Layout | None, ctx: Context) -> float:
    by_name = {group.name: width for group, width in widths.of.items() if width < group.size}
    if not by_name:
        return 1.0

    def make(model: ir.Model, own: Context) -> None:
        groups = channel_groups(model, layout).groups
        narrow = {group: by_name[group.name] for group in groups if group.name in by_name}
        shrink(own, {group: kept_units(group.size, range(group.size), width) for group, width in narrow.items()})

    feeds = _feeds(ctx)
    with (
        ctx.backend.open(ctx.model, threads=ctx.threads) as before,
        ctx.backend.open(ctx.attempt(make).model, threads=ctx.threads) as after,
    ):
        return latency.measure([before, after], [feeds, feeds], seconds=_SECONDS, min_runs=_LEAST_RUNS)[1].ratio


def _feeds(ctx: Context) -> Mapping[str, Array]:
    """Return one sample."""
    if ctx.data is not None:
        return next(iter(ctx.data.take(1).batches(1))).feeds
    return generated_feeds(ctx.model, ctx.seed, sets=1, batch=1)[0]
