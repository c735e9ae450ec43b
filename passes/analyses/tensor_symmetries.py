"""How a tensor is read from another one that holds the same numbers in another order, shape, sign or scale.

A sample is compared for every order of axes, and what agrees there is compared in all its bits, a tile at a time.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.sparse import SparselyStored

from .tensor_content import bits_of, elements_of

# Elements compared for each order of axes before all are.
_SAMPLES = 128
# With fewer numbers other than zero among them a sample says little about a scale, and the largest one is added.
_FEWEST_NONZERO = 4
# Elements of a tile: both sides of it stay in the cache.
_TILE = 1 << 18
_TILE_SIDE = 512
# A quotient of two rounded numbers is so many steps, at most, from the factor that was rounded.
_STEPS = 3
_BYTE_BITS = 8
WITH_SIGN = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
# A product of these is rounded once, wherever it is computed.
WITH_SCALE = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE})


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

    @property
    def kind(self) -> str:
        """What it does, in words."""
        said = ["transposed"] if self.perm is not None else []
        if self.before is not None or self.after is not None:
            said.append("reshaped")
        if self.factor != 1:
            said.append("negated" if self.factor == -1 else "scaled")
        return ", ".join(said) or "equal"

    def __str__(self) -> str:
        return self.kind.replace("scaled", f"times {self.factor:.6g}")


def is_comparable(tensor: ir.TensorProtocol) -> bool:
    """Return whether a tensor is of whole bytes, stored densely, and not of text or complex numbers."""
    if tensor.dtype in (ir.DataType.STRING, ir.DataType.COMPLEX64, ir.DataType.COMPLEX128):
        return False
    return tensor.dtype.bitwidth % _BYTE_BITS == 0 and tensor.size > 0 and not isinstance(tensor, SparselyStored)


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
        if self.dtype in WITH_SCALE and np.count_nonzero(self.wanted[self.places]) < _FEWEST_NONZERO:
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
        if self.dtype in WITH_SIGN:
            yield -1.0
        if self.dtype not in WITH_SCALE:
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
        return bool(np.array_equal(bits_of(source), bits_of(wanted)))
    # Of ml_dtypes' numbers too, NaN is what does not equal itself.
    if (wanted != wanted).any() or (source != source).any():
        return False
    with np.errstate(over="ignore", under="ignore"):
        made = -source if factor == -1 else source * source.dtype.type(factor)
    return bool(np.array_equal(bits_of(made), bits_of(wanted)))


def _is_normal(array: Array) -> Array:
    normal: Array = np.isfinite(array) & (np.abs(array) >= np.finfo(array.dtype).tiny)
    return normal


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
