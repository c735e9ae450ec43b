"""Bisection: the one edit that breaks a model, found by binary search over the numbered edits of a run."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, NoReturn

import onnx_ir as ir

from graphopt.authoring import Guarantee, Pass
from graphopt.choices import ModelLike
from graphopt.debugging.edit_costs import EditCosts, costly_edits, is_measurable
from graphopt.debugging.edit_states import EditStates
from graphopt.debugging.idle_edits import idle_edits
from graphopt.debugging.verdicts import Check, Verdict, by_check, by_outputs, loss_of
from graphopt.errors import UsageError
from graphopt.model_diff import changed_lines
from graphopt.model_io import save
from graphopt.optimization import Run
from graphopt.output_files import is_same_file
from graphopt.pipeline import Pipeline, weakest
from graphopt.reproducer import as_arguments
from graphopt.request import Request
from graphopt.rewriter import Edit

LAST_GOOD, FIRST_BAD = "last_good.onnx", "first_bad.onnx"
_NOTHING_HINT = "nothing to search for; other `--data`, a `--budget` or a `--check` may see what is wrong"


@dataclass(frozen=True)
class Judged:
    """One state of the run that was judged.

    Attributes:
        edits: How many edits it has.
        of: How many the whole run makes.
        verdict: What came out; of a lossy run, what is lost is ``measured``.
        why: Why it is bad or cannot be judged, or what is lost, or an empty text.
    """

    edits: int
    of: int
    verdict: Verdict | Literal["measured"]
    why: str = ""


@dataclass(frozen=True)
class Bisection:
    """What `bisect` found.

    Attributes:
        kind: What the suspects do: one of them ``breaks`` the model; they ``cost`` most of what a lossy run loses; or
            they are ``idle``, and change nothing although the pass says so.
        suspects: The edits; exactly one unless states between could not be judged, or what is lost is spread.
        total: How many edits the run makes.
        before: Nodes and constants the edit removed or changed, as text; of all suspects together if several.
        after: What stands there instead.
        judged: Every state that was judged, in order.
        files: The last good and the first bad model, where they were asked for.
        repeat: The command that makes the first bad model.
        costs: What is lost by which edits, of a lossy run.
    """

    kind: Literal["breaks", "costs", "idle"]
    suspects: tuple[Edit, ...]
    total: int
    before: tuple[str, ...]
    after: tuple[str, ...]
    judged: tuple[Judged, ...]
    repeat: str
    files: tuple[Path, Path] | None = None
    costs: EditCosts | None = None

    @property
    def edit(self) -> Edit | None:
        """The one edit that is to blame, or None where several are left."""
        return self.suspects[0] if len(self.suspects) == 1 else None


def bisect(
    model: ModelLike,
    passes: str | Pipeline | Pass | Sequence[str | Pass],
    *,
    check: str | Check | None = None,
    data: Any = None,
    evaluation: Any = None,
    teacher: ModelLike | None = None,
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
    the passes. A check of one's own takes the place of all this. Lossy passes change the outputs by their nature: of
    these, the edits are found that cost most, in the metric of the budget if there is one. Where nothing is wrong,
    edits are found that change nothing.

    Args:
        model: A model, which is not changed, or a path to one.
        passes: Pipeline text, or passes and names of passes in a list.
        check: A function of a model's file, or a command in which ``{model}`` stands for it. Exit codes are those of
            `git bisect run`: 0 is good, 125 cannot be told, others up to 127 are bad, and those above end the search.
        data: Samples to calibrate on and to compare outputs on, as `optimize` takes them.
        evaluation: Samples to score.
        teacher: A model that the result is to be like, as `optimize` takes it.
        labels: Key of the labels in the data.
        metric: Metric to score by.
        budget: The most a metric may lose; what is lossy is judged by the noise of the outputs without one.
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
        teacher=Path(teacher) if isinstance(teacher, str) else teacher,
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
    if folder is not None:
        _check_folder(folder, model)
    return _Search(request, check, on_judged).run(folder)


def _check_folder(folder: Path, model: ModelLike) -> None:
    """Check, before any work, that models can be written into a folder.

    Raises:
        UsageError: They cannot.
    """
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"output `{folder}` is no folder", hint="name a folder; two models are written into it")
    place = next(one for one in (folder.absolute(), *folder.absolute().parents) if one.exists())
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise UsageError(f"output `{folder}` cannot be written: nothing can be put into `{place}`", hint="name another")
    if isinstance(model, (str, Path)) and any(
        is_same_file(folder / one, Path(model)) for one in (LAST_GOOD, FIRST_BAD)
    ):
        raise UsageError(f"`{model}` would be overwritten by what is found", hint="name another folder")


class _Search:
    def __init__(self, request: Request, check: str | Check | None, on_judged: Callable[[Judged], None] | None) -> None:
        self.job = Run(request)
        self.on_judged = on_judged
        self.judged: list[Judged] = []
        self.is_lossy = check is None and weakest(step.guarantee for step in self.job.steps) is Guarantee.LOSSY
        self.judge = by_check(check) if check is not None else by_outputs(self.job)
        self.states = EditStates(self.job)

    def run(self, folder: Path | None) -> Bisection:
        self._check_original()
        last = self._verdict(len(self.states))
        if last == "bad":
            good, bad = self._narrow()
            return self._found("breaks", tuple(self.states.edits[good:bad]), (good, bad), folder)
        if last == "good" and self.is_lossy:
            return self._costs(folder)
        idle = idle_edits(self.states) if last == "good" else []
        if not idle:
            self._refuse(last, looked=idle is not None)
        at = idle[0].number
        return self._found("idle", tuple(idle), (at - 1, at), folder)

    def _costs(self, folder: Path | None) -> Bisection:
        """Return the edits that cost most of what a lossy run loses."""
        what, measure = loss_of(self.job)

        def loss(count: int) -> float:
            with self.job.display.stage(f"measuring edit {count} of {len(self.states)}"):
                lost = measure(self.states[count])
            text = f"{lost:.3g} of {what} lost" if self.job.budgets else f"{what} {lost:.3g}"
            self._tell(Judged(count, len(self.states), "measured", text))
            return lost

        whole = loss(len(self.states))
        if not is_measurable(whole):
            raise UsageError(
                f"nothing is lost that could be told: {what} {whole:.3g}",
                hint="other `--data`, a `--budget` or a `--check` may see what is wrong",
            )
        costs = costly_edits(self.states.edits, lambda count: whole if count == len(self.states) else loss(count), what)
        worst = costs.dominant
        suspects = (worst,) if worst is not None else tuple(one.edit for one in costs.costs)
        at = suspects[0].number if suspects else len(self.states)
        return self._found("costs", suspects, (at - 1, at), folder, costs)

    def _found(
        self,
        kind: Literal["breaks", "costs", "idle"],
        suspects: tuple[Edit, ...],
        between: tuple[int, int],
        folder: Path | None,
        costs: EditCosts | None = None,
    ) -> Bisection:
        before, after = (self.states[count] for count in between)
        removed, added = changed_lines(before, after)
        files = None
        if folder is not None:
            files = folder / LAST_GOOD, folder / FIRST_BAD
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(f"cannot make folder `{folder}`: {error.strerror}", hint="name another") from error
            for model, file in zip((before, after), files, strict=True):
                save(model, file)
        return Bisection(
            kind=kind,
            suspects=suspects,
            total=len(self.states),
            before=tuple(removed),
            after=tuple(added),
            judged=tuple(self.judged),
            repeat=self._command(between[1]),
            files=files,
            costs=costs,
        )

    def _narrow(self) -> tuple[int, int]:
        """Return a good number of edits and a bad one, with nothing between them that can be judged."""
        good, bad, skipped = 0, len(self.states), set[int]()
        while (middle := _nearest_open(good, bad, skipped)) is not None:
            verdict = self._verdict(middle)
            if verdict == "good":
                good = middle
            elif verdict == "bad":
                bad = middle
            else:
                skipped.add(middle)
        return good, bad

    def _check_original(self) -> None:
        if self._verdict(0) != "good":
            raise UsageError(
                f"the original is not good itself: {self.judged[-1].why}",
                hint="no edit is to blame; mend the model, the data or the check first",
            )
        if not len(self.states):
            raise UsageError("the passes make no edit", hint=_NOTHING_HINT)

    def _refuse(self, verdict: Verdict, *, looked: bool) -> NoReturn:
        count = len(self.states)
        if verdict == "skip":
            raise UsageError(f"the result cannot be judged: {self.judged[-1].why}", hint=_NOTHING_HINT)
        idle = "none of them idle" if looked else "too many to look for idle ones"
        raise UsageError(f"the result is good, with {count} of {count} edits made, {idle}", hint=_NOTHING_HINT)

    def _verdict(self, edits: int) -> Verdict:
        with self.job.display.stage(f"judging edit {edits} of {len(self.states)}"):
            verdict, why = self.judge(self.states[edits])
        self._tell(Judged(edits, len(self.states), verdict, why))
        return verdict

    def _tell(self, judged: Judged) -> None:
        self.judged.append(judged)
        if self.on_judged is not None:
            self.on_judged(judged)

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


def describe(found: Bisection) -> Iterator[str]:
    """Yield what was found, as lines of text."""
    if found.costs is not None:
        yield from _costs_in_words(found.costs, found.total)
    elif found.kind == "idle":
        yield f"the result is good; {len(found.suspects)} of {found.total} edits change nothing"
    elif found.edit is None:
        yield f"one of {len(found.suspects)} edits breaks the model; what is between them cannot be told"
    for edit in found.suspects if found.costs is None else ():
        for word, line in _edit_in_words(edit, found.total):
            yield f" {word:<8} {line}"
    for word, lines in (("before", found.before), ("after", found.after)):
        yield from (f" {word:<8} {line}" for line in lines)


def _edit_in_words(edit: Edit, total: int) -> Iterator[tuple[str, str]]:
    yield "edit", f"{edit.number} of {total}"
    yield "pass", edit.pass_name
    yield "rule", edit.rule
    yield "nodes", ", ".join(edit.nodes) or "–"
    yield "origins", ", ".join(sorted(edit.origins)) or "–"


def _costs_in_words(costs: EditCosts, total: int) -> Iterator[str]:
    yield costs.describe()
    at_worst = f", {costs.worst:.3g} at worst" if costs.is_made_up_for else ""
    yield f" {costs.lost}: {costs.total:.3g} in {total} edits{at_worst}; those listed cost {costs.found:.0%} of it"
    for one in costs.costs:
        where = ", ".join(one.edit.nodes) or ", ".join(sorted(one.edit.origins)) or "–"
        edit = f"edit {one.edit.number}, {one.edit.rule} of {one.edit.pass_name} at {where}"
        yield f" {one.share:>6.1%}  {one.cost:.3g}: {edit}"
