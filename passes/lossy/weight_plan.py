"""What the options of `quant:mode=weights` come to on a target, or why they come to nothing."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from graphopt.errors import UsageError
from graphopt.target import Target, WeightOnlyScheme

from ..solvers.grid import FULL_RANGE_BITS, Grid
from .integer_weights import PER_CHANNEL_OPSET
from .quant_plan import BLOCKED_OPSET, Group

Solver = Literal["auto", "rtn", "mse", "gptq", "awq", "hqq"]
# Solvers that need to see what a layer reads.
SOLVERS_WITH_DATA = frozenset({"gptq", "awq"})
# First opsets in which a DequantizeLinear takes codes of so many bits.
_FIRST_OPSETS = {2: 25, 4: 21, 8: 10}
# With 32 weights to a scale, int4 loses a third less than with 128, for a ninth more bytes.
_USUAL_BLOCK = 32
# Tables are looked up, and output layers tied to them decide between tokens: in 4 bits these lose most, in 8 next to
# nothing.
TABLE_BITS = 8


@dataclass(frozen=True)
class WeightPlan:
    """Weights of few bits, settled.

    Attributes:
        bits: Bits of a code.
        symmetric: Whether the zero point is the middle code; else each scale has one of its own.
        group: What shares a scale: the weight, each output, or so many inputs of each output.
        solver: Who decides the codes.
        scheme: How the target reads them.
    """

    bits: int
    symmetric: bool
    group: Group
    solver: Solver
    scheme: WeightOnlyScheme

    @property
    def grid(self) -> Grid:
        """The grid of a matrix, its lowest code included, as what is computed is computed in float.

        Only ONNX Runtime's own operator is known to take negative scales.
        """
        block = self.group if isinstance(self.group, int) else None
        mirrored = self.symmetric and self.uses_runtime_operator
        return Grid(self.bits, self.symmetric, block, narrow=False, mirrored=mirrored, tensor=self.group == "tensor")

    @property
    def table(self) -> WeightPlan | None:
        """The plan of tables and of output layers tied to them, or None where the target cannot look codes up."""
        if TABLE_BITS not in self.scheme.bits or (self.uses_runtime_operator and self.scheme.embedding is None):
            return None
        return replace(self, bits=TABLE_BITS)

    @property
    def uses_runtime_operator(self) -> bool:
        """Whether products become MatMulNBits, which knows blocks only."""
        return self.scheme.form == "MatMulNBits" and isinstance(self.group, int)

    @property
    def opset(self) -> int:
        """The first opset that says all of it; the runtime's own operators read bytes, which every opset has."""
        if self.uses_runtime_operator:
            return 1
        blocked = BLOCKED_OPSET if isinstance(self.group, int) else PER_CHANNEL_OPSET
        return max(blocked, _FIRST_OPSETS[self.bits])

    @property
    def code(self) -> str:
        """The format of codes, as the option says it."""
        return f"{'' if self.symmetric else 'u'}int{self.bits}"

    @property
    def asked(self) -> str:
        """What was asked for beyond int8 rounded to nearest, in a word."""
        return self.code if self.code != "int8" else f"by {self.group} with `solver={self.solver}`"


def weight_plan(target: Target, weights: str | None, group: Group | None, solver: Solver) -> WeightPlan | None:
    """Return what was asked for, settled for a target; None for int8, a scale for each output, rounded to nearest.

    Args:
        target: The target.
        weights: Format of weights, or None for int8.
        group: What shares a scale, or None for what suits the format.
        solver: Who decides the codes.

    Raises:
        UsageError: The target reads no such weights; says which it does.
    """
    code = weights or "int8"
    if code == "int8" and not isinstance(group, int) and solver in ("auto", "rtn"):
        return None
    if not code.lstrip("u").startswith("int"):
        raise UsageError(
            f"pass `quant:mode=weights:weights={code}`: weights that are brought to float again are stored as integers",
            hint="use `weights=int8`, or `quant:mode=static`, which computes on floats of 8 bits",
        )
    bits, symmetric = int(code.removeprefix("u").removeprefix("int")), not code.startswith("u")
    scheme = target.weight_only
    if scheme is None:
        raise UsageError(
            f"pass `quant:mode=weights:weights={code}`: target `{target.name}` reads stored weights as int8 only, one "
            "scale for each channel or tensor",
            hint="leave out `weights`, `group` and `solver`, or use target `portable`",
        )
    if bits not in scheme.bits:
        known = ", ".join(f"int{one}, uint{one}" for one in scheme.bits)
        raise UsageError(
            f"pass `quant:mode=weights:weights={code}`: target `{target.name}` reads no weights of {bits} bits",
            hint=f"it reads {known}",
        )
    usual: Group = "channel" if bits == FULL_RANGE_BITS else _nearest(scheme.blocks)
    size: Group = usual if group is None else group
    if isinstance(size, int) and size not in scheme.blocks:
        raise UsageError(
            f"pass `quant:mode=weights:group={size}`: target `{target.name}` reads no blocks of {size}",
            hint=f"it reads blocks of {', '.join(map(str, scheme.blocks))}",
        )
    return WeightPlan(bits, symmetric, size, solver, scheme)


def _nearest(blocks: tuple[int, ...]) -> int:
    return min(blocks, key=lambda one: abs(one - _USUAL_BLOCK))
