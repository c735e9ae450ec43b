"""Rules of the channel analysis for operators that pick, join or reorder elements."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np

from graphopt import walk

from .axis_ties import AxisRule, Emit, NodeAxes

# Before these versions, what is an input since was an attribute.
_FIRST_PADS_INPUT = 11
_FIRST_SLICE_INPUTS = 10


def concat(node: NodeAxes, emit: Emit) -> None:
    """One input after the other along an axis."""
    output = node.node.outputs[0]
    axis = node.integer("axis", 1) % len(node.sizes_out())
    for index in range(len(node.node.inputs)):
        emit.tie_values(node.value(index), output, skip=(axis,))
    counts = [node.sizes_in(index)[axis] for index in range(len(node.node.inputs))]
    if None in counts:
        for index in range(len(counts)):
            emit.freeze(node.input(index, axis), "it is joined to what has no known size")
        return
    start = 0
    for index, count in enumerate(counts):
        assert count is not None, "sizes are known"
        emit.tie(node.input(index, axis), node.output(0, axis), None, np.arange(start, start + count))
        start += count


def split(node: NodeAxes, emit: Emit) -> None:
    """One piece after the other along an axis."""
    axis = node.integer("axis") % len(node.sizes_in(0))
    start: int | None = 0
    for index, output in enumerate(node.node.outputs):
        emit.tie_values(node.value(), output, skip=(axis,))
        count = node.sizes_out(index)[axis]
        if start is None or count is None:
            emit.freeze(node.input(0, axis), "it is split into pieces of unknown sizes")
            emit.freeze(node.output(index, axis), "it is a piece of unknown place")
            start = None
        else:
            emit.tie(node.input(0, axis), node.output(index, axis), np.arange(start, start + count), None)
            start += count


def slice_(node: NodeAxes, emit: Emit) -> None:
    """Every so manieth element from one to another, along some axes."""
    sizes, rank = node.sizes_in(0), len(node.sizes_in(0))
    if node.opset and node.opset < _FIRST_SLICE_INPUTS:
        starts, ends = node.integers("starts"), node.integers("ends")
        axes, steps = node.integers("axes"), None
    else:
        starts, ends = node.sizes(1), node.sizes(2)  # type: ignore[assignment]
        axes = node.numbers(3) if node.has(3) else None
        steps = node.sizes(4) if node.has(4) else None
        if node.has(3) and axes is None:
            starts = None
    if starts is None or ends is None:
        emit.freeze_value(node.value(), "it is sliced at unknown places")
        emit.freeze_value(node.node.outputs[0], "it is sliced at unknown places")
        return
    places = {axis % rank: place for place, axis in enumerate(axes or range(len(starts)))}
    for axis in range(rank):
        if axis not in places:
            emit.tie(node.input(0, axis), node.output(0, axis))
            continue
        place = places[axis]
        step = steps[place] if steps is not None else 1
        bounds, size = (starts[place], ends[place], step), sizes[axis]
        if size is not None and all(isinstance(bound, int) for bound in bounds):
            picked = np.arange(size)[slice(*_bounds(size, *bounds))]  # type: ignore[arg-type]
            emit.tie(node.input(0, axis), node.output(0, axis), picked, None)
        else:
            emit.freeze(node.input(0, axis), "it is sliced at unknown places")
            emit.freeze(node.output(0, axis), "it is sliced at unknown places")


def _bounds(size: int, start: int, end: int, step: int) -> tuple[int, int | None, int]:
    """Return bounds for Python, to which a negative one behind the front means something else."""
    start, end = (bound + size if bound < 0 else bound for bound in (start, end))
    if step > 0:
        return max(start, 0), max(end, 0), step
    return min(start, size - 1), None if end < 0 else end, step


def gather(node: NodeAxes, emit: Emit) -> None:
    """Elements of an axis by number: in a known order, or looked up."""
    rank, indices_rank = len(node.sizes_in(0)), len(node.sizes_in(1))
    axis = node.integer("axis") % rank
    for other in range(rank):
        if other != axis:
            emit.tie(node.input(0, other), node.output(0, other if other < axis else other + indices_rank - 1))
    size, tensor = node.sizes_in(0)[axis], walk.constant_tensor(node.node.inputs[1])
    if tensor is not None and indices_rank == 1 and size == 1:
        return  # copies of a single element: each can be left out by itself
    if tensor is not None and indices_rank == 1 and size is not None:
        picked = np.asarray(tensor.numpy(), np.int64)
        emit.tie(node.input(0, axis), node.output(0, axis), np.where(picked < 0, picked + size, picked), None)
        return
    emit.freeze(node.input(0, axis), "its elements are looked up by number")
    for place in range(indices_rank):
        emit.tie(node.input(1, place), node.output(0, axis + place))


def gather_elements(node: NodeAxes, emit: Emit) -> None:
    """Elements by number along one axis; of the others, those at the same place."""
    axis = node.integer("axis") % len(node.sizes_in(0))
    scatters = node.node.op_type != "GatherElements"
    involved = [node.value(index) for index in range(3 if scatters else 2)]
    output = node.node.outputs[0]
    for value in (*involved, output):
        emit.freeze_value(
            value, "its elements are looked up by number", skip=set(range(len(node.sizes_out()))) - {axis}
        )
    for other in range(len(node.sizes_out())):
        if other != axis:
            for index in range(len(involved)):
                emit.tie(node.input(index, other), node.output(0, other))


def gather_nd(node: NodeAxes, emit: Emit) -> None:
    """Elements by their numbers along several axes; the axes behind these stay."""
    batch, addressed, leading = _addressed(node, emit)
    for axis in range(batch, leading):
        emit.tie(node.input(1, axis), node.output(0, axis))
    for axis in range(batch):
        emit.tie(node.input(0, axis), node.output(0, axis))
        emit.tie(node.input(1, axis), node.output(0, axis))
    for place, axis in enumerate(range(batch + addressed, len(node.sizes_in(0)))):
        emit.tie(node.input(0, axis), node.output(0, leading + place))


def scatter_nd(node: NodeAxes, emit: Emit) -> None:
    """Elements replaced by their numbers along several axes; the axes behind these stay."""
    _, addressed, leading = _addressed(node, emit)
    emit.tie_values(node.value(), node.node.outputs[0])
    for axis in range(leading):
        emit.tie(node.input(1, axis), node.input(2, axis))
    for place, axis in enumerate(range(addressed, len(node.sizes_in(0)))):
        emit.tie(node.input(0, axis), node.input(2, leading + place))


def _addressed(node: NodeAxes, emit: Emit) -> tuple[int, int, int]:
    """Freeze the axes that indices count along; return how many lie before, how many these are, and axes of indices."""
    batch, leading = node.integer("batch_dims"), len(node.sizes_in(1)) - 1
    addressed = node.sizes_in(1)[leading]
    if addressed is None:
        raise LookupError("indices of unknown length")
    for axis in range(batch, batch + addressed):
        emit.freeze(node.input(0, axis), "its elements are looked up by number")
    emit.freeze(node.input(1, leading), "its elements are numbers along axes")
    return batch, addressed, leading


def reverse_sequence(node: NodeAxes, emit: Emit) -> None:
    """The first so many elements along an axis, backwards."""
    emit.freeze(node.input(0, node.integer("time_axis")), "ReverseSequence goes along it")
    emit.tie(node.input(0, node.integer("batch_axis", 1)), node.input(1, 0))
    emit.tie_values(node.value(), node.node.outputs[0])


def pad(node: NodeAxes, emit: Emit) -> None:
    """Elements before and behind an axis, or fewer; those added belong to nobody but the output."""
    rank = len(node.sizes_in(0))
    pads = node.integers("pads") if 0 < node.opset < _FIRST_PADS_INPUT else node.sizes(1)
    axes = node.numbers(3) if node.has(3) else tuple(range(rank))
    if pads is None or axes is None:
        emit.freeze_value(node.value(), "it is padded by unknown sizes")
        emit.freeze_value(node.node.outputs[0], "it is padded by unknown sizes")
        return
    places = {axis % rank: (pads[place], pads[place + len(axes)]) for place, axis in enumerate(axes)}
    for axis in range(rank):
        before, behind = places.get(axis, (0, 0))
        size, x, y = node.sizes_in(0)[axis], node.input(0, axis), node.output(0, axis)
        if (before, behind) == (0, 0):
            emit.tie(x, y)
        elif size is None or not isinstance(before, int) or not isinstance(behind, int):
            emit.freeze(x, "it is padded by unknown sizes")
            emit.freeze(y, "it is padded by unknown sizes")
        elif node.text("mode", "constant") != "constant":
            emit.freeze(x, "what pads it is made of its own elements")
            emit.freeze(y, "what pads it is made of its own elements")
        else:
            kept = np.arange(max(-before, 0), size - max(-behind, 0))
            emit.tie(x, y, kept, kept + before)


def transpose(node: NodeAxes, emit: Emit) -> None:
    """Axes in another order."""
    rank = len(node.sizes_in(0))
    for target, axis in enumerate(node.integers("perm") or range(rank - 1, -1, -1)):
        emit.tie(node.input(0, axis), node.output(0, target))


LAYOUT_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        ("", "Concat"): concat,
        ("", "Split"): split,
        ("", "Slice"): slice_,
        ("", "Gather"): gather,
        ("", "GatherElements"): gather_elements,
        ("", "ScatterElements"): gather_elements,
        ("", "GatherND"): gather_nd,
        ("", "Pad"): pad,
        ("", "ReverseSequence"): reverse_sequence,
        ("", "ScatterND"): scatter_nd,
        ("", "Transpose"): transpose,
    }
)
