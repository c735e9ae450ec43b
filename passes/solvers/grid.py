"""Grids of integers a weight may be put on, and the simplest solver: rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .nearest_blocks import nearest_in_blocks
from .objective import output_error
from .rows import by_rows

FULL_RANGE_BITS = 8
# One bit less where a kernel sums pairs of 8-bit products in 16 bits: 2 * 255 * 63 fits, 2 * 255 * 127 does not.
REDUCED_RANGE_BITS = 7
# Bias codes keep to half of int32, so that adding them to the sum of products cannot overflow.
LARGEST_BIAS_CODE = 2**30
# Below the smallest normal float32 a scale loses its precision, or runtimes flush it to zero.
SMALLEST_SCALE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class Grid:
    """The values a weight may take: Ŵ = (codes − zero points) · scales.

    Attributes:
        bits: Bits of a code, 2 to 8.
        symmetric: Whether every zero point is the middle code. Codes are then signed and the zero point is not stored;
            else they are unsigned.
        block: Consecutive inputs that share a scale; None for all inputs of an output.
        narrow: Whether a symmetric grid leaves out its lowest code, so that W and −W are treated alike and kernels
            need not mind the one product that overflows.
        mirrored: Whether scales may be negative. The extreme of a block then falls on the lowest code of a symmetric
            grid that has it, whichever its sign.
        tensor: Whether all outputs share one scale; ``block`` is None then.
    """

    bits: int = FULL_RANGE_BITS
    symmetric: bool = True
    block: int | None = None
    narrow: bool = True
    mirrored: bool = False
    tensor: bool = False

    @property
    def lowest(self) -> int:
        """The lowest code."""
        return int(self.narrow) - (1 << self.bits - 1) if self.symmetric else 0

    @property
    def highest(self) -> int:
        """The highest code."""
        return (1 << self.bits - self.symmetric) - 1

    @property
    def dtype(self) -> type[np.int8] | type[np.uint8]:
        """The type codes are held in."""
        return np.int8 if self.symmetric else np.uint8

    def blocks(self, inputs: int) -> int:
        """Return how many scales each output has; the last block may be short."""
        return 1 if self.block is None else -(-inputs // self.block)

    def spread(self, per_block: Array, inputs: int) -> Array:
        """Return one number for each input from one for each block, [..., blocks] to [..., inputs or 1]."""
        if self.block is None:
            return per_block
        return np.repeat(per_block, self.block, axis=-1)[..., :inputs]

    def encode(self, matrix: Array, scales: Array, zero_points: Array | None = None) -> Array:
        """Return the nearest codes, [outputs, inputs], for scales and zero points [outputs or 1, blocks]."""
        return self._nearest(matrix, scales, zero_points)[1]

    def decode(self, codes: Array, scales: Array, zero_points: Array | None = None) -> Array:
        """Return Ŵ, float32 [outputs, inputs]."""
        inputs = codes.shape[-1]
        values = codes.astype(np.float32)
        if zero_points is not None:
            values -= self.spread(zero_points, inputs)
        values *= self.spread(scales, inputs)
        return values

    def round(self, matrix: Array, scales: Array, zero_points: Array | None = None) -> tuple[Array, Array]:
        """Return the nearest codes and Ŵ − W, [outputs, inputs] each, with few temporaries."""
        levels, codes = self._nearest(matrix, scales, zero_points)
        if zero_points is not None:
            levels -= zero_points[..., None]
        levels *= scales[..., None]
        levels -= blocked(matrix, self)
        return codes, levels.reshape(len(matrix), -1)[:, : matrix.shape[1]]

    def _nearest(self, matrix: Array, scales: Array, zero_points: Array | None) -> tuple[Array, Array]:
        """Return the nearest codes as floats [outputs, blocks, block], and as codes [outputs, inputs]."""
        levels = np.divide(blocked(matrix, self), scales[..., None])
        if zero_points is not None:
            levels += zero_points[..., None]
        np.rint(levels, out=levels)
        np.maximum(levels, np.float32(self.lowest), out=levels)
        np.minimum(levels, np.float32(self.highest), out=levels)
        codes = levels.astype(self.dtype, order="C").reshape(len(matrix), -1)
        return levels, codes[:, : matrix.shape[1]]


# A scale for each output, symmetric: what integer kernels compute on.
INT8 = Grid()


@dataclass(frozen=True)
class GridWeight:
    """A weight on a grid.

    Attributes:
        grid: The grid.
        codes: int8 or uint8, [outputs, inputs].
        scales: float32, [outputs, blocks], or [1, 1] where all outputs share one.
        zero_points: uint8, shaped like the scales, or None on a symmetric grid.
        error: Predicted output error tr((W−Ŵ) H (W−Ŵ)ᵀ); where no H was given, the sum of squared differences.
        raised: How many scales are larger than their weights ask for, because a least scale was given.
    """

    grid: Grid
    codes: Array
    scales: Array
    zero_points: Array | None
    error: float
    raised: int = 0

    def values(self) -> Array:
        """Return Ŵ, float32 [outputs, inputs]."""
        return self.grid.decode(self.codes, self.scales, self.zero_points)


def round_to_nearest(
    weight: Array, grid: Grid = INT8, *, second_moment: Array | None = None, least_scales: Array | None = None
) -> GridWeight:
    """Round each weight to the nearest point of a grid that spans all weights of its block.

    A symmetric grid reaches the largest magnitude (Jacob et al., Quantization and Training of Neural Networks for
    Efficient Integer-Arithmetic-Only Inference, 2018), any other the extremes and zero.

    Args:
        weight: [outputs, inputs], finite floats.
        grid: The grid.
        second_moment: H as `output_error` takes it; only the error that is predicted depends on it.
        least_scales: float32 [outputs], for a grid without blocks; no scale may be smaller. An output that is zero
            throughout takes this scale, or 1 where it is zero too.
    """
    matrix = weight.astype(np.float32, copy=False)
    whole = grid.block is not None and matrix.size > 0 and matrix.shape[1] % grid.block == 0
    if whole and second_moment is None and (matrix.flags.c_contiguous or matrix.flags.f_contiguous):
        codes, scales, zero_points, error = nearest_in_blocks(matrix, grid, reaching)
        stored = None if zero_points is None else zero_points.astype(np.uint8)
        return GridWeight(grid, codes, scales, stored, error)
    scales, zero_points = spanning(matrix, grid)
    scales, raised = raised_to(matrix, scales, least_scales)
    return finish(matrix, grid, scales, zero_points, second_moment, raised)


def finish(
    matrix: Array,
    grid: Grid,
    scales: Array,
    zero_points: Array | None,
    second_moment: Array | None,
    raised: int = 0,
) -> GridWeight:
    """Return the nearest codes for scales and zero points that are settled, and the error they make."""
    parts = by_rows(_encoded, matrix, scales, zero_points, grid=grid, keep=second_moment is not None)
    codes = np.concatenate([part[0] for part in parts]) if len(parts) > 1 else parts[0][0]
    if second_moment is None:
        error = float(sum(part[1] for part in parts))
    else:
        error = output_error(np.concatenate([part[2] for part in parts]), second_moment)
    stored = None if zero_points is None else zero_points.astype(np.uint8)
    return GridWeight(grid, codes, scales, stored, error, raised)


def _encoded(
    matrix: Array, scales: Array, zero_points: Array | None, *, grid: Grid, keep: bool
) -> tuple[Array, float, Array | None]:
    with np.errstate(invalid="ignore", over="ignore"):  # NaN and infinity make the error what they are
        codes, difference = grid.round(matrix, scales, zero_points)
    return codes, output_error(difference), difference if keep else None


def spanning(matrix: Array, grid: Grid) -> tuple[Array, Array | None]:
    """Return the scales, and zero points if the grid has any, that reach the extremes of each block.

    Returns:
        float32 [outputs or 1, blocks] each; zero points hold whole numbers.
    """
    parts = by_rows(_spanning, matrix, grid=grid)
    low, high = (np.concatenate([part[side] for part in parts]) for side in (0, 1))
    if grid.tensor:
        low, high = low.min(initial=0.0, keepdims=True), high.max(initial=0.0, keepdims=True)
    return reaching(low, high, grid)


def _spanning(matrix: Array, *, grid: Grid) -> tuple[Array, Array]:
    cut = blocked(matrix, grid)
    return cut.min(axis=-1, initial=0.0), cut.max(axis=-1, initial=0.0)


def reaching(low: Array, high: Array, grid: Grid) -> tuple[Array, Array | None]:
    """Return scales and zero points of a grid that reaches from low to high, zero within."""
    if not grid.symmetric:
        scales = positive((high - low) / np.float32(grid.highest))
        return scales, np.clip(np.rint(-low / scales), 0, grid.highest).astype(np.float32)
    if not grid.mirrored:
        return positive(np.maximum(low / np.float32(grid.lowest), high / np.float32(grid.highest))), None
    extreme = np.where(-low >= high, low, high)
    scales = positive(np.abs(extreme) / np.float32(-grid.lowest))
    return np.where(extreme > 0, -scales, scales), None


def positive(scales: Array) -> Array:
    """Return float32 scales that can be divided by: 1 for none, and none below the smallest normal number."""
    return np.where(scales > 0, np.maximum(scales, np.float32(SMALLEST_SCALE)), np.float32(1.0)).astype(np.float32)


def blocked(matrix: Array, grid: Grid) -> Array:
    """Return a matrix as [outputs, blocks, block]; a short last block is filled with zeros."""
    outputs, inputs = matrix.shape
    if grid.block is None:
        return matrix.reshape(outputs, 1, inputs)
    missing = -inputs % grid.block
    filled = np.pad(matrix, ((0, 0), (0, missing))) if missing else matrix
    return filled.reshape(outputs, -1, grid.block)


def raised_to(matrix: Array, scales: Array, least_scales: Array | None) -> tuple[Array, int]:
    """Return scales no smaller than the least ones, and how many that raised."""
    if least_scales is None:
        return scales, 0
    least = least_scales.max(initial=0.0, keepdims=True) if len(scales) == 1 else least_scales
    nonzero = matrix.any(axis=1) if len(scales) > 1 else np.array([matrix.any()])
    wanted = np.where(nonzero, scales[:, 0], 0.0)
    found = np.where((wanted == 0) & (least == 0), 1.0, np.maximum(np.maximum(wanted, least), SMALLEST_SCALE))
    return found.astype(np.float32)[:, None], int(np.count_nonzero((least > wanted) & nonzero))
