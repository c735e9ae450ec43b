"""How a candidate stands: its figures on the samples a choice is made by, against the original and the budget."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Standing:
    """What was measured of a model against the original.

    Attributes:
        kind: What the divergence is: ``kl``, or ``noise`` where no output is of classes.
        divergence: What candidates are ranked by, 0 for the original: KL(original ‖ model) in nats, the largest of the
            outputs that are of classes, a mean over items (over tokens, for a language model); else noise power over
            signal power of the worst output, which is 10 ** (-SQNR / 10). Infinite where outputs are NaN.
        outputs: By output, ``sqnr_db`` in dB and, where it is of classes, ``kl`` in nats.
        metrics: Metrics by name.
        used: The largest share of a budget that is used up; over 1 is over budget. 0 where there is no budget.
        why: That budget in words, with the figure before and after; empty where there is no budget.
    """

    kind: Literal["kl", "noise"]
    divergence: float
    outputs: Mapping[str, Mapping[str, float]]
    metrics: Mapping[str, float]
    used: float = 0.0
    why: str = ""

    @property
    def holds(self) -> bool:
        """Whether every budget holds."""
        return self.used <= 1
