"""A run's states: the model as it is after any number of its edits, and what the edits are."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable

import onnx_ir as ir

from graphopt.errors import GraphoptError
from graphopt.manager import PassManager
from graphopt.optimization import Run
from graphopt.rewriter import Edit
from graphopt.shapes import forget_inferred

# States kept of one run: a search over hundreds of edits then needs two runs, at the price of as many clones.
KEPT_STATES = 16


class EditStates:
    """The states of one run; the passes are run again for those that were not kept.

    Args:
        job: The run; its model is not changed.

    Attributes:
        edits: Every edit of the run.
        runs: How often the passes were run.
    """

    def __init__(self, job: Run) -> None:
        self._job = job
        # Edits are made on clones.
        self._start = job.model.clone()
        self._kept: dict[int, ir.Model] = {}
        self.runs = 0
        with job.display.stage("counting edits"):
            self.edits: list[Edit] = self._run(None, 0, 0).journal.edits

    def __len__(self) -> int:
        """Return how many edits the whole run makes."""
        return len(self.edits)

    def __getitem__(self, count: int) -> ir.Model:
        """Return the model as the run has it after some of its edits; it is not to be changed.

        Raises:
            GraphoptError: The passes make other edits each time.
        """
        if count == 0:
            return self._start
        if count not in self._kept:
            below = max((one for one in self._kept if one < count), default=0)
            above = min((one for one in self._kept if one > count), default=len(self.edits))
            self._require_same(self._run(above, below, count).journal.edits, above)
        if count not in self._kept:  # there is no clone of a malformed model
            self._require_same(self._run(count, count, count).journal.edits, count)
        return self._kept[count]

    def _run(self, limit: int | None, below: int, wanted: int) -> PassManager:
        """Run the passes up to an edit, and keep a state that is wanted and others behind an edit, evenly spaced."""
        model, kept, stride = self._start.clone(), dict[int, ir.Model](), 1
        started, spent = time.perf_counter(), 0.0

        def watch(edit: Edit) -> None:
            nonlocal stride, spent
            now = time.perf_counter()
            # Clones are to save runs, not to take longer than these.
            is_due = edit.number > below and (edit.number - below) % stride == 0 and spent <= (now - started) / 2
            if edit.number != wanted and not is_due:
                return
            with contextlib.suppress(RuntimeError, ValueError):
                kept[edit.number] = model.clone()
            spent += time.perf_counter() - now
            if len(kept) > KEPT_STATES:
                stride *= 2
                for number in [one for one in kept if one != wanted and (one - below) % stride]:
                    del kept[number]

        manager = self._watched(model, limit, watch)
        kept[len(manager.journal.edits)] = model
        for state in kept.values():
            forget_inferred(state)
        self._kept.update(kept)
        return manager

    def follow(self, told: Callable[[ir.Model, Edit | None], None]) -> None:
        """Run the passes once more and tell of the model before the first edit, and after each; it is only looked at.

        Raises:
            GraphoptError: The passes make other edits each time.
        """
        model = self._start.clone()
        told(model, None)
        edits = self._watched(model, None, lambda edit: told(model, edit)).journal.edits
        self._require_same(edits, len(self.edits))

    def _watched(self, model: ir.Model, limit: int | None, watch: Callable[[Edit], None]) -> PassManager:
        self.runs += 1
        manager = self._job.manager(limit=limit)
        manager.journal.watcher = watch
        with self._job.opened:
            manager.run(model)
        return manager

    def _require_same(self, edits: list[Edit], count: int) -> None:
        """Raise unless a run up to an edit made those that the first run made."""
        pairs = itertools.zip_longest(self.edits[:count], edits)
        was, now = next((pair for pair in pairs if pair[0] != pair[1]), (None, None))
        one = was or now
        if one is None:
            return
        raise GraphoptError(
            f"pass `{one.pass_name}` makes other edits each time: "
            f"edit {one.number} was {_words(was)}, then {_words(now)}",
            hint="this is a mistake of the pass: what it does must hang on the model and the seed alone",
        )


def _words(edit: Edit | None) -> str:
    return f"`{edit.rule}` at {', '.join(edit.nodes) or 'no node'}" if edit is not None else "not made"
