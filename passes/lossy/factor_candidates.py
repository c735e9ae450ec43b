"""Which layers `factorize` may write as smaller ones, and why others are left as they are."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context

from ..analyses.linear_layers import (
    LINEAR_OPS,
    LinearLayer,
    as_linear_layer,
    is_lookup,
    linear_layers,
    readers_elsewhere,
)
from ..analyses.selection import Selection
from . import factored_convolutions, factored_tables, residual_codes
from .factor_forms import Candidate, Method, allowed_ranks
from .factored_products import Product
from .stacked_layers import stacked
from .weight_plan import WeightPlan

_MATRIX_RANK = 2


@dataclass(frozen=True)
class Settings:
    """What of a layer may be tried.

    Attributes:
        method: How layers are judged.
        form: Ways to write convolutions; ``auto`` for all.
        residual: How what is left of a matrix is stored beside its factors, or None where it is dropped.
        joint: Whether layers that read the same may share a first factor.
        tables: Whether tables that rows are looked up in are taken too.
    """

    method: Method
    form: str = "auto"
    residual: WeightPlan | None = None
    joint: bool = True
    tables: bool = False


def find_candidates(model: ir.Model, selection: Selection, settings: Settings, ctx: Context) -> list[Candidate]:
    """Return what may be factored, in graph order; the rest is said to be left, a line for each reason."""
    if settings.residual is not None:
        residual_codes.prepare(model, ctx, settings.residual)
    every = ctx.analyse(linear_layers)
    left: dict[str, list[ir.Node]] = {}
    found: list[Candidate] = []
    tables = factored_tables.candidates_of(model, ctx, selection, settings.method) if settings.tables else []
    taken = {node for table in tables for node in table.nodes}
    seen = {layer.weight for layer in every if layer.node in taken}
    for layer in every:
        if not selection.allows(layer.node) or layer.weight in seen:
            continue
        seen.add(layer.weight)
        candidate = _candidate(layer, every, selection, settings, ctx)
        if isinstance(candidate, str):
            left.setdefault(candidate, []).append(layer.node)
        else:
            found.append(candidate)
    lookups = [] if settings.tables else [node for node in walk.every_node(model) if _is_table(node, selection)]
    if lookups:
        left["they look rows up in a table, which is taken where `include` names them"] = lookups
    computed = [node for node in walk.every_node(model) if _is_computed(node) and selection.allows(node)]
    if computed:
        left["their weight is computed, not constant"] = computed
    for reason, nodes in left.items():
        labels = [walk.label(node) for node in nodes]
        ctx.left(f"left as they are: {_listed(labels)}, as {reason}", left=len(nodes), nodes=labels)
    together = stacked(found, ctx) if settings.joint and settings.residual is None else found
    return [*tables, *together]


def _candidate(
    layer: LinearLayer, every: Sequence[LinearLayer], selection: Selection, settings: Settings, ctx: Context
) -> Candidate | str:
    """Return a layer, with all that read the same weight, as a candidate; or why it is none."""
    if layer.weight.is_graph_output():
        return "their weight is an output of the model"
    elsewhere = readers_elsewhere(layer, every)
    if elsewhere:
        return f"their weight is also read by {elsewhere[0].op_type} `{walk.label(elsewhere[0])}`"
    if not all(selection.allows(use.node) for use in layer.weight.uses()):
        return "their weight is also read by a node that is excluded"
    if layer.node.op_type not in ("MatMul", "Gemm"):
        if settings.residual is not None:
            return "they are convolutions, and nothing reads a residual of theirs in codes"
        return factored_convolutions.candidate_of(layer, settings.form, settings.method, ctx)
    if len(layer.dims) != _MATRIX_RANK:
        return "they have a matrix for each of several batches"
    outputs, inputs = layer.dims
    if not allowed_ranks(outputs, inputs, ctx.target.width_multiple):
        return "two factors of any rank would be no smaller"
    if settings.residual is not None:
        return residual_codes.candidate_of(layer, settings.method, settings.residual)
    readers = [other for other in every if other.weight is layer.weight]
    return Product(layer, readers, settings.method)


def _is_computed(node: ir.Node) -> bool:
    """Return whether a node is a linear operator whose weight is no constant."""
    if not walk.is_onnx_op(node, *LINEAR_OPS) or as_linear_layer(node) is not None:
        return False
    return all(walk.constant_tensor(value) is None for value in node.inputs[:2])


def _is_table(node: ir.Node, selection: Selection) -> bool:
    """Return whether a node looks rows up in a matrix of floats."""
    tensor = walk.constant_tensor(node.inputs[0]) if is_lookup(node) and selection.allows(node) else None
    return tensor is not None and len(tensor.shape) == _MATRIX_RANK and tensor.dtype.is_floating_point()


def _listed(labels: Sequence[str]) -> str:
    first = f"`{labels[0]}`"
    return f"{first} and {len(labels) - 1} more" if len(labels) > 1 else first
