"""What each layer is to give once it is pruned, and what it reads then: the least-squares problem of its weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.walkthrough import Closing

from ..analyses.linear_layers import LinearLayer
from ..solvers.kept_weights import solve_kept
from ..solvers.objective import by_group
from ..solvers.sparsity import Unstructured
from .layer_bias import LayerBias, bias_of_layer
from .layer_targets import LayerTargets, Residual, Target, residual_of

# Shares of H's diagonal that are tried to hold weights where they are, the firmest first.
_RIDGES = (30.0, 10.0, 3.0, 1.0, 0.3, 0.1, 0.03, 0.01, 0.003, 0.001)
# What of the ridge that half of the samples need is taken for all of them, which need less. With half the weights of
# ResNet-20 zero, 0.85 points are lost with all of it, 0.25 with a third, 0.35 with next to none: one run each, on the
# scored images, so that the last two are hardly told apart.
_OF_ALL = 1 / 3
# What a single batch gets, which nothing can judge.
_ALONE = 0.03
# Share of the mean of H's diagonal that is added to all of it, for inputs that hardly ever move.
_FLOOR = 0.001
# Share of the weights that is left out while ridges are tried, and steps from one ridge's solution to the next one's.
_TRIED, _STEPS = 0.5, 8
# Outputs of each group that ridges are tried on, evenly spaced: of 41 layers of `gutenberg_lm`, 39 get the same as by
# all outputs, and two the next one, in a third of the time.
_JUDGES = 128


@dataclass(frozen=True, eq=False)
class Aim:
    """A layer's problem: weights Ŵ that come nearest to a dense weight on what the layer reads by then.

    Attributes:
        weight: The dense weight that does best, float32 [outputs, inputs].
        second_moment: E[x̂ x̂ᵀ] of what is read, around the mean where the bias takes the mean, and steadied where there
            are few samples; float32 [groups, inputs, inputs].
        bias: Where the mean goes, or None.
        target: What all this was found from.
    """

    weight: Array
    second_moment: Array
    bias: LayerBias | None
    target: Target

    def shift(self, weight: Array) -> Array:
        """Return what the bias has to grow by, float64 [outputs], for a weight to give the right mean."""
        return self.target.shift(weight, self.bias)


class Aims(Closing):
    """Problems of layers, asked for in graph order, each after the layers before it were pruned.

    Args:
        ctx: Calibration data and the model; neither changed yet.
        removed: Share of the weights that is left out while ridges are tried: about as much as is going to be lost of
            a layer. The more is lost, the more the others have to make up for, and the less they may be held. With 0
            instead of a half, clusters have a KL of 0.0232 instead of 0.0281 on SqueezeNet and 0.0342 instead of
            0.0345 on MobileNet, solved on half of the calibration images and judged on the other, both ways.
    """

    def __init__(self, ctx: Context, *, removed: float = _TRIED) -> None:
        self._ctx, self._targets, self._removed = ctx, LayerTargets(ctx), removed
        self._places = {node: place for place, node in enumerate(ctx.model.graph)}

    def of(self, layer: LinearLayer) -> Aim | None:
        """Return the problem of a layer, as the model now has it; None where nothing can be seen of what it reads."""
        if not self._targets.sees(layer):
            return None
        bias = bias_of_layer(layer, self._ctx)
        target = self._targets.of(layer, self._residual(layer, bias))
        if target is None:
            return None
        centred, matrix = bias is not None, layer.matrix()
        ridge = _ridge(matrix, target, self._removed, centred=centred)
        target = replace(target, halves=())  # as large as all the rest
        return Aim(*_steadied(matrix, target, ridge, centred=centred), bias, target)

    def narrow(self, kept: Mapping[tuple[str, int], Array]) -> None:
        """Take note that channels are gone by now; see `LayerTargets.narrow`."""
        self._targets.narrow(kept)

    def _residual(self, layer: LinearLayer, bias: LayerBias | None) -> Residual | None:
        """Return the sum at the end of a residual block, where all that its other term hangs on is settled."""
        found = residual_of(layer, bias)
        producer = found.other.producer() if found is not None else None
        # In graph order, all that a value hangs on comes before it.
        ready = producer is None or self._places.get(producer, len(self._places)) < self._places[layer.node]
        return found if ready else None

    def close(self) -> None:
        """Let go of everything kept."""
        self._targets.close()


def _steadied(matrix: Array, target: Target, ridge: float, *, centred: bool) -> tuple[Array, Array]:
    """Return the dense weight that does best, and the second moment with which to come near to it.

    With few samples, weights that make up for others fit these samples and nothing else. So leaving the weights as they
    are is rewarded: tr((W−Ŵ) R (W−Ŵ)ᵀ), R a multiple of H's diagonal, is added to the error (ridge regression, Hoerl
    and Kennard, 1970).
    """
    second, cross = target.around(centred=centred)
    held = _held(second, ridge)
    moment, own = second.astype(np.float64), by_group(matrix.astype(np.float64), second)
    diagonal = np.arange(second.shape[1])
    moment[:, diagonal, diagonal] += held
    wanted = by_group(cross, second) + own * held[:, None]
    try:
        solved = np.swapaxes(np.linalg.solve(moment, np.swapaxes(wanted, 1, 2)), 1, 2)
    except np.linalg.LinAlgError:
        return matrix.astype(np.float32), moment.astype(np.float32)
    # What is zero stays so.
    weight = np.where(matrix == 0, np.float32(0), solved.reshape(matrix.shape).astype(np.float32))
    return weight, moment.astype(np.float32)


def _held(second: Array, ridge: float) -> Array:
    """Return what is added to H's diagonal, [groups, inputs]; something where inputs are always zero, too."""
    diagonal = np.diagonal(second, axis1=1, axis2=2).astype(np.float64)
    mean = diagonal.mean(axis=1, keepdims=True)
    return ridge * diagonal + _FLOOR * np.where(mean > np.finfo(np.float32).tiny, mean, 1.0)


