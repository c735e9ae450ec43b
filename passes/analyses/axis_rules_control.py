"""Rules of the channel analysis for If, Loop and Scan: what goes in and out of a nested graph.

What a nested graph captures is the value outside itself, and needs no rule.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

import onnx_ir as ir

from graphopt.value_records import fact_of

from .axis_ties import Axis, AxisRule, Emit, NodeAxes, axis_of, length_of

_OTHER_RANKS = "the graphs of a control operator disagree about it"
_SCANNED = "a Scan goes along it"
_FIRST_SCAN_WITHOUT_BATCH = 9


def branches(node: NodeAxes, emit: Emit) -> None:
    """Either branch gives what the If gives."""
    for name in ("then_branch", "else_branch"):
        for inner, output in zip(_graph(node, name).outputs, node.node.outputs, strict=True):
            _tie_all([inner, output], emit)


def loop(node: NodeAxes, emit: Emit) -> None:
    """A carried value is the same before, in and behind the body; what is stacked up gains an axis."""
    body = _graph(node, "body")
    carried = len(node.node.inputs) - 2
    for index in range(carried):
        into, out_of = body.inputs[2 + index], body.outputs[1 + index]
        _tie_all([node.node.inputs[2 + index], into, out_of, node.node.outputs[index]], emit)
    for output, inner in zip(node.node.outputs[carried:], body.outputs[1 + carried :], strict=True):
        _tie_slice(output, 0, inner, emit)


def scan(node: NodeAxes, emit: Emit) -> None:
    """A state is the same before, in and behind the body; slices lack the axis the Scan goes along."""
    if 0 < node.opset < _FIRST_SCAN_WITHOUT_BATCH:
        raise ValueError("a Scan with a batch axis")
    body = _graph(node, "body")
    scanned = node.integer("num_scan_inputs")
    states = len(node.node.inputs) - scanned
    for index in range(states):
        _tie_all([node.node.inputs[index], body.inputs[index], body.outputs[index], node.node.outputs[index]], emit)
    places = node.integers("scan_input_axes") or (0,) * scanned
    for value, inner, place in zip(node.node.inputs[states:], body.inputs[states:], places, strict=True):
        _tie_slice(value, place, inner, emit)
    places = node.integers("scan_output_axes") or (0,) * (len(node.node.outputs) - states)
    for output, inner, place in zip(node.node.outputs[states:], body.outputs[states:], places, strict=True):
        _tie_slice(output, place, inner, emit)


def _tie_all(values: Sequence[ir.Value | None], emit: Emit) -> None:
    """Tie tensors that are one, as far as their shapes are known."""
    first, *others = [value for value in values if value is not None]
    ranks = {_rank(value) for value in (first, *others)}
    if len(ranks) > 1 or None in ranks:
        for value in (first, *others):
            emit.freeze_value(value, _OTHER_RANKS)
        return
    for value in others:
        for axis in range(_rank(first) or 0):
            emit.tie(Axis(first, axis), Axis(value, axis))


def _tie_slice(whole: ir.Value | None, place: int, inner: ir.Value, emit: Emit) -> None:
    """Tie a tensor with what it is along one axis."""
    rank, inner_rank = _rank(whole), _rank(inner)
    if whole is None or rank is None or inner_rank != rank - 1:
        for value in (whole, inner):
            emit.freeze_value(value, _OTHER_RANKS)
        return
    along = axis_of(whole, place)
    emit.freeze(along, _SCANNED)
    left = [axis for axis in range(rank) if axis != along.axis]
    is_read = bool(whole.uses()) or whole.is_graph_output()
    for axis, other in enumerate(left):
        # A Loop may run no time at all, and then its stacks have any size; what nobody reads may have it.
        if is_read or length_of(Axis(whole, other)) is not None:
            emit.tie(Axis(inner, axis), Axis(whole, other))


def _rank(value: ir.Value | None) -> int | None:
    dims = fact_of(value).dims if value is not None else None
    return len(dims) if dims is not None else None


def _graph(node: NodeAxes, name: str) -> ir.Graph:
    attribute = node.attribute(name)
    if attribute is None:
        raise LookupError(f"no graph `{name}`")
    return attribute.as_graph()


CONTROL_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {("", "If"): branches, ("", "Loop"): loop, ("", "Scan"): scan}
)
