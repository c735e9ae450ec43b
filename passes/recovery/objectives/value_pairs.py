"""Values inside a teacher with those of the student that stand for them."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import onnx_ir as ir

from graphopt.comparing.layer_pairs import pair_values
from graphopt.comparing.layer_values import read_values
from graphopt.shapes import infer_shapes

from .cut_values import cut_values, ends_of_blocks, thinned

# Places inside that are compared at most: each keeps both models' values until the step is done.
MOST_PLACES = 8


def paired(teacher: ir.Model, student: ir.Model) -> dict[ir.Value, ir.Value]:
    """Return values of a teacher's main graph with their counterparts in a student, in graph order; shapes inferred.

    They are matched by name, by origin and by what reads them, as `compare --layers` matches them.
    """
    infer_shapes(teacher)
    infer_shapes(student)
    return pair_values(teacher, student, read_values(teacher), read_values(student))


def pairs_at_blocks(
    teacher: ir.Model, student: ir.Model, allowed: Callable[[ir.Value], bool] = lambda value: True
) -> list[tuple[ir.Value, ir.Value]]:
    """Return pairs (teacher's, student's) at the ends of blocks, evenly spread, outputs of the model not among them.

    Args:
        teacher: The model before.
        student: The model now.
        allowed: Which values of the teacher are wanted.
    """
    pairs = paired(teacher, student)
    ends = [
        cut
        for cut in ends_of_blocks(cut_values(teacher))
        if cut.value in pairs and not _is_output(pairs, cut.value) and allowed(cut.value)
    ]
    return [(cut.value, pairs[cut.value]) for cut in thinned(ends, MOST_PLACES)]


def _is_output(pairs: dict[ir.Value, ir.Value], value: ir.Value) -> bool:
    return value.is_graph_output() or pairs[value].is_graph_output()


def names(values: Iterable[ir.Value]) -> tuple[str, ...]:
    """Return the names of values; those of a main graph all have one."""
    return tuple(value.name or "" for value in values)
