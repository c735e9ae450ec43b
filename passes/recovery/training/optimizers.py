"""Optimizers of torch, as settings ask for them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..settings import Training

# The second beta of Adam, and what keeps it from dividing by zero: those of the paper (Kingma & Ba, 2015).
_SECOND_BETA = 0.999
_EPSILON = 1e-8


@dataclass(frozen=True)
class Trained:
    """Tensors that are trained alike.

    Attributes:
        name: What they are.
        tensors: Path in the module to parameter.
        rate: What the learning rate is multiplied by.
        decays: Whether weight decay applies.
    """

    name: str
    tensors: dict[str, nn.Parameter]
    rate: float
    decays: bool


def make_optimizer(settings: Training, groups: Sequence[Trained]) -> torch.optim.Optimizer:
    """Return the optimizer of a training.

    AdamW decays weights apart from gradients (Loshchilov & Hutter, Decoupled Weight Decay Regularization, 2019), Adam
    and SGD through them.
    """
    parameters = [
        {
            "params": list(group.tensors.values()),
            "name": group.name,
            "lr": settings.rate * group.rate,
            "weight_decay": settings.decay if group.decays else 0.0,
        }
        for group in groups
    ]
    if settings.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=settings.momentum, nesterov=settings.momentum > 0)
    kind = torch.optim.AdamW if settings.optimizer == "adamw" else torch.optim.Adam
    return kind(parameters, betas=(settings.momentum, _SECOND_BETA), eps=_EPSILON)
