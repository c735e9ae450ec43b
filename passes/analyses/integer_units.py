"""Integer units: which operators pay to run in integers on a target, and which values share a scale.

A runtime fuses an operator into an integer kernel only if every input comes from a DequantizeLinear and every
output goes to a QuantizeLinear; Q and DQ around anything else only cost time. So operators are chosen together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.target import IntegerScheme, Target

from .linear_layers import LinearLayer, as_linear_layer, linear_layers, readers_elsewhere
from .selection import Selection

_LINEAR_OPS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
_ACTIVATIONS = ("Relu", "Clip")
# Kernels of these write floats as well as integers, so their output is quantized only for a reader in integers.
_FLOAT_OUTPUT_OPS = ("Gemm", "MatMul")
# Operators that move values of any dtype: where a runtime does not fuse Q and DQ around them, they can be given
# the integers themselves. Operator -> first version that takes 8-bit integers.
_ANY_DTYPE_MOVES = {"DepthToSpace": 13, "Pad": 13, "SpaceToDepth": 13, "Split": 2, "Tile": 6}
_FIRST_VERSIONS = {"MaxPool": 12, "Resize": 10}
_OPERANDS = {"Add": 2, "Mul": 2, "MatMul": 2}

Kind = Literal["linear", "join", "move"]


@dataclass(frozen=True, eq=False)
class Unit:
    """An operator that runs in integers, with the activation behind it.

    Attributes:
        node: The operator.
        kind: ``linear`` computes with weights, ``join`` has an integer kernel of its own, ``move`` only moves
            or selects values, so that its inputs and outputs share one scale.
        inputs: (Position, value) of each activation it reads.
        tail: The Relu or Clip that ends it, or None.
        layer: The linear layer, where it has constant weights.
        on_integers: Whether it reads the integers themselves, with no Q and DQ around it.
    """

    node: ir.Node
    kind: Kind
    inputs: tuple[tuple[int, ir.Value], ...]
    tail: ir.Node | None = None
    layer: LinearLayer | None = None
    on_integers: bool = False

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """The values that later nodes read."""
        return tuple(self.tail.outputs if self.tail is not None else self.node.outputs)


@dataclass(frozen=True)
class IntegerUnits:
    """What runs in integers.

    Attributes:
        units: In graph order.
        left: (Operator, reason) of what could have run in integers but does not, and how often.
        wanted: Values some unit reads as integers.
    """

    units: tuple[Unit, ...]
    left: Counter[tuple[str, str]]
    wanted: frozenset[ir.Value]

    def quantizes_output(self, unit: Unit, scheme: IntegerScheme) -> bool:
        """Return whether a unit's output becomes integers."""
        if unit.kind != "linear" or any(value in self.wanted for value in unit.outputs):
            return True
        # A kernel that rescales to float by itself (float bias) needs no Q behind it either.
        return unit.node.op_type not in _FLOAT_OUTPUT_OPS and scheme.bias == "int32"

    def scale_groups(self) -> dict[ir.Value, ir.Value]:
        """Return for each value in integers the one that stands for all that share its scale."""
        groups = _Groups()
        for unit in self.units:
            for _, value in unit.inputs:
                groups.find(value)
            for value in unit.outputs:
                groups.find(value)
            if unit.kind == "move":
                for value in unit.outputs:
                    groups.join(unit.inputs[0][1], value)
            if unit.node.op_type == "Concat":
                # What only the Concat reads is rounded once, to its scale, instead of twice.
                for _, value in unit.inputs:
                    if walk.constant_tensor(value) is None and len(value.uses()) == 1 and not value.is_graph_output():
                        groups.join(unit.outputs[0], value)
        return {value: groups.find(value) for value in list(groups.parent)}


