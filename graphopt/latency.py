"""Latency side by side: sessions run in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from graphopt.backend import Bindable, Feeds, Session

WARM_UP_RUNS = 2
# Clocks rise and caches fill for longer than two runs of a small model take.
WARM_UP_SHARE = 0.1
# What slows a machine down lasts for many runs, so that runs are no independent samples; medians of so many stretches
# of the time are, nearly.
STRETCHES = 20
CONFIDENCE = 0.95
# What six independent medians enclose holds the true one in all but 2 / 2⁶ = 3 % of cases; five reach 94 %.
LEAST_PARTS = 6
# A model differs by as much between two builds of a runtime, or two places in memory.
SAME = 0.02
# A ratio that is known no better than to ± this says nothing of what most passes gain.
UNCLEAR = 0.05

_Times = npt.NDArray[np.float64]
Interval = tuple[float, float]
# Seconds of each run, by session, of one round.
Round = list[list[float]]
Verdict = Literal["faster", "slower", "the same", "cannot tell"]
UNKNOWN: Interval = (0.0, math.inf)


@dataclass(frozen=True)
class Latency:
    """Run times of one session, in milliseconds.

    Attributes:
        median: Median.
        low: 10th percentile.
        high: 90th percentile.
        runs: How many runs were timed.
        ratio: Median over rounds of (this session's time / the first session's in the same round).
        batch: Samples in each run.
        median_within: Where the median is, with 95 % confidence.
        ratio_within: Where the ratio is, likewise.
        openings: How often the sessions were opened anew.
    """

    median: float
    low: float
    high: float
    runs: int
    ratio: float
    batch: int = 1
    median_within: Interval = UNKNOWN
    ratio_within: Interval = UNKNOWN
    openings: int = 1

    @property
    def samples_per_second(self) -> float:
        """Throughput of one run after the other."""
        return self.batch / self.median * 1e3

    @property
    def uncertainty(self) -> float:
        """Half the width of the interval of the median, as a share of the median."""
        low, high = self.median_within
        return (high - low) / 2 / self.median

    @property
    def verdict(self) -> Verdict:
        """What can be said of it beside the first session."""
        low, high = self.ratio_within
        if high < 1 - SAME:
            return "faster"
        if low > 1 + SAME:
            return "slower"
        return "the same" if (high - low) / 2 <= UNCLEAR else "cannot tell"


def measure(sessions: Sequence[Session], feeds: Sequence[Feeds], *, seconds: float, min_runs: int = 3) -> list[Latency]:
    """Time sessions run by run in turn, for about so long in all.

    A session that can (`graphopt.backend.Bindable`) keeps its feed where it computes: no copies are timed then.

    Args:
        sessions: What to time.
        feeds: One feed per session.
        seconds: Time to spend, the warm-up not counted.
        min_runs: Rounds to make even if that takes longer.
    """
    return summarize([rounds(sessions, feeds, seconds=seconds, least=min_runs, burst=0.0)])


def rounds(
    sessions: Sequence[Session], feeds: Sequence[Feeds], *, seconds: float, least: int, burst: float
) -> list[Round]:
    """Time sessions in turn, each round in an order of its own: what follows a large model finds the caches full of it.

    Args:
        sessions: What to time.
        feeds: One feed per session.
        seconds: Time to spend, the warm-up not counted.
        least: Rounds to make even if that takes longer.
        burst: Seconds that each session goes on for in a round, a first run not counted; 0 for a single run.
    """
    runs = [runner(session, feed) for session, feed in zip(sessions, feeds, strict=True)]
    warm_up(runs, seconds * WARM_UP_SHARE)
    order = np.random.default_rng(0)
    done: list[Round] = []
    with uncollected():
        end = time.perf_counter() + seconds
        while len(done) < least or time.perf_counter() < end:
            times: Round = [[] for _ in runs]
            for place in order.permutation(len(runs)):
                times[place] = _burst(runs[place], burst)
            done.append(times)
    return done


def _burst(run: Callable[[], object], seconds: float) -> list[float]:
    first = timed(run)
    if first >= seconds:
        return [first]
    end, times = time.perf_counter() + seconds, [timed(run)]
    while time.perf_counter() < end:
        times.append(timed(run))
    return times


def runner(session: Session, feeds: Feeds) -> Callable[[], object]:
    """Return what runs a session once on a feed, which lies where the session computes if it can be put there."""
    if isinstance(session, Bindable):
        return session.bind(feeds)
    return lambda: session.run(feeds)


def warm_up(runs: Sequence[Callable[[], object]], seconds: float) -> None:
    """Run each at least twice, and all in turn for so long."""
    end, turns = time.perf_counter() + seconds, 0
    while turns < WARM_UP_RUNS or time.perf_counter() < end:
        for run in runs:
            run()
        turns += 1


def timed(run: Callable[[], object]) -> float:
    """Return how many seconds a call takes."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Keep Python from collecting garbage in the midst of a run."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def summarize(openings: Sequence[Sequence[Round]]) -> list[Latency]:
    """Return the latencies of sessions from their rounds.

    Args:
        openings: Rounds in the order they were made in, by the opening of the sessions they were made with.
    """
    return [_summary(openings, place) for place in range(len(openings[0][0]))]


def _summary(openings: Sequence[Sequence[Round]], place: int) -> Latency:
    runs = [np.concatenate([one[place] for one in done]) * 1e3 for done in openings]
    low, median, high = np.percentile(np.concatenate(runs), [10, 50, 90])
    ratios = [
        np.array([statistics.median(one[place]) / statistics.median(one[0]) for one in done]) for done in openings
    ]
    return Latency(
        float(median),
        float(low),
        float(high),
        sum(map(len, runs)),
        float(np.median(np.concatenate(ratios))),
        median_within=within(runs),
        ratio_within=within(ratios),
        openings=len(openings),
    )


def within(openings: Sequence[_Times]) -> Interval:
    """Return where the median of what values are drawn from is, by order statistics of medians of independent parts.

    No distribution is assumed: of m independent medians, the chance that k or fewer lie below the true one is
    binomial. Fewer than six parts reach no 95 %; their extremes are returned. Parts are the openings, where there are
    six, else stretches of time.

    Args:
        openings: Values in the order they were measured in, by opening.
    """
    parts = openings
    if len(openings) < LEAST_PARTS:
        values = np.concatenate(openings)
        parts = np.array_split(values, min(STRETCHES, len(values)))
    medians = np.sort([np.median(part) for part in parts])
    count, outside, left = len(medians), 0.0, 0
    while left < (count - 1) // 2:
        outside += 2 * math.comb(count, left) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        left += 1
    left = max(left - 1, 0)
    return float(medians[left]), float(medians[count - 1 - left])
