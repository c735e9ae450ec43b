"""Tied layers: similar layers read one common weight, the one that changes the outputs of all of them least."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.errors import UsageError
from graphopt.options import check, opt

from ..analyses.forecast import forecasting
from ..analyses.linear_layers import LinearLayer, linear_layers
from ..analyses.quantized import refuse_quantized
from ..analyses.second_moments import inputs_of
from ..analyses.selection import Selection, select
from ..solvers.blas_threads import threads_for
from .integer_weights import release
from .order import BEFORE_ZEROS
from .prune_aims import Aims
from .similar_layers import Group, Similarity, alike
from .solved_layers import why_fixed

_NAME = "tie-layers"
_USUAL_PARAMS = 0.9


@dataclass(frozen=True)
class TieLayers(Pass):
    """Let similar layers share one weight: those whose outputs, and the model's, change least by it."""

    params: float | None = opt(
        None, help="share of the weights of linear layers to be left; 0.9 where nothing is asked for"
    )
    error: float | None = opt(
        None, help="share of their output power that layers that have a like may lose, the mean of all"
    )
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")

    name = _NAME
    guarantee = Guarantee.LOSSY
    precedes = BEFORE_ZEROS
    needs = frozenset({Need.CANONICAL, Need.CALIBRATION_OPTIONAL})

    def __post_init__(self) -> None:
        """Refuse two goals at once, and shares that are none."""
        check(self, where=f"pass `{self.name}`")
        if self.params is not None and self.error is not None:
            raise UsageError(
                f"pass `{self.name}`: `params` and `error` cannot both be given", hint="one of them decides"
            )
        for name, usual in (("params", _USUAL_PARAMS), ("error", 0.01)):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                raise UsageError(
                    f"pass `{self.name}`: option `{name}` is out of range: `{value:g}`",
                    hint=f"a share between 0 and 1, such as `{name}={usual}`",
                )

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Find layers that are alike, choose groups, and give each group its weight.

        Raises:
            PassError: The model is quantized already, or a weight holds NaN or infinity.
            UsageError: A glob matches nothing.
        """
        selection = select(model, self.include, self.exclude, where=f"pass `{self.name}`")
        refuse_quantized(model, self.name, f"tie layers first, then quantize: `--passes {self.name},quant`")
        every = ctx.analyse(linear_layers)
        classes = alike(every, selection, ctx)
        if not classes:
            ctx.note("found no two layers that could share a weight: the model is unchanged")
            return
        similarity = Similarity(classes, ctx)
        similarity.weigh(ctx)
        total = _parameters([layer for layer in every if selection.allows(layer.node)])
        share = None if self.error is not None else self.params or _USUAL_PARAMS
        if share is None:
            groups = similarity.groups(error=self.error or 0.0)
        else:
            groups = similarity.groups(save=(1 - share) * total)
        if not groups:
            why = "are alike enough to share a weight"
            if share is not None:
                why = f"could share a weight and leave about {share:.0%}: each saves over four times as much"
            ctx.note(f"no two layers {why}: the model is unchanged")
            return
        with forecasting(ctx, model, [layer for group in groups for layer in group.layers]):
            solved = tie(groups, selection, ctx)
        _summarise(groups, len(similarity.layers), total, share, ctx)
        if solved:
            ctx.note(f"{solved} other layers solved anew for what they gave", solved=solved)


def _summarise(groups: Sequence[Group], alike_layers: int, total: int, share: float | None, ctx: Context) -> None:
    """Say what is tied, and what that is expected to cost."""
    left = 1 - sum((len(group.layers) - 1) * group.weight.size for group in groups) / total
    losses = [(loss, layer) for group in groups for loss, layer in zip(group.errors, group.layers, strict=True)]
    most, worst = max(losses, key=lambda pair: pair[0])
    mean = sum(loss for loss, _ in losses) / len(losses)
    if share is not None and left > share:
        ctx.note(f"all layers that have a like are tied: {share:.0%} of the weights cannot be reached", reached=False)
    ctx.note(
        f"{len(losses)} of {alike_layers} layers that have a like share {_counted(groups)}: {left:.1%} of the "
        f"weights of linear layers left; of their outputs' power {mean:.1%} is lost, at most {most:.1%} "
        f"(`{walk.label(worst.node)}`); the file is smaller, a run computes as much as before",
        groups=[[walk.label(layer.node) for layer in group.layers] for group in groups],
        predicted_errors=[list(group.errors) for group in groups],
        left=left,
    )


def _counted(groups: Sequence[Group]) -> str:
    return "one weight" if len(groups) == 1 else f"{len(groups)} weights"


def tie(groups: Sequence[Group], selection: Selection, ctx: Context) -> int:
    """Let the layers of each group read its weight, and with data the others make up for it.

    From the first tied layer on, each layer is solved anew for what it gave, on what it reads by then. Of one whose
    weight is tied, or must stay for another reason, the bias takes what the mean of its outputs lost.

    Args:
        groups: The groups.
        selection: Which layers may change.
        ctx: Where edits are made.

    Returns:
        How many layers were solved anew.
    """
    with ExitStack() as stack:
        # What layers are to give is what they give now.
        aims = stack.enter_context(Aims(ctx)) if ctx.data is not None else None
        for group in groups:
            _share(group, ctx)
        if aims is None:
            return 0
        every = linear_layers(ctx.model)
        tied = {layer.node for group in groups for layer in group.layers}
        order = {node: place for place, node in enumerate(ctx.model.graph)}
        first = min(order[node] for node in tied)
        behind = [layer for layer in every if order.get(layer.node, -1) >= first and selection.allows(layer.node)]
        return sum(_make_up(layer, every, aims, ctx) for layer in ctx.track(behind, "solving anew"))


def _make_up(layer: LinearLayer, every: Sequence[LinearLayer], aims: Aims, ctx: Context) -> bool:
    """Solve a layer anew, or its bias alone, and return whether its weight is another one."""
    with threads_for(inputs_of(layer)):
        aim = aims.of(layer)
    if aim is None:
        return False
    free = why_fixed(layer, every) is None and bool(np.isfinite(layer.from_matrix(aim.weight).astype(np.float32)).all())
    weight = aim.weight if free else layer.matrix()
    with ctx.rewriter.edit(_NAME, layer.node):
        if free:
            ctx.rewriter.set_weight(layer.weight, layer.from_matrix(weight))
        if aim.bias is not None:
            aim.bias.shift(aim.shift(weight), ctx)
    return free


def _share(group: Group, ctx: Context) -> None:
    """Give the layers of a group its weight, under the name of the first one's."""
    first, *others = group.layers
    with ctx.rewriter.edit(_NAME, *(layer.node for layer in group.layers)):
        ctx.rewriter.set_weight(first.weight, first.from_matrix(group.weight))
        for layer in others:
            ctx.rewriter.set_input(layer.node, layer.weight_index, first.weight)
            release(ctx.rewriter, layer.weight)
    if ctx.forecast is not None:
        for layer in group.layers:
            ctx.forecast.weight(layer.node, group.weight)


def _parameters(layers: Sequence[LinearLayer]) -> int:
    """Return how many numbers the weights of layers hold, a shared one once."""
    tensors = {layer.weight: walk.constant_tensor(layer.weight) for layer in layers}
    return sum(tensor.size for tensor in tensors.values() if tensor is not None)
