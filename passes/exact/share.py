"""Constants that hold the same numbers, stored once: equal ones, and those that are views of another one."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.report import show_bytes

from ..analyses.equal_layers import equal_layers
from ..analyses.tensor_content import grouped
from ..analyses.tensor_marks import alike
from ..analyses.tensor_symmetries import View, is_comparable, view_of
from .merge_initializers import merge_equal, merge_values, scopes
from .shared_views import NODE_BYTES, obstacle, read_as_view, reluctance, unfit

# So many layers are named before it says how many more there are.
_NAMED = 3


@dataclass(frozen=True)
class Share(Pass):
    """Store equal weights once, and read those that differ in layout, sign or scale from the one that is stored."""

    name = "share"
    # The weights keep every bit, and so do the outputs where the runtime makes views at load. One that does not may
    # multiply by a weight it computes with another kernel than by one it finds stored.
    guarantee = Guarantee.EQUIVALENT
    edits: ClassVar[Mapping[str, str]] = {
        "merge": "initializers of equal dtype, shape and bytes are the same",
        "view": "an initializer = another one reshaped, transposed, negated or scaled, bit for bit",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Merge what is equal, find what is a view of what is left, and report."""
        before, said = ctx.rewriter.edits, len(ctx.notes)
        gone = merge_equal(model, ctx)
        if gone:
            size = sum(tensor.nbytes for tensor in gone)
            ctx.note(
                f"{_counted(len(gone), 'tensor')} equal to others left out: {show_bytes(size)}",
                merged=len(gone),
                merged_bytes=size,
            )
        sharing = _Sharing(model, ctx)
        for family in find_families(model):
            sharing.share(family)
        sharing.report()
        merge_equal(model, ctx)  # shapes and factors of views
        if ctx.rewriter.edits == before and len(ctx.notes) == said:
            ctx.note("found no weights that could share what they store: the model is unchanged")
        _report_layers(model, ctx)
        _report_constant_nodes(model, ctx)


@dataclass(eq=False)
class Family:
    """Constants that are views of one of them.

    Attributes:
        source: The one.
        views: The others, and how each is read from it.
    """

    source: ir.Value
    views: dict[ir.Value, View] = field(default_factory=dict)


def find_families(model: ir.Model, apart: Collection[ir.Value] = ()) -> list[Family]:
    """Return all initializers that are views of others, each once.

    Args:
        model: The model.
        apart: Initializers to leave out.
    """
    scoped: dict[ir.Value, Hashable] = {}
    for scope, graph in scopes(model):
        for value in walk.body(graph).initializers.values():
            if value not in apart and _is_candidate(value, graph is model.graph):
                scoped[value] = scope
    found: list[Family] = []
    for values in grouped(scoped, scoped.__getitem__):
        for close in alike([_tensor(value) for value in values]):
            found += _families([values[index] for index in close], model)
    return found


def _is_candidate(value: ir.Value, in_main: bool) -> bool:
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.nbytes <= NODE_BYTES or not is_comparable(tensor):
        return False
    # What a nested graph returns must be its own.
    return in_main if value.is_graph_output() else bool(value.uses())


def _families(values: Sequence[ir.Value], model: ir.Model) -> list[Family]:
    """Return the families among constants that begin and end alike, those that must stay at their heads."""

    def rank(value: ir.Value) -> tuple[bool, int, bool]:
        return obstacle(value, model) is None, -reluctance(value), value.graph is not model.graph

    families: list[Family] = []
    for value in sorted(values, key=rank):
        if not any(_takes_in(family, [value]) for family in families):
            families.append(Family(value))
    # A number that was rounded when it was scaled is not scaled back: the head of a family may come behind it.
    for head, other in itertools.permutations(list(families), 2):
        if head in families and other in families and _takes_in(head, [other.source, *other.views]):
            families.remove(other)
    for tensor in map(_tensor, values):
        release = getattr(tensor, "release", None)
        if release is not None:
            release()
    return [family for family in families if family.views]


