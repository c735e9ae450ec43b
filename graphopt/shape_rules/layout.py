"""Shapes and small integer contents of operators that pick, join or make elements: Slice, Gather, Concat, Range, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphopt import dims as d
from graphopt.dims import Size
from graphopt.shape_rules.math import within_range
from graphopt.shape_rules.shape_facts import (
    CONTENT_RANGES,
    CONTENTS_LIMIT,
    Call,
    Contents,
    Contradiction,
    Dims,
    Rule,
    axis_of,
)

INT64 = ir.DataType.INT64
# A bound of a Slice from here on means: to the end.
UNLIMITED = 2**31 - 1


def identity(call: Call) -> None:
    """What it was given."""
    call.give(call.dims(), contents=call.contents(0))


def shape(call: Call) -> None:
    """The dimensions of its input, as numbers."""
    dims = call.dims()
    if dims is None:
        return call.give([None], INT64)
    part = dims[slice(call.integer("start"), call.integer("end", len(dims)))]
    return call.give([len(part)], INT64, Contents.of(part) if len(part) <= CONTENTS_LIMIT else None)


def size(call: Call) -> None:
    """The product of the dimensions of its input."""
    dims = call.dims()
    contents = Contents.of([d.as_dimension(d.product(dims))], ()) if dims is not None else None
    call.give((), INT64, contents)


def concat(call: Call) -> None:
    """The sum of the dimensions along one axis; the others agree."""
    shapes = [call.dims(i) for i in range(len(call.inputs))]
    known = [dims for dims in shapes if dims is not None]
    if not known:
        return call.give(None)
    rank = len(known[0])
    axis = axis_of(call.integer("axis", 1), rank)
    if any(len(dims) != rank for dims in known):
        raise Contradiction("inputs of different rank")
    result: list[Size | None] = []
    for position in range(rank):
        sizes = [dims[position] for dims in known]
        if position == axis:
            result.append(sum(sizes[1:], sizes[0]) if len(known) == len(shapes) else None)
        else:
            result.append(_agreed(sizes))
    return call.give(result, contents=_concatenated(call, axis, result[axis]))


def _agreed(sizes: Sequence[Size]) -> Size:
    best = sizes[0]
    for one in sizes:
        if d.differ(one, best):
            raise Contradiction(f"sizes {best} and {one} where they must be equal")
        best = one if isinstance(one, int) else best
    return best


def _concatenated(call: Call, axis: int, length: Size | None) -> Contents | None:
    if not isinstance(length, int) or length > CONTENTS_LIMIT:
        return None
    pieces = []
    for index in range(len(call.inputs)):
        contents = call.contents(index)
        if contents is None:
            return None
        pieces.append(contents.array)
    whole = np.concatenate(pieces, axis)
    return Contents(whole) if whole.size <= CONTENTS_LIMIT else None


def split(call: Call) -> None:
    """Pieces along one axis: as many and as large as said, else equal ones."""
    dims, count = call.dims(), len(call.node.outputs)
    if dims is None:
        return
    axis = axis_of(call.integer("axis"), len(dims))
    sizes = call.sizes(1) if call.has(1) else call.integers("split")
    if sizes is None and not call.has(1):
        sizes = _equal_pieces(dims[axis], call.integer("num_outputs", count), count)
    contents = call.contents(0)
    start: Size = 0
    for index in range(count):
        piece = sizes[index] if sizes is not None and index < len(sizes) else None
        known = None
        if contents is not None and isinstance(piece, int) and isinstance(start, int):
            known = Contents(np.take(contents.array, np.arange(start, start + piece), axis))
        call.give([*dims[:axis], piece, *dims[axis + 1 :]], contents=known, at=index)
        start = start + (piece if piece is not None else call.mint())


def _equal_pieces(dim: Size, pieces: int, count: int) -> Dims | None:
    exact = d.divide_exactly(dim, pieces)
    if exact is not None:
        return (exact,) * count
    if not isinstance(dim, int):
        return None
    each = -(-dim // pieces)
    return (*[each] * (count - 1), dim - each * (count - 1))


def slice_(call: Call) -> None:
    """Parts of some axes."""
    dims = call.dims()
    if dims is None:
        return call.give(None)
    if len(call.node.inputs) > 1:
        starts, ends = call.sizes(1), call.sizes(2)
        axes = call.numbers(3) if call.has(3) else None if starts is None else tuple(range(len(starts)))
        steps = call.numbers(4) if call.has(4) else None if starts is None else (1,) * len(starts)
        if call.has(3) and axes is None:
            return call.give([None] * len(dims))
    else:
        starts, ends = call.integers("starts"), call.integers("ends")
        given = call.integers("axes")
        axes = given if given is not None else tuple(range(len(starts or ())))
        steps = (1,) * len(starts or ())
    if axes is None:
        return call.give([None] * len(dims))
    places = [axis_of(axis, len(dims)) for axis in axes]
    result: list[Size | None] = list(dims)
    for i, axis in enumerate(places):
        known = starts is not None and ends is not None and steps is not None
        result[axis] = _length(dims[axis], starts[i], ends[i], steps[i]) if known else None  # type: ignore[index]
    contents = None
    if starts is not None and ends is not None and steps is not None:
        contents = _sliced(call, places, starts, ends, steps)
    return call.give(result, contents=contents)


def _sliced(call: Call, axes: Sequence[int], starts: Dims, ends: Dims, steps: Sequence[int]) -> Contents | None:
    contents = call.contents(0)
    if contents is None:
        return None
    parts = [slice(None)] * len(contents.shape)
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        if not isinstance(start, int) or not isinstance(end, int):
            return None
        length = contents.shape[axis]
        first = start + length if start < 0 else start
        last = end + length if end < 0 else end
        if step < 0:
            first, last = min(max(first, 0), length - 1), max(last, -1)
            parts[axis] = slice(first, None if last < 0 else last, step)
            if first < 0:
                return None
        else:
            parts[axis] = slice(max(first, 0), max(last, 0), step)
    return Contents(contents.array[tuple(parts)])


def _length(dim: Size, start: Size, end: Size, step: int) -> Size | None:
    """Return how many elements a slice takes of a dimension."""
    if step == 0:
        raise Contradiction("a slice with step 0")
    top = dim if step > 0 else dim - 1
    first, last = _clamped(start, dim, top, step > 0), _clamped(end, dim, top, step > 0, is_end=True)
    if first is None or last is None:
        return None
    if step > 0 and last == dim and d.at_least(start, 0):
        first = start  # beyond the end or not, what is left is not negative
    gap = last - first if step > 0 else first - last
    return d.as_dimension(d.maximum(d.ceildiv(gap, abs(step)), 0))


def _clamped(bound: Size, dim: Size, top: Size, forward: bool, *, is_end: bool = False) -> Size | None:
    """Return a bound of a slice as a position, or None where its sign is not known."""
    bottom = -1 if is_end and not forward else 0
    if d.at_least(bound, UNLIMITED):
        return top
    if d.at_most(bound, -UNLIMITED):
        return bottom
    if d.at_least(bound, 0):
        return d.minimum(bound, top)
    if not d.at_most(bound, -1):
        return None
    return d.maximum(dim + bound, bottom)


def gather(call: Call) -> None:
    """The indices' shape in place of one axis."""
    dims, indices = call.dims(0), call.dims(1)
    if dims is None or indices is None:
        return call.give(None)
    axis = axis_of(call.integer("axis"), len(dims))
    contents, places = call.contents(0), call.numbers(1)
    taken = None
    if contents is not None and places is not None and all(-(n := contents.shape[axis]) <= p < n for p in places):
        sizes = [size for size in indices if isinstance(size, int)]
        wanted = np.array(places, dtype=np.int64).reshape(sizes)
        picked = _as_array(np.take(contents.array, wanted, axis))
        taken = Contents(picked) if picked.size <= CONTENTS_LIMIT else None
    return call.give([*dims[:axis], *indices, *dims[axis + 1 :]], contents=taken)


