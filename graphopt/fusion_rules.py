"""What a runtime makes of quantized operators, as data: which it runs in integers, and under which conditions."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Code = Literal["uint2", "int2", "uint4", "int4", "uint8", "int8", "uint16", "int16", "float8e4m3fn", "float8e5m2"]


@dataclass(frozen=True)
class Fusion:
    """An operator between DequantizeLinear and QuantizeLinear, and the integer kernel a runtime makes of it.

    Attributes:
        op: The operator.
        kernel: What runs instead; the operator itself where that reads the codes as they are.
        reads: Positions of the inputs that must be dequantized, and no others may be; None: all that are there.
        one_read: Whether one of them is enough.
        codes: Dtypes of the first input and of the output.
        weights: Dtypes of the second input, where it may be of another dtype than the first; None: the same dtype.
        writes: ``codes``: the output must be quantized; ``float``: it must not; ``either``.
        kernel_to_float: What runs where the output stays float, if another kernel does.
        bias: Position of an input that is added to sums of products in int32, or None.
        float_bias: Position of an input that is added in float, and must not be dequantized; or None.
        bias_on_grid: Whether a bias off the grid of the sums, by more than its tolerance, keeps the kernel away.
        quantizes_floats: Whether the runtime itself quantizes a constant float weight (int8, one scale) or bias in
            front of a quantized output.
        same_grid: Whether input and output must share scale and zero point, because values only move.
        zero_points: Positions of the inputs whose zero point must be written down.
        symmetric: Whether zero points must be 0.
        one_scale: Whether what is read first must have one scale for the whole tensor.
        weight_scales: What the kernel asks of a weight with several scales, which it reads along the outputs: ``any``:
            nothing, results may be wrong; ``counted``: as many as outputs; ``placed``: along the axis of the outputs.
        factors: Attributes that must be 1 where there is a bias.
        since: First version of the operator it holds for.
    """

    op: str
    kernel: str
    reads: tuple[int, ...] | None = None
    one_read: bool = False
    codes: frozenset[str] = frozenset({"uint8", "int8"})
    weights: frozenset[str] | None = None
    writes: Literal["codes", "float", "either"] = "codes"
    kernel_to_float: str = ""
    bias: int | None = None
    float_bias: int | None = None
    bias_on_grid: bool = False
    quantizes_floats: bool = False
    same_grid: bool = False
    zero_points: tuple[int, ...] = ()
    symmetric: bool = False
    one_scale: bool = False
    weight_scales: Literal["any", "counted", "placed"] = "any"
    factors: tuple[str, ...] = ()
    since: int = 1


@dataclass(frozen=True)
class WeightFusion:
    """A product with a weight of few bits behind DequantizeLinear, and the kernel that reads the codes itself.

    Attributes:
        ops: The operators.
        kernel: What runs instead.
        codes: Dtypes of the weight.
        least_block: Smallest block, along the inputs, of a scale of its own; blocks are powers of two.
        whole_bytes: Dtypes the kernel gives wrong results for where a row of codes, as stored, fills no whole bytes.
        floats: Dtypes of activations whose Q and DQ are no hindrance: the kernel is between them, as between floats.
    """

    ops: frozenset[str]
    kernel: str
    codes: frozenset[str]
    least_block: int
    whole_bytes: frozenset[str] = frozenset()
    floats: frozenset[str] = frozenset()


@dataclass(frozen=True)
class FusionRules:
    """Everything a runtime turns into integer kernels by itself, and what it only takes if it is written so.

    Attributes:
        fusions: By operator; at most one each.
        weights: Weight-only products, or None.
        written: Operators that compute on codes as they stand, as ``domain::op`` outside the ONNX domain.
        propagates: Operators through which the runtime moves Q and DQ, by the first version it does so for.
        dynamic: Operators of dynamic quantization and the kernels they end up in, the best first.
        rewrites_int8: Whether int8 activations become uint8 where one DQ alone, with one reader, reads a Q.
        joins_bias: Whether an Add of a vector behind a MatMul makes a Gemm of both, whose rules hold then.
        drops_activations: Whether a Relu or Clip in front of Q goes where the codes end before it would clip.
    """

    fusions: tuple[Fusion, ...] = ()
    weights: WeightFusion | None = None
    written: frozenset[str] = field(default_factory=frozenset)
    propagates: tuple[tuple[str, int], ...] = ()
    dynamic: bool = False
    rewrites_int8: bool = False
    joins_bias: bool = False
    drops_activations: bool = False

    def of(self, op: str) -> Fusion | None:
        """Return the rule of an operator, or None where it has none."""
        return next((fusion for fusion in self.fusions if fusion.op == op), None)
