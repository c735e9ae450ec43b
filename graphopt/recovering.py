"""Recovery in one call: a student is trained until it does what its teacher does, and is judged against that."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt import options as option_text
from graphopt import registry
from graphopt.authoring import Pass
from graphopt.choices import ModelLike
from graphopt.driver import optimize
from graphopt.errors import UsageError
from graphopt.optimization import Result
from graphopt.request import Verify

PASS = "recover"


def recover(
    student: ModelLike,
    teacher: ModelLike | None = None,
    *,
    data: Any,
    options: str | Mapping[str, Any] | Pass = "",
    output: str | Path | None = None,
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
    report: str | Path | Sequence[str | Path] | None = None,
    progress: bool = False,
) -> Result:
    """Train a model that lost something until it does again what another one does, or what labels say.

    It is a run of the pass `recover` alone; `graphopt.optimize` has it as a step among others.

    Args:
        student: The model to train, which is not changed, or a path to one.
        teacher: A model of the same inputs and outputs to learn from, and to be scored against; None to learn from
            labels, or from the text itself.
        data: Samples to train on, as for `graphopt.optimize`; a quarter is held back where there is no ``evaluation``.
        options: Options of the pass: as text, ``epochs=5:rate=1e-4``; by name, ``{"epochs": 5}``; or the pass itself.
        output: File to write; nothing is written where None.
        evaluation: Samples to score.
        labels: Key of the labels in the data.
        metric: Metric to score by.
        budget: The most a metric may lose against the teacher, ``METRIC=DROP``, or several.
        target: Name of the target.
        backend: Backend that scores the result.
        verify: When to check.
        seed: Seed of everything random.
        threads: Threads to train with, and of the backend; 0 leaves it to them.
        keep_failed: Write the result even if a check or the budget failed.
        report: File to write the report to, or several.
        progress: Show a progress bar on stderr.

    Raises:
        GraphoptError: One line that says what is wrong, where, and what to do.
    """
    return optimize(
        student,
        _as_pass(options),
        teacher=teacher,
        output=output,
        data=data,
        evaluation=evaluation,
        labels=labels,
        metric=metric,
        budget=budget,
        target=target,
        backend=backend,
        verify=verify,
        seed=seed,
        threads=threads,
        keep_failed=keep_failed,
        report=report,
        progress=progress,
    )


def _as_pass(options: str | Mapping[str, Any] | Pass) -> Pass:
    """Return the pass that options describe.

    Raises:
        UsageError: They are none of it.
    """
    where = f"pass `{PASS}`"
    if isinstance(options, Pass):
        if options.name != PASS:
            raise UsageError(f"`{options.name}` is another pass than `{PASS}`", hint="`graphopt.optimize` runs any")
        return options
    if isinstance(options, str):
        options = option_text.from_text(options, where=where) if options else {}
    if not isinstance(options, Mapping):
        raise UsageError(
            f"options cannot be `{options!r}`", hint='text such as "epochs=5", {"epochs": 5}, or the pass itself'
        )
    made: Pass = option_text.build(registry.find("PASSES", PASS), options, where=where)
    return made
