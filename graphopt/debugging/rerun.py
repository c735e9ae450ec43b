"""Reproducers run again: whether what failed still fails."""

from __future__ import annotations

import contextlib
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.backend import Array, Backend
from graphopt.choices import find_backend, find_target
from graphopt.debugging.candidate_runs import ask
from graphopt.debugging.isolation import Isolation
from graphopt.debugging.reduction_folder import KIND as REDUCTION
from graphopt.debugging.reduction_folder import REDUCED, question_of
from graphopt.driver import optimize
from graphopt.errors import BackendError, GraphoptError, UsageError
from graphopt.evaluation import compare_outputs
from graphopt.model_io import load
from graphopt.pipeline import Pipeline
from graphopt.plain_runs import with_plain_runs
from graphopt.regression.stored_arrays import read_feed
from graphopt.reproducer import AFTER, BEFORE, FACTS, INPUTS, ORIGINAL, RECIPE, content_hash


@dataclass(frozen=True)
class Replay:
    """What became of a failure.

    Attributes:
        fails: Whether it is still there.
        text: What happened this time, on one line.
    """

    fails: bool
    text: str


def replay(folder: str | Path) -> Replay:
    """Run a reproducer again.

    Raises:
        UsageError: It is none, or the model it is about is gone or another one.
    """
    folder = Path(folder)
    try:
        facts = tomllib.loads((folder / FACTS).read_text())
        again = {"rewrite": _rewrite, "run": _run, REDUCTION: _reduction}[facts["kind"]]
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, KeyError) as error:
        raise UsageError(
            f"`{folder}` is no reproducer", hint=f"a folder with a `{FACTS}`, as failures leave"
        ) from error
    return again(folder, facts)


def _rewrite(folder: Path, facts: dict[str, Any]) -> Replay:
    """Run the pass over what its rule matched, and compare on the inputs that told the two apart."""
    options = facts["options"]
    backend = with_plain_runs(find_backend(options.get("backend"), find_target(options.get("target"))))
    before = load(folder / BEFORE)
    feed = read_feed(folder / INPUTS, before)
    try:
        pipeline = Pipeline.from_toml((folder / RECIPE).read_text())
    except UsageError as error:
        differ = _differ(backend, before, load(folder / AFTER), feed)
        return Replay(differ is not None, f"{error.message}; the two models kept {differ or 'agree'}")
    result = optimize(
        before, pipeline, verify="structure", backend=options.get("backend"), target=options.get("target")
    )
    if not any(step.edits for step in result.report.steps):
        return Replay(False, f"pass `{facts['pass']}` leaves it as it is")
    differ = _differ(backend, before, result.model, feed)
    return Replay(differ is not None, f"what pass `{facts['pass']}` makes of it {differ or 'agrees with it'}")


def _differ(backend: Backend, before: ir.Model, after: ir.Model, feed: dict[str, Array]) -> str | None:
    """Return how two models differ on a feed, or None."""
    with backend.open(before, optimize=False) as session:
        expected = session.run(feed)
    try:
        with backend.open(after, optimize=False) as session:
            comparison = compare_outputs([expected], [session.run(feed)])
    except BackendError as error:
        return f"does not run: {error.message}"
    worst = comparison.worst
    if comparison.within() or worst is None:
        return None
    return f"is off by {comparison.max_abs_error:.3g}" + (f" ({worst.mismatch})" if worst.mismatch else "")


def _run(folder: Path, facts: dict[str, Any]) -> Replay:
    """Run the whole pipeline again, as it was asked for."""
    model = folder / ORIGINAL if "path" not in facts else Path(facts["path"])
    if not model.is_file():
        raise UsageError(f"the model `{model}` is gone", hint="put it back where it was")
    if "sha256" in facts and content_hash(model) != facts["sha256"]:
        raise UsageError(f"the model `{model}` is another one by now", hint="put back the one that failed")
    options = {name: value for name, value in facts["options"].items() if name != "keep_failed"}
    try:
        optimize(model, facts["pipeline"], **options)
    except GraphoptError as error:
        return Replay(True, error.message)
    return Replay(False, "the run ends well")


def _reduction(folder: Path, facts: dict[str, Any]) -> Replay:
    """Ask of a reduced model what was asked of the one it came from."""
    model = load(folder / REDUCED)
    question, feed = question_of(folder, facts["question"]), read_feed(folder / INPUTS, model)
    with Isolation(facts.get("timeout")) if facts["isolated"] else contextlib.nullcontext() as isolation:
        shown = ask(question, model, feed, isolation)
    if shown is None:
        return Replay(False, "the model shows no failure")
    if shown.kind != facts["failure"]:
        return Replay(False, f"another failure by now: {shown.text}")
    return Replay(True, shown.text)
