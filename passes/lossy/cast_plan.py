"""Which nodes compute in a half format: as many as may, with as few casts between the formats as can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from graphopt import walk

from ..analyses.float_risks import risks
from ..analyses.linear_layers import as_linear_layer
from ..analyses.narrow_constants import Survey, mask_bound, survey
from ..analyses.number_formats import Ports, float_ports, is_float, ports_in
from ..analyses.selection import Selection
from ..solvers.cut import Network

EXCLUDED = "excluded"
# A weight whose rounding alone is this loud (dB below it) has numbers too small for the format throughout.
LEAST_WEIGHT_SQNR = 30.0
# Nodes that read a constant of this many bytes compute in the format it is stored in, whatever surrounds them.
_LARGE_BYTES = 16 << 10
# A cast costs about what a small operator does; that such an operator runs on halves, or not, matters far less.
_CAST_COST, _FLOAT_COST = 8, 1
# Operators that only move numbers, or treat each by itself: they run in the format of what surrounds them.
_HEAVY_OPS = frozenset({"Attention", "Einsum", "GRU", "LSTM", "RNN"})
_FLOAT, _HALF = "float32", "half"


@dataclass
class CastPlan:
    """What computes in which format.

    Attributes:
        dtype: The half format.
        ports: Nodes that compute in it, each with the inputs and outputs that change.
        kept: Nodes with float32 inputs or outputs that stay, and why.
        surveys: Constants that were looked at.
    """

    dtype: ir.DataType
    ports: dict[ir.Node, Ports] = field(default_factory=dict)
    kept: dict[ir.Node, str] = field(default_factory=dict)
    surveys: dict[ir.Value, Survey] = field(default_factory=dict)

    @property
    def reasons(self) -> Counter[str]:
        """How many nodes stay for each reason."""
        return Counter(self.kept.values())


def plan_cast(
    model: ir.Model,
    dtype: ir.DataType,
    selection: Selection,
    *,
    by_operator: bool,
    measured: Mapping[ir.Node, str],
) -> CastPlan:
    """Return what is to compute in a half format.

    Args:
        model: The model, its dtypes inferred.
        dtype: FLOAT16 or BFLOAT16.
        selection: Nodes that may.
        by_operator: Whether nodes stay that are known to lose or overflow.
        measured: Nodes that stay because of what was measured, and why.
    """
    plan = CastPlan(dtype)
    known_risks = risks(model) if by_operator else {}
    functions = frozenset(model.functions)
    for graph, opset in walk.every_graph_with_opset(model):
        for node in graph:
            now = float_ports(node)
            if walk.is_onnx_op(node, "Constant") or not (now.inputs or now.outputs):
                continue
            ports = ports_in(node, dtype, opset, functions)
            why = ports if isinstance(ports, str) else _reason(node, plan, selection, known_risks, measured)
            if why is not None:
                plan.kept[node] = why
            elif not isinstance(ports, str):
                plan.ports[node] = ports
    for node in _surrounded(model, plan):
        del plan.ports[node]
        plan.kept[node] = "between others in float32"
    return plan


def _reason(
    node: ir.Node,
    plan: CastPlan,
    selection: Selection,
    known_risks: Mapping[ir.Node, str],
    measured: Mapping[ir.Node, str],
) -> str | None:
    """Return why a node stays that the format's schema would let go, or None."""
    if not selection.allows(node):
        return EXCLUDED
    return _constant_reason(node, plan) or measured.get(node) or known_risks.get(node)


def _constant_reason(node: ir.Node, plan: CastPlan) -> str | None:
    """Return what a constant that a node reads or fills with would lose, or None."""
    for value in node.inputs:
        tensor = walk.constant_tensor(value) if is_float(value) else None
        if value is None or tensor is None:
            continue
        if value not in plan.surveys:
            plan.surveys[value] = survey(tensor, plan.dtype)
        found = plan.surveys[value]
        unbounded = found.overflowing - (found.endless if mask_bound(node, plan.dtype) is not None else 0)
        if unbounded:
            return f"its constant `{value.name}` is out of range"
        if found.lost:
            return f"its constant `{value.name}` is too small"
        if found.sqnr < LEAST_WEIGHT_SQNR:
            return f"its constant `{value.name}` loses too much (SQNR {found.sqnr:.0f} dB)"
    return None


def _surrounded(model: ir.Model, plan: CastPlan) -> set[ir.Node]:
    """Return the nodes that stay in float32 because computing them in halves would take more casts than it spares.

    The nodes that may be of either format are cut in two by a minimum cut: what crosses is cast, each value once.
    """
    network = Network()
    free = {node for node in plan.ports if _is_free(node)}

    def side(node: ir.Node | None, switches: bool) -> ir.Node | str:
        if node in free and switches:
            return node
        return _HALF if node in plan.ports and switches else _FLOAT

    for node in free:
        network.add(node, _HALF, _FLOAT_COST)
    for value in _float_values(model):
        producer = value.producer()
        maker = side(producer, producer is not None and value.index() in _outputs(plan, producer))
        readers = {side(use.node, use.idx in _inputs(plan, use.node)) for use in value.uses()}
        if value.is_graph_output():
            readers.add(_FLOAT)
        _connect(network, value, maker, readers)
    return {node for node in network.near_side(_FLOAT, _HALF) if node in free}


def _connect(network: Network, value: ir.Value, maker: ir.Node | str, readers: set[ir.Node | str]) -> None:
    """Add what a value costs if some of its readers are of another format than what makes it."""
    narrowed, widened = (value, _HALF), (value, _FLOAT)
    network.add(maker, narrowed, _CAST_COST)
    network.add(widened, maker, _CAST_COST)
    for reader in readers:
        network.add(narrowed, reader, None)
        network.add(reader, widened, None)


def _is_free(node: ir.Node) -> bool:
    if as_linear_layer(node) is not None or node.op_type in _HEAVY_OPS or "MatMul" in node.op_type:
        return False
    if node.domain not in walk.ONNX_DOMAINS or node.op_type in ("Conv", "ConvTranspose", "Gemm"):
        return False
    return not any(
        (tensor := walk.constant_tensor(value)) is not None and tensor.nbytes >= _LARGE_BYTES for value in node.inputs
    )


def _float_values(model: ir.Model) -> list[ir.Value]:
    """Return the float32 values that are no constants."""
    found = []
    for graph in walk.every_graph(model):
        made = [value for node in graph for value in node.outputs if value.name]
        found += [v for v in (*graph.inputs, *made) if is_float(v) and walk.constant_tensor(v) is None]
    return found


def _inputs(plan: CastPlan, node: ir.Node) -> tuple[int, ...]:
    return plan.ports[node].inputs if node in plan.ports else ()


def _outputs(plan: CastPlan, node: ir.Node) -> tuple[int, ...]:
    return plan.ports[node].outputs if node in plan.ports else ()
