"""Half precision: a model that computes, or is stored, in float16 or bfloat16."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.errors import PassError
from graphopt.options import opt
from graphopt.report import show_bytes

from ..analyses.number_formats import first_opset, float_ports
from ..analyses.selection import Selection, select
from . import cast_measured
from .cast_lowering import Lowering
from .cast_plan import CastPlan, plan_cast
from .stored_halves import store_halves

_DTYPES = {"float16": ir.DataType.FLOAT16, "bfloat16": ir.DataType.BFLOAT16}
# Rounding a number to the format makes noise this far below it, dB: 6.02 for each of 11 or 8 bits, and 4.8 or so.
_OWN_SQNR = {"float16": 71.0, "bfloat16": 53.0}


@dataclass(frozen=True)
class Cast(Pass):
    """Compute in float16 or bfloat16 where that is safe, or only store weights so; inputs and outputs stay float32."""

    to: Literal["float16", "bfloat16"] = opt("float16", help="the half format")
    compute: Literal["auto", "half", "float32"] = opt(
        "auto",
        help="compute in halves, or in float32 and only store weights so; auto: halves where the target is faster",
    )
    keep: Literal["auto", "operators", "measured", "none"] = opt(
        "auto",
        help="what stays in float32: operators known to overflow or lose, those measured to with `--data`, both (auto)",
    )
    margin: float = opt(
        24.0, help="dB a node may lose, by itself, beyond the rounding of the format; for what is measured", low=0
    )
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")

    name = "cast"
    guarantee = Guarantee.LOSSY

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form; data by what is asked for."""
        match self.keep:
            case "measured":
                return frozenset({Need.CANONICAL, Need.CALIBRATION})
            case "auto":
                return frozenset({Need.CANONICAL, Need.CALIBRATION_OPTIONAL})
            case _:
                return frozenset({Need.CANONICAL})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Cast what the selection names and the guards let go.

        Raises:
            PassError: Nothing of the model can be of the format in its opset, or the target cannot run it.
            UsageError: A glob matches nothing.
        """
        selection = select(model, self.include, self.exclude, where="pass `cast`")
        if not self._computes_in_half(ctx):
            store_halves(model, ctx, selection, _DTYPES[self.to])
            return
        ctx.analyse(shapes.infer_shapes)
        dtype = _DTYPES[self.to]
        plan = self._plan(model, ctx, selection, dtype)
        if not plan.ports:
            _refuse_nothing(plan, model, self.to)
            return
        before = _stored_bytes(model)
        lowering = Lowering(ctx, plan)
        lowering.run(model)
        ctx.analyse(shapes.infer_shapes)
        _summarise(plan, lowering, before, _stored_bytes(model), ctx)

    def _computes_in_half(self, ctx: Context) -> bool:
        if self.compute == "float32":
            return False
        fast = self.to in ctx.target.floats
        if self.compute == "auto" and not fast:
            ctx.note(
                f"`{ctx.target.name}` computes no faster in {self.to}: weights are only stored so, and widened when "
                "the model is loaded; the arithmetic stays (`compute=half` casts all of it)"
            )
            return False
        if not fast and self.to == "bfloat16":
            raise PassError(
                f"pass `cast`: target `{ctx.target.name}` does not compute in bfloat16",
                hint="`cast:to=bfloat16:compute=float32` stores weights so; float16 runs everywhere",
            )
        if not fast:
            ctx.note(
                f"`{ctx.target.name}` has no fast kernels for {self.to}: the file is smaller, and runs are slower there"
            )
        return True

    def _plan(self, model: ir.Model, ctx: Context, selection: Selection, dtype: ir.DataType) -> CastPlan:
        by_operator = self.keep in ("auto", "operators")

        def plan(measured: dict[ir.Node, str]) -> CastPlan:
            return plan_cast(model, dtype, selection, by_operator=by_operator, measured=measured)

        first = plan({})
        if self.keep not in ("auto", "measured") or ctx.data is None or not first.ports:
            return first
        if walk.opset(model) < cast_measured.FIRST_OPSET:
            ctx.left(f"nothing was measured: that takes opset {cast_measured.FIRST_OPSET}")
            return first
        least = _OWN_SQNR[self.to] - self.margin
        losses = cast_measured.measure(ctx, first.ports, dtype)
        found = cast_measured.reasons(losses, dtype, least)
        worst = min((loss.sqnr for loss in losses.values()), default=float("inf"))
        ctx.note(
            f"measured {len(losses)} nodes one by one: SQNR of the worst {worst:.1f} dB, {len(found)} stay in float32 "
            f"(below {least:g} dB, or near the end of the range)",
            measured=len(losses),
            worst_sqnr=worst,
            least_sqnr=least,
        )
        return plan(found)


def _refuse_nothing(plan: CastPlan, model: ir.Model, to: str) -> None:
    """Say why nothing can be cast.

    Raises:
        PassError: There is something to cast, and it may not be.
    """
    if not plan.kept:
        raise PassError("pass `cast` finds no float32 arithmetic in the model", hint="it may be in halves already")
    why, count = plan.reasons.most_common(1)[0]
    needed = [first_opset(node.op_type, _DTYPES[to]) for node in plan.kept]
    newer = max((one for one in needed if one is not None), default=0)
    hint = "widen `include` and `exclude`, or see `keep`"
    if newer > walk.opset(model):
        hint = f"convert the model first: `--passes opset:to={newer},cast:to={to}`"
    raise PassError(f"pass `cast` can compute nothing in {to}: {why} ({count} nodes)", hint=hint)


def _stored_bytes(model: ir.Model) -> int:
    return sum(tensor.nbytes for tensor in walk.stored_tensors(model))


def _summarise(plan: CastPlan, lowering: Lowering, before: int, after: int, ctx: Context) -> None:
    done = Counter(node.op_type for node in plan.ports)
    shown = ", ".join(f"{count} {operator}" for operator, count in done.most_common(5))
    name = plan.dtype.name.lower()
    ctx.note(
        f"{len(plan.ports)} nodes in {name} ({shown}{', …' if len(done) > 5 else ''}), {len(plan.kept)} in float32, "
        f"{lowering.casts} Casts between them; constants {show_bytes(before)} → {show_bytes(after)}",
        half_nodes=len(plan.ports),
        float_nodes=len(plan.kept),
        casts=lowering.casts,
        bytes_before=before,
        bytes_after=after,
    )
    for why, count in plan.reasons.most_common():
        kept = Counter(node.op_type for node, reason in plan.kept.items() if reason == why)
        ctx.left(f"{count} nodes in float32: {why} ({', '.join(f'{n} {op}' for op, n in kept.most_common(5))})")
    flushed = sum(one.flushed for one in plan.surveys.values())
    if flushed:
        total = sum(one.size for one in plan.surveys.values())
        ctx.note(f"{flushed} of {total} constant numbers are zero in {name}", flushed=flushed)
    if lowering.clamped:
        ctx.note(
            f"{lowering.clamped} constants stood for infinity and are now as large as {name} holds",
            clamped=lowering.clamped,
        )
    nested = sum(1 for function in ctx.model.functions.values() for node in function if float_ports(node).inputs)
    if ctx.model.functions:
        ctx.left(
            f"{len(ctx.model.functions)} functions stay in float32 ({nested} nodes): `inline-functions` opens them"
        )
