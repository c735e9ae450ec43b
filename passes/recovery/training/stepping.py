"""Single steps of a training: a batch divided among processes and in time, its loss, its gradient."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import fx, nn

from graphopt.backend import Array
from graphopt.errors import PassError

from ..settings import Training
from .acceleration import is_sharded, summed, tell_of_unused, whole
from .lowered_values import TeacherValues, values_of
from .optimizers import Trained, make_optimizer
from .parts import Objective, ParameterGroup, Proximal
from .samples import Outputs, Samples, TrainingBatch
from .schedules import rate_factor

# An objective that wants to see batches first is shown so many samples: enough for averages.
PREPARATION_ROWS = 256
_DIVERGED = "pass `recover`: training diverged:"
_AGAINST_DIVERGENCE = (
    "a smaller `rate`, a longer `warmup`, or `clip`; instead of fp16, bf16; if at once, look at the data"
)


class _Loss(nn.Module):
    """Model and objective as one module, which is what Accelerate wraps: the loss of a batch is what it returns."""

    def __init__(self, module: fx.GraphModule, objective: Objective) -> None:
        super().__init__()
        self.module = module
        self._objective = objective

    def forward(self, batch: TrainingBatch, teacher: Outputs | None) -> dict[str, Any]:
        """Return the terms of the loss of a batch: their sums, and what each counts for."""
        student = values_of(self.module, batch)
        with torch.autocast(_device_of(batch).type, enabled=False):
            losses = self._objective(student, teacher, batch)
        return {"totals": dict(losses.totals), "weights": dict(losses.weights)}


def _device_of(batch: TrainingBatch) -> torch.device:
    found = (feed.device for feed in batch.feeds.values() if isinstance(feed, torch.Tensor))
    return next(found, torch.device("cpu"))


@dataclass(frozen=True)
class Figures:
    """The loss over some samples, the same on every process.

    Attributes:
        loss: The weighted sum of its terms.
        terms: Each by itself, unweighted.
        stop: Whether the main process asked for an end.
    """

    loss: float
    terms: Mapping[str, float]
    stop: bool = False


@dataclass(frozen=True)
class _Share:
    """What one process has in memory at once.

    Attributes:
        batch: The samples.
        is_real: Whether they count; where not, they only keep step with processes that have one share more.
    """

    batch: TrainingBatch
    is_real: bool


class _Sums:
    """Sums and counts of terms over what this process has run, which go to the others in one message."""

    def __init__(self) -> None:
        self._totals: dict[str, Any] = {}
        self._counts: dict[str, float] = {}
        self._weights: dict[str, float] = {}

    def add(self, terms: Mapping[str, Any], counts: Mapping[str, float], is_real: bool) -> None:
        """Add the terms of a share; of one that does not count, the names alone."""
        self._weights.update(terms["weights"])
        for name, total in terms["totals"].items():
            self._totals[name] = self._totals.get(name, 0.0) + (total.detach().double() if is_real else 0.0)
            self._counts[name] = self._counts.get(name, 0.0) + (counts[name] if is_real else 0.0)

    def figures(self, accelerator: Accelerator, stop: bool = False) -> Figures:
        """Return the loss over what all processes have run."""
        names = list(self._totals)
        mine = {f"total {name}": float(self._totals[name]) for name in names}
        mine |= {f"count {name}": self._counts[name] for name in names}
        everywhere = summed(accelerator, {**mine, "stop": float(stop)})
        terms = {
            name: everywhere[f"total {name}"] / everywhere[f"count {name}"] if everywhere[f"count {name}"] else 0.0
            for name in names
        }
        loss = sum(self._weights[name] * term for name, term in terms.items())
        return Figures(loss, terms, everywhere["stop"] > 0)


class Stepper:
    """A model, its optimizer and its objective, ready for steps.

    Args:
        module: What is trained, in place.
        teacher: What the objective compares with, or None.
        objective: What is made small.
        samples: What is learnt from.
        pool: Samples that are trained on: int64 [samples].
        settings: How training goes.
        steps: How many steps it has.
        groups: What is trained.
        proximal: What shrinks weights after each step, or None.
        accelerator: Where it runs.

    Raises:
        PassError: What is asked for cannot be done with weights that are divided among processes.
    """

    def __init__(
        self,
        module: fx.GraphModule,
        teacher: fx.GraphModule | None,
        objective: Objective,
        samples: Samples,
        pool: Array,
        settings: Training,
        steps: int,
        groups: Sequence[ParameterGroup],
        proximal: Proximal | None,
        accelerator: Accelerator,
    ) -> None:
        self._module, self._teacher, self._objective = module, teacher, objective
        self._samples, self._pool, self._settings = samples, pool, settings
        self._proximal, self._accelerator = proximal, accelerator
        self._sharded = is_sharded(accelerator)
        if self._sharded and proximal is not None:
            raise PassError(
                "pass `recover`: `l1` and `group_lasso` need whole weights on each process",
                hint="leave out `sharding=fsdp`",
            )
        # Sharding puts other tensors in the place of parameters, which others hold on to: a copy is trained instead.
        subject = _without_scalars(copy.deepcopy(module)) if self._sharded else module
        subject.to(accelerator.device)
        self._teaching = None
        if teacher is not None:
            teacher.requires_grad_(False).to(accelerator.device)
            self._teaching = TeacherValues(teacher, samples, self._at_most, accelerator)
        if objective.needs_preparation:
            objective.prepare(self._first_values(subject))
        self._factor = rate_factor(settings, steps)
        self._wrap(subject, groups)

    def _wrap(self, subject: fx.GraphModule, groups: Sequence[ParameterGroup]) -> None:
        loss = _Loss(subject, self._objective)
        if self._accelerator.num_processes > 1:
            _leave_alone(loss)
            may_miss_some = has_branches(subject) or bool(self._unreached(loss))
            tell_of_unused(self._accelerator, may_miss_some)
        optimizer = make_optimizer(self._settings, _trained(self._module, subject, groups))
        self._base_rates = [group["lr"] for group in optimizer.param_groups]
        self._model, self._optimizer = self._accelerator.prepare(loss, optimizer)
        plain = self._accelerator.unwrap_model(self._model).module
        self._tensors = {path: tensor for path, tensor in plain.named_parameters() if tensor.requires_grad}

    def run_teacher(self, rows: Array) -> None:
        """Run the teacher over all samples of a training ahead of it, if that saves time and takes no memory."""
        if self._teaching is not None:
            self._teaching.keep(rows)

    def step(self, step: int, rows: Array, epochs: Array, *, stop: bool = False) -> Figures:
        """Take a step of the optimizer, and return the loss before it.

        Args:
            step: Which one it is, from 0 on.
            rows: The samples of all processes.
            epochs: For each, how often all samples have been seen before.
            stop: Whether this process, if it is the main one, asks for an end.

        Raises:
            PassError: The loss is NaN or infinite, or depends on nothing that is trained.
        """
        processes = self._accelerator.num_processes
        shares, sums = self._shares_of_step(rows, epochs), _Sums()
        counts = self._counted(shares)
        self._set_rate(step)
        self._optimizer.zero_grad()
        for index, share in enumerate(shares):
            is_last = index == len(shares) - 1
            with contextlib.nullcontext() if is_last else self._accelerator.no_sync(self._model):
                terms = self._run(share)
                sums.add(terms, self._objective.counts(share.batch), share.is_real)
                # Gradients are averaged over processes, and sums were asked for.
                scale = float(processes) if share.is_real else 0.0
                self._accelerator.backward(_weighted(terms, counts) * scale)
        figures = sums.figures(self._accelerator, stop)
        _refuse_divergence(figures, step)
        if self._settings.clip is not None:
            self._accelerator.clip_grad_norm_(self._model.parameters(), self._settings.clip)
        self._optimizer.step()
        if self._proximal is not None:
            self._proximal.apply(self.rate(step))
        return figures

    def measure(self, step: int, rows: Array) -> Figures:
        """Return the loss over samples without learning from them.

        Raises:
            PassError: It is NaN or infinite.
        """
        processes, own = self._accelerator.num_processes, self._accelerator.process_index
        parts = self._samples.divide(rows, self._at_most)
        turns = -(-len(parts) // processes)
        sums = _Sums()
        with torch.no_grad():
            for turn in range(turns):
                index = turn * processes + own
                share = self._share(parts[min(index, len(parts) - 1)], None, index < len(parts))
                sums.add(self._run(share), self._objective.counts(share.batch), share.is_real)
        figures = sums.figures(self._accelerator)
        _refuse_divergence(figures, step)
        return figures

    def rate(self, step: int) -> float:
        """Return the learning rate of a step."""
        return self._settings.rate * self._factor(step)

    def weights(self) -> dict[str, torch.Tensor]:
        """Return copies of all that is trained, on the CPU; where it is divided among processes, each has all of it."""
        return {path: whole(tensor) for path, tensor in self._tensors.items()}

    def load(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Put weights into the module."""
        with torch.no_grad():
            for path, tensor in weights.items():
                self._module.get_parameter(path).copy_(tensor)

    def close(self) -> None:
        """Take the modules back to the CPU."""
        for parameter in self._tensors.values():
            parameter.grad = None
        self._module.to("cpu")
        if self._teacher is not None:
            self._teacher.to("cpu")

    @property
    def _at_most(self) -> int:
        return self._settings.micro_batch or -(-self._settings.batch // self._accelerator.num_processes)

    def _set_rate(self, step: int) -> None:
        for group, base in zip(self._optimizer.param_groups, self._base_rates, strict=True):
            group["lr"] = base * self._factor(step)

    def _shares_of_step(self, rows: Array, epochs: Array) -> list[_Share]:
        """Return what this process has of a batch; as many shares on each process, as all of them go in step."""
        processes, own = self._accelerator.num_processes, self._accelerator.process_index
        shared = zip(np.array_split(rows, processes), np.array_split(epochs, processes), strict=True)
        divided = [self._divided(*part) for part in shared]
        mine = [self._share(part, epoch, True) for part, epoch in divided[own]]
        missing = max(map(len, divided)) - len(mine)
        part, epoch = divided[0][0]
        return mine + [self._share(part, epoch, False) for _ in range(missing)]

    def _divided(self, rows: Array, epochs: Array) -> list[tuple[Array, int]]:
        """Return parts that fit into memory, each of one epoch."""
        return [
            (part, int(epoch))
            for epoch in np.unique(epochs)
            for part in self._samples.divide(rows[epochs == epoch], self._at_most)
        ]

    def _share(self, rows: Array, epoch: int | None, is_real: bool) -> _Share:
        return _Share(self._samples.batch(rows, epoch, self._pool), is_real)

    def _run(self, share: _Share) -> dict[str, Any]:
        """Return the terms of the loss of a share."""
        batch = share.batch.to(self._accelerator.device)
        terms: dict[str, Any] = self._model(batch, self._teacher_values(batch))
        return terms

    def _counted(self, shares: Sequence[_Share]) -> dict[str, float]:
        """Return the counts of what all processes have, before any of it is run."""
        counts: dict[str, float] = {}
        for share in shares:
            for name, count in self._objective.counts(share.batch).items():
                counts[name] = counts.get(name, 0.0) + (float(count) if share.is_real else 0.0)
        return summed(self._accelerator, counts)

    def _teacher_values(self, batch: TrainingBatch) -> dict[str, torch.Tensor] | None:
        return None if self._teaching is None else self._teaching.of(batch)

    def _unreached(self, loss: _Loss) -> set[str]:
        """Return what is trained and has no gradient, as seen on one sample."""
        batch = self._samples.batch(self._pool[:1], None, self._pool).to(self._accelerator.device)
        terms = loss(batch, self._teacher_values(batch))
        reached = _leaves(terms["totals"].values())
        return {path for path, tensor in loss.named_parameters() if tensor.requires_grad and id(tensor) not in reached}

    def _first_values(self, subject: fx.GraphModule) -> Iterator[tuple[Outputs, Outputs | None, TrainingBatch]]:
        for part in self._samples.divide(self._pool[:PREPARATION_ROWS], self._at_most):
            batch = self._samples.batch(part, None, self._pool).to(self._accelerator.device)
            with torch.no_grad(), self._accelerator.autocast():
                student = values_of(subject, batch)
            yield student, self._teacher_values(batch), batch


def _without_scalars(module: fx.GraphModule) -> fx.GraphModule:
    """Turn parameters of no dimension, which cannot be divided among processes, into buffers.

    Raises:
        PassError: One is trained.
    """
    for path, tensor in list(module.named_parameters()):
        if tensor.ndim:
            continue
        if tensor.requires_grad:
            raise PassError(
                f"pass `recover`: `{path}` is a single number, which `sharding=fsdp` cannot divide",
                hint="leave out `sharding`, or what makes it train (`train`)",
            )
        holder, _, name = path.rpartition(".")
        delattr(module.get_submodule(holder), name)
        module.get_submodule(holder).register_buffer(name, tensor.detach())
    return module


def _trained(module: fx.GraphModule, subject: fx.GraphModule, groups: Sequence[ParameterGroup]) -> list[Trained]:
    """Return what is trained, group by group, as parameters of the module or of its copy."""
    path_of = {id(tensor): path for path, tensor in module.named_parameters()}
    found = []
    for group in groups:
        paths = [path_of[id(tensor)] for tensor in group.tensors]
        tensors = {path: subject.get_parameter(path) for path in paths}
        found.append(Trained(group.name, tensors, group.rate, group.decay))
    return found


def has_branches(module: fx.GraphModule) -> bool:
    """Return whether a lowered model has nested graphs, of which a batch may run some and not others."""
    return any(isinstance(part, fx.GraphModule) for part in module.modules() if part is not module)


def _leaves(results: Iterable[torch.Tensor]) -> set[int]:
    """Return the identities of all parameters that results have a gradient for."""
    waiting: list[Any] = [result.grad_fn for result in results if result.grad_fn is not None]
    seen, found = set(waiting), set()
    while waiting:
        node = waiting.pop()
        found.add(id(getattr(node, "variable", None)))
        fresh = {before for before, _ in node.next_functions if before is not None} - seen
        seen |= fresh
        waiting.extend(fresh)
    return found


def _leave_alone(loss: nn.Module) -> None:
    """Keep data parallelism from what does not train: each process has read it, and it may lie in a mapped file."""
    frozen = [name for name, tensor in loss.named_parameters() if not tensor.requires_grad]
    frozen += [name for name, _ in loss.named_buffers()]
    ignore: Any = nn.parallel.DistributedDataParallel._set_params_and_buffers_to_ignore_for_model
    ignore(loss, frozen)


def _weighted(terms: Mapping[str, Any], counts: Mapping[str, float]) -> torch.Tensor:
    parts = [terms["weights"][name] * total / counts[name] for name, total in terms["totals"].items() if counts[name]]
    # Of a batch in which nothing counts, as one of padding alone, there is nothing to learn.
    loss: torch.Tensor = sum(parts) if parts else 0.0 * sum(terms["totals"].values())
    if not loss.requires_grad:
        raise PassError(
            "pass `recover`: the loss does not depend on anything that is trained",
            hint="`train`, `include` and `exclude` say what is; `graphopt inspect` shows which layers there are",
        )
    return loss


def _refuse_divergence(figures: Figures, step: int) -> None:
    if math.isfinite(figures.loss):
        return
    wrong = ", ".join(f"`{name}` {term}" for name, term in figures.terms.items() if not math.isfinite(term))
    raise PassError(f"{_DIVERGED} after {step} steps the loss is {figures.loss} ({wrong})", hint=_AGAINST_DIVERGENCE)


def refuse_diverged(weights: Mapping[str, torch.Tensor]) -> None:
    """Refuse weights that are to be kept and that no loss was computed with, if they are no numbers.

    Raises:
        PassError: They are NaN or infinite.
    """
    wrong = [path for path, tensor in weights.items() if not tensor.isfinite().all()]
    if wrong:
        raise PassError(f"{_DIVERGED} `{wrong[0]}` is NaN or infinite after the last step", hint=_AGAINST_DIVERGENCE)
