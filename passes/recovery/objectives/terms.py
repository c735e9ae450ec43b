"""Terms of a loss: sums over what is counted, with the counts apart, so that any split of a batch adds up exactly."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from ..training.samples import TrainingBatch

Values = Mapping[str, Any]


@dataclass(frozen=True)
class Losses:
    """The terms of one batch, or of a part of it.

    Attributes:
        totals: Term name to the sum over what it counts, a float32 scalar with gradients.
        counts: Term name to how much it counted.
        weights: Term name to its weight in the loss.
    """

    totals: dict[str, Tensor]
    counts: dict[str, float]
    weights: dict[str, float]

    def loss(self, counts: Mapping[str, float] | None = None) -> Tensor:
        """Return the weighted sum of the means of all terms, a scalar.

        Args:
            counts: What to divide by: the counts of the whole global batch, where this is a part of it. The sum over
                all parts is then the loss of the whole, and so are the gradients.
        """
        counts = self.counts if counts is None else counts
        parts = [self.weights[name] * total / max(counts[name], 1.0) for name, total in self.totals.items()]
        return torch.stack(parts).sum()


@dataclass(frozen=True)
class Items:
    """What is counted of an output: its rows, or those of their tokens that are no padding.

    Attributes:
        tokens: Input of token ids, [rows, tokens], where single tokens are counted.
        mask: Input that is 0 where a token is padding, if there is one.
        shifted: Whether a token is a target of the one before it, so that the first of each row is none.
    """

    tokens: str | None = None
    mask: str | None = None
    shifted: bool = False

    def count(self, batch: TrainingBatch) -> float:
        """Return how much of a batch counts, from the batch alone."""
        if self.tokens is None:
            return float(batch.count)
        return float(self.weights(batch).sum())

    def weights(self, batch: TrainingBatch) -> Tensor:
        """Return 1 for each token that counts and else 0, float32 [rows, tokens].

        Where shifted, the first of each row is left out, and so is what padding before a text would predict.
        """
        assert self.tokens is not None, "rows have no weights"
        real = batch.real(batch.feeds[self.mask or self.tokens])
        # Of a decoder the mask begins with what it has read before.
        real = real[:, -batch.feeds[self.tokens].shape[1] :]
        weights = (real != 0).float() if self.mask is not None else torch.ones(real.shape, device=real.device)
        return weights[:, 1:] * weights[:, :-1] if self.shifted else weights

    def counted(self, values: Tensor, batch: TrainingBatch) -> Tensor:
        """Return what counts of a value: its real rows, or [1, tokens, ...] where single tokens do."""
        real = batch.real(values)
        return real if self.tokens is None else real[self.weights(batch) > 0].unsqueeze(0)

    def total(self, losses: Tensor, batch: TrainingBatch) -> Tensor:
        """Return the sum over what counts; what a row or token has of several losses goes in with its mean.

        Args:
            losses: Loss of each item, [rows, ...] or [rows, tokens, ...], rows that only pad included; or one of all.
            batch: The batch.
        """
        real = batch.real(losses.float())
        if not real.numel():
            return real.sum()
        if self.tokens is not None:
            weights = self.weights(batch)
            return (real.reshape(*weights.shape, -1).mean(dim=2) * weights).sum()
        # A sample may be a feed of its own, of any number of rows; and an output, the same for all rows.
        return real.mean() * batch.count


class Term:
    """One part of what is minimised.

    Attributes:
        name: What reports call it.
        measure: What is measured, in words.
        subject: What it is measured on: the name of a value, or of a function.
        weight: How much of it goes into the loss.
        items: What is counted.
        student: Values of the student that must be observed, besides outputs.
        teacher: Values of the teacher that must be observed, besides outputs.
        reads_teacher: Whether it compares with a teacher.
        needs_preparation: Whether it must see some samples first.
    """

    name: str
    measure: str
    subject: str
    weight: float
    items: Items = Items()
    student: tuple[str, ...] = ()
    teacher: tuple[str, ...] = ()
    reads_teacher = False
    needs_preparation = False

    def count(self, batch: TrainingBatch) -> float:
        """Return how much of a batch is counted, from the batch alone."""
        return self.items.count(batch)

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over what is counted of a batch, a scalar.

        Args:
            student: Outputs and observed values of the model that is trained, by name.
            teacher: Those of the teacher; empty where there is none.
            batch: What both were run on.
        """
        raise NotImplementedError

    def look(self, student: Values, teacher: Values, batch: TrainingBatch) -> None:
        """Look at the first samples, the student as it begins: what a term is measured by must not change later."""

    def settle(self) -> None:
        """Make of what was looked at what the term is measured by."""


def class_scores(array: Tensor) -> Tensor:
    """Return scores as [rows, ..., classes], float32, in the layouts that the metrics of classes take.

    Images hold their classes in axis 1, unless they are 1×1 pixels; anything else in its last.
    """
    if array.ndim > 3:
        sizes = array.shape[1:]
        pixels = sizes.numel() // max(max(sizes), 1)
        array = array.reshape(len(array), -1) if pixels == 1 else array.movedim(1, -1)
    return array.float()
