"""Bisection: the one edit that breaks a model, found by binary search over the numbered edits of a run."""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnx_ir as ir

from graphopt.authoring import Guarantee, Pass
from graphopt.choices import ModelLike
from graphopt.driver import Run
from graphopt.errors import BackendError, GraphoptError, UsageError, VerificationError, in_words
from graphopt.evaluation import Judge, compare_outputs
from graphopt.model_diff import changed_lines
from graphopt.model_io import save
from graphopt.pipeline import Pipeline, weakest
from graphopt.reproducer import as_arguments
from graphopt.request import Request
from graphopt.rewriter import Edit
from graphopt.shapes import forget_inferred
from graphopt.verify import Signature, problems_of, verify

Verdict = Literal["good", "bad", "skip"]
# What a command says of a model by its exit code, as `git bisect run` reads it.
EXIT_SKIP, FIRST_ABORTING_EXIT = 125, 128
LAST_GOOD, FIRST_BAD = "last_good.onnx", "first_bad.onnx"
# Judges the file of a model: whether it is good, or None where that cannot be told.
Check = Callable[[Path], bool | None]


@dataclass(frozen=True)
class Judged:
    """One state of the run that was judged.

    Attributes:
        edits: How many edits it has.
        of: How many the whole run makes.
        verdict: What came out.
        why: Why it is bad or cannot be judged, or an empty text.
    """

    edits: int
    of: int
    verdict: Verdict
    why: str = ""


@dataclass(frozen=True)
class Bisection:
    """What `bisect` found.

    Attributes:
        suspects: The edits one of which breaks the model; exactly one unless states between could not be judged.
        total: How many edits the run makes.
        before: Nodes and constants the edit removed or changed, as text; of all suspects together if several.
        after: What stands there instead.
        judged: Every state that was judged, in order.
        files: The last good and the first bad model, where they were asked for.
        repeat: The command that makes the first bad model.
    """

    suspects: tuple[Edit, ...]
    total: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    judged: tuple[Judged, ...]
    repeat: str
    files: tuple[Path, Path] | None = None

    @property
    def edit(self) -> Edit | None:
        """The one edit that breaks the model, or None where several are left."""
        return self.suspects[0] if len(self.suspects) == 1 else None


def bisect(
    model: ModelLike,
    passes: str | Pipeline | Pass | Sequence[str | Pass],
    *,
    check: str | Check | None = None,
    data: Any = None,
    evaluation: Any = None,
    labels: str | None = None,
    metric: str | None = None,
    budget: str | Sequence[str] = (),
    target: str | None = None,
    backend: str | None = None,
    set_dims: Mapping[str, int] | None = None,
    set_shapes: Mapping[str, Sequence[int]] | None = None,
    seed: int = 0,
    threads: int = 0,
    output: str | Path | None = None,
    progress: bool = False,
    on_judged: Callable[[Judged], None] | None = None,
) -> Bisection:
    """Find the one edit that breaks a model, in a number of checks that grows with the logarithm of the edits.

    A state is bad if it is malformed, does not run, or its outputs are not those of the original by the guarantee of
    the passes; with a budget, if it loses more than that. A check of one's own takes the place of all this.

    Args:
        model: A model, which is not changed, or a path to one.
        passes: Pipeline text, or passes and names of passes in a list.
        check: A function of a model's file, or a command in which ``{model}`` stands for it. Exit codes are those of
            `git bisect run`: 0 is good, 125 cannot be told, others up to 127 are bad, and those above end the search.
        data: Samples to calibrate on and to compare outputs on, as `optimize` takes them.
        evaluation: Samples to score.
        labels: Key of the labels in the data.
        metric: Metric to score by.
        budget: The most a metric may lose; what is lossy needs one, or a check.
        target: Name of the target.
        backend: Backend text.
        set_dims: Sizes to fix dimensions of the inputs to, by name.
        set_shapes: The same by name of input.
        seed: Seed of everything random.
        threads: Threads for the backend.
        output: Folder for the last good and the first bad model; they are written nowhere where None.
        progress: Show a progress bar on stderr.
        on_judged: Told of each state once it is judged.

    Raises:
        UsageError: The original is bad already, the result is good, or nothing can tell.
        GraphoptError: The passes cannot be run to their end.
    """
    request = Request(
        model=model,
        passes=passes,
        data=data,
        evaluation=evaluation,
        labels=labels,
        metric=metric,
        budget=[budget] if isinstance(budget, str) else list(budget),
        target=target,
        backend=backend,
        # The original must be kept and run; checks of single passes would only get in the way.
        verify="final" if check is None else "off",
        set_dims=set_dims or {},
        set_shapes=set_shapes or {},
        seed=seed,
        threads=threads,
        progress=progress,
    )
    folder = Path(output) if output is not None else None
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"output `{folder}` is no folder", hint="name a folder; two models are written into it")
    return _Search(request, check, on_judged).run(folder)