def _as_array(result: object) -> np.ndarray[tuple[int, ...], np.dtype[np.object_]]:
    if isinstance(result, np.ndarray):
        return result
    scalar = np.empty((), dtype=object)
    scalar[()] = result
    return scalar


def gather_elements(call: Call) -> None:
    """The shape of the indices."""
    call.give(call.dims(1))


def gather_nd(call: Call) -> None:
    """The indices' shape but for its last axis, then what is left of the data's."""
    dims, indices, batch = call.dims(0), call.dims(1), call.integer("batch_dims")
    if dims is None or indices is None or not indices or not isinstance(indices[-1], int):
        return call.give(None)
    return call.give([*indices[:-1], *dims[batch + indices[-1] :]])


def pad(call: Call) -> None:
    """Each dimension and what is put before and behind it."""
    dims = call.dims(0)
    if dims is None:
        return call.give(None)
    pads: Dims | None = call.integers("pads") or call.integers("paddings")
    pads = call.sizes(1) if pads is None else pads
    axes = call.numbers(3) if call.has(3) else tuple(range(len(dims)))
    if pads is None or axes is None:
        return call.give([None] * len(dims))
    result = list(dims)
    for i, axis in enumerate(axes):
        place = axis_of(axis, len(dims))
        result[place] = d.as_dimension(result[place] + pads[i] + pads[i + len(axes)])
    return call.give(result)


