"""What lowered models give, by name; and what a teacher gives for each sample, computed once where that will do."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import fx

from graphopt.backend import Array

from .samples import Samples, TrainingBatch

# Values of a teacher are kept up to so many bytes on each process.
BYTES_KEPT = 1 << 29
# Values of a sample by itself may be so far, as a share of the largest, from those in a batch: sums in another order.
_ROUNDING = 1e-3


def values_of(module: fx.GraphModule, batch: TrainingBatch) -> dict[str, torch.Tensor]:
    """Return outputs and observed values of a lowered model by name; floats of half precision as float32."""
    lowered = module.meta["graphopt"]
    values = module(*(batch.feeds[name] for name in lowered.inputs))
    return dict(zip((*lowered.outputs, *lowered.observed), map(_widened, values), strict=True))


def _widened(value: Any) -> Any:
    halves = (torch.float16, torch.bfloat16)
    return value.float() if isinstance(value, torch.Tensor) and value.dtype in halves else value


class TeacherValues:
    """Outputs and observed values of a teacher, which does not change while it teaches.

    Args:
        teacher: The teacher, on the device.
        samples: What it is run on.
        at_most: Samples in a batch.
        accelerator: Where it runs.
    """

    def __init__(self, teacher: fx.GraphModule, samples: Samples, at_most: int, accelerator: Accelerator) -> None:
        self._teacher, self._samples, self._at_most, self._accelerator = teacher, samples, at_most, accelerator
        self._kept: dict[str, torch.Tensor] = {}
        self._position: dict[int, int] = {}

    def of(self, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        """Return the values of a batch."""
        if not self._kept or any(row not in self._position for row in batch.rows.tolist()):
            return self._computed(batch)
        picked = np.resize([self._position[row] for row in batch.rows.tolist()], _rows_fed(batch))
        index = torch.as_tensor(picked, device=self._accelerator.device)
        return {name: values[index] for name, values in self._kept.items()}

    def keep(self, rows: Array) -> bool:
        """Compute the values of samples and keep them, if each sample has its own and they are small; return whether.

        Batches are always divided alike here, and no random number is drawn that another training would miss, so one
        that is gone on with has the same values to the last bit.
        """
        device = self._accelerator.device
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            return self._keep(rows)

    def _keep(self, rows: Array) -> bool:
        parts = self._samples.divide(rows, self._at_most)
        first = self._computed(self._batch(parts[0]))
        size = sum(_bytes_of(value) for value in first.values()) / len(parts[0]) * len(rows)
        if size > BYTES_KEPT or not self._is_separable(parts[0], first):
            return False
        found: dict[str, list[torch.Tensor]] = {name: [] for name in first}
        for part in parts:
            batch = self._batch(part)
            for name, value in self._computed(batch).items():
                if len(value) != _rows_fed(batch) or value.shape[1:] != first[name].shape[1:]:
                    return False
                found[name].append(value[: len(part)])
        self._kept = {name: torch.cat(values) for name, values in found.items()}
        self._position = {row: position for position, row in enumerate(np.concatenate(parts).tolist())}
        return True

    def _is_separable(self, rows: Array, together: dict[str, torch.Tensor]) -> bool:
        """Return whether the first axis of each value is samples, which do not depend on each other."""
        fed = _rows_fed(self._batch(rows))
        if not all(isinstance(value, torch.Tensor) and value.ndim and len(value) == fed for value in together.values()):
            return False
        if fed == len(rows) == 1:
            return True
        alone = self._computed(self._batch(rows[:1]))
        return len(rows) > 1 and all(_is_near(alone[name], value) for name, value in together.items())

    def _batch(self, rows: Array) -> TrainingBatch:
        return self._samples.batch(rows, None, rows).to(self._accelerator.device)

    def _computed(self, batch: TrainingBatch) -> dict[str, torch.Tensor]:
        with torch.no_grad(), self._accelerator.autocast():
            return values_of(self._teacher, batch)


def _is_near(alone: torch.Tensor, together: torch.Tensor) -> bool:
    """Return whether the first sample has the same value by itself as among others."""
    one, other = alone[:1].double(), together[:1].double()
    if one.shape != other.shape or not one.numel():
        return False
    return bool((one - other).abs().max() <= _ROUNDING * one.abs().max())


def _rows_fed(batch: TrainingBatch) -> int:
    """Return how many rows a batch has, those that pad included."""
    return next((len(feed) for feed in batch.feeds.values() if feed.ndim), 0)


def _bytes_of(value: Any) -> int:
    return value.numel() * value.element_size() if isinstance(value, torch.Tensor) else 0
