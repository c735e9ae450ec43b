"""What the training engine is given: something to make small, and what it may change to do so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import torch

from .samples import Outputs, TrainingBatch


class Losses(Protocol):
    """Terms of a loss over one batch: numerators and denominators apart, so that parts of a batch add up to it."""

    @property
    def totals(self) -> Mapping[str, torch.Tensor]:
        """Sums over the batch, scalars."""

    @property
    def weights(self) -> Mapping[str, float]:
        """What each counts for, once divided by its count."""


class Objective(Protocol):
    """What training makes small."""

    @property
    def needs_preparation(self) -> bool:
        """Whether `prepare` wants to see batches before the first step."""

    def counts(self, batch: TrainingBatch) -> Mapping[str, float]:
        """Return what the sums over a batch are divided by, by term; it depends on the batch and nothing else."""

    def __call__(self, student: Outputs, teacher: Outputs | None, batch: TrainingBatch) -> Losses:
        """Return the losses of a batch, of which the first `count` samples are real."""

    def prepare(self, batches: Iterable[tuple[Outputs, Outputs | None, TrainingBatch]]) -> None:
        """Look at the first batches, the same ones on every process, before anything is trained."""


class ParameterGroup(Protocol):
    """Parameters that are trained alike; float32, in memory of their own."""

    @property
    def name(self) -> str:
        """What they are, such as ``weights`` or ``scales``."""

    @property
    def rate(self) -> float:
        """What the learning rate is multiplied by."""

    @property
    def decay(self) -> bool:
        """Whether weight decay applies."""

    @property
    def names(self) -> Sequence[str]:
        """What each is called."""

    @property
    def tensors(self) -> Sequence[torch.nn.Parameter]:
        """The parameters."""


class Constraint(Protocol):
    """What may change; its bounds are part of the module."""

    def parameters(self) -> Sequence[ParameterGroup]:
        """Return what is trained."""


class Proximal(Protocol):
    """A penalty that is no part of the loss: weights are brought closer to zero after each step, and exactly to it."""

    def apply(self, rate: float) -> None:
        """Shrink weights.

        Args:
            rate: The learning rate of the step.
        """
