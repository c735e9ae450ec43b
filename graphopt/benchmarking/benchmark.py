"""`bench`: models and backends timed in turn on the same inputs, and what may be concluded from it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt import latency, machine, options
from graphopt.backend import Array, Backend, Inspectable, Placing, Session, is_timed
from graphopt.benchmarking.cold_start import ColdStart, measure_cold_start
from graphopt.benchmarking.kernel_profile import profile
from graphopt.benchmarking.points import Point, points_of
from graphopt.benchmarking.results import Bench, Placed, Profiled, Row, doubts_of, unseen_by
from graphopt.benchmarking.roofline import Peaks, measure_peaks, roof_of
from graphopt.choices import find_backend, find_target, open_model
from graphopt.comparison import require_same_names
from graphopt.data import batch_size, input_specs
from graphopt.errors import BackendError, UsageError
from graphopt.latency import Latency
from graphopt.progress import Display

SECONDS = 2.0
# Two runtimes that take turns run by run wait for each other's threads and find the caches cold, which neither does
# where it is deployed.
_BURST = 0.1
_LEAST_ROUNDS = 6
# Where threads and memory of a session come to lie is luck that lasts as long as the session. Opening it several times
# makes that visible; it may take as long again as the runs. Of twelve parts the two least and largest are left out.
_OPENING_SHARE, _MOST_OPENINGS = 1.0, 12


@dataclass
class _Contender:
    """One model on one backend, and the session while it is open."""

    file: Path
    name: str
    model: ir.Model
    label: str
    backend: Backend
    session: Session | None = None
    failure: str = ""
    error: BackendError | None = None

    @property
    def opened(self) -> Session:
        """The session, which is open; raises what a backend said that did not open it another time."""
        if self.session is not None:
            return self.session
        assert self.error is not None, "what is not open has failed"
        raise self.error


@dataclass
class _Run:
    """One call of `bench` on its way."""

    contenders: list[_Contender]
    threads: int
    seconds: float
    display: Display
    made_up: bool
    opening: float = 0.0
    taken: list[float | None] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    placements: list[Placed] = field(default_factory=list)

    @property
    def openings(self) -> int:
        """How often to open everything at each point: as often as intervals need, or once where that takes long."""
        affordable = int(self.seconds * _OPENING_SHARE / max(self.opening, self.seconds / _MOST_OPENINGS))
        return affordable if affordable >= latency.LEAST_PARTS else 1

    def open(self) -> None:
        """Open the sessions of all contenders but those that failed."""
        for one in self.contenders:
            if one.failure or one.session is not None:
                continue
            try:
                one.session = one.backend.open(one.file, threads=self.threads)
            except BackendError as error:
                one.failure, one.error = error.message, error

    def close(self) -> None:
        """Close all sessions."""
        for one in self.contenders:
            if one.session is not None:
                one.session.close()
                one.session = None

    def note_placements(self) -> None:
        """Ask sessions where their nodes run."""
        for one in self.contenders:
            session: object = one.session
            placement = session.placement() if isinstance(session, Placing) else None
            if placement is not None:
                self.placements.append(Placed(one.name, one.label, placement))


def bench(
    models: Sequence[str | Path],
    *,
    data: Any = None,
    batch: int | Sequence[int] | None = None,
    sweep: Mapping[str, Sequence[int]] | None = None,
    backend: str | None = None,
    threads: int = 0,
    seconds: float = SECONDS,
    cold: bool = False,
    profiled: bool = False,
    roofline: bool = False,
    seed: int = 0,
    progress: bool = False,
) -> Bench:
    """Time model files in turn, each on the same inputs, on one backend or several.

    What a runtime refuses is a row that says so, as long as anything runs.

    Args:
        models: Model files with the same inputs.
        data: Samples to run on, as for `optimize`; made-up inputs where None.
        batch: Samples per run, or several such numbers; where None, 1, or the model's fixed batch size.
        sweep: Sizes to try of dimensions by name; each with each, and with each batch. For made-up inputs only.
        backend: Backend texts, separated by commas; where None, that of this machine's CPU.
        threads: Threads for the backends; 0 for one on each physical core this process may use.
        seconds: Time to spend at each size.
        cold: Whether to open and run each model in new processes, too.
        profiled: Whether to find out where the time goes.
        roofline: Whether to measure this machine's peaks and set them beside that; implies ``profiled``.
        seed: Seed of made-up inputs.
        progress: Show progress on stderr.

    Raises:
        UsageError: A model cannot run on so many samples, or the data hold fewer; an unknown dimension or backend.
        ModelError: The models have different inputs.
        BackendError: A backend is missing, or nothing runs.
    """
    backends = _backends(backend)
    opened = [open_model(model) for model in models]
    for other in opened[1:]:
        require_same_names("input", *([spec.name for spec in input_specs(one)] for one in (opened[0], other)))
    names = [str(model) for model in models]
    points = points_of(opened, names, data, batch, sweep or {}, seed)
    count = threads or machine.usual_threads()
    contenders = [
        _Contender(Path(file), str(file), model, label, runtime)
        for label, runtime in backends.items()
        for file, model in zip(models, opened, strict=True)
    ]
    run = _Run(contenders, count, seconds, Display(progress), made_up=data is None)
    with machine.pinned(count) as cores:
        colds = _cold_starts(run, points) if cold else {}
        rows = _timed_rows(run, points, cores or machine.allowed_cores(), colds)
        profiles = _profiles(run, points[0], roofline=roofline) if profiled or roofline else []
    taken = [share for share in run.taken if share is not None]
    share = max(taken, default=None)
    return Bench(
        rows=tuple(rows),
        profiles=tuple(profiles),
        threads=count,
        cores=cores,
        cpu=machine.cpu_name(),
        inputs="made-up inputs" if data is None else f"samples of `{data}`" if isinstance(data, str) else "samples",
        taken=share,
        warnings=(
            *doubts_of(rows, share),
            *_untimed(backends),
            *unseen_by(profiles, rows),
            *dict.fromkeys(run.warnings),
        ),
        placements=tuple(run.placements),
    )


def _backends(text: str | None) -> dict[str, Backend]:
    """Return the backends asked for by the names that rows call them."""
    target = find_target(None)
    texts = (options.split(text, ",") or [""]) if text is not None else [None]
    found = [find_backend(one, target) for one in texts]
    names = [one.describe() for one in found]
    # Two of one kind are told apart by what was written.
    labels = [name if names.count(name) == 1 else str(one) for name, one in zip(names, texts, strict=True)]
    twice = next((label for label in labels if labels.count(label) > 1), None)
    if twice is not None:
        raise UsageError(f"backend `{twice}` is given twice", hint="to see the noise, give a model twice")
    return dict(zip(labels, found, strict=True))


def _feed_of(run: _Run, point: Point, contender: _Contender) -> dict[str, Array]:
    return point.feeds[run.contenders.index(contender) % len(point.feeds)]


def _cold_starts(run: _Run, points: Sequence[Point]) -> dict[tuple[int, int], ColdStart]:
    """Return cold starts by the places of point and contender."""
    places = list(itertools.product(range(len(points)), range(len(run.contenders))))
    found = {}
    for place, number in run.display.track(places, "cold starts", "models"):
        one = run.contenders[number]
        try:
            feed = _feed_of(run, points[place], one)
            found[place, number] = measure_cold_start(one.backend, one.file, feed, threads=run.threads)
        except BackendError as error:
            run.warnings.append(f"no cold start of {one.name}: {error.message}")
    return found


def _timed_rows(
    run: _Run, points: Sequence[Point], cores: Sequence[int], colds: Mapping[tuple[int, int], ColdStart]
) -> list[Row]:
    rows: list[Row] = []
    try:
        with run.display.stage("opening"):
            run.opening = latency.timed(run.open)
        run.note_placements()
        for place, point in enumerate(run.display.track(points, "timing", "sizes")):
            before = machine.look(cores)
            times = _times(run, point)
            run.taken.append(machine.taken_by_others(before, machine.look(cores), len(cores)))
            for number, (one, (time, failure)) in enumerate(zip(run.contenders, times, strict=True)):
                batch = batch_size(_feed_of(run, point, one))
                rows.append(Row(one.name, one.label, batch, point.sizes, time, colds.get((place, number)), failure))
    finally:
        run.close()
    if not any(row.latency for row in rows):
        raise _why_nothing_runs(run)
    return rows


def _why_nothing_runs(run: _Run) -> BackendError:
    one = next(one for one in run.contenders if one.error is not None)
    assert one.error is not None, "just asked"
    if one.failure or not run.made_up:
        return one.error
    # It opened: what it does not take may be what was made up.
    hint = "samples it takes with `--data`, or other sizes with `--batch` and `--sweep`: these inputs are made up"
    return BackendError(one.error.message, hint=hint)


def _times(run: _Run, point: Point) -> list[tuple[Latency | None, str]]:
    """Return the times of all contenders at one point, and why some have none."""
    times: list[tuple[Latency | None, str]] = [(None, one.failure) for one in run.contenders]
    able: list[int] = []
    for number, one in enumerate(run.contenders):
        if one.session is None:
            continue
        try:
            latency.runner(one.session, _feed_of(run, point, one))()
            able.append(number)
        except BackendError as error:
            one.error = error
            times[number] = (None, error.message)
    if not able:
        return times
    feeds = [_feed_of(run, point, run.contenders[number]) for number in able]
    burst = min(_BURST, run.seconds / len(able) / latency.STRETCHES)
    done: list[list[latency.Round]] = []
    openings = run.openings
    for _ in range(openings):
        if done:
            run.close()
            run.open()
        sessions = [run.contenders[number].opened for number in able]
        least = max(1, _LEAST_ROUNDS // openings)
        done.append(latency.rounds(sessions, feeds, seconds=run.seconds / openings, least=least, burst=burst))
    for number, time, feed in zip(able, latency.summarize(done), feeds, strict=True):
        times[number] = (replace(time, batch=batch_size(feed)), "")
    return times


def _profiles(run: _Run, point: Point, *, roofline: bool) -> list[Profiled]:
    found: list[Profiled] = []
    peaks: dict[str, Peaks] = {}
    for one in run.display.track(run.contenders, "profiling", "models"):
        if not isinstance(one.backend, Inspectable):
            run.warnings.append(f"no profile: backend `{one.label}` does not tell what it runs")
            continue
        try:
            profile_ = profile(one.model, one.backend, _feed_of(run, point, one), threads=run.threads)
            if roofline and one.label not in peaks:
                # By the name that tells it from another of its kind.
                peaks[one.label] = replace(measure_peaks(one.backend, threads=run.threads), backend=one.label)
        except BackendError as error:
            run.warnings.append(f"no profile of {one.name} on {one.label}: {error.message}")
            continue
        found.append(Profiled(one.name, one.label, profile_, roof_of(profile_, peaks[one.label]) if roofline else None))
    return found


def _untimed(backends: Mapping[str, Backend]) -> list[str]:
    slow = [label for label, one in backends.items() if not is_timed(one)]
    return [f"how long {label} takes says nothing of any other runtime" for label in slow]
