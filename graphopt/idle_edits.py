"""Edits that change nothing, although the pass that made them says that they do."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import walk
from graphopt.edit_states import EditStates
from graphopt.model_diff import changed_lines
from graphopt.rewriter import Edit

# Every state is written out as text: a million nodes take about ten seconds.
MOST_NODES_LOOKED_AT = 1_000_000


def idle_edits(states: EditStates) -> list[Edit] | None:
    """Return the edits after which the model is what it was before; None where there is too much to look at."""
    nodes = sum(1 for _ in walk.every_node(states[0]))
    if nodes * len(states) > MOST_NODES_LOOKED_AT:
        return None
    return [edit for edit in states.edits if not _differ(states[edit.number - 1], states[edit.number])]


def _differ(before: ir.Model, after: ir.Model) -> bool:
    return any(changed_lines(before, after)) or _declared(before) != _declared(after)


def _declared(model: ir.Model) -> list[tuple[object, ...]]:
    """Return what the model says of dtypes, shapes, outputs and operator sets, which no line of text shows."""
    values = [value for node in walk.every_node(model) for value in node.outputs]
    outputs = [(value.name, str(value.type), str(value.shape)) for value in (*values, *model.graph.outputs)]
    return [*outputs, *model.opset_imports.items(), *[(name,) for name in model.functions]]
