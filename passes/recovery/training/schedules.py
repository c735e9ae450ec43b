"""How the learning rate rises and falls over a training."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..settings import Training

# `schedule=step`: when the rate drops, as shares of the steps behind the warm-up, and to which part of what it was.
DROPS = (0.5, 0.75, 0.9)
DROP_FACTOR = 0.1


def rate_factor(settings: Training, steps: int) -> Callable[[int], float]:
    """Return what gives, for each step from 0 on, the factor its learning rate has; 1 at the highest.

    The rate rises on a line over the first steps (`warmup`), and falls from there as `schedule` says: on a cosine as
    in Loshchilov & Hutter, SGDR, 2017, without restarts.
    """
    rising = round(settings.warmup * steps)
    falling = max(1, steps - rising)

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / (rising + 1)
        return _fallen(settings.schedule, min(1.0, (step - rising) / falling))

    return factor


def _fallen(schedule: str, progress: float) -> float:
    if schedule == "linear":
        return 1.0 - progress
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    if schedule == "step":
        return DROP_FACTOR ** sum(progress >= drop for drop in DROPS)
    return 1.0
