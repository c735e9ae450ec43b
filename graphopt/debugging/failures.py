"""Failures a model can show: its passes', its runtime's, or a user's check, each told apart from others."""

from __future__ import annotations

import re
import tempfile
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Guarantee, Need
from graphopt.backend import Array, Backend
from graphopt.choices import find_backend, find_target
from graphopt.comparison import Comparison
from graphopt.debugging.user_check import EXIT_SKIP, CheckCommand, in_words
from graphopt.errors import BackendError, PassError, UsageError, VerificationError
from graphopt.errors import in_words as error_in_words
from graphopt.evaluation import Judge, compare_outputs
from graphopt.instruments import VerifyNumerics, VerifyStructure
from graphopt.model_io import save
from graphopt.optimization import Run
from graphopt.pipeline import Pipeline
from graphopt.plain_runs import with_plain_runs
from graphopt.regression.stored_arrays import write_feed
from graphopt.request import Request

# Words of a message by which a failure is recognised.
_TELLING_WORDS = 16
INPUTS_FILE = "inputs.npz"

Feed = Mapping[str, Array]


@dataclass(frozen=True)
class Failure:
    """What is wrong with a model.

    Attributes:
        kind: By which two failures are one: what happened, without names, sizes and figures.
        text: One line for people.
    """

    kind: str
    text: str


@dataclass(frozen=True)
class Question:
    """What is asked of a model: whether a failure shows.

    Attributes:
        passes: Passes that fail on it, or whose result is not what they promise.
        check: A user's command or function that is to be bad.
        backend: Backend text; the target's own where None.
        other_backend: Another one, whose outputs differ.
        target: Name of the target.
        seed: Seed of everything random.
        threads: Threads for the backends.
        names: Names of the model in question, which say nothing about what is wrong.
    """

    passes: Pipeline | None = None
    check: CheckCommand | Callable[[Path], bool | None] | None = None
    backend: str | None = None
    other_backend: str | None = None
    target: str | None = None
    seed: int = 0
    threads: int = 0
    names: frozenset[str] = field(default_factory=frozenset)

    def ask(self, model: ir.Model, feed: Feed) -> Failure | None:
        """Return the failure a model shows, or None.

        Raises:
            UsageError: The question makes no sense for this model.
        """
        if self.check is not None:
            return _by_check(self.check, model, feed)
        if self.passes is not None:
            return _by_passes(self, self.passes, model, feed)
        return _by_backends(self, model, feed)

    def failure(self, what: str, message: str) -> Failure:
        """Return a failure that is recognised by what was done and what a message says."""
        return Failure(f"{what}: {telling(message, self.names)}", message)

    def open_backend(self) -> Backend:
        """Return the backend in question."""
        return with_plain_runs(find_backend(self.backend, find_target(self.target)))


def telling(message: str, names: Container[str]) -> str:
    """Return the words of a message that say what is wrong: no names of the model, no sizes and figures."""
    plain = re.sub(r"`[^`]*`|'[^']*'|\"[^\"]*\"|\{[^}]*\}|\([^)]*\)", " ", message)
    words = (word for word in re.split(r"[^\w.]+", plain) if word)
    return " ".join(
        [word for word in words if word not in names and not any(letter.isdigit() for letter in word)][:_TELLING_WORDS]
    )


def names_of(model: ir.Model) -> frozenset[str]:
    """Return the names of a model's nodes and values."""
    nodes = list(walk.every_node(model))
    values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
    return frozenset(name for name in (*(node.name for node in nodes), *(value.name for value in values)) if name)


def _by_check(check: CheckCommand | Callable[[Path], bool | None], model: ir.Model, feed: Feed) -> Failure | None:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        file, inputs = Path(folder) / "model.onnx", Path(folder) / INPUTS_FILE
        save(model, file)
        if isinstance(check, CheckCommand):
            write_feed(inputs, feed)
            code = check.run(file, inputs)
            if code in (0, EXIT_SKIP):
                return None
            return Failure(f"exit {code}", f"check `{check.text}` {in_words(code)}")
        try:
            good = check(file)
        except Exception as error:
            raise UsageError(
                f"the check failed: {error_in_words(error)}", hint="it returns True, False, or None"
            ) from error
        return None if good is None or good else Failure("check", "by the check")


def _by_passes(question: Question, passes: Pipeline, model: ir.Model, feed: Feed) -> Failure | None:
    """Run passes over a model and check each step, then the result as the runtime optimizes it."""
    job = Run(_request(question, passes, model, feed))
    judge = Judge(job.original, job.backend, None, [], seed=question.seed, threads=question.threads, feeds=[dict(feed)])
    watching = [VerifyStructure(lambda: job.original), VerifyNumerics(judge)]
    try:
        with job.opened:
            job.manager(watching).run(job.model)
    except (VerificationError, PassError) as error:
        cause = f" {type(error.__cause__).__name__}" if error.__cause__ is not None else ""
        step = re.match(r"(?:after )?pass `[^`]*`", error.message)
        where = step[0] if step is not None else "passes"
        return question.failure(f"{type(error).__name__} {where}{cause}", error.message)
    if judge.reference is None or any(step.guarantee is Guarantee.LOSSY for step in job.steps):
        return None
    deployed = judge.deployed(job.original, job.model)
    if deployed.ok is not False:
        return None
    return Failure("deployed", f"as deployed, the model changed: {deployed.why}")


def _request(question: Question, passes: Pipeline, model: ir.Model, feed: Feed) -> Request:
    wants_data = any(
        need in (Need.CALIBRATION, Need.CALIBRATION_OPTIONAL)
        for step in passes.steps
        for one in step.passes
        for need in one.needs
    )
    data = [dict(feed)] if wants_data and feed else None
    return Request(
        model=model,
        passes=passes,
        data=data,
        evaluation=data,
        target=question.target,
        backend=question.backend,
        verify="each",
        seed=question.seed,
        threads=question.threads,
    )


def _by_backends(question: Question, model: ir.Model, feed: Feed) -> Failure | None:
    """Run a model as deployed, and compare with another backend, or with its own optimizations off."""
    backend = question.open_backend()
    try:
        outputs = _outputs(backend, model, feed, question, optimize=True)
    except BackendError as error:
        return question.failure("refused", error.message)
    if question.other_backend is not None:
        other = find_backend(question.other_backend, find_target(question.target))
        how = f"{other.describe()} and {backend.describe()} differ"
    else:
        other, how = backend, f"the optimizations of {backend.describe()} change the outputs"
    try:
        expected = _outputs(other, model, feed, question, optimize=question.other_backend is not None)
    except BackendError:
        return None
    comparison = compare_outputs([expected], [outputs])
    if comparison.within() or comparison.says_nothing:
        return None
    return Failure(f"differs {_mismatch(comparison)}", f"{how}: {_by_how_much(comparison)}")


def _outputs(backend: Backend, model: ir.Model, feed: Feed, question: Question, *, optimize: bool) -> dict[str, Any]:
    with backend.open(model, threads=question.threads, optimize=optimize) as session:
        return session.run(feed)


def _mismatch(comparison: Comparison) -> str:
    worst = comparison.worst
    return "" if worst is None or worst.mismatch is None else re.sub(r"[\d\[\], ]+", " ", worst.mismatch)


def _by_how_much(comparison: Comparison) -> str:
    worst = comparison.worst
    assert worst is not None, "something differs"
    return f"output `{worst.name}` is off by {worst.max_abs:.3g} ({worst.mismatch or f'values up to {worst.peak:.3g}'})"
