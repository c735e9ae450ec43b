"""All rules of the channel analysis, and the walk that asks them of every node."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from graphopt import walk
from graphopt.value_records import fact_of

from .axis_rules_attention import ATTENTION_AXES
from .axis_rules_control import CONTROL_AXES
from .axis_rules_elementwise import ELEMENTWISE_AXES
from .axis_rules_fused import FUSED_AXES
from .axis_rules_layout import LAYOUT_AXES
from .axis_rules_normalization import NORMALIZATION_AXES
from .axis_rules_products import PRODUCT_AXES
from .axis_rules_recurrent import RECURRENT_AXES
from .axis_rules_reductions import REDUCTION_AXES
from .axis_rules_sizes import SIZE_AXES
from .axis_rules_views import VIEW_AXES
from .axis_rules_windows import WINDOW_AXES
from .axis_ties import AxisRule, Emit, NodeAxes

RULES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        **ATTENTION_AXES,
        **CONTROL_AXES,
        **ELEMENTWISE_AXES,
        **FUSED_AXES,
        **LAYOUT_AXES,
        **NORMALIZATION_AXES,
        **PRODUCT_AXES,
        **RECURRENT_AXES,
        **REDUCTION_AXES,
        **SIZE_AXES,
        **VIEW_AXES,
        **WINDOW_AXES,
    }
)

# What a rule meets in a node that is not as its operator says.
_MALFORMED = (LookupError, ValueError, TypeError, ArithmeticError, AttributeError, AssertionError)


def ask_rules(model: ir.Model) -> Emit:
    """Return what the rules say of a model with inferred shapes; what calls a function or has no rule is frozen."""
    emit = Emit()
    for value in model.graph.inputs:
        emit.freeze_value(value, f"`{value.name}` is an input of the model")
    for graph in walk.graphs_within(model.graph):
        for node in graph:
            if not walk.is_onnx_op(node, "Constant"):
                _ask(node, model, emit)
    emit.node = None
    for value in model.graph.outputs:
        emit.freeze_value(value, f"`{value.name}` is an output of the model")
    return emit


def _ask(node: ir.Node, model: ir.Model, emit: Emit) -> None:
    emit.node = node
    domain = "" if node.domain in walk.ONNX_DOMAINS else node.domain
    rule = RULES.get((domain, node.op_type))
    if node.op_identifier() in model.functions:
        return _freeze_node(node, emit, f"it calls the function {node.op_type}")
    if rule is None:
        return _freeze_node(node, emit, f"unknown operator {node.op_type}")
    if any(fact_of(value).dims is None for value in _tensors(node)):
        return _freeze_node(node, emit, f"a shape at this {node.op_type} is not known")
    try:
        return rule(NodeAxes(node, walk.opset(model, domain)), emit)
    except _MALFORMED as error:
        return _freeze_node(node, emit, f"{node.op_type} is not as its operator says ({error})")


def _tensors(node: ir.Node) -> list[ir.Value]:
    """Return what a node reads, and what it writes and anything reads."""
    written = [value for value in node.outputs if value.uses() or value.is_graph_output()]
    return [*(value for value in node.inputs if value is not None), *written]


def _freeze_node(node: ir.Node, emit: Emit, reason: str) -> None:
    """Freeze all a node reads and writes, and what goes in and out of the graphs in it; values captured have rules."""
    for value in _tensors(node):
        emit.freeze_value(value, reason)
    for graph in walk.subgraphs(node):
        for value in (*graph.inputs, *graph.outputs):
            emit.freeze_value(value, reason)
