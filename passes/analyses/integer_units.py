"""Integer units: which operators pay to run in integers on a target.

A runtime fuses an operator into an integer kernel only if every input comes from a DequantizeLinear and every
output goes to a QuantizeLinear; Q and DQ around anything else only cost time. So operators are chosen together.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.target import IntegerScheme, Target
from graphopt.unfit_layers import has_narrow_groups, is_depthwise

from .integer_candidates import OPERANDS, Candidates, Unit, is_quantized
from .linear_layers import LINEAR_OPS, LinearLayer
from .selection import Selection

# Kernels of these write floats as well as integers, so their output is quantized only for a reader in integers.
_FLOAT_OUTPUT_OPS = ("Gemm", "MatMul")
# Operators whose result spans little more than what they read, so that one more rounding is harmless.
_SUMS = ("Add", "Concat")


@dataclass(frozen=True)
class IntegerUnits:
    """What runs in integers.

    Attributes:
        units: In graph order.
        left: (Operator, reason) of what could have run in integers but does not, and how often.
        wanted: Values some unit reads as integers.
        scheme: What integers the target's kernels take.
    """

    units: tuple[Unit, ...]
    left: Counter[tuple[str, str]]
    wanted: frozenset[ir.Value]
    scheme: IntegerScheme

    def quantizes_output(self, unit: Unit) -> bool:
        """Return whether a unit's output becomes integers where it is made, not only where it is read."""
        if not self.scheme.quantize_outputs or any(is_quantized(value) for value in unit.outputs):
            return False
        if unit.kind != "linear" or any(value in self.wanted for value in unit.outputs):
            return True
        # A kernel that rescales to float by itself (float bias) needs no Q behind it either.
        return unit.node.op_type not in _FLOAT_OUTPUT_OPS and self.scheme.bias == "int32"

    def values(self) -> list[ir.Value]:
        """Return each value held in integers, once."""
        made = {unit: unit.outputs if self.quantizes_output(unit) else () for unit in self.units}
        return list(dict.fromkeys(value for unit in self.units for value in (*unit.read(), *made[unit])))


def integer_units(model: ir.Model, target: Target, scheme: IntegerScheme, selection: Selection) -> IntegerUnits:
    """Return the operators of the main graph that pay to run in integers on a target.

    Linear layers always do. Another operator does where its result is read in integers and what it reads is there
    in integers anyway; as such operators lean on each other, all are assumed to and those that do not are dropped
    until nothing changes.
    """
    candidates = Candidates(model, target, scheme, selection)
    units = _Units(unit for node in model.graph if (unit := candidates.unit_of(node)) is not None)
    _drop_what_pays_not(units)
    slow = _slow_ends(units, scheme)
    units.drop(slow)
    _drop_what_pays_not(units)
    alone = dict.fromkeys(_lone(units, scheme), "a depthwise convolution that no integers lead to or from")
    units.drop(alone)
    candidates.obstacles.update((unit.node, why) for unit, why in (slow | alone).items())
    chosen = tuple(units.by_node.values())
    wanted = frozenset(value for unit in chosen for value in unit.read())
    return IntegerUnits(chosen, _left(model, candidates, units), wanted, scheme)


class _Units:
    """Units by their operator and by the node they end in."""

    def __init__(self, units: Iterable[Unit]) -> None:
        self.by_node = {unit.node: unit for unit in units}
        for adder in [unit.adder for unit in self.by_node.values() if unit.adder is not None]:
            self.by_node.pop(adder, None)
        self.by_end = {unit.end: unit for unit in self.by_node.values()}

    def drop(self, units: Iterable[Unit]) -> None:
        for unit in units:
            del self.by_node[unit.node], self.by_end[unit.end]

    def make(self, value: ir.Value) -> bool:
        """Return whether a unit makes a value."""
        producer = value.producer()
        return producer is not None and producer in self.by_end

    def reading(self, value: ir.Value) -> list[Unit]:
        """Return the units that read a value as an activation."""
        readers = (self.by_node.get(use.node) for use in value.uses())
        return [unit for unit in readers if unit is not None and any(read is value for read in unit.read())]

    def hold(self, node: ir.Node) -> bool:
        """Return whether a node belongs to a unit."""
        if node in self.by_node or node in self.by_end:
            return True
        return any(unit.core is node for unit in self.by_node.values() if unit.adder is not None)


def _drop_what_pays_not(units: _Units) -> None:
    while rejected := [unit for unit in units.by_node.values() if unit.kind != "linear" and not _pays(unit, units)]:
        units.drop(rejected)


