"""Slices that cut a value into pieces, as the one Split they are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass

from .arguments import counted, integers, optional_input

# Split takes its sizes as an input since this opset.
SIZES_INPUT_SINCE = 13


@dataclass(frozen=True)
class SplitSlices(Pass):
    """Turn Slices of one value that cut one axis into adjoining pieces, nothing left over, into one Split."""

    name = "split-slices"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "split": "Slice(x, a, b), Slice(x, b, c), ... from the first element to the last = Split(x)"
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Look at each value once, by its Slices within its own graph."""
        for graph in list(walk.every_graph(model)):
            for cuts in _cuts_by_value(graph).values():
                pieces = _tiling(cuts)
                if pieces:
                    _split(pieces, walk.opset(model), ctx)


@dataclass(frozen=True)
class _Cut:
    """A Slice along one axis of a size, from a position to another, exclusive; ``order`` is its node's in the graph."""

    order: int
    node: ir.Node
    axis: int
    start: int
    end: int
    size: int


def _cuts_by_value(graph: ir.Graph | ir.Function) -> dict[ir.Value, list[_Cut]]:
    """Return the Slices along one known axis, by what they slice, in the order of the graph."""
    cuts: dict[ir.Value, list[_Cut]] = {}
    for order, node in enumerate(graph):
        cut = _cut(order, node) if walk.is_onnx_op(node, "Slice") else None
        if cut is not None and node.inputs[0] is not None:
            cuts.setdefault(node.inputs[0], []).append(cut)
    return {value: found for value, found in cuts.items() if len(found) > 1}


def _cut(order: int, node: ir.Node) -> _Cut | None:
    starts, ends, axes, steps = (integers(optional_input(node, index)) for index in (1, 2, 3, 4))
    # What an output is declared to be may be false, and runtimes run it all the same.
    dims = shapes.dims_of(node.inputs[0])
    if dims is None or starts is None or ends is None:
        return None
    if len(starts) != 1 or len(ends) != 1 or (axes is None and optional_input(node, 3) is not None):
        return None
    if optional_input(node, 4) is not None and steps != (1,):
        return None
    axis = counted(axes or (0,), len(dims))
    size = dims[axis[0]] if axis is not None else None
    if axis is None or not isinstance(size, int):
        return None
    start, end, _ = slice(starts[0], ends[0]).indices(size)
    return _Cut(order, node, axis[0], start, max(start, end), size)


def _tiling(cuts: Sequence[_Cut]) -> list[_Cut]:
    """Return the cuts along one axis that together are the whole of it, in its order; none if there are no such."""
    by_axis: dict[int, dict[int, _Cut]] = {}
    for cut in cuts:
        if cut.end > cut.start:
            by_axis.setdefault(cut.axis, {}).setdefault(cut.start, cut)
    for starting in by_axis.values():
        pieces, position = [], 0
        while position in starting:
            pieces.append(starting[position])
            position = pieces[-1].end
        if len(pieces) > 1 and position == pieces[-1].size:
            return pieces
    return []


def _split(pieces: Sequence[_Cut], opset: int, ctx: Context) -> None:
    nodes = [piece.node for piece in pieces]
    value = nodes[0].inputs[0]  # by now maybe a piece of a Split itself
    first = min(pieces, key=lambda piece: piece.order).node
    with ctx.rewriter.edit("split", *nodes):
        split = make_split(value, pieces[0].axis, [piece.end - piece.start for piece in pieces], opset, nodes, ctx)
        if not ctx.agrees("split", nodes, [node.outputs[0] for node in nodes], split.outputs, [split]):
            return
        insert_split(split, first, ctx)
        for node, piece in zip(nodes, split.outputs, strict=True):
            ctx.rewriter.replace(node.outputs[0], piece)
            ctx.rewriter.erase(node)


def make_split(
    value: ir.Value | None, axis: int, sizes: Sequence[int], opset: int, sources: Sequence[ir.Node], ctx: Context
) -> ir.Node:
    """Make a Split into pieces of some sizes, which is in no graph yet; `insert_split` puts it in."""
    if opset < SIZES_INPUT_SINCE:
        attributes = {"axis": axis, "split": list(sizes)}
        return ctx.rewriter.make("Split", [value], attributes, sources=sources, outputs=len(sizes))
    constant = ctx.rewriter.make_const(ir.tensor(sizes, ir.DataType.INT64), f"{sources[0].name or 'split'}_sizes")
    return ctx.rewriter.make("Split", [value, constant], {"axis": axis}, sources=sources, outputs=len(sizes))


def insert_split(split: ir.Node, before: ir.Node, ctx: Context) -> None:
    """Put a Split that `make_split` made into the graph, with the constant that holds its sizes."""
    sizes = optional_input(split, 1)
    if sizes is not None:
        ctx.rewriter.adopt(sizes, near=before)
    ctx.rewriter.insert(split, before=before)
