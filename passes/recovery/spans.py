"""Parts of a student with the parts of the original that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

import onnx_ir as ir
from torch import fx

from graphopt.errors import PassError

from .cut_values import cut_values, ends_of_blocks, ends_of_layers
from .distillation import compared_outputs
from .module_pieces import Piece, piece_of
from .value_pairs import paired

# The same value's names in the student and in the original.
Names: TypeAlias = tuple[str, str]


@dataclass(frozen=True)
class Span:
    """A part of the student and the part of the original that it stands for.

    Attributes:
        starts: Where both begin, (student's, original's) value names; None for the inputs of the models.
        ends: Where both end, pairs alike.
    """

    starts: Names | None
    ends: tuple[Names, ...]

    @property
    def name(self) -> str:
        """What messages call it: where it ends."""
        return ", ".join(f"`{mine}`" for mine, _ in self.ends)


def spans_of(student: ir.Model, teacher: ir.Model, by: str) -> list[Span]:
    """Return the parts that two models are trained by, first to last.

    They meet where all of both models' computation goes through one value, and these values are known to stand for each
    other.

    Args:
        student: The model that is trained.
        teacher: The original.
        by: ``blocks``, or ``layers`` for parts as small as may be.

    Raises:
        PassError: The models have no part in common but the whole.
    """
    pairs = paired(teacher, student)
    mine = {cut.value: cut.place for cut in cut_values(student)}
    cuts = cut_values(teacher)
    meetings: list[Names] = []
    place = -1
    for cut in ends_of_blocks(cuts) if by == "blocks" else ends_of_layers(cuts):
        other = pairs.get(cut.value)
        is_output = cut.value.is_graph_output() or (other is not None and other.is_graph_output())
        if other is None or mine.get(other, -1) <= place or is_output:
            continue
        place = mine[other]
        meetings.append((other.name or "", cut.value.name or ""))
    if not meetings:
        raise PassError(
            f"pass `recover`: `reconstruct={by}` finds no value that all of the model goes through and that the "
            "original has too",
            hint="train it as a whole: leave out `reconstruct`",
        )
    outputs = tuple((value.name or "", value.name or "") for value in compared_outputs(student.graph.outputs))
    starts: list[Names | None] = [None, *meetings]
    ends = [*((meeting,) for meeting in meetings), outputs]
    return [Span(start, end) for start, end in zip(starts, ends, strict=True) if end]


@dataclass(frozen=True, eq=False)
class Stage:
    """One piece of the student, and the original's.

    Attributes:
        span: Where they begin and end.
        mine: The student's.
        theirs: The original's.
    """

    span: Span
    mine: Piece
    theirs: Piece


def stages_of(spans: Sequence[Span], student: fx.GraphModule, teacher: fx.GraphModule) -> list[Stage]:
    """Return the pieces of two lowered models; outputs that hang on more than where the last begins are left out."""
    found = []
    for index, span in enumerate(spans):
        passed = [one.starts for one in spans[:index] if one.starts is not None]
        both = (_Side(student, 0), _Side(teacher, 1))
        ends = tuple(end for end in span.ends if all(side.piece(span, [end], passed) is not None for side in both))
        mine, theirs = (side.piece(span, ends, passed) for side in both)
        if ends and mine is not None and theirs is not None:
            found.append(Stage(replace(span, ends=ends), mine, theirs))
    return found


@dataclass(frozen=True, eq=False)
class _Side:
    """One of two lowered models, and which of each pair of names is its own."""

    module: fx.GraphModule
    index: int

    def piece(self, span: Span, ends: Sequence[Names], passed: Sequence[Names]) -> Piece | None:
        start = span.starts[self.index] if span.starts is not None else None
        own = [names[self.index] for names in passed]
        return piece_of(self.module, start, [names[self.index] for names in ends], own)
