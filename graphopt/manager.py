"""The pass manager: runs steps over a model, instruments watching."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.analysis import AnalysisCache
from graphopt.authoring import Context, Guarantee, Note, Pass
from graphopt.backend import Backend
from graphopt.data import Dataset
from graphopt.errors import GraphoptError, PassError, in_words
from graphopt.instruments import Instrument
from graphopt.model_io import saved_bytes
from graphopt.pattern import RewriteCheck
from graphopt.pipeline import Step
from graphopt.report import PassRecord, StepRecord
from graphopt.rewriter import Journal, Rewriter
from graphopt.target import Target

# Rounds over a preset's passes; each pass is at its own fixpoint, so more than a few rounds means a ping-pong.
PRESET_ROUNDS_LIMIT = 10


@dataclass(frozen=True)
class Setting:
    """What all passes of a run share."""

    target: Target
    backend: Backend
    seed: int = 0
    threads: int = 0
    data: Dataset | None = None
    check_rewrite: RewriteCheck | None = None


class PassManager:
    """Runs steps in order over one model, in place.

    Args:
        steps: As scheduled.
        setting: What all passes share.
        instruments: What watches, in the order it is told.

    Attributes:
        journal: Every edit made.
        records: One record per step, also of a step that failed.
    """

    def __init__(self, steps: Sequence[Step], setting: Setting, instruments: Sequence[Instrument] = ()) -> None:
        self.steps = steps
        self.setting = setting
        self.instruments = instruments
        self.journal = Journal()
        self.records: list[StepRecord] = []
        self._analyses = AnalysisCache()

    def run(self, model: ir.Model) -> list[StepRecord]:
        """Run the steps and return their records.

        Raises:
            VerificationError: A check failed or a budget was exceeded; `records` holds what was done.
            PassError: A pass cannot do what was asked.
        """
        try:
            for instrument in self.instruments:
                instrument.run_started(model, self.steps)
            for step in self.steps:
                self._run_step(step, model)
        finally:
            for instrument in self.instruments:
                instrument.run_finished()
        return self.records

    def _run_step(self, step: Step, model: ir.Model) -> None:
        nodes, size = _measure(model)
        record = StepRecord(step.name, step.spec, step.guarantee.value, nodes, size)
        self.records.append(record)
        for instrument in self.instruments:
            instrument.step_started(step, model)
        if step.reason is not None:
            record.reason = step.reason
        # Exact rewriting has a fixpoint; losing the same twice does not.
        rounds = PRESET_ROUNDS_LIMIT if step.preset and step.guarantee is not Guarantee.LOSSY else 1
        for _ in range(rounds):
            editing = [one.name for one in step.passes if self._run_pass(one, model, record)]
            if not editing:
                break
        else:
            if rounds > 1:
                names = ", ".join(f"`{name}`" for name in editing)
                record.passes[-1].notes.append(
                    Note(step.name, f"still changing the model after {rounds} rounds: {names}", left=True)
                )
        record.nodes_after, record.bytes_after = _measure(model)
        for instrument in self.instruments:
            instrument.step_finished(step, model, record)

    def _run_pass(self, one: Pass, model: ir.Model, record: StepRecord) -> int:
        """Run one pass and return how many edits it made."""
        rewriter = Rewriter(model, self.journal, one.name)
        since = rewriter.version
        context = Context(
            model=model,
            rewriter=rewriter,
            target=self.setting.target,
            backend=self.setting.backend,
            seed=self.setting.seed,
            threads=self.setting.threads,
            data=self.setting.data,
            check_rewrite=self.setting.check_rewrite,
            analyses=self._analyses,
        )
        try:
            one.run(model, context)
        except GraphoptError:
            raise
        except Exception as error:
            raise PassError(
                f"pass `{one.name}` failed: {in_words(error)}",
                hint="this is a mistake of the pass, not yours; `-v` shows where; leave it out, or report it",
            ) from error
        self._analyses.keep(one.preserves, since, rewriter.version)
        _fold_in(record, one, rewriter.edits, context)
        for instrument in self.instruments:
            instrument.pass_finished(one, model, rewriter.edits)
        return rewriter.edits


def _fold_in(record: StepRecord, one: Pass, edits: int, context: Context) -> None:
    """Add one run of a pass to its step; what is left is what the last of a preset's rounds leaves."""
    record.edits += edits
    known = next((entry for entry in record.passes if entry.name == one.name), None)
    if known is None:
        known = PassRecord(one.name)
        record.passes.append(known)
    known.edits += edits
    known.rounds += 1
    known.notes = [note for note in known.notes if not note.left] + context.notes


def _measure(model: ir.Model) -> tuple[int, int]:
    """Return the number of nodes, and the bytes the model takes on disk."""
    return sum(1 for _ in walk.every_node(model)), saved_bytes(model)
