"""Which layers a lossy pass hurts: it is applied to one layer at a time, and what that costs measured."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatchcase
from typing import Any

import numpy as np

from graphopt import options, registry
from graphopt.authoring import Attempt, Context, Guarantee, Note, Pass
from graphopt.backend import Array
from graphopt.candidates import CandidateJudge
from graphopt.choices import ModelLike
from graphopt.errors import BackendError, UsageError
from graphopt.layers import Layer, layers_of, name_nodes
from graphopt.metrics import Metric
from graphopt.optimization import Run
from graphopt.pipeline import Pipeline, Step
from graphopt.request import Request
from graphopt.rewriter import Rewriter
from graphopt.standing import Standing

DEFAULT_SAMPLES = 64
# How the row of all nodes that read no weight is called.
OTHERS = "(other nodes)"
# The fact of a note that says which share of a layer's outputs is expected to be noise.
PREDICTED = "predicted_error"
# The fact of a note that says how many weights are stored in each format.
STORED = "stored"
# The fact of a note that says which share of a layer's outputs is noise once a share of it is gone: {share: error}.
CURVE = "error_curve"


@dataclass(frozen=True)
class LayerSensitivity:
    """What it costs to apply the pass to one layer and nothing else.

    Attributes:
        name: The layer; `OTHERS` for everything that reads no weight.
        operators: Operators of its nodes.
        elements: How many numbers its weight holds.
        standing: How the model stands with only this layer changed, or None where it does not run.
        predicted: The share of the layer's own outputs that the pass expects to be noise, from 0 to 1; None of passes
            that say none.
        failure: Why the model does not run, or None.
        stored: The formats its weight is stored in, as the pass says it; empty where it does not.
        curve: Of a pass that chooses how much goes of each layer: the share of its outputs that is expected to be noise
            by the share of it that is gone; empty of other passes.
    """

    name: str
    operators: tuple[str, ...]
    elements: int
    standing: Standing | None
    predicted: float | None
    failure: str | None = None
    stored: tuple[str, ...] = ()
    curve: Mapping[float, float] = field(default_factory=dict)

    @property
    def cost(self) -> float:
        """What rows are sorted by."""
        return self.standing.divergence if self.standing is not None else float("inf")


@dataclass(frozen=True)
class Sensitivity:
    """What `sensitivity` returns.

    Attributes:
        analysed: The pass, as text.
        rows: One for each layer the pass changes, the most sensitive first.
        left: Layers the pass leaves alone, each with its reason.
        whole: How the model stands with the pass applied to all of it.
        baseline: What the model scores without the pass.
        rank_correlation: Spearman's, of predicted and measured; None of fewer than two layers, or all alike.
        samples: How many samples it was measured on.
        source: Where they came from.
        metric_types: Metric name to its class, for showing values.
    """

    analysed: str
    rows: tuple[LayerSensitivity, ...]
    left: tuple[tuple[str, str], ...]
    whole: Standing
    baseline: Mapping[str, float]
    rank_correlation: float | None
    samples: int
    source: str
    metric_types: Mapping[str, type[Metric]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return everything as JSON values."""
        return {
            "pass": self.analysed,
            "samples": self.samples,
            "source": self.source,
            "measured": self.whole.kind,
            "spearman": self.rank_correlation,
            "baseline": dict(self.baseline),
            "whole": _as_values(self.whole),
            "layers": [
                {
                    "layer": row.name,
                    "operators": list(row.operators),
                    "elements": row.elements,
                    "predicted": row.predicted,
                    "stored": list(row.stored),
                    "curve": {f"{share:g}": error for share, error in row.curve.items()},
                    "failure": row.failure,
                    **(_as_values(row.standing) if row.standing is not None else {}),
                }
                for row in self.rows
            ],
            "left": [{"layer": name, "why": why} for name, why in self.left],
        }


def _as_values(standing: Standing) -> dict[str, Any]:
    values = asdict(standing)
    return {name: values[name] for name in ("divergence", "outputs", "metrics")}


