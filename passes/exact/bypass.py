"""Leaving out an operator: its input in place of its output, and when that cannot be."""

from __future__ import annotations

import onnx_ir as ir

from graphopt.pattern import Match, Miss


def bypass(m: Match, x: ir.Value | None = None) -> ir.Value | Miss:
    """Return a value (by default the one bound to ``x``) in place of the root, or why the root must stay."""
    value: ir.Value = m.x if x is None else x
    root = m.root
    if not any(output.is_graph_output() for output in root.outputs):
        return value
    producer = value.producer()
    if producer is None or producer.graph is not root.graph or value.is_graph_output():
        return Miss("names a graph output that is an input, a constant or another output", root)
    return value
