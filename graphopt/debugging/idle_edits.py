"""Edits that change nothing, although the pass that made them says that they do."""

from __future__ import annotations

import zlib

import onnx_ir as ir

from graphopt import walk
from graphopt.debugging.edit_states import EditStates
from graphopt.model_diff import changed_lines, node_lines
from graphopt.rewriter import Edit

# Every state is written out as text: a million nodes take about ten seconds.
MOST_NODES_LOOKED_AT = 1_000_000
# Two states for each edit that may be idle: the text does not show everything.
MOST_LOOKED_CLOSER_AT = 20


def idle_edits(states: EditStates) -> list[Edit] | None:
    """Return the edits after which the model is what it was before, the first few; None where it is too much to look.

    Raises:
        GraphoptError: The passes make other edits each time.
    """
    if sum(1 for _ in walk.every_node(states[0])) * len(states) > MOST_NODES_LOOKED_AT:
        return None
    alike, before, contents = list[Edit](), 0, _Contents()

    def look(model: ir.Model, edit: Edit | None) -> None:
        nonlocal before
        text = hash((*node_lines(model), *contents.of(model)))
        if edit is not None and text == before:
            alike.append(edit)
        before = text

    states.follow(look)
    return [edit for edit in alike[:MOST_LOOKED_CLOSER_AT] if not _differ(states[edit.number - 1], states[edit.number])]


class _Contents:
    """What constants hold, as numbers that are computed once for each tensor."""

    def __init__(self) -> None:
        # The tensors are held, for an identity may be given to another one once it is free.
        self._known: dict[int, tuple[ir.TensorProtocol, int]] = {}

    def of(self, model: ir.Model) -> list[tuple[str | None, int]]:
        """Return name and content of each initializer."""
        values = [value for value in walk.initializers(model) if value.const_value is not None]
        return [(value.name, self._number(value.const_value)) for value in values if value.const_value is not None]

    def _number(self, tensor: ir.TensorProtocol) -> int:
        if id(tensor) not in self._known:
            content = zlib.crc32(tensor.tobytes()) if tensor.dtype != ir.DataType.STRING else id(tensor)
            self._known[id(tensor)] = tensor, content
        return self._known[id(tensor)][1]


def _differ(before: ir.Model, after: ir.Model) -> bool:
    return any(changed_lines(before, after)) or _declared(before) != _declared(after)


def _declared(model: ir.Model) -> list[tuple[object, ...]]:
    """Return what the model says of dtypes, shapes, outputs and operator sets, which no line of text shows."""
    values = [value for node in walk.every_node(model) for value in node.outputs]
    outputs = [(value.name, str(value.type), str(value.shape)) for value in (*values, *model.graph.outputs)]
    return [*outputs, *model.opset_imports.items(), *[(name,) for name in model.functions]]
