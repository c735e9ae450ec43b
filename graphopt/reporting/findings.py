"""What a report shows besides the figures of the run, collected once for every form it is written in."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import onnx_ir as ir

from graphopt import options, walk
from graphopt.backend import Array, Backend, Feeds, Inspectable
from graphopt.comparing.layer_comparison import LayerComparison, compare_layers
from graphopt.errors import GraphoptError, in_words
from graphopt.explaining.explanation import Explanation, explain
from graphopt.progress import Display
from graphopt.report import NOT_RUN, Report
from graphopt.reporting.trainings import Training, trainings_of
from graphopt.reporting.weight_histograms import WeightHistograms, weight_histograms
from graphopt.reproducer import content_hash
from graphopt.versions import all_versions

T = TypeVar("T")

# Samples that layers are compared on: more move the figures by less than a dB.
LAYER_SAMPLES = 16
# From this size on a sample takes seconds and profiles gigabytes of disk: fewer samples, and no profile.
_LARGE, _HUGE = 256 << 20, 2 << 30
_SAMPLES_OF_LARGE, _SAMPLES_OF_HUGE = 4, 1
# Runs whose times are averaged, and of a model so slow (in ms) that one has to do.
_RUNS, _SLOW_MS = 5, 50.0
# Facts of notes: which share of a layer's outputs is noise; and what layers that were tried by themselves cost.
_PREDICTED, _KEPT = "predicted_error", "kept"


@dataclass(frozen=True)
class OperatorShare:
    """What the nodes of one operator come to, before and after; weights count for the operator that reads them."""

    operator: str
    count_before: int
    count_after: int
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True)
class OperatorTime:
    """What the kernels of one operator take in a run, in ms, and how many ran; what runtimes fuse counts as one."""

    kernel: str
    ms_before: float
    ms_after: float
    count_before: int
    count_after: int


@dataclass(frozen=True)
class LayerCost:
    """What a pass found a single layer to cost.

    Attributes:
        layer: The layer.
        pass_name: The pass.
        predicted: Which share of the layer's outputs is expected to be noise, from 0 to 1, or None.
        measured: How far the model's outputs move with only this layer changed (KL in nats, or noise), or None.
    """

    layer: str
    pass_name: str
    predicted: float | None
    measured: float | None


@dataclass(frozen=True)
class Ingredient:
    """A file the run read or wrote: what it was for, where it lies, its size and SHA-256."""

    role: str
    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Repetition:
    """What it takes to do the run again.

    Attributes:
        command: The command, or None where something was given in memory, which no command line can say.
        why: Why there is none, or nothing.
        files: What was read and written.
        versions: Name to version of what decides what a run does.
        seconds: What all steps took.
    """

    command: str | None
    why: str
    files: tuple[Ingredient, ...]
    versions: Mapping[str, str]
    seconds: float


@dataclass
class Findings:
    """Everything a report shows besides the figures of the run.

    Attributes:
        operators: What the model is made of, the largest first.
        kernels: Time by kind of kernel, the slowest first; empty where it was not measured.
        layers: The original and the result compared by layers, or None.
        sensitivity: What passes found single layers to cost, the dearest first.
        trainings: How losses went, of each training; the JSON form has it among the remarks of its step.
        weights: How weights are distributed, or None.
        coverage: What the target runs in integers, or None.
        repetition: How to do it again.
        not_measured: What is not there, by the name of its attribute, and why.
    """

    repetition: Repetition
    operators: tuple[OperatorShare, ...] = ()
    kernels: tuple[OperatorTime, ...] = ()
    layers: LayerComparison | None = None
    sensitivity: tuple[LayerCost, ...] = ()
    trainings: tuple[Training, ...] = ()
    weights: WeightHistograms | None = None
    coverage: Explanation | None = None
    not_measured: dict[str, str] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; keys are stable, null stands for what was not measured."""
        return {
            "operators": [asdict(one) for one in self.operators],
            "kernels": [asdict(one) for one in self.kernels],
            "layers": self.layers.as_dict() if self.layers is not None else None,
            "sensitivity": [asdict(one) for one in self.sensitivity],
            "weights": asdict(self.weights) if self.weights is not None else None,
            "coverage": self.coverage.as_dict() if self.coverage is not None else None,
            "repetition": asdict(self.repetition),
            "not_measured": dict(self.not_measured),
        }


