"""Observation: statistics of a model's values over samples, in one run over them and in bounded memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.calibration_cache import CalibrationCache, entry_name
from graphopt.content_keys import ContentKeys
from graphopt.data import Batch, Dataset
from graphopt.dims import Atom, Dim, Size, evaluate
from graphopt.errors import DataError, PassError
from graphopt.fragment import constant_content, fragment, nodes_between, values_read
from graphopt.progress import Display
from graphopt.shapes import dims_of
from graphopt.statistics import Accumulator, Histogram, MovingAverage, Result, Statistic

# Bytes of values held at once to be looked at, before a model is run in pieces.
OBSERVED_BYTES_LIMIT = 128 << 20
# Batches whose values take more are no quicker: their memory is asked of the system anew each time.
_BATCH_BYTES = 64 << 20
LARGEST_BATCH = 32
# Statistics that tell samples apart.
_OF_SAMPLES = (MovingAverage, Histogram)
# What is assumed of a value whose dtype is not known.
_USUAL_ITEM_BYTES = 4

Requests = Mapping[ir.Value, "Statistic[Any] | Sequence[Statistic[Any]]"]


class Observations:
    """Statistics by value and statistic: ``observations[value, statistic]``.

    Attributes:
        observed: How many were read off runs of the model.
        reused: How many had been before, in this run or one before.
    """

    def __init__(self) -> None:
        self._results: dict[tuple[ir.Value, Statistic[Any]], Any] = {}
        self.observed = self.reused = 0

    def __getitem__(self, key: tuple[ir.Value, Statistic[Result]]) -> Result:
        result: Result = self._results[key]
        return result

    def put(self, value: ir.Value, statistic: Statistic[Any], result: Any) -> None:
        """Add a result."""
        self._results[value, statistic] = result


@dataclass
class _Wanted:
    """What is yet to be observed of a value: accumulators, where each is kept, None where its content has no name."""

    value: ir.Value
    parts: list[tuple[Statistic[Any], Accumulator, str | None]] = field(default_factory=list)


def observe(
    model: ir.Model,
    requests: Requests,
    data: Dataset,
    backend: Backend,
    cache: CalibrationCache,
    *,
    keys: ContentKeys | None = None,
    threads: int = 0,
    limit: int = OBSERVED_BYTES_LIMIT,
    display: Display | None = None,
) -> Observations:
    """Return statistics of values over samples.

    Only what the values hang on is run, and nothing where all of it was observed before. Batches are as large as the
    values of one fit into the limit; if those of a single sample do not, the model is run in pieces, each sample from
    piece to piece, and of its values only those that a later piece reads are kept. Samples are also run one at a time
    where a statistic tells them apart and inferred shapes say that, in a value, they do not lie along the first axis.

    Args:
        model: The model; not changed.
        requests: Values of the main graph, and the statistics wanted of each.
        data: The samples.
        backend: Runs the model.
        cache: What has been observed before; takes what is observed now.
        keys: Content keys of the model's values, if they are at hand.
        threads: Threads for the backend; 0 leaves it to the runtime.
        limit: Bytes of values looked at together; a single value may take more.
        display: Where it is shown; the data tell it of samples as they go by.

    Raises:
        DataError: A value became NaN or infinite, or has no such axis as a statistic is asked for along; names it.
        PassError: A value cannot be observed: it is not of the main graph, or holds no numbers.
    """
    found = Observations()
    wanted = _look_up(model, requests, data, cache, keys or ContentKeys(model), found)
    if wanted:
        shown = display or Display(False)
        with shown.stage(f"observing {len(wanted)} values", len(data)):
            _Run(model, wanted, data, backend, threads, limit).run()
    for one in wanted:
        for statistic, accumulator, name in one.parts:
            arrays = accumulator.arrays()
            found.put(one.value, statistic, statistic.result(arrays))
            found.observed += 1
            if name is not None:
                cache.put(name, arrays)
    return found


def _look_up(
    model: ir.Model,
    requests: Requests,
    data: Dataset,
    cache: CalibrationCache,
    content: ContentKeys,
    found: Observations,
) -> list[_Wanted]:
    """Take what the cache holds and return the rest, in the order of the graph."""
    keys = content.of([_observable(value, model) for value in requests])
    wanted = []
    for value in _in_order(model, requests):
        asked = requests[value]
        one = _Wanted(value)
        for statistic in dict.fromkeys(asked if isinstance(asked, Sequence) else [asked]):
            key = keys[value]
            name = entry_name(key, data.fingerprint(), statistic.key) if key is not None else None
            known = cache.get(name, statistic) if name is not None else None
            if known is None:
                one.parts.append((statistic, statistic.start(), name))
            else:
                found.put(value, statistic, known)
                found.reused += 1
        if one.parts:
            wanted.append(one)
    return wanted


def _observable(value: ir.Value, model: ir.Model) -> ir.Value:
    """Return a value if it can be observed.

    Raises:
        PassError: It cannot.
    """
    producer = value.producer()
    inside = value.graph if producer is None else producer.graph
    if inside is not None and inside is not model.graph:
        raise PassError(
            f"`{value.name}` cannot be observed: it is inside a subgraph or function",
            hint="inline it first, for example with `simplify`, or exclude what reads it",
        )
    return value


def _in_order(model: ir.Model, values: Iterable[ir.Value]) -> list[ir.Value]:
    place = {node: index for index, node in enumerate(model.graph)}

    def position(value: ir.Value) -> int:
        producer = value.producer()
        return place[producer] if producer is not None else -1

    return sorted(values, key=position)


class _Run:
    """One run over the samples, looking at values as they come.

    Args:
        model: The model.
        wanted: What to look at, in the order of the graph.
        data: The samples.
        backend: Runs the model.
        threads: Threads for the backend.
        limit: Bytes of values looked at together.
    """

    def __init__(
        self,
        model: ir.Model,
        wanted: list[_Wanted],
        data: Dataset,
        backend: Backend,
        threads: int,
        limit: int,
    ) -> None:
        self._model, self._wanted, self._data = model, wanted, data
        self._backend, self._threads, self._limit = backend, threads, limit

    def run(self) -> None:
        """Look at everything."""
        first = next(iter(self._data.take(1).batches(1)))
        sizes = self._sizes(first)
        total = sum(sizes.values())
        if total <= self._limit:
            largest = 1 if self._samples_lie_elsewhere() else LARGEST_BATCH
            self._run_whole(max(1, min(largest, min(self._limit, _BATCH_BYTES) // max(total, 1))))
        else:
            self._run_in_pieces(_groups(self._wanted, sizes, self._limit))

    def _samples_lie_elsewhere(self) -> bool:
        """Return whether samples shall be told apart in a value that has them along another axis than the first."""
        inputs = [dims for value in self._model.graph.inputs if (dims := dims_of(value))]
        batch = {atom for dims in inputs for atom in _atoms(dims[0])}
        asked = [one.value for one in self._wanted if any(isinstance(part[0], _OF_SAMPLES) for part in one.parts)]
        shapes = [dims for value in asked if (dims := dims_of(value))]
        along = [[not batch.isdisjoint(_atoms(size)) for size in dims] for dims in shapes]
        return any(any(axes) and not axes[0] for axes in along)

    def _run_whole(self, batch_size: int) -> None:
        piece = _pieces(self._model, [self._wanted])[0]
        if not piece.nodes:  # inputs and constants alone
            for batch in self._data.batches(batch_size):
                self._look(self._wanted, self._given(batch), batch)
            return
        with self._backend.open(piece.model(self._model), threads=self._threads) as session:
            for batch in self._data.batches(batch_size):
                held = self._given(batch)
                held.update(piece.results(session.run(piece.feeds(held))))
                self._look(self._wanted, held, batch)

    def _run_in_pieces(self, groups: list[list[_Wanted]]) -> None:
        """Run one sample after the other from piece to piece.

        A session keeps the memory it once needed, so that each is closed before the next one opens.
        """
        pieces = _pieces(self._model, groups)
        for batch in self._data.batches(1):
            held = self._given(batch)
            for group, piece in zip(groups, pieces, strict=True):
                if piece.nodes:
                    with self._backend.open(piece.model(self._model, held), threads=self._threads) as session:
                        held.update(piece.results(session.run(piece.feeds(held))))
                self._look(group, held, batch)
                for value in [value for value in held if value not in piece.kept]:
                    del held[value]

    def _given(self, batch: Batch) -> dict[ir.Value, Array]:
        """Return the values of inputs: fed, or what they are where nothing is fed."""
        given = {}
        for value in self._model.graph.inputs:
            default = value.const_value
            if value.name in batch.feeds:
                given[value] = batch.feeds[value.name]
            elif default is not None:
                given[value] = default.numpy()
        return given

    def _look(self, wanted: Iterable[_Wanted], held: Mapping[ir.Value, Array], batch: Batch) -> None:
        for one in wanted:
            constant = constant_content(one.value)
            array = constant.numpy() if constant is not None else batch.real(held[one.value])
            self._update(one, _numbers(array, one.value), batch.count)

    def _update(self, one: _Wanted, array: Array, samples: int) -> None:
        try:
            for _, accumulator, _ in one.parts:
                accumulator.update(array, samples)
        except DataError as error:
            raise DataError(f"`{one.value.name}` {error.message} on `{self._data.name}`", hint=error.hint) from error

    def _sizes(self, first: Batch) -> dict[ir.Value, int]:
        """Return how many bytes each value takes on the first sample: inferred, or else asked of the runtime."""
        sizes = inferred_bytes([one.value for one in self._wanted], self._given(first))
        unknown = [value for value, size in sizes.items() if size is None]
        if unknown:
            sizes.update(self._measured_bytes(unknown, first))
        return {value: size or 0 for value, size in sizes.items()}

    def _measured_bytes(self, values: list[ir.Value], first: Batch) -> dict[ir.Value, int]:
        """Return the bytes of values of a sample by a run that gives their sizes instead of them."""
        copy = self._model.clone()
        by_name = {value.name: value for node in copy.graph for value in node.outputs}
        counters = [ir.Node("", "Size", [by_name[value.name]]) for value in values]
        copy.graph.extend(counters)
        imports, functions = walk.all_imports(copy), copy.functions
        outputs = [node.outputs[0] for node in counters]
        piece = _Piece(nodes_between(outputs, set(copy.graph)), outputs, list(copy.graph.inputs), frozenset())
        model = fragment(piece.nodes, outputs, piece.inputs, imports, functions)
        given = {value.name: array for value, array in self._given(first).items()}
        with self._backend.open(model, threads=self._threads) as session:
            counts = session.run({f"in{i}": given[value.name] for i, value in enumerate(piece.inputs)})
        return {value: int(counts[f"out{i}"]) * _item_bytes(value) for i, value in enumerate(values)}


def _numbers(array: Any, value: ir.Value) -> Array:
    """Return a value as numbers that numpy reduces.

    Raises:
        PassError: It holds none.
    """
    if not isinstance(array, np.ndarray) or array.dtype.kind in "OSUc":
        raise PassError(f"`{value.name}` cannot be observed: it holds no numbers", hint="leave it out")
    if array.dtype.kind in "fiu" and array.dtype != np.float16:
        return array
    return array.astype(np.float32)


def inferred_bytes(values: Iterable[ir.Value], given: Mapping[ir.Value, Array]) -> dict[ir.Value, int | None]:
    """Return how many bytes values take where inputs are as given, None where shapes do not tell."""
    known: dict[str, int] = {}
    for value, array in given.items():
        for size, actual in zip(dims_of(value) or (), array.shape, strict=False):
            if isinstance(size, Dim) and size.atom is not None:
                known[str(size.atom.args[0]) if size.atom.kind == "name" else str(size.atom)] = actual
    return {value: given[value].nbytes if value in given else _bytes(value, known) for value in values}


def _bytes(value: ir.Value, known: Mapping[str, int]) -> int | None:
    """Return the bytes of a value where inputs have known sizes, or None where they do not tell."""
    constant = constant_content(value)
    if constant is not None:
        return constant.nbytes
    dims = dims_of(value)
    if dims is None:
        return None
    try:
        sizes = [evaluate(size, known) for size in dims]
    except ZeroDivisionError:
        return None
    counted = [size for size in sizes if size is not None]
    return math.prod(counted) * _item_bytes(value) if len(counted) == len(sizes) else None


def _atoms(size: Size | str) -> Iterator[Atom]:
    """Yield what a size is made of, operands of operations included."""
    for monomial, _ in size.terms if isinstance(size, Dim) else ():
        for atom in monomial:
            yield atom
            for operand in atom.args:
                yield from _atoms(operand)


def _item_bytes(value: ir.Value) -> int:
    known = value.dtype not in (None, ir.DataType.UNDEFINED, ir.DataType.STRING)
    return math.ceil(value.dtype.itemsize) if value.dtype is not None and known else _USUAL_ITEM_BYTES


def _groups(wanted: Iterable[_Wanted], sizes: Mapping[ir.Value, int], limit: int) -> list[list[_Wanted]]:
    """Return values, in order, in groups that together stay within the limit wherever one value does."""
    groups: list[list[_Wanted]] = []
    held = 0
    for one in wanted:
        size = sizes[one.value]
        if not groups or held + size > limit:
            groups.append([])
            held = 0
        groups[-1].append(one)
        held += size
    return groups


@dataclass
class _Piece:
    """A part of the model that is run at once.

    Attributes:
        nodes: What is run, in order.
        outputs: What is looked at, and what later pieces read.
        inputs: What it reads.
        kept: What is known after it that later pieces read.
    """

    nodes: list[ir.Node]
    outputs: list[ir.Value]
    inputs: list[ir.Value]
    kept: frozenset[ir.Value]

    def model(self, whole: ir.Model, held: Mapping[ir.Value, Array] | None = None) -> ir.Model:
        """Return it as a model of its own; inputs whose type nobody inferred have that of what is held."""
        model = fragment(self.nodes, self.outputs, self.inputs, walk.all_imports(whole), whole.functions)
        for declared, value in zip(model.graph.inputs, self.inputs, strict=True):
            if declared.type is None and held is not None:
                declared.type = ir.TensorType(ir.DataType.from_numpy(held[value].dtype))
        return model

    def feeds(self, held: Mapping[ir.Value, Array]) -> dict[str, Array]:
        """Return what it reads, by the names of its inputs."""
        return {f"in{index}": held[value] for index, value in enumerate(self.inputs)}

    def results(self, outputs: Mapping[str, Array]) -> Iterator[tuple[ir.Value, Array]]:
        """Yield what it computed, by value."""
        return ((value, outputs[f"out{index}"]) for index, value in enumerate(self.outputs))


def _pieces(model: ir.Model, groups: Sequence[Sequence[_Wanted]]) -> list[_Piece]:
    """Return what computes each group of values once those before are there; what none hangs on is in no piece."""
    left = set(model.graph)
    nodes = []
    for group in groups:
        nodes.append(nodes_between([one.value for one in group], left))
        left.difference_update(nodes[-1])
    pieces: list[_Piece] = []
    later: set[ir.Value] = set()
    for group, own in reversed(list(zip(groups, nodes, strict=True))):
        made = [value for node in own for value in node.outputs if value.name]
        read = dict.fromkeys(value for node in own for value in values_read(node))
        asked = {one.value for one in group}
        outputs = [value for value in made if value in asked or value in later]
        inputs = [value for value in read if value not in set(made) and constant_content(value) is None]
        pieces.append(_Piece(own, outputs, inputs, frozenset(later)))
        later |= set(inputs)
        later |= asked  # looked at only now, if made by an earlier piece
        later -= set(made)
    return pieces[::-1]
