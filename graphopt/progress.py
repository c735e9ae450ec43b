"""What a person at a terminal sees while work goes on: which stage, how many samples, for how long."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text


class _Samples(ProgressColumn):
    """The number of samples a stage has seen, once it has seen one."""

    def render(self, task: Task) -> Text:
        """Return the cell of one stage."""
        return Text(f"{task.completed:.0f} samples" if task.completed else "")


class Display:
    """Stages of a run on stderr, gone when done; nothing where stderr is no terminal or ``shown`` is False."""

    def __init__(self, shown: bool) -> None:
        console = Console(stderr=True)
        self._progress = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            _Samples(),
            TimeElapsedColumn(),
            console=console,
            disable=not (shown and console.is_terminal),
            transient=True,
        )
        self._stages: list[TaskID] = []

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show a stage while what is inside runs; stages may be nested."""
        if not self._stages:
            self._progress.start()
        self._stages.append(self._progress.add_task(name, total=None))
        try:
            yield
        finally:
            self._progress.remove_task(self._stages.pop())
            if not self._stages:
                self._progress.stop()

    def advance(self, samples: int) -> None:
        """Count samples for the innermost stage."""
        if self._stages:
            self._progress.advance(self._stages[-1], samples)
