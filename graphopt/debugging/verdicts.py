"""Verdicts on a state of a run: whether it is good, and of a lossy run how much is lost."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Guarantee
from graphopt.debugging.edit_costs import NOISE
from graphopt.debugging.user_check import EXIT_SKIP, FIRST_ABORTING_EXIT, CheckCommand
from graphopt.debugging.user_check import in_words as ending
from graphopt.errors import BackendError, GraphoptError, UsageError, VerificationError, in_words
from graphopt.evaluation import Judge, compare_outputs
from graphopt.instruments import poisoned
from graphopt.model_io import save
from graphopt.optimization import Run
from graphopt.pipeline import weakest
from graphopt.shapes import contradiction
from graphopt.verify import Signature, problems_of, verify

Verdict = Literal["good", "bad", "skip"]
# Judges the file of a model: whether it is good, or None where that cannot be told.
Check = Callable[[Path], bool | None]
# Judges a model, and says why it is bad or cannot be judged.
Judging = Callable[[ir.Model], tuple[Verdict, str]]


def by_outputs(job: Run) -> Judging:
    """Return what judges a model by its structure and its outputs; of a lossy run, by whether it runs at all.

    Raises:
        UsageError: The original does not run.
    """
    guarantee = weakest(step.guarantee for step in job.steps)
    judge = job.open_judge()
    if judge.reference is None or judge.cannot_probe is not None:
        raise UsageError(f"outputs cannot be compared: {judge.cannot_probe}", hint="give `--data`, or a `--check`")
    signature, known = Signature.of(job.original), problems_of(job.original)
    is_consistent = contradiction(job.original) is None

    def verdict_of(model: ir.Model) -> tuple[Verdict, str]:
        try:
            verify(model, signature, provenance_too=True, known=known)
            why = contradiction(model) if is_consistent else None
            return ("bad", why) if why is not None else _compared(judge, model, guarantee)
        except VerificationError as error:
            return "bad", error.message
        except BackendError as error:
            return "bad", f"it does not run: {error.message}"

    return verdict_of


def _compared(judge: Judge, model: ir.Model, guarantee: Guarantee) -> tuple[Verdict, str]:
    assert judge.reference is not None, "the original runs"
    outputs = judge.probe(model)
    if guarantee is Guarantee.LOSSY:
        check = poisoned(judge.reference, outputs)
        return ("good", "") if check is None else ("bad", check.why or "")
    comparison = compare_outputs(judge.reference, outputs)
    if comparison.says_nothing:
        return "skip", "only NaN or infinity on these inputs"
    ok = comparison.equal if guarantee is Guarantee.EXACT else comparison.within()
    worst = comparison.worst
    if ok or worst is None:
        return "good", ""
    # A session may give the same in its first run each time, so that running it again shows nothing.
    random = next((node for node in walk.every_node(model) if walk.is_random(node)), None)
    why = f", and differs from run to run: `{walk.label(random)}` is a {random.op_type}" if random is not None else ""
    return "bad", f"output `{worst.name}` is off by {worst.max_abs:.3g}{why}"


def loss_of(job: Run) -> tuple[str, Callable[[ir.Model], float]]:
    """Return what a lossy run is measured by, and the measure: the metric of a budget, or the noise of the outputs."""
    judge = job.judge
    assert judge is not None, "opened to judge the original"
    if not job.budgets:
        return NOISE, lambda model: _noise(judge, model)
    budget = job.budgets[0]
    metric, before = job.metric_types[budget.metric], judge.score(job.original)[budget.metric]
    return budget.metric, lambda model: budget.loss(before, judge.score(model)[budget.metric], metric)


def _noise(judge: Judge, model: ir.Model) -> float:
    """Return the noise of the outputs as a share of their signal, a mean over outputs."""
    assert judge.reference is not None, "the original runs"
    outputs = compare_outputs(judge.reference, judge.probe(model)).outputs.values()
    return sum(0.0 if one.equal else float(10 ** (-one.sqnr_db / 10)) for one in outputs) / max(len(outputs), 1)


def by_check(check: str | Check) -> Judging:
    """Return what judges a model's file as the user says."""
    ask = _command_check(check) if isinstance(check, str) else _function_check(check)

    def verdict_of(model: ir.Model) -> tuple[Verdict, str]:
        with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
            file = Path(folder) / "model.onnx"
            save(model, file)
            return ask(file)

    return verdict_of


_Ask = Callable[[Path], tuple[Verdict, str]]


def _function_check(check: Check) -> _Ask:
    def ask(file: Path) -> tuple[Verdict, str]:
        try:
            good = check(file)
        except Exception as error:
            raise UsageError(f"the check failed: {in_words(error)}", hint="it returns True, False, or None") from error
        return ("skip", "the check cannot tell") if good is None else ("good", "") if good else ("bad", "by the check")

    return ask


def _command_check(text: str) -> _Ask:
    command = CheckCommand.parse(text)

    def ask(file: Path) -> tuple[Verdict, str]:
        code = command.run(file)
        if code < 0 or code >= FIRST_ABORTING_EXIT:
            raise GraphoptError(
                f"check `{text}` {ending(code)}", hint="codes from 128 end the search, as for `git bisect run`"
            )
        if code == EXIT_SKIP:
            return "skip", "the check cannot tell"
        return ("good", "") if code == 0 else ("bad", f"the check {ending(code)}")

    return ask
