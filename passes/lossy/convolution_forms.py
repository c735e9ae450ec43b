"""Forms of a factored convolution: which smaller ones stand for it, what they cost, and the best weights for them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import numpy as np
import onnx_ir as ir

from graphopt import shapes
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import group_count, inputs_of
from ..solvers.separable import Blocks
from ..solvers.tucker import solve_tucker, tucker_errors

T = TypeVar("T")
Form = Literal["channel", "input", "spatial", "tucker"]
# Ranks looked at of a form, evenly spaced, and of Tucker's two each; more cost time and tell little more.
_MOST_RANKS, _MOST_OF_TWO = 12, 8
# Turns of least squares for an error that only decides which form and rank: the last few hundredths need many more.
_SWEEPS = 2
# Ranks are multiples of half of what widths like to be: kernels of convolutions take half a block as well.
_FINER = 2


@dataclass(frozen=True)
class Piece:
    """One convolution of those that stand for another.

    Attributes:
        outputs: Output channels of a group.
        inputs: Input channels of a group.
        along: The spatial axes, counted from 0, along which it moves as the whole one does; along the others it is one
            position wide.
    """

    outputs: int
    inputs: int
    along: tuple[int, ...]


@dataclass(frozen=True)
class Shape:
    """What of a convolution decides how it may be divided, and what that costs.

    Attributes:
        outputs: Output channels of a group.
        inputs: Input channels of a group.
        groups: How many groups there are.
        kernel: Sizes of the kernel.
        read: Sizes of the input along the spatial axes.
        made: Sizes of the output.
        transposed: Whether it is a ConvTranspose, whose products are one for each position it reads.
    """

    outputs: int
    inputs: int
    groups: int
    kernel: tuple[int, ...]
    read: tuple[int, ...]
    made: tuple[int, ...]
    transposed: bool

    @classmethod
    def of(cls, layer: LinearLayer) -> Shape:
        """Return a layer's; unknown sizes count as one position made, and as many read as it takes a step."""
        dims, groups = layer.dims, group_count(layer)
        kernel = tuple(dims[2:])
        strides = layer.node.attributes.get_ints("strides", [1] * len(kernel))
        transposed = layer.node.op_type == "ConvTranspose"
        read, made = (_sizes(value, len(kernel)) for value in (layer.input, layer.node.outputs[0]))
        fewer, more = (1,) * len(kernel), tuple(strides)
        known = read is not None and made is not None
        outputs = dims[layer.output_axis] // (1 if transposed else groups)
        return cls(
            outputs,
            inputs_of(layer) // math.prod(kernel),
            groups,
            kernel,
            read if read is not None and known else fewer if transposed else more,
            made if made is not None and known else more if transposed else fewer,
            transposed,
        )

    @property
    def axes(self) -> tuple[int, ...]:
        """The spatial axes."""
        return tuple(range(len(self.kernel)))

    def parameters(self, pieces: Sequence[Piece] | None = None) -> int:
        """Return how many weights pieces have, or the whole."""
        chosen = pieces or [Piece(self.outputs, self.inputs, self.axes)]
        return sum(self.groups * one.outputs * one.inputs * self._points(one) for one in chosen)

    def macs(self, pieces: Sequence[Piece] | None = None) -> float:
        """Return the multiplications of pieces for one sample, or of the whole."""
        done: set[int] = set()
        total = 0.0
        for one in pieces or [Piece(self.outputs, self.inputs, self.axes)]:
            before = math.prod(self.made[axis] if axis in done else self.read[axis] for axis in self.axes)
            done.update(one.along)
            behind = math.prod(self.made[axis] if axis in done else self.read[axis] for axis in self.axes)
            positions = before if self.transposed else behind
            total += float(self.groups * one.outputs * one.inputs * self._points(one)) * positions
        return total

    def _points(self, piece: Piece) -> int:
        return math.prod(self.kernel[axis] for axis in piece.along)