def sensitivity(
    model: ModelLike,
    passes: str | Pipeline | Pass | Sequence[str | Pass],
    *,
    data: Any,
    evaluation: Any = None,
    labels: str | None = None,
    metric: str | None = None,
    samples: int = DEFAULT_SAMPLES,
    target: str | None = None,
    backend: str | None = None,
    set_dims: Mapping[str, int] | None = None,
    set_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    threads: int = 0,
    progress: bool = False,
    on_measured: Callable[[LayerSensitivity], None] | None = None,
) -> Sensitivity:
    """Apply the last pass of a pipeline to one layer at a time and measure what that costs.

    The passes before it run first, once; what is measured is measured against their result.

    Args:
        model: A model, which is not changed, or a path to one.
        passes: Pipeline text, or passes and names of passes in a list; the last one is lossy and has an `include`.
        data: Samples to calibrate on, as `optimize` takes them.
        evaluation: Samples to measure on; ``data`` where None.
        labels: Key of the labels.
        metric: Metric to score by; chosen by the outputs and labels where None.
        samples: How many samples to measure on, drawn with the seed.
        target: Name of the target.
        backend: Backend text.
        set_dims: Sizes to fix dimensions of the inputs to, by name.
        set_shapes: The same by name of input.
        seed: Seed of everything random.
        threads: Threads for the backend.
        progress: Show a progress bar on stderr.
        on_measured: Told of each layer once it is measured.

    Raises:
        UsageError: The last pass cannot be applied to one layer, or there is nothing to measure on.
        PassError: The pass cannot do what is asked on this model.
    """
    if data is None and evaluation is None:
        raise UsageError("sensitivity is measured on samples, and there are none", hint="add `--data samples.npz`")
    if not isinstance(samples, int) or samples < 1:
        raise UsageError(f"samples cannot be `{samples}`", hint="a whole number, 1 or more")
    request = Request(
        model=model,
        passes=passes,
        data=data,
        # What is chosen here is no figure to publish, so that nothing needs to be held back.
        evaluation=evaluation if evaluation is not None else data,
        labels=labels,
        metric=metric,
        target=target,
        backend=backend,
        verify="final",
        set_dims=set_dims or {},
        set_shapes=set_shapes or {},
        seed=seed,
        threads=threads,
        progress=progress,
    )
    return _Analysis(request, samples, on_measured).run()


class _Analysis:
    """One analysis, from request to result."""

    def __init__(self, request: Request, samples: int, on_measured: Callable[[LayerSensitivity], None] | None) -> None:
        analysed = _analysed(Pipeline.of(request.passes))
        self.job = Run(request)
        self.samples, self.on_measured = samples, on_measured
        self.one: Pass = self.job.steps[-1].passes[0]
        self.spec = analysed.spec

    def run(self) -> Sensitivity:
        context, judge = self._prepare()
        with judge:
            return self._analyse(context, judge)

    def _analyse(self, context: Context, judge: CandidateJudge) -> Sensitivity:
        layers = [layer for layer in layers_of(context.model) if _is_chosen(layer, self.one)]
        with self.job.display.stage(f"all layers with {self.spec}"):
            whole = context.attempt(self.one.run, predicts=True)
            if not whole.edits:
                raise UsageError(f"pass `{self.spec}` changes nothing on this model", hint=_first_reason(whole.notes))
            standing = judge(whole.model)
        predicted, curves = _predictions(whole.notes), _curves(whole.notes)
        rows, left = [], []
        for index, layer in enumerate(layers, 1):
            with self.job.display.stage(f"layer {index} of {len(layers)}: {layer.name}"):
                one = _narrowed(self.one, include=layer.globs)
                # What a pass shares out among layers, a layer by itself gets another share of.
                attempt = context.attempt(one.run, predicts=bool(curves))
                row = self._measure(judge, attempt, layer, _predictions(attempt.notes) if curves else predicted)
            if isinstance(row, str):
                left.append((layer.name, row))
            else:
                curve = next((curves[name] for name in layer.nodes if name in curves), {})
                rows.append(replace(row, curve=curve))
        rows += self._others(context, judge, layers)
        rows.sort(key=lambda row: row.cost, reverse=True)
        return Sensitivity(
            analysed=self.spec,
            rows=tuple(rows),
            left=tuple(left),
            whole=standing,
            baseline=judge.baseline,
            rank_correlation=_correlation(rows),
            samples=len(judge.data),
            source=judge.data.name,
            metric_types=self.job.metric_types,
        )

    def _prepare(self) -> tuple[Context, CandidateJudge]:
        """Run the passes before the one that is looked at, and return what it will be tried on and judged by."""
        job = self.job
        manager = job.manager(last=-1)
        manager.run(job.model)
        name_nodes(job.model)
        setting = manager.setting
        context = Context(
            model=job.model,
            rewriter=Rewriter(job.model, None, self.one.name),
            target=setting.target,
            backend=setting.backend,
            seed=setting.seed,
            threads=setting.threads,
            data=setting.data,
            calibration=setting.calibration,
            judge=setting.judge,
            guarantee=self.one.guarantee,
        )
        assert job.scored is not None, "there is data"
        data = job.scored.sample(self.samples, setting.seed)
        return context, CandidateJudge(job.model.clone(), setting.backend, data, job.metrics, threads=setting.threads)

    def _measure(
        self, judge: CandidateJudge, attempt: Attempt, layer: Layer, predicted: Mapping[str, float]
    ) -> LayerSensitivity | str:
        """Return what a layer costs, or why the pass leaves it alone."""
        if not attempt.edits:
            return _first_reason(attempt.notes)
        known = [predicted[name] for name in layer.nodes if name in predicted]
        standing, failure = None, None
        try:
            standing = judge(attempt.model)
        except BackendError as error:
            failure = error.message
        stored = tuple(dict.fromkeys(name for note in attempt.notes for name in note.facts.get(STORED, {})))
        worst = max(known, default=None)
        row = LayerSensitivity(layer.name, layer.operators, layer.elements, standing, worst, failure, stored)
        if self.on_measured is not None:
            self.on_measured(row)
        return row

    def _others(self, context: Context, judge: CandidateJudge, layers: Sequence[Layer]) -> list[LayerSensitivity]:
        """Return what everything that reads no weight costs together, if the pass changes any of it."""
        globs = tuple(glob for layer in layers for glob in layer.globs)
        rest = _narrowed(self.one, exclude=(*getattr(self.one, "exclude", ()), *globs))
        with self.job.display.stage(OTHERS):
            row = self._measure(judge, context.attempt(rest.run), Layer(OTHERS, (), (), 0, ()), {})
        return [row] if isinstance(row, LayerSensitivity) else []


