"""The pass manager: runs steps over a model, instruments watching."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.analysis import AnalysisCache
from graphopt.authoring import Context, Guarantee, Judging, Note, Pass
from graphopt.backend import Backend
from graphopt.calibration_cache import CalibrationCache
from graphopt.data import Dataset
from graphopt.errors import GraphoptError, PassCrash, PassError, in_words
from graphopt.instruments import Instrument
from graphopt.pipeline import Step
from graphopt.progress import Display
from graphopt.report import PassRecord, StepRecord
from graphopt.rewrite_check import RewriteCheck
from graphopt.rewriter import Edit, EditLimitReached, Journal, Rewriter, let_go_of_loose_nodes
from graphopt.shapes import infer_shapes
from graphopt.standing import Standing
from graphopt.summary import approximate_bytes
from graphopt.target import Target

# Rounds over a preset's passes; each pass is at its own fixpoint, so more than a few rounds means a ping-pong.
PRESET_ROUNDS_LIMIT = 10


@dataclass(frozen=True)
class Setting:
    """What all passes of a run share; `Context` says what each is."""

    target: Target
    backend: Backend
    seed: int = 0
    threads: int = 0
    data: Dataset | None = None
    check_rewrite: RewriteCheck | None = None
    calibration: CalibrationCache = field(default_factory=CalibrationCache)
    weigh: Callable[[ir.Model], Standing] | None = None
    judge: Judging | None = None
    predicts: bool = False
    display: Display | None = None
    teacher: ir.Model | None = None


class PassManager:
    """Runs steps in order over one model, in place.

    Args:
        steps: As scheduled.
        setting: What all passes share.
        instruments: What watches, in the order it is told.
        edit_limit: Edit at which the run ends, whatever is left to do; None for no such limit.

    Attributes:
        journal: Every edit made.
        records: One record per step, also of a step that failed.
        stopped: Whether the run ended at its limit.
    """

    def __init__(
        self,
        steps: Sequence[Step],
        setting: Setting,
        instruments: Sequence[Instrument] = (),
        *,
        edit_limit: int | None = None,
    ) -> None:
        self.steps = steps
        self.setting = setting
        self.instruments = instruments
        self.journal = Journal(limit=edit_limit)
        self.records: list[StepRecord] = []
        self.stopped = False
        self._analyses = AnalysisCache()
        self._measured: tuple[int, tuple[int, int]] | None = None
        # Kept only where a later lossy pass may look at it.
        self._keeps_reference = sum(one.guarantee is Guarantee.LOSSY for step in steps for one in step.passes) > 1
        # A copy: what later edits make of its origins is this run's own.
        self._teacher = setting.teacher.clone() if setting.teacher is not None else None
        self._reference: ir.Model | None = None

    def run(self, model: ir.Model) -> list[StepRecord]:
        """Run the steps and return their records.

        Raises:
            VerificationError: A check failed or a budget was exceeded; `records` holds what was done.
            PassError: A pass cannot do what was asked, or failed.
        """
        try:
            # Rules look at shapes without asking; the first pass that asks finds them inferred.
            self._analyses.get(infer_shapes, model, self.journal.changes)
            for instrument in self.instruments:
                instrument.run_started(model, self.steps)
            for step in self.steps:
                self._run_step(step, model)
                if self.stopped:
                    break
        finally:
            for instrument in self.instruments:
                instrument.run_finished()
        return self.records

    def _run_step(self, step: Step, model: ir.Model) -> None:
        nodes, size = self._measure(model)
        record = StepRecord(step.name, step.spec, step.guarantee.value, nodes, size)
        record.nodes_after, record.bytes_after = nodes, size  # until the step is done
        self.records.append(record)
        for instrument in self.instruments:
            instrument.step_started(step, model)
        if step.reason is not None:
            record.reason = step.reason
        # Exact rewriting has a fixpoint; losing the same twice does not.
        rounds = PRESET_ROUNDS_LIMIT if step.preset and step.guarantee is not Guarantee.LOSSY else 1
        settled: dict[int, int] = {}  # position of a pass -> version of the model it found nothing to do on
        for _ in range(rounds):
            editing = self._run_round(step, model, record, settled)
            if not editing or self.stopped:
                break
        else:
            if rounds > 1:
                names = ", ".join(f"`{name}`" for name in editing)
                record.passes[-1].notes.append(
                    Note(step.name, f"still changing the model after {rounds} rounds: {names}", left=True)
                )
        record.nodes_after, record.bytes_after = self._measure(model)
        for instrument in self.instruments:
            instrument.step_finished(step, model, record)

    def _measure(self, model: ir.Model) -> tuple[int, int]:
        """Return the number of nodes, and about the bytes the model takes on disk; looks again only after an edit."""
        if self._measured is None or self._measured[0] != self.journal.changes:
            figures = sum(1 for _ in walk.every_node(model)), approximate_bytes(model)
            self._measured = self.journal.changes, figures
        return self._measured[1]

    def _run_round(self, step: Step, model: ir.Model, record: StepRecord, settled: dict[int, int]) -> list[str]:
        """Run those passes of a step once that may find something to do; return the names of those that did."""
        editing = []
        for position, one in enumerate(step.passes):
            if settled.get(position) == self.journal.changes:
                continue
            if self._run_pass(one, model, record):
                editing.append(one.name)
            else:
                settled[position] = self.journal.changes
            if self.stopped:
                break
        return editing

    def _run_pass(self, one: Pass, model: ir.Model, record: StepRecord) -> int:
        """Run one pass and return how many edits it made."""
        for instrument in self.instruments:
            instrument.pass_started(one, len(self.journal.edits))
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
            reference=self._reference,
            teacher=self._teacher,
            check_rewrite=self.setting.check_rewrite,
            weigh=self.setting.weigh,
            judge=self.setting.judge,
            predicts=self.setting.predicts,
            guarantee=one.guarantee,
            analyses=self._analyses,
            calibration=self.setting.calibration,
            display=self.setting.display,
        )
        if self._keeps_reference and self._reference is None and one.guarantee is Guarantee.LOSSY:
            self._reference = model.clone()
        try:
            one.run(model, context)
        except EditLimitReached:
            self.stopped = True
            let_go_of_loose_nodes(model)
        except GraphoptError:
            raise
        except MemoryError as error:
            raise PassError(
                f"pass `{one.name}` ran out of memory", hint="close other programs, or use a machine with more memory"
            ) from error
        except Exception as error:
            raise PassCrash(
                f"pass `{one.name}` failed: {in_words(error)}",
                hint="this is a mistake of the pass, not yours; `-v` shows where; leave it out, or report it",
            ) from error
        if one.guarantee is not Guarantee.LOSSY and rewriter.edits:
            for other in (self._reference, self._teacher):
                if other is not None:
                    _part_from_edited(other, self.journal.edits[-rewriter.edits :])
        self._analyses.keep(one.preserves, since, rewriter.version)
        _fold_in(record, one, rewriter.edits, context)
        for instrument in self.instruments:
            instrument.pass_finished(one, model, rewriter.edits)
        return rewriter.edits


def _part_from_edited(reference: ir.Model, edits: Sequence[Edit]) -> None:
    """Take the origins of nodes whose counterparts were edited: these may compute something else now."""
    names = {name for edit in edits for name in edit.nodes}
    for node in walk.every_node(reference):
        if walk.label(node) in names:
            provenance.record(node, ())


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
    if context.check_rewrite is not None and one.guarantee is not Guarantee.LOSSY:
        known.notes += _notes_on_checks(context, edits)
    record.refused += [refusal for refusal in context.refused if refusal not in record.refused]


def _notes_on_checks(context: Context, edits: int) -> list[Note]:
    """Say how many rewrites were checked by themselves, and why the others could not be."""
    unchecked = context.unchecked.total()
    unasked = edits - context.checked - unchecked
    texts = []
    if context.checked or unchecked:
        texts.append(f"{context.checked} rewrites checked by themselves, {unchecked} not")
    if unasked > 0:
        texts.append(f"edits of kinds that are not checked by themselves: {unasked}")
    texts += [f"{rule} not checked by itself {n}×: {why}" for (rule, why), n in sorted(context.unchecked.items())]
    return [Note(context.rewriter.pass_name, text) for text in texts]
