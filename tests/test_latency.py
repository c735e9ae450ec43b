"""Timing that can be believed: runs in turn, intervals that hold, the machine as it is."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import numpy as np
import pytest

from graphopt import latency, machine
from graphopt.latency import Latency, measure, rounds, within
from graphopt.machine import Moment, pinned, taken_by_others


class Clock:
    """A clock that stands still but for what sessions say they take; in the place of the module `time`."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 1e-9  # what is timed is never nothing
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    own = Clock()
    monkeypatch.setattr(latency, "time", own)
    return own


class Recorded:
    """A session that writes down its runs, and takes as long as it is told to by a clock of the tests' own."""

    input_names, output_names = ("x",), ("y",)

    def __init__(self, name: str, log: list[str], seconds: float = 0.0, clock: Clock | None = None) -> None:
        self.name, self.log, self.seconds, self.collecting = name, log, seconds, True
        self.clock = clock or Clock()

    def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
        self.log.append(self.name)
        self.collecting = gc.isenabled()
        self.clock.now += self.seconds
        return {}

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class Bound(Recorded):
    """One that keeps its feed."""

    def bind(self, feeds: Mapping[str, Any]) -> Callable[[], None]:
        self.log.append(f"{self.name} bound to {sorted(feeds)}")
        return lambda: self.log.append(self.name)


def test_each_round_runs_all_in_an_order_of_its_own() -> None:
    log: list[str] = []
    sessions = [Recorded("a", log), Recorded("b", log)]
    first, second = measure(sessions, [{}, {}], seconds=0.0, min_runs=40)
    assert first.runs == second.runs == 40
    rounds = ["".join(log[place : place + 2]) for place in range(2 * latency.WARM_UP_RUNS, len(log), 2)]
    assert len(rounds) == 40
    assert set(rounds) == {"ab", "ba"}
    assert not any(session.collecting for session in sessions), "garbage is collected in the midst of runs"
    assert gc.isenabled()


def test_a_session_that_can_keeps_its_feed() -> None:
    log: list[str] = []
    measure([Bound("a", log)], [{"x": np.zeros(1)}], seconds=0.0)
    assert log[0] == "a bound to ['x']"
    assert set(log[1:]) == {"a"}


def test_garbage_is_collected_again_after_a_failure() -> None:
    class Failing(Recorded):
        def run(self, feeds: Mapping[str, Any]) -> dict[str, Any]:
            if len(self.log) >= latency.WARM_UP_RUNS:
                raise ValueError("enough")
            return super().run(feeds)

    with pytest.raises(ValueError, match="enough"):
        measure([Failing("a", [])], [{}], seconds=0.0)
    assert gc.isenabled()


def test_what_takes_longer_is_slower(clock: Clock) -> None:
    log: list[str] = []
    sessions = [Recorded(name, log, seconds, clock) for name, seconds in (("a", 0.001), ("b", 0.003), ("c", 0.001))]
    first, slow, same = measure(sessions, [{}] * 3, seconds=0.2)
    assert (first.verdict, slow.verdict, same.verdict) == ("the same", "slower", "the same")
    assert slow.ratio == pytest.approx(3, rel=1e-3)
    assert slow.median == pytest.approx(3, rel=1e-3)
    assert slow.median_within[0] <= slow.median <= slow.median_within[1]
    assert slow.samples_per_second == pytest.approx(1e3 / slow.median)
    assert replace(slow, batch=4).samples_per_second == pytest.approx(4e3 / slow.median)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.90, 0.95, "faster"),
        (1.05, 1.30, "slower"),
        (0.98, 1.04, "the same"),
        (0.99, 0.995, "the same"),  # less than two sessions of one file differ by
        (0.90, 1.10, "cannot tell"),
        (0.70, 0.99, "cannot tell"),
        (0.0, float("inf"), "cannot tell"),
    ],
)
def test_verdicts(low: float, high: float, verdict: str) -> None:
    assert Latency(1.0, 1.0, 1.0, 10, 1.0, ratio_within=(low, high)).verdict == verdict


def test_interval_of_few_values_is_all_there_is() -> None:
    assert within([np.array([3.0, 1.0, 2.0])]) == (1.0, 3.0)
    assert within([np.array([5.0])]) == (5.0, 5.0)


def test_parts_are_the_openings_where_there_are_enough() -> None:
    openings = [np.full(100, float(level)) for level in range(6)]
    assert within(openings) == (0.0, 5.0)
    assert within(openings[:5]) != (0.0, 4.0), "stretches of time, each of which is of one level"


def test_a_burst_does_not_count_its_first_run(clock: Clock) -> None:
    log: list[str] = []
    (once,) = rounds([Recorded("a", log, 0.02, clock)], [{}], seconds=0.0, least=1, burst=0.01)
    assert len(once[0]) == 1, "a run that takes all of the burst is the only one"
    log.clear()
    (several,) = rounds([Recorded("a", log, 0.001, clock)], [{}], seconds=0.0, least=1, burst=0.02)
    assert len(several[0]) == 20
    assert len(log) == latency.WARM_UP_RUNS + 1 + 20


