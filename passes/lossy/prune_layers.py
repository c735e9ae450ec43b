"""Pruning of layers: whole residual blocks left out, those whose loss costs the outputs least."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.backend import Array
from graphopt.errors import PassError, UsageError
from graphopt.options import check, opt
from graphopt.summary import node_macs

from ..analyses.quantized import refuse_to_prune_quantized
from ..analyses.residual_blocks import ResidualBlock, residual_blocks
from ..analyses.selection import Selection, select
from .block_choice import Wanting, choose_by_influence, choose_measured
from .block_removal import drop_empty_sums, mean_branches, refit_behind, remove_blocks
from .order import BEFORE_FACTORS
from .prune_aims import Aims
from .separate_sizes import separate_sizes

_NAME = "prune-layers"
# One branch of every fifth layer of a transformer that has two in each; more is for users to ask for.
_USUAL_RATIO = 0.1


@dataclass(frozen=True)
class PruneLayers(Pass):
    """Leave out the residual blocks whose loss costs the outputs least, and solve the layers behind them anew."""

    ratio: float | None = opt(None, help="share of the residual blocks to remove; 0.1 where nothing is asked for")
    count: int | None = opt(None, help="how many residual blocks to remove", low=1)
    macs: float | None = opt(None, help="multiplications to be left, as a share of the model's")
    criterion: Literal["measured", "influence"] = opt(
        "measured", help="what a block costs: what its loss does to the outputs, or how far it turns what it reads"
    )
    compensate: bool = opt(True, help="whether the mean of a branch stays, and the layers behind it are solved anew")
    include: tuple[str, ...] = opt((), help="only blocks with a layer whose name or operator matches a glob")
    exclude: tuple[str, ...] = opt((), help="no block with a layer whose name or operator matches a glob")

    name = _NAME
    guarantee = Guarantee.LOSSY
    precedes = BEFORE_FACTORS
    # Constants that stay of neighbouring branches add up.
    keeps_canonical = False
    simplify_restores = True

    def __post_init__(self) -> None:
        """Refuse targets that are none, or two at once."""
        check(self, where=f"pass `{self.name}`")
        asked = [name for name in ("ratio", "count", "macs") if getattr(self, name) is not None]
        if len(asked) > 1:
            raise UsageError(
                f"pass `{_NAME}`: `{asked[0]}` and `{asked[1]}` cannot both be given", hint="one of them decides"
            )
        for name in ("ratio", "macs"):
            value = getattr(self, name)
            if value is not None and not 0 < value < 1:
                what = "removed" if name == "ratio" else "left"
                raise UsageError(
                    f"pass `{_NAME}`: option `{name}` is out of range: `{value:g}`",
                    hint=f"the share to be {what}, between 0 and 1, such as `{name}={0.2 if name == 'ratio' else 0.8}`",
                )

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form, so that branches end in an Add; data to see what blocks do."""
        return frozenset({Need.CANONICAL, Need.CALIBRATION})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Find the blocks, choose, and remove.

        Raises:
            PassError: The model is quantized, or its blocks are not enough for what was asked.
            UsageError: A glob matches nothing.
        """
        refuse_to_prune_quantized(model, _NAME)
        selection = select(model, self.include, self.exclude, where=f"pass `{_NAME}`")
        ctx.analyse(shapes.infer_shapes)
        if not self._blocks(selection, ctx):
            left = " that may go" if ctx.analyse(residual_blocks) else ""
            ctx.note(f"found no residual blocks{left}: the model is unchanged")
            return
        # Shapes read off a tensor of a block would keep what computes it.
        separate_sizes(model, ctx.rewriter)
        ctx.analyse(shapes.infer_shapes)
        blocks = self._blocks(selection, ctx)
        wants_more, gains = self._goal(blocks, ctx)
        if not wants_more([]):
            ctx.note(f"{len(blocks)} residual blocks, of which that share is none: the model is unchanged")
            return
        before = _macs(walk.every_node(model))
        constants = mean_branches(blocks, ctx) if self.compensate else {}
        if self.criterion == "measured" and ctx.judge is not None:
            chosen, divergence, tried = choose_measured(blocks, constants, gains, wants_more, ctx)
            how = f"divergence of the outputs {divergence:.3g} by trial of {tried} models"
        else:
            chosen, influences = choose_by_influence(blocks, gains, wants_more, ctx)
            how = f"influence {', '.join(f'{influences[index]:.3g}' for index in chosen)}"
        removed = [blocks[index] for index in chosen]
        words = f"{len(removed)} of {len(blocks)} residual blocks removed ({_listed(removed)}), {how}"
        solved = self._remove(removed, constants, ctx)
        share = _macs(walk.every_node(model)) / before if before else 1.0
        words += f"; {share:.1%} of the multiplications left" + (f", {solved} layers solved anew" if solved else "")
        ctx.note(words, removed=[block.name for block in removed], blocks=len(blocks), macs_left=share, solved=solved)

    def _remove(self, removed: Sequence[ResidualBlock], constants: Mapping[ResidualBlock, Array], ctx: Context) -> int:
        """Remove blocks, and return how many layers were solved anew."""
        if not self.compensate:
            remove_blocks(removed, {}, ctx)
            drop_empty_sums(removed, ctx)
            return 0
        with Aims(ctx) as aims:
            remove_blocks(removed, constants, ctx)
            solved = refit_behind(removed, aims, ctx)
        drop_empty_sums(removed, ctx)
        return solved

    def _blocks(self, selection: Selection, ctx: Context) -> list[ResidualBlock]:
        """Return the blocks that may go: with a layer that is included, and none that is excluded."""
        asked, barred = Selection(include=selection.include), Selection(exclude=selection.exclude)
        return [
            block
            for block in ctx.analyse(residual_blocks)
            if any(asked.allows(node) for node in block.layers) and all(barred.allows(node) for node in block.layers)
        ]

    def _goal(self, blocks: Sequence[ResidualBlock], ctx: Context) -> tuple[Wanting, list[float]]:
        """Return what says whether more blocks have to go, and what each saves of what was asked for.

        Raises:
            PassError: All of them are too few.
        """
        if self.macs is None:
            ratio = _USUAL_RATIO if self.ratio is None else self.ratio
            wanted = self.count if self.count is not None else round(ratio * len(blocks))
            if wanted > len(blocks):
                raise PassError(
                    f"pass `{_NAME}` is to remove {wanted} residual blocks, and finds {len(blocks)}",
                    hint=f"`count={len(blocks)}` at most",
                )
            return lambda chosen: len(chosen) < wanted, [1.0] * len(blocks)
        whole = _macs(walk.every_node(ctx.model))
        own = [_macs(block.nodes) for block in blocks]
        most, share = (1 - self.macs) * whole, self.macs
        if sum(own) < most:
            raise PassError(
                f"pass `{_NAME}` is to leave {share:.1%} of the multiplications, and "
                f"{1 - sum(own) / whole:.1%} are left without any residual block",
                hint="a larger `macs`, or `prune-channels` for what is in no block",
            )
        return lambda chosen: sum(own[index] for index in chosen) < most, [max(one / whole, 1e-9) for one in own]


def _macs(nodes: Iterable[ir.Node]) -> int:
    return sum(node_macs(node) or 0 for node in nodes)


def _listed(blocks: Sequence[ResidualBlock]) -> str:
    """Return what was removed, by kind, in the order it went."""
    kinds = Counter(block.kind for block in blocks)
    return "; ".join(
        f"{kind}: " + ", ".join(f"`{block.name}`" for block in blocks if block.kind == kind) for kind in kinds
    )
