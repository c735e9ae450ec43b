"""Which tensors may be the same numbers in another order, shape, sign or scale: told from as few of them as can be.

Moving axes and reshaping leave the first element of a tensor first and the last one last, and their ratio survives a
scale. So two numbers of each tensor say which pairs are worth a look.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array

from .tensor_content import bits_of, elements_of, grouped
from .tensor_symmetries import WITH_SCALE, WITH_SIGN

# Of more tensors than this that begin and end alike, each is read once to tell them apart.
_CROWD = 8
# First and last numbers are scaled and rounded each: so many epsilons between two ratios are no difference.
_ROUNDINGS = 4
# Elements of a tensor looked at together when it is read whole.
_PIECE = 1 << 18


def alike(tensors: Sequence[ir.TensorProtocol]) -> list[list[int]]:
    """Return which of some comparable tensors may be views of one another: none that are lie in different groups.

    Of most tensors only the first and the last element are read.

    Returns:
        Groups of two and more indices, each in order.
    """
    found: list[list[int]] = []
    for group in grouped(range(len(tensors)), lambda index: (tensors[index].dtype, tensors[index].size)):
        if len(group) < 2:
            continue
        for close in _close(group, lambda index: _ends(tensors[index])):
            crowded = len(close) > _CROWD
            found.extend(_close(close, lambda index: _profile(tensors[index])) if crowded else [close])
    return [sorted(group) for group in found if len(group) > 1]


@dataclass(frozen=True)
class _Mark:
    """What a tensor shares with its views: a key that is equal, and a number that is about equal."""

    key: Hashable
    number: float = 0.0
    tolerance: float = 0.0


def _close(items: Iterable[int], mark: Callable[[int], _Mark]) -> Iterator[list[int]]:
    """Yield runs of items of one key whose numbers lie close."""
    marks = {item: mark(item) for item in items}
    for group in grouped(marks, lambda item: marks[item].key):
        group.sort(key=lambda item: marks[item].number)
        run = group[:1]
        for before, item in itertools.pairwise(group):
            if marks[item].number - marks[before].number > marks[item].tolerance:
                yield run
                run = []
            run.append(item)
        yield run


def _ends(tensor: ir.TensorProtocol) -> _Mark:
    """Return the mark of the first and last element, the same for all views."""
    array = elements_of(tensor)
    ends = np.array([array[(place,) * array.ndim] for place in (0, -1)])
    if tensor.dtype not in WITH_SCALE:
        return _Mark(tuple(_without_sign(bits_of(ends), tensor.dtype).tolist()))
    sizes = np.abs(ends.astype(np.float64))
    if not np.isfinite(sizes).all() or not sizes.all():
        return _Mark(tuple("zero" if size == 0 else "number" if np.isfinite(size) else "none" for size in sizes))
    return _Mark("numbers", float(np.log(sizes[0]) - np.log(sizes[1])), _ROUNDINGS * float(np.finfo(ends.dtype).eps))


def _profile(tensor: ir.TensorProtocol) -> _Mark:
    """Return the mark of all elements, whatever their order."""
    flat = elements_of(tensor).reshape(-1)
    pieces = [flat[start : start + _PIECE] for start in range(0, flat.size, _PIECE)]
    if tensor.dtype not in WITH_SCALE:
        sums = [0, 0]
        for piece in pieces:
            bits = _without_sign(bits_of(piece), tensor.dtype).astype(np.uint64)
            sums = [(sums[0] + int(bits.sum())) % 2**64, (sums[1] + int((bits * bits).sum())) % 2**64]
        return _Mark(tuple(sums))
    zeros = strange = 0
    total = largest = 0.0
    for piece in pieces:
        sizes = np.abs(piece.astype(np.float64))
        fits = np.isfinite(sizes)
        strange += int(sizes.size - np.count_nonzero(fits))
        sizes = sizes[fits]
        zeros += int(sizes.size - np.count_nonzero(sizes))
        total, largest = total + float(sizes.sum()), max(largest, float(sizes.max(initial=0.0)))
    share = total / largest if largest else 0.0
    return _Mark((zeros, strange), math.log(share) if share else 0.0, _ROUNDINGS * float(np.finfo(flat.dtype).eps))


def _without_sign(bits: Array, dtype: ir.DataType) -> Array:
    return bits & bits.dtype.type((1 << (dtype.bitwidth - 1)) - 1) if dtype in WITH_SIGN else bits