def integer_units(model: ir.Model, target: Target, scheme: IntegerScheme, selection: Selection) -> IntegerUnits:
    """Return the operators of the main graph that pay to run in integers on a target.

    Linear layers always do. Another operator does where its result is read in integers and what it reads is there
    in integers anyway; as such operators lean on each other, all are assumed to and those that do not are dropped
    until nothing changes.
    """
    search = _Search(model, target, scheme, selection)
    units = {node: unit for node in model.graph if (unit := search.unit_of(node)) is not None}
    while rejected := [unit for unit in units.values() if unit.kind != "linear" and not _pays(unit, units)]:
        for unit in rejected:
            del units[unit.node]
    search.note_float_operators(units)
    wanted = frozenset(value for unit in units.values() for _, value in unit.inputs)
    return IntegerUnits(tuple(units.values()), search.left, wanted)


def _pays(unit: Unit, units: Mapping[ir.Node, Unit]) -> bool:
    wanted = any(_readers_in_integers(value, units) for value in unit.outputs)
    return wanted and any(_held(value, units) for _, value in unit.inputs)


def _held(value: ir.Value, units: Mapping[ir.Node, Unit]) -> bool:
    """Return whether a value is there in integers whether or not the unit asking runs in integers."""
    producer = value.producer()
    if producer is not None and _unit_ending_in(producer, units) is not None:
        return True
    return any(reader.kind == "linear" for reader in _readers_in_integers(value, units))


def _unit_ending_in(node: ir.Node, units: Mapping[ir.Node, Unit]) -> Unit | None:
    unit = units.get(node)
    if unit is not None:
        return unit if unit.tail is None else None
    source = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
    unit = units.get(source) if source is not None else None
    return unit if unit is not None and unit.tail is node else None


def _readers_in_integers(value: ir.Value, units: Mapping[ir.Node, Unit]) -> list[Unit]:
    readers = (units.get(use.node) for use in value.uses())
    return [unit for unit in readers if unit is not None and any(read is value for _, read in unit.inputs)]


@dataclass
class _Search:
    """Finds the operators that can run in integers, and says why others cannot."""

    model: ir.Model
    target: Target
    scheme: IntegerScheme
    selection: Selection
    left: Counter[tuple[str, str]] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        self.opset = walk.opset(self.model)
        self.layers = linear_layers(self.model)

    def unit_of(self, node: ir.Node) -> Unit | None:
        """Return a node as a unit, were all around it in integers; None where it cannot be one."""
        if not walk.is_onnx_op(node, node.op_type):
            return None
        layer = as_linear_layer(node)
        kind = self._kind(node, layer)
        if kind is None:
            return None
        reason = self._obstacle(node, layer)
        if reason is not None:
            if kind == "linear":
                self.left[node.op_type, reason] += 1
            return None
        on_integers = kind == "move" and node.op_type not in self.target.shared_scale_ops
        return Unit(node, kind, tuple(_activations(node, kind, layer)), _tail(node), layer, on_integers)

    def note_float_operators(self, units: Mapping[ir.Node, Unit]) -> None:
        """Count the operators that stay float between operators in integers, for want of a kernel."""
        known = self.target.integer_ops | self.target.shared_scale_ops | set(_ANY_DTYPE_MOVES)
        for node in self.model.graph:
            if node.op_type in known or node in units or not walk.is_onnx_op(node, node.op_type):
                continue
            producer = node.inputs[0].producer() if node.inputs and node.inputs[0] is not None else None
            if producer is not None and (unit := _unit_ending_in(producer, units)) and unit.tail is not node:
                self.left[node.op_type, "no integer kernel on this target"] += 1

    def _kind(self, node: ir.Node, layer: LinearLayer | None) -> Kind | None:
        if node.op_type in self.target.integer_ops:
            return "linear" if layer is not None or node.op_type in _LINEAR_OPS else "join"
        if node.op_type in self.target.shared_scale_ops:
            return "move"
        # Only where the target fuses moves at all is it known to keep integers in between.
        return "move" if node.op_type in _ANY_DTYPE_MOVES and self.target.shared_scale_ops else None

    def _obstacle(self, node: ir.Node, layer: LinearLayer | None) -> str | None:
        """Return why a node cannot run in integers, or None if it can."""
        if not self.selection.allows(node):
            return "excluded"
        if layer is None and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            return "its weight is no constant"
        if any(value.dtype not in (None, ir.DataType.FLOAT) for value in _floats(node)):
            return "not float32"
        if layer is not None:
            return self._weight_obstacle(layer)
        return self._version_obstacle(node)

    def _weight_obstacle(self, layer: LinearLayer) -> str | None:
        if layer.weight_index == 0:
            return "its weight is the left factor"
        others = readers_elsewhere(layer, self.layers)
        if others:
            return f"its weight is also read by {others[0].op_type}"
        if layer.bias is not None and self.scheme.bias == "int32" and not _is_channel_bias(layer):
            return "its bias is no constant per channel"
        return None

    def _version_obstacle(self, node: ir.Node) -> str | None:
        first = _FIRST_VERSIONS.get(node.op_type, _ANY_DTYPE_MOVES.get(node.op_type, 1))
        if self.opset < first:
            return f"takes integers only from opset {first}"
        if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
            return "interpolates"
        if node.op_type == "MaxPool" and len(node.outputs) > 1:
            return "also returns indices"
        if node.op_type == "Pad" and not _pads_zeros(node):
            return "pads with other values than zero"
        return None


