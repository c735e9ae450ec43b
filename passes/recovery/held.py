"""What trains and what is held while it does, as options of a pass."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from graphopt.errors import UsageError, did_you_mean
from graphopt.options import opt

ADAPTERS = "adapters"
"""Small factors beside each weight that train in its place."""

KINDS: Mapping[str, str] = {
    "weights": "what layers multiply by, and tables that are looked up in",
    "biases": "what layers add",
    "norms": "scales and shifts of normalizations, and other factors of channels",
    "scales": "steps of integer codes, and scales of weights made of codes",
    "tables": "entries of tables that were found for a weight",
    "zero-points": "which codes stand for zero, of activations",
    ADAPTERS: "factors of low rank beside each weight, in its place",
}
"""What `train` may name, each with what it is."""

_USUAL = ("weights", "biases", "norms", "scales", "tables")
_RANK, _ALPHA = 8, 16.0
# Scales train as logarithms: a rate moves them by that share, and weights, being below 1, by a larger one. ResNet-20
# in int4 and uint8, 70 steps of distillation, SQNR of what was held out: at a rate of 0.0002 14.8 dB with 1, 15.6 with
# 10, 15.3 with 30; at 0.0005 15.3 with 1, 15.5 with 4, 15.3 with 10.
_SCALE_RATE = 5.0


@dataclass(frozen=True)
class Held:
    """Which constants of a model train, and what of them stays as it is."""

    train: tuple[str, ...] = opt(_USUAL, help=f"what trains, of {', '.join(KINDS)}")
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")
    zeros: Literal["auto", "keep", "free"] = opt(
        "auto",
        help="whether weights that are zero stay zero; auto: those in float do, and codes where there are more zeros "
        "than rounding makes",
    )
    scale_rate: float = opt(
        _SCALE_RATE, help="learning rate of scales and zero points, as a multiple of the others'", low=0.0, high=1000.0
    )
    adapter_rank: int = opt(_RANK, help="rank of adapters", low=1, high=4096)
    adapter_alpha: float = opt(_ALPHA, help="adapters are multiplied by this, divided by their rank", low=0.0)

    def check_held(self) -> None:
        """Refuse words that `train` does not know, and those that contradict each other.

        Raises:
            UsageError: Names the option and what it may be.
        """
        if not self.train:
            raise UsageError("pass `recover`: option `train` names nothing", hint=f"any of: {', '.join(KINDS)}")
        for word in self.train:
            if word not in KINDS:
                raise UsageError(
                    f"pass `recover`: option `train` cannot be `{word}`",
                    hint=f"{did_you_mean(word, KINDS)}; several are joined by +, as in weights+biases",
                )
        if ADAPTERS in self.train and "weights" in self.train:
            raise UsageError(
                "pass `recover`: option `train` names both `weights` and `adapters`, which stand in for weights",
                hint="one of the two: `train=adapters`, or `train=weights+biases+norms`",
            )
