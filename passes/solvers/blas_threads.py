"""Threads of BLAS: one for small matrices, where several would wait for each other longer than they work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from threadpoolctl import threadpool_limits

# Up to so many inputs products and systems of equations are small.
_FEW_INPUTS = 1024


def threads_for(inputs: int) -> AbstractContextManager[object]:
    """Return what holds BLAS to one thread within, where matrices of H's size are small.

    Args:
        inputs: How many inputs the layer has.
    """
    return threadpool_limits(1, user_api="blas") if inputs <= _FEW_INPUTS else nullcontext()
