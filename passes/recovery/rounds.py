"""Rounds of a pass that takes something away and of a training that makes up for it, one after the other."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import onnx_ir as ir

from graphopt import options
from graphopt.authoring import Context, Given, Note, Pass

from .recover import Recover

# What pruning and `recover` both have, and here is said of pruning: all layers are trained.
_OF_PRUNING = ("include", "exclude")


def training_of(one: Recover) -> Recover:
    """Return the pass that trains what is left after a round, by the options of a pass that does both."""
    return Recover(**{name: getattr(one, name) for name in options.fields(Recover) if name not in _OF_PRUNING})


def check_rounds(given: Given, training: Recover) -> None:
    """Refuse what could not be trained; the model as it is will do for a teacher.

    Raises:
        GraphoptError: As `Recover.check_ahead`.
    """
    teacher = given.teacher if given.teacher is not None else given.model
    training.check_ahead(replace(given, teacher=teacher))


def run_rounds(model: ir.Model, ctx: Context, cuts: Iterable[tuple[str, Pass]], training: Recover) -> None:
    """Run each pass and train behind it, against the model as it was before the first or the teacher that was given.

    Args:
        model: The model.
        ctx: Of the pass whose rounds these are.
        cuts: What to say of a pass, and the pass; the next one is asked for when the one before has been trained.
        training: What trains after each.

    Raises:
        GraphoptError: As the passes do.
    """
    teacher = ctx.standard if ctx.standard is not None else model.clone()
    context = replace(ctx, teacher=teacher)
    notes: list[Note] = []
    for number, (amount, cut) in enumerate(cuts, 1):
        # What is said of a round is said again of the next one, but for the figures of the model as a whole.
        ctx.notes.extend(note for note in notes if note.facts and note.node is None)
        ctx.note(f"round {number}: `{amount}`")
        notes, before = [], ctx.rewriter.edits
        cut.run(model, replace(context, notes=notes))
        if ctx.rewriter.edits == before:
            ctx.note("nothing more was pruned, so nothing is trained")
        else:
            training.run(model, replace(context, notes=notes))
    ctx.notes.extend(notes)
