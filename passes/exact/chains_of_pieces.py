"""Values cut to pieces and put together again: Slice, Split, Concat and Gather in a row."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.pattern import Match, Miss, Rule

from .arguments import AT_THE_END, LARGEST_ARGUMENT, axes_of, counted, integers, optional_input, rank_of, size_of
from .bypass import bypass

# Where a slice that goes backwards ends when it takes the first element too.
BEFORE_THE_START = -(2**63) + 1


def piece_rules() -> Sequence[Rule]:
    """Return one rule per kind of chain."""
    return (
        Slices(),
        Concats(),
        ConcatOfSplit(),
        ConcatOfSlices(),
        SplitOfConcat(),
        SliceOfConcat(),
        Gathers(),
        UnsqueezedGather(),
        SqueezedGather(),
        SqueezedSlice(),
        SqueezedSplit(),
    )


Bounds = tuple[int, int, int]  # where a slice along one axis starts, ends, and its step


def _cuts(node: ir.Node | None, rank: int | None) -> dict[int, Bounds] | None:
    """Return what a Slice takes along each of its axes, or None where any of it is unknown."""
    if node is None or not walk.is_onnx_op(node, "Slice") or len(node.inputs) < 3:
        return None  # before opset 10 the bounds were attributes
    starts, ends = integers(node.inputs[1]), integers(node.inputs[2])
    if starts is None or ends is None:
        return None
    axes, steps = (optional_input(node, index) for index in (3, 4))
    given = integers(axes) if axes is not None else tuple(range(len(starts)))
    strides = integers(steps) if steps is not None else (1,) * len(starts)
    numbers = counted(given, rank) if given is not None else None
    if numbers is None or strides is None or not len(starts) == len(ends) == len(numbers) == len(strides):
        return None
    cuts = dict(zip(numbers, zip(starts, ends, strides, strict=True), strict=True))
    return cuts if len(cuts) == len(numbers) else None


def _cut(op: Any, root: ir.Node, x: ir.Value | None, cuts: dict[int, Bounds]) -> Any:
    """Return a Slice named like the root."""
    starts, ends, steps = zip(*cuts.values(), strict=True)
    name = root.name or "slice"
    parts = {"starts": starts, "ends": ends, "axes": tuple(cuts)} | ({"steps": steps} if set(steps) != {1} else {})
    return op.Slice(x, *(op.const(np.array(numbers, np.int64), f"{name}_{part}") for part, numbers in parts.items()))


class Slices(Rule):
    """Slice(Slice(x)) = one Slice, over the axes of both."""

    name = "slices"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Slice(op.Slice(x, ..., _id="first"), ...)

    def check(self, m: Match) -> Miss | None:
        return Miss("its bounds vary, or count from an unknown end", m.root) if self._both(m) is None else None

    def rewrite(self, op: Any, m: Match) -> Any:
        cuts = self._both(m)
        assert cuts is not None, "checked"
        return _cut(op, m.root, m.x, cuts)

    def _both(self, m: Match) -> dict[int, Bounds] | None:
        first, second = _cuts(m.first, rank_of(m.x)), _cuts(m.root, rank_of(m.x))
        if first is None or second is None:
            return None
        both = dict(first)
        for axis, bounds in second.items():
            cut = _cut_of_cut(first[axis], bounds, size_of(m.x, axis)) if axis in first else bounds
            if cut is None:
                return None
            both[axis] = cut
        return both


def _cut_of_cut(first: Bounds, second: Bounds, size: int | None) -> Bounds | None:
    """Return the bounds of a slice of a slice along one axis, of a known or unknown size."""
    if size is not None:
        taken = range(size)[slice(*first)][slice(*second)]
        if len(taken) == 0:
            return 0, 0, 1
        return taken.start, taken.stop if taken.stop >= 0 else BEFORE_THE_START, taken.step
    if first[2] != 1 or second[2] != 1 or min(*first[:2], *second[:2]) < 0:
        return None
    return first[0] + second[0], min(first[1], first[0] + second[1]), 1


class Concats(Rule):
    """Concat(a, Concat(b, c), d) = Concat(a, b, c, d) along one axis."""

    name = "concats"

    def pattern(self, op: Any) -> Any:
        return op.Concat(...)

    def applies(self, m: Match) -> bool:
        parts = [value for value in m.root.inputs if value is not None and self._is_part(value, m.root)]
        inner = [value.producer() for value in parts]
        m.include(node for node in inner if node is not None)
        return bool(inner)

    def rewrite(self, op: Any, m: Match) -> Any:
        parts: list[ir.Value | None] = []
        for value in m.root.inputs:
            producer = value.producer() if value is not None and self._is_part(value, m.root) else None
            parts += producer.inputs if producer is not None else [value]
        return op.like(m.root, *parts)

    def _is_part(self, value: ir.Value | None, root: ir.Node) -> bool:
        """Return whether a value is a Concat along the root's axis that feeds the root alone."""
        inner = value.producer() if value is not None else None
        if value is None or inner is None or not _is_near(inner, root, "Concat"):
            return False
        axes = [counted([node.attributes.get_int("axis", 0)], rank_of(value)) for node in (inner, root)]
        same = inner.attributes.get_int("axis", 0) == root.attributes.get_int("axis", 0)
        alone = not value.is_graph_output() and all(use.node is root for use in value.uses())
        return alone and (same or (axes[0] is not None and axes[0] == axes[1]))


