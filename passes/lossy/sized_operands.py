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
    value = node.inputs[index] if index < len(node.inputs) else None
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
        self._overwritten: dict[
            tuple[ir.Value, ir.Graph | ir.Function | None, tuple[tuple[int, int], ...]], ir.Value
        ] = {}
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
        """Put numbers in some places of what is computed at run time, in one go with what was put there before."""
        node, old = told.node, told.node.inputs[told.index]
        assert old is not None, "an operand that is no attribute is an input"
        base, before = _written_over(old)
        assert base is not None, "a Where chooses between two values"
        numbers = dict(sorted({**before, **numbers}.items()))
        # Nodes of one graph are met in its order: what the first of them reads is there for the others.
        key = base, node.graph, tuple(numbers.items())
        if key not in self._overwritten:
            self._overwritten[key] = self._chosen(base, numbers, len(told.numbers), node)
        self._replace(node, told.index, self._overwritten[key])

    def _chosen(self, base: ir.Value, numbers: Mapping[int, int], count: int, node: ir.Node) -> ir.Value:
        dtype = (base.dtype or ir.DataType.INT64).numpy()
        places, content = np.zeros(count, bool), np.zeros(count, dtype)
        for place, number in numbers.items():
            places[place], content[place] = True, number
        rewriter = self._ctx.rewriter
        where = rewriter.const(places, f"{base.name}_places", near=node)
        what = rewriter.const(content, f"{base.name}_left", near=node)
        choice = rewriter.make("Where", [where, what, base], sources=[node], name=f"{base.name}_mended")
        rewriter.insert(choice, before=node)
        return choice.outputs[0]

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


def _written_over(value: ir.Value) -> tuple[ir.Value | None, dict[int, int]]:
    """Return what a value is but for some places, and the numbers in these, where a Where puts them there."""
    node = value.producer()
    if node is None or not walk.is_onnx_op(node, "Where"):
        return value, {}
    where, what = (walk.constant_tensor(part) for part in node.inputs[:2])
    if where is None or what is None or walk.dims(where) != walk.dims(what) or len(walk.dims(where)) != 1:
        return value, {}
    if shapes.static_shape(node.inputs[2]) != walk.dims(where):
        return value, {}
    content = what.numpy()
    return node.inputs[2], {int(place): int(content[place]) for place in np.flatnonzero(where.numpy())}
