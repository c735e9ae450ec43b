"""Samples to train on: by index, in a seeded order that does not depend on how many processes share the work."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch

from graphopt.backend import Array
from graphopt.data import Chunk, Dataset
from graphopt.errors import DataError

from .sample_store import SampleStore, resolved, stored

Outputs = Mapping[str, torch.Tensor]

# Samples stay in memory up to so many bytes; what is more lies in a temporary file, which is mapped.
BYTES_IN_MEMORY = 1 << 30
# Samples, channels, height, width.
_IMAGE_RANK = 4


@dataclass(frozen=True)
class TrainingBatch:
    """Some samples, as a model takes them.

    Attributes:
        feeds: Input name to tensor; text stays an array of objects.
        labels: Of the real samples, [count, ...], or None; text stays an array.
        count: How many samples are real; where a fixed batch size is padded, they come first.
        rows: Which samples these are: int64 [count], indices of all samples.
        epoch: How often all samples have been seen before; None where they are looked at and not trained on.
        is_padded: Whether rows that only fill up a fixed batch size follow; a sample may be a feed of several rows.
    """

    feeds: dict[str, Any]
    labels: Any
    count: int
    rows: Array
    epoch: int | None = None
    is_padded: bool = False

    def real(self, value: torch.Tensor) -> torch.Tensor:
        """Return a tensor without what only pads: of the batch, or of all its positions one after the other."""
        fed = next((len(feed) for feed in self.feeds.values() if feed.ndim), 0)
        if not self.is_padded or not value.ndim or len(value) % fed:
            return value
        return value[: len(value) // fed * self.count]

    def to(self, device: torch.device) -> TrainingBatch:
        """Return the batch with its tensors on a device."""
        feeds = {name: _moved(feed, device) for name, feed in self.feeds.items()}
        return replace(self, feeds=feeds, labels=_moved(self.labels, device))


class Samples(Protocol):
    """What can be trained on."""

    def __len__(self) -> int: ...

    def divide(self, rows: Array, at_most: int) -> list[Array]:
        """Divide samples into parts that fit into a batch each, of so many samples at most; none is empty."""

    def batch(self, rows: Array, epoch: int | None, pool: Array) -> TrainingBatch:
        """Return a batch of samples by index.

        Args:
            rows: The samples: int64 [count], a part as `divide` gives it.
            epoch: How often all samples have been seen before; None where they are not trained on.
            pool: All samples that are trained on.
        """


class Augmenting(Protocol):
    """What changes inputs before they are trained on, at random, by seed, epoch and sample alone."""

    @property
    def mixes(self) -> bool:
        """Whether each sample is mixed with another one."""

    def partners(self, rows: Array, epoch: int, seed: int, pool: Array) -> Array:
        """Return which sample of a pool each one is mixed with."""

    def apply(
        self,
        feeds: Mapping[str, Array],
        rows: Array,
        epoch: int,
        seed: int,
        *,
        partners: Mapping[str, Array] | None = None,
    ) -> Mapping[str, Array]:
        """Return inputs, changed."""


@dataclass(frozen=True)
class Order:
    """The order in which samples are trained on: one permutation after the other, cut into batches of equal size.

    Attributes:
        rows: The samples: int64 [samples].
        batch: Samples of a step, over all processes.
        seed: Seed of the permutations.
    """

    rows: Array
    batch: int
    seed: int

    def step(self, step: int) -> tuple[Array, Array]:
        """Return the samples of a step, from 0 on, and for each how often all of them have been seen before."""
        start = step * self.batch
        epochs = np.arange(start, start + self.batch) // len(self.rows)
        stream = np.concatenate([self._permuted(epoch) for epoch in range(epochs[0], epochs[-1] + 1)])
        begin = start - epochs[0] * len(self.rows)
        return stream[begin : begin + self.batch], epochs

    def _permuted(self, epoch: int) -> Array:
        permuted: Array = np.random.default_rng((self.seed, epoch)).permutation(self.rows)
        return permuted


def held_out_of(count: int, held: int, seed: int) -> tuple[Array, Array]:
    """Return (samples to train on, samples held out): a seeded choice, both in ascending order."""
    order = np.random.default_rng(seed).permutation(count)
    return np.sort(order[held:]), np.sort(order[:held])


class StoredSamples:
    """The samples of a data set, read once: each can be had by its index, whatever the source can do.

    Args:
        data: The data set.
        augmentation: What changes inputs that are trained on, or None.
        seed: Its seed.
        bytes_in_memory: How much stays in memory; the rest goes to a temporary file.

    Raises:
        DataError: Samples are to be changed, and come as whole feeds.
    """

    def __init__(
        self,
        data: Dataset,
        augmentation: Augmenting | None = None,
        seed: int = 0,
        bytes_in_memory: int = BYTES_IN_MEMORY,
    ) -> None:
        self._augmentation, self._seed = augmentation, seed
        self._fixed = next((spec.fixed_batch for spec in data.specs if spec.fixed_batch), None)
        store = SampleStore(bytes_in_memory)
        self._chunks: list[Chunk] = []
        self._starts: list[int] = []
        self._total = 0
        for chunk, rows in data.chunks():
            if len(rows):
                self._chunks.append(stored(chunk, rows, store))
                self._starts.append(self._total)
                self._total += len(rows)
        mapped = store.mapped()
        self._chunks = [resolved(chunk, mapped) for chunk in self._chunks]
        if augmentation is not None and any(_is_whole(chunk) for chunk in self._chunks):
            raise DataError(
                f"pass `recover`: `augment` changes one sample at a time, and `{data.name}` has whole feeds of a model",
                hint="give samples in arrays whose first axis is samples, or leave out `augment`",
            )

    def __len__(self) -> int:
        return self._total

    @property
    def never_change(self) -> bool:
        """Whether a sample is the same whenever it is trained on."""
        return self._augmentation is None

    def labels_digest(self) -> str:
        """Return what the same labels in the same order share."""
        state = hashlib.blake2b(digest_size=8)
        for chunk in self._chunks:
            if chunk.labels is not None:
                state.update(f"{chunk.labels.dtype} {chunk.labels.shape}".encode())
                state.update(str(chunk.labels.tolist()).encode())
        return state.hexdigest()

    def divide(self, rows: Array, at_most: int) -> list[Array]:
        """Divide samples into parts of equal shapes; see `Samples.divide`. A model's fixed batch size is one, too."""
        alike: dict[Any, list[int]] = {}
        for row in rows.tolist():
            alike.setdefault(self._kind(row), []).append(row)
        size = min(at_most, self._fixed or at_most)
        return [part for kind in alike.values() for part in _evenly(np.array(kind, np.int64), size)]

    def batch(self, rows: Array, epoch: int | None, pool: Array) -> TrainingBatch:
        """Return a batch of samples by index; see `Samples.batch`."""
        feeds = self._feeds(rows)
        chunk, _ = self._found(int(rows[0]))
        if self._augmentation is not None and epoch is not None:
            partners = self._partners(self._augmentation, rows, epoch, pool)
            feeds = dict(self._augmentation.apply(feeds, rows, epoch, self._seed, partners=partners))
        is_padded = bool(self._fixed) and not _is_whole(chunk) and len(rows) < (self._fixed or 0)
        if is_padded:
            padded = np.resize(np.arange(len(rows)), self._fixed or 0)
            feeds = {name: array[padded] if array.ndim else array for name, array in feeds.items()}
        tensors = {name: _tensor(array) for name, array in feeds.items()}
        return TrainingBatch(tensors, self._labels(rows), len(rows), rows, epoch, is_padded)

    def _partners(self, augmentation: Augmenting, rows: Array, epoch: int, pool: Array) -> dict[str, Array] | None:
        if not augmentation.mixes:
            return None
        return self._feeds(augmentation.partners(rows, epoch, self._seed, self._alike(int(rows[0]), pool)))

    def _alike(self, row: int, pool: Array) -> Array:
        """Return the samples of a pool that have the shapes of one."""
        kind = self._kind(row)
        same = np.array([self._kind(start) == kind for start in self._starts])
        alike: Array = pool[same[np.searchsorted(self._starts, pool, side="right") - 1]]
        return alike

    def _found(self, row: int) -> tuple[Chunk, int]:
        index = bisect.bisect_right(self._starts, row) - 1
        return self._chunks[index], row - self._starts[index]

    def _kind(self, row: int) -> Any:
        """Return what samples have in common that can be in one batch."""
        chunk, _ = self._found(row)
        if _is_whole(chunk):
            return row
        if any(not array.ndim for array in chunk.arrays.values()):
            return "chunk", id(chunk)
        labels = None if chunk.labels is None else chunk.labels.shape[1:]
        return tuple(array.shape[1:] for array in chunk.arrays.values()), labels

    def _feeds(self, rows: Array) -> dict[str, Array]:
        found = [self._found(row) for row in rows.tolist()]
        chunk, row = found[0]
        if not chunk.divisible:
            return dict(chunk.arrays)
        if chunk.stacked:
            return {name: array[row] if name in chunk.stacked else array[[row]] for name, array in chunk.arrays.items()}
        return {
            name: _picked([(chunk.arrays[name], row) for chunk, row in found]) if array.ndim else array
            for name, array in chunk.arrays.items()
        }

    def _labels(self, rows: Array) -> Any:
        found = [self._found(row) for row in rows.tolist()]
        chunk, _ = found[0]
        if chunk.labels is None:
            return None
        if not chunk.divisible:
            return _tensor(chunk.labels)
        return _tensor(_picked([(chunk.labels, row) for chunk, row in found if chunk.labels is not None]))


