"""Statistics of batch normalization, taken anew from the samples once all else is trained."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from graphopt.data import Dataset

from ..training.lowered_values import values_of
from ..training.samples import StoredSamples, TrainingBatch

# What the functions of torch's backend that normalize so are called.
_FUNCTION = "batch_normalization"
# Samples that are run: more change means and variances of channels by no more than a percent or two.
_ROWS = 1024

# Which arguments of BatchNormalization are the running mean and the running variance.
_MEAN, _VARIANCE = 3, 4


@dataclass(eq=False)
class _Moments:
    """Sums over batches of what a normalization sees, and how many numbers of each channel these are."""

    count: int = 0
    sums: Tensor | None = None
    squares: Tensor | None = None

    def add(self, values: Tensor) -> None:
        wide = values.double().movedim(1, 0).flatten(1)
        sums, squares = wide.sum(dim=1), wide.square().sum(dim=1)
        self.sums = sums if self.sums is None else self.sums + sums
        self.squares = squares if self.squares is None else self.squares + squares
        self.count += wide.shape[1]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return mean and variance of each channel."""
        assert self.sums is not None, "a batch was seen"
        assert self.squares is not None, "a batch was seen"
        mean = self.sums / self.count
        return mean, (self.squares / self.count - mean.square()).clamp_min(0)


@dataclass(eq=False)
class _Now:
    """The batch that is run: rows that only pad it are no part of any statistics."""

    batch: TrainingBatch | None = None


@dataclass(eq=False)
class _Watching:
    """A normalization that notes what it is given, and normalizes by the statistics of the batch."""

    function: Callable[..., Any]
    moments: _Moments
    now: _Now
    __name__: str = "watching"

    def __call__(self, x: Tensor, scale: Tensor, bias: Tensor, mean: Tensor, variance: Tensor, **options: Any) -> Any:
        assert self.now.batch is not None, "a batch is run"
        batch, real = _Moments(), self.now.batch.real(x)
        self.moments.add(real)
        batch.add(real)
        now_mean, now_variance = batch.statistics()
        return self.function(x, scale, bias, now_mean.to(mean), now_variance.to(variance), **options)


@torch.no_grad()
def updated_batch_norms(module: fx.GraphModule, data: Dataset, batch: int, device: str = "cpu") -> dict[str, Tensor]:
    """Return the statistics of every batch normalization, as of what it sees over the samples.

    As in training, each normalizes by the statistics of the batch meanwhile, so that what the next one sees does not
    hang on the old ones (Wu and Johnson, Rethinking "Batch" in BatchNorm, 2021, section 3).

    Args:
        module: A lowered model; left as it is.
        data: The samples, the first 1,024 of which are run.
        batch: How many at once.
        device: Where.

    Returns:
        Initializer name to mean or variance, float64 [channels]; nothing where normalizations were folded into
        layers.
    """
    moments: dict[tuple[str, str], _Moments] = {}
    before, now = {}, _Now()
    for node in module.graph.nodes:
        paths = _statistics_of(node)
        if paths is not None:
            before[node] = node.target
            node.target = _Watching(node.target, moments.setdefault(paths, _Moments()), now)
    if not before:
        return {}
    try:
        module.recompile()
        _run(module.to(device), data, batch, torch.device(device), now)
    finally:
        for node, target in before.items():
            node.target = target
        module.recompile()
        module.to("cpu")
    names = {path: name for name, path in module.meta["graphopt"].parameters.items()}
    return {
        names[path]: values.cpu()
        for paths, one in moments.items()
        for path, values in zip(paths, one.statistics(), strict=True)
    }


def _run(module: fx.GraphModule, data: Dataset, batch: int, device: torch.device, now: _Now) -> None:
    samples = StoredSamples(data)
    rows = np.arange(min(len(samples), _ROWS))
    for part in samples.divide(rows, batch):
        now.batch = samples.batch(part, None, rows).to(device)
        values_of(module, now.batch)


def _statistics_of(node: fx.Node) -> tuple[str, str] | None:
    """Return the paths of the statistics that a node normalizes by; None where it does not, or stores none."""
    is_norm = node.op == "call_function" and getattr(node.target, "__name__", "").startswith(_FUNCTION)
    if not is_norm or node.kwargs.get("training_mode") or len(node.args) <= _VARIANCE:
        return None
    mean, variance = node.args[_MEAN], node.args[_VARIANCE]
    if not all(isinstance(one, fx.Node) and one.op == "get_attr" for one in (mean, variance)):
        return None
    return str(mean.target), str(variance.target)  # type: ignore[union-attr]
