"""Which of several processes that do one job together this one is: `torchrun` and `accelerate launch` start such."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

from graphopt.errors import EXIT_FAULT, BackendError, FailedElsewhere, GraphoptError

# What launchers set in each process they start.
_NUMBER, _COUNT, _LOCAL_COUNT = "RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"


def process_number() -> int:
    """Return the number of this process, from 0; 0 where it works alone."""
    return _read(_NUMBER, 0)


def process_count() -> int:
    """Return how many processes do the job; 1 where this one works alone."""
    return max(1, _read(_COUNT, 1))


def local_process_count() -> int:
    """Return how many of them are on this machine; 1 where that was not said."""
    return max(1, _read(_LOCAL_COUNT, 1))


def is_main_process() -> bool:
    """Return whether this process is the one that writes files and talks."""
    return process_number() == 0


@contextlib.contextmanager
def one_outcome(is_awaited: Callable[[], bool]) -> Iterator[None]:
    """Let processes that trained together end alike: the main one scores and checks the result, and tells the others.

    Args:
        is_awaited: Whether the others are done, and wait for what the main one says.

    Raises:
        FailedElsewhere: In the others: the main one failed.
        BackendError: In the others: the main one is gone.
    """
    code = EXIT_FAULT
    try:
        yield
        code = 0
    except GraphoptError as error:
        code = error.exit_code
        raise
    finally:
        if is_main_process() and is_awaited():
            # What the others do not hear they notice: the main process is gone then.
            with contextlib.suppress(RuntimeError):
                _tell(code)
    if not is_main_process() and is_awaited():
        try:
            code = _tell(code)
        except RuntimeError as error:
            raise BackendError("the main process is gone", hint="see what it said before") from error
        if code:
            raise FailedElsewhere(code)


def _tell(code: int) -> int:
    """Return what the main process says here, on all processes; where none trained beside it, nobody hears it."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return code
    said = [code]
    distributed.broadcast_object_list(said, src=0)
    return said[0]


def _read(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise
