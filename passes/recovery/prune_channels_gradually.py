"""Pruning of channels in rounds: a few are removed, what is left is trained to make up for them, and again."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from graphopt import options
from graphopt.authoring import Context, Given, Guarantee, Need
from graphopt.errors import UsageError
from graphopt.options import opt
from graphopt.processes import process_count

from ..lossy.order import BEFORE_FACTORS
from ..lossy.prune_channels import PruneChannels
from .recover import Recover
from .rounds import check_rounds, run_rounds, training_of


@dataclass(frozen=True)
class PruneChannelsGradually(PruneChannels, Recover):
    """Remove channels and train in turns until what was asked for is reached: each round starts close to the teacher.

    Rounds are those of `prune-channels`, each with a training behind it.
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
        """Refuse what could not be trained, and processes that would each go by a clock of their own."""
        if self.latency is not None and process_count() > 1:
            raise UsageError(
                f"pass `{self.name}`: {process_count()} processes would measure `latency`, and choose, each for itself",
                hint="`macs`, which all count alike; or a single process",
            )
        check_rounds(given, training_of(self))

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Remove and train, round by round.

        Raises:
            PassError: The model is quantized already, or training diverges.
            UsageError: A glob matches nothing, or there is nothing to time a model with.
        """
        run_rounds(model, ctx, self.cuts(model), training_of(self))

    def once(self, **share: float) -> PruneChannels:
        """Return the pass that removes the channels of one round."""
        chosen = {name: getattr(self, name) for name in options.fields(PruneChannels)}
        return PruneChannels(**{**chosen, "rounds": 1, **share})
