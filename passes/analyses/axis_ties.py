"""What a rule of the channel analysis sees of a node, and what it can say: which elements of which axes go together.

A rule is a function ``rule(node: NodeAxes, emit: Emit) -> None`` in a table ``{(domain, operator): rule}`` of a file
``axis_rules_*.py``, all of which `axis_rules` puts together. It is called once for every node of its operator, nodes of
nested graphs included, after it was made sure that the rank of every tensor the node reads or writes is known. Weights
are values like any other: a Conv ties axis 1 of its input to axis 1 of its weight.

A rule sees, as a shape rule does (`NodeAxes` is a `shape_facts.Call`): ``node.dims(i)``, ``node.numbers(i)`` (the
elements of a small integer input, if known), ``node.integer("axis", 1)``, ``node.integers("perm")``, ``node.has(i)``,
``node.opset``; and besides ``node.value(i)``, and ``node.input(i, axis)`` and ``node.output(i, axis)``, which are
`Axis`, counted from either end, with `length_of` for the static length (None where the size is symbolic), and
``node.sizes_in(i)`` and ``node.sizes_out(i)`` with the static lengths of all axes.

A rule says, for each axis of each input and output, one of these. An axis nobody says anything of is free: it may
shrink by itself, which holds for an axis that comes from a constant the shrinking mends (Expand, ConstantOfShape).

- ``emit.tie(a, b)``: element i of one goes with element i of the other. Where both sizes are symbolic this says
  nothing; where one is, the other is frozen.
- ``emit.tie(a, b, index_a, index_b)``: element ``index_a[k]`` of a goes with element ``index_b[k]`` of b, for each k;
  None stands for all elements in order. Both may be one axis: ``emit.tie(a, a, None, np.arange(n) % m)``.
- ``emit.tie_values(a, b, skip=...)``: two tensors of one rank, axis by axis, lengths 1 that broadcast left alone.
- ``emit.tie_broadcast(a, b)``: two tensors aligned at the right as numpy does, b being the larger one (the result).
- ``emit.freeze(axis, reason)``: all elements stay, or ``elements=[...]`` of them. The reason completes "it cannot
  shrink: "; the node is kept beside it, so that the reason need not name it.
- ``emit.freeze_value(value, reason, skip=...)``: all axes of a tensor.
- ``emit.mixes(axis)``: the node mixes what it reads over this axis other than by a linear layer. No tie, not frozen.
- ``emit.split(whole, parts, kind)``: one axis is several in one (``whole[i * len(parts[1]) + j]`` is ``parts[0][i]``,
  ``parts[1][j]``; any number of parts, outermost first). One of the parts is cut, and tied to the whole; the others are
  frozen. Which one: of those with more than one element that nothing else freezes, the first where the `Layout` says
  MAJOR for this kind of site, the last where it says MINOR (of heads always the first); but a part cut at an earlier
  site comes first. A symbolic part freezes all the others; parts of length 1 do not count, and one part alone is a
  plain tie.
- ``emit.between(length)``: an axis of no tensor, to say a relation by way of it: a Reshape [a, b] to [c, d] is two
  splits of one axis of a · b elements.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import Literal, NamedTuple, TypeAlias

import numpy as np
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.shape_rules.shape_facts import Call
from graphopt.value_records import fact_of

SplitKind: TypeAlias = Literal["splits", "convolutions", "heads"]


class Axis(NamedTuple):
    """One axis of a value, counted from the front."""

    value: ir.Value
    axis: int


class Side(Enum):
    """Which side of an axis that is split in two may shrink: whole outer indices, or one inner index in all of them."""

    MAJOR = "major"
    MINOR = "minor"


@dataclass(frozen=True)
class Layout:
    """Which side is cut where an axis is two in one.

    Attributes:
        splits: A Reshape that splits or merges axes: MAJOR takes whole heads, MINOR one number of each.
        convolutions: A Conv of several groups with several channels each; of a depthwise one it is always MAJOR.
    """

    splits: Side = Side.MINOR
    convolutions: Side = Side.MINOR


def length_of(axis: Axis) -> int | None:
    """Return how many elements an axis has, or None where that is not known or differs from run to run."""
    dims = fact_of(axis.value).dims
    size = dims[axis.axis] if dims is not None else None
    return size if isinstance(size, int) else None


def sizes_of(value: ir.Value | None) -> tuple[int | None, ...]:
    """Return the lengths of a value's axes, None for a symbolic one; its rank must be known."""
    dims = fact_of(value).dims if value is not None else ()
    assert dims is not None, "rules are called only where ranks are known"
    return tuple(size if isinstance(size, int) else None for size in dims)


