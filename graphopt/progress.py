"""What a person at a terminal sees while work goes on: which stage, how far, how long it has taken and will take."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

T = TypeVar("T")
# The time left is told from the speed of so many seconds past.
_SPEED_OF_SECONDS = 60.0
_MINUTE, _HOUR = 60, 3600


class _Count(ProgressColumn):
    """How many samples or items a stage is done with, of how many, once it is done with one."""

    def render(self, task: Task) -> Text:
        """Return the cell of one stage."""
        noun = task.fields["noun"]
        if task.total is not None:
            return Text(f"{task.completed:.0f} of {task.total:.0f} {noun}")
        return Text(f"{task.completed:.0f} {noun}" if task.completed else "")


class _Left(ProgressColumn):
    """How long a stage will take yet, where its speed tells."""

    def render(self, task: Task) -> Text:
        """Return the cell of one stage."""
        seconds = task.time_remaining
        if task.total is None or seconds is None or task.finished:
            return Text("")
        hours, minutes = int(seconds // _HOUR), int(seconds % _HOUR // _MINUTE)
        clock = f"{hours}:{minutes:02}" if hours else f"{minutes}"
        return Text(f"{clock}:{int(seconds % _MINUTE):02} left")


class Display:
    """Stages of a run on stderr, gone when done; nothing where stderr is no terminal or ``shown`` is False."""

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Count(),
            TimeElapsedColumn(),
            _Left(),
            console=console,
            disable=not (shown and console.is_terminal),
            transient=True,
            speed_estimate_period=_SPEED_OF_SECONDS,
        )
        self._stages: list[tuple[TaskID, str]] = []

    @contextlib.contextmanager
    def stage(self, name: str, total: int | None = None, noun: str = "samples") -> Iterator[TaskID]:
        """Show a stage while what is inside runs; stages may be nested.

        Args:
            name: What is done.
            total: How many will be counted by `advance`, where that is known: the time left is shown then.
            noun: What is counted.
        """
        if not self._stages:
            self._progress.start()
        own = self._progress.add_task(name, total=total, noun=noun)
        self._stages.append((own, noun))
        try:
            yield own
        finally:
            # Not the last one: what an error leaves half done is closed when it is let go of.
            self._stages.remove((own, noun))
            self._progress.remove_task(own)
            if not self._stages:
                self._progress.stop()

    def advance(self, count: int = 1, noun: str = "samples") -> None:
        """Count samples, or what else is named, for the innermost stage if that is what it counts.

        Data tell of each sample that is used, whatever it is used for: a stage that counts layers counts none of them.
        """
        if self._stages and self._stages[-1][1] == noun:
            self._progress.advance(self._stages[-1][0], count)

    def describe(self, name: str) -> None:
        """Show another name for the innermost stage: what is done by now, or a figure that changes on the way."""
        if self._stages:
            self._progress.update(self._stages[-1][0], description=name)

    def track(self, items: Collection[T], name: str, noun: str) -> Iterator[T]:
        """Yield items one by one as a stage of its own, counted when they are done with."""
        with self.stage(name, len(items), noun) as own:
            for item in items:
                yield item
                self._progress.advance(own)
