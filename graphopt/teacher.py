"""Teachers: another model that a student is to be like, which must take and give the same."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import onnx_ir as ir

from graphopt.choices import open_model
from graphopt.errors import UsageError, did_you_mean
from graphopt.output_files import check_output

Dims = tuple[int | None, ...]


def open_teacher(given: Any, student: ir.Model, output: Path | None = None) -> ir.Model | None:
    """Return a teacher, opened, that takes the inputs of the student and gives its outputs; None where there is none.

    Args:
        given: A path, a model, or None.
        student: What is to learn from it.
        output: The file that will be written, which must not be the teacher's.

    Raises:
        UsageError: It has other inputs or outputs; what differs is named. Or it would be written over.
        ModelError: It cannot be loaded.
    """
    if given is None:
        return None
    teacher = open_model(given)
    if output is not None and not isinstance(given, ir.Model):
        check_output(output, teacher, Path(given), "teacher")
    _check_ports("input", _fed(student), _fed(teacher))  # fed with the same arrays, so of equal dtypes
    _check_ports("output", student.graph.outputs, teacher.graph.outputs)
    return teacher


def _fed(model: ir.Model) -> list[ir.Value]:
    return [value for value in model.graph.inputs if not value.is_initializer()]


def _check_ports(kind: str, wanted: Sequence[ir.Value], given: Sequence[ir.Value]) -> None:
    """Raise an error unless a teacher has all that a student has; it may give more, but not ask for more."""
    known = {value.name or "": value for value in given}
    for value in wanted:
        name = value.name or ""
        if name not in known:
            raise UsageError(
                f"the teacher has no {kind} `{name}`, which the student has", hint=did_you_mean(name, known)
            )
        why = _difference(value, known[name], same_dtype=kind == "input")
        if why is not None:
            raise UsageError(
                f"{kind} `{name}` is {why[0]} in the student and {why[1]} in the teacher",
                hint="both are fed the same samples and compared output by output: give a teacher of this signature",
            )
    extra = sorted(known.keys() - {value.name or "" for value in wanted})
    if extra and kind == "input":
        raise UsageError(
            f"the teacher has an input `{extra[0]}`, which the student has not",
            hint="both are fed the same samples: give a teacher with the same inputs",
        )


def _difference(a: ir.Value, b: ir.Value, *, same_dtype: bool) -> tuple[str, str] | None:
    """Return in words what two ports differ in, or None where they may go together."""
    if a.dtype is not None and b.dtype is not None and a.dtype != b.dtype:
        both_float = a.dtype.is_floating_point() and b.dtype.is_floating_point()
        if same_dtype or not both_float:
            return str(a.dtype), str(b.dtype)
    before, after = _dims(a), _dims(b)
    if before is None or after is None:
        return None
    clash = len(before) != len(after) or any(
        one != other for one, other in zip(before, after, strict=True) if one is not None and other is not None
    )
    return (_show(before), _show(after)) if clash else None


def _dims(value: ir.Value) -> Dims | None:
    return None if value.shape is None else tuple(dim if isinstance(dim, int) else None for dim in value.shape)


def _show(dims: Dims) -> str:
    return "×".join("?" if dim is None else str(dim) for dim in dims) or "scalar"
