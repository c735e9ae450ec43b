"""Reconstruction: a model trained piece by piece, first to last, each on what the original's piece gives there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir
import torch
from torch import Tensor, fx

from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.choices import lowering_backend
from graphopt.data import Chunk, Dataset
from graphopt.metrics import show_number
from graphopt.reporting.rows import counted

from ..constraints.constrained import Constrained, constrain
from ..training.curve import Curve
from ..training.fingerprints import digest
from ..training.samples import StoredSamples, TrainingBatch
from .distillation import Power, squared_error
from .module_pieces import Piece
from .objective import Objective
from .scores import items_of
from .spans import Side, Stage, spans_of, stages_of
from .terms import Items, Term, Values

if TYPE_CHECKING:
    from ..recover import Recover

# Under this name a piece's samples hold what its outputs are to be; no value of a model has a name with a space first.
_TARGET = " target "
# How far a value of a sample by itself may be from that among others: codes may be the next ones, samples differ more.
_ALIKE = 0.1


class PieceError(Term):
    """Squared difference of what a piece gives to what the original's gave, as a share of the latter's mean square.

    Args:
        output: Name of the student's value.
        target: Where the samples have the original's.
        items: Rows, or tokens that are no padding.
        weight: Its share of the loss.
    """

    measure = "squared error"
    needs_preparation = True

    def __init__(self, output: str, target: str, items: Items, weight: float) -> None:
        self.name, self.subject, self.items, self.weight = output, output, items, weight
        self._target, self._power = target, Power()

    def look(self, student: Values, teacher: Values, batch: TrainingBatch) -> None:
        """Measure the power of what is to be given."""
        self._power.add(self.items.counted(batch.feeds[self._target], batch))

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over items of each item's mean."""
        errors = squared_error(student[self.name].float(), batch.feeds[self._target].float())
        return self.items.total(errors, batch) / self._power.mean


def _part_of(constrained: Constrained, module: fx.GraphModule, settled: set[int]) -> Constrained:
    """Return what a piece trains of what may be trained; what an earlier one trained is settled."""
    own = {id(tensor) for tensor in module.parameters()} - settled
    kept = [one for one in constrained.kept if {id(tensor) for tensor in one.parameters().values()} <= own]
    return replace(constrained, kept=kept)


class _Walk:
    """The way of the samples through two models, piece by piece.

    Args:
        data: The samples.
        batch: How many are run at once.
        device: Where.
    """

    def __init__(self, data: Dataset, batch: int, device: str) -> None:
        self._data, self._batch, self._device = data, batch, torch.device(device)
        self._inputs = [spec.name for spec in data.specs]
        self._samples = StoredSamples(data)
        self._before: Stage | None = None

    def enter(self, stage: Stage) -> StoredSamples:
        """Return samples for a piece: its own inputs as the student is now, and what the original's piece gives."""
        parts = self._samples.divide(np.arange(len(self._samples)), self._batch)
        folded = self._folded(stage, max(parts, key=len))

        def chunks() -> Iterator[Chunk]:
            for part in parts:
                yield _chunk(self._values(stage, part), len(part), folded)

        own = Dataset(chunks, self._data.specs, self._data.name, len(self._samples), False)
        self._samples, self._before = _PieceSamples(own, folded or frozenset()), stage
        return self._samples

    def _values(self, stage: Stage, part: Array) -> dict[str, Any]:
        """Return what a piece reads of some samples, and what it is to give."""
        batch = self._samples.batch(part, None, part)
        inputs = {name: batch.feeds[name] for name in self._inputs}
        mine, theirs = dict(inputs), dict(inputs)
        if self._before is not None and stage.span.starts is not None:
            (end,) = self._run(self._before.mine, batch.feeds)
            mine[stage.span.starts[0]] = end
            theirs[stage.span.starts[1]] = batch.feeds[_TARGET + stage.span.starts[0]]
        targets = self._run(stage.theirs, theirs)
        named = zip(stage.span.ends, targets, strict=True)
        mine |= {_TARGET + name: target for (name, _), target in named}
        return {name: batch.real(value) for name, value in mine.items()}

    def _folded(self, stage: Stage, part: Array) -> frozenset[str] | None:
        """Return the names of values that have several rows for each sample; None where some have none for it."""
        if len(part) == 1:
            return frozenset()
        together, alone = self._values(stage, part), self._values(stage, part[:1])
        sizes = {name: (len(value), len(alone[name])) for name, value in together.items() if value.ndim}
        folded = frozenset(name for name, (all_rows, _) in sizes.items() if all_rows != len(part))
        if any(all_rows != own * len(part) for all_rows, own in sizes.values()):
            return None
        return folded if all(_is_alike(alone[name], together[name]) for name in folded) else None

    @torch.no_grad()
    def _run(self, piece: Piece, feeds: Mapping[str, Any]) -> tuple[Tensor, ...]:
        module = piece.module.to(self._device)
        given = (feeds[name] for name in piece.inputs)
        values = module(*(one.to(self._device) if isinstance(one, Tensor) else one for one in given))
        return tuple(value.cpu() for value in values)


class _PieceSamples(StoredSamples):
    """Samples of a piece.

    Args:
        data: The samples.
        folded: Values whose rows for a sample are kept together, and that models take one behind the other.
    """

    def __init__(self, data: Dataset, folded: frozenset[str]) -> None:
        super().__init__(data)
        self._names = folded

    def batch(self, rows: Array, epoch: int | None, pool: Array) -> TrainingBatch:
        """Return a batch of samples by index; see `Samples.batch`."""
        batch = super().batch(rows, epoch, pool)
        feeds = {name: feed.flatten(0, 1) if name in self._names else feed for name, feed in batch.feeds.items()}
        return replace(batch, feeds=feeds)


