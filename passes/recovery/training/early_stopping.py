"""When training has gone on for long enough, and which weights are the best it came by."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class EarlyStopping:
    """The least loss so far on what is held out, with the weights that gave it.

    Attributes:
        patience: Looks without a better loss before training ends; None for ever.
        loss: The least so far.
        step: Steps done by then.
        waited: Looks since.
        weights: Copies of the trained tensors on the CPU by name, as they were then; empty where none are kept.
    """

    patience: int | None
    loss: float = math.inf
    step: int = 0
    waited: int = 0
    weights: dict[str, torch.Tensor] = field(default_factory=dict)

    def improves(self, step: int, loss: float) -> bool:
        """Take note of a look, and return whether it is the best so far."""
        if loss < self.loss:
            self.loss, self.step, self.waited = loss, step, 0
            return True
        self.waited += 1
        return False

    @property
    def is_over(self) -> bool:
        """Whether patience has run out."""
        return self.patience is not None and self.waited >= self.patience

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of it."""
        return {"loss": self.loss, "step": self.step, "waited": self.waited, "weights": self.weights}

    def restore(self, state: dict[str, Any]) -> None:
        """Take up what a checkpoint holds."""
        self.loss, self.step, self.waited = state["loss"], state["step"], state["waited"]
        self.weights = dict(state["weights"])
