"""What `bench` found: rows of times, profiles, and what keeps either from being believed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from graphopt import latency
from graphopt.backend import Placement
from graphopt.benchmarking.cold_start import ColdStart
from graphopt.benchmarking.kernel_profile import Profile
from graphopt.benchmarking.roofline import Roof
from graphopt.latency import Latency

# Where others take more of the cores than this, what is measured is them.
_TAKEN = 0.1
# Kernels of less than this share of a run are not what it takes its time for, or their times are not theirs.
_LEAST_SEEN = 0.5


@dataclass(frozen=True)
class Row:
    """One model on one backend at one size.

    Attributes:
        model: The file as it was given.
        backend: The backend as tables call it.
        batch: Samples in each run.
        sizes: Sizes of the dimensions that were swept.
        latency: Its run times; the ratio is to the first row of the same sizes that ran. None where it did not run.
        cold: What it takes in a process of its own, where that was asked for.
        failure: Why it did not run, or nothing.
    """

    model: str
    backend: str
    batch: int
    sizes: Mapping[str, int]
    latency: Latency | None
    cold: ColdStart | None = None
    failure: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values; times in milliseconds."""
        values = asdict(self)
        del values["latency"]
        if self.latency is not None:
            derived = {"samples_per_second": self.latency.samples_per_second, "verdict": self.latency.verdict}
            values |= asdict(self.latency) | derived
        return values


@dataclass(frozen=True)
class Profiled:
    """Where the time of one model on one backend goes, at the first of the sizes."""

    model: str
    backend: str
    profile: Profile
    roof: Roof | None

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        roof = self.roof.as_dict() if self.roof is not None else None
        return {"model": self.model, "backend": self.backend, **self.profile.as_dict(), "roof": roof}


@dataclass(frozen=True)
class Placed:
    """Which parts of a backend took the nodes of a model, where the backend has several and can tell."""

    model: str
    backend: str
    placement: Placement

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {"model": self.model, "backend": self.backend, **self.placement.as_dict()}


@dataclass(frozen=True)
class Bench:
    """What was timed, and how.

    Attributes:
        rows: In the order of sizes, backends, models.
        profiles: Where they were asked for.
        threads: Threads inside an operator.
        cores: Numbers of the cores the process was kept on; none where the system cannot.
        cpu: What the processor calls itself.
        inputs: What the models ran on.
        taken: Which share of these cores other processes took meanwhile; None where the system does not tell.
        warnings: Why the figures may not be believed, or say less than they seem to.
        placements: Where nodes ran, of each model on each backend that tells.
    """

    rows: tuple[Row, ...]
    profiles: tuple[Profiled, ...]
    threads: int
    cores: tuple[int, ...]
    cpu: str
    inputs: str
    taken: float | None
    warnings: tuple[str, ...]
    placements: tuple[Placed, ...] = ()

    @property
    def complete(self) -> bool:
        """Whether everything ran."""
        return not any(row.failure for row in self.rows)

    def as_dict(self) -> dict[str, Any]:
        """Return all of it as JSON values; times in milliseconds."""
        found = {name: getattr(self, name) for name in ("threads", "cores", "cpu", "inputs", "taken", "warnings")}
        for name in ("rows", "profiles", "placements"):
            found[name] = [one.as_dict() for one in getattr(self, name)]
        return found


def unseen_by(profiles: Sequence[Profiled], rows: Sequence[Row]) -> list[str]:
    """Return which profiles tell of too little of a run to be believed.

    Args:
        profiles: The profiles.
        rows: The rows; of each model and backend, the first is what was profiled.
    """
    told: list[str] = []
    for one in profiles:
        row = next((row for row in rows if (row.model, row.backend) == (one.model, one.backend)), None)
        if row is None or row.latency is None:
            continue
        share = one.profile.milliseconds / row.latency.median
        if share < _LEAST_SEEN:
            told.append(
                f"the kernels of {one.model} on {one.backend} take {share:.0%} of its run: the profiler does not see "
                "the rest, or, on a GPU, sees work being handed over and not being done"
            )
    return list(dict.fromkeys(told))


def doubts_of(rows: Sequence[Row], taken: float | None) -> list[str]:
    """Return why the figures say less than they seem to."""
    doubts: list[str] = []
    if taken is not None and taken > _TAKEN:
        doubts.append(f"other processes took {taken:.0%} of the cores meanwhile: times are too long, and uncertain")
    unclear = [row for row in rows if row.latency is not None and row.latency.verdict == "cannot tell"]
    if unclear:
        low, high = max((row.latency.ratio_within for row in unclear if row.latency), key=lambda one: one[1] - one[0])
        doubts.append(
            f"too noisy to tell {len(unclear)} of the ratios, one of which is anywhere from {low:.2f} to {high:.2f}: "
            "give it more `--seconds`, or a quieter machine"
        )
    loose = [one for row in rows if (one := row.latency) is not None and one.uncertainty > latency.UNCLEAR]
    if loose and not unclear:
        worst = max(one.uncertainty for one in loose)
        doubts.append(f"medians are known to ±{worst:.0%} only: give it more `--seconds`, or a quieter machine")
    return doubts
