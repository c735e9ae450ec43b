"""What training makes small: the terms an aim asks for on a model, its teacher and its samples."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import onnx_ir as ir

from graphopt.data import Dataset
from graphopt.errors import PassError, UsageError

from ..aim import MIXING, SHARE_BESIDE_A_TASK, Aim
from .attention_transfer import attention_terms
from .augmentation import augmentation_of
from .distillation import distillation_terms
from .feature_matching import feature_terms
from .spans import spans_of
from .task_losses import task_of, task_term
from .terms import Losses, Term, Values

if TYPE_CHECKING:
    from torch import Tensor

    from ..training.samples import TrainingBatch


# Subjects of one measure that are named; a detector may have a dozen outputs.
_SHOWN = 3
_ROUNDING = 1e-9
# Labels of more axes, the samples' among them, say where in an image something is.
_MOST_LABEL_AXES = 2


class Objective:
    """A weighted sum of terms.

    Attributes:
        terms: What it is made of.
        student_values: Values of the student to observe besides its outputs.
        teacher_values: Values of the teacher to observe besides its outputs.
    """

    def __init__(self, terms: Iterable[Term]) -> None:
        self.terms = tuple(terms)
        self.student_values = tuple(dict.fromkeys(name for term in self.terms for name in term.student))
        self.teacher_values = tuple(dict.fromkeys(name for term in self.terms for name in term.teacher))

    @property
    def needs_teacher(self) -> bool:
        """Whether a teacher must be run beside the student."""
        return any(term.reads_teacher for term in self.terms)

    @property
    def needs_preparation(self) -> bool:
        """Whether `prepare` wants to see batches before the first step."""
        return any(term.needs_preparation for term in self.terms)

    def counts(self, batch: TrainingBatch) -> dict[str, float]:
        """Return what the sums over a batch are to be divided by, which depends on nothing but the batch."""
        return {term.name: term.count(batch) for term in self.terms}

    def __call__(self, student: Values, teacher: Values | None, batch: TrainingBatch) -> Losses:
        """Return the losses of a batch.

        Args:
            student: Outputs and observed values of the student, by name.
            teacher: Those of the teacher, or None where it is not read.
            batch: What both were run on.
        """
        totals: dict[str, Tensor] = {term.name: term.total(student, teacher or {}, batch) for term in self.terms}
        return Losses(totals, self.counts(batch), {term.name: term.weight for term in self.terms})

    def prepare(self, batches: Iterable[tuple[Any, Any, TrainingBatch]]) -> None:
        """Look at the first batches, the same on every process, before anything is trained.

        Args:
            batches: Values of the student as it begins, of the teacher or None, and what both were run on.
        """
        waiting = [term for term in self.terms if term.needs_preparation]
        for student, teacher, batch in batches:
            for term in waiting:
                term.look(student, teacher or {}, batch)
        for term in waiting:
            term.settle()

    def describe(self) -> str:
        """Return in one line what is minimised."""
        alike: dict[tuple[str, float], list[str]] = {}
        for term in self.terms:
            alike.setdefault((term.measure, term.weight), []).append(term.subject)
        return " + ".join(_part(measure, weight, subjects) for (measure, weight), subjects in alike.items())


def _part(measure: str, weight: float, subjects: Sequence[str]) -> str:
    """Return one part of a sum in words; terms that share a weight are named together."""
    whole = weight * len(subjects)
    shown = ", ".join(f"`{subject}`" for subject in subjects[:_SHOWN])
    rest = f" and {len(subjects) - _SHOWN} more" if len(subjects) > _SHOWN else ""
    return ("" if abs(whole - 1) < _ROUNDING else f"{whole:.3g} × ") + f"{measure} of {shown}{rest}"


def choose(aim: Aim, model: ir.Model, teacher: ir.Model | None, data: Dataset) -> Objective:
    """Return what is to be minimised: what was asked for, or else what can be.

    With a teacher that is the distance to its outputs; without one, the task that the labels are for. Reconstruction
    has objectives of its own, one for each part.

    Args:
        aim: What was asked for.
        model: The model that is trained.
        teacher: What it is to be like, or None.
        data: The samples.

    Raises:
        UsageError: What was asked for needs a teacher.
        PassError: The models do not suit it.
        DataError: The samples do not.
    """
    aim.check_aim()
    _check_teacher(aim, teacher)
    if teacher is not None and aim.reconstruct != "no":
        spans_of(model, teacher, aim.reconstruct)  # refuses models that have none
        return Objective([])
    augmentation_of(aim.augment, model)
    task, share = _task(aim, model, teacher, data)
    _check_augmentation(aim, task, data)
    terms: list[Term] = []
    if task is not None and share < 1:
        terms.append(task_term(task, model, data, 1 - share))
    if teacher is not None:
        specimen = next(iter(data.take(1).batches(1)))
        if share > 0:
            terms += distillation_terms(aim, model, teacher, specimen, share)
        if aim.features > 0:
            terms += feature_terms(model, teacher, aim.features)
        if aim.attention > 0:
            terms += attention_terms(model, teacher, aim.attention)
    if not terms:
        raise UsageError(
            "pass `recover`: nothing is minimised", hint="`distill` above 0, a `task`, or `features` or `attention`"
        )
    return Objective(terms)


def _check_teacher(aim: Aim, teacher: ir.Model | None) -> None:
    if teacher is not None:
        return
    wants = {
        "distill": bool(aim.distill),
        "features": aim.features > 0,
        "attention": aim.attention > 0,
        f"reconstruct={aim.reconstruct}": aim.reconstruct != "no",
        "task=none": aim.task == "none",
    }
    for option, is_set in wants.items():
        if is_set:
            raise UsageError(
                f"pass `recover`: `{option}` needs a teacher",
                hint="`--teacher MODEL`; in a pipeline, the original once a lossy pass ran before: `prune,recover`",
            )


def _check_augmentation(aim: Aim, task: str | None, data: Dataset) -> None:
    if task is None or not aim.augment:
        return
    mixing = [name for name in aim.augment if name in MIXING]
    if mixing:
        raise UsageError(
            f"pass `recover`: `augment={mixing[0]}` makes one image of two, which task `{task}` has no label for",
            hint="a teacher, and `task=none`",
        )
    labels = next(iter(data.take(1).batches(1))).labels
    if labels is not None and labels.ndim > _MOST_LABEL_AXES:
        raise UsageError(
            f"pass `recover`: `augment={aim.augment[0]}` moves images, and labels of {list(labels.shape[1:])} a sample "
            "would stay where they are",
            hint="a teacher, and `task=none`; or leave out `augment`",
        )


def _task(aim: Aim, model: ir.Model, teacher: ir.Model | None, data: Dataset) -> tuple[str | None, float]:
    """Return the task, or None, and the share of the loss that is distillation."""
    if aim.task not in ("auto", "none"):
        default = 0.0 if teacher is None else SHARE_BESIDE_A_TASK
        return aim.task, default if aim.distill is None else aim.distill
    if teacher is not None and (aim.task == "none" or aim.distill in (None, 1.0)):
        return None, 1.0 if aim.distill is None else aim.distill
    found = task_of(model, data) if aim.task == "auto" else None
    if found is None and aim.distill == 0.0 and (aim.features > 0 or aim.attention > 0):
        return None, 0.0
    if found is None:
        raise PassError(
            "pass `recover` has nothing to train on: no teacher, and no labels"
            if teacher is None
            else f"pass `recover`: `distill={aim.distill:g}` leaves room for a task, and the samples have no labels",
            hint="give a teacher with `--teacher`, samples with labels, or token ids and `task=next-token`",
        )
    return found, 0.0 if teacher is None else (aim.distill or 0.0)
