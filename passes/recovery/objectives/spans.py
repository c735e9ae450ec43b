"""Parts of a student with the parts of the original that they stand for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

import onnx_ir as ir
from torch import fx

from graphopt import walk
from graphopt.errors import PassError
from graphopt.shapes import contents, dims_of

from .cut_values import cut_values, ends_of_blocks, ends_of_layers
from .distillation import compared_outputs
from .module_pieces import Piece, Sizes, piece_of
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


@dataclass(frozen=True, eq=False)
class Side:
    """One of two models, as it was lowered, and which of each pair of names is its own.

    Attributes:
        model: The model.
        module: What it was lowered to.
        index: 0 for the student, 1 for the original.
    """

    model: ir.Model
    module: fx.GraphModule
    index: int

    def piece(self, start: Names | None, ends: Sequence[Names], passed: Sequence[Names]) -> Piece | None:
        """Return its piece between some values, if it needs none of those that earlier pieces begin with."""
        own = [names[self.index] for names in passed]
        begin = start[self.index] if start is not None else None
        return piece_of(self.module, begin, [names[self.index] for names in ends], own, known_sizes(self.model))


def stages_of(spans: Sequence[Span], student: Side, teacher: Side) -> list[Stage]:
    """Return the pieces of two lowered models.

    Where one would need what comes before its start, it is joined with the one before; outputs that do are left out.
    """
    found: list[Stage] = []
    start: Names | None = None
    passed: list[Names] = []
    for span in spans:
        ends = tuple(end for end in span.ends if all(one.piece(start, [end], passed) for one in (student, teacher)))
        mine, theirs = (one.piece(start, ends, passed) for one in (student, teacher))
        if not ends or mine is None or theirs is None:
            continue
        found.append(Stage(Span(start, ends), mine, theirs))
        passed += [start] if start is not None else []
        start = ends[0]
    return found


def known_sizes(model: ir.Model) -> dict[str, Sizes]:
    """Return the values of a model's main graph that hold a shape of which all is known by the inputs' shapes."""
    axes: dict[object, tuple[str, int]] = {}
    for value in model.graph.inputs:
        for axis, dim in enumerate(dims_of(value) or ()):
            axes.setdefault(dim, (value.name or "", axis))
    found: dict[str, Sizes] = {}
    for node in model.graph:
        held = contents(node.outputs[0]) if walk.is_onnx_op(node, "Shape") else None
        if held is not None and all(isinstance(size, int) or size in axes for size in held.entries):
            sizes = [size if isinstance(size, int) else axes[size] for size in held.entries]
            found[node.outputs[0].name or ""] = sizes
    return found
