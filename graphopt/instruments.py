"""Instruments: what watches and gates a run, step by step, without the passes knowing."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.authoring import Guarantee, Pass
from graphopt.comparison import NEW_NAN
from graphopt.errors import BackendError, OverBudget, VerificationError
from graphopt.evaluation import Judge, Outputs, compare_outputs
from graphopt.machine import peak_rss_mb, reset_peak_rss
from graphopt.metrics import Budget, Metric
from graphopt.pipeline import Step
from graphopt.processes import Company
from graphopt.progress import Display
from graphopt.report import Check, StepRecord
from graphopt.shapes import contradiction
from graphopt.verify import Signature, fingerprint, problems_of, verify


class Instrument:
    """Watches a run; every hook does nothing unless overridden, and may raise a VerificationError."""

    def run_started(self, model: ir.Model, steps: Sequence[Step]) -> None:
        """Called once, before the first step."""

    def step_started(self, step: Step, model: ir.Model) -> None:
        """Called before a step."""

    def pass_started(self, one: Pass, edits: int) -> None:
        """Called before each pass of a step, with the number of edits the run has made until then."""

    def pass_finished(self, one: Pass, model: ir.Model, edits: int) -> None:
        """Called after each pass of a step, with the number of edits it made."""

    def step_finished(self, step: Step, model: ir.Model, record: StepRecord) -> None:
        """Called after a step; may add to its record."""

    def run_finished(self) -> None:
        """Called once at the end, however the run ended."""


class Timing(Instrument):
    """Records seconds and peak resident memory of each step."""

    def step_started(self, step: Step, model: ir.Model) -> None:
        reset_peak_rss()
        self._start = time.perf_counter()

    def step_finished(self, step: Step, model: ir.Model, record: StepRecord) -> None:
        record.seconds = time.perf_counter() - self._start
        record.peak_rss_mb = peak_rss_mb()


class TrainTogether(Instrument):
    """Lets several processes meet before each training."""

    def __init__(self, company: Company) -> None:
        self._company = company

    def pass_started(self, one: Pass, edits: int) -> None:
        if one.trains:
            self._company.begin_training()

    def pass_finished(self, one: Pass, model: ir.Model, edits: int) -> None:
        self._company.end_training()


class VerifyStructure(Instrument):
    """Checks the structure of the model after every pass, and its shapes after every step.

    Args:
        original: Gives the model as it was, whose shapes are looked at only where those of the result are wrong.
    """

    def __init__(self, original: Callable[[], ir.Model]) -> None:
        self._original = original

    def run_started(self, model: ir.Model, steps: Sequence[Step]) -> None:
        self._signature = Signature.of(model)
        self._fingerprint = fingerprint(model)
        # A model may come with faults that runtimes overlook; no pass is blamed for them.
        self._came_with = problems_of(model)

    def pass_finished(self, one: Pass, model: ir.Model, edits: int) -> None:
        before, self._fingerprint = self._fingerprint, fingerprint(model)
        if not edits:
            if self._fingerprint != before:
                raise VerificationError(
                    f"pass `{one.name}` changed the model and reported no edit",
                    hint="this is a mistake of the pass: all edits must go through `ctx.rewriter`",
                )
            return
        try:
            verify(model, self._signature, provenance_too=True, known=self._came_with)
        except VerificationError as error:
            raise VerificationError(f"after pass `{one.name}`: {error.message}", hint=_BUG_HINT) from error

    def step_finished(self, step: Step, model: ir.Model, record: StepRecord) -> None:
        why = contradiction(model) if record.edits else None
        # A model may come with shapes that contradict each other, too.
        if why is not None and contradiction(self._original()) is None:
            raise VerificationError(f"after pass `{step.spec}`: {why}", hint=_BUG_HINT)


_BUG_HINT = "this is a mistake of the pass, not yours; leave it out, or report it"


class VerifyNumerics(Instrument):
    """Checks each step by its guarantee: equal bits, equal within rounding, or measured.

    An exact or equivalent step is compared with the step before it, so that each step answers for itself.
    """

    def __init__(self, judge: Judge, *, strict: bool = False) -> None:
        self.judge = judge
        self.strict = strict  # what could not be checked is no more than a remark otherwise

    def run_started(self, model: ir.Model, steps: Sequence[Step]) -> None:
        self._before: Outputs | None = self.judge.reference

    def step_finished(self, step: Step, model: ir.Model, record: StepRecord) -> None:
        record.check = self._check(step, model, record)
        if record.check.ok is False:
            raise VerificationError(f"pass `{step.spec}` changed the model: {record.check.why}", hint=_BUG_HINT)
        if record.check.ok is None and self.strict:
            raise VerificationError(
                f"pass `{step.spec}` could not be checked: {record.check.why}",
                hint="give inputs the model runs on with `--data`, or go without `--strict`",
            )

    def _check(self, step: Step, model: ir.Model, record: StepRecord) -> Check:
        if record.edits == 0:
            return Check("equal", True, 0.0, why="nothing was changed")
        if self._before is None or self.judge.cannot_probe is not None:
            return Check("none", None, why=self.judge.cannot_probe)
        try:
            after = self.judge.probe(model)
        except BackendError as error:
            return Check("none", False, why=f"the result does not run: {error.message}")
        before, self._before = self._before, after
        if step.guarantee is Guarantee.LOSSY:
            return poisoned(before, after) or measured(self.judge, model)
        check = judged(step.guarantee, before, after)
        return self._excused(check) if check.ok is False and step.guarantee is Guarantee.EQUIVALENT else check

    def _excused(self, check: Check) -> Check:
        """Blame no pass where rounding alone moves the original as far."""
        excuse = self.judge.hangs_on_rounding(check.max_abs_error) if check.max_abs_error is not None else None
        return check if excuse is None else Check("none", None, check.max_abs_error, why=f"{check.why}, but {excuse}")


def judged(guarantee: Guarantee, before: Outputs, after: Outputs) -> Check:
    """Compare outputs by an exact or equivalent guarantee."""
    comparison = compare_outputs(before, after)
    if comparison.says_nothing:
        return Check("none", None, why="the original gives only NaN or infinity on these inputs")
    ok = comparison.equal if guarantee is Guarantee.EXACT else comparison.within()
    kind = "equal" if comparison.equal else "equivalent"
    worst = comparison.worst
    why = None
    if not ok and worst is not None:
        scale = worst.mismatch or f"values up to {worst.peak:.3g}"
        why = f"output `{worst.name}` is off by {worst.max_abs:.3g} ({scale})"
    return Check(kind, ok, comparison.max_abs_error, why=why)


def poisoned(before: Outputs, after: Outputs) -> Check | None:
    """Return a failed check where a lossy step made NaN of a number: no metric may average that away."""
    comparison = compare_outputs(before, after)
    for name, output in comparison.outputs.items():
        if output.mismatch == NEW_NAN:
            return Check("measured", False, comparison.max_abs_error, why=f"output `{name}`: {NEW_NAN}")
    return None


def measured(judge: Judge, model: ir.Model | Path) -> Check:
    """Score a model; a lossy step passes whatever comes out, as long as it runs."""
    try:
        metrics = judge.score(model)
    except BackendError as error:
        return Check("measured", False, why=f"the result does not run: {error.message}")
    return Check("measured", True, metrics=metrics, samples=judge.samples)


class Gate(Instrument):
    """Stops the run when a lossy step has cost more than the budget."""

    def __init__(
        self, judge: Judge, budgets: Sequence[Budget], before: dict[str, float], metrics: dict[str, type[Metric]]
    ) -> None:
        self.judge = judge
        self.budgets = list(budgets)
        self.before = before
        self.metrics = metrics

    def step_finished(self, step: Step, model: ir.Model, record: StepRecord) -> None:
        if step.guarantee is not Guarantee.LOSSY or not record.edits:
            return
        if not record.check.metrics:
            record.check = measured(self.judge, model)
        enforce(self.budgets, self.before, record.check.metrics, self.metrics, f"after pass `{step.spec}`")


def enforce(
    budgets: Sequence[Budget],
    before: dict[str, float],
    after: dict[str, float],
    metrics: dict[str, type[Metric]],
    where: str,
) -> None:
    """Raise OverBudget if a metric lost more than its budget allows."""
    for budget in budgets:
        metric, old, new = metrics[budget.metric], before[budget.metric], after[budget.metric]
        if not budget.allows(old, new, metric):
            raise OverBudget(
                f"over budget {where}: {budget.metric} went from {metric.show(old)} to {metric.show(new)}",
                hint="a gentler setting, or a larger `--budget`; `--keep-failed` writes the model all the same",
            )


class ShowProgress(Instrument):
    """Shows which step runs."""

    def __init__(self, display: Display) -> None:
        self._display = display
        self._shown = contextlib.ExitStack()

    def run_started(self, model: ir.Model, steps: Sequence[Step]) -> None:
        self._steps, self._begun = len(steps), 0

    def step_started(self, step: Step, model: ir.Model) -> None:
        self._begun += 1
        self._shown.close()
        self._shown.enter_context(self._display.stage(f"{self._begun}/{self._steps} {step.spec}"))

    def run_finished(self) -> None:
        self._shown.close()
