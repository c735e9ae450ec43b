"""What can be factored, as `factorize` sees it: candidates, and the ways each can be written at what cost and loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from ..solvers.columns import damping_for
from ..solvers.objective import DAMPING
from .prune_aims import Aims
from .sequential_moments import Moments

# How a layer is judged: by what it reads, or, plainly, as if all inputs were alike.
Method = Literal["whitened", "svd"]
# What a layer reads in the model as it was; None where nothing can be seen of it, or nothing is to be.
Reads = Callable[[LinearLayer], Moments | None]
# Below twice the target's multiple of widths, ranks are multiples of half of it.
_NARROW = 2


@dataclass(frozen=True)
class Level:
    """One way to write a candidate.

    Attributes:
        form: What the report calls it: ``whole``, ``pair``, ``channel``, ``spatial``, ``stacked`` ...
        ranks: Its ranks, as the form counts them; of ``whole`` none.
        error: What it loses of the candidate's output, as a share of its power; summed over the layers of several.
        parameters: Numbers it stores.
        macs: Multiplications of a run, counted as `graphopt.summary.node_macs` counts them.
        plan: What else the candidate wants to know of it, when it is applied.
    """

    form: str
    ranks: tuple[int, ...]
    error: float
    parameters: int
    macs: float
    plan: object = None


@dataclass(frozen=True, eq=False)
class Curve:
    """All ways to write a candidate.

    Attributes:
        levels: The first is the candidate as it is, without error; the others in any order.
        approximate: Given the place of a level, what constants of the model would hold for the candidate to lose as
            much, by name, each in its own shape and dtype: how much that matters to the outputs is tried with it.
    """

    levels: Sequence[Level]
    approximate: Callable[[int], Mapping[str, Array]]


class Candidate(Protocol):
    """A layer, several that are factored together, or a table."""

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The operators that would be replaced, in graph order; the candidate is factored when the first comes up."""

    @property
    def kind(self) -> tuple[object, ...]:
        """What is alike in candidates of which the same is expected, such as an operator and its sizes."""

    @property
    def layers(self) -> int:
        """Of how many layers its errors are the sum."""

    @property
    def parameters(self) -> int:
        """How many numbers it stores."""

    @property
    def macs(self) -> float:
        """How many multiplications it takes, counted as a level's."""

    def curve(self, reads: Reads, ctx: Context) -> Curve:
        """Return all ways to write it, judged in the model as it was; asked in graph order.

        Raises:
            PassError: A weight holds NaN or infinity.
        """

    def apply(self, level: Level, aims: Aims | None, ctx: Context) -> float:
        """Write it in another way, as one edit, and return the share of its outputs' power that is lost.

        Args:
            level: One of its curve's, not the first.
            aims: What layers are to give and read by now; None where nothing is to be seen of it.
            ctx: Where edits are made.
        """


def allowed_ranks(outputs: int, inputs: int, multiple: int) -> list[int]:
    """Return the ranks at which two factors hold fewer numbers than the matrix, the largest first.

    They are multiples of what the target likes; of half of that where the matrix is narrower than twice as much, and
    any where it is narrower than that.

    Args:
        outputs: Rows of the matrix.
        inputs: Its columns.
        multiple: What the target likes widths to be multiples of.
    """
    narrow = min(outputs, inputs)
    step = multiple if narrow >= _NARROW * multiple else max(1, multiple // 2) if narrow >= multiple else 1
    most = (outputs * inputs - 1) // (outputs + inputs)
    return list(range(most // step * step, 0, -step))


def steadied(moments: Array, rows: int) -> Array:
    """Return H with as much on its diagonal as so few rows need.

    A classifier behind a mean over all positions reads one row of each image: of fewer images than inputs it would seem
    to be of exactly so low a rank.

    Args:
        moments: float32 [groups, inputs, inputs].
        rows: How many rows they are of.
    """
    damping = damping_for(moments, rows)
    if damping <= DAMPING:
        return moments
    found, diagonal = moments.copy(), np.arange(moments.shape[-1])
    found[:, diagonal, diagonal] += damping * found[:, diagonal, diagonal].mean(axis=1, keepdims=True)
    return found
