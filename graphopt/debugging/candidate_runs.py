"""Candidates of a reduction run here, or in a child process that may die of them."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import onnx_ir as ir

from graphopt.backend import Array
from graphopt.debugging.failures import Failure, Question
from graphopt.debugging.isolation import Died, Isolation
from graphopt.debugging.reduction_cuts import types_of
from graphopt.debugging.reduction_values import record_values
from graphopt.model_io import load, save

Feed = dict[str, Array]


def ask(question: Question, model: ir.Model, feed: Mapping[str, Array], isolation: Isolation | None) -> Failure | None:
    """Return the failure a model shows, or None; the death of the process it runs in is one.

    Raises:
        GraphoptError: The question makes no sense for this model.
    """
    if isolation is None:
        return question.ask(model, feed)
    with _as_file(model) as file:
        answer: Failure | Died | None = isolation.call(_ask, question, file, dict(feed))
    if isinstance(answer, Died):
        said = f": {answer.last_words}" if answer.last_words else ""
        return Failure(f"died: {answer.how}", f"the process that runs it {answer.how}{said}")
    return answer


def recorded(question: Question, model: ir.Model, feed: Feed, isolation: Isolation | None) -> Feed:
    """Return what values of a model held in a run, by name; what it was fed alone where it does not run."""
    if isolation is None:
        return record_values(model, feed, types_of(model), question.open_backend(), question.threads)
    with _as_file(model) as file:
        values: Feed | Died = isolation.call(_record, question, file, feed)
    return dict(feed) if isinstance(values, Died) else values


@contextlib.contextmanager
def _as_file(model: ir.Model) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="graphopt-") as folder:
        file = Path(folder) / "model.onnx"
        save(model, file)
        yield file


def _ask(question: Question, file: Path, feed: Feed) -> Failure | None:
    return question.ask(load(file), feed)


def _record(question: Question, file: Path, feed: Feed) -> Feed:
    return recorded(question, load(file), feed, None)