@pytest.mark.parametrize("inertia", [0.0, 0.8], ids=["independent", "slow spells"])
def test_intervals_hold_the_median_as_often_as_they_say(inertia: float) -> None:
    """Of run times with a long tail, those of spells in which the machine is slow as well."""
    rng = np.random.default_rng(0)
    held, trials, runs = 0, 300, 400
    for _ in range(trials):
        noise = rng.standard_normal(runs)
        for place in range(1, runs):
            noise[place] = inertia * noise[place - 1] + np.sqrt(1 - inertia**2) * noise[place]
        low, high = within([np.exp(0.3 * noise)])  # the median is 1
        held += low <= 1 <= high
    assert held / trials > 0.91


def test_this_thread_is_kept_on_as_many_cores_as_there_are_threads() -> None:
    before = machine.allowed_cores()
    with pinned(1) as cores:
        assert len(cores) == 1
        assert machine.allowed_cores() == list(cores)
    with pinned(1000) as cores:
        assert list(cores) == before
    assert machine.allowed_cores() == before


def test_system_that_cannot_pin_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError("not here")

    monkeypatch.setattr(os, "sched_setaffinity", refuse)
    with pinned(1) as cores:
        assert cores == ()
    monkeypatch.delattr(os, "sched_setaffinity")
    monkeypatch.delattr(os, "sched_getaffinity")
    with pinned(1) as cores:
        assert cores == ()
    assert machine.allowed_cores() == list(range(os.cpu_count() or 1))


def _fake_cores(folder: Path, siblings: Mapping[int, str]) -> Path:
    for core, text in siblings.items():
        place = folder / f"cpu{core}" / "topology"
        place.mkdir(parents=True)
        (place / "thread_siblings_list").write_text(text + "\n")
        for index, size in enumerate(("48K", "1M", "32768K")):
            cache = folder / f"cpu{core}" / "cache" / f"index{index}"
            cache.mkdir(parents=True)
            (cache / "size").write_text(size + "\n")
    return folder


def test_threads_of_one_core_are_one_core(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _fake_cores(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    monkeypatch.setattr(machine, "_CORES", folder)
    monkeypatch.setattr(machine, "allowed_cores", lambda: [0, 1, 2, 3])
    assert machine.physical_cores() == [0, 1]
    assert machine.last_level_cache() == 32 << 20
    monkeypatch.setattr(machine, "_CORES", tmp_path / "nothing here")
    assert machine.physical_cores() == [0, 1, 2, 3]
    assert machine.last_level_cache() is None


def test_fast_cores_come_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = _fake_cores(tmp_path, {core: str(core) for core in range(4)})
    for core, speed in enumerate((5_000_000, 5_000_000, 3_000_000, 3_000_000)):
        (folder / f"cpu{core}" / "cpufreq").mkdir()
        (folder / f"cpu{core}" / "cpufreq" / "cpuinfo_max_freq").write_text(f"{speed}\n")
    kept: list[Any] = []
    monkeypatch.setattr(machine, "_CORES", folder)
    monkeypatch.setattr(machine, "allowed_cores", lambda: [0, 1, 2, 3])
    monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores: kept.append(tuple(cores)))
    for threads, cores in ((1, (1,)), (2, (0, 1)), (3, (0, 1, 3)), (9, (0, 1, 2, 3))):
        with pinned(threads) as found:
            assert found == cores
    assert kept[::2] == [(1,), (0, 1), (0, 1, 3), (0, 1, 2, 3)]


def test_no_more_threads_than_a_container_is_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "physical_cores", lambda: list(range(8)))
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    assert machine.usual_threads() == 8
    for text, threads in (("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1), ("6400000 100000", 8)):
        (tmp_path / "cpu.max").write_text(text + "\n")
        assert machine.usual_threads() == threads


def test_what_others_take() -> None:
    before = Moment(wall=10.0, busy=100.0, own=5.0)
    after = Moment(wall=12.0, busy=103.0, own=7.0)
    assert taken_by_others(before, after, cores=2) == pytest.approx(0.25)
    assert taken_by_others(before, replace(after, own=50.0), cores=2) == 0
    assert taken_by_others(replace(before, busy=None), after, cores=2) is None


def test_what_this_process_does_is_not_others() -> None:
    cores = machine.allowed_cores()
    before = machine.look(cores)
    end = time.process_time() + 0.2
    while time.process_time() < end:
        pass
    after = machine.look(cores)
    assert after.own - before.own >= 0.15
    assert after.busy is None or after.busy > (before.busy or 0)
