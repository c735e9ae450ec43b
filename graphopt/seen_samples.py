"""Samples that were trained on and are scored, too: what was learnt by heart says nothing of other samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

import numpy as np

from graphopt.backend import Array
from graphopt.data import Chunk, Dataset, content
from graphopt.pipeline import Step

_DIGEST_BYTES = 16


def warn_of_seen(steps: Sequence[Step], given: Dataset | None, scored: Dataset | None) -> list[str]:
    """Return a warning where a step trains on samples that are scored; they are only looked for where one trains.

    Args:
        steps: What is run.
        given: Samples that passes are given, or None.
        scored: Samples that figures are of, or None.
    """
    if given is None or scored is None or not any(step.trains for step in steps):
        return []
    seen = seen_samples(scored, given)
    what = f"{seen} of {len(scored)} samples that are scored are trained on, too: figures flatter the result"
    return [f"{what}; score others with `--eval`"] if seen else []


def seen_samples(scored: Dataset, trained: Dataset) -> int:
    """Return how many of the samples that are scored are among those trained on, by what a model is fed.

    Both are read once, and no more of them is kept than a checksum of each scored sample. Labels do not count.
    """
    wanted: dict[bytes, int] = {}
    for digest in _digests(scored):
        wanted[digest] = wanted.get(digest, 0) + 1
    return sum(wanted.pop(digest, 0) for digest in _digests(trained))


def _digests(data: Dataset) -> Iterator[bytes]:
    """Yield what each sample has in common with all that are fed the same, wherever they lie."""
    for chunk, rows in data.chunks():
        for row in rows.tolist() if chunk.divisible else rows[:1].tolist():
            state = hashlib.blake2b(digest_size=_DIGEST_BYTES)
            for name in sorted(chunk.arrays):
                one = _feed(chunk, name, row)
                state.update(f"{name} {one.dtype} {one.shape} ".encode())
                state.update(content(one))
            yield state.digest()


def _feed(chunk: Chunk, name: str, row: int) -> Array:
    """Return an input as a model is fed it with one sample: with an axis for samples, however the source has it."""
    array = chunk.arrays[name]
    if not chunk.divisible or not array.ndim:
        return array
    return np.asarray(array[row] if name in chunk.stacked else array[[row]])
