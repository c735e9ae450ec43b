"""A weight as codes of tables, whoever found them: what is stored, in which order, and what that takes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from ..solvers.clustered_weight import ClusteredWeight, decoded
from ..solvers.codebook import Codebook, CodebookWeight
from .code_planes import bits_for, packed_planes, stored_bytes, unpacked_planes

_FLOAT_BYTES, _HALF_BYTES = 4, 2
# Places of single weights are told by how far each is behind the one before, in one byte.
_LARGEST_STEP = 255
# Rounding to float16 is an error of at most this share of a number of usual size.
_HALF_ROUNDING = 2.0**-11
# Where float16 saves fewer bytes than this, the Cast back takes about as many.
_LEAST_SAVED = 96


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """A weight as codes; Ŵ = tables[output // rows][codes] · scales, but for the outliers.

    Attributes:
        codes: uint8 [outputs, columns]; each stands for as many consecutive inputs as a table's entry has numbers.
        bits: Bits of a code, 1 to 8.
        tables: float32 [tables, 2**bits, numbers of an entry].
        rows: Consecutive outputs that share a table.
        scales: float32 [outputs, blocks], or None for 1.
        block: Consecutive inputs that share a scale.
        inputs: Inputs of an output; codes and blocks may reach beyond.
        positions: Flat positions in [outputs, inputs] of outliers, rising.
        exact: What these are, float32.
        error: Predicted output error.
        book: The codebook, where other weights have the same.
    """

    codes: Array
    bits: int
    tables: Array
    rows: int
    scales: Array | None
    block: int
    inputs: int
    positions: Array
    exact: Array
    error: float
    book: Codebook | None = None

    @property
    def vector(self) -> int:
        """Numbers of an entry."""
        return int(self.tables.shape[2])

    @property
    def outputs(self) -> int:
        """Outputs of the layer."""
        return len(self.codes)

    @property
    def blocks(self) -> int:
        """Blocks of inputs, each with a scale of its own."""
        return 1 if self.scales is None else int(self.scales.shape[1])

    @property
    def padded(self) -> int:
        """Inputs, with those that fill the last block or the last code."""
        return self.blocks * self.block if self.blocks > 1 else int(self.codes.shape[1]) * self.vector

    @property
    def is_plain(self) -> bool:
        """Whether every code is one weight, and scales belong to whole outputs: codes may lie as the weight does."""
        return self.vector == 1 and self.blocks == 1

    @property
    def halves_tables(self) -> bool:
        """Whether tables are stored as float16: where that is smaller, and loses nothing that could be measured."""
        if len(self.tables) == 1 or self.tables.size * (_FLOAT_BYTES - _HALF_BYTES) < _LEAST_SAVED:
            return False
        with np.errstate(over="ignore"):
            moved = np.abs(self.tables.astype(np.float16).astype(np.float32) - self.tables)
        usual = np.sqrt(np.square(self.tables, dtype=np.float64).mean(axis=(1, 2), keepdims=True))
        return bool(np.all(moved <= 2 * _HALF_ROUNDING * np.maximum(usual, np.abs(self.tables))))

    @property
    def halves_scales(self) -> bool:
        """Whether scales are stored as float16: where that is smaller, and they are no more precise."""
        if self.scales is None or self.scales.size * (_FLOAT_BYTES - _HALF_BYTES) < _LEAST_SAVED:
            return False
        with np.errstate(over="ignore"):
            return bool(np.all(self.scales.astype(np.float16).astype(np.float32) == self.scales))

    def sheet(self) -> Array:
        """Return the codes [outputs, columns], with columns that fill the last block; those are any code."""
        missing = self.padded // self.vector - self.codes.shape[1]
        return np.pad(self.codes, ((0, 0), (0, missing))) if missing else self.codes

    def scale_of(self, positions: Array) -> Array:
        """Return the scales of weights at flat positions in [outputs, inputs]."""
        if self.scales is None:
            return np.ones(len(positions), np.float32)
        output, column = np.divmod(positions, self.inputs)
        return np.asarray(self.scales[output, column // self.block if self.blocks > 1 else 0])

    def values(self) -> Array:
        """Return Ŵ, float32 [outputs, inputs]."""
        found = decoded(self.tables, self.codes, self.rows, self.scales, self.block)
        found = np.ascontiguousarray(found[:, : self.inputs])  # so that a flat view of it is no copy
        found.reshape(-1)[self.positions] = self.exact
        return found

    def parts(self) -> dict[str, int]:
        """Return what is stored, in bytes: codes, tables (none if others have the same), scales, and outliers."""
        steps = len(steps_of(self.positions)) if self.positions.size else 0
        table_bytes = _HALF_BYTES if self.halves_tables else _FLOAT_BYTES
        scale_bytes = _HALF_BYTES if self.halves_scales else _FLOAT_BYTES
        return {
            "codes": stored_bytes(self.sheet().size, self.bits),
            "tables": 0 if self.book is not None else self.tables.size * table_bytes,
            "scales": 0 if self.scales is None else self.scales.size * scale_bytes,
            "outliers": steps * (1 + _FLOAT_BYTES),
        }


@dataclass(frozen=True, eq=False)
class PackedCodes:
    """A weight as codes that take no more memory than in the file, for as long as others are solved for.

    Attributes:
        planes: Codes as `packed_planes` puts them, a row each output.
        columns: Codes of an output.
        rest: All but the codes.
    """

    planes: tuple[Array, ...]
    columns: int
    rest: WeightCodes

    @classmethod
    def of(cls, codes: WeightCodes) -> PackedCodes:
        """Pack the codes of a weight."""
        rest = replace(codes, codes=codes.codes[:, :0].copy())
        return cls(tuple(packed_planes(codes.codes, codes.bits)), codes.codes.shape[1], rest)

    def unpacked(self) -> WeightCodes:
        """Return the weight with its codes."""
        return replace(self.rest, codes=unpacked_planes(self.planes, self.rest.bits, self.columns))


def of_codebook(found: CodebookWeight) -> WeightCodes:
    """Return what a codebook's solver found as it is stored."""
    bits = bits_for(len(found.book.values))
    table = np.zeros((1, 2**bits, 1), np.float32)
    table[0, : len(found.book.values), 0] = found.book.table()
    outputs, inputs = found.codes.shape
    nowhere, nothing = np.zeros(0, np.int64), np.zeros(0, np.float32)
    return WeightCodes(
        found.codes, bits, table, outputs, found.scales, found.block, inputs, nowhere, nothing, found.error, found.book
    )


def of_clusters(found: ClusteredWeight) -> WeightCodes:
    """Return what the solver of clusters found as it is stored."""
    return WeightCodes(
        found.codes,
        found.bits,
        found.tables,
        found.rows,
        found.scales,
        found.block or found.inputs,
        found.inputs,
        found.positions,
        found.exact,
        found.error,
    )


def steps_of(positions: Array) -> Array:
    """Return how far each position is behind the one before, as uint8; where it is farther, there are stops between.

    Args:
        positions: Rising, the first counted from 0.
    """
    gaps = np.diff(positions, prepend=0)
    stops = np.where(gaps > 0, (gaps - 1) // _LARGEST_STEP, 0)
    steps = np.full(len(positions) + int(stops.sum()), _LARGEST_STEP, np.uint8)
    steps[np.cumsum(stops + 1) - 1] = gaps - stops * _LARGEST_STEP
    return steps


def scattered(codes: WeightCodes, layer: LinearLayer) -> tuple[Array, Array]:
    """Return where outliers go among what is decoded, as steps, and what goes there, before scales multiply it.

    Where there is a stop on the way, what is there is put there again.
    """
    if codes.is_plain:
        own = np.arange(codes.outputs * codes.inputs).reshape(codes.outputs, codes.inputs)
        order = layer.in_layout(own).reshape(-1)
        places = np.flatnonzero(np.isin(order, codes.positions))
        positions = order[places]
    else:
        output, column = np.divmod(codes.positions, codes.inputs)
        places, positions = output * codes.padded + column, codes.positions
    steps = steps_of(places)
    at = np.cumsum(steps, dtype=np.int64)
    output, column = np.divmod(order[at], codes.inputs) if codes.is_plain else np.divmod(at, codes.padded)
    found = codes.sheet()[output, column // codes.vector]
    numbers = codes.tables[output // codes.rows, found, column % codes.vector]
    exact = codes.exact[np.searchsorted(codes.positions, positions)]
    numbers[np.searchsorted(at, places)] = exact / codes.scale_of(positions)
    return steps, numbers
