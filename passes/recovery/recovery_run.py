"""One recovery, stage by stage: lowered, trained, checked, and the weights written back."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from torch import fx

from graphopt.authoring import Context
from graphopt.choices import lowering_backend
from graphopt.data import Dataset
from graphopt.errors import PassError
from graphopt.metrics import show_number
from graphopt.report import show_count
from graphopt.reporting.rows import counted
from graphopt.stored_weights import as_array, stored_tensor

from .constraints.constrained import Constrained, constrain
from .constraints.trainable import constants, refuse
from .objectives import objective as objectives
from .objectives.augmentation import Augmentation, augmentation_of
from .objectives.batch_statistics import updated_batch_norms
from .objectives.sparsity_penalty import penalty_of
from .objectives.task_losses import source_of
from .training.acceleration import refuse_device
from .training.curve import Curve
from .training.engine import train
from .training.parts import Objective, Proximal
from .training.samples import Samples

if TYPE_CHECKING:
    from .recover import Recover

RULE = "recover"
_MINUTE, _HOUR = 60, 3600


def device_of(text: str) -> str:
    """Return the device that is meant; ``auto`` is a GPU where there is one."""
    if text != "auto":
        return text
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_subject(options: Recover, model: ir.Model, teacher: ir.Model | None, data: Dataset) -> None:
    """Raise an error where a model cannot be trained with what there is; nothing is computed.

    Raises:
        GraphoptError: Samples, labels or a teacher are missing, or gradients.
    """
    device = device_of(options.device)
    refuse_device(options, device)
    lowering_backend(device)
    options.check_data(data)
    refuse(model, options)
    objectives.choose(options, model, teacher, data)


def recover(model: ir.Model, ctx: Context, options: Recover) -> None:
    """Train a model and write its weights back, all in one edit.

    Raises:
        GraphoptError: It cannot be trained, training diverges, or a constraint would be broken.
    """
    assert ctx.data is not None, "the pass declares that it needs data"
    check_subject(options, model, ctx.standard, ctx.data)
    # The edit is open while it trains: a run that ends before it does not train in vain.
    with ctx.rewriter.edit(RULE):
        if options.reconstruct != "no":
            from .objectives.reconstruction import reconstruct

            curves = reconstruct(model, ctx, options)
        else:
            curves = [_train_whole(model, ctx, options)]
    for remark in dict.fromkeys(remark for curve in curves for remark in curve.remarks):
        ctx.note(remark)


def _train_whole(model: ir.Model, ctx: Context, options: Recover) -> Curve:
    assert ctx.data is not None, "the pass declares that it needs data"
    device = device_of(options.device)
    backend = lowering_backend(device)
    objective = objectives.choose(options, model, ctx.standard, ctx.data)
    student = backend.lower(model, observe=objective.student_values, differentiable=True)
    teacher = None
    if objective.needs_teacher:
        assert ctx.standard is not None, "the objective was chosen with a teacher"
        teacher = backend.lower(ctx.standard, observe=objective.teacher_values, differentiable=False)
    constrained = constrain(student, model, options)
    if not constrained.parameters():
        raise PassError(
            f"pass `recover`: nothing of what was chosen can train: {'; '.join(constrained.left)}",
            hint="other `train=`, `include=` or `exclude=`",
        )
    penalty = penalty_of(options, model, constrained)
    if penalty is not None:
        # A penalty is no part of the loss, by which the best weights would be those with the fewest zeros.
        options = replace(options, keep="last")
    curve = fit(
        student,
        objective,
        ctx.data,
        options,
        ctx,
        constrained,
        teacher=teacher,
        proximal=penalty,
        augmentation=augmentation_of(options.augment, model),
        identity={"task": source_of(options.task)},
        device=device,
    )
    written = write_back(model, ctx, constrained)
    ctx.note(f"minimised: {objective.describe()}")
    note_outcome(ctx, curve, written, constrained)
    for line in constrained.describe():
        ctx.note(line)
    if penalty is not None:
        ctx.note(f"penalized: {penalty.describe()}; the last weights were kept")
    if options.batch_norm == "update":
        _update_batch_norms(model, ctx, student, options.batch, device)
    return curve


def _update_batch_norms(model: ir.Model, ctx: Context, student: fx.GraphModule, batch: int, device: str) -> None:
    """Write the statistics of batch normalizations, as they are behind trained layers."""
    assert ctx.data is not None, "the pass declares that it needs data"
    values, new = _constants_by_name(model), updated_batch_norms(student, ctx.data, batch, device)
    for name, tensor in new.items():
        dtype = values[name].dtype
        assert dtype is not None, "constants have a dtype"
        ctx.rewriter.set_weight(values[name], stored_tensor(values[name], as_array(tensor, dtype)))
    if new:
        ctx.note(f"statistics of batch normalizations taken anew: {len(new)} constants")
    else:
        ctx.left("no batch normalization is left to update: they are part of the layers before them")


def fit(
    student: fx.GraphModule,
    objective: Objective,
    samples: Dataset | Samples,
    options: Recover,
    ctx: Context,
    constrained: Constrained,
    *,
    teacher: fx.GraphModule | None = None,
    proximal: Proximal | None = None,
    augmentation: Augmentation | None = None,
    identity: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> Curve:
    """Train a lowered model, or a lowered part of one, as the options say."""
    return train(
        student,
        objective,
        samples,
        options,
        constrained=constrained,
        teacher=teacher,
        proximal=proximal,
        augmentation=augmentation,
        identity=identity,
        seed=ctx.seed,
        threads=ctx.threads,
        device=device,
        display=ctx.display,
    )


def note_outcome(ctx: Context, curve: Curve, written: int, constrained: Constrained) -> None:
    """Say what came of a training: how long it took, and how the loss went."""
    where = curve.device if curve.processes == 1 else f"{curve.processes} processes on {curve.device}"
    text = f"trained {show_count(curve.trained)} numbers for {counted(curve.steps, 'step')} on {where}"
    text += f" in {show_duration(curve.seconds)}, from {counted(curve.samples, 'sample')}"
    if curve.first is not None and curve.best is not None:
        on = f", on {counted(curve.held_out, 'sample')} held out" if curve.held_out else ""
        text += f": loss {show_number(curve.first)} → {show_number(curve.best)}{on}"
    if curve.kept and curve.kept != curve.steps:
        text += f"; the weights of step {curve.kept} were the best, and kept"
    if curve.stopped:
        text += f"; stopped early: {curve.stopped}"
    # As `graphopt.reporting.trainings` expects it, for charts.
    ctx.note(text, constants=written, held=constrained.facts(), loss_curve=curve.as_dict())
    if not written:
        ctx.left("training changed nothing: every weight is stored as it was")


def show_duration(seconds: float) -> str:
    """Return a time as people read it."""
    if seconds < _MINUTE:
        return f"{seconds:.1f} s"
    if seconds < _HOUR:
        return f"{seconds / _MINUTE:.1f} min"
    return f"{seconds / _HOUR:.1f} h"


def write_back(model: ir.Model, ctx: Context, constrained: Constrained) -> int:
    """Write what was trained into a model, once every constraint is known to hold; return how many constants changed.

    Raises:
        PassError: A constraint of an earlier pass is broken.
    """
    constrained.check()
    values = _constants_by_name(model)
    written = 0
    for name, array in constrained.stored():
        ctx.rewriter.set_weight(values[name], stored_tensor(values[name], array))
        written += 1
    return written


def _constants_by_name(model: ir.Model) -> dict[str, ir.Value]:
    return {name: value for value, name in constants(model).items()}
