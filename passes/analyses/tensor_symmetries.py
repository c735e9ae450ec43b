"""Which tensors hold the same numbers in another order, shape, sign or scale, and how one is read from another.

Moving axes and reshaping leave the first element of a tensor first and the last one last, and their ratio survives a
scale. So two numbers of each tensor say which pairs are worth a look; of those a sample is compared for every order of
axes, and what agrees there is compared in all its bits, a tile at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.sparse import SparselyStored

from .tensor_content import elements_of, grouped

# Elements compared for each order of axes before all are.
_SAMPLES = 128
# With fewer numbers other than zero among them a sample says little about a scale, and the largest one is added.
_FEWEST_NONZERO = 4
# Of more tensors than this that begin and end alike, each is read once to tell them apart.
_CROWD = 8
# Elements of a tile: both sides of it stay in the cache.
_TILE = 1 << 18
_TILE_SIDE = 512
# A quotient of two rounded numbers is so many steps, at most, from the factor that was rounded.
_STEPS = 3
# First and last numbers are scaled and rounded each: so many epsilons between two ratios are no difference.
_ROUNDINGS = 4
_BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
_BYTE_BITS = 8
_WITH_SIGN = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# A product of these is rounded once, wherever it is computed.
_WITH_SCALE = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})


@dataclass(frozen=True)
class View:
    """How a tensor is read from another one, step by step.

    Attributes:
        before: The shape it is given first, or None.
        perm: The order of axes it is given then, or None.
        after: The shape it is given then, or None.
        factor: What it is multiplied by last: 1, −1, or any number of its dtype.
    """

    before: tuple[int, ...] | None = None
    perm: tuple[int, ...] | None = None
    after: tuple[int, ...] | None = None
    factor: float = 1.0

    @property
    def steps(self) -> int:
        """How many operators it takes."""
        return sum((self.before is not None, self.perm is not None, self.after is not None, self.factor != 1))

    def of(self, array: Array) -> Array:
        """Return what the view makes of an array."""
        if self.before is not None:
            array = array.reshape(self.before)
        if self.perm is not None:
            array = array.transpose(self.perm)
        if self.after is not None:
            array = array.reshape(self.after)
        if self.factor == 1:
            return array
        return -array if self.factor == -1 else array * array.dtype.type(self.factor)

    def __str__(self) -> str:
        said = ["transposed"] if self.perm is not None else []
        if self.before is not None or self.after is not None:
            said.append("reshaped")
        if self.factor != 1:
            said.append("negated" if self.factor == -1 else f"times {self.factor:.9g}")
        return ", ".join(said) or "equal"


def is_comparable(tensor: ir.TensorProtocol) -> bool:
    """Return whether a tensor is of whole bytes, stored densely, and not of text or complex numbers."""
    if tensor.dtype in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return False
    return tensor.dtype.bitwidth % _BYTE_BITS == 0 and tensor.size > 0 and not isinstance(tensor, SparselyStored)


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
    if tensor.dtype not in _WITH_SCALE:
        return _Mark(tuple(_without_sign(_bits(ends), tensor.dtype).tolist()))
    sizes = np.abs(ends.astype(np.float64))
    if not np.isfinite(sizes).all() or not sizes.all():
        return _Mark(tuple("zero" if size == 0 else "number" if np.isfinite(size) else "none" for size in sizes))
    return _Mark("numbers", float(np.log(sizes[0]) - np.log(sizes[1])), _ROUNDINGS * float(np.finfo(ends.dtype).eps))


def _profile(tensor: ir.TensorProtocol) -> _Mark:
    """Return the mark of all elements, whatever their order."""
    flat = elements_of(tensor).reshape(-1)
    pieces = [flat[start : start + _TILE] for start in range(0, flat.size, _TILE)]
    if tensor.dtype not in _WITH_SCALE:
        sums = [0, 0]
        for piece in pieces:
            bits = _without_sign(_bits(piece), tensor.dtype).astype(np.uint64)
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


def view_of(source: ir.TensorProtocol, wanted: ir.TensorProtocol) -> View | None:
    """Return how one comparable tensor is read from another of its dtype and size, every bit the same, or None.

    Every order of axes of either tensor is tried, with a reshape before or behind it. With a change of sign or scale,
    a tensor that holds NaN is never a view: what bits a runtime gives one then is its own business.
    """
    comparison = _Comparison(source, wanted)
    for alignment in _alignments(walk.dims(source), walk.dims(wanted)):
        factor = comparison.factor(alignment)
        if factor is not None:
            return alignment.view(walk.dims(source), walk.dims(wanted), factor)
    return None


@dataclass(frozen=True)
class _Alignment:
    """Which element of a source is which of a tensor: the source in a shape, its axes in another order.

    Attributes:
        dims: The shape, without axes of one element.
        order: The order.
        is_of_source: Whether the shape is the source's own.
    """

    dims: tuple[int, ...]
    order: tuple[int, ...]
    is_of_source: bool = True

    @property
    def is_plain(self) -> bool:
        return self.order == tuple(range(len(self.order)))

    @property
    def result(self) -> tuple[int, ...]:
        return tuple(self.dims[axis] for axis in self.order)

    def places(self, flat: Array) -> Array:
        """Return where in the source the elements at some flat places of the result are."""
        if self.is_plain:
            return flat
        coordinates = np.unravel_index(flat, self.result)
        steps = [math.prod(self.dims[axis + 1 :]) for axis in self.order]
        return sum((one * step for one, step in zip(coordinates, steps, strict=True)), start=np.zeros_like(flat))

    def view(self, source: tuple[int, ...], wanted: tuple[int, ...], factor: float) -> View:
        """Return the view that takes a shape to another one so."""
        if self.is_plain:
            return View(after=None if source == wanted else wanted, factor=factor)
        if not self.is_of_source:
            after = None if self.result == wanted else wanted
            return View(self.dims, self.order, after, factor)
        perm = _full_order(source, wanted, self.order)
        result = tuple(source[axis] for axis in perm)
        return View(None, perm, None if result == wanted else wanted, factor)


def _alignments(source: tuple[int, ...], wanted: tuple[int, ...]) -> Iterator[_Alignment]:
    """Yield every way the elements of one shape may lie in another, the plainest first."""
    long_source, long_wanted = (tuple(size for size in dims if size > 1) for dims in (source, wanted))
    yield _Alignment(long_source, tuple(range(len(long_source))))
    reordered = list(itertools.permutations(range(len(long_source))))[1:]
    mine = [_Alignment(long_source, order) for order in reordered]
    yield from sorted(mine, key=lambda alignment: alignment.result != long_wanted)
    for order in list(itertools.permutations(range(len(long_wanted))))[1:]:
        # The axes of the tensor, put back into the order of the source.
        before = tuple(long_wanted[axis] for axis in order)
        if before != long_source:
            yield _Alignment(before, tuple(int(axis) for axis in np.argsort(order)), is_of_source=False)


def _full_order(source: tuple[int, ...], wanted: tuple[int, ...], order: Sequence[int]) -> tuple[int, ...]:
    """Return an order of all axes from one of those longer than 1, which gives the wanted shape where one does."""
    long = [axis for axis, size in enumerate(source) if size > 1]
    short = iter([axis for axis, size in enumerate(source) if size == 1])
    moved = [long[axis] for axis in order]
    if len(source) != len(wanted) or [source[axis] for axis in moved] != [size for size in wanted if size > 1]:
        return (*moved, *short)
    rest = iter(moved)
    return tuple(next(rest) if size > 1 else next(short) for size in wanted)


class _Comparison:
    """Two tensors compared under alignments: a sample first, then all of both."""

    def __init__(self, source: ir.TensorProtocol, wanted: ir.TensorProtocol) -> None:
        self.dtype = wanted.dtype
        self.source, self.wanted = elements_of(source).reshape(-1), elements_of(wanted).reshape(-1)
        self.places = _sampled(self.wanted.size)
        if self.dtype in _WITH_SCALE and np.count_nonzero(self.wanted[self.places]) < _FEWEST_NONZERO:
            self.places = np.append(self.places, _largest(self.wanted))
        self.sample = self.wanted[self.places]

    def factor(self, alignment: _Alignment) -> float | None:
        """Return what the source, so aligned, must be multiplied by to be the other tensor, or None."""
        found = self.source[alignment.places(self.places)]
        for factor in self._factors(found):
            if _is(found, self.sample, factor) and self._holds(alignment, factor):
                return factor
        return None

    def _factors(self, found: Array) -> Iterator[float]:
        yield 1.0
        if self.dtype in _WITH_SIGN:
            yield -1.0
        if self.dtype not in _WITH_SCALE:
            return
        usable = np.flatnonzero(_is_normal(found) & _is_normal(self.sample))
        if not usable.size:
            return
        place = usable[np.argmax(np.abs(self.sample[usable]))]
        with np.errstate(over="ignore", under="ignore", invalid="ignore"):
            quotient = self.sample[place] / found[place]
            about = np.allclose(found[usable] * quotient, self.sample[usable], rtol=1e-5, atol=0)
        if not about or not np.isfinite(quotient):
            return
        steps = [quotient]
        for _ in range(_STEPS):
            steps = [np.nextafter(steps[0], -np.inf), *steps, np.nextafter(steps[-1], np.inf)]
        # Powers of two first: they can be undone.
        yield from sorted((float(step) for step in steps if abs(step) != 1), key=lambda step: abs(math.frexp(step)[0]))

    def _holds(self, alignment: _Alignment, factor: float) -> bool:
        source: Array = self.source
        wanted: Array = self.wanted
        if alignment.is_plain:
            tiles: Iterable[tuple[slice, ...]] = (
                (slice(start, start + _TILE),) for start in range(0, wanted.size, _TILE)
            )
        else:
            source = source.reshape(alignment.dims).transpose(alignment.order)
            wanted = wanted.reshape(alignment.result)
            tiles = _tiles(alignment.result)
        return all(_is(source[tile], wanted[tile], factor) for tile in tiles)


def _is(source: Array, wanted: Array, factor: float) -> bool:
    """Return whether a factor takes some numbers to others, bit for bit."""
    if factor == 1:
        return bool(np.array_equal(_bits(source), _bits(wanted)))
    # Of ml_dtypes' numbers too, NaN is what does not equal itself.
    if (wanted != wanted).any() or (source != source).any():
        return False
    with np.errstate(over="ignore", under="ignore"):
        made = -source if factor == -1 else source * source.dtype.type(factor)
    return bool(np.array_equal(_bits(made), _bits(wanted)))


def _is_normal(array: Array) -> Array:
    return np.isfinite(array) & (np.abs(array) >= np.finfo(array.dtype).tiny)


def _bits(array: Array) -> Array:
    return array.view(_BITS[array.dtype.itemsize])


def _without_sign(bits: Array, dtype: ir.DataType) -> Array:
    return bits & bits.dtype.type((1 << (dtype.bitwidth - 1)) - 1) if dtype in _WITH_SIGN else bits


def _sampled(size: int) -> Array:
    """Return places spread over a tensor, never in step with its axes."""
    if size <= _SAMPLES:
        return np.arange(size)
    return np.unique(np.random.default_rng(size).integers(0, size, _SAMPLES))


def _largest(flat: Array) -> int:
    """Return the place of the number farthest from zero."""
    best, place = -1.0, 0
    for start in range(0, flat.size, _TILE):
        sizes = np.nan_to_num(np.abs(flat[start : start + _TILE]), nan=0.0, posinf=0.0)
        inner = int(sizes.argmax())
        if sizes[inner] > best:
            best, place = float(sizes[inner]), start + inner
    return place


def _tiles(dims: Sequence[int]) -> Iterator[tuple[slice, ...]]:
    """Yield slices that cover a shape, about as long as wide, so that rows and columns are read in pieces."""
    steps, room = [], _TILE
    for size in reversed(dims):
        steps.append(max(min(size, _TILE_SIDE, room), 1))
        room //= steps[-1]
    ranges = [range(0, size, step) for size, step in zip(dims, reversed(steps), strict=True)]
    for starts in itertools.product(*ranges):
        yield tuple(slice(start, start + one.step) for start, one in zip(starts, ranges, strict=True))
