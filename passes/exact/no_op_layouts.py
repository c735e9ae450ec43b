"""Views, moves and selections that give back what they were given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.pattern import Match, Rule

from .arguments import AT_THE_END, LARGEST_ARGUMENT, axes_of, counted, integers, rank_of, size_of
from .bypass import bypass

# No tensor has as many elements: what a slice of so many rows leaves over is nothing.
MOST_ELEMENTS = 1 << 42
# Resize modes that read the input exactly where it is when no size changes.
_EXACT_RESIZES = frozenset({"align_corners", "asymmetric", "half_pixel", "half_pixel_symmetric", "pytorch_half_pixel"})


def layout_rules() -> Sequence[Rule]:
    """Return one rule per kind of no-op."""
    return (
        NoOpTranspose(),
        NoOpReshape(),
        *(NoOpView(op_type) for op_type in ("Expand", "Flatten", "Squeeze", "Unsqueeze")),
        NoOpTile(),
        NoOpSlice(),
        NoOpPad(),
        NoOpResize(),
        ConcatOfOne(),
        ConcatOfNothing(),
        SplitIntoOne(),
        GatherAll(),
    )


class NoOpTranspose(Rule):
    """Transpose(x, perm = 0, 1, 2, ...) = x."""

    name = "no-op-transpose"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Transpose(x)

    def applies(self, m: Match) -> bool:
        if "perm" in m.root.attributes:
            perm = m.root.attributes["perm"].as_ints()
            return list(perm) == sorted(perm)
        rank = rank_of(m.x)
        return rank is not None and rank <= 1

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class NoOpReshape(Rule):
    """Reshape(x, shape of x) = x, where the shape is told by numbers, copies (0) and one to be computed (−1).

    If every other axis keeps its size, so does the one computed.
    """

    name = "no-op-reshape"

    def pattern(self, op: Any, x: Any, shape: Any) -> Any:
        return op.Reshape(x, shape)

    def applies(self, m: Match) -> bool:
        if shapes.same_shape(m.x, m.root.outputs[0]):
            return True
        sizes = integers(m.shape)
        dims = shapes.dims_of(m.x)
        if sizes is None or dims is None or len(dims) != len(sizes):
            return False
        copies = m.root.attributes.get_int("allowzero", 0) == 0
        kept = [(copies and size == 0) or size == known for size, known in zip(sizes, dims, strict=True)]
        return all(keeps or size == -1 for keeps, size in zip(kept, sizes, strict=True))

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class NoOpView(Rule):
    """Flatten(x) = Squeeze(x) = Unsqueeze(x) = Expand(x) = x where the shape stays.

    These keep the elements in order, or repeat them along axes of size 1; with the same shape they do neither.
    """

    name = "no-op-view"

    def __init__(self, op_type: str) -> None:
        self._op_type = op_type

    def pattern(self, op: Any, x: Any, how: Any = None) -> Any:
        return getattr(op, self._op_type)(x, how)

    def applies(self, m: Match) -> bool:
        match self._op_type:
            case "Expand":
                return _expands_nothing(m) or shapes.same_shape(m.x, m.root.outputs[0])
            case "Flatten":
                return rank_of(m.x) == 2 and m.root.attributes.get_int("axis", 1) in (1, -1)
            case "Squeeze":
                # Axes that are given change the rank; without, or with none, every axis of size 1 goes.
                known = shapes.static_shape(m.x)
                return known is not None and 1 not in known and not axes_of(m.root, len(known))
            case _:
                return axes_of(m.root, None) == ()

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


def _expands_nothing(m: Match) -> bool:
    """Return whether an Expand asks for sizes of 1, which broadcast to any, or for those its input has."""
    sizes, dims = integers(m.how), shapes.dims_of(m.x)
    if sizes is None or dims is None or len(sizes) > len(dims):
        return False
    return all(size in (1, known) for size, known in zip(sizes, dims[len(dims) - len(sizes) :], strict=True))


class NoOpTile(Rule):
    """Tile(x, 1, 1, ...) = x."""

    name = "no-op-tile"

    def pattern(self, op: Any, x: Any, repeats: Any) -> Any:
        return op.Tile(x, repeats)

    def applies(self, m: Match) -> bool:
        repeats = integers(m.repeats)
        return repeats is not None and all(repeat == 1 for repeat in repeats)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class NoOpSlice(Rule):
    """Slice(x) = x where it starts at 0, goes step by step and ends at the end or beyond.

    A slice with positive steps that is as long as its input is all of it, whatever its bounds.
    """

    name = "no-op-slice"

    def pattern(
        self, op: Any, x: Any, starts: Any = None, ends: Any = None, axes: Any = None, steps: Any = None
    ) -> Any:
        return op.Slice(x, starts, ends, axes, steps)

    def applies(self, m: Match) -> bool:
        attributes = m.root.attributes
        steps = integers(m.steps) if m.steps is not None else ()
        if steps is None or any(step < 1 for step in steps):
            return False
        if shapes.same_shape(m.x, m.root.outputs[0]):
            return True
        starts = integers(m.starts) if m.starts is not None else attributes.get_ints("starts")
        ends = integers(m.ends) if m.ends is not None else attributes.get_ints("ends")
        if starts is None or ends is None or any(step != 1 for step in steps):
            return False
        axes = integers(m.axes) if m.axes is not None else attributes.get_ints("axes", range(len(starts)))
        sizes = _sizes(m.x, axes)
        if sizes is None or not len(starts) == len(ends) == len(sizes):
            return False
        known = math.prod(size for size in shapes.dims_of(m.x) or () if isinstance(size, int))
        return all(_is_all(*bounds, known) for bounds in zip(starts, ends, sizes, strict=True))

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


def _sizes(x: ir.Value, axes: Sequence[int] | None) -> list[int | None] | None:
    """Return the size of each of some axes, None where it varies; None for all if there are no such axes."""
    if axes is None:
        return None
    rank = rank_of(x)
    if rank is None:
        return [None] * len(axes)
    axes = counted(axes, rank)
    return None if axes is None else [size_of(x, axis) for axis in axes]


def _is_all(start: int, end: int, size: int | None, known: int) -> bool:
    """Return whether bounds take all of an axis; ``known`` is the product of the sizes of the other axes, if known."""
    if size is None:
        return start == 0 and (end >= AT_THE_END or end * known >= MOST_ELEMENTS)
    return (start == 0 or start <= -size) and end >= size


class NoOpPad(Rule):
    """Pad(x, 0, 0, ...) = x, in every mode."""

    name = "no-op-pad"

    def pattern(self, op: Any, x: Any, pads: Any = None, value: Any = None, axes: Any = None) -> Any:
        return op.Pad(x, pads, value, axes)

    def applies(self, m: Match) -> bool:
        pads = integers(m.pads) if m.pads is not None else m.root.attributes.get_ints("pads")
        return pads is not None and not any(pads)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class NoOpResize(Rule):
    """Resize(x, by 1) = x in the modes that read an input of the wanted size where it is."""

    name = "no-op-resize"

    def pattern(self, op: Any, x: Any, roi: Any = None, scales: Any = None, sizes: Any = None) -> Any:
        return op.Resize(x, roi, scales, sizes)

    def applies(self, m: Match) -> bool:
        mode = m.root.attributes.get_string("coordinate_transformation_mode", "half_pixel")
        if mode not in _EXACT_RESIZES:
            return False
        tensor = walk.constant_tensor(m.scales)
        if tensor is not None and 0 < tensor.size <= LARGEST_ARGUMENT:
            return bool((m.array("scales") == 1).all())
        sizes = integers(m.sizes)
        known = shapes.static_shape(m.x)
        # Sizes may be kept in proportion, or be those of some axes only; with all of them told there is no doubt.
        return sizes is not None and known is not None and sizes == known

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class ConcatOfOne(Rule):
    """Concat(x) = x."""

    name = "concat-of-one"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Concat(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class ConcatOfNothing(Rule):
    """Concat(a, x, b) = Concat(a, b) where x has no elements along the axis."""

    name = "concat-of-nothing"

    def pattern(self, op: Any) -> Any:
        return op.Concat(...)

    def applies(self, m: Match) -> bool:
        return 0 < len(_with_elements(m.root)) < len(m.root.inputs)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.like(m.root, *_with_elements(m.root))


def _with_elements(concat: ir.Node) -> list[ir.Value | None]:
    """Return the inputs of a Concat that are not known to be empty along its axis."""
    axis = concat.attributes.get_int("axis", 0)
    return [value for value in concat.inputs if size_of(value, axis) != 0]


class SplitIntoOne(Rule):
    """Split(x) = x where it has one part."""

    name = "split-into-one"

    def pattern(self, op: Any, x: Any, sizes: Any = None) -> Any:
        return op.Split(x, sizes)

    def applies(self, m: Match) -> bool:
        return len(m.root.outputs) == 1

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)


class GatherAll(Rule):
    """Gather(x, 0, 1, ..., n − 1) = x along an axis of size n."""

    name = "gather-all"

    def pattern(self, op: Any, x: Any, indices: Any) -> Any:
        return op.Gather(x, indices)

    def applies(self, m: Match) -> bool:
        size = size_of(m.x, m.root.attributes.get_int("axis", 0))
        return size is not None and rank_of(m.indices) == 1 and integers(m.indices) == tuple(range(size))

    def rewrite(self, op: Any, m: Match) -> Any:
        return bypass(m)
