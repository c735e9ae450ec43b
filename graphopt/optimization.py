"""One optimization, stage by stage: load, run the passes, check, measure, save, report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Guarantee
from graphopt.backend import Array
from graphopt.calibration_cache import CalibrationCache
from graphopt.candidates import SELECTION_BYTES, CandidateJudge, are_of_classes, comparing
from graphopt.choices import (
    LABELS_HINT,
    chosen_metrics,
    find_backend,
    find_target,
    known_metrics,
    open_model,
)
from graphopt.data import Dataset, batch_size, open_data
from graphopt.errors import (
    BackendError,
    GraphoptError,
    OverBudget,
    PassCrash,
    UsageError,
    VerificationError,
)
from graphopt.evaluation import Judge
from graphopt.instruments import (
    Gate,
    Instrument,
    ShowProgress,
    Timing,
    TrainTogether,
    VerifyNumerics,
    VerifyStructure,
    enforce,
    judged,
    measured,
)
from graphopt.manager import PassManager, Setting
from graphopt.measurement import measure_side, time_side_by_side
from graphopt.metrics import Budget
from graphopt.model_io import save, source
from graphopt.output_files import check_output, move_into_place, staging_folder
from graphopt.pipeline import Pipeline, check_ahead, schedule, weakest
from graphopt.plain_runs import with_plain_runs
from graphopt.processes import Company
from graphopt.progress import Display
from graphopt.regression.emitted_test import EmittedTest, Subject, some_feeds
from graphopt.repetition import command_of
from graphopt.report import NOT_RUN, Check, Report
from graphopt.reproducer import Asked, Reproducers
from graphopt.request import QUIET, Request, check_request
from graphopt.rewrite_check import RewriteChecker, WrongRewrite
from graphopt.seen_samples import warn_of_seen
from graphopt.shapes import forget_inferred
from graphopt.specialise import specialise
from graphopt.standing import Standing
from graphopt.target_advice import advise
from graphopt.teacher import open_teacher
from graphopt.verify import Signature, problems_of, verify
from graphopt.versions import installed_version

# Samples that candidates are weighed by. A mean over a quarter as many is off by twice as much; each costs a run more.
SELECTION_SAMPLES = 256
# Of larger models what predictions take, a matrix for each layer, would add to the peak of memory.
_PREDICTED_BYTES = 128 << 20


@dataclass
class Result:
    """What `optimize` returns.

    Attributes:
        model: The optimized model, in memory.
        report: What was done and measured.
        output: The file written, or None.
        test: The test file written, or None.
    """

    model: ir.Model
    report: Report
    output: Path | None = None
    test: Path | None = None


class Run:
    """One optimization from request to result; each method is one stage.

    Raises:
        GraphoptError: Something asked for is refused, before any work.
    """

    def __init__(self, request: Request) -> None:
        self.request = request
        check_request(request)
        self.display = Display(request.progress)
        # All that can be refused is refused here, before any work.
        self.pipeline = Pipeline.of(request.passes)
        self.target = find_target(request.target)
        self.backend = with_plain_runs(find_backend(request.backend, self.target, must_run=not request.runs_nothing))
        self.model = open_model(request.model)
        if request.output is not None:
            given = None if isinstance(request.model, ir.Model) else Path(request.model)
            check_output(request.output, self.model, given)
        self.emitted = self._open_test()
        self.specialised = (
            specialise(self.model, request.set_dims, request.set_shapes)
            if request.set_dims or request.set_shapes
            else None
        )
        self.teacher = open_teacher(request.teacher, self.model, request.output)
        known = known_metrics(request.metric)
        self.original = self.model.clone() if self._original_is_needed else self.model
        self.calibration, self.scored = self._open_data()
        self.steps = schedule(self.pipeline, has_data=self.calibration is not None, has_budget=bool(request.budget))
        check_ahead(self.steps, self.model, data=self.calibration, teacher=self.teacher)
        self.metrics = chosen_metrics(request.metric, known, self.original, self.scored)
        self.metric_types = {**known, **{metric.name: metric for metric in self.metrics}}
        self.budgets = [Budget.parse(text, self.metric_types) for text in request.budget]
        self._check_budgets()
        self.is_lossy = any(step.guarantee is Guarantee.LOSSY for step in self.steps)
        self.judge: Judge | None = None
        self.reproducers = self._open_reproducers()
        self.calibration_cache = CalibrationCache(request.calibration_cache)
        self.opened = ExitStack()  # what passes were given; closed after they ran
        trains = any(step.trains for step in self.steps)
        self.company, self.only_helps = Company(trains), request.helps and trains

    @property
    def _original_is_needed(self) -> bool:
        """Whether anything may look at the model as it was, once it has been changed."""
        in_memory = isinstance(self.request.model, ir.Model)
        return not self.request.runs_nothing or (in_memory and self.request.reproducers is not None)

    def _open_data(self) -> tuple[Dataset | None, Dataset | None]:
        request = self.request
        scored = None
        with self.display.stage("reading the data"):
            if request.evaluation is not None:
                scored = self._open(request.evaluation, request.labels)
            if request.data is None:
                return None, scored
            # Few passes read labels of calibration samples, so they may be missing where others are scored.
            calibration = self._open(request.data, request.labels, may_lack_labels=scored is not None)
        return (calibration, scored) if scored is not None else calibration.split(request.seed)

    def _open(self, given: Any, labels: str | None, *, may_lack_labels: bool = False) -> Dataset:
        required = False if may_lack_labels else None
        return open_data(given, self.model, labels=labels, labels_required=required, advance=self.display.advance)

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
        if not request.runs_nothing and not self.only_helps:
            self.open_judge()
        with staging_folder(request.output) as folder, self.emitted or nullcontext():
            with self.display.stage("scoring the original"):
                report = self._report_of_original(folder)
            failure = self._transform(report)
            delivered = test = None
            if failure is None or request.keep_failed:
                staged = folder / (request.output.name if request.output is not None else "after.onnx")
                forget_inferred(self.model)
                with self.display.stage("saving"):
                    files = save(self.model, staged) if self._file_is_needed else []
                with self.display.stage("measuring the result"):
                    failure = self._measure(report, files) or failure
                if self.emitted is not None and failure is None:
                    self._stage_test(self.emitted, files)
                if request.output is not None and (failure is None or request.keep_failed):
                    delivered = move_into_place(files, request.output)
                if self.emitted is not None and failure is None:
                    test = self.emitted.publish()
        if failure is not None:
            report.ok, report.failure = False, failure.message
            failure.report, failure.output = report, delivered
            raise failure
        return Result(self.model, report, delivered, test)

    def _open_test(self) -> EmittedTest | None:
        request = self.request
        if request.emit_test is None:
            return None
        return EmittedTest(request.emit_test, request.output, [request.model, request.data, request.evaluation])

    def _stage_test(self, emitted: EmittedTest, files: Sequence[Path]) -> None:
        """Write the test of the result, under another name."""
        assert self.judge is not None, "a test needs runs"
        request = self.request
        feeds, count = some_feeds(self.scored, self.judge, request.seed)
        subject = Subject(
            original=self.original,
            model=self.model,
            files=files,
            name=request.model.graph.name or "model" if isinstance(request.model, ir.Model) else str(request.model),
            feeds=feeds,
            inputs=f"{count} of {self._scored_on}" if self.scored is not None else self._scored_on,
            target=self.target.name,
            backend=self.backend,
            backend_text=request.backend,
            lossless=not self.is_lossy,
            command=command_of(request, self.pipeline)[0],
        )
        with self.display.stage("writing the test"):
            emitted.stage(subject)

    @property
    def _file_is_needed(self) -> bool:
        return self.request.output is not None or self.judge is not None or self._content_is_shown

    def open_judge(self) -> Judge:
        """Run the original on the samples everything else is compared on.

        Raises:
            BackendError: The runtime refuses the original, and it is to be checked.
        """
        request = self.request
        with self.display.stage("running the original"):
            self.judge = Judge(
                self.original,
                self.backend,
                self.scored,
                self.metrics,
                seed=request.seed,
                threads=request.threads,
                teacher=self.teacher,
            )
        if self.emitted is not None:
            self.emitted.require(self.judge)
        if self.judge.refusal is not None and request.verify not in QUIET:
            raise BackendError(
                self.judge.refusal.message, hint="another `--backend`, or `--verify off` to go without any proof"
            ) from self.judge.refusal
        return self.judge

    def _report_of_original(self, folder: Path) -> Report:
        request = self.request
        self.source = Path(request.model) if not isinstance(request.model, ir.Model) else folder / "before.onnx"
        if not isinstance(request.model, ir.Model):
            origin = source(self.model)
            files = [self.source, *map(Path, dict.fromkeys(origin.data_files if origin is not None else ()))]
        else:
            files = save(self.original, self.source) if self.judge is not None else []
        before = measure_side(self.original, files, content=self._content_is_shown, work=self._work_is_shown)
        if self.judge is not None:
            before.metrics = self.judge.score(self.source)
        teacher = None
        if self.judge is not None and self.teacher is not None:
            teacher = self._without_itself(self.judge.score(self.teacher))
        else:
            before.metrics = self._without_itself(before.metrics)
        return Report(
            graphopt=installed_version(),
            pipeline=str(self.pipeline),
            target=self.target.name,
            backend=self.backend.describe(),
            seed=request.seed,
            threads=request.threads,
            scored=self._scored_on,
            steps=[],
            before=before,
            after=None,
            ok=True,
            specialised=self.specialised.as_dict() if self.specialised is not None else None,
            teacher=teacher,
            warnings=[] if self.judge is None else warn_of_seen(self.steps, self.calibration, self.scored),
            metric_types=self.metric_types,
        )

    def _without_itself(self, scores: dict[str, float]) -> dict[str, float]:
        """Return what a model scores, without what compares it with itself."""
        return {name: value for name, value in scores.items() if not self.metric_types[name].against_original}

    @property
    def _scored_on(self) -> str:
        if self.judge is None:
            return NOT_RUN
        held_back = self.calibration is not None and self.request.evaluation is None
        return self.judge.scored_on + (", not calibrated on" if held_back else "")

    @property
    def _content_is_shown(self) -> bool:
        return not self.only_helps and ((self.is_lossy and self.request.verify != "off") or self.request.detailed)

    @property
    def _work_is_shown(self) -> bool:
        return self.judge is not None or self.request.detailed

    def _transform(self, report: Report) -> VerificationError | None:
        """Run the passes and return what failed, if anything."""
        limit = self.request.stop_after_edits
        manager = self.manager(self._instruments(report), limit=limit)
        report.steps = manager.records
        try:
            with self.opened:
                manager.run(self.model)
            self.company.end_training()  # which an edit limit leaves half-way, in all processes
            report.stopped_after_edits = limit if manager.stopped else None
            if self.request.verify == "final" and not self.only_helps:
                self._verify_at_end(report)
        except VerificationError as error:
            self._leave_reproducer(error)
            return error
        except PassCrash as error:
            self._leave_reproducer(error)
            raise
        return None

    def _open_reproducers(self) -> Reproducers | None:
        request = self.request
        if request.reproducers is None:
            return None
        model = None if isinstance(request.model, ir.Model) else Path(request.model)
        return Reproducers(
            request.reproducers, Asked(model, str(self.pipeline), request.plain_options), lambda: self.original
        )

    def _leave_reproducer(self, error: GraphoptError) -> None:
        """Leave a folder to see a failure again, unless it is no pass's mistake or has left one already."""
        if self.reproducers is None or isinstance(error, (OverBudget, WrongRewrite)):
            return
        if isinstance(error.__cause__, (MemoryError, OSError)):  # of the machine, as it was then
            return
        folder = self.reproducers.of_failure(error)
        if folder is not None:
            error.hint = f"{error.hint}; `graphopt debug replay {folder}` repeats it"

    def open_original(self) -> ir.Model:
        """Return the model as it was: kept, or loaded again."""
        if self._original_is_needed:
            return self.original
        original = open_model(self.request.model)
        if self.specialised is not None:
            specialise(original, self.request.set_dims, self.request.set_shapes)
        return original

    def manager(
        self, instruments: Sequence[Instrument] = (), *, limit: int | None = None, last: int | None = None
    ) -> PassManager:
        """Return what runs the passes over a model, up to an edit, to before a step, or to their end."""
        return PassManager(self.steps[:last], self._setting(), instruments, edit_limit=limit)

    def _setting(self) -> Setting:
        checker = None
        if self.request.verify == "rewrites":
            keep = self.reproducers.of_rewrite if self.reproducers is not None else None
            checker = RewriteChecker(self.backend, self.request.seed, self.request.strict, keep)
        return Setting(
            target=self.target,
            backend=self.backend,
            seed=self.request.seed,
            threads=self.request.threads,
            data=self.calibration,
            check_rewrite=checker,
            calibration=self.calibration_cache,
            weigh=self._candidate_judge() if self.budgets and self.calibration is not None else None,
            judge=comparing(self.backend, self.metrics, self.request.threads),
            predicts=self._predicts,
            display=self.display,
            teacher=self.teacher,
        )

    @property
    def _predicts(self) -> bool:
        """Whether passes say for the report what they expect of single layers."""
        if not self.request.reports or self.calibration is None:
            return False
        return sum(tensor.nbytes for tensor in walk.stored_tensors(self.original)) <= _PREDICTED_BYTES

    def _candidate_judge(self) -> Callable[[ir.Model], Standing]:
        """Return what passes weigh candidates by: the budgets, on samples that are not scored later."""
        assert self.calibration is not None, "there is something to choose by"
        request, data = self.request, self.calibration.sample(SELECTION_SAMPLES, self.request.seed)
        judge: CandidateJudge | None = None

        def weigh(model: ir.Model) -> Standing:
            nonlocal judge
            if judge is None:
                budgets = [(budget, self.metric_types[budget.metric]) for budget in self.budgets]
                of_classes = are_of_classes([*self.metrics, *(metric for _, metric in budgets)])
                judge = CandidateJudge(
                    self.original if self.teacher is None else self.teacher,
                    self.backend,
                    data,
                    (),
                    budgets,
                    of_classes=of_classes,
                    most_bytes=SELECTION_BYTES,
                    threads=request.threads,
                )
                self.opened.enter_context(judge)
            return judge(model)

        return weigh

    def _instruments(self, report: Report) -> list[Instrument]:
        instruments: list[Instrument] = [Timing(), ShowProgress(self.display), TrainTogether(self.company)]
        if self.reproducers is not None:
            instruments.append(self.reproducers)
        if self.request.verify in ("structure", "each", "rewrites"):
            instruments.append(VerifyStructure(self.open_original))
        if self.judge is None:
            return instruments
        if self.request.verify in ("each", "rewrites"):
            instruments.append(VerifyNumerics(self.judge, strict=self.request.strict))
        if self.budgets:
            instruments.append(Gate(self.judge, self.budgets, self._baseline(report), self.metric_types))
        return instruments

    def _baseline(self, report: Report) -> dict[str, float]:
        """Return what the original, or the teacher, scores, metrics against itself included."""
        if not any(self.metric_types[budget.metric].against_original for budget in self.budgets):
            return report.before.metrics if report.teacher is None else report.teacher
        standard = self.source if self.teacher is None else self.teacher
        return self.judge.score(standard) if self.judge is not None else {}

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
        assert self.judge is not None, "a check runs the model"
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

    def _measure(self, report: Report, files: Sequence[Path]) -> VerificationError | None:
        """Measure the files that will be delivered, the model first, and return what failed, if anything."""
        report.after = measure_side(self.model, files, content=self._content_is_shown, work=self._work_is_shown)
        if self.judge is None:
            return None
        staged = files[0]
        try:
            report.after.metrics = self.judge.score(staged)
            if self.request.verify not in QUIET and not self.is_lossy:
                report.deployed = self.judge.deployed(self.source, staged)
            self._time(report, staged, self.judge.single_feed())
            if report.deployed is not None and report.deployed.ok is False:
                raise VerificationError(
                    f"as deployed, the model changed: {report.deployed.why}",
                    hint="`graphopt debug bisect` finds the edit; `--keep-failed` writes the model all the same",
                )
            enforce(self.budgets, self._baseline(report), report.after.metrics, self.metric_types, "in the end")
        except VerificationError as error:
            return error
        except BackendError as error:
            return VerificationError(f"the written model does not run: {error.message}", hint=error.hint)
        return None

    def _time(self, report: Report, staged: Path, feed: dict[str, Array] | None) -> None:
        if feed is None or report.after is None or not self.request.timed:
            return
        before, after = time_side_by_side(self.backend, [self.source, staged], feed, self.request.threads)
        report.before.latency_ms, report.after.latency_ms = before.latency.median, after.latency.median
        report.before.placement, report.after.placement = before.placement, after.placement
        report.latency_ratio, report.latency_within = after.latency.ratio, after.latency.ratio_within
        report.latency_verdict = after.latency.verdict
        report.latency_batch = batch_size(feed)
        if self.request.advise:
            with self.display.stage("trying other runtimes"):
                found = advise(self.backend, staged, report.after.bytes, feed, self.request.threads)
            report.advice = found.as_dict() if found is not None else None
