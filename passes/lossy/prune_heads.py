"""Pruning of attention heads: whole ones, with their queries, keys and values, which leaves a smaller dense model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.options import opt

from ..analyses.channel_groups import ChannelGroup, Layout, Side
from ..analyses.selection import Selection, select
from .prune_channels import PruneChannels
from .removable_channels import find_channels

# What makes a probability of each score, by head.
_ATTENDING = frozenset({"Attention", "GroupQueryAttention", "MultiHeadAttention", "Softmax"})


@dataclass(frozen=True)
class PruneHeads(PruneChannels):
    """Remove the attention heads whose loss costs the outputs least, and solve the kept weights anew from data.

    Where several heads of queries share one of keys and values, they go together.
    """

    ratio: float | None = opt(None, help="share of each layer's heads to remove; 0.2 where nothing is asked for")
    multiple: int = opt(1, help="how many heads a layer keeps is a multiple of this", low=1)
    include: tuple[str, ...] = opt((), help="only attention with a layer whose name or operator matches a glob; all")
    exclude: tuple[str, ...] = opt((), help="no attention with a layer whose name or operator matches a glob")

    name = "prune-heads"
    units: ClassVar[str] = "attention heads"
    layout: ClassVar[Layout | None] = Layout(splits=Side.MAJOR)
    usual_ratio: ClassVar[float] = 0.2

    def listed(self, cut: Mapping[ChannelGroup, int]) -> str:
        """Return how many heads stay of each layer that loses any."""
        counts = [f"`{group.name}` {width} of {group.size}" for group, width in cut.items()]
        return f" (left: {', '.join(counts)})"

    def _groups(self, model: ir.Model, ctx: Context) -> list[ChannelGroup]:
        """Return the heads of each attention that may lose any."""
        selection = select(model, self.include, self.exclude, where=f"pass `{self.name}`")
        asked, barred = Selection(include=selection.include), Selection(exclude=selection.exclude)
        chosen = []
        for group in find_channels(ctx, self.layout).groups:
            nodes = [layer.node for layer in (*group.writers, *group.readers)]
            if are_heads(group) and any(map(asked.allows, nodes)) and all(map(barred.allows, nodes)):
                chosen.append(group)
        return chosen


def are_heads(group: ChannelGroup) -> bool:
    """Return whether units are attention heads: each makes probabilities of scores of its own."""
    values = {axis.value for axis in group.axes if walk.constant_tensor(axis.value) is None}
    attending = {use.node for value in values for use in value.uses() if use.node.op_type in _ATTENDING}
    return bool(attending) and attending.isdisjoint(group.mixers)