def _slow_ends(units: _Units, scheme: IntegerScheme) -> dict[Unit, str]:
    """Return the units that chains of integers are faster without, at the end or the beginning of one, and why.

    Those are convolutions with slow kernels, and what comes before them from where values enter integers, if it is as
    narrow: values then enter behind them, as cheaply. In between, two more conversions cost what is gained.
    """
    slow: dict[Unit, str] = {}
    for unit in units.by_node.values():
        if unit.kind == "linear" and not any(units.make(value) for value in unit.read()):
            slow.update(_slow_beginning(unit, units, scheme))
        elif (why := _why_slow(unit, scheme)) is not None and not _leads_on(unit, units):
            slow[unit] = f"leads to or is {why}"
    return slow


def _slow_beginning(first: Unit, units: _Units, scheme: IntegerScheme) -> dict[Unit, str]:
    """Return the units from one on, each alone in reading the one before, up to the last slow one among narrow ones.

    Narrow layers gain enough in integers to make up for groups behind them, but not for depthwise convolutions.
    """
    chain: list[Unit] = []
    length, unit, reason = 0, first, ""
    while True:
        why = _why_slow(unit, scheme)
        if why is None and unit.layer is not None and _outputs(unit.layer) >= scheme.least_depthwise:
            break
        chain.append(unit)
        if why is not None and (length == len(chain) - 1 or _is_depthwise(unit)):
            length, reason = len(chain), f"leads to or is {why}"
        readers = list(dict.fromkeys(reader for value in unit.outputs for reader in units.reading(value)))
        if len(readers) != 1 or readers[0] in chain:
            break
        unit = readers[0]
    return dict.fromkeys(chain[:length], reason)


def _why_slow(unit: Unit, scheme: IntegerScheme) -> str | None:
    """Return what about a convolution makes its kernel on codes slower than that on floats, or None if nothing does."""
    if unit.layer is None:
        return None
    if _is_depthwise(unit) and _outputs(unit.layer) < scheme.least_depthwise:
        return f"a depthwise convolution of fewer than {scheme.least_depthwise} channels, slower in integers"
    if has_narrow_groups(unit.node, unit.layer.weight, scheme.least_group):
        return f"a convolution in groups of fewer than {scheme.least_group} channels, slower in integers"
    return None


def _is_depthwise(unit: Unit) -> bool:
    return unit.layer is not None and is_depthwise(unit.node, unit.layer.weight)


def _lone(units: _Units, scheme: IntegerScheme) -> list[Unit]:
    """Return the depthwise convolutions between floats, whose way in and out of integers costs more than they gain."""
    if scheme.least_depthwise <= 1:
        return []
    ends = [unit for unit in units.by_node.values() if not _leads_on(unit, units)]
    return [unit for unit in ends if _is_depthwise(unit) and not any(units.make(value) for value in unit.read())]


def _leads_on(unit: Unit, units: _Units) -> bool:
    return any(units.reading(value) for value in unit.outputs)


def _outputs(layer: LinearLayer) -> int:
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"
    return walk.dims(tensor)[layer.output_axis]


def _pays(unit: Unit, units: _Units) -> bool:
    """Return whether a unit that needs no integers still costs less in them, given what else is in integers."""
    values = unit.read()
    if unit.kind == "residual":
        return any(value not in values and units.make(value) for value in unit.node.inputs if value is not None)
    if any(units.reading(value) for value in unit.outputs):
        varying = [value for value in values if walk.constant_tensor(value) is None]
        # To quantize one operand for the sake of the other gains no time, and rounds what was never rounded.
        decides = all if unit.node.op_type in OPERANDS else any
        return decides(_held(value, units) for value in varying)
    # Leaving integers once, behind it, is cheaper than once for each of the values it joins.
    return unit.node.op_type in _SUMS and len(set(values)) > 1 and all(units.make(value) for value in values)


def _held(value: ir.Value, units: _Units) -> bool:
    """Return whether a value is there in integers whether or not the unit asking runs in integers."""
    return units.make(value) or any(reader.kind == "linear" for reader in units.reading(value))


def _left(model: ir.Model, candidates: Candidates, units: _Units) -> Counter[tuple[str, str]]:
    """Count, by operator and reason, what stays float: linear layers, and what reads integers."""
    left: Counter[tuple[str, str]] = Counter()
    for node in model.graph:
        if not walk.is_onnx_op(node, node.op_type) or units.hold(node):
            continue
        made = any(value is not None and units.make(value) for value in node.inputs)
        reads_integers = made and candidates.scheme.quantize_outputs
        if node.op_type not in LINEAR_OPS and not reads_integers:
            continue
        reason = candidates.obstacles.get(node)
        if reason is None and node.outputs[0].dtype in (None, ir.DataType.FLOAT):
            reason = None if candidates.has_kernel(node) else "no integer kernel on this target"
        if reason is not None:
            left[node.op_type, reason] += 1
    return left
