"""Weights told by learned tables: codes of their entries, a scale for each block, and a few weights as they are."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt.backend import Array


@dataclass(frozen=True)
class Clustering:
    """How a weight is clustered.

    Attributes:
        bits: Bits of a code, 1 to 8; a table has 2**bits entries.
        rows: Consecutive outputs that share a table; 0 for all of them.
        vector: Consecutive inputs that a code stands for.
        block: Consecutive inputs of an output that share a scale; 0 for one scale an output, None for no scales.
        outliers: Share of the weights that are kept as they are.
        zeros: Whether one entry is exactly 0 and every weight of 0 takes it; None for where zeros are many.
        compensated: Whether errors are made up for, where H says by what; else weights are seen one by one.
    """

    bits: int = 4
    rows: int = 0
    vector: int = 1
    block: int | None = 0
    outliers: float = 0.0
    zeros: bool | None = None
    compensated: bool = True

    @property
    def entries(self) -> int:
        """Entries of a table."""
        return int(2**self.bits)

    def rows_of(self, outputs: int) -> int:
        """Return how many outputs share a table, of so many."""
        return min(self.rows, outputs) if self.rows else max(outputs, 1)

    def block_of(self, inputs: int) -> int:
        """Return how many inputs share a scale, of so many; 0 for no scales. Whole vectors do."""
        if self.block is None:
            return 0
        block = min(self.block, inputs) if self.block else inputs
        return max(-(-block // self.vector) * self.vector, 1)


@dataclass(frozen=True)
class ClusteredWeight:
    """A weight told by tables; Ŵ = tables[output // rows][codes] · scales, with some weights put in as they are.

    Attributes:
        codes: uint8 [outputs, inputs / vector, rounded up].
        tables: float32 [tables, entries, vector]; scalars rise.
        rows: Consecutive outputs that share a table.
        scales: float32 [outputs, blocks], no more precise than float16 where that says them; None for none.
        block: Consecutive inputs that share a scale, a multiple of the vector; 0 without scales.
        inputs: Inputs of an output.
        positions: int64, where in the flat weight [outputs · inputs] the ones kept are, rising.
        exact: float32, what these are.
        bits: Bits of a code.
        error: Predicted output error tr((W−Ŵ) H (W−Ŵ)ᵀ); where no H was given, the sum of squared differences.
    """

    codes: Array
    tables: Array
    rows: int
    scales: Array | None
    block: int
    inputs: int
    positions: Array
    exact: Array
    bits: int
    error: float

    @property
    def vector(self) -> int:
        """Inputs that a code stands for."""
        return int(self.tables.shape[2])

    def values(self) -> Array:
        """Return Ŵ, float32 [outputs, inputs]."""
        found = decoded(self.tables, self.codes, self.rows, self.scales, self.block)
        found = np.ascontiguousarray(found[:, : self.inputs])  # so that a flat view of it is no copy
        found.reshape(-1)[self.positions] = self.exact
        return found


def decoded(tables: Array, codes: Array, rows: int, scales: Array | None, block: int) -> Array:
    """Return what codes [outputs, codes] stand for, float32 [outputs, codes × vector], without outliers."""
    found = looked_up(tables, codes, rows)
    if scales is not None:
        # Block by block, as scales for each weight would take as much memory again.
        for place, own in enumerate(scales.T):
            found[:, place * block : (place + 1) * block] *= own[:, None]
    return found


def looked_up(tables: Array, codes: Array, rows: int) -> Array:
    """Return the entries of codes [outputs, codes] as float32 [outputs, codes × vector]."""
    shape = len(codes), codes.shape[1] * tables.shape[2]
    if len(tables) == 1:
        return np.asarray(tables[0][codes].reshape(shape))
    return np.asarray(tables.reshape(-1, tables.shape[2])[places(codes, rows, tables.shape[1])].reshape(shape))


def places(codes: Array, rows: int, entries: int) -> Array:
    """Return where the entries of codes [outputs, codes] lie among those of all tables, in the same shape."""
    offsets = np.arange(len(codes)) // rows * entries
    return codes + offsets[:, None]


def stored_bytes(clustering: Clustering, outputs: int, inputs: int) -> float:
    """Return what codes, tables and scales of a weight take, scales as float16."""
    codes = outputs * -(-inputs // clustering.vector) * clustering.bits / 8
    tables = -(-outputs // clustering.rows_of(outputs)) * clustering.entries * clustering.vector * 4
    block = clustering.block_of(inputs)
    scales = outputs * -(-inputs // block) * 2 if block else 0
    return codes + tables + scales + round(clustering.outliers * outputs * inputs) * 8
