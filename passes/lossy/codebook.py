"""Codebook weights: NF4 and FP4, a table of 16 values and a scale for each block."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.errors import PassError, UsageError
from graphopt.options import opt

from ..analyses.quantized import refuse_quantized
from ..analyses.selection import select
from ..solvers import codebook
from .coded_layers import Coding, needs_of, solver_of
from .coded_weights import store_codes

_BOOKS = {"nf4": codebook.Codebook(codebook.NF4), "fp4": codebook.Codebook(codebook.FP4)}
# What MatMulBnb4 calls them.
_BNB_TYPES = {"fp4": 0, "nf4": 1}
_BITS = 4
_OPERATOR = "com.microsoft::MatMulBnb4"


@dataclass(frozen=True)
class CodebookWeights(Pass):
    """Store weights as codes of a table of 16 values, with a scale for each block."""

    format: Literal["nf4", "fp4"] = opt("nf4", help="the table: quantiles of a normal distribution, or small floats")
    block: int = opt(64, help="consecutive inputs that share a scale, even", low=8, high=4096)
    solver: Literal["auto", "rtn", "mse", "gptq"] = opt(
        "auto",
        help="nearest entry (rtn), scales that lose least (mse), errors made up for (gptq); auto: gptq with data",
    )
    form: Literal["auto", "table", "MatMulBnb4"] = opt(
        "auto",
        help="decoded from a table as the model is loaded, or by MatMulBnb4 at each run; auto: what is faster there",
    )
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")

    name = "codebook"
    guarantee = Guarantee.LOSSY

    def __post_init__(self) -> None:
        """Refuse a block that is no whole number of bytes."""
        if self.block % 2:
            raise UsageError(f"pass `codebook`: option `block` cannot be `{self.block}`", hint="an even number")

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form; data by the solver."""
        return needs_of(self.solver)

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Store the chosen weights as codes.

        Raises:
            PassError: The model is quantized already, a weight is not finite, or the target lacks what is asked for.
            UsageError: A glob matches nothing.
        """
        selection = select(model, self.include, self.exclude, where="pass `codebook`")
        refuse_quantized(model, self.name)
        by_operator = self._by_operator(ctx)
        solver = solver_of(self.solver, ctx)
        coding = Coding(_BOOKS[self.format], _BITS, self.block, solver, by_operator)
        form = f"{self.format} in blocks of {self.block} ({solver})"
        store_codes(model, ctx, selection, coding, form, bnb_type=_BNB_TYPES[self.format] if by_operator else None)

    def _by_operator(self, ctx: Context) -> bool:
        has_operator = ctx.target.weight_only is not None and ctx.target.weight_only.form == "MatMulNBits"
        if self.form == "MatMulBnb4" and not has_operator:
            raise PassError(
                f"pass `codebook`: target `{ctx.target.name}` has no MatMulBnb4", hint="`form=table` runs everywhere"
            )
        return self.form == "MatMulBnb4" or (self.form == "auto" and _OPERATOR in ctx.target.fast_ops)