class _Search:
    def __init__(self, request: Request, check: str | Check | None, on_judged: Callable[[Judged], None] | None) -> None:
        self.job = Run(request)
        # Edits are made on clones.
        self.start = self.job.model.clone()
        self.on_judged = on_judged
        self.judged: list[Judged] = []
        self.judge = _by_check(check) if check is not None else _by_outputs(self.job)
        self.edits = self._all_edits()

    def run(self, folder: Path | None) -> Bisection:
        good, bad = self._narrow()
        before, after = self.state(good), self.state(bad)
        removed, added = changed_lines(before, after)
        files = None
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            files = folder / LAST_GOOD, folder / FIRST_BAD
            for model, file in zip((before, after), files, strict=True):
                save(model, file)
        return Bisection(
            suspects=tuple(self.edits[good:bad]),
            total=len(self.edits),
            before=tuple(removed),
            after=tuple(added),
            judged=tuple(self.judged),
            repeat=self._command(bad),
            files=files,
        )

    def _narrow(self) -> tuple[int, int]:
        """Return a good number of edits and a bad one, with nothing between them that can be judged."""
        good, bad, skipped = 0, len(self.edits), set[int]()
        self._check_ends(bad)
        while (middle := _nearest_open(good, bad, skipped)) is not None:
            verdict = self._verdict(middle)
            if verdict == "good":
                good = middle
            elif verdict == "bad":
                bad = middle
            else:
                skipped.add(middle)
        return good, bad

    def _check_ends(self, last: int) -> None:
        if self._verdict(0) != "good":
            raise UsageError(
                f"the original is not good itself: {self.judged[-1].why}",
                hint="no edit is to blame; mend the model, the data or the check first",
            )
        hint = "nothing to search for; other `--data`, a `--budget` or a `--check` may see what is wrong"
        if last == 0:
            raise UsageError("the passes make no edit", hint=hint)
        verdict = self._verdict(last)
        if verdict == "good":
            raise UsageError(f"the result is good, with {last} of {last} edits made", hint=hint)
        if verdict == "skip":
            raise UsageError(f"the result cannot be judged: {self.judged[-1].why}", hint=hint)

    def _verdict(self, edits: int) -> Verdict:
        with self.job.display.stage(f"judging edit {edits} of {len(self.edits)}"):
            verdict, why = self.judge(self.state(edits))
        self.judged.append(Judged(edits, len(self.edits), verdict, why))
        if self.on_judged is not None:
            self.on_judged(self.judged[-1])
        return verdict

    def _all_edits(self) -> list[Edit]:
        with self.job.display.stage("counting edits"):
            manager = self.job.manager()
            model = self.start.clone()
            with self.job.opened:
                manager.run(model)
        return manager.journal.edits

    def state(self, edits: int) -> ir.Model:
        """Return the model as the run has it after some of its edits."""
        model = self.start.clone()
        if edits:
            with self.job.opened:
                self.job.manager(limit=edits).run(model)
            forget_inferred(model)
        return model

    def _command(self, edits: int) -> str:
        request = self.job.request
        model = "MODEL" if isinstance(request.model, ir.Model) else str(request.model)
        words = as_arguments(replace(request, budget=(), metric=None, evaluation=None).plain_options)
        end = ("--stop-after-edits", str(edits), "--verify", "off", "-o", FIRST_BAD)
        return shlex.join(["graphopt", "optimize", model, "--passes", str(self.job.pipeline), *words, *end])


def _nearest_open(good: int, bad: int, skipped: set[int]) -> int | None:
    """Return the number nearest to the middle of two that was not skipped, or None."""
    middle = (good + bad) // 2
    for distance in range(bad - good):
        for number in (middle - distance, middle + distance):
            if good < number < bad and number not in skipped:
                return number
    return None


