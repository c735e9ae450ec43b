"""Rules of the channel analysis for operators that keep the order of elements: Reshape, Flatten, Expand, Tile, ..."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import numpy as np
import onnx_ir as ir

from graphopt.dims import Size
from graphopt.value_records import fact_of

from .axis_factors import shared_factors
from .axis_ties import Axis, AxisRule, Emit, NodeAxes, axis_of, length_of
from .size_origins import size_origins

_UNEVEN = "a Reshape divides it unevenly"
_COMPUTED = "its size is computed while the model runs"
_OF_UNKNOWN_SIZE = "it is merged with, or split from, a size that differs from run to run"


def reshape(node: NodeAxes, emit: Emit) -> None:
    """Axes that stay are tied, those that are split or merged are several in one."""
    data, result = _given(node, 0), node.node.outputs[0]
    tie_reshaped(data, result, emit)
    if node.has(1):
        tie_to_origins(result, node.node.inputs[1], emit)


def flatten(node: NodeAxes, emit: Emit) -> None:
    """What a Reshape to two axes does."""
    tie_reshaped(_given(node, 0), node.node.outputs[0], emit)


def squeeze(node: NodeAxes, emit: Emit) -> None:
    """Axes of 1 go, and say nothing."""
    axes = node.numbers(1) if node.has(1) else node.integers("axes")
    data = _given(node, 0)
    gone = {axis_of(data, axis).axis for axis in axes} if axes is not None else _axes_of_one(data)
    left = [axis for axis in range(len(_dims(data))) if axis not in gone]
    _tie_in_order([Axis(data, axis) for axis in left], _axes(node.node.outputs[0]), emit)


def unsqueeze(node: NodeAxes, emit: Emit) -> None:
    """Axes of 1 come in, and say nothing."""
    axes = node.numbers(1) if node.has(1) else node.integers("axes")
    if axes is None:
        raise LookupError("axes that are not known")
    result = node.node.outputs[0]
    new = {axis_of(result, axis).axis for axis in axes}
    old = [axis for axis in _axes(result) if axis.axis not in new]
    _tie_in_order(_axes(_given(node, 0)), old, emit)


def expand(node: NodeAxes, emit: Emit) -> None:
    """Axes that stay are tied; those that come in are as free as the shape that makes them."""
    result = node.node.outputs[0]
    emit.tie_broadcast(_given(node, 0), result)
    # The shape broadcasts with the tensor: where it says 1, the size is the tensor's.
    tie_to_origins(result, node.node.inputs[1], emit)


def tile(node: NodeAxes, emit: Emit) -> None:
    """Each repeat of an element goes with it; repeats of a single one are as free as their number."""
    data, result = _given(node, 0), node.node.outputs[0]
    times = node.sizes(1)
    for place, axis in enumerate(_axes(data)):
        repeated, length = Axis(result, place), length_of(axis)
        count = times[place] if times is not None else None
        if length is None or not isinstance(count, int):
            emit.freeze(axis, _OF_UNKNOWN_SIZE)
            emit.freeze(repeated, _OF_UNKNOWN_SIZE)
        elif length > 1:
            emit.tie(repeated, axis, None, np.arange(length * count) % length)


def tie_reshaped(data: ir.Value, result: ir.Value, emit: Emit) -> None:
    """Tie two tensors that hold the same elements in the same order."""
    factors = shared_factors(_dims(data), _dims(result))
    parts = [*zip(_axes(data), factors.of_inputs, strict=True), *zip(_axes(result), factors.of_outputs, strict=True)]
    axis_of_factor = _axes_of_factors(parts, factors.sizes, emit)
    for axis, mine in parts:
        if mine is None:
            emit.freeze(axis, _UNEVEN)
        elif len(mine) == 1:
            if axis != axis_of_factor[mine[0]]:
                emit.tie(axis, axis_of_factor[mine[0]])
        elif mine:
            _split(axis, [axis_of_factor.get(factor) for factor in mine], emit)


def _axes_of_factors(
    parts: Sequence[tuple[Axis, tuple[int, ...] | None]], sizes: Sequence[Size], emit: Emit
) -> dict[int, Axis]:
    """Return an axis for each factor: one that is just that, else a made-up one; none for a symbolic size."""
    found: dict[int, Axis] = {}
    for axis, mine in parts:
        if mine is not None and len(mine) == 1:
            found.setdefault(mine[0], axis)
    made_up = {
        factor: emit.between(size) for factor, size in enumerate(sizes) if factor not in found and isinstance(size, int)
    }
    return found | made_up


def _split(whole: Axis, parts: Sequence[Axis | None], emit: Emit) -> None:
    known = [part for part in parts if part is not None and length_of(part) is not None]
    if len(known) == len(parts):
        emit.split(whole, known)
        return
    for axis in (whole, *known):
        emit.freeze(axis, _OF_UNKNOWN_SIZE)


def tie_to_origins(result: ir.Value, shape: ir.Value | None, emit: Emit) -> None:
    """Tie axes whose sizes are read off other tensors with the axes they are read off."""
    axes = _axes(result)
    origins = size_origins(shape)
    if origins is None:
        origins = [None] * len(axes)
    # A shape to broadcast with may be shorter than what comes of it.
    origins = [*[1] * (len(axes) - len(origins)), *origins]
    for axis, origin in zip(axes, origins, strict=True):
        if (length_of(axis) or 1) == 1 or isinstance(origin, int):
            continue
        if origin is None or length_of(origin) not in (1, length_of(axis)):
            emit.freeze(axis, _COMPUTED)
        elif length_of(origin) != 1:
            emit.tie(axis, origin)


def _tie_in_order(some: Sequence[Axis], others: Sequence[Axis], emit: Emit) -> None:
    for a, b in zip(some, others, strict=True):
        emit.tie(a, b)


def _axes_of_one(value: ir.Value) -> set[int]:
    return {axis for axis, size in enumerate(_dims(value)) if size == 1}


def _axes(value: ir.Value) -> list[Axis]:
    return [Axis(value, axis) for axis in range(len(_dims(value)))]


def _dims(value: ir.Value) -> Sequence[Size]:
    dims = fact_of(value).dims
    assert dims is not None, "rules are called only where ranks are known"
    return dims


def _given(node: NodeAxes, index: int) -> ir.Value:
    value = node.node.inputs[index]
    assert value is not None, "an input that must be there"
    return value


VIEW_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        ("", "Reshape"): reshape,
        ("", "Flatten"): flatten,
        ("", "Squeeze"): squeeze,
        ("", "Unsqueeze"): unsqueeze,
        ("", "Expand"): expand,
        ("", "Tile"): tile,
    }
)
