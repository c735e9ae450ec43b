"""SparseGPT: weights zeroed column by column, each loss made up for by the columns still to come."""

from __future__ import annotations

import numpy as np

from graphopt.backend import Array

from .gptq import upper_factor
from .sparsity import Constraint, NOfM

# Columns whose mask is chosen at once, as in the paper.
_COLUMNS = 128


def sweep(weight: Array, constraint: Constraint, second_moment: Array) -> Array:
    """Return Ŵ, which keeps what the constraint allows, found in one sweep over the columns.

    This is SparseGPT (Frantar and Alistarh, SparseGPT: Massive Language Models Can be Accurately Pruned in One-Shot,
    2023), written without an inverse of H, as `gptq` is: with H = R Rᵀ, a weight lost costs its square times Rⱼⱼ², once
    the columns after it have taken their share. Weights that were zero stay so.

    Args:
        weight: W, float32 [groups, outputs, inputs].
        constraint: Which weights may stay; it holds for all groups together within each run of columns.
        second_moment: H, float32 [groups, inputs, inputs], positive definite.
    """
    groups, outputs, inputs = weight.shape
    factors = np.stack([upper_factor(moment, 0.0) for moment in second_moment])
    ends = np.diagonal(factors, axis1=1, axis2=2)[:, :, None]
    feedback = factors / np.swapaxes(ends, 1, 2)
    wanted = np.ascontiguousarray(weight.transpose(0, 2, 1))  # by columns: what a step touches lies together
    left, found = wanted.copy(), np.zeros_like(wanted)
    width = max(_COLUMNS // constraint.step, 1) * constraint.step
    for start in range(0, inputs, width):
        end = min(start + width, inputs)
        kept = np.ones((groups, end - start, outputs), bool)
        if not isinstance(constraint, NOfM):
            kept = _kept(left[:, start:end], wanted[:, start:end], ends[:, start:end], constraint)
        errors = np.empty((groups, end - start, outputs), np.float32)
        for place, column in enumerate(range(start, end)):
            if isinstance(constraint, NOfM) and place % constraint.m == 0:
                part = slice(column, column + constraint.m)
                # What the columns before them left to make up for counts in the choice.
                now = left[:, part] + feedback[:, start:column, part].transpose(0, 2, 1) @ errors[:, :place]
                chosen = _kept(now, wanted[:, part], ends[:, part], constraint)
                kept[:, place : place + constraint.m] = chosen
            target = left[:, column] + (feedback[:, None, start:column, column] @ errors[:, :place])[:, 0]
            np.copyto(found[:, column], target, where=kept[:, place])
            np.subtract(wanted[:, column], found[:, column], out=errors[:, place])
        left[:, end:] += feedback[:, start:end, end:].transpose(0, 2, 1) @ errors
    return found.transpose(0, 2, 1)


def _kept(now: Array, wanted: Array, ends: Array, constraint: Constraint) -> Array:
    """Return which weights of some columns stay, bool [groups, columns, outputs]."""
    costs = np.where(wanted == 0, np.float32(0), np.square(now * ends))
    groups, columns, outputs = costs.shape
    rows = costs.transpose(0, 2, 1).reshape(groups * outputs, columns)
    kept = constraint.kept(rows).reshape(groups, outputs, columns).transpose(0, 2, 1)
    return np.asarray(kept & (wanted != 0))