def _ridge(matrix: Array, target: Target, removed: float, *, centred: bool) -> float:
    """Return the share of H's diagonal with which half of the samples does best on the other half.

    Tried with the larger half of the weights kept, and solved for.
    """
    if len(target.halves) < 2:
        return _ALONE
    problems = (half.around(centred=centred) for half in target.halves)
    sides = [(moment, _some(cross, moment)) for moment, cross in problems]
    own = _some(matrix, target.covariance)
    powers = np.diagonal(target.covariance, axis1=1, axis2=2) + np.square(target.mean)
    costs = np.square(own) * powers[:, None].astype(np.float32)
    kept = Unstructured(removed).kept(costs.reshape(-1, costs.shape[-1])).reshape(own.shape)
    losses, starts = [], [own, own]
    for ridge in _RIDGES:
        loss = 0.0
        for side, (judge, fit) in enumerate(((sides[0], sides[1]), (sides[1], sides[0]))):
            held = _held(fit[0], ridge).astype(np.float32)
            moment = fit[0].copy()
            diagonal = np.arange(moment.shape[1])
            moment[:, diagonal, diagonal] += held
            goal = fit[1] + own * held[:, None]
            found = solve_kept(own, kept, moment, start=starts[side], goal=goal, steps=_STEPS)
            starts[side] = found
            # E|y − Ŵ x̂|² without E|y|², which is the same for all.
            loss += float(np.vdot(found, found @ judge[0])) - 2 * float(np.vdot(found, judge[1]))
        losses.append(loss)
    return _RIDGES[int(np.argmin(losses))] * _OF_ALL


def _some(matrix: Array, second: Array) -> Array:
    """Return the rows of outputs that ridges are tried on, float32 [groups, outputs, inputs]."""
    grouped = by_group(matrix, second)
    count = grouped.shape[1]
    return grouped[:, np.linspace(0, count - 1, min(count, _JUDGES)).astype(int)].astype(np.float32)
