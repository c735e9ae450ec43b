"""Shapes and small integer contents of operators that keep the order of elements: Reshape, Unsqueeze, Expand, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np

from graphopt import dims as d
from graphopt.dims import Size
from graphopt.shape_rules.math import broadcast
from graphopt.shape_rules.shape_facts import CONTENTS_LIMIT, Call, Contents, Contradiction, Dims, Rule, axis_of


def reshape(call: Call) -> None:
    """The shape its second input holds, with 0 for a dimension of the input and -1 for what is left."""
    dims = call.dims()
    target = call.sizes(1) if call.has(1) else call.integers("shape")
    if target is None:
        length = call.dims(1)
        rank = length[0] if length else None
        return call.give([None] * rank if isinstance(rank, int) and rank <= CONTENTS_LIMIT else None)
    result = _reshaped(dims, target, bool(call.integer("allowzero")), call)
    contents = call.contents(0)
    known = [size for size in result if isinstance(size, int)]
    moved = None
    if contents is not None and len(known) == len(result) and np.prod(known, dtype=object) == contents.array.size:
        moved = Contents(contents.array.reshape(known))
    return call.give(result, contents=moved)


def _reshaped(dims: Dims | None, target: Sequence[Size], allow_zero: bool, call: Call) -> list[Size | None]:
    result: list[Size | None] = []
    rest: int | None = None
    for index, entry in enumerate(target):
        if entry == -1 and rest is None:
            rest = index
            result.append(None)
        elif isinstance(entry, int) and entry < 0:
            raise Contradiction(f"dimension {entry} in a Reshape")
        elif allow_zero:
            result.append(entry if d.at_least(entry, 0) else None)
        else:
            result.append(_copied_if_zero(dims, index, entry))
    total = d.product(dims) if dims is not None else None
    if rest is None and total is not None and not allow_zero:
        _settle_zeros(target, result, total)
    others = [dim for index, dim in enumerate(result) if index != rest]
    if total is None or None in others:
        return result
    taken = d.product(dim for dim in others if dim is not None)
    if rest is None:
        if d.differ(total, taken):
            raise Contradiction(f"{total} elements do not fill a shape of {taken}")
        return result
    # Runtimes refuse a -1 beside a zero, so that what is taken is no zero in any run; under allowzero they do not.
    if taken == 0 or (allow_zero and not d.at_least(taken, 1)):
        return result
    if isinstance(total, int) and isinstance(taken, int) and total % taken:
        raise Contradiction(f"{total} elements do not fill rows of {taken}")
    result[rest] = d.as_dimension(d.floordiv(total, taken)) if total != 0 else 0
    return result


def _settle_zeros(target: Sequence[Size], result: list[Size | None], total: Size) -> None:
    """Keep an entry that may be zero where copying would not fill the shape: then there are no elements to fill it."""
    for index, entry in enumerate(target):
        others = [dim for place, dim in enumerate(result) if place != index]
        filled = all(dim is not None and d.at_least(dim, 1) for dim in others)
        if filled and d.at_least(entry, 0) and vanishes_with(total, entry):
            result[index] = result[index] if entry == 0 else entry


def _copied_if_zero(dims: Dims | None, index: int, entry: Size) -> Size | None:
    """Return what an entry of a Reshape gives where it may be zero, and then stands for the input's dimension."""
    if d.at_least(entry, 1):
        return entry
    if dims is None or index >= len(dims):
        # Without such a dimension, zero is refused.
        return entry if dims is not None and entry != 0 and d.at_least(entry, 0) else None
    copied = dims[index]
    if entry == 0 or not d.at_least(entry, 0):
        return copied if entry == 0 else None
    return entry if vanishes_with(copied, entry) else d.choose(entry, entry, copied)


def vanishes_with(a: Size, b: Size) -> bool:
    """Return whether a provably is zero wherever b is."""
    if isinstance(b, int):
        return b != 0 or a == 0
    if len(b.terms) != 1 or not b.terms[0][0]:
        return a == b
    # A product is zero where one of its factors is; each must be in every term of a.
    terms = a.terms if isinstance(a, d.Dim) else (((), a),)
    return all(atom in monomial for atom in b.terms[0][0] for monomial, _ in terms)