@dataclass(frozen=True)
class Way:
    """A form with its ranks.

    Attributes:
        form: ``channel``: k×k to fewer channels, then 1×1; ``input``: 1×1 to fewer, then k×k; ``spatial``: the kernel
            along some axes, then along the others; ``tucker``: 1×1, k×k between fewer channels, 1×1.
        ranks: Channels of a group in between, in order.
        first: Of the first convolution the axes along which it moves.
    """

    form: Form
    ranks: tuple[int, ...]
    first: tuple[int, ...]

    def pieces(self, shape: Shape) -> list[Piece]:
        """Return the convolutions it comes to, in order."""
        rest = tuple(axis for axis in shape.axes if axis not in self.first)
        if self.form == "tucker":
            inner, outer = self.ranks
            return [Piece(inner, shape.inputs, ()), Piece(outer, inner, rest), Piece(shape.outputs, outer, ())]
        (rank,) = self.ranks
        return [Piece(rank, shape.inputs, self.first), Piece(shape.outputs, rank, rest)]


def forms_of(shape: Shape, asked: str) -> list[tuple[Form, tuple[int, ...]]]:
    """Return the forms a convolution can be brought into, each with the axes of its first piece.

    Args:
        shape: The convolution.
        asked: ``auto`` for all of them; ``channel`` for both orders of k×k and 1×1, ``spatial`` or ``tucker``.
    """
    wide = tuple(axis for axis in shape.axes if shape.kernel[axis] > 1)
    found: list[tuple[Form, tuple[int, ...]]] = []
    if asked in ("auto", "channel"):
        found += [] if shape.transposed else [("channel", shape.axes)]
        found += [("input", ())] if wide or shape.transposed else []
    if shape.transposed or not wide:
        return found
    if asked in ("auto", "spatial") and len(wide) > 1:
        found += [("spatial", (axis,)) for axis in wide]
    if asked in ("auto", "tucker"):
        found.append(("tucker", ()))
    return found


class Division:
    """The problem of a layer's weight in forms whose first convolution moves along the same axes.

    Args:
        shape: The convolution.
        first: These axes.
        matrix: W, [outputs, inputs], as `LinearLayer.matrix` gives it.
        moments: H, [groups, inputs, inputs]; None stands for the identity.
    """

    def __init__(self, shape: Shape, first: tuple[int, ...], matrix: Array, moments: Array | None) -> None:
        rank = len(shape.kernel)
        rest = [axis for axis in shape.axes if axis not in first]
        order = [*rest, *first, rank]
        places = np.arange(matrix.shape[1]).reshape(*shape.kernel, shape.inputs).transpose(order).reshape(-1)
        in_order = bool(np.all(places[1:] > places[:-1]))
        blocks = math.prod(shape.kernel[axis] for axis in rest)
        self.shape, self._places = shape, places
        self.parts = []
        for group in range(shape.groups):
            own = matrix[group * shape.outputs : (group + 1) * shape.outputs]
            moment = None if moments is None else moments.reshape(-1, *moments.shape[-2:])[group]
            if not in_order:
                own = own[:, places]
                moment = None if moment is None else moment[np.ix_(places, places)]
            self.parts.append(Blocks(own.reshape(shape.outputs, blocks, -1), moment))

    @property
    def power(self) -> float:
        """What no weight at all would lose."""
        return sum(part.power for part in self.parts)

    def errors(self, ranks: Sequence[int]) -> Array:
        """Return about what is lost with two pieces at some ranks, which rise."""
        return np.asarray(np.sum([part.errors(ranks, sweeps=_SWEEPS) for part in self.parts], axis=0))

    def tucker_errors(self, inner: int) -> Array:
        """Return about what is lost with three pieces of an inner rank, at each outer rank."""
        return np.asarray(np.sum([tucker_errors(part, inner) for part in self.parts], axis=0))

    def solve(self, way: Way) -> Solution:
        """Return the weights of the pieces of a form, which moves first along these axes."""
        kernel, first = self.shape.kernel, way.first
        opening = [size if axis in first else 1 for axis, size in enumerate(kernel)]
        middle = [1 if axis in first else size for axis, size in enumerate(kernel)]
        point = [1] * len(kernel)
        weights: list[list[Array]] = []
        wholes, error = [], 0.0
        for part in self.parts:
            if way.form == "tucker":
                inner, outer = way.ranks
                three = solve_tucker(part, outer, inner)
                sides = [(three.right, opening), (three.core, middle), (three.left, point)]
                wholes.append(three.weight())
                error += three.error
            else:
                two = part.solve(way.ranks[0])
                sides = [(two.right, opening), (two.left, middle)]
                wholes.append(two.weight())
                error += two.error
            weights.append([_as_kernel(side, sizes) for side, sizes in sides])
        matrix = np.concatenate([whole.reshape(len(whole), -1) for whole in wholes])
        back = np.empty_like(matrix)
        back[:, self._places] = matrix
        pieces = tuple(np.concatenate(piece) for piece in zip(*weights, strict=True))
        return Solution(pieces, back, error)


