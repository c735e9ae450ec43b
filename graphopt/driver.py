"""The main job: load, run the passes, check, measure, save, report."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal, get_args

import onnx_ir as ir

from graphopt import latency, walk
from graphopt.authoring import Guarantee, Pass
from graphopt.choices import (
    LABELS_HINT,
    ModelLike,
    chosen_metrics,
    find_backend,
    find_target,
    known_metrics,
    open_model,
)
from graphopt.data import Dataset, batch_size, open_data
from graphopt.errors import BackendError, UsageError, VerificationError, did_you_mean
from graphopt.evaluation import Judge
from graphopt.instruments import (
    Gate,
    Instrument,
    ShowProgress,
    Timing,
    VerifyNumerics,
    VerifyStructure,
    enforce,
    judged,
    measured,
)
from graphopt.manager import PassManager, Setting
from graphopt.metrics import Budget
from graphopt.model_io import gzip_bytes, save, stored_bytes
from graphopt.output_files import check_output, move_into_place, staging_folder
from graphopt.pipeline import Pipeline, schedule, weakest
from graphopt.progress import Display
from graphopt.report import Check, Report, Side
from graphopt.rewrite_check import RewriteChecker
from graphopt.shapes import forget_inferred, infer_shapes
from graphopt.summary import summarize
from graphopt.verify import Signature, problems_of, verify

Verify = Literal["off", "final", "each", "rewrites"]
LATENCY_SECONDS = 2.0


@dataclass
class Result:
    """What `optimize` returns.

    Attributes:
        model: The optimized model, in memory.
        report: What was done and measured.
        output: The file written, or None.
    """

    model: ir.Model
    report: Report
    output: Path | None = None


@dataclass(frozen=True)
class Request:
    """Everything the user asked for, before anything was opened; see `optimize` for the meanings."""

    model: ModelLike
    passes: str | Pipeline | Pass | Sequence[str | Pass]
    output: Path | None = None
    data: Any = None
    evaluation: Any = None
    labels: str | None = None
    metric: str | None = None
    budget: Sequence[str] = ()
    target: str | None = None
    backend: str | None = None
    verify: Verify = "each"
    seed: int = 0
    threads: int = 0
    keep_failed: bool = False
    progress: bool = False


def optimize(
    model: ModelLike,
    passes: str | Pipeline | Pass | Sequence[str | Pass],
    *,
    output: str | Path | None = None,
    data: Any = None,
    evaluation: Any = None,
    labels: str | None = None,
    metric: str | None = None,
    budget: str | Sequence[str] = (),
    target: str | None = None,
    backend: str | None = None,
    verify: Verify = "each",
    seed: int = 0,
    threads: int = 0,
    keep_failed: bool = False,
    progress: bool = False,
) -> Result:
    """Optimize a model and prove the result.

    Args:
        model: A model, which is not changed, or a path to one.
        passes: Pipeline text, or passes and names of passes in a list.
        output: File to write; nothing is written where None.
        data: Samples to calibrate on: a path, ``file.py:function``, a function, a dict of arrays or a list of dicts.
        evaluation: Samples to score; where None, a seeded quarter of ``data`` (at most 1,000) is held back for it.
        labels: Key of the labels in the data; ``labels`` by default.
        metric: Name of a metric, or ``file.py:function``; chosen by the outputs and labels where None.
        budget: The most a metric may lose, ``METRIC=DROP``, or several.
        target: Name of the target; this machine's CPU where None.
        backend: Backend text, such as ``onnxruntime:provider=cuda``; the target's own where None.
        verify: When to check: ``off``, ``final``, ``each`` step, or ``rewrites`` too, each by itself.
        seed: Seed of everything random.
        threads: Threads for the backend; 0 leaves it to the runtime.
        keep_failed: Write the result even if a check or the budget failed.
        progress: Show a progress bar on stderr.

    Raises:
        GraphoptError: One line that says what is wrong, where, and what to do; `VerificationError` if a check or
            the budget failed, its ``report`` attribute holding the report.
    """
    request = Request(
        model=model,
        passes=passes,
        output=Path(output) if output is not None else None,
        data=data,
        evaluation=evaluation,
        labels=labels,
        metric=metric,
        budget=[budget] if isinstance(budget, str) else list(budget),
        target=target,
        backend=backend,
        verify=verify,
        seed=seed,
        threads=threads,
        keep_failed=keep_failed,
        progress=progress,
    )
    return _Run(request).run()


def _check_request(request: Request) -> None:
    """Raise a UsageError for a setting that is none: from Python nothing else would notice."""
    if request.verify not in get_args(Verify):
        raise UsageError(
            f"verify cannot be `{request.verify}`", hint=did_you_mean(str(request.verify), get_args(Verify))
        )
    for name in ("seed", "threads"):
        value = getattr(request, name)
        if not isinstance(value, int) or value < 0:
            raise UsageError(f"{name} cannot be `{value}`", hint="a whole number, 0 or more")
    if any(not isinstance(text, str) for text in request.budget):
        raise UsageError(f"budget cannot be `{request.budget}`", hint='for example "top1=1%", or a list of such')


class _Run:
    """One optimization from request to result; each method is one stage."""

    def __init__(self, request: Request) -> None:
        self.request = request
        _check_request(request)
        self.display = Display(request.progress)
        # All that can be refused is refused here, before any work.
        self.pipeline = Pipeline.of(request.passes)
        self.target = find_target(request.target)
        self.backend = find_backend(request.backend, self.target)
        self.model = open_model(request.model)
        if request.output is not None:
            given = None if isinstance(request.model, ir.Model) else Path(request.model)
            check_output(request.output, self.model, given)
        known = known_metrics(request.metric)
        self.original = self.model.clone()
        self.calibration, self.scored = self._open_data()
        self.steps = schedule(self.pipeline, has_data=self.calibration is not None)
        self.metrics = chosen_metrics(request.metric, known, self.original, self.scored)
        self.metric_types = {**known, **{metric.name: metric for metric in self.metrics}}
        self.budgets = [Budget.parse(text, self.metric_types) for text in request.budget]
        self._check_budgets()

    def _open_data(self) -> tuple[Dataset | None, Dataset | None]:
        request = self.request
        scored = None
        with self.display.stage("reading the data"):
            if request.evaluation is not None:
                scored = self._open(request.evaluation, request.labels)
            if request.data is None:
                return None, scored
            # Labels of calibration samples are not read, so they may be missing where others are scored.
            calibration = self._open(request.data, request.labels if scored is None else None)
        return (calibration, scored) if scored is not None else calibration.split(request.seed)

    def _open(self, given: Any, labels: str | None) -> Dataset:
        return open_data(given, self.model, labels=labels, advance=self.display.advance)

    def _check_budgets(self) -> None:
        computed = [metric.name for metric in self.metrics]
        for budget in self.budgets:
            if budget.metric not in computed:
                metric = self.metric_types[budget.metric]
                if self.scored is None:
                    raise UsageError(
                        f"budget on `{budget.metric}` needs data to score", hint="add `--data` or `--eval`"
                    )
                if metric.needs_labels and not self.scored.has_labels:
                    raise UsageError(f"budget on `{budget.metric}` needs labels", hint=LABELS_HINT)
                self.metrics.append(metric)

    def run(self) -> Result:
        """Run every stage."""
        request = self.request
        with self.display.stage("running the original"):
            self.judge = Judge(
                self.original, self.backend, self.scored, self.metrics, seed=request.seed, threads=request.threads
            )
        if self.judge.refusal is not None and request.verify != "off":
            raise BackendError(
                self.judge.refusal.message, hint="another `--backend`, or `--verify off` to go without any proof"
            ) from self.judge.refusal
        with staging_folder(request.output) as folder:
            with self.display.stage("scoring the original"):
                report = self._report_of_original(folder)
            failure = self._transform(report)
            delivered = None
            if failure is None or request.keep_failed:
                staged = folder / (request.output.name if request.output is not None else "after.onnx")
                forget_inferred(self.model)
                with self.display.stage("saving"):
                    files = save(self.model, staged)
                with self.display.stage("measuring the result"):
                    failure = self._measure(report, staged) or failure
                if request.output is not None and (failure is None or request.keep_failed):
                    delivered = move_into_place(files, request.output)
        if failure is not None:
            report.ok, report.failure = False, failure.message
            failure.report, failure.output = report, delivered
            raise failure
        return Result(self.model, report, delivered)

    def _report_of_original(self, folder: Path) -> Report:
        request = self.request
        if isinstance(request.model, ir.Model):
            self.source = folder / "before.onnx"
            save(self.original, self.source)
        else:
            self.source = Path(request.model)
        before = _side(self.original, self.source)
        before.metrics = {
            name: value
            for name, value in self.judge.score(self.source).items()
            if not self.metric_types[name].against_original
        }
        return Report(
            graphopt=installed_version(),
            pipeline=str(self.pipeline),
            target=self.target.name,
            backend=self.backend.describe(),
            seed=request.seed,
            threads=request.threads,
            scored=self.judge.scored_on + (", not calibrated on" if self._held_back else ""),
            steps=[],
            before=before,
            after=None,
            ok=True,
            metric_types=self.metric_types,
        )

    @property
    def _held_back(self) -> bool:
        return self.calibration is not None and self.request.evaluation is None

    def _transform(self, report: Report) -> VerificationError | None:
        """Run the passes and return what failed, if anything."""
        infer_shapes(self.model)
        manager = PassManager(self.steps, self._setting(), self._instruments(report))
        report.steps = manager.records
        try:
            manager.run(self.model)
            if self.request.verify == "final":
                self._verify_at_end(report)
        except VerificationError as error:
            return error
        return None

    def _setting(self) -> Setting:
        checker = None
        if self.request.verify == "rewrites":
            checker = RewriteChecker(self.backend, walk.all_imports(self.model), self.request.seed)
        return Setting(
            target=self.target,
            backend=self.backend,
            seed=self.request.seed,
            threads=self.request.threads,
            data=self.calibration,
            check_rewrite=checker,
        )

    def _instruments(self, report: Report) -> list[Instrument]:
        instruments: list[Instrument] = [Timing(), ShowProgress(self.display)]
        if self.request.verify in ("each", "rewrites"):
            instruments += [VerifyStructure(), VerifyNumerics(self.judge)]
        if self.budgets:
            instruments.append(Gate(self.judge, self.budgets, self._baseline(report), self.metric_types))
        return instruments

    def _baseline(self, report: Report) -> dict[str, float]:
        """Return what the original scores, metrics against itself included."""
        if not any(self.metric_types[budget.metric].against_original for budget in self.budgets):
            return report.before.metrics
        return self.judge.score(self.source)

    def _verify_at_end(self, report: Report) -> None:
        """Check the finished model once, by the weakest guarantee of all steps."""
        verify(self.model, Signature.of(self.original), provenance_too=True, known=problems_of(self.original))
        for record in report.steps:
            record.check = Check("none", None, why="all steps are checked together, at the end")
        changed = [record for record in report.steps if record.edits]
        if not changed:
            return
        record = changed[-1]
        guarantee = weakest(step.guarantee for step in self.steps)
        if self.judge.reference is None or self.judge.cannot_probe is not None:
            record.check = Check("none", None, why=self.judge.cannot_probe)
        elif guarantee is Guarantee.LOSSY:
            record.check = measured(self.judge, self.model)
        else:
            record.check = judged(guarantee, self.judge.reference, self.judge.probe(self.model))
        if record.check.ok is False:
            raise VerificationError(
                f"the passes changed the model: {record.check.why}", hint="`--verify each` finds the pass"
            )

    def _measure(self, report: Report, staged: Path) -> VerificationError | None:
        """Measure the file that will be delivered and return what failed, if anything."""
        report.after = _side(self.model, staged)
        try:
            report.after.metrics = self.judge.score(staged)
            if self.request.verify != "off" and all(step.guarantee is not Guarantee.LOSSY for step in self.steps):
                report.deployed = self.judge.deployed(self.source, staged)
            self._time(report, staged)
            if report.deployed is not None and report.deployed.ok is False:
                raise VerificationError(
                    f"as deployed, the model changed: {report.deployed.why}",
                    hint="`--verify rewrites` may find the pass; `--keep-failed` writes the model all the same",
                )
            enforce(self.budgets, self._baseline(report), report.after.metrics, self.metric_types, "in the end")
        except VerificationError as error:
            return error
        except BackendError as error:
            return VerificationError(f"the written model does not run: {error.message}", hint=error.hint)
        return None

    def _time(self, report: Report, staged: Path) -> None:
        feed = self.judge.single_feed()
        if feed is None or report.after is None:
            return
        with contextlib.ExitStack() as stack:
            sessions = [
                stack.enter_context(self.backend.open(file, threads=self.request.threads))
                for file in (self.source, staged)
            ]
            before, after = latency.measure(sessions, [feed, feed], seconds=LATENCY_SECONDS)
        report.before.latency_ms, report.after.latency_ms = before.median, after.median
        report.latency_ratio = after.ratio
        report.latency_batch = batch_size(feed)


def _side(model: ir.Model, file: Path) -> Side:
    summary = summarize(model)
    return Side(
        nodes=summary.nodes,
        parameters=summary.parameters,
        nonzero=summary.nonzero,
        bytes=stored_bytes(file),
        bytes_gzip=gzip_bytes(file),
        macs=summary.macs,
    )


def installed_version() -> str:
    """Return graphopt's version."""
    try:
        return version("graphopt")
    except PackageNotFoundError:
        return "0+unknown"
