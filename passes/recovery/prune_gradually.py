"""Pruning in rounds: a few more weights become zero, the others are trained to make up for them, and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import onnx_ir as ir

from graphopt import options
from graphopt.authoring import Context, Given, Guarantee, Need, Note
from graphopt.errors import UsageError
from graphopt.options import opt

from ..lossy.order import BEFORE_SPARSE_FILES
from ..lossy.prune import Prune, parse_pattern
from .recover import Recover

# The exponent of the schedule: most weights go in the first rounds, while there are many to spare.
_EXPONENT = 3
# What `prune` and `recover` both have, and here is said of pruning: all layers are trained.
_OF_PRUNING = ("include", "exclude")


@dataclass(frozen=True)
class PruneGradually(Prune, Recover):
    """Prune and train in turns until the share of zeros is reached: more zeros than a single cut leaves room for.

    After round t of n the share is ``sparsity`` × (1 − (1 − t/n)³) (Zhu & Gupta, To prune, or not to prune, 2017, with
    rounds in the place of steps). Of a pattern N of M, as many of each M go as that share comes to.
    """

    rounds: int = opt(
        3, help="how often weights are pruned, and the others trained; each has the options of both", low=1, high=100
    )

    name = "prune-gradually"
    guarantee = Guarantee.LOSSY
    precedes = BEFORE_SPARSE_FILES

    def __post_init__(self) -> None:
        """Refuse what either of the two refuses, and to train the zeros away that were made."""
        Prune.__post_init__(self)
        Recover.__post_init__(self)
        if self.zeros == "free":
            raise UsageError(
                f"pass `{self.name}`: `zeros=free` would train away the zeros of each round",
                hint="leave out `zeros`, which stay zero then; or `--passes prune,recover:zeros=free` for once",
            )

    @property
    def needs(self) -> frozenset[Need]:
        """What both need."""
        return frozenset({Need.CANONICAL, Need.CALIBRATION})

    def check_ahead(self, given: Given) -> None:
        """Refuse what could not be trained; the model as it is will do for a teacher."""
        teacher = given.teacher if given.teacher is not None else given.model
        self._training().check_ahead(replace(given, teacher=teacher))

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Prune and train, round by round.

        Raises:
            PassError: The model is quantized already, training diverges, or a zero would not stay one.
            UsageError: A glob matches nothing.
        """
        teacher = ctx.standard if ctx.standard is not None else model.clone()
        context, training = replace(ctx, teacher=teacher), self._training()
        steps = list(self.cuts())
        for number, cut in enumerate(steps, 1):
            before = ctx.rewriter.edits
            amount = f"pattern={cut.pattern}" if cut.pattern is not None else f"sparsity={cut.sparsity:.3g}"
            ctx.note(f"round {number} of {len(steps)}: `{amount}`")
            notes: list[Note] = []
            cut.run(model, replace(context, notes=notes))
            if ctx.rewriter.edits == before:
                ctx.note("nothing more was pruned, so nothing is trained")
            else:
                training.run(model, replace(context, notes=notes))
            # What is said of a round is said again of the next one, but for the figures of the model as a whole.
            ctx.notes.extend(note for note in notes if number == len(steps) or (note.facts and note.node is None))

    def cuts(self) -> Iterator[Prune]:
        """Yield what is pruned in each round; rounds that come to the same are one."""
        shares = [1 - (1 - number / self.rounds) ** _EXPONENT for number in range(1, self.rounds + 1)]
        for cut, _ in groupby(self._cut(share) for share in shares):
            yield cut

    def _cut(self, share: float) -> Prune:
        """Return the pass that prunes a share of what is pruned in the end."""
        chosen = {name: getattr(self, name) for name in options.fields(Prune)}
        kept = parse_pattern(self.pattern)
        if kept is None:
            return Prune(**{**chosen, "sparsity": self.sparsity * share})
        n, m = kept
        gone = max(1, round((m - n) * share))
        return Prune(**{**chosen, "pattern": f"{m - gone}of{m}"})

    def _training(self) -> Recover:
        """Return the pass that trains what is left after a round."""
        chosen: dict[str, Any] = {
            name: getattr(self, name) for name in options.fields(Recover) if name not in _OF_PRUNING
        }
        return Recover(**chosen)
