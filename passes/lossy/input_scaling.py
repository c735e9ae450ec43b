"""AWQ on a model: inputs that matter are made larger by the operator before the layers that read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..solvers.awq import ScaledWeights, awq
from ..solvers.grid import GridWeight
from .sequential_moments import SequentialMoments
from .weight_plan import WeightPlan
from .weight_readers import StoredMatrix

_RULE = "awq-scale"
# Operators whose output is scaled channel by channel by one of their constants, and which inputs these are.
_SCALED_BY = {
    "LayerNormalization": (1, 2),
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
}


@dataclass(frozen=True, eq=False)
class _Group:
    """Matrices that read one value, and the constants that scale it.

    Attributes:
        matrices: All readers of the value.
        scales: Constants of one number for each channel, read by nothing else.
    """

    matrices: tuple[StoredMatrix, ...]
    scales: tuple[ir.Value, ...]


@dataclass(frozen=True, eq=False)
class ScaledMatrix:
    """The codes of a matrix whose inputs were scaled.

    Attributes:
        codes: Codes of W · factors.
        factors: float32 [inputs].
    """

    codes: GridWeight
    factors: Array


def scale_inputs(matrices: Sequence[StoredMatrix], plan: WeightPlan, ctx: Context) -> dict[ir.Value, ScaledMatrix]:
    """Scale the inputs of layers where the operator before takes the factors in, and return the codes found so.

    No operator is added: 1/s goes into the Mul or normalization that makes the input, s into the weights. Layers
    behind anything else are left as they are, to be solved without.

    Args:
        matrices: The matrices to be stored, in graph order.
        plan: The format.
        ctx: Calibration data and rewriter.
    """
    groups = _groups(matrices)
    solved: list[tuple[_Group, ScaledWeights]] = []
    with SequentialMoments(ctx, compare=False) as seen:
        for group in ctx.track(groups, "scaling inputs"):
            layer = group.matrices[0].layer
            moments = seen.of(layer, layer.input.name or "")
            if moments is None:
                continue
            weights = [np.asarray(matrix.layer.matrix(), np.float32) for matrix in group.matrices]
            sizes = np.sqrt(np.diagonal(moments.second[0]))
            solved.append((group, awq(weights, plan.grid, moments.second[0], sizes)))
    found: dict[ir.Value, ScaledMatrix] = {}
    for group, answer in solved:
        _apply(group, answer, ctx)
        for matrix, one in zip(group.matrices, answer.solutions, strict=True):
            found[matrix.weight] = ScaledMatrix(one, answer.factors)
    return found


def _groups(matrices: Sequence[StoredMatrix]) -> list[_Group]:
    by_input: dict[ir.Value, list[StoredMatrix]] = {}
    for matrix in matrices:
        sole = len(matrix.readers) == 1 and not matrix.is_table and not matrix.readers[0].on_left
        if sole and matrix.readers[0].transpose is None:
            by_input.setdefault(matrix.layer.input, []).append(matrix)
    found = []
    for value, readers in by_input.items():
        scales = _scaled_by(value)
        nodes = {use.node for use in value.uses()}
        if scales and nodes == {matrix.layer.node for matrix in readers} and not value.is_graph_output():
            found.append(_Group(tuple(readers), scales))
    return found


def _scaled_by(value: ir.Value) -> tuple[ir.Value, ...]:
    """Return the constants that scale a value's channels, all of them or none."""
    node = value.producer()
    if node is None or value.shape is None or not isinstance(value.shape[-1], int):
        return ()
    if walk.is_onnx_op(node, "Mul"):
        constants = [one for one in node.inputs if walk.constant_tensor(one) is not None]
    elif node.op_type in _SCALED_BY and node.attributes.get_int("axis", -1) in (-1, len(value.shape) - 1):
        places = [place for place in _SCALED_BY[node.op_type] if place < len(node.inputs)]
        constants = [node.inputs[place] for place in places if node.inputs[place] is not None]
    else:
        return ()
    usable = [one for one in constants if one is not None and _is_vector(one, value.shape[-1])]
    return tuple(usable) if constants and len(usable) == len(constants) else ()


def _is_vector(value: ir.Value, channels: int) -> bool:
    tensor = walk.constant_tensor(value)
    dims = walk.dims(tensor) if tensor is not None else ()
    alone = len(value.uses()) == 1 and not value.is_graph_output()
    return alone and bool(dims) and dims[-1] == channels and all(dim == 1 for dim in dims[:-1])


def _apply(group: _Group, answer: ScaledWeights, ctx: Context) -> None:
    """Divide the input's scales by the factors and multiply the weights by them, as one edit."""
    with ctx.rewriter.edit(_RULE, *(matrix.layer.node for matrix in group.matrices)):
        for scale in group.scales:
            tensor = walk.constant_tensor(scale)
            assert tensor is not None, "it was one when the group was found"
            array = tensor.numpy()
            ctx.rewriter.set_weight(scale, (array / answer.factors).astype(array.dtype))
        for matrix in group.matrices:
            scaled = np.asarray(matrix.layer.matrix(), np.float32) * answer.factors
            ctx.rewriter.set_weight(matrix.weight, matrix.layer.from_matrix(scaled))
