"""Shared scales: which values in integers must, or had better, lie on one grid."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.ranges import Range

from .integer_candidates import clip_bounds
from .integer_units import IntegerUnits


def shared_spans(units: IntegerUnits, spans: Mapping[ir.Value, Range]) -> dict[ir.Value, Range]:
    """Return for each value in integers the range its scale covers: that of all values that share it.

    Operators that move values share one scale on both sides. What only a Concat reads takes the Concat's range, so
    that it is rounded once instead of twice; not where that range is wider than the Relu or Clip behind which it
    is read, which would no longer clip.

    Args:
        units: What runs in integers.
        spans: The range of each value by itself.
    """
    groups = _Groups(spans)
    lowered = [unit for unit in units.units if units.quantizes_output(unit)]
    for unit in lowered:
        for value in unit.outputs:
            groups.limit(value, unit.tail)
        if unit.kind == "move":
            for value in unit.outputs:
                groups.join(unit.read()[0], value)
    for unit in lowered:
        for value in unit.read() if unit.node.op_type == "Concat" else ():
            if walk.constant_tensor(value) is None and len(value.uses()) == 1 and not value.is_graph_output():
                groups.join(unit.outputs[0], value, only_if_clipped=True)
    return {value: groups.span[groups.find(value)] for value in spans}


class _Groups:
    """Disjoint sets of values that share a scale (union by parent links, with path halving).

    Attributes:
        span: Of each set's leader, the range of all its values.
        bound: Of each set's leader, the range that every Relu and Clip in it lets through.
    """

    def __init__(self, spans: Mapping[ir.Value, Range]) -> None:
        self.parent = {value: value for value in spans}
        self.span = dict(spans)
        self.bound = dict.fromkeys(spans, (-np.inf, np.inf))

    def find(self, value: ir.Value) -> ir.Value:
        while self.parent[value] is not value:
            self.parent[value] = self.parent[self.parent[value]]
            value = self.parent[value]
        return value

    def limit(self, value: ir.Value, tail: ir.Node | None) -> None:
        if tail is not None:
            self.bound[self.find(value)] = clip_bounds(tail) or (-np.inf, np.inf)

    def join(self, one: ir.Value, other: ir.Value, *, only_if_clipped: bool = False) -> None:
        into, joined = self.find(one), self.find(other)
        span = Range(min(self.span[into].low, self.span[joined].low), max(self.span[into].high, self.span[joined].high))
        low = max(self.bound[into][0], self.bound[joined][0])
        high = min(self.bound[into][1], self.bound[joined][1])
        if only_if_clipped and not low <= span.low <= span.high <= high:
            return
        self.parent[joined] = into
        self.span[into], self.bound[into] = span, (low, high)
