"""Padding: positions of a sequence that only fill it up, and that nothing is to be learnt from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.backend import Array

from .linear_layers import LinearLayer


def real_rows(layer: LinearLayer, x: Array, masks: Sequence[Array]) -> Array | None:
    """Return which rows of what a layer reads are real, bool [samples × positions]; None where all are, or none knows.

    In a batch of sentences most positions may be padding, which outputs do not hang on: second moments would be those
    of padding.

    Args:
        layer: A layer.
        x: What it reads, samples first: [samples, positions, inputs], or [samples × positions, inputs].
        masks: What the model's mask holds for these samples, [samples, positions]; empty where it has none.
    """
    if not masks or layer.node.op_type not in ("MatMul", "Gemm") or layer.weight_index != 1:
        return None
    (mask,) = masks
    if x.shape[:-1] not in (mask.shape, (mask.size,)):
        return None
    real = mask.reshape(-1) != 0
    return None if real.all() or not real.any() else np.asarray(real)


def only(rows: Array | None, values: Array) -> Array:
    """Return values [samples × positions, ...] of real rows alone; all of them, as they are, where rows is None."""
    if rows is None:
        return values
    return np.asarray(values.reshape(len(rows), -1)[rows])
