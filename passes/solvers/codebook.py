"""Codebooks: weights told as entries of a small table of values, times a scale for each block."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array

from .gptq import inverse_factor
from .objective import DAMPING, by_group, importance, output_error
from .rows import by_rows

# The quantiles of a normal distribution, its extremes and zero (Dettmers et al., QLoRA: Efficient Finetuning of
# Quantized LLMs, 2023, appendix E), by code.
NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
# Floats of one sign bit, two bits of exponent and one of mantissa, by code, as bitsandbytes and ONNX Runtime have them.
_FP4_HALF = (0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25)
FP4 = (*_FP4_HALF, *(-value for value in _FP4_HALF))

# Shares of the largest magnitude of a block that are tried as its reach: a few clipped weights may pay for the rest.
_REACHES = tuple(np.linspace(0.6, 1.0, 11).tolist())


@dataclass(frozen=True)
class Codebook:
    """The values a weight may take, up to a scale.

    Attributes:
        values: By code; no magnitude above 1, and 1 is one.
        in_logarithms: Whether nearest means nearest in the logarithm, instead of in value.
    """

    values: tuple[float, ...]
    in_logarithms: bool = False

    def table(self) -> Array:
        """Return the values by code, float32."""
        return np.array(self.values, np.float32)

    def encode(self, normal: Array) -> Array:
        """Return the codes nearest to numbers between −1 and 1; what lies beyond takes the extreme ones."""
        order, borders = _borders(self)
        return order[np.searchsorted(borders, normal)]

    def decode(self, codes: Array, scales: Array, block: int) -> Array:
        """Return Ŵ, float32 [outputs, inputs], of scales [outputs, blocks]."""
        values = self.table()[codes]
        values *= spread(scales, block, codes.shape[1])
        return values


@functools.lru_cache(maxsize=64)
def _borders(book: Codebook) -> tuple[Array, Array]:
    """Return the codes in order of their values, and the numbers between which each is the nearest."""
    table = np.array(book.values, np.float64)
    order = np.argsort(table, kind="stable")
    low, high = table[order][:-1], table[order][1:]
    borders = (low + high) / 2
    if book.in_logarithms:
        between = np.sign(low + high) * np.sqrt(np.abs(low * high))
        # What is nearer to 0 than to any power, in the eyes of a logarithm, is below half a step under the smallest.
        borders = np.where(low * high > 0, between, (low + high) / np.sqrt(2))
    return order.astype(np.uint8), borders.astype(np.float32)


def spread(per_block: Array, block: int, inputs: int) -> Array:
    """Return one number for each input from one for each block."""
    return np.repeat(per_block, block, axis=-1)[..., :inputs]


def powers_of_two(bits: int, terms: int) -> tuple[float, ...]:
    """Return signed powers of two, or sums of two of them, and zero, as many as a code has room for.

    One term: ±2⁻ⁱ, largest first, as many as fit (Miyashita et al., Convolutional Neural Networks using Logarithmic
    Data Representation, 2016). Two: sums of an even and an odd power, either of which may be missing (Li et al.,
    Additive Powers-of-Two Quantization, 2020). Scaled to a largest of 1; codes of negative values have the top bit.

    Args:
        bits: Bits of a code, sign included.
        terms: 1 or 2.
    """
    count = 2 ** (bits - 1)
    if terms == 1:
        magnitudes = [0.0, *(2.0**-i for i in range(count - 1))]
    else:
        even, odd = 2 ** ((bits - 1 + 1) // 2), 2 ** ((bits - 1) // 2)
        first = [0.0, *(4.0**-i for i in range(even - 1))]
        second = [0.0, *(4.0**-i / 2 for i in range(odd - 1))]
        largest = max(first) + max(second)
        magnitudes = sorted({(a + b) / largest for a in first for b in second})
    return (*magnitudes, *(-value for value in magnitudes))


@dataclass(frozen=True)
class CodebookWeight:
    """A weight told by a codebook; Ŵ = values[codes] · scales.

    Attributes:
        book: The codebook.
        block: Consecutive inputs of an output that share a scale.
        codes: uint8, [outputs, inputs].
        scales: float32, [outputs, blocks].
        error: Predicted output error tr((W−Ŵ) H (W−Ŵ)ᵀ); where no H was given, the sum of squared differences.
    """

    book: Codebook
    block: int
    codes: Array
    scales: Array
    error: float

    def values(self) -> Array:
        """Return Ŵ, float32 [outputs, inputs]."""
        return self.book.decode(self.codes, self.scales, self.block)


def nearest(
    weight: Array, book: Codebook, block: int, *, search: bool = False, second_moment: Array | None = None
) -> CodebookWeight:
    """Give each weight the nearest entry.

    Args:
        weight: [outputs, inputs], finite floats.
        book: The codebook.
        block: Consecutive inputs of an output that share a scale; the last block may be short.
        search: Whether scales are searched that lose least, input by input weighed by E[x²]; else they reach to the
            largest magnitude of each block.
        second_moment: H as `output_error` takes it.
    """
    matrix = weight.astype(np.float32, copy=False)
    scales = reach(matrix, block)
    if search:
        weights = importance(second_moment, len(matrix))
        weights = np.ones((1, matrix.shape[1]), np.float32) if weights is None else weights
        scales = np.concatenate(by_rows(_searched, matrix, scales, weights, book=book, block=block))
    codes = np.concatenate(by_rows(_encoded, matrix, scales, book=book, block=block))
    error = output_error(matrix - book.decode(codes, scales, block), second_moment)
    return CodebookWeight(book, block, codes, scales, error)


def reach(matrix: Array, block: int) -> Array:
    """Return the largest magnitude of each block, float32 [outputs, blocks]; 1 where there is none."""
    largest = np.abs(_blocked(matrix, block)).max(axis=-1, initial=0.0)
    return np.where(largest > np.finfo(np.float32).tiny, largest, np.float32(1.0)).astype(np.float32)


def _blocked(matrix: Array, block: int) -> Array:
    """Return a matrix as [outputs, blocks, block]; a short last block is filled with zeros."""
    outputs, inputs = matrix.shape
    missing = -inputs % block
    filled = np.pad(matrix, ((0, 0), (0, missing))) if missing else matrix
    return filled.reshape(outputs, -1, block)


def _encoded(matrix: Array, scales: Array, *, book: Codebook, block: int) -> Array:
    return book.encode(matrix / spread(scales, block, matrix.shape[1]))


def _searched(matrix: Array, scales: Array, weights: Array, *, book: Codebook, block: int) -> Array:
    """Return the scale of each block, of those tried, that loses least."""
    best, least = scales, np.full(scales.shape, np.inf, np.float32)
    for share in _REACHES:
        tried = scales * np.float32(share)
        codes = _encoded(matrix, tried, book=book, block=block)
        lost = np.square(matrix - book.decode(codes, tried, block)) * weights
        error = _blocked(lost, block).sum(axis=-1)
        better = error < least
        best, least = np.where(better, tried, best), np.where(better, error, least)
    return best.astype(np.float32)


def compensated(weight: Array, book: Codebook, block: int, second_moment: Array) -> CodebookWeight:
    """Give entries column by column, each column making up for the errors of those before it.

    GPTQ (Frantar et al., 2023) with a codebook in place of a grid: scales are searched first, and columns go in order
    of E[x²], largest first. Never worse, by the predicted error, than the nearest entries with the same scales.

    Args:
        weight: [outputs, inputs], finite floats.
        book: The codebook.
        block: Consecutive inputs of an output that share a scale.
        second_moment: H = E[x xᵀ], [inputs, inputs] or [groups, inputs, inputs].
    """
    plain = nearest(weight, book, block, search=True, second_moment=second_moment)
    matrix = weight.astype(np.float32, copy=False)
    grouped = by_group(matrix, second_moment)
    moments = second_moment.reshape(len(grouped), *second_moment.shape[-2:])
    scales = spread(plain.scales, block, matrix.shape[1]).reshape(grouped.shape)
    swept = [_sweep(rows, own, moment, book) for rows, own, moment in zip(grouped, scales, moments, strict=True)]
    codes = np.concatenate(swept)
    error = output_error(matrix - book.decode(codes, plain.scales, block), second_moment)
    if error > plain.error:  # where H is all noise, nothing makes up for the last errors
        return plain
    return CodebookWeight(book, block, codes, plain.scales, error)


def _sweep(rows: Array, scales: Array, second_moment: Array, book: Codebook) -> Array:
    """Return the codes of rows [outputs, inputs], with a scale for each weight."""
    order = np.argsort(-np.diagonal(second_moment), kind="stable")
    factor = inverse_factor(second_moment[np.ix_(order, order)], DAMPING)
    left = np.ascontiguousarray(rows.T[order])
    steps = np.ascontiguousarray(scales.T[order])
    codes = np.empty(left.shape, np.uint8)
    table = book.table()
    for column in range(len(left)):
        codes[order[column]] = found = book.encode(left[column] / steps[column])
        error = (left[column] - table[found] * steps[column]) / factor[column, column]
        left[column + 1 :] -= factor[column, column + 1 :, None] * error
    return codes.T
