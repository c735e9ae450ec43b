"""Pruning: zero the weights whose loss costs each layer's output least, and let the others make up for them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.backend import Array
from graphopt.errors import UsageError
from graphopt.options import check, opt

from ..analyses.finite_weights import finite_matrix
from ..analyses.forecast import forecasting
from ..analyses.linear_layers import LinearLayer, is_lookup, linear_layers, readers_elsewhere
from ..analyses.quantized import refuse_to_prune_quantized
from ..analyses.second_moments import inputs_of
from ..analyses.selection import Selection, select
from ..solvers import mask
from ..solvers.blas_threads import threads_for
from ..solvers.sparsity import Constraint, NOfM, Unstructured
from .order import BEFORE_SPARSE_FILES
from .prune_aims import Aims
from .prune_shares import shares_by_error, shares_by_magnitude

_PATTERN = re.compile(r"(\d+)(?:of|:)(\d+)")
_BLOCK = re.compile(r"(\d+)x(\d+)")
_RULE = "prune"


@dataclass(frozen=True)
class Prune(Pass):
    """Zero weights of linear layers, unstructured, in blocks or N of every M; with data, the others make up for it."""

    sparsity: float = opt(0.5, help="share of the weights to be zero, below 1", low=0, high=1)
    pattern: str | None = opt(None, help="N of every M weights kept along the input channels, for example 2of4")
    block: str | None = opt(None, help="blocks that go as a whole, outputs x inputs of the matrix, for example 1x4")
    method: Literal["auto", "magnitude", "wanda", "obs"] = opt(
        "auto", help="which weights go: the smallest, those times their inputs, or those others make up for best (obs)"
    )
    scope: Literal["layer", "global"] = opt(
        "layer", help="whether each layer loses that share, or all together, where it costs least"
    )
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")

    name = "prune"
    guarantee = Guarantee.LOSSY
    precedes = BEFORE_SPARSE_FILES

    def __post_init__(self) -> None:
        """Refuse what contradicts itself, wherever the pass was made."""
        check(self, where=f"pass `{self.name}`")
        parse_pattern(self.pattern)
        _parse_block(self.block)
        if self.sparsity == 1:
            raise UsageError("pass `prune`: `sparsity=1` leaves no weight", hint="a share below 1, such as 0.5")
        if self.pattern is not None and (self.block is not None or self.scope == "global"):
            other = "block" if self.block is not None else "scope=global"
            raise UsageError(f"pass `prune`: `pattern` and `{other}` exclude each other", hint="give one of the two")

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form, as a BatchNorm behind a layer belongs to its weights; data by the method."""
        match self.method:
            case "magnitude":
                return frozenset({Need.CANONICAL})
            case "auto":
                return frozenset({Need.CANONICAL, Need.CALIBRATION_OPTIONAL})
            case _:
                return frozenset({Need.CANONICAL, Need.CALIBRATION})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Prune layer by layer in graph order, every shared weight once.

        Raises:
            PassError: The model is quantized already, or a weight holds NaN or infinity.
            UsageError: A glob matches nothing.
        """
        selection = select(model, self.include, self.exclude, where=f"pass `{self.name}`")
        refuse_to_prune_quantized(model, self.name)
        every = ctx.analyse(linear_layers)
        layers = self._choose(every, selection, ctx)
        if self.sparsity == 0 and self.pattern is None:
            ctx.note("`sparsity=0` leaves every weight: the model is unchanged")
            return
        if not layers:
            count = sum(note.left for note in ctx.notes)
            left = f" ({count} left as they were, `-v` says why)" if count else " with constant weights"
            ctx.note(f"found no layer{left} to prune: the model is unchanged")
            return
        method: mask.Method = self.method if self.method != "auto" else ("obs" if ctx.data is not None else "magnitude")
        run = _Run(ctx, method, self._constraints(layers, method, ctx))
        with forecasting(ctx, model, layers):
            run.prune(layers, every)
        self._summarise(run, model)

    def _choose(self, every: list[LinearLayer], selection: Selection, ctx: Context) -> list[LinearLayer]:
        """Return the layers to prune, one for each weight, in graph order, and say which are left."""
        chosen: dict[ir.Value, LinearLayer] = {}
        for layer in every:
            if layer.weight in chosen or not selection.allows(layer.node):
                continue
            reason = self._obstacle(layer, every, selection)
            if reason is not None:
                ctx.left(reason, layer.node)
            else:
                chosen[layer.weight] = layer
        return list(chosen.values())

    def _obstacle(self, layer: LinearLayer, every: list[LinearLayer], selection: Selection) -> str | None:
        """Return why a layer cannot be pruned, or None."""
        if layer.weight.is_graph_output():
            return "its weight is an output of the model"
        others = readers_elsewhere(layer, every)
        if others:
            return f"its weight is also read by {others[0].op_type} `{walk.label(others[0])}`"
        if any(not selection.allows(use.node) for use in layer.weight.uses()):
            return "its weight is also read by a node that is excluded"
        kept = parse_pattern(self.pattern)
        if kept is not None and layer.channels % kept[1]:
            return f"{layer.channels} input channels are no multiple of {kept[1]}"
        return None

    def _constraints(self, layers: Sequence[LinearLayer], method: mask.Method, ctx: Context) -> list[Constraint]:
        """Return what each layer may keep."""
        kept = parse_pattern(self.pattern)
        if kept is not None:
            return [NOfM(*kept)] * len(layers)
        block = _parse_block(self.block) or (1, 1)
        # As published, for each output by itself.
        per_output = method == "wanda" and block == (1, 1)
        shares = [self.sparsity] * len(layers)
        if self.scope == "global":
            shares = shares_by_magnitude(layers, self.sparsity)
            if method == "obs":
                shares = shares_by_error(layers, self.sparsity, ctx)
        return [Unstructured(share, per_output, block) for share in shares]

    def _summarise(self, run: _Run, model: ir.Model) -> None:
        ctx = run.ctx
        if self.pattern is not None:
            ctx.note(f"the pattern decides which weights are zero; `sparsity={self.sparsity:g}` is not used")
        tables = sum(is_lookup(node) and walk.constant_tensor(node.inputs[0]) is not None for node in model.graph)
        if tables:
            ctx.left(
                f"{tables} tables that rows are looked up in, and output layers that share one, are no such layers"
            )
        if run.blind:
            ctx.note(
                f"{run.blind} layers pruned by magnitude, without data: what they read is in a subgraph or function, "
                "is not taken row by row, or their weight is shared",
                layers=run.blind,
            )
        count = sum(note.left and note.node is not None for note in ctx.notes)
        left = f" ({count} left as they were, `-v` says why)" if count else ""
        ctx.note(
            f"{run.layers} layers{left}, {run.zeros / run.weights:.1%} of their weights zero (`method={run.method}`); "
            "a dense runtime stores and computes zeros like any number, so only a compressed file is smaller",
            layers=run.layers,
            zeroed=run.zeros,
            weights=run.weights,
            method=run.method,
        )


@dataclass
class _Run:
    """One run over a model.

    Attributes:
        ctx: Where edits and notes go.
        method: Who decides.
        constraints: What each layer may keep.
        layers: How many were pruned.
        weights: How many weights these have.
        zeros: How many of these are zero.
        blind: How many layers were pruned without data although there are some.
    """

    ctx: Context
    method: mask.Method
    constraints: Sequence[Constraint]
    layers: int = 0
    weights: int = 0
    zeros: int = 0
    blind: int = 0

    def prune(self, layers: Sequence[LinearLayer], every: Sequence[LinearLayer]) -> None:
        """Prune layers, in graph order."""
        with ExitStack() as stack:
            aims = stack.enter_context(Aims(self.ctx)) if self.method != "magnitude" else None
            for layer, constraint in self.ctx.track(list(zip(layers, self.constraints, strict=True)), "pruning"):
                readers = sum(other.weight is layer.weight for other in every)
                with threads_for(inputs_of(layer)):
                    self._solve(layer, constraint, aims if readers == 1 else None)

    def _solve(self, layer: LinearLayer, constraint: Constraint, aims: Aims | None) -> None:
        matrix = finite_matrix(layer)
        aim = aims.of(layer) if aims is not None else None
        shift: Array | None = None
        if aim is None:
            self.blind += self.method != "magnitude"
            solution = mask.prune(matrix, constraint, method="magnitude")
        elif self.method == "wanda":
            solution = mask.prune(matrix, constraint, aim.target.second, method="wanda")
        else:
            solution = mask.prune(aim.weight, constraint, aim.second_moment, method="obs")
            shift = aim.shift(solution.weight)
        self.layers += 1
        self.weights += matrix.size
        self.zeros += matrix.size - int(np.count_nonzero(solution.weight))
        if self.ctx.forecast is not None:
            self.ctx.forecast.weight(layer.node, solution.weight)
        if not np.count_nonzero(matrix) > np.count_nonzero(solution.weight):
            return
        with self.ctx.rewriter.edit(_RULE, layer.node):
            self.ctx.rewriter.set_weight(layer.weight, layer.from_matrix(solution.weight))
            if aim is not None and aim.bias is not None and shift is not None:
                aim.bias.shift(shift, self.ctx)


def parse_pattern(text: str | None) -> tuple[int, int] | None:
    """Return (N, M) of a pattern such as ``2of4``."""
    if text is None:
        return None
    found = _PATTERN.fullmatch(text)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise UsageError(f"pass `prune`: option `pattern` cannot be `{text}`", hint="N of M with N < M, such as `2of4`")
    return n, m


def _parse_block(text: str | None) -> tuple[int, int] | None:
    """Return (outputs, inputs) of a block such as ``1x4``."""
    if text is None:
        return None
    found = _BLOCK.fullmatch(text)
    outputs, inputs = map(int, found.groups()) if found else (0, 0)
    if not (outputs and inputs):
        raise UsageError(
            f"pass `prune`: option `block` cannot be `{text}`", hint="outputs x inputs of the matrix, such as `1x4`"
        )
    return outputs, inputs