def range_(call: Call) -> None:
    """As many numbers as there are steps from start to limit."""
    start, limit, step = (call.sizes(i) for i in range(3))
    if start is None or limit is None or step is None or not isinstance(step[0], int) or step[0] == 0:
        return call.give([None])
    gap = limit[0] - start[0] if step[0] > 0 else start[0] - limit[0]
    count = d.as_dimension(d.maximum(d.ceildiv(gap, abs(step[0])), 0))
    contents = None
    if isinstance(count, int) and count <= CONTENTS_LIMIT:
        contents = within_range(Contents.of([start[0] + i * step[0] for i in range(count)]), call.dtype())
    return call.give([count], contents=contents)


def constant_of_shape(call: Call) -> None:
    """The shape its input holds, filled with one number."""
    attribute = call.attribute("value")
    tensor = attribute.as_tensor() if attribute is not None else None
    dtype = tensor.dtype if tensor is not None else ir.DataType.FLOAT
    dims = call.sizes(0)
    if dims is None:
        length = call.dims(0)
        rank = length[0] if length else None
        return call.give([None] * rank if isinstance(rank, int) else None, dtype)
    sizes = [n for n in dims if isinstance(n, int)]
    contents = None
    if (
        len(sizes) == len(dims)
        and tensor is not None
        and dtype in CONTENT_RANGES
        and np.prod(sizes, dtype=object) <= CONTENTS_LIMIT
    ):
        filled = np.full(sizes, None, dtype=object)
        filled[...] = int(tensor.numpy().reshape(-1)[0])
        contents = within_range(Contents(filled), dtype)
    return call.give([d.as_dimension(n) for n in dims], dtype, contents)


def depth_to_space(call: Call) -> None:
    """Blocks of channels laid out over height and width."""
    dims, block = call.dims(), call.integer("blocksize", 1)
    if dims is not None and len(dims) == 4:
        call.give([dims[0], d.floordiv(dims[1], block * block), dims[2] * block, dims[3] * block])


def space_to_depth(call: Call) -> None:
    """Blocks of height and width stacked as channels."""
    dims, block = call.dims(), call.integer("blocksize", 1)
    if dims is not None and len(dims) == 4:
        sides = [d.floordiv(dim, block) for dim in dims[2:]]
        call.give([dims[0], dims[1] * (block * block), *sides])


LAYOUT_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Identity": identity,
        "Shape": shape,
        "Size": size,
        "Concat": concat,
        "Split": split,
        "Slice": slice_,
        "Gather": gather,
        "GatherElements": gather_elements,
        "GatherND": gather_nd,
        "Pad": pad,
        "Range": range_,
        "ConstantOfShape": constant_of_shape,
        "DepthToSpace": depth_to_space,
        "SpaceToDepth": space_to_depth,
    }
)
