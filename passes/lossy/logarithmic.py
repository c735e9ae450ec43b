"""Logarithmic weights: each a signed power of two, or a sum of two of them, times a scale."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.errors import UsageError
from graphopt.options import opt

from ..analyses.quantized import refuse_quantized
from ..analyses.selection import select
from ..solvers.codebook import Codebook, powers_of_two
from .code_planes import bits_for
from .coded_layers import Coding, needs_of, solver_of
from .coded_weights import store_codes


@dataclass(frozen=True)
class Logarithmic(Pass):
    """Round weights to signed powers of two, or sums of two of them."""

    bits: int = opt(4, help="bits of a code, sign included", low=2, high=6)
    terms: int = opt(1, help="powers of two that are added up for a weight", low=1, high=2)
    block: int = opt(
        0, help="consecutive inputs that share a scale, divisible by 4; 0: all of an output", low=0, high=4096
    )
    nearest: Literal["value", "logarithm"] = opt("value", help="what is nearest: the value, or its logarithm")
    solver: Literal["auto", "rtn", "mse", "gptq"] = opt(
        "auto",
        help="nearest entry (rtn), scales that lose least (mse), errors made up for (gptq); auto: gptq with data",
    )
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")

    name = "logarithmic"
    guarantee = Guarantee.LOSSY

    def __post_init__(self) -> None:
        """Refuse a block that is no whole number of bytes."""
        if self.block % 4:
            raise UsageError(f"pass `logarithmic`: option `block` cannot be `{self.block}`", hint="divisible by 4")

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form; data by the solver."""
        return needs_of(self.solver)

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Store the chosen weights as codes of powers of two.

        Raises:
            PassError: The model is quantized already, or a weight is not finite.
            UsageError: A glob matches nothing.
        """
        selection = select(model, self.include, self.exclude, where="pass `logarithmic`")
        refuse_quantized(model, self.name)
        solver = solver_of(self.solver, ctx)
        book = Codebook(powers_of_two(self.bits, self.terms), self.nearest == "logarithm")
        coding = Coding(book, bits_for(len(book.values)), self.block, solver)
        form = f"{'powers' if self.terms == 1 else 'sums of two powers'} of two of {self.bits} bits ({solver})"
        shifts = "no runtime here multiplies by shifts: only the file is smaller"
        store_codes(model, ctx, selection, coding, form, remark=shifts)
