"""The grid solver: the integer codes and scales nearest to a weight."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

FULL_RANGE_BITS = 8
# One bit less where a kernel sums pairs of 8-bit products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 does not.
REDUCED_RANGE_BITS = 7
# Below the smallest normal float32 a scale loses its precision, or runtimes flush it to zero.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class GridWeight:
    """A weight on a symmetric integer grid; Ŵ = codes * scales, and zero is always on the grid.

    Attributes:
        codes: int8, [outputs, inputs].
        scales: float32, [outputs], or [1] where all outputs share one.
        error: Predicted output error tr((W−Ŵ) H (W−Ŵ)ᵀ); H = I here, so the sum of squared differences.
        raised: How many channels took a larger scale than their weights ask for, because of ``least_scales``.
    """

    codes: Array
    scales: Array
    error: float
    raised: int


def round_to_nearest(
    weight: Array, *, per_channel: bool, bits: int = FULL_RANGE_BITS, least_scales: Array | None = None
) -> GridWeight:
    """Round each weight to the nearest point of a grid that spans its channel's largest magnitude.

    The grid is symmetric and leaves out the lowest code, so that W and −W are treated alike (Jacob et al.,
    Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference, 2018).

    Args:
        weight: [outputs, inputs], finite floats.
        per_channel: Whether each output has a scale of its own.
        bits: Bits of a code; codes lie within ±(2**(bits - 1) − 1).
        least_scales: float32 [outputs]; no channel's scale may be smaller. A channel that is zero throughout
            takes this scale, or 1 where it is zero too.
    """
    matrix = weight.astype(np.float32, copy=False)
    top = 2 ** (bits - 1) - 1
    least = np.zeros(len(matrix), np.float32) if least_scales is None else least_scales
    magnitude = np.abs(matrix).max(axis=1, initial=0.0)
    if not per_channel:
        magnitude, least = magnitude.max(initial=0.0, keepdims=True), least.max(initial=0.0, keepdims=True)
    wanted = (magnitude / np.float32(top)).astype(np.float32)
    scales = np.maximum(np.maximum(wanted, least), np.float32(SMALLEST_SCALE))
    scales[(magnitude == 0) & (least == 0)] = 1.0
    codes = np.clip(np.rint(matrix / scales[:, None]), -top, top).astype(np.int8)
    difference = matrix - codes * scales[:, None]
    raised = np.count_nonzero((least > wanted) & (magnitude > 0))
    return GridWeight(codes, scales, float(np.square(difference, dtype=np.float64).sum()), int(raised))
