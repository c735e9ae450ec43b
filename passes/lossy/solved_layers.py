"""Layers of a model that lost something before them, solved anew for what they gave."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from graphopt.authoring import Context

from ..analyses.linear_layers import LinearLayer, linear_layers, readers_elsewhere
from ..analyses.second_moments import inputs_of
from ..solvers.blas_threads import threads_for
from .prune_aims import Aims


def solve_anew(layers: Sequence[LinearLayer], aims: Aims, ctx: Context) -> int:
    """Give layers the weights and biases that do best on what they read by now; return how many have such.

    Each is to give what it gave in the model as it was, and the last layer of a residual block what makes the sum
    what it was (He et al., Channel Pruning for Accelerating Very Deep Neural Networks, 2017).

    Args:
        layers: Layers of the model as it is now, in graph order.
        aims: Opened before anything was changed.
        ctx: Where edits are made, and what is left is said.
    """
    every, left, solved = linear_layers(ctx.model), Counter[str](), 0
    for layer in layers:
        reason = why_fixed(layer, every)
        with threads_for(inputs_of(layer)):
            aim = aims.of(layer) if reason is None else None
        stored = layer.from_matrix(aim.weight) if aim is not None else None
        if aim is None or stored is None or not np.isfinite(stored.astype(np.float32)).all():
            left[reason or "what they read cannot be looked at"] += 1
            continue
        with ctx.rewriter.edit("refit", layer.node):
            ctx.rewriter.set_weight(layer.weight, stored)
            if aim.bias is not None:
                aim.bias.shift(aim.shift(aim.weight), ctx)
        solved += 1
    for reason, count in left.items():
        ctx.left(f"layers whose weights make up for nothing: {count}, as {reason}", left=count)
    return solved


def why_fixed(layer: LinearLayer, every: Sequence[LinearLayer]) -> str | None:
    """Return why a layer's weight must stay as it is, or None.

    Args:
        layer: The layer.
        every: All layers of the model.
    """
    if layer.weight.is_graph_output():
        return "their weight is an output of the model"
    if readers_elsewhere(layer, every) or sum(one.weight is layer.weight for one in every) > 1:
        return "their weight is read elsewhere too"
    return None
