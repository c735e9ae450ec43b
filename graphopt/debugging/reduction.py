"""Reduction: the smallest part of a model that still shows a failure."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Pass
from graphopt.backend import Array
from graphopt.choices import ModelLike, open_model
from graphopt.data import open_data
from graphopt.debugging.candidate_runs import ask, recorded
from graphopt.debugging.failures import Failure, Question, names_of
from graphopt.debugging.isolation import Isolation
from graphopt.debugging.reduction_cuts import (
    Known,
    bypassed,
    cut_out,
    entered,
    types_of,
    with_initializers,
    without_output,
    without_remarks,
)
from graphopt.debugging.reduction_folder import check_folder, write_folder
from graphopt.debugging.reduction_result import Progress, Reduction
from graphopt.debugging.reduction_search import fewest
from graphopt.debugging.reduction_sizes import ContentChange, SizeChange, content_changes, size_changes
from graphopt.debugging.reduction_values import feed_for
from graphopt.debugging.user_check import CheckCommand
from graphopt.errors import GraphoptError, UsageError
from graphopt.generated import generated_feeds
from graphopt.model_io import saved_bytes
from graphopt.pipeline import Pipeline
from graphopt.progress import Display
from graphopt.shapes import contradiction
from graphopt.verify import problems_of

Check = Callable[[Path], bool | None]
Feed = dict[str, Array]
# Rounds over the ways to make a model of few nodes smaller; each makes way for others, and one that gains nothing ends.
MOST_ROUNDS = 5
# A fault that is small next to rounding shows on some samples only.
MOST_SAMPLES = 8


def reduce(
    model: ModelLike,
    passes: str | Pipeline | Pass | Sequence[str | Pass] | None = None,
    *,
    check: str | Check | None = None,
    data: Any = None,
    backend: str | None = None,
    other_backend: str | None = None,
    target: str | None = None,
    seed: int = 0,
    threads: int = 0,
    isolate: bool = False,
    timeout: float | None = None,
    seconds: float | None = None,
    output: str | Path | None = None,
    progress: bool = False,
    on_progress: Callable[[Progress], None] | None = None,
) -> Reduction:
    """Find the smallest part of a model that still shows a failure.

    The failure is the first of these that is asked for: a check that is bad; passes that fail, or whose result is not
    what they promise; a backend that refuses the model, or whose outputs differ from another one's, or from its own
    without optimizations. Every candidate is a valid model, and shows the failure the original shows, not another one.

    Args:
        model: A model, which is not changed, or a path to one.
        passes: Pipeline text, or passes and names of passes in a list.
        check: A function of a model's file, or a command with ``{model}`` in it, as `bisect` takes them, and with
            ``{inputs}`` for an ``.npz`` file of what it runs on. What counts is the exit code the original gives.
        data: Samples, of which the first that shows the failure is used, one of 8; inputs are made up where None.
        backend: Backend text; the target's own where None.
        other_backend: A backend to compare it with.
        target: Name of the target.
        seed: Seed of everything random.
        threads: Threads for the backends.
        isolate: Try every candidate in a process of its own, and take its death for a failure.
        timeout: Seconds after which an isolated candidate is taken to hang.
        seconds: Time after which the smallest model found so far will do.
        output: Folder to write: the model, what it runs on, and all it takes to see the failure again.
        progress: Show a progress bar on stderr.
        on_progress: Told of each smaller model.

    Raises:
        UsageError: The model shows no failure, or what is asked for makes no sense.
    """
    if check is not None and passes is not None:
        raise UsageError("give either passes or a check", hint="a check of one's own may run passes, too")
    question = Question(
        passes=Pipeline.of(passes) if passes is not None else None,
        check=CheckCommand.parse(check) if isinstance(check, str) else check,
        backend=backend,
        other_backend=other_backend,
        target=target,
        seed=seed,
        threads=threads,
    )
    folder = Path(output) if output is not None else None
    check_folder(folder)
    display = Display(progress)
    with display.stage("opening the model"):
        original = open_model(model)
        feeds = _feeds(original, data, seed)
    question = replace(question, names=names_of(original))
    with contextlib.ExitStack() as stack:
        isolation = stack.enter_context(Isolation(timeout)) if isolate or timeout is not None else None
        search = _Search(question, original, feeds, isolation, seconds, display, on_progress)
        found = search.run()
    if folder is not None:
        write_folder(folder, found, question, isolated=isolation is not None, timeout=timeout)
        found = replace(found, folder=folder)
    return found


def _feeds(model: ir.Model, data: Any, seed: int) -> list[Feed]:
    if data is None:
        return generated_feeds(model, seed)
    return [dict(batch.feeds) for batch in open_data(data, model).take(MOST_SAMPLES).batches(1)]


class _TimeIsUp(Exception):
    """Ends a search that may take a limited time."""


class _Search:
    def __init__(
        self,
        question: Question,
        original: ir.Model,
        feeds: Sequence[Feed],
        isolation: Isolation | None,
        seconds: float | None,
        display: Display,
        on_progress: Callable[[Progress], None] | None,
    ) -> None:
        self.question, self.isolation, self.display, self.on_progress = question, isolation, display, on_progress
        self.model, self.feeds = original, feeds
        self.started = time.monotonic()
        self.until = self.started + seconds if seconds is not None else None
        self.tried = 0
        self.came_with, self.is_consistent = problems_of(original), contradiction(original) is None
        self.before = _count(original), saved_bytes(original)

    def run(self) -> Reduction:
        first = self.wanted = self.shown = self._first_failure()
        complete = True
        try:
            self._shrink()
        except _TimeIsUp:
            complete = False
        return Reduction(
            model=self.model,
            feed=self.feed,
            failure=self.shown,
            original=first,
            nodes=(self.before[0], _count(self.model)),
            bytes=(self.before[1], saved_bytes(self.model)),
            tried=self.tried,
            seconds=time.monotonic() - self.started,
            complete=complete,
        )

    def _first_failure(self) -> Failure:
        """Return what is wrong with the original, on the first feed that shows it."""
        with self.display.stage("looking at the failure"):
            for feed in self.feeds:
                shown = ask(self.question, self.model, feed, self.isolation)
                if shown is not None:
                    self.feed = feed
                    return shown
        raise UsageError("the model shows no failure", hint="other `--data`, `--passes` or a `--check` may show it")

    def _shrink(self) -> None:
        """Make the model smaller until nothing helps: fewer nodes first, then smaller ones."""
        self._take("constants", [(with_initializers(self.model), self.feed)])
        for _ in range(MOST_ROUNDS):
            before = self.model
            self._cut()
            self._repeat(
                "outputs", lambda: (without_output(self.model, i) for i in range(len(self.model.graph.outputs)))
            )
            self._repeat("branches", lambda: (one for i in self._places() for one in entered(self.model, i)))
            self._repeat("bypassed", self._bypassed)
            if self.model is before:
                break
        self._change("sizes", lambda: size_changes(self.model, self.feed))
        self._take("remarks", [(without_remarks(self.model), self.feed)])
        self._change("contents", lambda: content_changes(self.model, self.feed))

    def _bypassed(self) -> Iterator[ir.Model]:
        types = types_of(self.model)
        for index in self._places():
            yield from bypassed(self.model, index, types)

    def _places(self) -> range:
        return range(len(self.model.graph))

    def _cut(self) -> None:
        """Leave out every node the failure does not need."""
        whole, known = self.model, self._known()
        if len(whole.graph) < 2:
            return

        def candidates(kept: Sequence[int]) -> Iterator[tuple[ir.Model, Feed]]:
            for fix_shapes in (False, True):
                part = cut_out(whole, kept, known, fix_shapes=fix_shapes)
                feed = feed_for(part, known.arrays, self.question.seed) if part is not None else None
                if part is not None and feed is not None:
                    yield part, feed
                if part is None or not any(_may_be_shape(value, known) for value in part.graph.inputs):
                    return

        with self.display.stage("leaving out nodes", noun="candidates"):
            fewest(range(len(whole.graph)), lambda kept: self._take("nodes", candidates(kept)))

    def _known(self) -> Known:
        return Known(types_of(self.model), recorded(self.question, self.model, self.feed, self.isolation))

    def _repeat(self, stage: str, models: Callable[[], Iterable[ir.Model | None]]) -> None:
        """Take one smaller model after the other, for as long as there is one."""

        def states() -> Iterator[tuple[ir.Model, Feed]]:
            arrays = self.feed
            for model in models():
                feed = feed_for(model, arrays, self.question.seed) if model is not None else None
                if model is not None and feed is not None:
                    yield model, feed

        with self.display.stage(stage, noun="candidates"):
            while self._take(stage, states()):
                continue

    def _change(self, stage: str, changes: Callable[[], Iterable[SizeChange | ContentChange]]) -> None:
        """Try every change of the model as it is by then, each once."""
        tried = set[SizeChange | ContentChange]()
        with self.display.stage(stage, noun="candidates"):
            while (change := next((one for one in changes() if one not in tried), None)) is not None:
                tried.add(change)
                self._take(stage, [change.apply(self.model, self.feed)])

    def _take(self, stage: str, states: Iterable[tuple[ir.Model, Feed]]) -> bool:
        """Take the first candidate that shows the failure, and return whether there is one."""
        for model, feed in states:
            if self.until is not None and time.monotonic() > self.until:
                raise _TimeIsUp
            shown = self._asked_safely(model, feed)
            if shown is not None and shown.kind == self.wanted.kind:
                self.model, self.feed, self.shown = model, feed, shown
                if self.on_progress is not None:
                    self.on_progress(Progress(stage, _count(model), saved_bytes(model), self.tried))
                return True
        return False

    def _asked_safely(self, model: ir.Model, feed: Feed) -> Failure | None:
        """Return the failure of a candidate; none of one that is no valid model, or cannot be asked about."""
        self.tried += 1
        self.display.advance(1, "candidates")
        if problems_of(model) - self.came_with or (self.is_consistent and contradiction(model) is not None):
            return None
        try:
            return ask(self.question, model, feed, self.isolation)
        except GraphoptError:
            return None


def _may_be_shape(value: ir.Value, known: Known) -> bool:
    array = known.arrays.get(value.name or "")
    return array is not None and array.dtype.kind in "iub"


def _count(model: ir.Model) -> int:
    return sum(1 for _ in walk.every_node(model))
