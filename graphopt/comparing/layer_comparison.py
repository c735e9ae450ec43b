"""Two models compared by layers, on the same samples: where their values part, and how far."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array, Backend
from graphopt.choices import ModelLike, find_backend, find_target, open_model
from graphopt.comparing.layer_blame import Blame
from graphopt.comparing.layer_errors import Difference, LayerComparison, LayerError, Left
from graphopt.comparing.layer_pairs import OriginIndex, pair_values
from graphopt.comparing.layer_values import Reading, ReadValues, read_values, values_inside
from graphopt.comparing.structural_differences import is_identical, origin_of, structural_differences
from graphopt.comparison import OutputError
from graphopt.data import Dataset, open_data
from graphopt.errors import BackendError, UsageError
from graphopt.evaluation import SCORING_BATCH
from graphopt.fragment import fragment, nodes_between
from graphopt.generated import generated_feeds
from graphopt.observation import inferred_bytes
from graphopt.progress import Display
from graphopt.shapes import infer_shapes
from graphopt.verify import problems_of
from graphopt.walkthrough import Walkthrough

__all__ = ["Difference", "LayerComparison", "LayerError", "Left", "compare_layers"]

# Enough for an SQNR that is right to a dB or so, in seconds; whoever wants to know better asks for more.
LAYER_SAMPLES = 32
# Samples on which the judges of the first model are compared with each other.
_JUDGED_SAMPLES = 8
# Values of all samples looked at between two runs of a part of the model; a single one may take more.
_GROUP_BYTES = 128 << 20
# Weights read by a part of the model, of which a runtime has copies while it runs that part.
_WEIGHT_BYTES = 256 << 20
# What is assumed of a value whose size nobody inferred.
_USUAL_BYTES = 1 << 20
# Elements whose errors are computed at once: few enough that, in float64, they stay in a cache.
_CHUNK_ELEMENTS = 1 << 16
# Floats of fewer bits come with more rounding: the tolerance is that of the coarser side.
_COARSENESS = ("float64", "float32", "float16", "bfloat16")


def compare_layers(
    a: ModelLike,
    b: ModelLike,
    *,
    data: Any = None,
    backend: str | Backend | None = None,
    other_backend: str | Backend | None = None,
    samples: int = LAYER_SAMPLES,
    tolerance: float | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: bool = False,
) -> LayerComparison:
    """Compare the values inside two models, matched by origin, on the same samples, as deployed.

    Values are matched by their names, by the origins of the nodes that make them (which models have that were made of
    one another in this process), and by what reads them. Codes are compared as what they mean. The models are run in
    pieces, so that memory stays bounded.

    Args:
        a: A model or path; the reference.
        b: Another, made from it.
        data: Samples, as for `optimize`, or opened; made-up inputs where None.
        backend: Backend, or its text, for both.
        other_backend: The same for the second where it is another.
        samples: How many samples to run at most, the first ones.
        tolerance: Largest absolute error that is no difference; rounding of the dtype where None.
        seed: Seed of made-up inputs.
        threads: Threads for the backends; 0 leaves it to them.
        progress: Show progress on stderr.

    Returns:
        What was found. Whatever is wrong with the second model is part of it and raises nothing.

    Raises:
        ModelError: A file cannot be read.
        DataError: The data do not fit the first model.
        BackendError: The runtime is missing, or refuses the first model.
    """
    if samples < 1:
        raise UsageError(f"layers cannot be compared on {samples} samples", hint="1 or more")
    runtime = _runtime(backend)
    other = _runtime(other_backend) if other_backend is not None else runtime
    display = Display(progress)
    with display.stage("reading the models"):
        sides = _Side(open_model(a), runtime), _Side(_open_second(b), other)
    with display.stage("reading the data"):
        feeds = _open(sides[0].model, data, seed, display).take(samples)
    run = _Run(sides[0], sides[1], feeds, data is not None, tolerance, threads, display)
    try:
        return run.run()
    except BackendError as error:
        if data is not None:
            raise
        what = f"the first model does not run on made-up inputs: {error.message}"
        raise BackendError(what, hint="give real ones with `--data`") from error


def _open_second(model: ModelLike) -> ir.Model:
    """Return the second model; one in memory that is too broken to be copied as it is: nothing will be run of it."""
    try:
        return open_model(model)
    except (RuntimeError, ValueError):
        if not isinstance(model, ir.Model) or not problems_of(model):
            raise
        return model


def _runtime(backend: str | Backend | None) -> Backend:
    return find_backend(backend, find_target(None)) if backend is None or isinstance(backend, str) else backend


def _open(model: ir.Model, data: Any, seed: int, display: Display) -> Dataset:
    if isinstance(data, Dataset):
        return data
    if data is not None:
        return open_data(data, model, advance=display.advance)
    return open_data(generated_feeds(model, seed), model)


@dataclass
class _Side:
    """One of the two models, and what runs it."""

    model: ir.Model
    backend: Backend
    read: ReadValues = field(default_factory=ReadValues)


class _Run:
    """One comparison; each method is a stage.

    Args:
        a: The first side.
        b: The second.
        data: The samples.
        are_real: Whether the samples were given, or else made up.
        tolerance: Largest absolute error that is no difference, or None.
        threads: Threads for the backends.
        display: Shows the stages.
    """

    def __init__(
        self,
        a: _Side,
        b: _Side,
        data: Dataset,
        are_real: bool,
        tolerance: float | None,
        threads: int,
        display: Display,
    ) -> None:
        self._a, self._b, self._data = a, b, data
        self._tolerance, self._threads, self._display = tolerance, threads, display
        self._found = LayerComparison(samples=len(data), source=data.name if are_real else None)
        self._errors: dict[ir.Value, OutputError] = {}
        self._index = OriginIndex(a.model, b.model)

    def run(self) -> LayerComparison:
        """Run every stage."""
        found = self._found
        with self._display.stage("looking for differences in structure"):
            found.differences = structural_differences(self._a.model, self._b.model, self._index)
            found.cannot_run = next((one.what for one in found.differences if _forbids_runs(one)), None)
            if found.cannot_run is None:
                found.identical = is_identical(self._a.model, self._b.model)
                infer_shapes(self._a.model)
                infer_shapes(self._b.model)
            self._a.read, self._b.read = read_values(self._a.model), read_values(self._b.model)
        pairs = pair_values(self._a.model, self._b.model, self._a.read, self._b.read)
        if found.cannot_run is None:
            self._measure(pairs)
        self._fill(pairs)
        if found.cannot_run is None:
            self._compare_other_outputs()
            self._judge()
            self._find_unsteady()
        return found

    def _measure(self, pairs: Mapping[ir.Value, ir.Value]) -> None:
        """Compare every pair; where the second model fails to run, those before."""
        readings = [(self._a.read.readings[one], self._b.read.readings[two]) for one, two in pairs.items()]
        constant = [pair for pair in readings if pair[0].constant and pair[1].constant]
        self._compare_constants(constant)
        apart = set(map(id, constant))
        groups = self._groups([pair for pair in readings if id(pair) not in apart])
        with (
            Walkthrough(self._a.model, self._data, self._a.backend, threads=self._threads) as left,
            Walkthrough(self._b.model, self._data, self._b.backend, threads=self._threads) as right,
            self._display.stage("comparing", sum(map(len, groups)), "values"),
        ):
            for group in groups:
                self._compare_group(group, left, right)
                if self._found.cannot_run is not None:
                    return
                self._display.advance(len(group), "values")

    def _compare_group(self, group: Sequence[tuple[Reading, Reading]], left: Walkthrough, right: Walkthrough) -> None:
        batches = right.batches(*(two.asked for _, two in group))
        for arrays in left.batches(*(one.asked for one, _ in group)):
            try:
                others = next(batches)
            except BackendError as error:
                self._found.cannot_run = f"the second model does not run: {error.message}"
                return
            for (one, two), array, other in zip(group, arrays, others, strict=True):
                self._update(one, two, array, other)

    def _update(self, one: Reading, two: Reading, array: Array, other: Array) -> None:
        error = self._errors.setdefault(one.value, OutputError(one.value.name or ""))
        numbers, others = one.numbers(array), two.numbers(other)
        # What a pass left under its name has its shape, too.
        _add(error, numbers, others if one.value.name == two.value.name else _in_rows_of(numbers, others))

    def _compare_constants(self, pairs: Sequence[tuple[Reading, Reading]]) -> None:
        """Compare what is computed from constants by itself: fed to later parts, it would be no constant there."""
        for start in self._groups(list(pairs)):
            first = _constants(self._a, [one.asked for one, _ in start], self._threads)
            try:
                second = _constants(self._b, [two.asked for _, two in start], self._threads)
            except BackendError as error:
                self._found.cannot_run = f"the second model does not run: {error.message}"
                return
            for (one, two), array, other in zip(start, first, second, strict=True):
                self._update(one, two, array, other)

    def _groups(self, readings: Sequence[tuple[Reading, Reading]]) -> list[list[tuple[Reading, Reading]]]:
        """Return pairs in groups whose values take no more than the limit over all samples, if single ones do not."""
        feeds = next(iter(self._data.take(1).batches(1))).feeds
        given = {value: feeds[value.name] for value in self._a.model.graph.inputs if value.name in feeds}
        sizes = inferred_bytes([one.value for one, _ in readings], given)
        weights = _weights_up_to(self._a.model)
        groups: list[list[tuple[Reading, Reading]]] = []
        held = start = 0
        for pair in readings:
            known, read = sizes[pair[0].value], weights.get(pair[0].value, 0)
            size = (known if known is not None else _USUAL_BYTES) * len(self._data)
            if not groups or held + size > _GROUP_BYTES or read - start > _WEIGHT_BYTES:
                groups.append([])
                held, start = 0, read
            groups[-1].append(pair)
            held += size
        return groups

    def _fill(self, pairs: Mapping[ir.Value, ir.Value]) -> None:
        """Make the list of layers of the errors, and count what has none."""
        a, b, found = self._a, self._b, self._found
        blame = Blame(a.model, b.model, self._index, pairs, a.read, b.read, self._errors)
        found.layers = blame.layers(len(self._data), self._tolerance)
        found.differences += blame.left_alone()
        outputs = {one.name: one.error for one in found.layers if one.is_output}
        found.outputs.outputs.update(outputs)
        found.outputs.samples, found.outputs.source = found.samples, found.source
        found.left = Left(
            values=len(a.read.readings) + len(a.read.no_numbers) + len(a.read.hidden),
            unmatched=sum(value not in pairs for value in a.read.readings),
            added=len(b.read.readings) - len(pairs),
            inside_kernels=len(b.read.hidden),
            nested=sum(1 for _ in values_inside(a.model)),
            no_numbers=len(a.read.no_numbers),
        )

    def _compare_other_outputs(self) -> None:
        """Compare the outputs that are no layers: those that became constants, and what holds texts or sequences."""
        others = {value.name for value in self._b.model.graph.outputs}
        left = [one for one in self._a.model.graph.outputs if one not in self._errors and one.name in others]
        errors = {one.name or "": OutputError(one.name or "") for one in left}
        if not errors:
            return
        with self._display.stage("comparing outputs that no operator computes"):
            first = self._outputs_of(self._a, errors)
            try:
                second = self._outputs_of(self._b, errors)
            except BackendError as error:
                self._found.cannot_run = f"the second model does not run: {error.message}"
                return
        for arrays, rest in zip(first, second, strict=True):
            for name, one in errors.items():
                one.update(arrays[name], rest[name])
        self._found.outputs.outputs.update(errors)
        for value in left:
            one = errors[value.name or ""]
            if not one.within(self._tolerance):
                how = one.mismatch or f"off by up to {one.max_abs:.3g} of {one.peak:.3g}"
                origin = origin_of(value.producer())
                self._found.differences.append(
                    Difference("output", one.name, f"output `{one.name}` differs: {how}", origin=origin)
                )

    def _outputs_of(self, side: _Side, names: Iterable[str]) -> list[dict[str, Any]]:
        """Return some outputs of a model that is run as a whole, batch by batch."""
        with side.backend.open(side.model, threads=self._threads) as session:
            runs = [batch.all_real(session.run(batch.feeds)) for batch in self._data.batches(SCORING_BATCH)]
        return [{name: run[name] for name in names} for run in runs]

    def _judge(self) -> None:
        """Run the first model in another way where an output differs, to see whether its judges agree."""
        asked = [one for one in self._found.layers if one.on_the_way]
        if not asked:
            return
        a, same = self._a, self._b.backend == self._a.backend
        judge = a.backend if same else self._b.backend
        name = judge.describe()
        self._found.judges = (a.backend.describe(), f"{name} without its optimizations" if same else name)
        readings = {reading.value.name: reading for reading in a.read.readings.values()}
        chosen = [readings[one.name] for one in asked]
        errors = {reading.value.name: OutputError("") for reading in chosen}
        data = self._data.take(_JUDGED_SAMPLES)
        try:
            with (
                self._display.stage("asking whether the judges agree on the first model"),
                Walkthrough(a.model, data, a.backend, threads=self._threads) as left,
                Walkthrough(a.model, data, judge, threads=self._threads, optimize=not same) as right,
            ):
                for group in self._groups([(one, one) for one in chosen]):
                    values = [one.asked for one, _ in group]
                    for arrays, others in zip(left.batches(*values), right.batches(*values), strict=True):
                        for (one, _), array, other in zip(group, arrays, others, strict=True):
                            _add(errors[one.value.name], one.numbers(array), one.numbers(other))
        except BackendError as error:
            self._found.judges = None
            what = f"nobody else runs the first model to judge by: {error.message}"
            self._found.differences.append(Difference("judges", "", what, is_fault=False))
            return
        self._found.layers = [
            one if one.name not in errors else _judged(one, errors[one.name].max_abs) for one in self._found.layers
        ]

    def _find_unsteady(self) -> None:
        """Say so where a model gives other outputs when it is run a second time, though no operator in it is random."""
        for side, which in ((self._a, "first"), (self._b, "second")):
            if any(walk.is_random(node) for node in walk.every_node(side.model)):
                continue
            name = _unsteady_output(side, self._data.take(1), self._threads)
            if name is not None:
                what = f"output `{name}` of the {which} model differs when it is run again on the same sample"
                self._found.differences.append(Difference("unsteady", name, what, is_fault=side is self._b))


def _weights_up_to(model: ir.Model) -> dict[ir.Value, int]:
    """Return the bytes of constants that nodes up to the one that makes a value read, in the order of the graph."""
    total, found = 0, {}
    for node in model.graph:
        total += sum(tensor.nbytes for value in node.inputs if (tensor := walk.constant_tensor(value)) is not None)
        found.update(dict.fromkeys(node.outputs, total))
    return found


def _unsteady_output(side: _Side, data: Dataset, threads: int) -> str | None:
    try:
        with side.backend.open(side.model, threads=threads) as session:
            for batch in data.batches(1):
                first, second = session.run(batch.feeds), session.run(batch.feeds)
                for name, value in first.items():
                    error = OutputError(name)
                    error.update(value, second[name])
                    if not error.within():
                        return name
    except BackendError:
        return (
            None  # it ran in pieces, and was compared; what keeps it from running whole shows in a comparison of files
        )
    return None


def _forbids_runs(one: Difference) -> bool:
    """Return whether a second model cannot be run: on other inputs, or with values read before they are made."""
    return one.is_fault and one.kind in ("input", "malformed")


def _judged(one: LayerError, error: float) -> LayerError:
    return replace(one, judges_error=error)


def _constants(side: _Side, values: Sequence[ir.Value], threads: int) -> list[Array]:
    nodes = nodes_between(values, set(side.model.graph))
    model = fragment(nodes, values, [], walk.all_imports(side.model), side.model.functions)
    with side.backend.open(model, threads=threads) as session:
        results = session.run({})
    return [results[f"out{place}"] for place in range(len(values))]


def _add(error: OutputError, array: Array, other: Array) -> None:
    """Add values of both sides to an error, floats of different precision as numbers, large ones piece by piece."""
    coarser = ""
    if isinstance(array, np.ndarray) and isinstance(other, np.ndarray) and array.dtype != other.dtype:
        names = [str(one.dtype) for one in (array, other)]
        if all(name in _COARSENESS for name in names):
            coarser = max(names, key=_COARSENESS.index)
            array, other = array.astype(np.float64), other.astype(np.float64)
    for piece, rest in _pieces(array, other):
        error.update(piece, rest)
    if coarser:
        error.dtype = coarser


def _in_rows_of(array: Array, other: Array) -> Array:
    """Return the other side in the shape of the first where it has the same rows along other axes."""
    both = isinstance(array, np.ndarray) and isinstance(other, np.ndarray) and array.ndim and other.ndim
    if not both or array.ndim == other.ndim or array.size != other.size or array.shape[-1] != other.shape[-1]:
        return other
    return other.reshape(array.shape)


def _pieces(array: Array, other: Array) -> Iterator[tuple[Array, Array]]:
    """Yield both sides some rows at a time; rows stay whole, as it is told where the largest of each is."""
    alike = isinstance(array, np.ndarray) and isinstance(other, np.ndarray) and array.shape == other.shape
    if not alike or array.ndim == 0 or array.size <= _CHUNK_ELEMENTS:
        yield array, other
        return
    shape = (-1, array.shape[-1]) if array.ndim > 1 else (-1,)
    rows, others = array.reshape(shape), other.reshape(shape)
    step = max(1, len(rows) * _CHUNK_ELEMENTS // array.size)
    for start in range(0, len(rows), step):
        yield rows[start : start + step], others[start : start + step]
