"""Feature matching: what flows between the blocks of the student drawn to what flows there in the teacher."""

from __future__ import annotations

from typing import TYPE_CHECKING

import onnx_ir as ir
import torch
from torch import Tensor

from graphopt.errors import PassError

from .distillation import Power, squared_error
from .scores import items_of
from .terms import Items, Term, Values
from .value_pairs import pairs_at_blocks

if TYPE_CHECKING:
    from ..training.samples import TrainingBatch

# Vectors of one value that a linear map is fitted to, of each batch looked at: images have one at each pixel.
_VECTORS_A_BATCH = 8192
# How much of the mean square of a feature is added to that of each, so that a map of dead features is defined.
_RIDGE = 1e-3


class Features(Term):
    """Squared difference of a value to the teacher's, as a share of the mean square of the teacher's.

    Where channels were removed, the student's are taken through a linear map first, as by the regressors of FitNets
    (Romero et al., FitNets: Hints for Thin Deep Nets, 2015). Here that is fitted once, by least squares over the first
    samples, to the student as it begins, and then held: nothing more than the student is trained, and a loss is the
    same number in every step.

    Args:
        mine: Name of the student's value.
        theirs: Name of the teacher's.
        items: Rows, or tokens that are no padding.
        weight: Its weight in the loss.
    """

    measure = "squared error"
    reads_teacher = True
    needs_preparation = True

    def __init__(self, mine: str, theirs: str, items: Items, weight: float) -> None:
        self._mine, self._theirs, self._power = mine, theirs, Power()
        self.name, self.subject = f"features {theirs}", theirs
        self.items, self.weight = items, weight
        self.student, self.teacher = (mine,), (theirs,)
        self._map: _LinearMap | None = None

    def look(self, student: Values, teacher: Values, batch: TrainingBatch) -> None:
        """Measure the teacher's power, and what a linear map is to be fitted to.

        Raises:
            PassError: The shapes differ in more than the number of channels.
        """
        mine, theirs = (
            self.items.counted(values[name], batch) for values, name in ((student, self._mine), (teacher, self._theirs))
        )
        self._power.add(theirs)
        if self._map is None and mine.shape != theirs.shape:
            self._map = _LinearMap(self._axis(mine, theirs))
        if self._map is not None:
            self._map.look(mine, theirs)

    def settle(self) -> None:
        """Fit the linear map."""
        if self._map is not None:
            self._map.settle()

    def total(self, student: Values, teacher: Values, batch: TrainingBatch) -> Tensor:
        """Return the sum over items of each item's mean."""
        mine, theirs = student[self._mine].float(), teacher[self._theirs].float()
        if self._map is not None:
            mine = self._map(mine)
        return self.items.total(squared_error(mine, theirs), batch) / self._power.mean

    def _axis(self, mine: Tensor, theirs: Tensor) -> int:
        pairs = zip(mine.shape, theirs.shape, strict=False)
        differing = [axis for axis, (x, y) in enumerate(pairs) if x != y]
        if mine.ndim != theirs.ndim or len(differing) != 1 or differing[0] == 0:
            raise PassError(
                f"pass `recover`: `{self._mine}` is {list(mine.shape)}, and the teacher's `{self._theirs}` "
                f"{list(theirs.shape)}",
                hint="only the number of channels may differ; leave out `features`",
            )
        return differing[0]


class _LinearMap:
    """An affine map from one number of channels to another, by least squares.

    Args:
        axis: The axis of channels.
    """

    def __init__(self, axis: int) -> None:
        self._axis = axis
        self._squares: Tensor | None = None
        self._products: Tensor | None = None
        self._matrix: Tensor | None = None

    def look(self, mine: Tensor, theirs: Tensor) -> None:
        """Add vectors of both sides, [..., channels, ...]."""
        x, y = self._vectors(mine), self._vectors(theirs)
        stride = max(1, -(-len(x) // _VECTORS_A_BATCH))
        x, y = x[::stride].double(), y[::stride].double()
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        squares, products = x.T @ x, x.T @ y
        self._squares = squares if self._squares is None else self._squares + squares
        self._products = products if self._products is None else self._products + products

    def settle(self) -> None:
        """Fit the map."""
        assert self._squares is not None, "samples were looked at"
        assert self._products is not None, "samples were looked at"
        ridge = _RIDGE * self._squares.diagonal().mean()
        regular = self._squares + ridge * torch.eye(len(self._squares), dtype=torch.double, device=self._squares.device)
        self._matrix = torch.linalg.solve(regular, self._products).float()
        self._squares = self._products = None

    def __call__(self, mine: Tensor) -> Tensor:
        """Return what a value would be with the other number of channels."""
        assert self._matrix is not None, "the objective was not prepared"
        matrix = self._matrix.to(mine.device)
        mapped = mine.movedim(self._axis, -1) @ matrix[:-1] + matrix[-1]
        return mapped.movedim(-1, self._axis)

    def _vectors(self, values: Tensor) -> Tensor:
        return values.movedim(self._axis, -1).reshape(-1, values.shape[self._axis])


def feature_terms(student: ir.Model, teacher: ir.Model, weight: float) -> list[Term]:
    """Return a term for each of some places between blocks, which share the weight evenly.

    Raises:
        PassError: No value inside the student stands for one of the teacher's.
    """
    pairs = pairs_at_blocks(teacher, student)
    if not pairs:
        raise PassError(
            "pass `recover`: no value between the blocks of the student stands for one of the teacher's",
            hint="leave out `features`; `graphopt compare --layers` shows which values are paired",
        )
    share = weight / len(pairs)
    return [Features(mine.name or "", theirs.name or "", items_of(student, mine), share) for theirs, mine in pairs]
