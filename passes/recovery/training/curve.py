"""What became of a loss over a training, and of the training."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# No more points than these go into a report: more cannot be told apart in a chart.
POINTS_SHOWN = 400


@dataclass(frozen=True)
class Point:
    """The loss of one step, on the samples it learnt from.

    Attributes:
        step: Steps done with it, from 1.
        epoch: How often each sample has been seen by then.
        rate: Learning rate.
        loss: The weighted sum of the terms, before the step.
        terms: Each by itself, unweighted.
    """

    step: int
    epoch: float
    rate: float
    loss: float
    terms: Mapping[str, float]


@dataclass(frozen=True)
class Look:
    """The loss on what is held out.

    Attributes:
        step: Steps done until then; 0 before the first.
        loss: The weighted sum of the terms.
        terms: Each by itself, unweighted.
    """

    step: int
    loss: float
    terms: Mapping[str, float]


@dataclass
class Curve:
    """A training as it went.

    Attributes:
        planned: Steps it was to take.
        samples: Samples it learnt from.
        held_out: Samples it did not learn from, and was looked at on.
        trained: Numbers that were trained.
        processes, device, precision: What it ran on.
        points: The loss of each step.
        looks: The loss on what is held out, the first before any training.
        step_times: Seconds of each step of this process.
        seconds: Time it took, looks, checkpoints and what was done before a resumption included.
        stopped: Why it ended before the last step, or nothing.
        kept: The step whose weights were kept.
        remarks: What else is worth saying, such as where it was resumed.
    """

    planned: int = 0
    samples: int = 0
    held_out: int = 0
    trained: int = 0
    processes: int = 1
    device: str = "cpu"
    precision: str = "fp32"
    points: list[Point] = field(default_factory=list)
    looks: list[Look] = field(default_factory=list)
    step_times: list[float] = field(default_factory=list)
    seconds: float = 0.0
    stopped: str = ""
    kept: int = 0
    remarks: list[str] = field(default_factory=list)

    @property
    def steps(self) -> int:
        """How many steps were taken."""
        return len(self.points)

    @property
    def step_seconds(self) -> float:
        """How long a step takes: the median."""
        return statistics.median(self.step_times) if self.step_times else 0.0

    @property
    def first(self) -> float | None:
        """The loss before training: on what is held out, or else of the first step."""
        return self.looks[0].loss if self.looks else self.points[0].loss if self.points else None

    @property
    def last(self) -> float | None:
        """The loss at the end, of the last weights."""
        return self.looks[-1].loss if self.looks else self.points[-1].loss if self.points else None

    @property
    def best(self) -> float | None:
        """The loss of the weights that were kept."""
        return next((look.loss for look in self.looks if look.step == self.kept), self.last)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values; of many points, some."""
        every = max(1, -(-len(self.points) // POINTS_SHOWN))
        shown = [point for index, point in enumerate(self.points) if index % every == 0 or point is self.points[-1]]
        return {
            "steps": self.steps,
            "planned": self.planned,
            "samples": self.samples,
            "held_out": self.held_out,
            "trained": self.trained,
            "processes": self.processes,
            "device": self.device,
            "precision": self.precision,
            "first": self.first,
            "last": self.last,
            "best": self.best,
            "kept": self.kept,
            "stopped": self.stopped,
            "seconds": self.seconds,
            "step_seconds": self.step_seconds,
            "points": [_as_dict(point) for point in shown],
            "looks": [_as_dict(look) for look in self.looks],
            "remarks": list(self.remarks),
        }

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it, as plain values."""
        return {
            "points": [(p.step, p.epoch, p.rate, p.loss, dict(p.terms)) for p in self.points],
            "looks": [(look.step, look.loss, dict(look.terms)) for look in self.looks],
            "step_times": list(self.step_times),
            "seconds": self.seconds,
            "stopped": self.stopped,
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        self.points = [Point(*fields) for fields in state["points"]]
        self.looks = [Look(*fields) for fields in state["looks"]]
        self.step_times = list(state["step_times"])
        self.seconds, self.stopped = state["seconds"], state["stopped"]


def _as_dict(entry: Point | Look) -> dict[str, Any]:
    fields = {field.name: getattr(entry, field.name) for field in dataclasses.fields(entry)}
    return {**fields, "terms": dict(entry.terms)}
