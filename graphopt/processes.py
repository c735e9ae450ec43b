"""Which of several processes that do one job together this one is: `torchrun` and `accelerate launch` start such."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
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


class Company:
    """The processes that train together: the main one scores and checks, and says whether the others go on.

    It says so before each training, where all meet, and at the end. What fails inside a training fails in all of them.

    Args:
        trains: Whether they do; else each works alone.
    """

    def __init__(self, trains: bool) -> None:
        self._trains = trains and process_count() > 1
        self._is_training = False

    def begin_training(self) -> None:
        """Wait for the main process to come here, too.

        Raises:
            FailedElsewhere: It failed before.
            BackendError: It is gone, or in it: another one is.
        """
        self._meet(0)
        self._is_training = self._trains

    def end_training(self) -> None:
        """Go on alone."""
        self._is_training = False

    @contextlib.contextmanager
    def one_outcome(self) -> Iterator[None]:
        """Let all processes end as the main one does.

        Raises:
            FailedElsewhere: In the others: the main one failed.
            BackendError: In the others: it is gone.
        """
        try:
            yield
        except FailedElsewhere:
            raise
        except BaseException as error:
            code = error.exit_code if isinstance(error, GraphoptError) else None
            if is_main_process() or code is not None:
                # Where all fail alike nobody leaves before that is heard: the main process has yet to tell the user.
                with contextlib.suppress(BackendError, FailedElsewhere):
                    self._part(EXIT_FAULT if code is None else code)
            raise
        # What the main process has done is done, whoever hears of it.
        with contextlib.suppress(BackendError) if is_main_process() else contextlib.nullcontext():
            self._part(0)

    def _part(self, code: int) -> None:
        if not self._is_training:
            self._meet(code)

    def _meet(self, code: int) -> None:
        """Say how it goes in the main process; hear it in the others."""
        if not self._trains:
            return
        try:
            said = _said(code)
        except RuntimeError as error:
            who = "a process that trains beside this one" if is_main_process() else "the main process"
            raise BackendError(f"{who} is gone", hint="see what it said before") from error
        if said and not is_main_process():
            raise FailedElsewhere(said)


def _said(code: int) -> int:
    """Return what the main process says here, on all processes; what trains has joined them before."""
    distributed: Any = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return code
    said = [code]
    distributed.broadcast_object_list(said, src=0)
    return said[0]


def _read(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise
