"""Work on a matrix done a few rows at a time, on several threads: temporaries stay in the cache, and few."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from graphopt.backend import Array

T = TypeVar("T")

# Elements worked on at a time. A step has about four temporaries of four bytes each: 2 MiB, the cache of one core.
ELEMENTS = 1 << 17
# Numbers that lie together in memory are worth reading together: eight lines of a cache.
_LEAST_RUN = 128
# More threads than this wait for memory rather than for arithmetic.
_MOST_THREADS = 8


def by_rows(function: Callable[..., T], matrix: Array, *others: Array | None, **options: Any) -> list[T]:
    """Return what a function gives for each run of rows, in order.

    Args:
        function: Called with rows of the matrix, the same rows of the others, and the options.
        matrix: [rows, columns].
        others: Arrays that go along; those of one row, and None, are passed whole to every call.
        options: Passed to every call.
    """
    rows = len(matrix)
    step = max(ELEMENTS // max(matrix.shape[1], 1), 1)
    if matrix.flags.f_contiguous:
        step = max(step, _LEAST_RUN)

    def call(start: int) -> T:
        part = slice(start, start + step)
        return function(
            matrix[part], *(one if one is None or len(one) == 1 else one[part] for one in others), **options
        )

    starts = range(0, rows, step) if rows else [0]
    threads = min(len(starts), os.cpu_count() or 1, _MOST_THREADS)
    if threads < 2:
        return [call(start) for start in starts]
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(call, starts))
