"""Calibration and evaluation data: where samples come from, checked against the model's inputs."""

from __future__ import annotations

import hashlib
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.data_sources import open_source
from graphopt.errors import DataError, did_you_mean

DEFAULT_LABELS = "labels"
HELD_BACK_SHARE = 4  # a quarter is scored, the rest calibrated on
HELD_BACK_LIMIT = 1000


@dataclass(frozen=True)
class InputSpec:
    """One input a caller must feed: dims are ints where static, None where dynamic; dims None if rank unknown."""

    name: str
    dtype: np.dtype[Any] | None
    dims: tuple[int | None, ...] | None

    @property
    def fixed_batch(self) -> int | None:
        """The first dimension where it is static."""
        return self.dims[0] if self.dims else None

    def __str__(self) -> str:
        shown = "?" if self.dims is None else "x".join("?" if dim is None else str(dim) for dim in self.dims)
        return f"`{self.name}` ({self.dtype}, {shown or 'scalar'})"


@dataclass(frozen=True)
class Batch:
    """Feeds for one run.

    Attributes:
        feeds: Input name to array.
        labels: Labels of the real samples, or None.
        count: How many samples are real; where a fixed batch size is padded, they come first.
        padded_to: The fixed batch size where there is padding, else 0.
    """

    feeds: dict[str, Array]
    labels: Array | None
    count: int
    padded_to: int = 0

    def real(self, output: Any) -> Any:
        """Return an output without the rows that only pad; one that has no such rows is returned as it is."""
        if not self.padded_to or not isinstance(output, np.ndarray) or not output.ndim:
            return output
        return output[: self.count] if len(output) == self.padded_to else output

    def all_real(self, outputs: Mapping[str, Any]) -> dict[str, Any]:
        """Return all outputs without the rows that only pad."""
        return {name: self.real(output) for name, output in outputs.items()}


@dataclass(frozen=True)
class Chunk:
    """Samples that came together: arrays whose first axis is samples, or one indivisible feed."""

    arrays: dict[str, Array]
    labels: Array | None
    size: int
    divisible: bool
    stacked: frozenset[str] = frozenset()  # inputs of which each sample is a whole feed


def batch_size(feed: Mapping[str, Array]) -> int:
    """Return how many samples a feed holds: the length of its first array that is no scalar."""
    return next((len(array) for array in feed.values() if array.ndim), 1)


Chunks = Callable[[], Iterator[Chunk]]
Advance = Callable[[int], None]


def input_specs(model: ir.Model) -> list[InputSpec]:
    """Return the inputs a caller must feed; inputs with a default (initializers) need not be."""
    return [
        InputSpec(value.name or "", numpy_dtype(value), _dims(value))
        for value in model.graph.inputs
        if not value.is_initializer()
    ]


def numpy_dtype(value: ir.Value) -> np.dtype[Any] | None:
    """Return a value's dtype as numpy's, or None where it is no tensor or unknown."""
    return np.dtype(value.dtype.numpy()) if value.dtype is not None and isinstance(value.type, ir.TensorType) else None


def _dims(value: ir.Value) -> tuple[int | None, ...] | None:
    if value.shape is None:
        return None
    return tuple(dim if isinstance(dim, int) else None for dim in value.shape)