def _takes_in(family: Family, values: Sequence[ir.Value]) -> bool:
    """Add constants to a family if all are views of its head, and return whether they are."""
    found: dict[ir.Value, View] = {}
    for value in values:
        view = view_of(_tensor(family.source), _tensor(value))
        if view is None:
            return False
        found[value] = view
    family.views |= found
    return True


def why_not(value: ir.Value, view: View, model: ir.Model) -> str | None:
    """Return why a constant that is a view of another one stays as it is, or None."""
    if view.steps * NODE_BYTES >= _tensor(value).nbytes:
        return "takes less than the nodes that would recover it"
    return obstacle(value, model) or unfit(view, _tensor(value).dtype)


def _tensor(value: ir.Value) -> ir.TensorProtocol:
    assert value.const_value is not None, "an initializer that is constant holds a tensor"
    return value.const_value


class _Sharing:
    """Puts views in place, and keeps count of them."""

    def __init__(self, model: ir.Model, ctx: Context) -> None:
        self.model, self.ctx = model, ctx
        self.saved: Counter[str] = Counter()
        self.views: Counter[str] = Counter()
        self.left: dict[str, list[ir.Value]] = {}

    def share(self, family: Family) -> None:
        """Let the readers of a family's views read its head."""
        for value, view in family.views.items():
            why = why_not(value, view, self.model)
            if why is not None:
                self.left.setdefault(why, []).append(value)
                continue
            kind, size = view.kind, _tensor(value).nbytes
            with self.ctx.rewriter.edit("view", *value.consumers()):
                self._put(family.source, value, view)
            self.views[kind] += 1
            self.saved[kind] += size

    def _put(self, source: ir.Value, value: ir.Value, view: View) -> None:
        if not view.steps:
            merge_values([source, value], self.model, self.ctx)
            return
        if source.graph is not self.model.graph and source.graph is not value.graph:
            self.ctx.rewriter.lift(source, near=source.consumers()[0])
        read_as_view(value, source, view, self.ctx)

    def report(self) -> None:
        """Say what was found and what was left."""
        if self.views:
            kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(self.views.items()))
            count, size = sum(self.views.values()), sum(self.saved.values())
            self.ctx.note(
                f"{_counted(count, 'tensor')} read from others ({kinds}): the file is {show_bytes(size)} smaller; "
                "in a runtime that makes them when it loads the model they take memory as before",
                views=count,
                views_bytes=size,
            )
        for why, values in self.left.items():
            size = sum(_tensor(value).nbytes for value in values)
            names = ", ".join(f"`{value.name}`" for value in values[:_NAMED])
            more = f" and {len(values) - _NAMED} more" if len(values) > _NAMED else ""
            self.ctx.left(f"stored twice ({show_bytes(size)}): {names}{more}, which {why}")


def _report_layers(model: ir.Model, ctx: Context) -> None:
    runs = equal_layers(model)
    layers = sum(len(run.layers) for run in runs)
    if not layers:
        return
    said = [str(run) for run in runs[:_NAMED]]
    more = f" and {len(runs) - _NAMED} more" if len(runs) > _NAMED else ""
    hold = "holds" if layers == 1 else "hold"
    ctx.note(f"{_counted(layers, 'layer')} {hold} the weights of others: {'; '.join(said)}{more}", equal_layers=layers)


def _report_constant_nodes(model: ir.Model, ctx: Context) -> None:
    sizes = [
        tensor.nbytes
        for node in walk.every_node(model)
        if walk.is_onnx_op(node, "Constant")
        and (tensor := walk.constant_tensor(node.outputs[0])) is not None
        and tensor.nbytes > NODE_BYTES
    ]
    if sizes:
        ctx.left(
            f"not looked at: {_counted(len(sizes), 'Constant node')} ({show_bytes(sum(sizes))}); "
            "`simplify` makes initializers of those in the main graph"
        )


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'s' if count != 1 else ''}"
