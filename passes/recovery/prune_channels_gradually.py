"""Pruning of channels in rounds: a few are removed, what is left is trained to make up for them, and again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import options
from graphopt.authoring import Context, Given, Guarantee, Need
from graphopt.options import opt
from graphopt.summary import count_macs

from ..lossy.order import BEFORE_FACTORS
from ..lossy.prune_channels import PruneChannels
from .recover import Recover
from .rounds import check_rounds, run_rounds, training_of


@dataclass(frozen=True)
class PruneChannelsGradually(PruneChannels, Recover):
    """Remove channels and train in turns until what was asked for is reached: each round starts close to the teacher.

    Each of n rounds leaves the n-th root of what is to be left in the end, so that all take the same share of what
    they find. Ends of rounds are counted from the model as it was, so what widths in whole blocks leave over in one
    round goes in the next; but times are measured, and each round goes by its own.
    """

    rounds: int = opt(
        4, help="how often channels are removed, and the rest trained; each has the options of both", low=1, high=100
    )

    name = "prune-channels-gradually"
    guarantee = Guarantee.LOSSY
    precedes = BEFORE_FACTORS

    def __post_init__(self) -> None:
        """Refuse what either of the two refuses."""
        PruneChannels.__post_init__(self)
        Recover.__post_init__(self)

    @property
    def needs(self) -> frozenset[Need]:
        """What both need."""
        return frozenset({Need.CANONICAL, Need.CALIBRATION})

    def check_ahead(self, given: Given) -> None:
        """Refuse what could not be trained."""
        check_rounds(given, training_of(self))

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Remove and train, round by round.

        Raises:
            PassError: The model is quantized already, or training diverges.
            UsageError: A glob matches nothing, or there is nothing to time a model with.
        """
        run_rounds(model, ctx, self._cuts(model), training_of(self))

    def _cuts(self, model: ir.Model) -> Iterator[tuple[str, PruneChannels]]:
        """Yield what is removed in each round, settled when the round begins."""
        chosen = {name: getattr(self, name) for name in options.fields(PruneChannels)}
        whole = count_macs(model)
        for number in range(1, self.rounds + 1):
            name, share = self._share(number, count_macs(model) / whole if whole else 1.0)
            if 0 < share < 1:  # else widths in blocks have left no more than this round is to leave
                yield f"{name}={share:.3g}", PruneChannels(**{**chosen, name: share})

    def _share(self, number: int, left: float) -> tuple[str, float]:
        """Return what a round is asked for, of a model with so much left of its multiplications."""
        if self.macs is not None:
            return "macs", self.macs ** (number / self.rounds) / left
        if self.latency is not None:
            return "latency", self.latency ** (1 / self.rounds)
        return "ratio", 1 - (1 - (self.ratio or self.usual_ratio)) ** (1 / self.rounds)
