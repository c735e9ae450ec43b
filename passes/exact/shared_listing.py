"""What `graphopt inspect --shared` shows: tensors that hold the numbers of others, and layers that are others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.listing import Listing, Sheet
from graphopt.report import show_bytes

from ..analyses.equal_layers import Run, equal_layers
from .merge_initializers import equal_initializers
from .share import find_families, why_not


@dataclass(frozen=True)
class _Copy:
    """A tensor that holds the numbers of another one.

    Attributes:
        value: The tensor's value.
        source: The other one's.
        how: How it is read from the other one.
        stays: Why it stays stored, or None.
    """

    value: ir.Value
    source: ir.Value
    how: str
    stays: str | None = None

    @property
    def bytes(self) -> int:
        return self.value.const_value.nbytes if self.value.const_value is not None else 0


def list_shared(model: ir.Model) -> Listing:
    """Return what a model stores twice as tables.

    Args:
        model: A model as it is stored.
    """
    copies = list(_copies(model))
    same = {copy.value: copy.source for copy in copies if copy.how == "equal"}
    runs = equal_layers(model, same)
    sheets = [_copies_sheet(copies)] if copies else []
    sheets += [_layers_sheet(runs)] if runs else []
    values = {
        "tensors": [
            {
                "name": copy.value.name,
                "same_as": copy.source.name,
                "how": copy.how,
                "bytes": copy.bytes,
                "stays": copy.stays,
            }
            for copy in copies
        ],
        "layers": [
            {
                "names": [walk.label(node) for node in run.layers],
                "same_as": [walk.label(node) for node in run.firsts],
                "bytes": run.bytes,
            }
            for run in runs
        ],
    }
    return Listing(sheets, values, [_sum_of(copies)])


def _copies(model: ir.Model) -> Iterator[_Copy]:
    """Yield the equal ones first, then views."""
    equal: set[ir.Value] = set()
    for first, *others in equal_initializers(model):
        for value in others:
            equal.add(value)
            yield _Copy(value, first, "equal", "is an output" if value.is_graph_output() else None)
    for family in find_families(model, apart=equal):
        for value, view in family.views.items():
            yield _Copy(value, family.source, str(view), why_not(value, view, model))


def _copies_sheet(copies: Sequence[_Copy]) -> Sheet:
    rows = [
        (copy.value.name or "", copy.source.name or "", copy.how, show_bytes(0 if copy.stays else copy.bytes))
        for copy in copies
    ]
    return Sheet(("tensor", "same as", "how", "saves"), rows, numbers=("saves",))


def _layers_sheet(runs: Sequence[Run]) -> Sheet:
    rows = [(_span(run.layers), _span(run.firsts), str(len(run.layers)), show_bytes(run.bytes)) for run in runs]
    return Sheet(("layers", "equal to", "count", "weights"), rows, numbers=("count", "weights"))


def _span(nodes: Sequence[ir.Node]) -> str:
    first, last = walk.label(nodes[0]), walk.label(nodes[-1])
    return first if len(nodes) == 1 else f"{first} … {last}"


def _sum_of(copies: Sequence[_Copy]) -> str:
    freed = [copy for copy in copies if copy.stays is None]
    size = show_bytes(sum(copy.bytes for copy in freed))
    reasons = "".join(f"; `{copy.value.name}` {copy.stays}" for copy in copies if copy.stays is not None)
    if not copies:
        return "no tensor holds the numbers of another one"
    return f"{len(freed)} of {len(copies)} tensors need not be stored: `--passes share` saves {size}{reasons}"
