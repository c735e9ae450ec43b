"""Which of several processes that do one job together this one is: `torchrun` and `accelerate launch` start such."""

from __future__ import annotations

import os

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


def _read(name: str, otherwise: int) -> int:
    text = os.environ.get(name, "")
    return int(text) if text.isdecimal() else otherwise