def flatten(call: Call) -> None:
    """Two dimensions: the product of those before an axis, and of the others."""
    dims = call.dims()
    if dims is None:
        return call.give([None, None])
    axis = call.integer("axis", 1)
    axis = axis + len(dims) if axis < 0 else axis
    call.give([d.as_dimension(d.product(part)) for part in (dims[:axis], dims[axis:])])
    return None


def squeeze(call: Call) -> None:
    """Some dimensions of 1 gone."""
    dims = call.dims()
    axes = call.numbers(1) if call.has(1) else call.integers("axes")
    if dims is None or (axes is None and call.has(1)):
        return call.give(None)
    if axes is None:
        if not all(dim == 1 or d.differ(dim, 1) for dim in dims):
            return call.give(None)
        axes = tuple(axis for axis, dim in enumerate(dims) if dim == 1)
    gone = {axis_of(axis, len(dims)) for axis in axes}
    if any(d.differ(dims[axis], 1) for axis in gone):
        raise Contradiction(f"squeezes a dimension of {next(dims[a] for a in gone if d.differ(dims[a], 1))}")
    kept = [dim for axis, dim in enumerate(dims) if axis not in gone]
    return call.give(kept, contents=_restacked(call, kept))


def unsqueeze(call: Call) -> None:
    """Dimensions of 1 put in."""
    dims = call.dims()
    axes = call.numbers(1) if call.has(1) else call.integers("axes")
    if dims is None or axes is None:
        return call.give(None)
    rank = len(dims) + len(axes)
    new = {axis_of(axis, rank) for axis in axes}
    old = iter(dims)
    result = [1 if axis in new else next(old) for axis in range(rank)]
    return call.give(result, contents=_restacked(call, result))


def _restacked(call: Call, dims: Sequence[Size]) -> Contents | None:
    """Return the contents of the first input in another static shape."""
    contents = call.contents(0)
    sizes = [dim for dim in dims if isinstance(dim, int)]
    return Contents(contents.array.reshape(sizes)) if contents is not None and len(sizes) == len(dims) else None


def transpose(call: Call) -> None:
    """Its dimensions in another order."""
    dims = call.dims()
    if dims is None:
        return call.give(None)
    perm = call.integers("perm")
    if perm is None:
        perm = tuple(reversed(range(len(dims))))
    if sorted(perm) != list(range(len(dims))):
        raise Contradiction(f"perm {list(perm)} of a tensor of rank {len(dims)}")
    contents = call.contents(0)
    moved = Contents(contents.array.transpose(perm)) if contents is not None else None
    return call.give([dims[axis] for axis in perm], contents=moved)


def expand(call: Call) -> None:
    """What its input and the wanted shape broadcast to."""
    dims, target = call.dims(0), call.sizes(1)
    if dims is None or target is None:
        length = call.dims(1)
        wanted = length[0] if length else None
        if dims is None or not isinstance(wanted, int):
            return call.give(None)
        spare = max(0, wanted - len(dims))
        return call.give([*[None] * spare, *(n if isinstance(n, int) and n != 1 else None for n in dims)])
    result = broadcast(dims, tuple(d.as_dimension(entry) for entry in target))
    contents = call.contents(0)
    sizes = [n for n in result or () if isinstance(n, int)]
    grown = None
    is_static = result is not None and len(sizes) == len(result)
    if contents is not None and is_static and np.prod(sizes, dtype=object) <= CONTENTS_LIMIT:
        grown = Contents(np.broadcast_to(contents.array, sizes))
    return call.give(result, contents=grown)


def tile(call: Call) -> None:
    """Each dimension times its number of repeats."""
    dims, repeats = call.dims(0), call.sizes(1)
    if dims is None or repeats is None:
        return call.give([None] * len(dims) if dims is not None else None)
    result = [d.as_dimension(dim * times) for dim, times in zip(dims, repeats, strict=True)]
    contents, times = call.contents(0), call.numbers(1)
    tiled = None
    if contents is not None and times is not None and np.prod([*times, contents.array.size]) <= CONTENTS_LIMIT:
        tiled = Contents(np.tile(contents.array, times))
    return call.give(result, contents=tiled)


RESHAPE_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        "Reshape": reshape,
        "Flatten": flatten,
        "Squeeze": squeeze,
        "Unsqueeze": unsqueeze,
        "Transpose": transpose,
        "Expand": expand,
        "Tile": tile,
    }
)
