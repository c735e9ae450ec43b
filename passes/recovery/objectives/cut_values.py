"""Values that all of a model's computation goes through: where it can be cut into pieces, and looked at inside."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

import onnx_ir as ir

from graphopt import walk
from graphopt.fragment import constant_content, values_read
from graphopt.shapes import dims_of

from ...analyses.linear_layers import LINEAR_OPS

T = TypeVar("T")

# Operators that multiply what they read by a weight.
_PRODUCTS = (*LINEAR_OPS, "GRU", "LSTM", "RNN", "FusedConv", "FusedGemm", "FusedMatMul", "MatMulNBits")
# Operators that tell sizes, which follow from those of the inputs.
_SIZES = ("Shape", "Size")
# Axes longer than one that a weight has at least: frequencies of a rotary embedding are a vector.
_MATRIX_AXES = 2


@dataclass(frozen=True, eq=False)
class Cut:
    """A value that all that comes behind hangs on, besides what is computed from inputs alone.

    Attributes:
        value: The value.
        place: The index of the last node before the cut, in graph order.
        ends: What it is the end of: a block, where several paths begin behind it; a layer, where the next one does.
    """

    value: ir.Value
    place: int
    ends: Literal["block", "layer", "nothing"]


def cut_values(model: ir.Model) -> list[Cut]:
    """Return the values of the main graph that are all that is carried on from one node to the next, in order.

    Carried is what hangs on weights. What is computed without any, such as masks and positions, can be had anew behind
    any cut; so can rows of a table, where too few cuts are left otherwise: it may be one of positions.

    Args:
        model: A model with inferred shapes.
    """
    without = _cuts(model, _PRODUCTS)
    with_tables = _cuts(model, (*_PRODUCTS, "Gather"))
    fewer = sum(cut.ends == "block" for cut in with_tables) < sum(cut.ends == "block" for cut in without)
    return without if fewer else with_tables


def _cuts(model: ir.Model, sources: Sequence[str]) -> list[Cut]:
    """Return the cuts, where what is carried begins at nodes of some operators that read weights."""
    nodes = list(model.graph)
    last = {value: place for place, node in enumerate(nodes) for value in values_read(node)}
    constant, carried = _constant_and_carried(nodes, sources)
    found: dict[ir.Value, Cut] = {}
    live: set[ir.Value] = set()
    for place, node in enumerate(nodes):
        live.update(value for value in node.outputs if value in carried)
        live = {value for value in live if last.get(value, -1) > place}
        if len(live) == 1:
            (value,) = live
            is_floats = value.dtype is not None and value.dtype.is_floating_point()
            if value not in found and is_floats and isinstance(value.type, ir.TensorType):
                found[value] = Cut(value, place, _ends(value, constant))
    return list(found.values())


def _constant_and_carried(nodes: Iterable[ir.Node], sources: Sequence[str]) -> tuple[set[ir.Value], set[ir.Value]]:
    """Return the values that hang on constants alone, and those that hang on weights and something else."""
    constant: set[ir.Value] = set()
    carried: set[ir.Value] = set()
    for node in nodes:
        read = list(values_read(node))
        if all(value in constant or constant_content(value) is not None for value in read) and not walk.is_random(node):
            constant.update(node.outputs)
        elif walk.is_onnx_op(node, *_SIZES):
            continue
        elif any(value in carried for value in read) or _reads_weight(node, constant, sources):
            carried.update(node.outputs)
    return constant, carried


def _reads_weight(node: ir.Node, constant: set[ir.Value], operators: Sequence[str] = _PRODUCTS) -> bool:
    """Return whether a node is of some operators and reads a weight, which may be one that is decoded before."""
    if node.op_type not in operators:
        return False
    return any(value is not None and _is_matrix(value, constant) for value in node.inputs[:3])


def _is_matrix(value: ir.Value, constant: set[ir.Value]) -> bool:
    if value not in constant and constant_content(value) is None:
        return False
    dims = dims_of(value)
    return dims is None or sum(1 for dim in dims if dim != 1) >= _MATRIX_AXES


def _ends(value: ir.Value, constant: set[ir.Value]) -> Literal["block", "layer", "nothing"]:
    readers = {use.node for use in value.uses() if not walk.is_onnx_op(use.node, *_SIZES)}
    if len(readers) > 1:
        return "block"
    return "layer" if all(_reads_weight(node, constant) for node in readers) else "nothing"


def thinned(items: Sequence[T], most: int) -> list[T]:
    """Return at most so many of some items, as evenly spread as may be, the last one among them."""
    if len(items) <= most:
        return list(items)
    return [items[(index + 1) * len(items) // most - 1] for index in range(most)]


def ends_of_blocks(cuts: Sequence[Cut]) -> list[Cut]:
    """Return the cuts at ends of blocks; of a model without blocks, those at ends of layers."""
    return [cut for cut in cuts if cut.ends == "block"] or ends_of_layers(cuts)


def ends_of_layers(cuts: Sequence[Cut]) -> list[Cut]:
    """Return the cuts at ends of layers, blocks included."""
    return [cut for cut in cuts if cut.ends != "nothing"]
