"""Sizes, places and indices that nodes are told, mended for what is cut: one function per operator."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from .cuts import Cuts, mistake
from .sized_operands import Editor, numbers_of, operand

# Slices end here to say "at the end"; what is beyond an axis is cut off.
_AT_THE_END = 2**31 - 1
# From here on Split takes its sizes, and Squeeze its axes, as an input.
_SIZES_AS_INPUT = 13


class Mending:
    """What a rule has at hand.

    Attributes:
        cuts: What is kept of what.
        ctx: The model, and what changes it.
        editor: Changes operands.
    """

    def __init__(self, cuts: Cuts, ctx: Context) -> None:
        self.cuts, self.ctx = cuts, ctx
        self.editor = Editor(ctx)


Rule = Callable[[ir.Node, Mending], None]


def mend_shapes(node: ir.Node, mending: Mending) -> None:
    """Mend what a node is told of sizes, places and indices; call it before any constant is cut.

    Raises:
        PassCrash: What is to be kept cannot be told to the node.
    """
    rule = _RULES.get(node.op_type) if node.domain in walk.ONNX_DOMAINS else None
    if rule is not None:
        rule(node, mending)


def _reshape(node: ir.Node, mending: Mending) -> None:
    """Write the new length wherever the shape states one, and where a dimension is copied that no longer fits."""
    told = operand(node, 1, "shape")
    if told is None:
        return
    cuts, result = mending.cuts, node.outputs[0]
    copies = node.attributes.get_int("allowzero", 0) == 0
    changes: dict[int, int] = {}
    for place, number in enumerate(told.numbers):
        length = cuts.new_length(result, place)
        if number == 0 and copies:
            # One of the two is cut here and the other is not: the elements are the same, the axes are not.
            if length is not None and cuts.new_length(node.inputs[0], place) != length:
                changes[place] = length
        elif number != -1 and length is not None and place in cuts.of(result):
            changes[place] = length
    mending.editor.change(told, changes)


def _expand(node: ir.Node, mending: Mending) -> None:
    """Write the new length wherever the shape states one; 1 leaves the length to the data."""
    told, dims = operand(node, 1), mending.cuts.dims(node.outputs[0])
    if told is None or dims is None:
        return
    first = len(dims) - len(told.numbers)
    changes = {
        axis - first: int(stays.sum())
        for axis, stays in mending.cuts.of(node.outputs[0]).items()
        if axis >= first and told.numbers[axis - first] != 1
    }
    mending.editor.change(told, changes)


def _constant_of_shape(node: ir.Node, mending: Mending) -> None:
    told = operand(node, 0)
    if told is not None:
        mending.editor.change(told, _lengths(node.outputs[0], mending))


def _lengths(value: ir.Value, mending: Mending) -> dict[int, int]:
    return {axis: int(stays.sum()) for axis, stays in mending.cuts.of(value).items()}


def _resize(node: ir.Node, mending: Mending) -> None:
    told, lengths = operand(node, 3), _lengths(node.outputs[0], mending)
    if told is None or not told.numbers:
        return
    axes = node.attributes.get_ints("axes", range(len(told.numbers)))
    rank = len(mending.cuts.dims(node.outputs[0]) or ())
    places = {axis % rank: place for place, axis in enumerate(axes)} if rank else {}
    mending.editor.change(told, {places[axis]: length for axis, length in lengths.items() if axis in places})


def _tile(node: ir.Node, mending: Mending) -> None:
    """A copied axis loses the same elements in every copy; a single element is copied less often."""
    told = operand(node, 1)
    if told is None:
        return
    cuts, (source, result) = mending.cuts, (node.inputs[0], node.outputs[0])
    changes: dict[int, int] = {}
    for axis in sorted(cuts.of(source).keys() | cuts.of(result).keys()):
        [times] = numbers_of(told, [axis])
        before, after = cuts.stays(source, axis), cuts.stays(result, axis)
        if np.array_equal(np.tile(before, times), after):
            continue
        if len(before) != 1:
            raise mistake(f"copies along axis {axis} would differ", node)
        changes[axis] = int(after.sum())
    mending.editor.change(told, changes)


def _split(node: ir.Node, mending: Mending) -> None:
    axis, cuts = _axis(node, mending, node.inputs[0]), mending.cuts
    if not any(axis in cuts.of(value) for value in (node.inputs[0], *node.outputs)):
        return
    told = operand(node, 1, "split")
    before = [cuts.length(value, axis) for value in node.outputs]
    if told is not None:
        before = [known if length is None else length for known, length in zip(told.numbers, before, strict=True)]
    if None in before:
        raise mistake("an output has no known length", node)
    whole, start = cuts.stays(node.inputs[0], axis), 0
    sizes = []
    for value, length in zip(node.outputs, before, strict=True):
        assert length is not None, "all are known here"
        piece = whole[start : start + length]
        if (value.uses() or value.is_graph_output()) and not np.array_equal(cuts.stays(value, axis), piece):
            raise mistake(f"`{value.name}` keeps other elements than are left of what is split", node)
        sizes.append(int(piece.sum()))
        start += length
    if told is not None:
        mending.editor.change(told, dict(enumerate(sizes)))
    elif len(set(sizes)) > 1:  # parts are equal where nothing is said
        _state_split(node, sizes, mending)


def _state_split(node: ir.Node, sizes: list[int], mending: Mending) -> None:
    rewriter = mending.ctx.rewriter
    if walk.opset(mending.ctx.model) < _SIZES_AS_INPUT:
        rewriter.set_attribute(node, "split", sizes)
        return
    mending.editor.read(node, 1, np.array(sizes, np.int64))
    rewriter.set_attribute(node, "num_outputs", None)


def _slice(node: ir.Node, mending: Mending) -> None:
    """Let the bounds enclose, in the new numbering, just the elements that are left of those within them."""
    starts, ends = operand(node, 1, "starts"), operand(node, 2, "ends")
    axes, steps = operand(node, 3, "axes"), operand(node, 4)
    source, result, cuts = node.inputs[0], node.outputs[0], mending.cuts
    if starts is None or ends is None:
        raise mistake("a Slice has bounds", node)
    rank = len(cuts.dims(source) or ())
    over = numbers_of(axes) if axes is not None else tuple(range(len(starts.numbers)))
    bounds: dict[str, dict[int, int]] = {"starts": {}, "ends": {}, "steps": {}}
    for place, axis in enumerate(axis % rank for axis in over):
        if axis not in cuts.of(source) and axis not in cuts.of(result):
            continue
        [start], [end] = numbers_of(starts, [place]), numbers_of(ends, [place])
        [step] = numbers_of(steps, [place]) if steps is not None else [1]
        before = cuts.stays(source, axis)
        within = np.arange(len(before))[slice(start, end, step)]
        if not np.array_equal(before[within], cuts.stays(result, axis)):
            raise mistake(f"other elements of axis {axis} are kept than are left within its bounds", node)
        new = _renumbered(before)[within[before[within]]]
        found = _bounds(new, (start, end, step), np.arange(before.sum()))
        if found is None:
            _gather_first(node, axis, new, mending)
            found = 0, _AT_THE_END, 1
        for what, number in zip(("starts", "ends", "steps"), found, strict=True):
            bounds[what][place] = number
    mending.editor.change(starts, bounds["starts"])
    mending.editor.change(ends, bounds["ends"])
    if steps is not None:
        mending.editor.change(steps, bounds["steps"])


def _bounds(chosen: Array, before: tuple[int, int, int], elements: Array) -> tuple[int, int, int] | None:
    """Return start, end and step that choose some of the elements of an axis, or None where no step does.

    Args:
        chosen: The elements to choose.
        before: Start, end and step as they were; each that still does stays.
        elements: All elements, numbered from 0.
    """
    gaps = np.unique(np.diff(chosen))
    if len(gaps) > 1:
        return None
    stride = int(gaps[0]) if len(gaps) else before[2]
    start, end = int(chosen[0]), int(chosen[-1]) + (1 if stride > 0 else -1)
    end = end if end >= 0 else -(len(elements) + 1)  # -1 would be counted from the back
    candidates = [(first, last, stride) for first in (before[0], start) for last in (before[1], end)]
    return next(bounds for bounds in candidates if np.array_equal(elements[slice(*bounds)], chosen))


def _gather_first(node: ir.Node, axis: int, chosen: Array, mending: Mending) -> None:
    """Let a node read only some elements of an axis, numbered as they are after the cut."""
    rewriter, source = mending.ctx.rewriter, node.inputs[0]
    indices = rewriter.const(chosen.astype(np.int64), f"{node.name or 'slice'}_chosen", near=node)
    gather = rewriter.make("Gather", [source, indices], {"axis": axis}, sources=[node])
    rewriter.insert(gather, before=node)
    rewriter.set_input(node, 0, gather.outputs[0])


def _renumbered(stays: Array) -> Array:
    """Return the new number of each element that stays."""
    return np.cumsum(stays) - 1


def _gather(node: ir.Node, mending: Mending) -> None:
    """Renumber the indices, and leave out those of elements that go."""
    data, indices, result = node.inputs[0], node.inputs[1], node.outputs[0]
    axis, cuts = _axis(node, mending, data), mending.cuts
    tensor = walk.constant_tensor(indices)
    if tensor is None and axis not in cuts.of(data):
        return  # what is computed is cut where it is computed
    if tensor is None:
        raise mistake("the indices of what it reads are only known at run time", node)
    chosen = tensor.numpy()
    for place in range(chosen.ndim):
        chosen = np.compress(cuts.stays(result, axis + place), chosen, place)
    if axis in cuts.of(data):
        stays = cuts.stays(data, axis)
        if not stays[chosen].all():
            raise mistake(f"an element that goes from axis {axis} is still asked for", node)
        chosen = _renumbered(stays)[chosen]
    mending.editor.read(node, 1, chosen.astype(tensor.numpy().dtype))


def _pad(node: ir.Node, mending: Mending) -> None:
    """Of what is added to a cut axis, count what is left."""
    told, chosen = operand(node, 1, "pads", "paddings"), operand(node, 3)
    source, result, cuts = node.inputs[0], node.outputs[0], mending.cuts
    if told is None:
        return
    rank, count = len(cuts.dims(source) or ()), len(told.numbers) // 2
    over = numbers_of(chosen) if chosen is not None else tuple(range(count))
    changes: dict[int, int] = {}
    for place, axis in enumerate(axis % rank for axis in over):
        if axis not in cuts.of(source) and axis not in cuts.of(result):
            continue
        front, back = numbers_of(told, [place, place + count])
        if (front or back) and node.attributes.get_string("mode", "constant") != "constant":
            raise mistake(f"axis {axis} is continued by its own elements", node)
        before, after = cuts.stays(source, axis), cuts.stays(result, axis)
        inner = before[max(-front, 0) : len(before) - max(-back, 0)]
        if not np.array_equal(after[max(front, 0) : len(after) - max(back, 0)], inner):
            raise mistake(f"axis {axis} keeps other elements behind than before it", node)
        changes[place] = int(after[:front].sum()) if front >= 0 else -int(before[:-front].sum())
        ends = after[len(after) - back :] if back >= 0 else before[len(before) + back :]
        changes[place + count] = int(ends.sum()) if back >= 0 else -int(ends.sum())
    mending.editor.change(told, changes)


def _squeeze(node: ir.Node, mending: Mending) -> None:
    """Say which axes are meant, where a cut leaves another one with a single element."""
    dims = mending.cuts.dims(node.inputs[0])
    if dims is None or operand(node, 1, "axes") is not None:
        return
    if all(int(stays.sum()) > 1 for stays in mending.cuts.of(node.inputs[0]).values()):
        return
    axes = [axis for axis, dim in enumerate(dims) if dim == 1]
    if walk.opset(mending.ctx.model) < _SIZES_AS_INPUT:
        mending.ctx.rewriter.set_attribute(node, "axes", axes)
    else:
        mending.editor.read(node, 1, np.array(axes, np.int64))


def _axis(node: ir.Node, mending: Mending, value: ir.Value | None) -> int:
    """Return the attribute `axis`, by default 0, counted from the front."""
    axis = node.attributes.get_int("axis", 0)
    dims = mending.cuts.dims(value)
    if dims is None:
        raise mistake("the rank of what it reads is not known", node)
    return axis % len(dims)


_RULES: Mapping[str, Rule] = {
    "ConstantOfShape": _constant_of_shape,
    "Expand": _expand,
    "Gather": _gather,
    "Pad": _pad,
    "Reshape": _reshape,
    "Resize": _resize,
    "Slice": _slice,
    "Split": _split,
    "Squeeze": _squeeze,
    "Tile": _tile,
}
