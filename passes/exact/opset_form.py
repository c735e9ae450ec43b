"""What a node becomes in another opset, written down before anything is edited."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array


class Refused(Exception):
    """Why a node cannot be said in a newer opset."""


@dataclass(frozen=True, eq=False)
class Fixed:
    """A constant to be made."""

    array: Array
    name: str


@dataclass(frozen=True, eq=False)
class Made:
    """A node to be made; stands for its first output."""

    op_type: str
    inputs: tuple[Operand, ...]
    attributes: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Itself:
    """The first output of the converted node."""


Operand = ir.Value | Fixed | Made | Itself | None


@dataclass(frozen=True)
class Form:
    """A node on its way through the opsets.

    Attributes:
        node: The node as it stands in the model.
        to: The opset it is converted to.
        op_type: Operator.
        inputs: What it reads.
        attributes: Its attributes.
        outputs: How many outputs it has.
        itself: The first output of the converted node.
        result: What takes the place of the first output of the node.
    """

    node: ir.Node
    to: int
    op_type: str
    inputs: tuple[Operand, ...]
    attributes: Mapping[str, ir.Attr]
    outputs: int
    itself: Itself
    result: Itself | Made

    @classmethod
    def of(cls, node: ir.Node, to: int) -> Form:
        """Return a node as it stands, on its way to an opset."""
        itself = Itself()
        return cls(node, to, node.op_type, tuple(node.inputs), dict(node.attributes), len(node.outputs), itself, itself)

    @property
    def stays(self) -> bool:
        """Whether the node itself can be changed, instead of another taking its place."""
        same = self.op_type == self.node.op_type and self.outputs == len(self.node.outputs)
        return same and self.result is self.itself

    @property
    def dtype(self) -> ir.DataType:
        """The dtype of its first input.

        Raises:
            Refused: It is not known.
        """
        first = self.node.inputs[0]
        if first is None or first.dtype is None:
            raise Refused("the dtype of its input is unknown")
        return first.dtype

    def input(self, index: int) -> Operand:
        """Return an input, None where it is left out."""
        return self.inputs[index] if index < len(self.inputs) else None

    def get(self, name: str, default: Any = None) -> Any:
        """Return what an attribute holds.

        Raises:
            Refused: It is an attribute of a function, given by whoever calls it.
        """
        attribute = self.attributes.get(name)
        if attribute is None:
            return default
        if attribute.is_ref():
            raise Refused(f"its attribute `{name}` is one of a function, unknown before a call")
        return list(attribute.value) if isinstance(attribute.value, tuple) else attribute.value

    def with_attributes(self, **changed: Any) -> Form:
        """Return the form with some attributes changed; None removes one."""
        attributes = {name: kept for name, kept in self.attributes.items() if name not in changed}
        given = {name: value for name, value in changed.items() if value is not None}
        attributes.update((one.name, one) for one in ir.convenience.convert_attributes(given))
        return replace(self, attributes=attributes)

    def with_inputs(self, *inputs: Operand) -> Form:
        """Return the form with other inputs; those left out at the end are dropped."""
        kept = list(inputs)
        while kept and kept[-1] is None:
            kept.pop()
        return replace(self, inputs=tuple(kept))

    def integers(self, name: str) -> Fixed | None:
        """Return an attribute of integers as an int64 constant, or None where it is absent."""
        value = self.get(name)
        return None if value is None else Fixed(np.array(value, np.int64), self.named(name))

    def named(self, role: str) -> str:
        """Return a name for a constant of the node."""
        return f"{self.node.name or self.node.outputs[0].name or self.op_type}_{role}"


def known(operand: Operand) -> Array | None:
    """Return what a constant operand holds, or None where it may vary."""
    if isinstance(operand, Fixed):
        return operand.array
    if not isinstance(operand, ir.Value):
        return None
    tensor = walk.constant_tensor(operand)
    return tensor.numpy() if tensor is not None else None


def read_outputs(node: ir.Node) -> Sequence[int]:
    """Return the indices of a node's outputs that something reads."""
    return [i for i, value in enumerate(node.outputs) if value.uses() or value.is_graph_output()]


Adapter = Callable[[Form], Form]
