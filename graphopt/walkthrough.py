"""Walkthroughs: a model run over samples piece by piece, each piece once, while it is being changed further down."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.data import Batch, Dataset
from graphopt.fragment import constant_content, fragment, values_read

# Values kept for what comes later stay in memory up to this, together; the rest goes to files, a batch each. Those are
# read back as fast as memory while the system has room for them, and weigh on the process only one at a time. Passes
# that compare a model with what it was go through two of them.
MEMORY_LIMIT = 32 << 20
# Samples run at once: few enough that activations, some times larger than the inputs, stay within this.
BATCH_BYTES = 64 << 20
ACTIVATIONS_PER_INPUT = 16
LARGEST_BATCH = 16


class Closing:
    """What is used in a `with` statement, and lets go of what it keeps when that ends."""

    def close(self) -> None:
        """Let go of everything kept."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Walkthrough(Closing):
    """Runs a model over samples up to the values asked for, and goes on from there when asked for later ones.

    Only the inputs of the model and the values that nodes not yet run will read are kept, large ones in a file, so that
    going through all values in the order of the graph costs one run of the model, and an earlier value can be computed
    anew. The model may be edited in between: a node runs as it is when
    a value that hangs on it is first asked for, and what has run is not run again.

    Args:
        model: The model; only values of its main graph can be asked for.
        data: The samples.
        backend: Runs the pieces.
        threads: Threads for the backend; 0 leaves it to the runtime.
        optimize: Whether the runtime's own graph optimizations are on.
    """

    def __init__(
        self, model: ir.Model, data: Dataset, backend: Backend, *, threads: int = 0, optimize: bool = True
    ) -> None:
        self.model = model
        self._backend, self._threads, self._optimize = backend, threads, optimize
        self._store = _Store()
        self._done: set[ir.Node] = set()
        self._batches: list[Batch] = []
        try:
            self._read_inputs(data)
        except BaseException:
            self.close()
            raise

    def batches(self, *values: ir.Value) -> Iterator[tuple[Array, ...]]:
        """Yield what values hold, batch by batch, without rows that only pad a fixed batch.

        Raises:
            BackendError: The runtime fails on a piece of the model.
        """
        self._advance(values)
        for index, batch in enumerate(self._batches):
            yield tuple(batch.real(self._value(value, index)) for value in values)

    def repeat(self, node: ir.Node) -> None:
        """Run a node anew, as it is by then, for all that comes later; its inputs must be among the last asked for."""
        self._done.discard(node)
        for value in node.outputs:
            if value in self._store:
                self._store.drop(value)

    def close(self) -> None:
        """Let go of everything kept."""
        self._store.close()

    def _value(self, value: ir.Value, index: int) -> Array:
        constant = constant_content(value)
        return constant.numpy() if constant is not None else self._store.get(value, index)

    def _read_inputs(self, data: Dataset) -> None:
        inputs = list(self.model.graph.inputs)
        for batch in data.batches(_batch_size(data)):
            self._batches.append(Batch({}, None, batch.count, batch.padded_to))
            for value in inputs:
                default = value.const_value.numpy() if value.const_value is not None else None
                self._store.put(value, batch.feeds.get(value.name or "", default))

    def _advance(self, values: Iterable[ir.Value]) -> None:
        """Run what the values hang on and has not run, and forget what nothing will read any more."""
        wanted = [value for value in values if constant_content(value) is None]
        nodes = self._missing(wanted)
        if nodes:
            self._run(nodes, wanted)
        for value in self._store.values():
            if value not in wanted and not value.is_graph_input() and not self._is_read_later(value):
                self._store.drop(value)

    def _missing(self, wanted: Iterable[ir.Value]) -> list[ir.Node]:
        """Return the nodes between what is kept and what is wanted, each after what it reads."""
        done: dict[ir.Node, None] = {}
        stack = [node for value in wanted if (node := self._producer(value)) is not None]
        while stack:
            missing = [
                producer
                for value in values_read(stack[-1])
                if (producer := self._producer(value)) is not None and producer not in done
            ]
            if missing:
                stack.extend(missing)
            else:
                done[stack.pop()] = None
        return list(done)

    def _producer(self, value: ir.Value) -> ir.Node | None:
        return None if value in self._store or constant_content(value) is not None else value.producer()

    def _run(self, nodes: list[ir.Node], wanted: list[ir.Value]) -> None:
        for node in nodes:
            self._done.update((node, *walk.nodes_within(node)))
        made = [value for node in nodes for value in node.outputs if value.name]
        outputs = [value for value in made if value in wanted or self._is_read_later(value)]
        outputs = [value for value in outputs if value not in self._store]
        piece, inputs = self._piece(nodes, outputs)
        with self._backend.open(piece, threads=self._threads, optimize=self._optimize) as session:
            for index in range(len(self._batches)):
                feeds = {f"in{place}": self._store.get(value, index) for place, value in enumerate(inputs)}
                results = session.run(feeds)
                for place, value in enumerate(outputs):
                    self._store.put(value, results[f"out{place}"])

    def _piece(self, nodes: list[ir.Node], outputs: list[ir.Value]) -> tuple[ir.Model, list[ir.Value]]:
        """Return a model of some nodes, and the values that are its inputs."""
        own = {value for node in nodes for value in node.outputs if value.name}
        read = dict.fromkeys(value for node in nodes for value in values_read(node))
        inputs = [value for value in read if value not in own and constant_content(value) is None]
        imports = walk.all_imports(self.model)
        piece = fragment(nodes, outputs, inputs, imports, self.model.functions)
        for declared, value in zip(piece.graph.inputs, inputs, strict=True):
            if declared.type is None:
                declared.type = ir.TensorType(ir.DataType.from_numpy(self._store.get(value, 0).dtype))
        return piece, inputs

    def _is_read_later(self, value: ir.Value) -> bool:
        return any(use.node not in self._done for use in value.uses())


