"""Losses, and the steps of optimizers that models of ONNX's training preview hold."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .operators import Operator, Table

# What torch takes for "no label is left out"; no label is negative otherwise.
_NOTHING_IGNORED = -100


def negative_log_likelihood_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> Tensor:
    """Negative logarithms of the likelihood of labels (batch, classes, further axes)."""
    ignored = _NOTHING_IGNORED if ignore_index is None else ignore_index
    weight = None if weight is None else weight.to(x.dtype)
    return F.nll_loss(x, target.to(torch.int64), weight, ignore_index=ignored, reduction=reduction)


def softmax_cross_entropy_loss(
    x: Tensor, target: Tensor, weight: Tensor | None = None, *, ignore_index: int | None = None, reduction: str = "mean"
) -> tuple[Tensor, Tensor]:
    """Cross-entropy of labels, and the logarithms of the shares of the classes."""
    shares = torch.log_softmax(x, 1)
    return negative_log_likelihood_loss(shares, target, weight, ignore_index=ignore_index, reduction=reduction), shares


def adagrad(
    rate: Tensor,
    count: Tensor,
    *inputs: Tensor,
    decay_factor: float = 0.0,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
) -> tuple[Tensor, ...]:
    """A step of AdaGrad."""
    step = rate / (1 + count * decay_factor)
    new, sums = [], []
    for x, gradient, squares in _by_tensor(inputs, 3):
        whole = norm_coefficient * x + gradient
        sums.append(squares + whole * whole)
        new.append(x - step * whole / (torch.sqrt(sums[-1]) + epsilon))
    return (*new, *sums)


def adam(
    rate: Tensor,
    count: Tensor,
    *inputs: Tensor,
    alpha: float = 0.9,
    beta: float = 0.999,
    epsilon: float = 1e-6,
    norm_coefficient: float = 0.0,
    norm_coefficient_post: float = 0.0,
) -> tuple[Tensor, ...]:
    """A step of Adam."""
    corrected = rate * torch.sqrt(1 - beta ** count.to(rate.dtype)) / (1 - alpha ** count.to(rate.dtype))
    step = torch.where(count > 0, corrected, rate)
    new, means, squares = [], [], []
    for x, gradient, mean, square in _by_tensor(inputs, 4):
        whole = norm_coefficient * x + gradient
        means.append(alpha * mean + (1 - alpha) * whole)
        squares.append(beta * square + (1 - beta) * whole * whole)
        moved = x - step * means[-1] / (torch.sqrt(squares[-1]) + epsilon)
        new.append((1 - norm_coefficient_post) * moved)
    return (*new, *means, *squares)


def momentum(
    rate: Tensor,
    count: Tensor,
    *inputs: Tensor,
    alpha: float,
    beta: float,
    mode: str,
    norm_coefficient: float,
) -> tuple[Tensor, ...]:
    """A step of gradient descent with momentum, the plain one or Nesterov's."""
    share = torch.where(count > 0, beta, 1.0)
    new, speeds = [], []
    for x, gradient, speed in _by_tensor(inputs, 3):
        whole = norm_coefficient * x + gradient
        speeds.append((alpha * speed + share * whole).to(x.dtype))
        direction = whole + alpha * speeds[-1] if mode == "nesterov" else speeds[-1]
        new.append(x - rate * direction)
    return (*new, *speeds)


def _by_tensor(inputs: tuple[Tensor, ...], kinds: int) -> Iterator[tuple[Tensor, ...]]:
    """Go through what belongs to each tensor: the inputs hold all of one kind before the next."""
    count = len(inputs) // kinds
    return zip(*(inputs[kind * count : (kind + 1) * count] for kind in range(kinds)), strict=True)


OPERATORS: Table = {
    "NegativeLogLikelihoodLoss": Operator(negative_log_likelihood_loss, since=12),
    "SoftmaxCrossEntropyLoss": Operator(softmax_cross_entropy_loss, since=12),
}

TRAINING: Table = {"Adagrad": Operator(adagrad), "Adam": Operator(adam), "Momentum": Operator(momentum)}
