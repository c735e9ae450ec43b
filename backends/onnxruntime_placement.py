"""Which provider took which node, and what must not have gone to the CPU."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.backend import PlacedNode, Placement
from graphopt.errors import BackendError
from graphopt.shapes import infer_shapes, static_shape

from .onnxruntime_library import PROVIDERS

RECORD = "session.record_ep_graph_assignment_info"
"""Session configuration entry that makes ONNX Runtime 1.24 and newer remember where nodes went."""
NO_FALLBACK = "session.disable_cpu_ep_fallback"
"""Session configuration entry with which ONNX Runtime refuses to run any node on the CPU."""

# A shape has few dimensions; what computes more numbers than this is no arithmetic on shapes.
_MOST_OF_A_SHAPE = 64
_OF_SHAPES = frozenset({ir.DataType.INT64, ir.DataType.INT32, ir.DataType.BOOL})
# Control flow is decided in the memory of the CPU, wherever the branches run.
_CONTROL = ("If", "Loop", "Scan")
_SHAPE_OPS = ("Shape", "Size")
_INTEGER_OPS = ("QLinear", "QGemm", "MatMulInteger", "ConvInteger", "DynamicQuantize", "QAttention")
_MOST_LISTED = 6


def assignment(session: Any, wanted: str, model: Callable[[], ir.Model]) -> Placement | None:
    """Return where ONNX Runtime put the nodes of a session, or None where this version of it cannot tell.

    Args:
        session: An open session that was told to record it.
        wanted: The provider asked for.
        model: Gives the model; asked only where a node is elsewhere.
    """
    ask = getattr(session, "get_provider_graph_assignment_info", None)
    if ask is None:
        return None
    placed = [
        PlacedNode(node.name, _op(node.domain, node.op_type), part.ep_name)
        for part in ask()
        for node in part.get_nodes()
    ]
    if all(node.provider != PROVIDERS["cpu"] for node in placed) or wanted == PROVIDERS["cpu"]:
        return Placement(wanted, tuple(placed))
    on_shapes = _on_shapes(model())
    return Placement(
        wanted,
        tuple(
            PlacedNode(
                node.name,
                node.op,
                node.provider,
                node.provider == PROVIDERS["cpu"] and on_shapes.get((node.op, node.name), node.op in _SHAPE_OPS),
            )
            for node in placed
        ),
    )


def check_placement(placement: Placement | None, allowed: Sequence[str], name: str) -> None:
    """Refuse a session in which nodes run on the CPU that nobody sent there.

    Args:
        placement: Where nodes are, or None where that is not known.
        allowed: Operators that may run there.
        name: What errors call the backend.

    Raises:
        BackendError: Some do.
    """
    if placement is None:
        return
    strays = [n for n in placement.elsewhere if n.provider == PROVIDERS["cpu"] and n.op not in allowed]
    if not strays:
        return
    counts = Counter(node.op for node in strays).most_common()
    listed = ", ".join(f"{count} {op}" for op, count in counts[:_MOST_LISTED])
    listed += f" and {len(counts) - _MOST_LISTED} other operators" if len(counts) > _MOST_LISTED else ""
    # As `--backend` takes it: there a colon begins the next option.
    ops = "+".join([*allowed, *(op for op, _ in counts)]).replace(":", r"\:")
    hint = f"`cpu_ops={ops}` or `allow_cpu=true` lets them, with copies to and fro"
    if any(op.rpartition("::")[2].startswith(_INTEGER_OPS) for op, _ in counts):
        hint = f"CUDA has no kernels on codes: quantize with `--target ort-cuda` or `--target tensorrt`; {hint}"
    raise BackendError(
        f"backend `{name}` would run {len(strays)} of {len(placement.nodes)} nodes on the CPU: {listed}", hint=hint
    )


def _on_shapes(model: ir.Model) -> dict[tuple[str, str], bool]:
    """Return of nodes by operator and name whether all of them compute nothing but shapes."""
    inferred = model.clone()
    infer_shapes(inferred)
    found: dict[tuple[str, str], bool] = {}
    for graph in walk.graphs_within(inferred.graph):
        for node in graph:
            key = _op(node.domain, node.op_type), node.name or ""
            found[key] = found.get(key, True) and _is_on_shapes(node)
    return found


def _is_on_shapes(node: ir.Node) -> bool:
    if walk.is_onnx_op(node, *_CONTROL, *_SHAPE_OPS):
        return True
    read = [value for value in node.inputs if value is not None and walk.constant_tensor(value) is None]
    return all(_may_be_shape(value) for value in [*read, *node.outputs] if value.name)


def _may_be_shape(value: ir.Value) -> bool:
    """Return whether a value can be a shape, or a part of one: a few numbers in a row, whole where it is not seen."""
    if value.shape is None or len(value.shape) > 1:
        return False
    shape = static_shape(value)
    # Sizes are floats on the way to the factors of a Resize.
    return value.dtype in _OF_SHAPES if shape is None else math.prod(shape) <= _MOST_OF_A_SHAPE


def _op(domain: str, op_type: str) -> str:
    return op_type if domain in ("", "ai.onnx") else f"{domain}::{op_type}"