def _analysed(pipeline: Pipeline) -> Step:
    """Return the step to look at, the last one.

    Raises:
        UsageError: It is no single lossy pass that can be told which nodes to change.
    """
    step = pipeline.steps[-1]
    known = ", ".join(_selective_passes())
    hint = f"the last pass is looked at; one that is lossy and has an option `include`: {known}"
    if step.preset or step.guarantee is not Guarantee.LOSSY:
        raise UsageError(f"`{step.spec}` is no lossy pass: it costs nothing", hint=hint)
    if not {"include", "exclude"} <= set(options.fields(type(step.passes[0]))):
        raise UsageError(f"pass `{step.name}` cannot be applied to one layer: it has no option `include`", hint=hint)
    return step


def _selective_passes() -> list[str]:
    classes = {name: registry.find("PASSES", name) for name in registry.table("PASSES")}
    return sorted(
        name for name, one in classes.items() if one.guarantee is Guarantee.LOSSY and "include" in options.fields(one)
    )


def _narrowed(one: Any, **selection: tuple[str, ...]) -> Pass:
    """Return a pass with another `include` or `exclude`."""
    narrowed: Pass = replace(one, **selection)
    return narrowed


def _is_chosen(layer: Layer, one: Any) -> bool:
    """Return whether the pass's own `include` lets a layer in; its `exclude` stays in force."""
    words = (*layer.nodes, *layer.operators)
    return not one.include or any(fnmatchcase(word, glob) for glob in one.include for word in words)


def _predictions(notes: Sequence[Note]) -> dict[str, float]:
    return {note.node: float(note.facts[PREDICTED]) for note in notes if note.node and PREDICTED in note.facts}


def _curves(notes: Sequence[Note]) -> dict[str, Mapping[float, float]]:
    return {note.node: note.facts[CURVE] for note in notes if note.node and CURVE in note.facts}


def _first_reason(notes: Sequence[Note]) -> str:
    """Return why a pass left something alone, in its own words."""
    reasons = [note.text for note in notes if note.left] or [note.text for note in notes]
    return reasons[0] if reasons else "the pass does not say why"


def _correlation(rows: Sequence[LayerSensitivity]) -> float | None:
    pairs = [(row.predicted, row.cost) for row in rows if row.predicted is not None and row.standing is not None]
    return spearman([one for one, _ in pairs], [other for _, other in pairs])


def spearman(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation, equal values sharing their mean rank.

    None where there are fewer than two values, or one side has no order.
    """
    if len(a) < 2:
        return None
    x, y = (_ranks(np.asarray(side, np.float64)) for side in (a, b))
    x, y = x - x.mean(), y - y.mean()
    norm = float(np.sqrt((x @ x) * (y @ y)))
    return float(x @ y) / norm if norm else None


def _ranks(values: Array) -> Array:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return np.asarray((np.cumsum(counts) - (counts - 1) / 2)[place])
