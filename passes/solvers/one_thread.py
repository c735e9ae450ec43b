"""One thread for numpy's linear algebra: its idle threads wait busily, which costs more than they bring here."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

# Where numpy's wheels keep OpenBLAS, beside the package or within it.
_FOLDERS = ("../numpy.libs", ".dylibs")
_GET, _SET = "scipy_openblas_get_num_threads64_", "scipy_openblas_set_num_threads64_"


@contextmanager
def one_thread() -> Iterator[None]:
    """Let numpy's matrix products and factorizations run on one thread meanwhile, where it came with OpenBLAS.

    Between many small products, OpenBLAS's threads spin: on SqueezeNet they took 7 of 14 seconds of processor time
    while GPTQ itself took 0.7, and on a busy machine they hold up each other as well.
    """
    library = _openblas()
    if library is None:
        yield
        return
    before = int(getattr(library, _GET)())
    getattr(library, _SET)(1)
    try:
        yield
    finally:
        getattr(library, _SET)(before)


def _openblas() -> ctypes.CDLL | None:
    """Return the OpenBLAS that numpy has loaded, or None where it is another library."""
    package = Path(np.__file__).parent
    for file in (file for folder in _FOLDERS for file in sorted((package / folder).glob("*scipy_openblas64*"))):
        try:
            library = ctypes.CDLL(str(file))
        except OSError:
            continue
        if hasattr(library, _GET) and hasattr(library, _SET):
            return library
    return None
