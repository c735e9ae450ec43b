"""Who decides the codes of stored weights: with or without data, layer by layer in the order of the graph."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.walkthrough import Closing

from ..solvers.gptq import gptq
from ..solvers.grid import GridWeight, round_to_nearest
from ..solvers.hqq import hqq
from ..solvers.objective import DAMPING
from ..solvers.refinement import refine
from ..solvers.scale_search import mse
from .input_scaling import scale_inputs
from .sequential_moments import Moments, SequentialMoments
from .weight_plan import Solver, WeightPlan
from .weight_readers import StoredMatrix


class WeightRounding(Closing):
    """Decides codes, matrix by matrix in graph order.

    Args:
        ctx: The model, not changed yet, and calibration data where the solver needs any.
        solver: Who decides; with ``auto``, GPTQ where there are data and the search for the best scales where not.
        matrices: Every matrix to be solved, in graph order.
        plan: The format of those that are no tables.
    """

    def __init__(self, ctx: Context, solver: Solver, matrices: Sequence[StoredMatrix], plan: WeightPlan) -> None:
        self.ctx = ctx
        self.solver = settled(solver, has_data=ctx.data is not None)
        self.blind = 0
        self._moments = SequentialMoments(ctx, compare=True) if self.solver == "gptq" else None
        self._scaled = scale_inputs(matrices, plan, ctx) if self.solver == "awq" else {}
        # What each node reads, by the names of the model as it is now.
        self._names = {node: [value.name if value else "" for value in node.inputs] for node in ctx.model.graph}

    def solve(self, matrix: StoredMatrix, plan: WeightPlan) -> GridWeight:
        """Return the codes of a matrix; of one whose input cannot be seen, those of the best scales."""
        weight = matrix.layer.matrix()
        if self.solver == "rtn":
            return round_to_nearest(weight, plan.grid)
        if self.solver == "hqq":
            return hqq(weight, plan.grid)
        if self.solver == "awq":
            scaled = self._scaled.get(matrix.weight)
            self.blind += scaled is None and not matrix.is_table
            return scaled.codes if scaled is not None else mse(weight, plan.grid)
        moments = self._moments_of(matrix)
        if moments is None:
            return mse(weight, plan.grid)
        wanted = _making_up_for(np.asarray(weight, np.float32), moments)
        second: Array = moments.second[0]
        return refine(wanted, gptq(wanted, plan.grid, second), second)

    def values(self, matrix: StoredMatrix, found: GridWeight) -> Array:
        """Return Ŵ as it multiplies what the layer read before any input was scaled."""
        scaled = self._scaled.get(matrix.weight)
        return found.values() if scaled is None else found.values() / scaled.factors

    def _moments_of(self, matrix: StoredMatrix) -> Moments | None:
        if self._moments is None or matrix.is_table:
            return None
        layer = matrix.layer
        found = None
        if len(matrix.readers) == 1 and layer.node in self._names:
            found = self._moments.of(layer, self._names[layer.node][1 - layer.weight_index] or "")
        self.blind += found is None
        return found

    def close(self) -> None:
        """Let go of what was kept of the data."""
        if self._moments is not None:
            self._moments.close()


def _making_up_for(weight: Array, moments: Moments) -> Array:
    """Return the weight that gives, on what the layer now reads, most nearly what the layer gave before.

    W E[x x̂ᵀ] (E[x̂ x̂ᵀ])⁻¹ is the least-squares answer; damped as GPTQ's H is, towards the weight as it was.
    """
    if moments.cross is None:
        return weight
    second, cross = moments.second[0].astype(np.float64), moments.cross[0].astype(np.float64)
    damping = DAMPING * np.diagonal(second).mean() * np.eye(len(second))
    try:
        solved = np.linalg.solve(second + damping, (weight @ (cross + damping)).T).T
    except np.linalg.LinAlgError:
        return weight
    # What was pruned stays zero, and makes up for nothing.
    return np.where(weight == 0, np.float32(0), np.asarray(solved, np.float32))


def settled(solver: Solver, *, has_data: bool) -> Solver:
    """Return who decides where that is left open."""
    if solver != "auto":
        return solver
    return "gptq" if has_data else "mse"