def _is_near(node: ir.Node, root: ir.Node, op_type: str) -> bool:
    """Return whether a node is such an operator, plain to see and in the graph of the root."""
    return walk.is_onnx_op(node, op_type) and node.graph is root.graph and not walk.has_references(node)


class ConcatOfSplit(Rule):
    """Concat(Split(x)) = x where every part comes back, in order, along the same axis."""

    name = "concat-of-split"
    inner_may_be_read = True

    def pattern(self, op: Any) -> Any:
        return op.Concat(...)

    def applies(self, m: Match) -> bool:
        first = m.root.inputs[0]
        split = first.producer() if first is not None else None
        if split is None or not _is_near(split, m.root, "Split") or list(split.outputs) != list(m.root.inputs):
            return False
        m.include([split])
        rank = rank_of(split.inputs[0])
        axes = [counted([node.attributes.get_int("axis", 0)], rank) for node in (split, m.root)]
        same = split.attributes.get_int("axis", 0) == m.root.attributes.get_int("axis", 0)
        return same or (axes[0] is not None and axes[0] == axes[1])

    def rewrite(self, op: Any, m: Match) -> Any:
        first = m.root.inputs[0]
        assert first is not None
        split = first.producer()
        assert split is not None
        return bypass(m, split.inputs[0])


@dataclass(frozen=True)
class _Run:
    """Inputs of a Concat that are slices of one value, each beginning where the one before ends."""

    slices: tuple[ir.Node, ...]
    start: int
    end: int


class ConcatOfSlices(Rule):
    """Concat(x[a:b], x[b:c]) = x[a:c] along the axis of the Concat."""

    name = "concat-of-slices"

    def pattern(self, op: Any) -> Any:
        return op.Concat(...)

    def applies(self, m: Match) -> bool:
        runs = [part for part in self._parts(m.root) if isinstance(part, _Run)]
        for run in runs:
            m.include(run.slices)
        return bool(runs)

    def rewrite(self, op: Any, m: Match) -> Any:
        axis = counted([m.root.attributes.get_int("axis", 0)], rank_of(m.root.outputs[0]))
        assert axis is not None, "an unknown axis makes no run"
        parts = [
            _cut(op, m.root, part.slices[0].inputs[0], {axis[0]: (part.start, part.end, 1)})
            if isinstance(part, _Run)
            else part
            for part in self._parts(m.root)
        ]
        return parts[0] if len(parts) == 1 else op.like(m.root, *parts)

    def _parts(self, root: ir.Node) -> Iterator[_Run | ir.Value | None]:
        """Yield the inputs of a Concat, those that make one slice together as one."""
        axis = counted([root.attributes.get_int("axis", 0)], rank_of(root.outputs[0]))
        open_run: _Run | None = None
        for value in root.inputs:
            run = self._slice(value, root, axis[0]) if axis is not None else None
            if open_run is not None and run is not None and _follows(run, open_run):
                open_run = _Run(open_run.slices + run.slices, open_run.start, run.end)
                continue
            yield from _closed(open_run)
            open_run = run
            if run is None:
                yield value
        yield from _closed(open_run)

    def _slice(self, value: ir.Value | None, root: ir.Node, axis: int) -> _Run | None:
        """Return an input as a run of one, if it is a plain slice along the axis that feeds the root alone."""
        node = value.producer() if value is not None else None
        if value is None or node is None or not _is_near(node, root, "Slice"):
            return None
        if value.is_graph_output() or len(value.uses()) > 1:
            return None
        cuts = _cuts(node, rank_of(value))
        if cuts is None or list(cuts) != [axis]:
            return None
        start, end, step = cuts[axis]
        size = size_of(node.inputs[0], axis)
        if size is not None and step == 1:
            start, end, _ = slice(start, end).indices(size)
        return _Run((node,), start, end) if step == 1 and 0 <= start <= end else None


