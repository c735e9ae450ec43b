"""Cuts: which elements of which axes of which values are to go, whatever groups they are units of."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt import shapes
from graphopt.backend import Array
from graphopt.errors import PassCrash
from graphopt.shape_rules.shape_facts import Dims

from ..analyses.channel_groups import ChannelGroup

_NOT_YOURS = "this is a mistake of graphopt, not yours; report it, and leave the pass out until then"


class Cuts:
    """What is kept of each axis, and the sizes of all values before and after.

    Several groups may have elements on one axis, and several axes of a value may be cut.

    Args:
        kept: For each group, bool [size of the group]: the units that stay.

    Raises:
        PassCrash: Nothing of a group would be left, or a group does not fit the values it names.
    """

    def __init__(self, kept: Mapping[ChannelGroup, Array]) -> None:
        self._kept: dict[ir.Value, dict[int, Array]] = {}
        self._dims: dict[ir.Value, Dims | None] = {}
        for group, units in kept.items():
            if units.dtype != np.bool_ or units.shape != (group.size,) or not units.any():
                raise mistake(f"`{group.name}` of {group.size} channels cannot be left with {int(units.sum())} of them")
            for (value, axis), numbers in () if units.all() else group.axes.items():
                # Units are numbered from 0, elements of no unit are -1: these are read off the end.
                self._cut(value, axis, np.append(units, True)[numbers], group)

    def _cut(self, value: ir.Value, axis: int, stays: Array, group: ChannelGroup) -> None:
        dims = self.dims(value)
        if dims is None or not 0 <= axis < len(dims) or dims[axis] != len(stays):
            raise mistake(f"`{group.name}` has {len(stays)} elements on axis {axis} of `{value.name}`, which is {dims}")
        axes = self._kept.setdefault(value, {})
        axes[axis] = axes[axis] & stays if axis in axes else stays
        if not axes[axis].any():
            raise mistake(f"nothing would be left of axis {axis} of `{value.name}`")
        if axes[axis].all():
            del axes[axis]

    def __iter__(self) -> Iterator[ir.Value]:
        """Go through the values of which an axis is cut, in the order of the groups."""
        return (value for value, axes in self._kept.items() if axes)

    def of(self, value: ir.Value | None) -> Mapping[int, Array]:
        """Return what is kept of each axis of a value that is cut: bool [length of the axis]."""
        return self._kept.get(value, {}) if value is not None else {}

    def dims(self, value: ir.Value | None) -> Dims | None:
        """Return the dimensions a value had before anything was cut, asked then for the first time."""
        if value is None:
            return None
        if value not in self._dims:
            self._dims[value] = shapes.dims_of(value)
        return self._dims[value]

    def length(self, value: ir.Value | None, axis: int) -> int | None:
        """Return how many elements an axis had, or None where that varies or is not known."""
        dims = self.dims(value)
        size = dims[axis] if dims is not None and axis < len(dims) else None
        return size if isinstance(size, int) else None

    def new_length(self, value: ir.Value | None, axis: int) -> int | None:
        """Return how many elements of an axis are left, or None where that varies or is not known."""
        stays = self.of(value).get(axis)
        return int(stays.sum()) if stays is not None else self.length(value, axis)

    def stays(self, value: ir.Value | None, axis: int) -> Array:
        """Return what is kept of an axis, bool [its length], cut or not.

        Raises:
            PassCrash: The axis is not cut, and of unknown length.
        """
        found = self.of(value).get(axis)
        if found is not None:
            return found
        length = self.length(value, axis)
        if length is None:
            raise mistake(f"axis {axis} of `{value.name if value is not None else '?'}` has no known length")
        return np.ones(length, bool)

    def touches(self, node: ir.Node) -> bool:
        """Return whether an input or an output of a node is cut."""
        return any(self.of(value) for value in (*node.inputs, *node.outputs))


def mistake(text: str, node: ir.Node | None = None) -> PassCrash:
    """Return the error to raise where channels that were to go together do not fit each other.

    Args:
        text: What does not fit.
        node: Where.
    """
    where = f"at `{node.name or node.outputs[0].name}` ({node.op_type}), " if node is not None else ""
    return PassCrash(f"channels cannot be removed: {where}{text}", hint=_NOT_YOURS)