class NodeAxes(Call):
    """A node as a rule of the channel analysis sees it."""

    __slots__ = ()

    def __init__(self, node: ir.Node, opset: int) -> None:
        super().__init__(node, [None if value is None else fact_of(value) for value in node.inputs], opset)

    def gives(self, index: int) -> bool:
        """Return whether an output is there and its rank known: also one that nothing reads shrinks."""
        return index < len(self.node.outputs) and fact_of(self.node.outputs[index]).dims is not None

    def value(self, index: int = 0) -> ir.Value:
        """Return an input that is given."""
        value = self.node.inputs[index]
        assert value is not None, "the rule asks whether an input is given"
        return value

    def input(self, index: int, axis: int) -> Axis:
        """Return an axis of an input that is given, counted from either end."""
        return axis_of(self.value(index), axis)

    def output(self, index: int, axis: int) -> Axis:
        """Return an axis of an output, counted from either end."""
        return axis_of(self.node.outputs[index], axis)

    def sizes_in(self, index: int) -> tuple[int | None, ...]:
        """Return the lengths of an input's axes, None for a symbolic one; () where it is left out."""
        return sizes_of(self.node.inputs[index] if index < len(self.node.inputs) else None)

    def sizes_out(self, index: int = 0) -> tuple[int | None, ...]:
        """Return the lengths of an output's axes, None for a symbolic one."""
        return sizes_of(self.node.outputs[index])


def axis_of(value: ir.Value, axis: int) -> Axis:
    """Return an axis of a value of known rank, counted from either end.

    Raises:
        LookupError: It has no such axis.
    """
    rank = len(sizes_of(value))
    if not -rank <= axis < rank:
        raise LookupError(f"axis {axis} of a tensor of rank {rank}")
    return Axis(value, axis % rank)


@dataclass(frozen=True, eq=False)
class Tie:
    """Elements of two axes that go together, pair by pair; without indices, all of them in order."""

    a: Axis
    b: Axis
    index_a: Array | None = None
    index_b: Array | None = None


@dataclass(frozen=True, eq=False)
class Freeze:
    """Elements that must stay; all of them where none are named. Lower turns come first in the graph."""

    axis: Axis
    reason: str
    elements: Array | None
    node: ir.Node | None
    turn: int


@dataclass(frozen=True, eq=False)
class Split:
    """An axis that is several in one, outermost first."""

    whole: Axis
    parts: tuple[Axis, ...]
    kind: SplitKind
    node: ir.Node | None
    turn: int


