"""What a report shows of each training: how its loss went, and what it took."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.metrics import show_number
from graphopt.report import Report, show_count
from graphopt.reporting.rows import counted

# The fact of a note that holds how a loss went: what `as_dict` of the curve of a training returns.
LOSS_CURVE = "loss_curve"
TRAINING_COLUMNS = ("training", "steps", "time", "a step", "loss before", "after", "on")


@dataclass(frozen=True)
class Training:
    """One training of a run.

    Attributes:
        name: The number of its step and the pass; with the number of the round where a pass trains several times.
        curve: Its loss and what it took, as JSON values.
    """

    name: str
    curve: Mapping[str, Any]

    @property
    def batches(self) -> tuple[list[int], list[float]]:
        """Steps and the loss of each, on the samples it learnt from."""
        return _pairs(self.curve["points"])

    @property
    def looks(self) -> tuple[list[int], list[float]]:
        """Steps and the loss after them, on samples held out of training."""
        return _pairs(self.curve["looks"])


def _pairs(entries: Sequence[Mapping[str, Any]]) -> tuple[list[int], list[float]]:
    return [int(one["step"]) for one in entries], [float(one["loss"]) for one in entries]


def trainings_of(report: Report) -> tuple[Training, ...]:
    """Return every training of a run, in order."""
    found = []
    for number, step in enumerate(report.steps, 1):
        curves = [note.facts[LOSS_CURVE] for note in step.notes if LOSS_CURVE in note.facts]
        for turn, curve in enumerate(curves, 1):
            name = f"{number} {step.name}" + (f", round {turn}" if len(curves) > 1 else "")
            found.append(Training(name, curve))
    return tuple(found)


def training_rows(trainings: Sequence[Training]) -> list[tuple[str, ...]]:
    """Return what each training took and came to, as `TRAINING_COLUMNS` names it."""
    return [
        (
            one.name,
            _steps(one.curve),
            f"{one.curve['seconds']:.1f} s",
            f"{1000 * one.curve['step_seconds']:.3g} ms",
            _loss(one.curve["first"]),
            _loss(one.curve["best"]),
            _place(one.curve),
        )
        for one in trainings
    ]


def training_message(trainings: Sequence[Training]) -> str:
    """Return what was trained on what, and which loss is shown."""
    if not trainings:
        return ""
    curve = trainings[-1].curve
    text = f"{show_count(curve['trained'])} numbers trained on {counted(curve['samples'], 'sample')}."
    if curve["held_out"]:
        text += f" Losses before and after are those on {counted(curve['held_out'], 'sample')} held out of training."
    return text


def _steps(curve: Mapping[str, Any]) -> str:
    return str(curve["steps"]) if curve["steps"] == curve["planned"] else f"{curve['steps']} of {curve['planned']}"


def _loss(value: float | None) -> str:
    return "–" if value is None else show_number(value)


def _place(curve: Mapping[str, Any]) -> str:
    several = f"{curve['processes']} × " if curve["processes"] > 1 else ""
    return f"{several}{curve['device']}, {curve['precision']}"
