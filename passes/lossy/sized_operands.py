"""Integers a node reads as sizes, places or indices, and how to give it others: attribute, constant or computed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.backend import Array

from .cuts import mistake

Numbers = tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Operand:
    """A list of integers that a node is told.

    Attributes:
        node: The node.
        numbers: The integers, None for each that is not known before the model runs.
        attribute: The attribute that holds them, or None.
        index: The input that holds them, where no attribute does.
    """

    node: ir.Node
    numbers: Numbers
    attribute: str | None
    index: int


def operand(node: ir.Node, index: int, *attributes: str) -> Operand | None:
    """Return what a node is told by one of some attributes, else by an input; None where it is told nothing.

    Raises:
        PassCrash: Not even how many integers they are is known.
    """
    for name in attributes:
        if name in node.attributes:
            return Operand(node, tuple(node.attributes[name].as_ints()), name, index)
    value = node.inputs[index] if 0 <= index < len(node.inputs) else None
    if value is None:
        return None
    contents = shapes.contents(value)
    if contents is not None:
        known = [entry if isinstance(entry, int) else None for entry in contents.entries]
        return Operand(node, tuple(known), None, index)
    dims = shapes.static_shape(value)
    if dims is None or len(dims) != 1:
        raise mistake(f"what `{value.name}` holds is not known", node)
    return Operand(node, (None,) * dims[0], None, index)


class Editor:
    """Gives nodes other integers; nodes that read one constant and are to read the same again share the new one.

    Args:
        ctx: What changes the model.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx = ctx
        self._copies: dict[tuple[ir.Value, tuple[int, ...], bytes], ir.Value] = {}
        self._left: dict[ir.Value, None] = {}

    def change(self, told: Operand, numbers: Mapping[int, int]) -> None:
        """Give some of the integers others, by their places; those that are only computed at run time, too."""
        changed = {place: number for place, number in numbers.items() if told.numbers[place] != number}
        if not changed:
            return
        after = [changed.get(place, number) for place, number in enumerate(told.numbers)]
        known = [number for number in after if number is not None]
        if told.attribute is not None:
            self._ctx.rewriter.set_attribute(told.node, told.attribute, known)
        elif len(known) == len(after):
            self.read(told.node, told.index, np.array(known, np.int64))
        else:
            self._overwrite(told, changed)

    def read(self, node: ir.Node, index: int, content: Array) -> None:
        """Let a node read a constant in place of what it reads, in the dtype of that, and its shape if it fits."""
        old = node.inputs[index] if index < len(node.inputs) else None
        if old is None:
            fresh = self._ctx.rewriter.const(content, f"{node.name or node.op_type}_sizes", near=node)
            self._ctx.rewriter.set_input(node, index, fresh)
            return
        tensor = walk.constant_tensor(old)
        if tensor is not None and tensor.size == content.size:
            content = content.reshape(walk.dims(tensor))
        if old.dtype is not None:
            content = content.astype(old.dtype.numpy())
        key = old, content.shape, content.tobytes()
        if key not in self._copies:
            self._copies[key] = self._ctx.rewriter.const(content, f"{old.name}_left", near=node)
        self._replace(node, index, self._copies[key])

    def sweep(self) -> None:
        """Remove what nothing reads any more."""
        while self._left:
            value, _ = self._left.popitem()
            producer = value.producer()
            if producer is None:
                self._ctx.rewriter.remove_if_unread(value)
            elif producer.graph is not None and not walk.is_read(producer):
                self._left.update(dict.fromkeys(walk.values_read(producer)))
                self._ctx.rewriter.erase(producer)

    def _overwrite(self, told: Operand, numbers: Mapping[int, int]) -> None:
        """Put numbers in some places of what is computed at run time."""
        old = told.node.inputs[told.index]
        assert old is not None, "an operand that is no attribute is an input"
        dtype = (old.dtype or ir.DataType.INT64).numpy()
        places, content = np.zeros(len(told.numbers), bool), np.zeros(len(told.numbers), dtype)
        for place, number in numbers.items():
            places[place], content[place] = True, number
        rewriter = self._ctx.rewriter
        fixed = [
            rewriter.const(part, f"{old.name}_{what}", near=told.node)
            for part, what in ((places, "places"), (content, "left"))
        ]
        node = rewriter.make("Where", [fixed[0], fixed[1], old], sources=[told.node], name=f"{old.name}_mended")
        rewriter.insert(node, before=told.node)
        rewriter.set_input(told.node, told.index, node.outputs[0])

    def _replace(self, node: ir.Node, index: int, value: ir.Value) -> None:
        old = node.inputs[index]
        self._ctx.rewriter.set_input(node, index, value)
        if old is not None:
            self._left[old] = None


def numbers_of(told: Operand, places: Sequence[int] | None = None) -> tuple[int, ...]:
    """Return integers that must be known.

    Args:
        told: The operand.
        places: Which of them; all by default.

    Raises:
        PassCrash: One is computed at run time.
    """
    wanted = [told.numbers[place] for place in (range(len(told.numbers)) if places is None else places)]
    known = tuple(number for number in wanted if number is not None)
    if len(known) != len(wanted):
        raise mistake("where it cuts is only known at run time", told.node)
    return known
