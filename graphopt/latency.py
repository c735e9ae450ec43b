"""Latency side by side: sessions run in turn, so that a machine that slows down slows all of them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from graphopt.backend import Feeds, Session

WARM_UP_RUNS = 2


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
    """

    median: float
    low: float
    high: float
    runs: int
    ratio: float
    batch: int = 1


def measure(sessions: Sequence[Session], feeds: Sequence[Feeds], *, seconds: float, min_runs: int = 3) -> list[Latency]:
    """Time sessions in turn, A B C A B C …, for about so long in all.

    Args:
        sessions: What to time.
        feeds: One feed per session.
        seconds: Time to spend.
        min_runs: Rounds to make even if that takes longer.
    """
    for _ in range(WARM_UP_RUNS):
        for session, feed in zip(sessions, feeds, strict=True):
            session.run(feed)
    rounds: list[list[float]] = []
    end = time.perf_counter() + seconds
    while len(rounds) < min_runs or time.perf_counter() < end:
        rounds.append([_time(session, feed) for session, feed in zip(sessions, feeds, strict=True)])
    times = np.array(rounds) * 1e3
    return [_summary(times[:, i], times[:, 0]) for i in range(len(sessions))]


def _time(session: Session, feed: Feeds) -> float:
    start = time.perf_counter()
    session.run(feed)
    return time.perf_counter() - start


def _summary(
    own: np.ndarray[tuple[int], np.dtype[np.float64]], first: np.ndarray[tuple[int], np.dtype[np.float64]]
) -> Latency:
    low, median, high = np.percentile(own, [10, 50, 90])
    return Latency(float(median), float(low), float(high), len(own), float(np.median(own / first)))
