"""Which of several divisions of the channels to be removed does best, tried as a whole on a few samples."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

import numpy as np
import onnx_ir as ir

from graphopt import shapes
from graphopt.authoring import Context
from graphopt.errors import BackendError

from ..analyses.channel_groups import Layout, channel_groups
from .channel_choice import Criterion
from .channel_sweep import ChannelSweep
from .channel_widths import Widths

# The most samples that weights are solved for in a trial, and the most others it is judged on.
_SAMPLES = 64


def best_of(candidates: Mapping[str, Widths], criterion: Criterion, layout: Layout | None, ctx: Context) -> Widths:
    """Return the widths with which the outputs of the model lose least, and say what each lost.

    Errors of groups are added up as if one did not know of the others, which is far from true where a stream and what
    writes it both shrink: so what they come to is measured, beside the same share of every group.

    Args:
        candidates: Widths of groups of the model as it is, by what reports call them; of equals, the first.
        criterion: How units are chosen.
        layout: Which side is cut where an axis is two in one.
        ctx: The model, not changed, and the data.
    """
    ways: dict[str, Widths] = {}
    for name, widths in candidates.items():
        if widths.holds and all(_narrowed(widths) != _narrowed(other) for other in ways.values()):
            ways[name] = widths
    ways = ways or dict(candidates)
    first = next(iter(ways.values()))
    if len(ways) < 2 or ctx.judge is None or ctx.data is None:
        return first
    # What is solved for some samples is judged by others, or few samples would flatter what fits them best.
    rest, judged = ctx.data.split(ctx.seed) if len(ctx.data) > 1 else (ctx.data, ctx.data)
    few, losses = replace(ctx, data=rest.sample(_SAMPLES, ctx.seed)), {}
    with ctx.judge(ctx.model.clone(), judged.sample(_SAMPLES, ctx.seed)) as judge:
        for name, widths in ways.items():
            attempt = few.attempt(partial(_try, _narrowed(widths), criterion, layout))
            try:
                losses[name] = judge(attempt.model).divergence
            except BackendError:
                losses[name] = np.inf
    best = min(losses, key=lambda name: losses[name])
    told = ", ".join(f"{loss:.3g} {name}" for name, loss in losses.items())
    ctx.note(f"channels divided {best}: by trial the outputs lose {told}", divided=best, losses=losses)
    return ways[best]


def _narrowed(widths: Widths) -> dict[str, int]:
    """Return the widths of the groups that shrink, by name."""
    return {group.name: width for group, width in widths.of.items() if width < group.size}


def _try(widths: Mapping[str, int], criterion: Criterion, layout: Layout | None, model: ir.Model, ctx: Context) -> None:
    """Choose units of groups, by name, and let nothing read them; the shapes stay."""
    shapes.infer_shapes(model)
    groups = {group.name: group for group in channel_groups(model, layout).groups}
    ChannelSweep(ctx, {groups[name]: width for name, width in widths.items() if name in groups}, criterion).run()
