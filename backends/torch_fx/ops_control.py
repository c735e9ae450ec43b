"""Control flow: operators that run graphs.

A graph comes as a pair: its module, and the values it captures, which follow the graph's own inputs. The module returns
a tuple.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch

from .moved import moving
from .operators import Operator, Table

Body: TypeAlias = tuple[Any, Sequence[Any]]
Row: TypeAlias = tuple[torch.dtype | None, tuple[int, ...]]
"""Dtype, None of strings, and shape."""
SCANNED = "scanned"
"""Key of a nested module's `meta`: the `Row` of each output as far as known, for loops that never ran."""


def if_(cond: torch.Tensor, *, then_branch: Body, else_branch: Body) -> tuple[Any, ...]:
    """What one of two graphs gives."""
    module, captured = then_branch if bool(cond) else else_branch
    return tuple(module(*captured))


def loop(
    trips: torch.Tensor | None = None,
    cond: torch.Tensor | None = None,
    *carried: Any,
    body: Body,
    device: torch.device,
) -> tuple[Any, ...]:
    """A graph run over and over: what it carries from one run to the next, and what each run adds, stacked."""
    module, captured = body
    most = None if trips is None else int(trips)
    goes_on = cond is None or bool(cond)
    state, rows = list(carried), list[list[Any]]()
    while goes_on and (most is None or len(rows) < most):
        iteration = torch.tensor(len(rows), device=device)
        going, *given = module(iteration, torch.tensor(True, device=device), *state, *captured)
        goes_on = bool(going)
        state = given[: len(carried)]
        rows.append(given[len(carried) :])
    if rows:
        return (*state, *_stacked(rows))
    return (*state, *_nothing_scanned(module, 1 + len(carried), device))


def _stacked(rows: Sequence[Sequence[Any]]) -> list[Any]:
    """Return the rows of each output behind one another along a new first axis."""
    return [_stack(*one) for one in zip(*rows, strict=True)]


@moving
def _stack(*rows: Any) -> Any:
    return torch.stack(rows)


def _nothing_scanned(module: Any, first: int, device: torch.device) -> list[Any]:
    """Return what a loop that never ran has stacked: no rows, of the dtypes and shapes of its outputs."""
    known = module.meta.get(SCANNED, [])[first:]
    return [
        np.empty((0, *shape), object) if dtype is None else torch.zeros((0, *shape), dtype=dtype, device=device)
        for dtype, shape in known
    ]


def scan(
    *inputs: Any,
    body: Body,
    num_scan_inputs: int,
    scan_input_axes: Sequence[int] | None = None,
    scan_input_directions: Sequence[int] | None = None,
    scan_output_axes: Sequence[int] | None = None,
    scan_output_directions: Sequence[int] | None = None,
    device: torch.device,
) -> tuple[Any, ...]:
    """A graph run once for each slice of its inputs: what it carries along, and what each run adds, stacked."""
    module, captured = body
    first = len(inputs) - num_scan_inputs
    state, scanned = list(inputs[:first]), inputs[first:]
    axes = scan_input_axes or [0] * num_scan_inputs
    backwards = scan_input_directions or [0] * num_scan_inputs
    read = [
        tensor.movedim(axis, 0).flip(0) if back else tensor.movedim(axis, 0)
        for tensor, axis, back in zip(scanned, axes, backwards, strict=True)
    ]
    rows = list[tuple[Any, ...]]()
    for step in range(len(read[0])):
        given = module(*state, *(tensor[step] for tensor in read), *captured)
        state = list(given[:first])
        rows.append(given[first:])
    made = _stacked(rows) if rows else _nothing_scanned(module, first, device)
    return (*state, *_laid_out(made, scan_output_axes, scan_output_directions))


def _laid_out(
    made: Sequence[torch.Tensor], axes: Sequence[int] | None, backwards: Sequence[int] | None
) -> list[torch.Tensor]:
    """Put the axis of steps, which comes first, and its direction where a Scan wants them."""
    turned = [
        tensor.flip(0) if back else tensor for tensor, back in zip(made, backwards or [0] * len(made), strict=True)
    ]
    return [tensor.movedim(0, axis) for tensor, axis in zip(turned, axes or [0] * len(made), strict=True)]


def sequence_map(sequence: list[Any], *others: Any, body: Body) -> tuple[Any, ...]:
    """A graph run once for each element of a sequence, and of those of the same length beside it."""
    module, captured = body
    given = [other if isinstance(other, list) else [other] * len(sequence) for other in others]
    rows = [module(*one, *captured) for one in zip(sequence, *given, strict=True)]
    return tuple([row[i] for row in rows] for i in range(len(rows[0]))) if rows else ([],) * len(module.meta[SCANNED])


OPERATORS: Table = {
    "If": Operator(if_, sizes=(0,)),
    "Loop": Operator(loop, sizes=(0, 1)),
    "Scan": Operator(scan, since=9),
    "SequenceMap": Operator(sequence_map, since=17),
}