_Judge = Callable[[ir.Model], tuple[Verdict, str]]


def _by_outputs(job: Run) -> _Judge:
    """Return what judges a model by its structure and its outputs, or what it scores.

    Raises:
        UsageError: The original does not run, or a pass is lossy and there is no budget.
    """
    guarantee = weakest(step.guarantee for step in job.steps)
    if guarantee is Guarantee.LOSSY and not job.budgets:
        raise UsageError(
            "a lossy pass changes the outputs by its nature", hint="say how much is too much: `--budget` or `--check`"
        )
    judge = job.open_judge()
    if judge.reference is None or judge.cannot_probe is not None:
        raise UsageError(f"outputs cannot be compared: {judge.cannot_probe}", hint="give `--data`, or a `--check`")
    signature, known = Signature.of(job.original), problems_of(job.original)
    baseline = judge.score(job.original) if job.budgets else {}

    def verdict_of(model: ir.Model) -> tuple[Verdict, str]:
        try:
            verify(model, signature, provenance_too=True, known=known)
            why = _loss(job, judge, model, baseline) if job.budgets else ""
            if guarantee is not Guarantee.LOSSY and not why:
                return _compared(judge, model, guarantee)
        except VerificationError as error:
            return "bad", error.message
        except BackendError as error:
            return "bad", f"it does not run: {error.message}"
        return ("bad", why) if why else ("good", "")

    return verdict_of


def _compared(judge: Judge, model: ir.Model, guarantee: Guarantee) -> tuple[Verdict, str]:
    assert judge.reference is not None, "the original runs"
    comparison = compare_outputs(judge.reference, judge.probe(model))
    if comparison.says_nothing:
        return "skip", "only NaN or infinity on these inputs"
    ok = comparison.equal if guarantee is Guarantee.EXACT else comparison.within()
    worst = comparison.worst
    return ("good", "") if ok or worst is None else ("bad", f"output `{worst.name}` is off by {worst.max_abs:.3g}")


def _loss(job: Run, judge: Judge, model: ir.Model, baseline: dict[str, float]) -> str:
    """Return how a model is over budget, or nothing."""
    scores = judge.score(model)
    for budget in job.budgets:
        metric, old, new = job.metric_types[budget.metric], baseline[budget.metric], scores[budget.metric]
        if not budget.allows(old, new, metric):
            return f"{budget.metric} went from {metric.show(old)} to {metric.show(new)}"
    return ""


def _by_check(check: str | Check) -> _Judge:
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


def _command_check(command: str) -> _Ask:
    try:
        words = shlex.split(command)
    except ValueError as error:
        raise UsageError(f"check `{command}` is no command: {error}", hint="check its quotes") from error
    if not any("{model}" in word for word in words):
        raise UsageError(f"check `{command}` does not say where the model goes", hint='e.g. "python test.py {model}"')

    def ask(file: Path) -> tuple[Verdict, str]:
        try:
            # No shell: a model's path is never code. What the command prints is not ours to show as a result.
            code = subprocess.run([word.replace("{model}", str(file)) for word in words], stdout=subprocess.DEVNULL)
        except OSError as error:
            raise UsageError(f"check `{words[0]}` cannot run: {error.strerror}", hint="name a program") from error
        return _verdict_of_exit(code.returncode, command)

    return ask


def _verdict_of_exit(code: int, command: str) -> tuple[Verdict, str]:
    if code < 0 or code >= FIRST_ABORTING_EXIT:
        how = f"was ended by signal {-code}" if code < 0 else f"exits with {code}"
        raise GraphoptError(f"check `{command}` {how}", hint="codes from 128 end the search, as for `git bisect run`")
    if code == EXIT_SKIP:
        return "skip", "the check cannot tell"
    return ("good", "") if code == 0 else ("bad", f"the check exits with {code}")


def describe(found: Bisection) -> Iterator[tuple[str, str]]:
    """Yield what was found, as pairs of a word and a line of text."""
    for edit in found.suspects:
        yield "edit", f"{edit.number} of {found.total}"
        yield "pass", edit.pass_name
        yield "rule", edit.rule
        yield "nodes", ", ".join(edit.nodes) or "–"
        yield "origins", ", ".join(sorted(edit.origins)) or "–"
    for word, lines in (("before", found.before), ("after", found.after)):
        yield from ((word, line) for line in lines)
