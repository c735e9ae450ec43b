"""Checkpoints of a training: whole or not there, and found again by what is trained on what."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from graphopt.errors import PassError, in_words

from .acceleration import is_sharded

_STEP = re.compile(r"step-(\d+)")
_UNFINISHED = ".unfinished"
_STATE = "training.pt"


class Checkpoints:
    """The checkpoints of one training in a folder of its own, of which only the newest is kept.

    Args:
        folder: The folder for all trainings.
        name: The fingerprint of this one.
        accelerator: What holds optimizer, random numbers and, where they are divided, weights.
    """

    def __init__(self, folder: str, name: str, accelerator: Accelerator) -> None:
        self._folder, self._accelerator = Path(folder) / name, accelerator
        if accelerator.is_main_process:
            with self._explained("cannot write checkpoints to"):
                self._folder.mkdir(parents=True, exist_ok=True)
        accelerator.wait_for_everyone()
        if not is_sharded(accelerator):
            # What trains is part of the state below; what does not is in the model's file already.
            accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
            accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def newest(self) -> int | None:
        """Return after how many steps the newest checkpoint was written, or None where there is none."""
        steps = [int(found[1]) for path in self._folder.glob("step-*") if (found := _STEP.fullmatch(path.name))]
        return max(steps, default=None)

    def save(self, step: int, state: Mapping[str, Any]) -> None:
        """Write a checkpoint; until it is on the disk whole, the one before stays.

        Args:
            step: Steps done.
            state: Plain values and tensors on the CPU, from the main process.

        Raises:
            PassError: It cannot be written.
        """
        target = self._folder / f"step-{step}"
        staged = target.with_name(target.name + _UNFINISHED)
        main = self._accelerator.is_main_process
        with self._explained("cannot write a checkpoint to"):
            if main:
                shutil.rmtree(staged, ignore_errors=True)
                staged.mkdir(parents=True)
            self._accelerator.wait_for_everyone()
            self._accelerator.save_state(str(staged))
            if main:
                torch.save(dict(state), staged / _STATE)
            self._accelerator.wait_for_everyone()
            if main:
                _sync(staged)
                if target.exists():
                    shutil.rmtree(target)
                os.replace(staged, target)
                self._remove_all_but(target)
        self._accelerator.wait_for_everyone()

    def load(self, step: int) -> dict[str, Any]:
        """Take up optimizer and random numbers of a checkpoint, and return the state saved with it.

        Raises:
            PassError: It cannot be read.
        """
        folder = self._folder / f"step-{step}"
        with self._explained("cannot go on from the checkpoint in"):
            state: dict[str, Any] = torch.load(folder / _STATE, map_location="cpu", weights_only=True)
            self._accelerator.load_state(str(folder))
        return state

    def _remove_all_but(self, kept: Path) -> None:
        for path in self._folder.glob("step-*"):
            if path != kept:
                shutil.rmtree(path, ignore_errors=True)

    @contextlib.contextmanager
    def _explained(self, what: str) -> Iterator[None]:
        try:
            yield
        # Accelerate, safetensors and pickle have errors of their own.
        except Exception as error:
            raise PassError(
                f"pass `recover`: {what} `{self._folder}`: {in_words(error)}",
                hint="see that the folder can be written and has room; delete what is broken in it",
            ) from error


def _sync(folder: Path) -> None:
    """Make sure that files are on the disk before they get their name."""
    for path in (*folder.rglob("*"), folder):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
