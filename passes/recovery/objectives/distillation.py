"""Distillation: the student's outputs drawn to the teacher's, on samples that need no labels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.data import Batch
from graphopt.errors import PassError
from graphopt.shapes import dims_of

from ..aim import Aim
from .scores import Scores, holds_classes, items_of, scores_of
from .terms import Items, Term, Values

if TYPE_CHECKING:
    from ..training.samples import TrainingBatch

# Keys and values that a decoder hands to its next step follow from what the step is trained on.
_PASSED_ON = ("present", "past_key_values", "new_key", "new_value")
# What a power is at least, so that an output that is always zero does not divide by it.
_SMALLEST_POWER = 1e-12


class SoftLabels(Term):
    """KL(teacher ‖ student) of an output's classes, both softened by a temperature T, times T².

    The factor keeps gradients as large as they are without it (Hinton et al., Distilling the Knowledge in a Neural
    Network, 2015, section 2).

    Args:
        student: Where the student's scores are read.
        teacher: Where the teacher's are.
        items: Rows, or tokens that are no padding.
        temperature: T.
        weight: Its share of the loss.
    """

    reads_teacher = True

    def __init__(self, student: Scores, teacher: Scores, items: Items, temperature: float, weight: float) -> None:
        self._mine, self._theirs, self._temperature = student, teacher, temperature
        self.name, self.subject = f"kl {student.output}", student.output
        self.measure = f"KL at temperature {temperature:g}"
        self.needs_preparation = not (student.is_known and teacher.is_known)
        self.items, self.weight = items, weight
        self.student, self.teacher = student.observed, teacher.observed

    def look(self, student: Values, teacher: Values, batch: TrainingBatch) -> None:
        """Find out whether scores are probabilities."""
        self._mine, self._theirs = self._mine.settled(student, batch), self._theirs.settled(teacher, batch)

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over items, in nats."""
        mine = torch.log_softmax(self._mine.logits(student) / self._temperature, dim=-1)
        theirs = torch.log_softmax(self._theirs.logits(teacher) / self._temperature, dim=-1)
        # A probability of zero, as of a logit of minus infinity, adds nothing.
        gaps = torch.where(theirs == -torch.inf, torch.zeros_like(mine), theirs - mine)
        return self.items.total((theirs.exp() * gaps).sum(dim=-1), batch) * self._temperature**2


class OutputError(Term):
    """Squared difference of an output to the teacher's, as a share of the mean square of the teacher's.

    Args:
        output: Name of the output.
        items: Rows, or tokens that are no padding.
        weight: Its share of the loss.
    """

    measure = "squared error"
    reads_teacher = True
    needs_preparation = True

    def __init__(self, output: str, items: Items, weight: float) -> None:
        self._output, self._power = output, Power()
        self.name, self.subject = f"mse {output}", output
        self.items, self.weight = items, weight

    def look(self, student: Values, teacher: Values, batch: TrainingBatch) -> None:
        """Measure the teacher's power."""
        self._power.add(self.items.counted(teacher[self._output], batch))

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over items of each item's mean."""
        errors = squared_error(student[self._output].float(), teacher[self._output].float())
        return self.items.total(errors, batch) / self._power.mean


def squared_error(mine: Tensor, theirs: Tensor) -> Tensor:
    """Return squared differences; none where the original's is not finite, such as minus infinity of a mask."""
    finite = theirs.isfinite()
    return (torch.where(finite, mine, 0.0) - torch.where(finite, theirs, 0.0)).square()


class Power:
    """The mean square of a value over the first samples, which errors are a share of."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    def add(self, values: Tensor) -> None:
        """Add values; those that are not finite, such as what a mask adds, are left out."""
        squares = values.double().square()
        squares = squares[squares.isfinite()]
        self._total += float(squares.sum())
        self._count += squares.numel()

    @property
    def mean(self) -> float:
        """The mean square; 1 of a value without elements, of which nothing can be wrong."""
        return max(self._total / self._count, _SMALLEST_POWER) if self._count else 1.0


def distillation_terms(aim: Aim, student: ir.Model, teacher: ir.Model, specimen: Batch, weight: float) -> list[Term]:
    """Return a term for each output of floats, which share the weight evenly.

    Args:
        aim: Distance and temperature.
        student: The model that is trained.
        teacher: The model it is to be like.
        specimen: Some samples.
        weight: The share of all of them of the loss.

    Raises:
        PassError: The models have other outputs, or none that can be compared.
    """
    theirs = {value.name: value for value in teacher.graph.outputs}
    chosen = compared_outputs(student.graph.outputs)
    for value in chosen:
        if value.name not in theirs:
            raise PassError(
                f"pass `recover`: the teacher has no output `{value.name}`",
                hint="give the model that the student was made of",
            )
    if not chosen:
        raise PassError(
            "pass `recover`: no output of floats to compare with the teacher's",
            hint="train the model as it is before an ArgMax or a Cast at its end, or by `features` with `distill=0`",
        )
    share = weight / len(chosen)
    return [_term(aim, student, value, teacher, theirs[value.name], specimen, share) for value in chosen]


def compared_outputs(outputs: Sequence[ir.Value]) -> list[ir.Value]:
    """Return the outputs that are compared with a teacher's: floats, if possible none that a decoder only passes on.

    An output that has no elements is not among them.
    """
    floats = [
        one
        for one in outputs
        if isinstance(one.type, ir.TensorType) and one.type.dtype.is_floating_point() and 0 not in (one.shape or ())
    ]
    return [one for one in floats if not (one.name or "").startswith(_PASSED_ON)] or floats


def _term(
    aim: Aim,
    student: ir.Model,
    mine: ir.Value,
    teacher: ir.Model,
    theirs: ir.Value,
    specimen: Batch,
    share: float,
) -> Term:
    _check_shapes(mine, theirs)
    items = items_of(student, mine)
    # The teacher decides: of the student, what comes before an output may have been changed.
    by_classes = aim.distance == "kl" or (aim.distance == "auto" and holds_classes(teacher, theirs, specimen))
    if by_classes and len(dims_of(mine) or (0, 0)) < 2:
        raise PassError(
            f"pass `recover`: `distance=kl` needs a score per class, and output `{mine.name}` has one number a sample",
            hint="`distance=mse`, or `auto`",
        )
    if by_classes:
        return SoftLabels(scores_of(student, mine), scores_of(teacher, theirs), items, aim.temperature, share)
    return OutputError(mine.name or "", items, share)


def _check_shapes(mine: ir.Value, theirs: ir.Value) -> None:
    first, second = dims_of(mine), dims_of(theirs)
    if first is None or second is None:
        return
    sizes = [pair for pair in zip(first, second, strict=False) if all(isinstance(dim, int) for dim in pair)]
    if len(first) != len(second) or any(x != y for x, y in sizes):
        one, other = ("×".join(map(str, dims)) for dims in (first, second))
        raise PassError(
            f"pass `recover`: output `{mine.name}` is {one}, and the teacher's is {other}",
            hint="give the model that the student was made of",
        )