@dataclass(frozen=True, eq=False)
class Solution:
    """Weights of the convolutions that stand for one.

    Attributes:
        weights: Of each, in order, float64 [outputs, inputs of a group, kernel ...].
        matrix: The weight they come to together, float64 [outputs, inputs], as `LinearLayer.matrix` orders it.
        error: What is lost, tr((W−Ŵ) H (W−Ŵ)ᵀ).
    """

    weights: tuple[Array, ...]
    matrix: Array
    error: float


def ways_with_errors(
    shape: Shape, asked: str, matrix: Array, moments: Array | None, multiple: int
) -> list[tuple[Way, float]]:
    """Return the ways to divide a convolution that save weights and multiplications, with the share each loses.

    Args:
        shape: The convolution.
        asked: The forms, as `forms_of` takes them.
        matrix: W, [outputs, inputs].
        moments: H, [groups, inputs, inputs], or None.
        multiple: What widths like to be multiples of.
    """
    forms = forms_of(shape, asked)
    found: list[tuple[Way, float]] = []
    for first in dict.fromkeys(axes for _, axes in forms):
        ways = [ways_of(shape, form, first, multiple) for form, axes in forms if axes == first]
        if any(ways):
            # Each holds an H in an order of its own, so that there is one at a time.
            division = Division(shape, first, matrix, moments)
            power = division.power
            for own in ways:
                shares = (error / power if power > 0 else 0.0 for error in _errors(division, own))
                found += zip(own, shares, strict=True)
    return found


def _errors(division: Division, ways: Sequence[Way]) -> list[float]:
    """Return about what is lost with each of the ways of a form."""
    if not ways or ways[0].form != "tucker":
        return [float(error) for error in division.errors([way.ranks[0] for way in ways])]
    of_inner = {inner: division.tucker_errors(inner) for inner in {way.ranks[0] for way in ways}}
    found = []
    for inner, outer in (way.ranks for way in ways):
        errors = of_inner[inner]
        found.append(float(errors[min(outer, len(errors) - 1)]))
    return found


def ways_of(shape: Shape, form: Form, first: tuple[int, ...], multiple: int) -> list[Way]:
    """Return the ranks worth a look, rising."""
    before = shape.inputs * math.prod(shape.kernel[axis] for axis in first)
    behind = shape.outputs * math.prod(size for axis, size in enumerate(shape.kernel) if axis not in first)
    narrow = min(shape.inputs, shape.outputs)
    step = max(1, multiple // _FINER) if narrow >= multiple else max(1, multiple // _FINER**2) if narrow > 2 else 1
    if form == "tucker":
        inner, outer = (_thinned(range(step, size, step), _MOST_OF_TWO) for size in (shape.inputs, shape.outputs))
        ways = [Way(form, (one, other), first) for one in inner for other in outer]
    else:
        ways = [Way(form, (rank,), first) for rank in range(step, min(before, behind), step)]
    saving = [way for way in ways if _saves(shape, way)]
    return saving if form == "tucker" else _thinned(saving, _MOST_RANKS)


def _saves(shape: Shape, way: Way) -> bool:
    pieces = way.pieces(shape)
    return shape.parameters(pieces) < shape.parameters() and shape.macs(pieces) < shape.macs()


def _thinned(items: Sequence[T], most: int) -> list[T]:
    """Return so many items, evenly spaced, the last one among them."""
    if len(items) <= most:
        return list(items)
    return [items[round((at + 1) * len(items) / most) - 1] for at in range(most)]


def _as_kernel(side: Array, sizes: Sequence[int]) -> Array:
    """Return a factor [outputs, (positions and) channels], channels fastest, as [outputs, channels, kernel ...]."""
    return np.ascontiguousarray(np.moveaxis(side.reshape(len(side), *sizes, -1), -1, 1))


def _sizes(value: ir.Value, rank: int) -> tuple[int, ...] | None:
    """Return the spatial sizes of a value, None where one is unknown."""
    dims = shapes.dims_of(value)
    if dims is None or len(dims) != rank + 2 or not all(isinstance(dim, int) for dim in dims[2:]):
        return None
    return tuple(dim for dim in dims[2:] if isinstance(dim, int))
