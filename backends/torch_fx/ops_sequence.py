"""Operators on sequences, which are Python lists, and optionals, which are None where they are empty.

Each function is one operator: inputs by position, attributes by ONNX's names; see `operators.py`. SequenceMap runs a
graph, and is with the others that do in `ops_control.py`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .moved import moving
from .operators import Operator, Table


def sequence_construct(*inputs: Any) -> list[Any]:
    """The inputs, in a list."""
    return list(inputs)


def sequence_empty(*, dtype: int | None = None) -> list[Any]:
    """A list of nothing."""
    return []


def sequence_length(sequence: list[Any]) -> Tensor:
    """The number of entries."""
    return torch.tensor(len(sequence), dtype=torch.int64)


def sequence_at(sequence: list[Any], position: Tensor) -> Any:
    """The entry at a position, counted from the end where it is negative."""
    return sequence[int(position.item())]


def sequence_insert(sequence: list[Any], tensor: Any, position: Tensor | None = None) -> list[Any]:
    """The list with one more entry before a position, by default at its end."""
    at = len(sequence) if position is None else int(position.item())
    return [*sequence[:at], tensor, *sequence[at:]]


def sequence_erase(sequence: list[Any], position: Tensor | None = None) -> list[Any]:
    """The list without the entry at a position, by default the last."""
    at = (-1 if position is None else int(position.item())) % len(sequence)
    return [*sequence[:at], *sequence[at + 1 :]]


@moving
def split_to_sequence(data: Tensor, split: Tensor | None = None, *, axis: int = 0, keepdims: int = 1) -> list[Tensor]:
    """Pieces along an axis: of one size, of given sizes, or single slices, which may lose the axis."""
    length = data.shape[axis]
    if split is None:
        pieces = torch.split(data, 1, axis)
        return [piece if keepdims else piece.squeeze(axis) for piece in pieces]
    if split.ndim:
        return list(torch.split(data, split.tolist(), axis))
    return list(torch.split(data, int(split.item()), axis)) if length else []


@moving
def concat_from_sequence(sequence: list[Tensor], *, axis: int, new_axis: int = 0) -> Tensor:
    """The entries behind one another along an axis, or along a new one."""
    return torch.stack(sequence, axis) if new_axis else torch.cat(sequence, axis)


def optional(given: Any = None, *, type: Any = None) -> Any:
    """An optional that holds the input, or none."""
    return given


def optional_has_element(given: Any = None) -> Tensor:
    """Whether it holds anything; what is no optional does."""
    return torch.tensor(given is not None)


def optional_get_element(given: Any) -> Any:
    """What it holds."""
    if given is None:
        raise ValueError("OptionalGetElement of an empty optional")
    return given


OPERATORS: Table = {
    "ConcatFromSequence": Operator(concat_from_sequence, since=11),
    "Optional": Operator(optional, since=15),
    "OptionalGetElement": Operator(optional_get_element, since=15),
    "OptionalHasElement": Operator(optional_has_element, since=15),
    "SequenceAt": Operator(sequence_at, since=11, sizes=(1,)),
    "SequenceConstruct": Operator(sequence_construct, since=11),
    "SequenceEmpty": Operator(sequence_empty, since=11),
    "SequenceErase": Operator(sequence_erase, since=11, sizes=(1,)),
    "SequenceInsert": Operator(sequence_insert, since=11, sizes=(2,)),
    "SequenceLength": Operator(sequence_length, since=11),
    "SplitToSequence": Operator(split_to_sequence, since=11, sizes=(1,)),
}