def _follows(run: _Run, before: _Run) -> bool:
    return run.start == before.end and run.slices[0].inputs[0] is before.slices[0].inputs[0]


def _closed(run: _Run | None) -> Iterator[_Run | ir.Value | None]:
    """Yield a run, if it is more than one slice, or the slice alone."""
    if run is not None:
        yield run if len(run.slices) > 1 else run.slices[0].outputs[0]


class SplitOfConcat(Rule):
    """Split(Concat(a, b, c)) = a, b, c where the parts are as large as what was put together."""

    name = "split-of-concat"
    inner_may_be_read = True

    def pattern(self, op: Any, sizes: Any = None) -> Any:
        return op.Split(op.Concat(..., _id="concat"), sizes)

    def applies(self, m: Match) -> bool:
        axis = counted([m.root.attributes.get_int("axis", 0)], rank_of(m.concat.outputs[0]))
        whole = counted([m.concat.attributes.get_int("axis", 0)], rank_of(m.concat.outputs[0]))
        if axis is None or axis != whole or len(m.root.outputs) != len(m.concat.inputs):
            return False
        pairs = zip(m.root.outputs, m.concat.inputs, strict=True)
        sizes = [(size_of(part, axis[0]), size_of(value, axis[0])) for part, value in pairs]
        return all(part is not None and part == size for part, size in sizes)

    def check(self, m: Match) -> Miss | None:
        named = any(output.is_graph_output() for output in m.root.outputs)
        return Miss("names a graph output", m.root) if named else None

    def rewrite(self, op: Any, m: Match) -> Any:
        return tuple(m.concat.inputs)


class SliceOfConcat(Rule):
    """Slice(Concat(a, b)) = a, b, or a Slice of one of them, where it touches only that one."""

    name = "slice-of-concat"
    inner_may_be_read = True

    def pattern(self, op: Any) -> Any:
        return op.Slice(op.Concat(..., _id="concat"), ...)

    def applies(self, m: Match) -> bool:
        return self._source(m) is not None

    def rewrite(self, op: Any, m: Match) -> Any:
        source = self._source(m)
        assert source is not None, "it applies"
        value, axis, start, end = source
        if (start, end) == (0, size_of(value, axis)):
            return bypass(m, value)
        return _cut(op, m.root, value, {axis: (start, end, 1)})

    def _source(self, m: Match) -> tuple[ir.Value, int, int, int] | None:
        """Return the input of the Concat a Slice takes from, the axis, and where the slice starts and ends in it."""
        whole = m.concat.outputs[0]
        cuts = _cuts(m.root, rank_of(whole))
        axis = counted([m.concat.attributes.get_int("axis", 0)], rank_of(whole))
        if cuts is None or axis is None or list(cuts) != list(axis):
            return None
        start, end, step = cuts[axis[0]]
        size = size_of(whole, axis[0])
        if step != 1:
            return None
        if size is not None:
            start, end, _ = slice(start, end).indices(size)
        if not 0 <= start < end:
            return None
        offset = 0
        for value in m.concat.inputs:
            length = size_of(value, axis[0])
            if value is None or length is None:
                return None  # what comes after starts nobody knows where
            if offset <= start and end <= offset + length:
                return value, axis[0], start - offset, end - offset
            offset += length
        return None


def _sizes(indices: ir.Value) -> tuple[int, ...] | None:
    """Return the shape of constant indices, or None where they vary."""
    tensor = walk.constant_tensor(indices)
    return None if tensor is None else walk.dims(tensor)


class Gathers(Rule):
    """Gather(Gather(x, i), j) = Gather(x, i[j]) along one axis, for constant indices."""

    name = "gathers"

    def pattern(self, op: Any, x: Any, i: Any, j: Any) -> Any:
        return op.Gather(op.Gather(x, i, _id="first"), j)

    def applies(self, m: Match) -> bool:
        axes = [counted([node.attributes.get_int("axis", 0)], rank_of(m.x)) for node in (m.first, m.root)]
        return len(_sizes(m.i) or ()) == 1 and axes[0] is not None and axes[0] == axes[1]

    def check(self, m: Match) -> Miss | None:
        i, j = integers(m.i), integers(m.j)
        if i is None or j is None:
            return Miss("its indices vary, or are many", m.root)
        if len(j) > LARGEST_ARGUMENT or any(not -len(i) <= index < len(i) for index in j):
            return Miss("its indices are out of range", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.root, m.x, op.const(np.asarray(m.array("i")[m.array("j")]), m.j.name))


