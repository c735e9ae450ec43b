"""Accelerate, opened for one training: where it runs, in which precision, on how many processes."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    FullyShardedDataParallelPlugin,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
)
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy

from graphopt.errors import BackendError, PassError, UsageError
from graphopt.processes import local_process_count, process_count

from ..settings import Training
from .fingerprints import digest

# Digests are compared as integers of 64 bits.
_LARGEST_INTEGER = 2**63
# Variables by which `accelerate launch` hands over what graphopt's options do not ask for.
_OTHER_ENGINES = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "a parallelism of its own",
}
_YES = ("1", "t", "true", "y", "yes", "on")
# The others wait while the main process scores a model; that one of them is gone, closed connections tell sooner.
_LONGEST_WAIT = timedelta(days=1)
# How Accelerate calls the precisions.
_PRECISIONS = {"fp32": "no", "bf16": "bf16", "fp16": "fp16"}


def refuse_device(settings: Training, device: str) -> None:
    """Refuse a device that is not here, or that cannot do what was asked for.

    Raises:
        BackendError: There is no such device.
        UsageError: It cannot.
    """
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or (index and not index.isdecimal()):
        raise UsageError(f"pass `recover`: cannot train on `{device}`", hint="`cpu`, `cuda` or `cuda:1`")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        found = torch.cuda.device_count()
        raise BackendError(
            f"cannot train on `{device}`: torch finds {found} GPUs", hint="`device=cpu`, or a GPU it finds"
        )
    if kind == "cuda" and local_process_count() > torch.cuda.device_count():
        raise UsageError(
            f"pass `recover`: {local_process_count()} processes for {torch.cuda.device_count()} GPUs of this machine",
            hint="as many processes as GPUs; a smaller `micro_batch` saves memory on fewer",
        )
    if kind == "cpu" and settings.precision == "fp16":
        raise UsageError(
            "pass `recover`: `precision=fp16` needs a GPU: gradients of half precision are scaled there",
            hint="`precision=bf16`, which any processor computes",
        )
    if kind == "cpu" and settings.sharding == "fsdp":
        raise UsageError("pass `recover`: `sharding=fsdp` needs GPUs", hint="several CPU processes train without it")


@contextlib.contextmanager
def accelerating(settings: Training, device: str) -> Iterator[Accelerator]:
    """Open Accelerate as a training wants it, and leave nothing of it behind.

    Args:
        settings: The training.
        device: ``cpu``, ``cuda`` or ``cuda:N``; among many processes, each takes the GPU of its own number.

    Raises:
        BackendError: There is no such device.
        UsageError: It cannot do what was asked for.
    """
    refuse_device(settings, device)
    _refuse_launcher(settings)
    kind, _, index = device.partition(":")
    with _environment(), _without_advice(), _chosen_gpu(int(index) if index and process_count() == 1 else None):
        accelerator = Accelerator(
            mixed_precision=_PRECISIONS[settings.precision],
            cpu=kind == "cpu",
            kwargs_handlers=[DistributedDataParallelKwargs(), InitProcessGroupKwargs(timeout=_LONGEST_WAIT)],
            # Parts of a batch are summed up here; a launcher's environment must not divide gradients besides.
            gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
            fsdp_plugin=_sharding() if settings.sharding == "fsdp" else None,
        )
        try:
            yield accelerator
        finally:
            if accelerator.device.type == "cuda":
                # What it wraps is freed by the collector of garbage only, which takes longer than a small training.
                accelerator.free_memory()
            # Accelerate keeps device, precision and sharding for the whole process, and another training may want
            # others. What joins processes is torch's, and stays.
            AcceleratorState._reset_state(reset_partial_state=True)


def join(settings: Training, device: str) -> None:
    """Let processes that are to train together find each other.

    Raises:
        BackendError: There is no such device.
        UsageError: It cannot do what was asked for.
    """
    if process_count() > 1:
        with accelerating(settings, device):
            pass


def _refuse_launcher(settings: Training) -> None:
    """Refuse to train as a launcher was told to, but nobody here would know of."""
    for variable, name in _OTHER_ENGINES.items():
        if os.environ.get(variable, "").lower() in _YES and not (name == "FSDP" and settings.sharding == "fsdp"):
            raise UsageError(
                f"pass `recover`: `accelerate launch` was told to train by {name}",
                hint="leave that out of its options and its configuration; `sharding=fsdp` divides weights",
            )


@contextlib.contextmanager
def _environment() -> Iterator[None]:
    """Put variables back that Accelerate sets, such as that everything from now on is sharded."""
    before = {name: os.environ.get(name) for name in _OTHER_ENGINES}
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _without_advice() -> Iterator[None]:
    """Leave out what torch says of weights of single pixels, whose order in memory can be told in several ways."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
        yield


@contextlib.contextmanager
def _chosen_gpu(index: int | None) -> Iterator[None]:
    """Make a GPU the current one inside; None for the one that is."""
    if index is None:
        yield
        return
    with torch.cuda.device(index):
        yield


def _sharding() -> FullyShardedDataParallelPlugin:
    # Precision is autocast's affair, as without sharding: left to FSDP, even the sums of a loss would be halves.
    return FullyShardedDataParallelPlugin(fsdp_version=2, mixed_precision_policy=MixedPrecisionPolicy())


def tell_of_unused(accelerator: Accelerator, may_miss_some: bool) -> None:
    """Say, before anything is prepared, whether a step may leave some of what is trained without a gradient.

    Looking for these costs data parallelism a walk through each step's graph.
    """
    assert accelerator.ddp_handler is not None, "it is opened with one"
    accelerator.ddp_handler.find_unused_parameters = may_miss_some


def refuse_differences(accelerator: Accelerator, module: nn.Module) -> None:
    """Refuse to train together what is not the same on every process.

    Raises:
        PassError: Some process begins with other weights.
    """
    if accelerator.num_processes == 1:
        return
    own = int(digest(module), 16) % _LARGEST_INTEGER
    found = accelerator.gather(torch.tensor([own], device=accelerator.device))
    if len(set(found.tolist())) > 1:
        raise PassError(
            "pass `recover`: processes that train together begin with different weights",
            hint="passes before it chose by the clock, or at random: write what they make to a file, and recover that",
        )


def is_sharded(accelerator: Accelerator) -> bool:
    """Return whether weights are divided among processes."""
    return bool(accelerator.distributed_type == DistributedType.FSDP)


def summed(accelerator: Accelerator, values: Mapping[str, float]) -> dict[str, float]:
    """Return figures summed up over all processes, each of which gives the same names.

    Raises:
        BackendError: A process is gone.
    """
    if accelerator.num_processes == 1:
        return dict(values)
    stacked = torch.tensor(list(values.values()), dtype=torch.float64, device=accelerator.device)
    total = accelerator.reduce(stacked, reduction="sum")
    return dict(zip(values, total.tolist(), strict=True))


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a tensor on the CPU; of one that is divided among processes, all of it."""
    gather = getattr(tensor, "full_tensor", None)
    full: torch.Tensor = tensor.detach() if gather is None else gather().detach()
    return full.to("cpu", copy=True)