@dataclass(frozen=True)
class Material:
    """What findings are made of.

    Attributes:
        original: The model as it was, its nodes stamped with origins.
        result: What became of it.
        report: The figures of the run.
        backend: What ran both.
        asked_backend: The text it was asked for by, or None where it is the target's own.
        feeds: Inputs of one sample each; none where nothing may be run.
        source: What the inputs were taken from; None where they are made up.
        files: What was read and written: what for, and where it lies.
        command: The command that repeats the run, or None.
        why_no_command: Why there is none.
        threads: Threads for the backend.
        display: Shows what is being done.
    """

    original: ir.Model
    result: ir.Model
    report: Report
    backend: Backend
    asked_backend: str | None
    feeds: Sequence[Mapping[str, Array]]
    source: str | None
    files: Sequence[tuple[str, Path]]
    command: str | None
    why_no_command: str
    threads: int
    display: Display


def collect(given: Material) -> Findings:
    """Return all there is to show; what cannot be measured is named with its reason, and fails nothing."""
    report = given.report
    found = Findings(_repetition(given), operators=operator_shares(given.original, given.result))
    found.sensitivity = _layer_costs(report)
    found.trainings = trainings_of(report)
    if not found.sensitivity:
        why = "no pass of this run says what single layers cost; `graphopt sensitivity` measures it"
        found.not_measured["sensitivity"] = why

    def attempt(name: str, stage: str, work: Callable[[], T]) -> T | None:
        """Return what a piece of work finds; whatever goes wrong becomes a reason, for the run itself is done."""
        try:
            with given.display.stage(stage):
                return work()
        except GraphoptError as error:
            found.not_measured[name] = error.message
        except Exception as error:
            found.not_measured[name] = f"a fault of graphopt: {in_words(error)}"
        return None

    found.weights = attempt(
        "weights", "looking at weights", lambda: weight_histograms(given.original, given.result, given.backend)
    )
    if not given.feeds:
        why = "no model was run" if report.scored == NOT_RUN else "the original runs on no inputs there are"
        found.not_measured |= dict.fromkeys(("kernels", "layers"), why)
    else:
        found.kernels = attempt("kernels", "profiling", lambda: _kernel_times(given)) or ()
        found.layers = attempt("layers", "comparing layers", lambda: _layers(given))
        if found.layers is not None and found.layers.cannot_run is not None:
            found.not_measured["layers"] = found.layers.cannot_run
    found.coverage = attempt("coverage", "explaining", lambda: _coverage(given))
    if found.coverage is not None and not (found.coverage.findings or found.coverage.quantizable):
        found.not_measured["coverage"] = "nothing is quantized, and nothing could be"
    return found


def operator_shares(before: ir.Model, after: ir.Model) -> tuple[OperatorShare, ...]:
    """Return the number of nodes and the bytes of weights by operator, the largest first."""
    (old, old_bytes), (new, new_bytes) = _by_operator(before), _by_operator(after)
    names = dict.fromkeys([*old, *new, *old_bytes, *new_bytes])
    rows = [OperatorShare(name, old[name], new[name], old_bytes[name], new_bytes[name]) for name in names]
    return tuple(sorted(rows, key=lambda row: (-max(row.bytes_before, row.bytes_after), -row.count_before)))


def _by_operator(model: ir.Model) -> tuple[Counter[str], Counter[str]]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    counted: set[int] = set()
    nodes = list(walk.every_node(model))
    # Whoever only asks for the shape of a weight does not read it, unless nobody else does.
    for node in sorted(nodes, key=lambda node: walk.is_onnx_op(node, "Shape", "Size", "CastLike")):
        counts[node.op_type] += 1
        for value in node.inputs:
            tensor = walk.constant_tensor(value)
            if tensor is not None and id(tensor) not in counted:
                counted.add(id(tensor))
                sizes[_reader(node).op_type] += tensor.nbytes
    return counts, sizes


def _reader(node: ir.Node) -> ir.Node:
    """Return what reads a constant: behind nodes that only decode it or hand it on."""
    while walk.is_onnx_op(node, "DequantizeLinear", "Cast", "Reshape", "Transpose", "Identity", "Constant"):
        readers = node.outputs[0].uses() if node.outputs else ()
        first = next(iter(readers), None)
        if first is None:
            return node
        node = first.node
    return node