def _is_whole(chunk: Chunk) -> bool:
    """Return whether a sample of a chunk is a feed of its own, of any number of rows."""
    return not chunk.divisible or bool(chunk.stacked)


def _picked(found: Sequence[tuple[Array, int]]) -> Array:
    """Return rows of arrays as one array; at once where they are of one, as they mostly are."""
    array, _ = found[0]
    if all(other is array for other, _ in found):
        return array[[row for _, row in found]]
    return np.stack([other[row] for other, row in found])


def _evenly(rows: Array, at_most: int) -> list[Array]:
    return np.array_split(rows, -(-len(rows) // at_most))


def _tensor(array: Array) -> Any:
    """Return an array as a tensor of its own; text as it is."""
    if array.dtype.kind in "OSU":
        return array
    if array.dtype.kind == "V" or array.dtype.name == "bfloat16":
        # Types numpy only knows through an extension; of these torch takes the bits.
        return torch.from_numpy(np.array(array).view(np.int16)).view(torch.bfloat16)
    return torch.from_numpy(np.array(array, order="C"))


def _moved(value: Any, device: torch.device) -> Any:
    """Return a tensor on a device; one of four axes with the second innermost, as convolutions of images are fastest.

    The order of axes in memory spreads from an input to all that is computed of it; results differ by rounding alone.
    """
    if not isinstance(value, torch.Tensor):
        return value
    order = torch.channels_last if value.ndim == _IMAGE_RANK else torch.preserve_format
    return value.to(device, non_blocking=True, memory_format=order)