class UnsqueezedGather(Rule):
    """Unsqueeze(Gather(x, i, axis), axis) = Gather(x, [i], axis) for a single constant i."""

    name = "unsqueezed-gather"

    def pattern(self, op: Any, x: Any, i: Any, axes: Any = None) -> Any:
        return op.Unsqueeze(op.Gather(x, i, _id="gather"), axes)

    def applies(self, m: Match) -> bool:
        rank = rank_of(m.x)
        axis = counted([m.gather.attributes.get_int("axis", 0)], rank)
        return _sizes(m.i) == () and axis is not None and axes_of(m.root, rank) == axis

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.gather, m.x, op.const(m.array("i").reshape(1), m.i.name))


class SqueezedGather(Rule):
    """Squeeze(Gather(x, [i], axis), axis) = Gather(x, i, axis) for a single constant i."""

    name = "squeezed-gather"

    def pattern(self, op: Any, x: Any, i: Any, axes: Any = None) -> Any:
        return op.Squeeze(op.Gather(x, i, _id="gather"), axes)

    def applies(self, m: Match) -> bool:
        rank = rank_of(m.x)
        axis = counted([m.gather.attributes.get_int("axis", 0)], rank)
        return _sizes(m.i) == (1,) and axis is not None and axes_of(m.root, rank) == axis

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.gather, m.x, op.const(m.array("i").reshape(()), m.i.name))


class SqueezedSlice(Rule):
    """Squeeze(x[i:i+1]) = Gather(x, i) along the axis of both."""

    name = "squeezed-slice"

    def pattern(self, op: Any, x: Any, axes: Any = None) -> Any:
        return op.Squeeze(op.Slice(x, ..., _id="slice"), axes)

    def applies(self, m: Match) -> bool:
        cuts, axes = _cuts(m.slice, rank_of(m.x)), axes_of(m.root, rank_of(m.x))
        if cuts is None or axes is None or list(cuts) != list(axes) or len(cuts) != 1:
            return False
        start, end, step = cuts[axes[0]]
        return step == 1 and (end == start + 1 != 0 or (start == -1 and end >= AT_THE_END))

    def rewrite(self, op: Any, m: Match) -> Any:
        [(axis, (start, _, _))] = (_cuts(m.slice, rank_of(m.x)) or {}).items()
        return op.Gather(m.x, op.const(np.array(start, np.int64), f"{m.root.name or 'gather'}_index"), axis=axis)


class SqueezedSplit(Rule):
    """Squeeze(Split(x)[i]) = Gather(x, i) along the axis of both, where every part is squeezed.

    Each part has size 1. Once no part is read any more, the Split goes.
    """

    name = "squeezed-split"
    inner_may_be_read = True

    def pattern(self, op: Any) -> Any:
        return op.Squeeze(...)

    def applies(self, m: Match) -> bool:
        part = m.root.inputs[0]
        split = part.producer() if part is not None else None
        if part is None or split is None or not _is_near(split, m.root, "Split"):
            return False
        rank = rank_of(split.inputs[0])
        axis = counted([split.attributes.get_int("axis", 0)], rank)
        if axis is None or not all(self._is_squeezed(output, axis, rank) for output in split.outputs):
            return False
        m.include([split])
        return True

    def rewrite(self, op: Any, m: Match) -> Any:
        part = m.root.inputs[0]
        assert part is not None
        split, index = part.producer(), part.index()
        assert split is not None
        name = m.root.name or "gather"
        axis = split.attributes.get_int("axis", 0)
        return op.Gather(split.inputs[0], op.const(np.array(index, np.int64), f"{name}_index"), axis=axis)

    def _is_squeezed(self, part: ir.Value, axis: tuple[int, ...], rank: int | None) -> bool:
        """Return whether nothing but Squeezes of its only element read a part."""
        if part.is_graph_output() or size_of(part, axis[0]) != 1:
            return False
        readers = [use.node for use in part.uses()]
        return all(walk.is_onnx_op(node, "Squeeze") and axes_of(node, rank) == axis for node in readers)