def _batch_size(data: Dataset) -> int:
    first = next(iter(data.take(1).batches(1)))
    each = sum(np.asarray(array).nbytes for array in first.feeds.values())
    return max(1, min(LARGEST_BATCH, BATCH_BYTES // max(each * ACTIVATIONS_PER_INPUT, 1)))


@dataclass(frozen=True)
class _Spilled:
    """An array in a file of its own."""

    path: Path
    dtype: np.dtype[Any]
    shape: tuple[int, ...]

    @classmethod
    def write(cls, array: Array, path: Path) -> _Spilled:
        np.ascontiguousarray(array).view(np.uint8).tofile(path)
        return cls(path, array.dtype, array.shape)

    def read(self) -> Array:
        return np.fromfile(self.path, np.uint8).view(self.dtype).reshape(self.shape)


class _Store:
    """Arrays by value and batch, in memory up to `MEMORY_LIMIT`, the rest in files of a temporary folder."""

    def __init__(self) -> None:
        self._arrays: dict[ir.Value, list[Array | _Spilled]] = {}
        self._folder: tempfile.TemporaryDirectory[str] | None = None
        self._held = self._files = 0

    def __contains__(self, value: ir.Value) -> bool:
        return value in self._arrays

    def values(self) -> list[ir.Value]:
        return list(self._arrays)

    def get(self, value: ir.Value, index: int) -> Array:
        kept = self._arrays[value][index]
        return kept.read() if isinstance(kept, _Spilled) else kept

    def put(self, value: ir.Value, array: Array | None) -> None:
        """Keep the array of a value's next batch; nothing is kept of an input that was not given."""
        if array is None:
            return
        if isinstance(array, np.memmap):  # of samples somebody else keeps in a file
            array = np.asarray(array)
        kept: Array | _Spilled = array
        if self._held + _size(array) > MEMORY_LIMIT and _can_spill(array):
            kept = self._spill(array)
        else:
            self._held += _size(array)
        self._arrays.setdefault(value, []).append(kept)

    def drop(self, value: ir.Value) -> None:
        for kept in self._arrays.pop(value):
            if isinstance(kept, _Spilled):
                kept.path.unlink()
            else:
                self._held -= _size(kept)

    def close(self) -> None:
        self._arrays.clear()
        self._held = 0
        if self._folder is not None:
            self._folder.cleanup()
            self._folder = None

    def _spill(self, array: Array) -> _Spilled:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="graphopt-")
        self._files += 1
        return _Spilled.write(array, Path(self._folder.name) / str(self._files))


def _size(array: Array) -> int:
    """Return the bytes of an array; a value may be a sequence, which has none."""
    return getattr(array, "nbytes", 0)


def _can_spill(array: Array) -> bool:
    return isinstance(array, np.ndarray) and array.size > 0 and array.ndim > 0 and not array.dtype.hasobject