@dataclass(eq=False)
class Emit:
    """Where rules put what they find.

    Attributes:
        ties: Elements that go together.
        freezes: Elements that stay, in graph order.
        splits: Axes that are several in one, in graph order.
        mixers: Nodes that mix over an axis.
        made_up: Axes of no tensor.
        node: The node whose rule is at work; None for the graph itself.
    """

    ties: list[Tie] = field(default_factory=list)
    freezes: list[Freeze] = field(default_factory=list)
    splits: list[Split] = field(default_factory=list)
    mixers: list[tuple[ir.Node, Axis]] = field(default_factory=list)
    made_up: set[ir.Value] = field(default_factory=set)
    node: ir.Node | None = None
    _turn: int = 0

    def tie(
        self,
        a: Axis,
        b: Axis,
        index_a: Array | Sequence[int] | None = None,
        index_b: Array | Sequence[int] | None = None,
    ) -> None:
        """Say that elements of two axes go together; see the module for the indices."""
        lengths = length_of(a), length_of(b)
        if None in lengths:
            for axis, length in zip((a, b), lengths, strict=True):
                if length is not None and length > 1:
                    self.freeze(axis, "the size it goes with is not known")
            return
        first, second = (None if index is None else np.asarray(index, np.int64) for index in (index_a, index_b))
        counts = [n if index is None else len(index) for n, index in zip(lengths, (first, second), strict=True)]
        if counts[0] != counts[1]:
            for axis in (a, b):
                self.freeze(axis, "what it goes with has another size")
            return
        self.ties.append(Tie(a, b, first, second))

    def tie_values(self, a: ir.Value, b: ir.Value, skip: Collection[int] = ()) -> None:
        """Tie two tensors of one rank axis by axis, but for some, and for lengths 1 that broadcast."""
        for axis in range(len(sizes_of(b))):
            if axis not in skip:
                self._tie_stretched(Axis(a, axis), Axis(b, axis))

    def tie_broadcast(self, a: ir.Value, b: ir.Value, skip: Collection[int] = ()) -> None:
        """Tie a tensor to the result b it is broadcast to, aligned at the right, but for some axes of the result."""
        offset = len(sizes_of(b)) - len(sizes_of(a))
        for axis in range(len(sizes_of(a))):
            if axis + offset >= 0 and axis + offset not in skip:
                self._tie_stretched(Axis(a, axis), Axis(b, axis + offset))

    def _tie_stretched(self, a: Axis, b: Axis) -> None:
        if length_of(a) != 1 or length_of(b) == 1:
            self.tie(a, b)

    def freeze(self, axis: Axis, reason: str, elements: Array | Sequence[int] | None = None) -> None:
        """Say that elements of an axis stay, with the reason in words."""
        if length_of(axis) is None:
            return  # what differs from run to run stays without anybody saying so
        self._turn += 1
        which = None if elements is None else np.asarray(elements, np.int64)
        self.freezes.append(Freeze(axis, reason, which, self.node, self._turn))

    def freeze_value(self, value: ir.Value | None, reason: str, skip: Collection[int] = ()) -> None:
        """Say that all axes of a tensor stay, but for some; one of unknown rank is left alone."""
        dims = fact_of(value).dims if value is not None else None
        for axis in range(len(dims) if dims is not None and value is not None else 0):
            if axis not in skip:
                self.freeze(Axis(value, axis), reason)  # type: ignore[arg-type]

    def mixes(self, axis: Axis) -> None:
        """Say that the node mixes over an axis, so that what is left changes when an element goes."""
        assert self.node is not None, "a node mixes"
        self.mixers.append((self.node, axis))

    def split(self, whole: Axis, parts: Sequence[Axis], kind: SplitKind = "splits") -> None:
        """Say that an axis is several in one, outermost first; parts of one element do not count."""
        parts = [part for part in parts if length_of(part) != 1]
        lengths = [length_of(part) for part in parts]
        if len(parts) == 1:
            self.tie(whole, parts[0])
            return
        if length_of(whole) is None or None in lengths:
            for axis in (whole, *parts):
                self.freeze(axis, "it is split or merged in unknown sizes")
            return
        self._turn += 1
        self.splits.append(Split(whole, tuple(parts), kind, self.node, self._turn))

    def between(self, length: int) -> Axis:
        """Return an axis of no tensor, by way of which relations can be said."""
        value = ir.Value(shape=ir.Shape([length]), type=ir.TensorType(ir.DataType.FLOAT))
        self.made_up.add(value)
        return Axis(value, 0)


AxisRule: TypeAlias = Callable[[NodeAxes, Emit], None]
