"""The channels a pass may remove, once what only seems to be shared is told apart."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import shapes
from graphopt.authoring import Context
from graphopt.rewriter import Rewriter

from ..analyses.channel_groups import Groups, Layout, channel_groups
from .separate_sizes import separate_sizes
from .separate_vectors import separate_vectors


def find_channels(ctx: Context, layout: Layout | None = None) -> Groups:
    """Return the channels of the model, after edits that tell apart equal biases and shapes of several layers.

    Where that would change nothing in what can go, it is not done: tried out on a copy first.

    Args:
        ctx: The model, and what changes it.
        layout: Which side is cut where an axis is two in one.
    """
    ctx.analyse(shapes.infer_shapes)
    found = channel_groups(ctx.model, layout)
    trial = ctx.model.clone()
    shapes.infer_shapes(trial)
    if not tell_apart(trial, Rewriter(trial)) or _outline(channel_groups(trial, layout)) == _outline(found):
        return found
    tell_apart(ctx.model, ctx.rewriter)
    return channel_groups(ctx.model, layout)


def _outline(found: Groups) -> list[tuple[str, int]]:
    """Return what tells whether groups were one only because of something shared."""
    return [(group.name, group.size) for group in found.groups]


def tell_apart(model: ir.Model, rewriter: Rewriter) -> int:
    """Give layers vectors and shapes of their own; return how many were made.

    Args:
        model: A model with inferred shapes.
        rewriter: What changes it.
    """
    return separate_sizes(model, rewriter) + separate_vectors(model, rewriter)