class Dataset:
    """Samples for a model, read anew at each pass over them.

    Args:
        chunks: Opens the source and yields its chunks.
        specs: The model's inputs.
        name: How messages call the source.
        total: Number of samples of the source.
        has_labels: Whether the samples have labels.
        chosen: Indices of the samples that belong to this set; None for all.
        advance: Told of samples as they are used, to show progress.
    """

    def __init__(
        self,
        chunks: Chunks,
        specs: Sequence[InputSpec],
        name: str,
        total: int,
        has_labels: bool,
        chosen: Array | None = None,
        advance: Advance | None = None,
    ) -> None:
        self._chunks = chunks
        self.specs = tuple(specs)
        self.name = name
        self._total = total
        self._chosen = chosen
        self.has_labels = has_labels
        self._advance = advance or (lambda samples: None)
        self._fingerprint: str | None = None

    def __len__(self) -> int:
        return self._total if self._chosen is None else len(self._chosen)

    def split(self, seed: int) -> tuple[Dataset, Dataset]:
        """Return (for calibration, held back for scoring): a fixed seeded quarter, at most 1,000, is held back.

        Raises:
            DataError: Fewer than two samples.
        """
        if len(self) < 2:
            raise DataError(
                f"`{self.name}` has {len(self)} sample: too few to calibrate on some and score on others",
                hint="give more samples, or other ones to score with `--eval`",
            )
        order = np.random.default_rng(seed).permutation(len(self))
        held = max(1, min(len(self) // HELD_BACK_SHARE, HELD_BACK_LIMIT))
        return self._subset(order[held:]), self._subset(order[:held])

    def fingerprint(self) -> str:
        """Return what all sets of the same samples share, wherever these came from; the first time reads them all."""
        if self._fingerprint is None:
            state = hashlib.blake2b(digest_size=16)
            for chunk, rows in self.chunks():
                for row in rows if chunk.divisible else rows[:1]:
                    for name, array in sorted(chunk.arrays.items()):
                        one = np.asarray(array[row] if chunk.divisible and array.ndim else array)
                        state.update(f"{name} {array.dtype} {one.shape} ".encode())
                        state.update(content(one))
            self._fingerprint = state.hexdigest()
        return self._fingerprint

    def take(self, count: int) -> Dataset:
        """Return the first ``count`` samples."""
        return self._subset(np.arange(min(count, len(self))))

    def sample(self, count: int, seed: int) -> Dataset:
        """Return ``count`` samples drawn with a seed, or all where there are no more."""
        return self._subset(np.random.default_rng(seed).permutation(len(self))[:count])

    def _subset(self, indices: Array) -> Dataset:
        own = np.arange(self._total) if self._chosen is None else self._chosen
        chosen = np.sort(own[indices])
        return Dataset(self._chunks, self.specs, self.name, self._total, self.has_labels, chosen, self._advance)

    def batches(self, size: int) -> Iterator[Batch]:
        """Yield the samples in batches of at most ``size``; a model's fixed batch size takes precedence."""
        for chunk, rows in self.chunks():
            for batch in self._batches_of(chunk, rows, size):
                yield batch
                self._advance(batch.count)

    def chunks(self) -> Iterator[tuple[Chunk, Array]]:
        """Yield the source as it comes: each chunk with the rows of it that belong to this set."""
        position = 0
        for chunk in self._chunks():
            rows = np.arange(chunk.size)
            if self._chosen is not None:
                rows = self._chosen[(self._chosen >= position) & (self._chosen < position + chunk.size)] - position
            position += chunk.size
            yield chunk, rows

    def _batches_of(self, chunk: Chunk, rows: Array, size: int) -> Iterator[Batch]:
        if not chunk.divisible:
            if len(rows):
                yield Batch(chunk.arrays, chunk.labels, 1)
            return
        fixed = next((spec.fixed_batch for spec in self.specs if spec.fixed_batch and not chunk.stacked), None)
        step = 1 if chunk.stacked else (fixed or size)
        for start in range(0, len(rows), step):
            picked = rows[start : start + step]
            padded = np.resize(picked, fixed) if fixed and len(picked) < fixed else picked
            feeds = {name: _rows(array, padded, name in chunk.stacked) for name, array in chunk.arrays.items()}
            labels = chunk.labels[picked] if chunk.labels is not None else None
            yield Batch(feeds, labels, len(picked), padded_to=len(padded) if len(padded) > len(picked) else 0)


def _rows(array: Array, rows: Array, stacked: bool) -> Array:
    if array.ndim == 0:
        return array
    picked = array[rows[0]] if stacked else array[rows]
    return np.asarray(picked, dtype=array.dtype, order="C")


def open_data(
    source: Any,
    model: ir.Model,
    *,
    labels: str | None = None,
    labels_required: bool | None = None,
    advance: Advance | None = None,
) -> Dataset:
    """Open data for a model and check every sample against its inputs.

    Args:
        source: A path to an ``.npz`` file, to a folder of them or of ONNX ``test_data_set_*`` folders,
            ``file.py:function`` yielding dicts of arrays, or such a function, dict or list itself.
        model: The model the samples are for.
        labels: Key of the labels; ``labels`` where None.
        labels_required: Whether they may not be missing; where None, that is so if a key is named.
        advance: Told of samples as they are used, to show progress.

    Raises:
        DataError: Nothing there, empty, an input missing or misshaped, NaN, or labels of the wrong length.
    """
    specs = input_specs(model)
    raw, name = open_source(source)
    key = labels or DEFAULT_LABELS
    required = labels is not None if labels_required is None else labels_required

    def read() -> Iterator[Chunk]:
        for where, arrays, divisible in raw([spec.name for spec in specs]):
            yield _checked_chunk(arrays, specs, key, required, divisible, where)

    # The samples are chosen by their position, so every pass over them must see the same ones.
    chunks = _Repeatable(read, name)
    total, labelled = 0, set()
    for chunk in chunks():
        total += chunk.size
        labelled.add(chunk.labels is not None)
    if not total:
        raise DataError(f"data `{name}` is empty", hint="give at least one sample")
    if len(labelled) > 1:
        raise DataError(f"only some samples of `{name}` have labels `{key}`", hint="give labels to all or to none")
    return Dataset(chunks, specs, name, total, labelled.pop(), advance=advance)


class _Repeatable:
    """Chunks that are the same on every pass: the first one is remembered by checksums, later ones compared.

    Args:
        read: Reads the source once.
        name: How messages call it.
    """

    def __init__(self, read: Chunks, name: str) -> None:
        self._read, self._name = read, name
        self._checksums: list[int] | None = None

    def __call__(self) -> Iterator[Chunk]:
        """Read the source.

        Raises:
            DataError: It gives other samples than the first time.
        """
        expected, seen = self._checksums, []
        for chunk in self._read():
            seen.append(_checksum(chunk))
            if expected is not None and seen != expected[: len(seen)]:
                self._refuse()
            yield chunk
        if expected is not None and len(seen) != len(expected):
            self._refuse()
        self._checksums = seen

    def _refuse(self) -> NoReturn:
        hint = "a function is called anew for each pass: seed what is random in it, and return a fresh iterator"
        raise DataError(f"`{self._name}` gives other samples the second time it is read", hint=hint)


def _checksum(chunk: Chunk) -> int:
    checksum = 0
    labels = [chunk.labels] if chunk.labels is not None else []
    for array in (*chunk.arrays.values(), *labels):
        checksum = zlib.crc32(content(array), zlib.crc32(str(array.shape).encode(), checksum))
    return checksum


def content(array: Array) -> bytes | memoryview:
    """Return what an array holds, to take a checksum of."""
    if array.dtype.hasobject:
        return str(array.tolist()).encode()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def _checked_chunk(
    arrays: Mapping[str, Any],
    specs: Sequence[InputSpec],
    labels_key: str,
    labels_wanted: bool,
    divisible: bool,
    where: str,
) -> Chunk:
    feeds, stacked = {}, set()
    for spec in specs:
        if spec.name not in arrays:
            raise DataError(f"{where} lacks input {spec}", hint=_missing_hint(spec, arrays))
        feeds[spec.name] = _fit_dtype(np.asarray(arrays[spec.name]), spec, where)
        if _fit_shape(feeds[spec.name], spec, where):
            stacked.add(spec.name)
        _check_finite(feeds[spec.name], spec, where)
    labels = np.asarray(arrays[labels_key]) if labels_key in arrays else None
    if labels is None and labels_wanted:
        raise DataError(f"{where} has no labels `{labels_key}`", hint=did_you_mean(labels_key, arrays))
    sizes = {name: len(array) for name, array in feeds.items() if array.ndim}
    size = next(iter(sizes.values()), 1)
    if len(set(sizes.values())) > 1:
        if divisible:
            counts = ", ".join(f"`{name}` has {count}" for name, count in sizes.items())
            raise DataError(f"{where}: inputs differ in their number of samples: {counts}", hint="one row per sample")
        _check_whole_feed(feeds, specs, where)
        return Chunk(feeds, labels, 1, divisible=False)
    if labels is not None and (labels.ndim == 0 or len(labels) != size):
        found = len(labels) if labels.ndim else "no"
        raise DataError(f"{where}: {size} samples but {found} labels in `{labels_key}`", hint="one label per sample")
    return Chunk(feeds, labels, size, divisible=True, stacked=frozenset(stacked))


def _check_whole_feed(feeds: Mapping[str, Array], specs: Sequence[InputSpec], where: str) -> None:
    """Check the first axes of a feed that is no list of samples: nothing is cut or padded there."""
    for spec in specs:
        array, size = feeds[spec.name], spec.fixed_batch
        if size is not None and spec.dims is not None and array.ndim == len(spec.dims) and len(array) != size:
            shape = "x".join(map(str, array.shape))
            raise DataError(
                f"{where}: array of shape {shape} for input {spec}", hint="give arrays of the input's shape"
            )


def _missing_hint(spec: InputSpec, arrays: Mapping[str, Any]) -> str:
    return f"it has: {', '.join(sorted(arrays)) or 'nothing'}; name an array `{spec.name}`"


def _fit_dtype(array: Array, spec: InputSpec, where: str) -> Array:
    """Return the array in the input's dtype; only a change of width is made silently; integers must fit."""
    if spec.dtype is None or array.dtype == spec.dtype:
        return array
    kinds = array.dtype.kind, spec.dtype.kind
    if kinds[1] == "O" and kinds[0] in "SU":
        return array.astype(str).astype(object)
    if not (kinds == ("f", "f") or set(kinds) <= {"i", "u"}):
        raise DataError(
            f"{where}: `{array.dtype}` array for input {spec}",
            hint=f"preprocess as the model expects and store {spec.dtype}",
        )
    cast = array.astype(spec.dtype)
    if array.dtype.kind in "iu" and not np.array_equal(cast, array):
        raise DataError(f"{where}: values do not fit input {spec}", hint=f"store {spec.dtype}")
    return cast


def _fit_shape(array: Array, spec: InputSpec, where: str) -> bool:
    """Check an array against an input; return whether each row of it is a whole feed rather than one sample."""
    if spec.dims is None:
        return False
    stacked = array.ndim == len(spec.dims) + 1
    wanted = spec.dims if stacked else spec.dims[1:]
    actual = array.shape[1:]
    same_rank = array.ndim == len(spec.dims) or stacked
    if not same_rank or any(want is not None and want != have for want, have in zip(wanted, actual, strict=False)):
        raise DataError(
            f"{where}: array of shape {'x'.join(map(str, array.shape)) or 'scalar'} for input {spec}",
            hint="the first axis is samples, the others as the input's",
        )
    return stacked


def _check_finite(array: Array, spec: InputSpec, where: str) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        row = int(np.argwhere(~np.isfinite(array))[0][0]) if array.ndim else 0
        raise DataError(
            f"{where}: NaN or infinity in input `{spec.name}`, sample {row}",
            hint="clean the data; in a mask, use a large finite number",
        )
