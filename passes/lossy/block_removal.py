"""Residual blocks taken out of a model, and what is behind them solved anew."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.statistics import Moments

from ..analyses.linear_layers import linear_layers
from ..analyses.residual_blocks import ResidualBlock
from .prune_aims import Aims
from .solved_layers import solve_anew

_RULE = "remove block"


def mean_branches(blocks: Sequence[ResidualBlock], ctx: Context) -> dict[ResidualBlock, Array]:
    """Return what each branch adds on average, to be added to x: a number for each feature, over calibration data."""
    wanted = {block: Moments(_feature_axis(block)) for block in blocks}
    observed = ctx.statistics({block.output: statistic for block, statistic in wanted.items()})
    found = {}
    for block, statistic in wanted.items():
        mean = np.asarray(observed[block.output, statistic].mean, np.float64)
        dtype = (block.output.dtype or ir.DataType.FLOAT).numpy()
        found[block] = mean.reshape(-1, *[1] * (-block.feature_axis - 1)).astype(dtype)
    return found


def remove_blocks(blocks: Sequence[ResidualBlock], constants: Mapping[ResidualBlock, Array], ctx: Context) -> None:
    """Let each sum add a constant in place of its branch, and remove what computes only that.

    Sums keep their names, so that they can be compared with those of the model as it was.

    Args:
        blocks: Blocks of the model.
        constants: What to add; nothing where there is none.
        ctx: Where edits are made.
    """
    for block in blocks:
        constant = constants.get(block)
        if constant is None:
            constant = np.zeros(1, (block.output.dtype or ir.DataType.FLOAT).numpy())
        with ctx.rewriter.edit(_RULE, block.total, *block.layers):
            last = block.output.producer()
            value = ctx.rewriter.const(constant, f"{block.output.name}_mean", near=block.total)
            ctx.rewriter.set_input(block.total, block.branch, value)
            if last is not None:
                _sweep(last, ctx)


def refit_behind(blocks: Sequence[ResidualBlock], aims: Aims, ctx: Context) -> int:
    """Solve the layers behind the first of some removed blocks anew, by least squares; return how many that were.

    Args:
        blocks: The blocks, removed by now.
        aims: Opened before they were.
        ctx: Where edits are made.
    """
    behind = _nodes_behind([block.total for block in blocks], ctx.model)
    return solve_anew([layer for layer in linear_layers(ctx.model) if layer.node in behind], aims, ctx)


def drop_empty_sums(blocks: Sequence[ResidualBlock], ctx: Context) -> None:
    """Remove sums that add nothing to x."""
    for block in blocks:
        added = walk.constant_tensor(block.output)
        if added is None or added.numpy().any():
            continue
        with ctx.rewriter.edit(_RULE, block.total):
            ctx.rewriter.replace(block.total.outputs[0], block.skip)
            _sweep(block.total, ctx)


def _feature_axis(block: ResidualBlock) -> int:
    """Return the axis of the features, counted from the front."""
    dims = shapes.dims_of(block.output)
    assert dims is not None, "shapes of both terms are known to be the same"
    return len(dims) + block.feature_axis


def _nodes_behind(starts: Sequence[ir.Node], model: ir.Model) -> Collection[ir.Node]:
    """Return the nodes of the main graph that hang on what some nodes give."""
    found = set(starts)
    for node in model.graph:
        if any(value.producer() in found for value in walk.values_read(node)):
            found.add(node)
    return found


def _sweep(node: ir.Node, ctx: Context) -> None:
    """Erase a node if nothing reads it, and then whatever only it was computed from, constants included."""
    waiting = [node]
    while waiting:
        node = waiting.pop()
        if node.graph is None or walk.is_read(node):
            continue
        before = list(walk.values_read(node))
        ctx.rewriter.erase(node)
        for value in before:
            producer = value.producer()
            if producer is not None:
                waiting.append(producer)
            else:
                ctx.rewriter.remove_if_unread(value)
