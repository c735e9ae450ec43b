"""Which residual blocks to remove: by what the outputs lose, measured, or by how far each turns what it reads."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.errors import BackendError

from ..analyses.residual_blocks import ResidualBlock, residual_blocks
from .block_removal import remove_blocks

# Samples each removal is tried on; all on the same ones.
_SAMPLES = 32
# Whether more has to go, of the blocks chosen so far.
Wanting = Callable[[Sequence[int]], bool]


def choose_measured(
    blocks: Sequence[ResidualBlock],
    constants: Mapping[ResidualBlock, Array],
    gains: Sequence[float],
    wants_more: Wanting,
    ctx: Context,
) -> tuple[list[int], float, int]:
    """Return the blocks without which the outputs move least, one after the other.

    A block costs by how much the divergence of the outputs grows (`graphopt.standing.Standing`), for what it gains.
    That grows as others go; so at each step the block that was cheapest when it was last tried is tried again, until
    one still is (Minoux, Accelerated greedy algorithms, 1978).

    Args:
        blocks: The blocks.
        constants: What is added in place of their branches.
        gains: What removing each saves, larger than 0.
        wants_more: Whether to go on.
        ctx: The model as it is, and what judges; nothing is changed.

    Returns:
        Indices of blocks, first the first one to go; the divergence without them; and how many models were tried.
    """
    assert ctx.judge is not None, "whoever asks has a judge"
    assert ctx.data is not None, "whoever asks has samples"
    chosen: list[int] = []
    reached, tried = 0.0, 0
    costs, totals, known_at = np.full(len(blocks), -np.inf), np.zeros(len(blocks)), np.full(len(blocks), -1)
    most = float(np.finfo(np.float64).max)
    with ctx.judge(ctx.model.clone(), ctx.data.sample(_SAMPLES, ctx.seed)) as judge:
        while wants_more(chosen):
            while True:
                best = int(np.argmin([np.inf if i in chosen else cost for i, cost in enumerate(costs)]))
                if known_at[best] == len(chosen):
                    break
                attempt = ctx.attempt(_without([*chosen, best], blocks, constants, ctx.model))
                tried += 1
                try:
                    totals[best] = min(judge(attempt.model).divergence, most)
                except BackendError:
                    totals[best] = most
                # Below nothing, a block does harm; of such, the one that does most goes first, whatever it gains.
                added = totals[best] - reached
                costs[best] = min(added / gains[best], most) if added > 0 else added
                known_at[best] = len(chosen)
            chosen.append(best)
            reached = float(totals[best])
    return chosen, reached, tried


def choose_by_influence(
    blocks: Sequence[ResidualBlock], gains: Sequence[float], wants_more: Wanting, ctx: Context
) -> tuple[list[int], list[float]]:
    """Return the blocks that turn what they read least, and the influence of every block.

    The influence is 1 − cos(x, x + f(x)), a mean over positions (Men et al., ShortGPT, 2024).

    Args:
        blocks: The blocks.
        gains: What removing each saves, larger than 0.
        wants_more: Whether to go on.
        ctx: The model as it is, and its calibration data.
    """
    influences = []
    with ctx.walkthrough() as walkthrough:
        for block in ctx.track(blocks, "measuring blocks", "blocks"):
            turned, count = 0.0, 0
            for x, total in walkthrough.batches(block.skip, block.total.outputs[0]):
                cosines = _cosines(x, total, block.feature_axis)
                turned, count = turned + float((1 - cosines).sum()), count + cosines.size
            influences.append(turned / max(count, 1))
    order = np.argsort(np.asarray(influences) / np.asarray(gains), kind="stable")
    chosen: list[int] = []
    for index in order:
        if not wants_more(chosen):
            break
        chosen.append(int(index))
    return chosen, influences


def _without(
    indices: Sequence[int],
    blocks: Sequence[ResidualBlock],
    constants: Mapping[ResidualBlock, Array],
    original: ir.Model,
) -> Callable[[ir.Model, Context], None]:
    """Return what removes blocks from a copy of the model, where they are in the same places."""
    places = {node: place for place, node in enumerate(original.graph)}
    gone = {places[blocks[index].total]: constants.get(blocks[index]) for index in indices}

    def remove(model: ir.Model, ctx: Context) -> None:
        totals = {node: place for place, node in enumerate(model.graph) if place in gone}
        own = {block: gone[totals[block.total]] for block in residual_blocks(model) if block.total in totals}
        remove_blocks(list(own), {block: one for block, one in own.items() if one is not None}, ctx)

    return remove


def _cosines(x: Array, y: Array, axis: int) -> Array:
    """Return the cosines of the angles between vectors along an axis; 1 where one of them is zero."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    lengths = np.sqrt(np.square(x).sum(axis=axis) * np.square(y).sum(axis=axis))
    return np.asarray(np.where(lengths > 0, (x * y).sum(axis=axis) / np.where(lengths > 0, lengths, 1.0), 1.0))