def _is_alike(alone: Tensor, together: Tensor) -> bool:
    """Return whether the rows of the first sample come first, and not the first row of each sample."""
    wanted = together[: len(alone)].double()
    return bool((alone.double() - wanted).abs().mean() <= _ALIKE * wanted.abs().mean())


def _chunk(feeds: Mapping[str, Any], count: int, folded: frozenset[str] | None) -> Chunk:
    """Return values as samples; as one that cannot be divided where not all have samples in their first axis."""
    arrays = {name: _array(value) for name, value in feeds.items()}
    if folded is None:
        return Chunk(arrays, None, 1, divisible=False)
    for name in folded:
        arrays[name] = arrays[name].reshape(count, len(arrays[name]) // count, *arrays[name].shape[1:])
    divisible = all(len(array) == count for array in arrays.values() if array.ndim)
    return Chunk(arrays, None, count if divisible else 1, divisible)


def _array(value: Any) -> Array:
    if not isinstance(value, Tensor):
        return np.asarray(value)
    if value.dtype == torch.bfloat16:
        bits: Array = value.contiguous().view(torch.int16).numpy().view(ir.DataType.BFLOAT16.numpy())
        return bits
    plain: Array = value.contiguous().numpy()
    return plain


def _identity(data: Dataset, student: fx.GraphModule, teacher: fx.GraphModule) -> dict[str, str]:
    """Return what a piece's samples are made of: data, the student as it is by now, and the original."""
    return {"data": data.fingerprint(), "before": digest(student), "original": digest(teacher)}


def reconstruct(model: ir.Model, ctx: Context, options: Recover) -> list[Curve]:
    """Train a model piece by piece, and write its weights back.

    Each piece is trained on what it is given by the pieces before it, trained already, and is to give what the
    original's gives on the original's own values: so it makes up for what those before it could not (Li et al., BRECQ:
    Pushing the Limit of Post-Training Quantization by Block Reconstruction, 2021; of single layers, as Nagel et al., Up
    or Down?, 2020). No labels are read, and no more than one piece's values of all samples are kept.

    Args:
        model: The model, changed through ``ctx.rewriter``.
        ctx: With the original, and samples.
        options: How each piece is trained; `minutes` are divided among them.

    Returns:
        How each training went.

    Raises:
        PassError: The models have no part in common but the whole, or no part of it trains.
    """
    from ..recovery_run import device_of, fit, write_back

    assert ctx.standard is not None, "the objective was chosen with a teacher"
    assert ctx.data is not None, "the pass declares that it needs data"
    device = device_of(options.device)
    backend = lowering_backend(device)
    spans = spans_of(model, ctx.standard, options.reconstruct)
    student, teacher = backend.lower(model, differentiable=True), backend.lower(ctx.standard, differentiable=False)
    constrained = constrain(student, model, options)
    stages = stages_of(spans, Side(model, student, 0), Side(ctx.standard, teacher, 1))
    if options.minutes is not None:
        options = replace(options, minutes=options.minutes / len(stages))
    walk, settled, curves = _Walk(ctx.data, options.micro_batch or options.batch, device), set[int](), []
    ends = {name for stage in stages for name, _ in stage.span.ends}
    items = {value.name: items_of(model, value) for node in model.graph for value in node.outputs if value.name in ends}
    for index, stage in enumerate(stages):
        samples = walk.enter(stage)
        part = _part_of(constrained, stage.mine.module, settled)
        if not part.parameters() or _is_reached(stage.mine, samples, options.batch):
            continue
        share = 1 / len(stage.span.ends)
        objective = Objective(PieceError(name, _TARGET + name, items[name], share) for name, _ in stage.span.ends)
        identity = _identity(ctx.data, student, teacher) if options.checkpoints is not None else None
        curve = fit(stage.mine.module, objective, samples, options, ctx, part, identity=identity, device=device)
        settled |= {id(tensor) for one in part.kept for tensor in one.parameters().values()}
        curves.append(curve)
        text = f"part {index + 1} of {len(stages)}, up to {stage.span.name}"
        if curve.first is not None and curve.best is not None:
            text += f": squared error {show_number(curve.first)} → {show_number(curve.best)}"
        ctx.note(f"{text}, in {counted(curve.steps, 'step')}", loss_curve=curve.as_dict())
    if len(curves) < len(stages):
        ctx.left(f"parts left as they are, for they have no error, or nothing to train: {len(stages) - len(curves)}")
    student.to("cpu")
    written = write_back(model, ctx, constrained)
    ctx.note(f"reconstructed {counted(len(curves), 'part')}, {options.reconstruct} of the original", constants=written)
    for line in constrained.describe():
        ctx.note(line)
    return curves


@torch.no_grad()
def _is_reached(piece: Piece, samples: StoredSamples, at_most: int) -> bool:
    """Return whether a piece gives to the bit what it is to give, by the first samples."""
    rows = np.arange(len(samples))
    part = samples.divide(rows[:at_most], at_most)[0]
    batch = samples.batch(part, None, rows)
    values = piece.module.to("cpu")(*(batch.feeds[name] for name in piece.inputs))
    pairs = zip(piece.outputs, values, strict=True)
    return all(torch.equal(value, batch.feeds[_TARGET + name]) for name, value in pairs)
