"""Advice after a run: another runtime on this machine that would run the written file faster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from graphopt import latency, registry
from graphopt.backend import Backend, Differentiable, Feeds, Session, is_timed
from graphopt.backend_survey import backends_here, option_of
from graphopt.choices import backend_of
from graphopt.comparison import Comparison
from graphopt.latency import Latency
from graphopt.target import Target

# Less is not worth another runtime.
WORTH = 1.3
ADVICE_SECONDS = 1.0
# Runtimes take turns of so long: run by run, the threads of one would wake while the other computes, and find caches
# cold.
BURST_SECONDS = 0.1
LEAST_ROUNDS = 6
# Another runtime holds the model once more; beyond this, compiling it takes longer than people wait for advice.
MOST_BYTES = 500_000_000
# Between runtimes codes fall on either side of a rounding; below this they compute something else.
LEAST_SQNR_DB = 20.0


@dataclass(frozen=True)
class Advice:
    """Another runtime that runs the file faster.

    Attributes:
        backend: What `--backend` calls it.
        target: The target it runs, which lays models out for it, or None.
        name: What tables call it.
        milliseconds: Of a run there.
        here: Of a run on the runtime that was asked for.
        speedup: Median over paired runs.
    """

    backend: str
    target: str | None
    name: str
    milliseconds: float
    here: float
    speedup: float

    def text(self) -> str:
        """Return it in one line, with what to type."""
        option = f"--target {self.target}" if self.target is not None else f"--backend {self.backend}"
        times = f"{self.milliseconds:.3g} ms instead of {self.here:.3g} ms"
        return f"{self.name} runs the result {self.speedup:.1f}× faster ({times}): try `{option}`"

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values, its text among them."""
        return asdict(self) | {"text": self.text()}


def advise(backend: Backend, file: Path, size: int, feed: Feeds, threads: int) -> Advice | None:
    """Time a file on every other runtime that is here, and return the fastest that is worth to be named, or None.

    Args:
        backend: What runs it as asked.
        file: The model.
        size: Its bytes, with all data files.
        feed: What it runs on.
        threads: Threads for each; 0 leaves it to the runtimes.
    """
    if size > MOST_BYTES or not is_timed(backend):
        return None
    found = [one for other in others(backend) if (one := _timed(backend, other, file, feed, threads)) is not None]
    return max(found, key=lambda one: one.speedup, default=None)


def others(backend: Backend) -> list[Backend]:
    """Return the backends that run here and are timed, but for the one there is, whatever it runs on.

    What one backend can run on otherwise is a choice of its user's, who has named one. One that is there to train
    models is no place to run them.
    """
    own = getattr(backend, "deployed", backend).name
    return backends_here(lambda one: is_timed(one) and one.name != own and not isinstance(one, Differentiable))


def _timed(backend: Backend, other: Backend, file: Path, feed: Feeds, threads: int) -> Advice | None:
    """Return advice if another backend runs the file, computes the same, and is clearly faster by so much."""
    # Whatever goes wrong with it is no advice, and nobody asked for it: the result is written all the same.
    with contextlib.suppress(Exception), _both(backend, other, file, threads) as sessions:
        comparison = Comparison()
        comparison.update(*(session.run(feed) for session in sessions))
        if any(output.sqnr_db < LEAST_SQNR_DB for output in comparison.outputs.values()):
            return None
        here, there = _in_turn(sessions, feed)
        if there.ratio * WORTH > 1 or there.verdict != "faster":
            return None
        target = _target_of(other)
        name = target.name if target is not None else None
        return Advice(option_of(other), name, other.describe(), there.median, here.median, 1 / there.ratio)
    return None


@contextlib.contextmanager
def _both(backend: Backend, other: Backend, file: Path, threads: int) -> Iterator[list[Session]]:
    with backend.open(file, threads=threads) as here, other.open(file, threads=threads) as there:
        yield [here, there]


def _in_turn(sessions: Sequence[Session], feed: Feeds) -> list[Latency]:
    """Time sessions of different runtimes."""
    feeds = [feed] * len(sessions)
    return latency.summarize(
        [latency.rounds(sessions, feeds, seconds=ADVICE_SECONDS, least=LEAST_ROUNDS, burst=BURST_SECONDS)]
    )


def _target_of(backend: Backend) -> Target | None:
    """Return the target whose backend this is: where several have it, this machine's, or the first."""
    targets: list[Target] = [registry.find("TARGETS", name) for name in registry.table("TARGETS")]
    fitting = [one for one in targets if one.backend == backend.name and backend_of(one) == backend]
    host = registry.host_target()
    return next((one for one in fitting if one.name == host), fitting[0] if fitting else None)
