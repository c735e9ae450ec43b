"""Low-rank factorization: layers written as products of smaller ones, where that loses least and pays."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.errors import UsageError
from graphopt.options import check, opt
from graphopt.summary import count_macs, count_parameters

from ..analyses.quantized import refuse_quantized
from ..analyses.selection import select
from .factor_candidates import Settings, find_candidates
from .factor_forms import Candidate, Level, Method
from .factor_ranks import Goal, Plan, What, plan_levels
from .order import BEFORE_ZEROS
from .prune_aims import Aims
from .residual_codes import residual_plan

_NAME = "factorize"
_GOALS: tuple[What, ...] = ("params", "macs", "energy", "error", "rank")
# What `energy=1` and the like would come to is the model as it is, which nobody asks for.
_SHARES = _GOALS[:-1]
_USUAL = Goal("params", 0.8)
# With a residual in codes, bytes are counted: codes alone take a seventh, and this leaves room for factors beside them.
_USUAL_CODED = Goal("params", 0.2)


@dataclass(frozen=True)
class Factorize(Pass):
    """Write linear layers as two or three smaller ones of low rank, each as deep as it costs the outputs least."""

    params: float | None = opt(
        None,
        help="share of the weights of layers that can be factored to be left, with `residual` of their bytes; 0.8, or "
        "0.2 with `residual`, where nothing is asked for",
    )
    macs: float | None = opt(None, help="multiplications to be left, as a share of the model's")
    energy: float | None = opt(None, help="share of each layer's output power to keep, by the least rank that does")
    error: float | None = opt(None, help="share of their output power that layers may lose, the mean of all")
    rank: int | None = opt(None, help="the same rank for all layers, or the nearest one the target likes", low=1)
    method: Literal["auto", "svd", "whitened"] = opt(
        "auto", help="by what layers are judged: their outputs on the data (whitened), or their weights alone (svd)"
    )
    form: Literal["auto", "channel", "spatial", "tucker"] = opt(
        "auto",
        help="what convolutions become: fewer channels and 1x1, a column and a row, three; auto: the best of all",
    )
    residual: Literal["none", "int4"] = opt(
        "none", help="what becomes of the rest of a matrix: dropped, or kept in four bits beside its factors"
    )
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")

    name = _NAME
    guarantee = Guarantee.LOSSY
    precedes = BEFORE_ZEROS

    def __post_init__(self) -> None:
        """Refuse goals that are none, or two at once."""
        check(self, where=f"pass `{self.name}`")
        asked = [name for name in _GOALS if getattr(self, name) is not None]
        if len(asked) > 1:
            raise UsageError(
                f"pass `{self.name}`: `{asked[0]}` and `{asked[1]}` cannot both be given", hint="one of them decides"
            )
        for name in set(asked) & set(_SHARES):
            value = getattr(self, name)
            if not 0 < value < 1:
                raise UsageError(
                    f"pass `{self.name}`: option `{name}` is out of range: `{value:g}`",
                    hint=f"a share between 0 and 1, such as `{name}={0.1 if name == 'error' else 0.8}`",
                )

        if self.residual != "none" and self.macs is not None:
            raise UsageError(
                f"pass `{self.name}`: `residual={self.residual}` saves no multiplications, which `macs` asks for",
                hint="leave one of them out; with `residual`, `params` counts bytes",
            )

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form, and data by the method."""
        match self.method:
            case "svd":
                return frozenset({Need.CANONICAL})
            case "whitened":
                return frozenset({Need.CANONICAL, Need.CALIBRATION})
            case _:
                return frozenset({Need.CANONICAL, Need.CALIBRATION_OPTIONAL})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Find the layers, settle their ranks, and factor them one after the other, in graph order.

        Raises:
            PassError: The model is quantized already, or a weight holds NaN or infinity.
            UsageError: A glob matches nothing.
        """
        selection = select(model, self.include, self.exclude, where=f"pass `{self.name}`")
        refuse_quantized(model, self.name, f"factorize first, then quantize: `--passes {self.name},quant`")
        method: Method = "svd" if self.method == "svd" or ctx.data is None else "whitened"
        usual = _USUAL if self.residual == "none" else _USUAL_CODED
        goal = next((Goal(name, getattr(self, name)) for name in _GOALS if getattr(self, name) is not None), usual)
        candidates = find_candidates(model, selection, self._settings(method, goal, ctx), ctx)
        if not candidates:
            ctx.note("found no layer that can be factored: the model is unchanged")
            return
        before = count_parameters(model), count_macs(model)
        plan = plan_levels(candidates, goal, method, ctx)
        lost = _apply(candidates, plan.levels, method, ctx)
        self._summarise(candidates, plan, goal, lost, before, ctx)

    def _settings(self, method: Method, goal: Goal, ctx: Context) -> Settings:
        return Settings(
            method,
            self.form,
            residual=residual_plan(ctx.target) if self.residual != "none" else None,
            joint=goal.what not in ("rank", "energy"),
            tables=bool(self.include),
        )

    def _summarise(
        self,
        candidates: Sequence[Candidate],
        plan: Plan,
        goal: Goal,
        lost: Sequence[float],
        before: tuple[int, int],
        ctx: Context,
    ) -> None:
        """Say what was done."""
        asked = f"{goal.what}={goal.amount:g}"
        if plan.unpaid:
            ctx.left(f"{plan.unpaid} forms and ranks given up: by the clock they are no faster", unpaid=plan.unpaid)
        if not plan.holds:
            ctx.note(f"`{asked}` cannot be had: this is the least there is")
        if not lost:
            ctx.note(f"`{asked}` takes no layer to a rank at which it is smaller: the model is unchanged")
            return
        pairs = zip(candidates, plan.levels, strict=True)
        layers = sum(candidate.layers for candidate, level in pairs if level.form != "whole")
        stacks = any(candidate.layers > 1 for candidate in candidates)
        what = "layers (those that read the same count as one)" if stacks else "layers"
        text = f"{len(lost)} of {len(candidates)} {what} factored: {plan.left:.1%} of "
        if self.residual == "none":
            parameters, macs = count_parameters(ctx.model), count_macs(ctx.model)
            text += f"their weights left, of the model {parameters / before[0]:.1%} of the parameters"
            if before[1]:  # shapes may be unknown
                text += f" and {macs / before[1]:.1%} of the multiplications"
        else:
            text += "the bytes of their weights left"
        ctx.note(
            f"{text}; predicted noise of their outputs {sum(lost) / layers:.2%} in the mean",
            factored=len(lost),
            candidates=len(candidates),
            left=plan.left,
            levels=[[level.form, *level.ranks] for level in plan.levels],
            predicted_errors=lost,
        )
        if plan.untimed and goal.what == "macs":
            ctx.note(
                f"taken without a look at the clock: {plan.untimed}; tables are not timed, nor what lies in subgraphs, "
                "nor anything with a backend whose time says nothing",
                untimed=plan.untimed,
            )
        if plan.slower:
            first = walk.label(candidates[plan.slower[0]].nodes[0])
            ctx.note(
                f"slower by the clock than before: {len(plan.slower)} (`{first}`); what is saved there is weights, "
                "`macs` takes only what is faster",
                slower=len(plan.slower),
            )


def _apply(candidates: Sequence[Candidate], levels: Sequence[Level], method: Method, ctx: Context) -> list[float]:
    """Write candidates as their levels say, and return the share of its power each one loses."""
    lost = []
    with ExitStack() as stack:
        aims = stack.enter_context(Aims(ctx)) if method == "whitened" else None
        for candidate, level in ctx.track(list(zip(candidates, levels, strict=True)), "factoring"):
            if level.form == "whole":
                continue
            node = candidate.nodes[0]
            lost.append(candidate.apply(level, aims, ctx))
            if ctx.predicts:
                ctx.note("forecast", node, predicted_error=min(lost[-1] / candidate.layers, 1.0))
    return lost
