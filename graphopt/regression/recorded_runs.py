"""Runs of a model kept in a file: what it was fed and what came out, large outputs by evenly spaced elements."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from graphopt.backend import Array
from graphopt.comparison import OutputError
from graphopt.errors import DataError
from graphopt.regression.stored_arrays import pack, unpack

# Bytes of outputs that a record keeps, all runs and sides together: they are of real numbers and compress little.
MOST_OUTPUT_BYTES = 1 << 18


@dataclass(frozen=True)
class Recorded:
    """An output as it was.

    Attributes:
        dtype: Its dtype, as numpy names it.
        shape: Its shape.
        stride: Every how many elements one was kept.
        values: Those, in order.
    """

    dtype: str
    shape: tuple[int, ...]
    stride: int
    values: Array

    @classmethod
    def of(cls, output: Array, stride: int) -> Recorded:
        """Record an output."""
        return cls(output.dtype.name, output.shape, stride, output.reshape(-1)[::stride])

    def differs(self, output: Array, error: OutputError) -> None:
        """Add to an error how far an output is off."""
        if (output.dtype.name, output.shape) == (self.dtype, self.shape):
            error.update(self.values, output.reshape(-1)[:: self.stride])
            return
        # Of another type or shape: the error says so, and is no number.
        error.update(np.broadcast_to(np.zeros((), self.values.dtype), self.shape), output)


@dataclass(frozen=True)
class Run:
    """One run.

    Attributes:
        feeds: Input name to array.
        outputs: Side (whose outputs) to output name to what it was.
    """

    feeds: dict[str, Array]
    outputs: dict[str, dict[str, Recorded]]


def flat(outputs: Mapping[str, Any]) -> dict[str, Array]:
    """Return outputs as arrays only: items of sequences and maps get names of their own, what is empty is left out."""
    return dict(pair for name, value in outputs.items() for pair in _flat(name, value))


def _flat(name: str, value: Any) -> Iterator[tuple[str, Array]]:
    if value is None:
        return
    if isinstance(value, (list, tuple)):
        for index, item in enumerate(value):
            yield from _flat(f"{name}[{index}]", item)
    elif isinstance(value, Mapping):
        yield from _flat(f"{name}.keys", np.asarray(list(value)))
        yield from _flat(f"{name}.values", np.asarray(list(value.values())))
    else:
        array = np.asarray(value)
        yield name, array.astype(object) if array.dtype.kind in "SU" else array


def record(
    feeds: Sequence[Mapping[str, Array]],
    sides: Mapping[str, Sequence[Mapping[str, Any]]],
    *,
    most: int = MOST_OUTPUT_BYTES,
) -> list[Run]:
    """Record runs.

    Args:
        feeds: What was fed.
        sides: Whose outputs to the outputs of each run.
        most: Bytes of outputs to keep, about: of larger ones, evenly spaced elements.
    """
    arrays = {side: [flat(one) for one in outputs] for side, outputs in sides.items()}
    size = sum(array.nbytes for outputs in arrays.values() for one in outputs for array in one.values())
    count = sum(1 for outputs in arrays.values() for one in outputs for _ in one)
    share = most // max(count, 1)
    whole = size <= most

    def kept(array: Array) -> Recorded:
        return Recorded.of(array, 1 if whole else _stride(array, share))

    return [
        Run(dict(feed), {side: {name: kept(array) for name, array in arrays[side][index].items()} for side in sides})
        for index, feed in enumerate(feeds)
    ]


def _stride(array: Array, most: int) -> int:
    """Return an odd number of elements, so that rows of even length are not met at the same columns each time."""
    return -(-array.nbytes // max(most, 1)) | 1 if array.nbytes > most else 1


def to_bytes(runs: Sequence[Run]) -> bytes:
    """Return runs as the bytes of a file."""
    arrays, facts = {}, {}
    for index, run in enumerate(runs):
        for name, array in run.feeds.items():
            arrays[f"{index}/feeds/{name}"] = array
        for side, outputs in run.outputs.items():
            for name, one in outputs.items():
                key = f"{index}/{side}/{name}"
                arrays[key] = one.values
                facts[key] = {"shape": list(one.shape), "stride": one.stride}
    return pack(arrays, facts)


def read(path: str | os.PathLike[str]) -> list[Run]:
    """Return the runs of a file.

    Raises:
        DataError: There is no such file, or it holds none.
    """
    arrays, facts = unpack(path)
    runs: dict[int, Run] = {}
    for key, array in arrays.items():
        number, side, name = (*key.split("/", 2), "", "")[:3]
        if not number.isdecimal():
            raise DataError(f"`{path}` holds no runs that graphopt recorded", hint="write the test anew")
        run = runs.setdefault(int(number), Run({}, {}))
        if key in facts:
            said = facts[key]
            one = Recorded(array.dtype.name, tuple(said["shape"]), int(said["stride"]), array)
            run.outputs.setdefault(side, {})[name] = one
        else:
            run.feeds[name] = array
    return [runs[number] for number in sorted(runs)]


def errors(runs: Sequence[Run], side: str, outputs: Sequence[Mapping[str, Any]]) -> dict[str, OutputError]:
    """Return how far outputs are off those of a side, by name; one that only the one has is a mismatch."""
    found: dict[str, OutputError] = {}
    for run, given in zip(runs, outputs, strict=True):
        arrays, stored = flat(given), run.outputs.get(side, {})
        for name in dict.fromkeys([*stored, *arrays]):
            error = found.setdefault(name, OutputError(name))
            if name in stored and name in arrays:
                stored[name].differs(arrays[name], error)
            else:
                error.mismatch = "it was not there" if name in arrays else "it is not there any more"
                error.equal, error.max_abs = False, float("inf")
    return found
