"""The options of recovery that say how training goes."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Self

from graphopt.data import Dataset
from graphopt.errors import DataError, UsageError
from graphopt.options import opt
from graphopt.processes import process_count

# No more samples than these are held out of training: a loss over so many is settled.
HELD_OUT_LIMIT = 1024
# Samples that one training must at least have, one of them held out: with fewer there is nothing to learn.
FEWEST_SAMPLES = 2


@dataclass(frozen=True)
class Training:
    """How weights are trained: for how long, by which optimizer, in which precision, and what is kept of it.

    A batch is what one step of the optimizer sees, over all processes together; `micro_batch` only says how much of it
    is in memory at once. So a training is the same on one process and on many, and at any micro batch.
    """

    steps: int | None = opt(None, help="steps of the optimizer; as many as `epochs` come to where not given", low=1)
    epochs: float = opt(10.0, help="how often each sample is seen", low=0.0)
    minutes: float | None = opt(None, help="stop after so many minutes, with the best weights until then", low=0.0)
    batch: int = opt(32, help="samples a step learns from, over all processes; all where there are fewer", low=1)
    micro_batch: int | None = opt(
        None, help="samples in memory at once; gradients of the parts of a batch are summed up", low=1
    )
    optimizer: Literal["adamw", "adam", "sgd"] = opt("adamw", help="adamw, adam, or sgd with Nesterov's momentum")
    rate: float = opt(5e-4, help="learning rate at its highest", low=0.0, high=1e6)
    decay: float = opt(0.0, help="weight decay", low=0.0)
    momentum: float = opt(0.9, help="momentum of sgd, or the first beta of adam", low=0.0, high=0.9999)
    schedule: Literal["constant", "linear", "cosine", "step"] = opt(
        "cosine", help="how the rate falls: not at all, to zero on a line or a cosine, or in three steps"
    )
    warmup: float = opt(0.05, help="share of the steps in which the rate rises from zero", low=0.0, high=0.9)
    clip: float | None = opt(1.0, help="longest gradient, over all weights; none for any length", low=0.0)
    precision: Literal["fp32", "bf16", "fp16"] = opt(
        "fp32", help="what products are computed in; weights and optimizer stay in fp32"
    )
    sharding: Literal["none", "fsdp"] = opt(
        "none", help="fsdp divides weights, gradients and optimizer among GPUs (under torchrun or accelerate launch)"
    )
    held_out: float = opt(
        0.1, help="share of the samples not trained on, by which the best weights are chosen", low=0.0, high=0.5
    )
    evaluate_every: int | None = opt(None, help="steps between looks at what is held out; an epoch if not given", low=1)
    patience: int | None = opt(None, help="looks without a better loss before training stops early", low=1)
    keep: Literal["best", "last"] = opt("best", help="weights of the least loss on what is held out, or the last ones")
    checkpoints: str | None = opt(None, help="folder to write checkpoints to, and to go on from if it holds one")
    checkpoint_every: int | None = opt(None, help="steps between checkpoints; as often as looks if not given", low=1)

    def check_training(self) -> None:
        """Refuse options that contradict each other.

        Raises:
            UsageError: They do.
        """
        for name in ("rate", "clip", "minutes"):
            if getattr(self, name) == 0:
                raise _misuse(f"`{name}` cannot be 0", hint=f"a `{name}` above 0, or leave it out")
        if self.steps is None and self.epochs == 0:
            raise _misuse("neither `steps` nor `epochs` asks for a step", hint="`epochs` above 0, or `steps`")
        if not all(math.isfinite(value) for value in (self.rate, self.epochs, self.decay)):
            raise _misuse("`rate`, `epochs` and `decay` must be finite", hint="numbers such as `rate=0.0005`")
        if not self.held_out and self.patience is not None:
            raise _misuse("`patience` needs samples to look at, and none are held out", hint="`held_out` above 0")
        if self.checkpoint_every is not None and self.checkpoints is None:
            raise _misuse("`checkpoint_every` without a folder", hint="`checkpoints=FOLDER`")
        if self.micro_batch is not None and self.micro_batch > self.batch:
            raise _misuse(
                f"`micro_batch={self.micro_batch}` is more than `batch={self.batch}`",
                hint="a micro batch is the part of a batch that is in memory at once",
            )
        processes = process_count()
        if self.batch < processes:
            raise _misuse(f"`batch={self.batch}` for {processes} processes", hint="at least a sample for each of them")
        if self.sharding != "none" and processes == 1:
            raise _misuse(
                f"`sharding={self.sharding}` in a single process",
                hint="start it by `torchrun --nproc-per-node=N -m graphopt …` or `accelerate launch`",
            )

    def check_data(self, data: Dataset) -> None:
        """Refuse samples that are too few, and a folder for checkpoints that cannot be one.

        Raises:
            DataError: The samples are.
            UsageError: The folder cannot.
        """
        if len(data) < FEWEST_SAMPLES:
            raise DataError(
                f"`{data.name}` has {len(data)} sample to train on",
                hint=f"at least {FEWEST_SAMPLES}; hundreds are better",
            )
        pool = len(data) - self.held_out_count(len(data))
        if pool < process_count():
            raise DataError(
                f"`{data.name}` has {pool} samples to train on, for {process_count()} processes",
                hint="at least a sample for each of them; hundreds are better",
            )
        if self.checkpoints is not None:
            self._check_folder(Path(self.checkpoints))

    def _check_folder(self, folder: Path) -> None:
        there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        if not there.is_dir():
            raise _misuse(f"cannot write checkpoints to `{folder}`: `{there}` is a file", hint="name a folder")
        if not os.access(there, os.W_OK):
            raise _misuse(f"cannot write checkpoints to `{folder}`: no permission", hint="name a folder of your own")

    def held_out_count(self, samples: int) -> int:
        """Return how many of so many samples are not trained on: none or at least one, never all."""
        if not self.held_out:
            return 0
        return max(1, min(round(samples * self.held_out), HELD_OUT_LIMIT, samples - 1))

    def fitted(self, samples: int) -> Self:
        """Return the same for so many samples to train on: no step learns from one of them twice.

        An epoch of fewer samples than a batch is one step, as loaders of batches have it.
        """
        batch = min(self.batch, samples)
        return replace(self, batch=batch, micro_batch=self.micro_batch and min(self.micro_batch, batch))

    def step_count(self, samples: int) -> int:
        """Return how many steps a training on so many samples takes."""
        if self.steps is not None:
            return self.steps
        return max(1, math.ceil(self.epochs * samples / self.batch))

    def steps_between_looks(self, samples: int) -> int:
        """Return after how many steps what is held out is looked at, of a training on so many samples."""
        return self.evaluate_every or max(1, math.ceil(samples / self.batch))


def _misuse(message: str, *, hint: str) -> UsageError:
    return UsageError(f"pass `recover`: {message}", hint=hint)
