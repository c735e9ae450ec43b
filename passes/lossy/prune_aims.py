"""What each layer is to give once it is pruned, and what it reads then: the least-squares problem of its weights."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from graphopt import shapes, walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.walkthrough import Closing

from ..analyses.linear_layers import LinearLayer
from ..solvers.objective import DAMPING, by_group
from .channel_sweep import bias_content, bias_of_layer
from .layer_bias import LayerBias
from .layer_targets import LayerTargets, Residual, Target


@dataclass(frozen=True, eq=False)
class Aim:
    """A layer's problem: weights Ŵ that come nearest to a dense weight on what the layer reads by then.

    Attributes:
        weight: The dense weight that does best, float32 [outputs, inputs].
        second_moment: E[x̂ x̂ᵀ] of what is read, around the mean where the bias takes the mean; float32 [groups, inputs,
            inputs].
        bias: Where the mean goes, or None.
        target: What all this was found from.
    """

    weight: Array
    second_moment: Array
    bias: LayerBias | None
    target: Target

    def shift(self, weight: Array) -> Array:
        """Return what the bias has to grow by, float64 [outputs], for a weight to give the right mean."""
        grouped = by_group(weight.astype(np.float64), self.second_moment)
        found: Array = self.target.wanted - (grouped @ self.target.mean[:, :, None]).reshape(-1)
        if self.target.with_bias and self.bias is not None:
            found = found - bias_content(self.bias, len(found))
        return found


class Aims(Closing):
    """Problems of layers, asked for in graph order, each after the layers before it were pruned.

    Args:
        ctx: Calibration data and the model; neither changed yet.
    """

    def __init__(self, ctx: Context) -> None:
        self._ctx, self._targets = ctx, LayerTargets(ctx)
        self._places = {node: place for place, node in enumerate(ctx.model.graph)}

    def of(self, layer: LinearLayer) -> Aim | None:
        """Return the problem of a layer, as the model now has it; None where nothing can be seen of what it reads."""
        if not self._targets.sees(layer):
            return None
        bias = bias_of_layer(layer, self._ctx)
        target = self._targets.of(layer, self._residual(layer, bias))
        if target is None:
            return None
        second = target.second if bias is None else target.covariance
        cross = target.cross if bias is None else target.cross_covariance
        return Aim(_making_up(layer.matrix(), second, cross), second, bias, target)

    def _residual(self, layer: LinearLayer, bias: LayerBias | None) -> Residual | None:
        """Return the sum at the end of a residual block, where all that its other term hangs on is settled."""
        if layer.node.op_type == "ConvTranspose" or (bias is None and len(layer.node.inputs) > 2):
            return None  # what is padded is no product, and what is added is not known
        made = (bias.adder if bias is not None else layer.node).outputs[0]
        uses = list(made.uses())
        if len(uses) != 1 or made.is_graph_output() or not walk.is_onnx_op(uses[0].node, "Add"):
            return None
        other, total = uses[0].node.inputs[1 - uses[0].idx], uses[0].node.outputs[0]
        producer = other.producer() if other is not None else None
        if other is None or producer is None or walk.constant_tensor(other) is not None:
            return None
        # In graph order, all that a value hangs on comes before it.
        if self._places.get(producer, len(self._places)) > self._places[layer.node]:
            return None
        dims = [shapes.dims_of(value) for value in (made, other, total)]
        return Residual(other, total) if dims[0] is not None and dims[0] == dims[1] == dims[2] else None

    def close(self) -> None:
        """Let go of everything kept."""
        self._targets.close()


def _making_up(matrix: Array, second: Array, cross: Array) -> Array:
    """Return the dense weight that gives most nearly what is wanted, on what the layer now reads.

    E[y x̂ᵀ] (E[x̂ x̂ᵀ])⁻¹ is the least-squares answer; damped towards the weight as it is.
    """
    damping = DAMPING * np.diagonal(second, axis1=1, axis2=2).mean(axis=1, dtype=np.float64)
    damped = second.astype(np.float64) + damping[:, None, None] * np.eye(second.shape[1])
    wanted = by_group(cross, second) + damping[:, None, None] * by_group(matrix.astype(np.float64), second)
    try:
        solved = np.swapaxes(np.linalg.solve(damped, np.swapaxes(wanted, 1, 2)), 1, 2)
    except np.linalg.LinAlgError:
        return matrix.astype(np.float32)
    # What is zero stays so, and what the calibration data make of it is nothing to come near to.
    return np.where(matrix == 0, np.float32(0), solved.reshape(matrix.shape).astype(np.float32))
