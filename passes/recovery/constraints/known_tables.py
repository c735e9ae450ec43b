"""Tables of fixed formats, whose entries never train: a table found for a weight may."""

from __future__ import annotations

import functools

import numpy as np
import onnx_ir as ir

from ...solvers.codebook import FP4, NF4, powers_of_two

# Formats of powers of two have this many bits at the least and at the most.
_FEWEST_BITS, _MOST_BITS = 2, 6


def is_known_table(tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant holds the entries of a codebook that is a format, in any order and number of times."""
    if tensor.size > 1 << _MOST_BITS + 2:
        return False
    array = np.asarray(tensor.numpy()).astype(np.float32)
    return frozenset(array.reshape(-1).tolist()) in _tables(array.dtype.name)


@functools.lru_cache(maxsize=1)
def _tables(_: str) -> frozenset[frozenset[float]]:
    powers = [powers_of_two(bits, terms) for bits in range(_FEWEST_BITS, _MOST_BITS + 1) for terms in (1, 2)]
    tables = [np.array(table, np.float32) for table in (NF4, FP4, *powers)]
    halves = [table.astype(np.float16).astype(np.float32) for table in tables]
    return frozenset(frozenset(table.tolist()) for table in (*tables, *halves))