def _layer_costs(report: Report) -> tuple[LayerCost, ...]:
    found = []
    for note in (note for step in report.steps for note in step.notes):
        if note.node is not None and _PREDICTED in note.facts:
            found.append(LayerCost(note.node, note.pass_name, float(note.facts[_PREDICTED]), None))
        kept = [
            one for one in note.facts.get(_KEPT) or () if isinstance(one, Mapping) and {"layer", "cost"} <= one.keys()
        ]
        found += [LayerCost(one["layer"], note.pass_name, one.get("predicted"), float(one["cost"])) for one in kept]
    return tuple(sorted(found, key=lambda one: (-(one.measured or 0.0), -(one.predicted or 0.0))))


def _kernel_times(given: Material) -> tuple[OperatorTime, ...]:
    backend = given.backend
    if not isinstance(backend, Inspectable):
        raise GraphoptError(f"backend `{backend.describe()}` does not tell what it runs", hint="another `--backend`")
    if given.report.before.bytes > _HUGE:
        raise GraphoptError("the model is too large to be profiled for a report", hint="`graphopt bench --profile`")
    runs = _runs(given.report)
    before = _times(backend, given.original, given.feeds[0], given.threads, runs)
    after = _times(backend, given.result, given.feeds[0], given.threads, runs)
    rows = []
    for name in dict.fromkeys([*before, *after]):
        (ms_before, count_before), (ms_after, count_after) = (side.get(name, (0.0, 0)) for side in (before, after))
        rows.append(OperatorTime(name, ms_before, ms_after, count_before, count_after))
    return tuple(sorted(rows, key=lambda row: -max(row.ms_before, row.ms_after)))


def _runs(report: Report) -> int:
    slowest = max((side.latency_ms or 0.0) for side in (report.before, report.after) if side is not None)
    return _RUNS if slowest <= _SLOW_MS else 1


def _times(
    backend: Inspectable, model: ir.Model, feeds: Feeds, threads: int, runs: int
) -> Mapping[str, tuple[float, int]]:
    """Return milliseconds and number of kernels by operator, whichever of its domains a runtime took it from."""
    milliseconds: dict[str, float] = defaultdict(float)
    counts: Counter[str] = Counter()
    for kernel in backend.kernels(model.clone(), feeds, threads=threads, runs=runs):
        if kernel.milliseconds:
            name = kernel.op.rpartition("::")[2]
            milliseconds[name] += kernel.milliseconds
            counts[name] += 1
    return {name: (time, counts[name]) for name, time in milliseconds.items()}


def _layers(given: Material) -> LayerComparison:
    size = given.report.before.bytes
    samples = LAYER_SAMPLES if size <= _LARGE else _SAMPLES_OF_LARGE if size <= _HUGE else _SAMPLES_OF_HUGE
    found = compare_layers(
        given.original.clone(),
        given.result.clone(),
        data=[dict(feed) for feed in given.feeds[:samples]],
        backend=_as_text(given.backend),
        samples=samples,
        threads=given.threads,
    )
    found.source = found.outputs.source = given.source  # a list of feeds does not say where they are from
    return found


def _coverage(given: Material) -> Explanation:
    if given.report.before.bytes > _HUGE:
        raise GraphoptError("the model is too large to be proven for a report", hint="`graphopt explain`")
    found = explain(
        given.result.clone(),
        target=given.report.target,
        data=[dict(given.feeds[0])] if given.feeds else None,
        backend=given.asked_backend,
        threads=given.threads,
        runs=_runs(given.report),
    )
    if found.inputs is None:
        return found
    return replace(found, inputs="made-up inputs" if given.source is None else f"a sample of `{given.source}`")


def _repetition(given: Material) -> Repetition:
    files = [
        Ingredient(role, str(path), path.stat().st_size, content_hash(path))
        for role, path in given.files
        if path.is_file()
    ]
    seconds = sum(step.seconds for step in given.report.steps)
    return Repetition(given.command, given.why_no_command, tuple(files), all_versions(), seconds)


def _as_text(backend: Backend) -> str:
    """Return the text that asks for a backend with its options."""
    return ":".join(filter(None, (backend.name, options.to_text(backend))))
