"""The machine as this process finds it: cores, what else keeps them busy, and memory taken."""

from __future__ import annotations

import contextlib
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

_MB = 1e6
_CORES = Path("/sys/devices/system/cpu")
_GROUP = Path("/sys/fs/cgroup")
_CACHE_UNITS = {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}
# Columns of /proc/stat behind a core's name in which it works: user, nice, system, irq, softirq, and what other
# guests of the same host took.
_BUSY_COLUMNS = (1, 2, 3, 6, 7, 8)


def cpu_name() -> str:
    """Return what the processor calls itself."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, name = line.partition(":")
            if key.strip() == "model name" and name.strip():
                return name.strip()
    return platform.processor() or platform.machine()


def allowed_cores() -> list[int]:
    """Return the numbers of the logical cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(os.cpu_count() or 1))


def physical_cores() -> list[int]:
    """Return one allowed logical core of each physical one: two threads of arithmetic on one core gain nothing."""
    chosen: dict[str, int] = {}
    for core in allowed_cores():
        try:
            siblings = (_CORES / f"cpu{core}" / "topology" / "thread_siblings_list").read_text().strip()
        except OSError:
            siblings = str(core)
        chosen.setdefault(siblings, core)
    return list(chosen.values())


def last_level_cache() -> int | None:
    """Return the bytes of the largest cache of the first allowed core, or None where the system does not tell."""
    sizes = []
    for file in (_CORES / f"cpu{allowed_cores()[0]}" / "cache").glob("index*/size"):
        text = file.read_text().strip()
        number, unit = text.rstrip("KMG"), text[-1:]
        if number.isdecimal():
            sizes.append(int(number) * _CACHE_UNITS.get(unit, 1))
    return max(sizes, default=None)


def _speed(core: int) -> int:
    """Return a number that is larger for faster cores, where a machine has several kinds; else 0."""
    for file in ("cpu_capacity", "cpufreq/cpuinfo_max_freq"):
        with contextlib.suppress(OSError, ValueError):
            return int((_CORES / f"cpu{core}" / file).read_text())
    return 0


def cpu_quota() -> float | None:
    """Return how many cores' time the control group of this process is given, or None where there is no limit."""
    try:
        quota, period = (_GROUP / "cpu.max").read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no such file, or `max`
        return None


def memory_left() -> tuple[int, int] | None:
    """Return the bytes that this process's control group may still take and may take in all; None without a limit."""
    try:
        most = int((_GROUP / "memory.max").read_text())
        taken = int((_GROUP / "memory.current").read_text())
        rows = (line.split() for line in (_GROUP / "memory.stat").read_text().splitlines())
        # Files read and not read again count as taken, and are given up for anything else.
        spare = next((int(row[1]) for row in rows if row[0] == "inactive_file"), 0)
    except (OSError, ValueError):  # no such file, or `max`
        return None
    return max(most - taken + spare, 0), most


def usual_threads() -> int:
    """Return how many threads are worth starting: one for each physical core that the process is given the time of."""
    quota = cpu_quota()
    cores = len(physical_cores())
    return cores if quota is None else max(1, min(cores, int(quota)))


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[tuple[int, ...]]:
    """Keep this thread, and those it starts, on as many cores as there are threads; yields the cores.

    Physical cores first, the fastest and then the last of them: the first are where systems do their own work. Yields
    none where the system cannot, and then nothing is changed.
    """
    physical, allowed = sorted(physical_cores(), key=lambda core: (_speed(core), core)), allowed_cores()
    cores = tuple(sorted(physical[-threads:]) if threads <= len(physical) else allowed)
    if not hasattr(os, "sched_setaffinity"):
        yield ()
        return
    try:
        os.sched_setaffinity(0, cores)
    except OSError:
        yield ()
        return
    try:
        yield cores
    finally:
        os.sched_setaffinity(0, allowed)


@dataclass(frozen=True)
class Moment:
    """The clocks of some cores at one moment, in seconds.

    Attributes:
        wall: Since whenever.
        busy: What the cores worked; None where the system does not tell.
        own: What this process and its children worked.
    """

    wall: float
    busy: float | None
    own: float


def look(cores: Sequence[int]) -> Moment:
    """Return the clocks of these cores."""
    used = os.times()
    own = used.user + used.system + used.children_user + used.children_system
    return Moment(time.perf_counter(), _busy_seconds(cores), own)


def taken_by_others(before: Moment, after: Moment, cores: int) -> float | None:
    """Return which share of so many cores other processes took between two moments; None where it is not known."""
    if before.busy is None or after.busy is None:
        return None
    others = (after.busy - before.busy) - (after.own - before.own)
    return min(max(others / ((after.wall - before.wall) * cores), 0.0), 1.0)


def _busy_seconds(cores: Sequence[int]) -> float | None:
    wanted = {f"cpu{core}" for core in cores}
    try:
        lines = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    except OSError:
        return None
    rows = [line for line in lines if line and line[0] in wanted]
    ticks = sum(int(row[column]) for row in rows for column in _BUSY_COLUMNS if column < len(row))
    # Some sandboxes show a file of zeros.
    return ticks / os.sysconf("SC_CLK_TCK") if ticks else None


def reset_peak_rss() -> None:
    """Let Linux count the peak anew; elsewhere the peak since the start is all there is."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_rss_mb() -> float:
    """Return the peak resident memory in MB since it was last reset."""
    import resource

    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 / _MB for line in lines if line.startswith("VmHWM:"))
    except (OSError, StopIteration):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / _MB if sys.platform == "darwin" else peak * 1024 / _MB  # bytes there, KiB elsewhere
