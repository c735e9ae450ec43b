"""Which weights may stay: constraints on zeros, each with the mask that keeps what is dearest to lose."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from graphopt.backend import Array


@dataclass(frozen=True)
class Unstructured:
    """A share of the weights is zero, wherever they are.

    Attributes:
        sparsity: Share of all weights to be zero, 0 to 1.
        per_output: Whether each output loses that share of its weights, rather than all outputs together.
        block: (Outputs, inputs) of the blocks that stay or go as a whole; those at the edges may be smaller. Rounded
            to whole blocks, the share may differ.
    """

    sparsity: float
    per_output: bool = False
    block: tuple[int, int] = (1, 1)

    @property
    def rows(self) -> int:
        """How many consecutive outputs are decided together."""
        return self.block[0]

    @property
    def step(self) -> int:
        """How many consecutive inputs are decided together."""
        return self.block[1]

    def kept(self, costs: Array) -> Array:
        """Return the mask, bool, of costs [outputs, inputs]; of equal costs the first ones go, on every machine."""
        if self.block == (1, 1):
            return self._dearest(costs)
        # A block of more than the matrix is the matrix.
        rows, columns = np.minimum(self.block, costs.shape)
        starts = [np.arange(0, costs.shape[0], rows), np.arange(0, costs.shape[1], columns)]
        summed = np.add.reduceat(np.add.reduceat(costs, starts[0], axis=0), starts[1], axis=1)
        counts = np.add.reduceat(np.add.reduceat(np.ones_like(costs), starts[0], axis=0), starts[1], axis=1)
        kept = replace(self, block=(1, 1))._dearest(summed / counts)
        return kept.repeat(rows, axis=0).repeat(columns, axis=1)[: costs.shape[0], : costs.shape[1]]

    def _dearest(self, costs: Array) -> Array:
        lines = costs if self.per_output else costs.reshape(1, -1)
        count = round(self.sparsity * lines.shape[1])
        if count == 0:
            return np.ones(costs.shape, bool)
        thresholds = np.partition(lines, count - 1, axis=1)[:, count - 1 : count]
        kept = lines > thresholds
        ties = lines == thresholds
        spare = count - (lines.shape[1] - kept.sum(axis=1) - ties.sum(axis=1))
        for line in np.flatnonzero(ties.sum(axis=1) > spare):
            kept[line, np.flatnonzero(ties[line])[spare[line] :]] = True
        return kept.reshape(costs.shape)


@dataclass(frozen=True)
class NOfM:
    """Of every m consecutive inputs of an output, n may stay.

    Sparse kernels (NVIDIA's 2:4: n=2, m=4) take the groups along input channels, so these must run fastest. The number
    of inputs must be a multiple of m.
    """

    n: int
    m: int

    @property
    def rows(self) -> int:
        """How many consecutive outputs are decided together."""
        return 1

    @property
    def step(self) -> int:
        """How many consecutive inputs are decided together."""
        return self.m

    def kept(self, costs: Array) -> Array:
        """Return the mask, bool, of costs [outputs, inputs]; of equal costs the last ones go, on every machine."""
        groups = costs.reshape(len(costs), -1, self.m)
        order = np.argsort(-groups, axis=-1, kind="stable")
        kept = np.zeros(groups.shape, bool)
        np.put_along_axis(kept, order[..., : self.n], True, axis=-1)
        return kept.reshape(costs.shape)


Constraint = Unstructured | NOfM
