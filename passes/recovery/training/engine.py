"""The training engine: a lowered model trained by Hugging Face Accelerate, from the first step to the last."""

from __future__ import annotations

import contextlib
import math
import random
import time
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import fx

from graphopt.data import Dataset
from graphopt.errors import BackendError, PassError, one_line
from graphopt.progress import Display

from ..settings import Training
from .acceleration import accelerating, refuse_differences
from .checkpoints import Checkpoints
from .curve import Curve, Look, Point
from .early_stopping import EarlyStopping
from .fingerprints import fingerprint
from .parts import Constraint, Objective, Proximal
from .samples import Augmenting, Order, Samples, StoredSamples, held_out_of
from .stepping import Stepper, refuse_diverged

_OUT_OF_TIME = "`minutes` are over"
_SECONDS_A_MINUTE = 60.0
# What an error says of whom a connection was to; it has no type of its own.
_CUT_OFF = ("Connection closed by peer", "Connection reset by peer")
# Epochs from which on it pays to keep what a teacher gives.
_WORTH_KEEPING = 2


def train(
    module: fx.GraphModule,
    objective: Objective,
    samples: Dataset | Samples,
    settings: Training,
    *,
    constrained: Constraint,
    teacher: fx.GraphModule | None = None,
    proximal: Proximal | None = None,
    augmentation: Augmenting | None = None,
    identity: Mapping[str, Any] | None = None,
    seed: int = 0,
    threads: int = 0,
    device: str = "cpu",
    display: Display | None = None,
) -> Curve:
    """Train parameters of a lowered model, in place.

    Under torchrun or `accelerate launch` every process calls this with the same arguments, and has the same weights
    when it returns. A batch is divided among them, and by `micro_batch`; sums and what they are divided by are kept
    apart, so what is minimised is the mean over the whole batch however it was divided.

    Args:
        module: What is trained, as `Differentiable.lower` gives it.
        objective: What is made small.
        samples: What is learnt from; with labels, where the objective reads them.
        settings: How training goes.
        constrained: Which parameters train; float32, in memory of their own.
        teacher: What the objective compares with, or None.
        proximal: What shrinks weights after each step, or None.
        augmentation: What changes the inputs of a data set before they are trained on, or None.
        identity: What the result depends on besides, as JSON values: checkpoints of another are not gone on with.
        seed: Seed of the order of samples, of what is held out, and of random operators.
        threads: Threads inside an operator; 0 leaves it to torch.
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        display: Where progress is shown, or None.

    Returns:
        How it went. The weights are the best ones on what is held out, or the last ones (`keep`).

    Raises:
        UsageError: The device cannot do what was asked for.
        BackendError: There is no such device, or a process that trains beside this one is gone.
        DataError: The samples are too few.
        PassError: The loss becomes NaN or infinite, does not depend on what is trained, or a checkpoint fails; there is
            no memory for a batch, or an operator cannot be computed.
    """
    settings.check_training()
    known: dict[str, Any] = {**(identity or {}), "seed": seed, "augmentation": repr(augmentation)}
    if isinstance(samples, Dataset):
        settings.check_data(samples)
        stored = StoredSamples(samples, augmentation, seed)
        if settings.checkpoints is not None:
            known |= {"data": samples.fingerprint(), "labels": stored.labels_digest()}
        samples = stored
    with _explained(), _threads(threads), _seeded(seed, device), accelerating(settings, device) as accelerator:
        run = _Run(module, teacher, objective, samples, settings, constrained, proximal, known, seed, accelerator)
        return run.train(display if accelerator.is_main_process else None)


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    """Say in graphopt's words what torch raises where it is nobody's mistake."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise PassError(
            f"pass `recover`: out of memory: {one_line(error)}",
            hint="a smaller `micro_batch`, `precision=bf16`, or `sharding=fsdp` on several GPUs",
        ) from error
    # What an operator raises where it has no function for what it is given.
    except NotImplementedError as error:
        raise PassError(
            f"pass `recover`: torch cannot train this model: {one_line(error)}",
            hint="`graphopt compare MODEL MODEL --backend torch` runs it there; docs/torch.md lists operators",
        ) from error
    except RuntimeError as error:
        if not isinstance(error, torch.distributed.DistError) and not any(sign in str(error) for sign in _CUT_OFF):
            raise
        raise BackendError(
            f"processes that train together lost each other: {one_line(error)}",
            hint="see what the others said before; with `checkpoints=FOLDER` the same command goes on from there",
        ) from error


@contextlib.contextmanager
def _threads(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    if threads:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _seeded(seed: int, device: str) -> Iterator[None]:
    """Seed torch's random numbers inside, and leave all those outside as they were; a checkpoint has Python's, too."""
    python, numpy = random.getstate(), np.random.get_state()
    devices = list(range(torch.cuda.device_count())) if device.startswith("cuda") else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


class _Run:
    """One training from its first step to its last."""

    def __init__(
        self,
        module: fx.GraphModule,
        teacher: fx.GraphModule | None,
        objective: Objective,
        samples: Samples,
        settings: Training,
        constrained: Constraint,
        proximal: Proximal | None,
        identity: dict[str, Any],
        seed: int,
        accelerator: Accelerator,
    ) -> None:
        held = settings.held_out_count(len(samples))
        pool, self._held = held_out_of(len(samples), held, seed)
        asked, settings = settings.batch, settings.fitted(len(pool))
        self._settings, self._main = settings, accelerator.is_main_process
        self._order = Order(pool, settings.batch, seed)
        self._steps = settings.step_count(len(pool))
        self._looks_every = settings.steps_between_looks(len(pool))
        self._stopping = EarlyStopping(settings.patience)
        # Each process has to run the teacher on all samples then, and would on its own share of them otherwise.
        often = self._steps * settings.batch >= _WORTH_KEEPING * accelerator.num_processes * len(pool)
        self._repeats = often and isinstance(samples, StoredSamples) and samples.never_change
        groups = [group for group in constrained.parameters() if group.tensors]
        if not groups:
            raise PassError(
                "pass `recover`: there is nothing to train", hint="`train`, `include` and `exclude` say what is trained"
            )
        self._curve = Curve(
            planned=self._steps,
            samples=len(pool),
            held_out=held,
            trained=sum(tensor.numel() for group in groups for tensor in group.tensors),
            processes=accelerator.num_processes,
            device="cpu" if accelerator.device.type == "cpu" else str(accelerator.device),
            precision=settings.precision,
        )
        if settings.batch < asked:
            self._curve.remarks.append(f"`batch={asked}` is more than there is: each step learns from all {len(pool)}")
        refuse_differences(accelerator, module)
        name = None
        if settings.checkpoints is not None:
            paths = sorted(path for path, tensor in module.named_parameters() if tensor.requires_grad)
            identity |= {"samples": len(samples), "processes": accelerator.num_processes, "trained": paths}
            name = fingerprint(settings, identity, {"student": module, "teacher": teacher})
        self._stepper = Stepper(
            module, teacher, objective, samples, pool, settings, self._steps, groups, proximal, accelerator
        )
        self._checkpoints = None
        if settings.checkpoints is not None and name is not None:
            self._checkpoints = Checkpoints(settings.checkpoints, name, accelerator)

    def train(self, display: Display | None) -> Curve:
        """Train, and return how it went."""
        try:
            done = self._resume()
            self._began = time.monotonic() - self._curve.seconds
            with contextlib.nullcontext() if display is None else display.stage("training", self._steps, "steps"):
                if self._repeats and done < self._steps and not self._curve.stopped:
                    self._stepper.run_teacher(np.concatenate([self._order.rows, self._held]))
                _show(display, done, None)
                self._go_on(done, display)
            self._keep()
        finally:
            self._stepper.close()
        return self._curve

    def _go_on(self, done: int, display: Display | None) -> None:
        """Take all steps that are left."""
        if not self._curve.looks:
            self._look(0)
        for step in range(done, self._steps):
            if self._curve.stopped:
                return
            self._step(step)
            is_last = step + 1 == self._steps or bool(self._curve.stopped)
            if is_last or (step + 1) % self._looks_every == 0:
                self._look(step + 1)
            if self._stopping.is_over and not self._curve.stopped:
                self._curve.stopped = f"no better loss in {self._stopping.waited} looks"
            self._save(step + 1, is_last or bool(self._curve.stopped))
            _show(display, 1, self._curve.points[-1].loss)

    def _step(self, step: int) -> None:
        began = time.monotonic()
        rows, epochs = self._order.step(step)
        figures = self._stepper.step(step, rows, epochs, stop=self._main and self._is_out_of_time())
        seen = (step + 1) * self._settings.batch / len(self._order.rows)
        self._curve.points.append(Point(step + 1, seen, self._stepper.rate(step), figures.loss, figures.terms))
        self._curve.step_times.append(time.monotonic() - began)
        self._curve.seconds = time.monotonic() - self._began
        if figures.stop:
            self._curve.stopped = _OUT_OF_TIME

    def _is_out_of_time(self) -> bool:
        return time.monotonic() - self._began > self._seconds_allowed()

    def _seconds_allowed(self) -> float:
        minutes = self._settings.minutes
        return math.inf if minutes is None else minutes * _SECONDS_A_MINUTE

    def _look(self, step: int) -> None:
        """Measure the loss on what is held out, and keep the weights if it is the best so far."""
        if not len(self._held):
            return
        figures = self._stepper.measure(step, self._held)
        self._curve.looks.append(Look(step, figures.loss, figures.terms))
        if self._stopping.improves(step, figures.loss) and self._settings.keep == "best":
            self._stopping.weights = self._stepper.weights()

    def _keep(self) -> None:
        """Put the weights in place that are to be kept."""
        self._curve.kept = self._curve.steps
        weights = self._stepper.weights()
        if self._settings.keep == "best" and self._stopping.weights:
            self._curve.kept, weights = self._stopping.step, self._stopping.weights
        refuse_diverged(weights)
        self._stepper.load(weights)
        if self._curve.kept == 0 and self._curve.steps:
            self._curve.remarks.append("no look was better than the one before training: weights are as they were")

    def _save(self, step: int, is_last: bool) -> None:
        every = self._settings.checkpoint_every or self._looks_every
        if self._checkpoints is None or not (is_last or step % every == 0):
            return
        self._curve.seconds = time.monotonic() - self._began
        state = {"curve": self._curve.state(), "stopping": self._stopping.state(), "weights": self._stepper.weights()}
        self._checkpoints.save(step, state)

    def _resume(self) -> int:
        """Go on from the newest checkpoint, and return after how many steps it was written; 0 without one."""
        step = self._checkpoints.newest() if self._checkpoints is not None else None
        if self._checkpoints is None or step is None:
            return 0
        state = self._checkpoints.load(step)
        self._curve.restore(state["curve"])
        self._stopping.restore(state["stopping"])
        self._stepper.load(state["weights"])
        self._curve.remarks.append(f"went on from the checkpoint of step {step} of {self._steps}")
        # By the time that was written down, which is the same on every process.
        if self._curve.stopped == _OUT_OF_TIME and self._curve.seconds <= self._seconds_allowed():
            self._curve.stopped = ""
        return step


def _show(display: Display | None, steps: int, loss: float | None) -> None:
    if display is None:
        return
    display.advance(steps, "steps")
    if loss is not None:
        display.describe(f"training, loss {loss:.4g}")