def _floats(node: ir.Node) -> Iterator[ir.Value]:
    yield from (value for value in node.inputs[:1] if value is not None)
    yield from node.outputs[:1]


def _activations(node: ir.Node, kind: Kind, layer: LinearLayer | None) -> Iterator[tuple[int, ir.Value]]:
    """Yield the position and value of each activation a node reads; of shapes and indices, none."""
    if layer is not None:
        yield 1 - layer.weight_index, layer.input
        return
    count = len(node.inputs) if node.op_type == "Concat" else _OPERANDS.get(node.op_type, 1)
    for index, value in enumerate(node.inputs[: 1 if kind == "move" else count]):
        if value is not None:
            yield index, value


def _tail(node: ir.Node) -> ir.Node | None:
    """Return the Relu or Clip that is the only reader of a node, and clips to constants around zero."""
    output = node.outputs[0]
    if len(node.outputs) > 1 or output.is_graph_output() or len(output.uses()) != 1:
        return None
    (use,) = output.uses()
    tail = use.node
    if tail.graph is not node.graph or use.idx != 0 or not walk.is_onnx_op(tail, *_ACTIVATIONS):
        return None
    return tail if tail.op_type == "Relu" or _clips_around_zero(tail) else None


def _clips_around_zero(clip: ir.Node) -> bool:
    """Return whether a Clip has constant bounds with zero between, which a range that holds zero can replace."""
    low, high = clip.attributes.get_float("min", -np.inf), clip.attributes.get_float("max", np.inf)
    bounds = [low, high]
    for index, value in enumerate(clip.inputs[1:3]):
        if value is None:
            continue
        tensor = walk.constant_tensor(value)
        if tensor is None:
            return False
        bounds[index] = float(tensor.numpy().item())
    return bounds[0] <= 0.0 <= bounds[1]


def _is_channel_bias(layer: LinearLayer) -> bool:
    tensor = walk.constant_tensor(layer.bias)
    weight = walk.constant_tensor(layer.weight)
    if tensor is None or weight is None:
        return False
    shape = tuple(tensor.shape)
    # A Gemm adds any shape that broadcasts to [rows, channels]; only one value per channel fits the kernel.
    return len(shape) > 0 and shape[-1] == weight.shape[layer.output_axis] and tensor.size == shape[-1]


def _pads_zeros(node: ir.Node) -> bool:
    if node.attributes.get_string("mode", "constant") != "constant":
        return True
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    tensor = walk.constant_tensor(node.inputs[2])
    return tensor is not None and not np.any(tensor.numpy())


class _Groups:
    """Disjoint sets of values (union by parent links, with path halving)."""

    def __init__(self) -> None:
        self.parent: dict[ir.Value, ir.Value] = {}

    def find(self, value: ir.Value) -> ir.Value:
        self.parent.setdefault(value, value)
        while self.parent[value] is not value:
            self.parent[value] = self.parent[self.parent[value]]
            value = self.parent[value]
        return value

    def join(self, one: ir.Value, other: ir.Value) -> None:
        self.parent[self.find(other)] = self.find(one)
