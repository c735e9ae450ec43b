"""Latency side by side: sessions run in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import contextlib
import gc
import math
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
# Two sessions of one and the same file differ by as much on a quiet machine: where their memory lies is luck.
SAME = 0.02
# A ratio that is known no better than to ± this says nothing of what most passes gain.
UNCLEAR = 0.05

_Times = npt.NDArray[np.float64]
Interval = tuple[float, float]
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
        ratio: Median over runs of (this session's time / the first session's in the same round).
        batch: Samples in each run.
        median_within: Where the median is, with 95 % confidence.
        ratio_within: Where the ratio is, likewise.
    """

    median: float
    low: float
    high: float
    runs: int
    ratio: float
    batch: int = 1
    median_within: Interval = UNKNOWN
    ratio_within: Interval = UNKNOWN

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
    """Time sessions in turn for about so long in all, each round in an order of its own.

    A session that can (`graphopt.backend.Bindable`) keeps its feed where it computes: no copies are timed then.

    Args:
        sessions: What to time.
        feeds: One feed per session.
        seconds: Time to spend, the warm-up not counted.
        min_runs: Rounds to make even if that takes longer.
    """
    runs = [runner(session, feed) for session, feed in zip(sessions, feeds, strict=True)]
    warm_up(runs, seconds * WARM_UP_SHARE)
    # What runs right after a large model finds the caches full of it: each comes after each as often.
    order = np.random.default_rng(0)
    rounds: list[list[float]] = []
    with uncollected():
        end = time.perf_counter() + seconds
        while len(rounds) < min_runs or time.perf_counter() < end:
            times = [0.0] * len(runs)
            for place in order.permutation(len(runs)):
                times[place] = timed(runs[place])
            rounds.append(times)
    table = np.array(rounds) * 1e3
    return [_summary(table[:, i], table[:, 0]) for i in range(len(runs))]


def runner(session: Session, feeds: Feeds) -> Callable[[], object]:
    """Return what runs a session once on a feed, which lies where the session computes if it can be put there."""
    if isinstance(session, Bindable):
        return session.bind(feeds)
    return lambda: session.run(feeds)


def warm_up(runs: Sequence[Callable[[], object]], seconds: float) -> None:
    """Run each at least twice, and all in turn for so long."""
    end, rounds = time.perf_counter() + seconds, 0
    while rounds < WARM_UP_RUNS or time.perf_counter() < end:
        for run in runs:
            run()
        rounds += 1


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


def within(values: _Times) -> Interval:
    """Return where the median of what values are drawn from is, by order statistics of medians of stretches.

    No distribution is assumed: of m independent medians, the chance that k or fewer lie below the true one is
    binomial. Fewer than six stretches reach no 95 %; their extremes are returned.

    Args:
        values: Values in the order they were measured in.
    """
    stretches = np.array_split(values, min(STRETCHES, len(values)))
    medians = np.sort([np.median(stretch) for stretch in stretches])
    count, outside, left = len(medians), 0.0, 0
    while left < (count - 1) // 2:
        outside += 2 * math.comb(count, left) / 2**count
        if outside > 1 - CONFIDENCE:
            break
        left += 1
    left = max(left - 1, 0)
    return float(medians[left]), float(medians[count - 1 - left])


def _summary(own: _Times, first: _Times) -> Latency:
    low, median, high = np.percentile(own, [10, 50, 90])
    ratios = own / first
    return Latency(
        float(median),
        float(low),
        float(high),
        len(own),
        float(np.median(ratios)),
        median_within=within(own),
        ratio_within=within(ratios),
    )
