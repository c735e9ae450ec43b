"""Pruning: zero the weights whose loss costs each layer's output least."""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.backend import Array
from graphopt.errors import PassError, UsageError
from graphopt.options import opt

from ..analyses.linear_layers import LinearLayer, linear_layers, readers_elsewhere
from ..analyses.quantized import first_quantized
from ..solvers import mask

_PATTERN = re.compile(r"(\d+)(?:of|:)(\d+)")


@dataclass(frozen=True)
class Prune(Pass):
    """Zero the smallest weights of each linear layer (unstructured, or N of every M)."""

    sparsity: float = opt(0.5, help="share of each layer's weights to be zero", low=0, high=1)
    pattern: str | None = opt(None, help="N of every M weights kept along the input channels, for example 2of4")

    name = "prune"
    guarantee = Guarantee.LOSSY

    def __post_init__(self) -> None:
        """Refuse a pattern that is none, wherever the pass was made."""
        _parse_pattern(self.pattern)

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form: a BatchNorm behind a layer belongs to its weights."""
        return frozenset({Need.CANONICAL})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Prune layer by layer, every shared weight once."""
        _refuse_quantized(model)
        layers = ctx.analyse(linear_layers)
        done: set[ir.Value] = set()
        zeroed = total = 0
        for layer in layers:
            if layer.weight in done or not self._may_prune(layer, layers, ctx):
                continue
            done.add(layer.weight)
            solution = self._solve(layer.matrix())
            total += solution.weight.size
            zeroed += solution.weight.size - int(np.count_nonzero(solution.weight))
            if solution.zeroed:
                ctx.rewriter.set_weight(layer.weight, layer.from_matrix(solution.weight))
        if self.pattern is not None:
            ctx.note(f"the pattern decides which weights are zero; `sparsity={self.sparsity:g}` is not used")
        _summarise(len(done), zeroed, total, ctx)

    def _solve(self, matrix: Array) -> mask.Masked:
        kept = _parse_pattern(self.pattern)
        return mask.n_of_m(matrix, *kept) if kept is not None else mask.unstructured(matrix, self.sparsity)

    def _may_prune(self, layer: LinearLayer, layers: list[LinearLayer], ctx: Context) -> bool:
        """Return whether a layer can be pruned, leaving a note where it cannot."""
        matrix = layer.matrix()
        if not np.isfinite(matrix.astype(np.float32, copy=False)).all():
            raise PassError(f"weight `{layer.weight.name}` holds NaN or infinity", hint="repair the model first")
        if layer.weight.is_graph_output():
            ctx.left("its weight is an output of the model", layer.node)
            return False
        others = readers_elsewhere(layer, layers)
        if others:
            ctx.left(f"its weight is also read by {others[0].op_type} `{walk.label(others[0])}`", layer.node)
            return False
        kept = _parse_pattern(self.pattern)
        if kept is not None and layer.channels % kept[1]:
            ctx.left(f"{layer.channels} input channels are no multiple of {kept[1]}", layer.node)
            return False
        return True


def _parse_pattern(text: str | None) -> tuple[int, int] | None:
    """Return (N, M) of a pattern such as ``2of4``."""
    if text is None:
        return None
    found = _PATTERN.fullmatch(text)
    n, m = map(int, found.groups()) if found else (0, 0)
    if not 0 < n < m:
        raise UsageError(f"pass `prune`: option `pattern` cannot be `{text}`", hint="N of M with N < M, such as `2of4`")
    return n, m


def _refuse_quantized(model: ir.Model) -> None:
    node = first_quantized(model)
    if node is not None:
        raise PassError(
            f"pass `prune` finds the model already quantized (`{walk.label(node)}` is {node.op_type})",
            hint="prune first, then quantize: `--passes prune,quant`",
        )


def _summarise(layers: int, zeroed: int, total: int, ctx: Context) -> None:
    if not layers:
        ctx.note("found no layer with constant weights to prune: the model is unchanged")
        return
    count = sum(note.left for note in ctx.notes)
    left = f" ({count} left as they were, `-v` says why)" if count else ""
    ctx.note(
        f"{layers} layers{left}, {zeroed / total:.1%} of their weights zero; a dense runtime stores and computes zeros "
        "like any number, so only a compressed file is smaller",
        layers=layers,
        zeroed=zeroed,
        weights=total,
    )
