"""Weights as a product of low rank and a residual in codes of four bits: y = A (B x) + R x."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.errors import UsageError
from graphopt.summary import node_macs
from graphopt.target import Target

from ..analyses.finite_weights import finite_matrix
from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import inputs_of
from ..exact.opset import Opset
from ..solvers.blas_threads import threads_for
from ..solvers.low_rank_codes import LowRankCodes, low_rank_codes
from ..solvers.objective import output_error
from .factor_forms import Candidate, Curve, Level, Method, Reads, allowed_ranks
from .integer_weights import weight_tensor
from .layer_bias import bias_for_mean, bias_of_layer, product_scale
from .prune_aims import Aims
from .quant_blocks import stored_bytes
from .runtime_blocks import can_lower_to_runtime, lower_to_runtime
from .split_products import first_product
from .standard_blocks import can_lower_to_standard, lower_to_standard
from .weight_plan import WeightPlan, weight_plan
from .weight_readers import StoredMatrix, no_reader, reader_of

_RULE = "factorize"
_BITS = 4
# Ranks above 0 at which a layer's error is looked at; between them its logarithm goes evenly.
_LOOKS = 3
# Rounds of codes and factors while looking.
_ROUNDS_OF_A_LOOK = 2


def residual_plan(target: Target) -> WeightPlan:
    """Return how a target reads a residual of four bits.

    Raises:
        UsageError: It reads no such weights.
    """
    if target.weight_only is None or _BITS not in target.weight_only.bits:
        raise UsageError(
            f"pass `factorize:residual=int{_BITS}`: target `{target.name}` reads no weights of {_BITS} bits",
            hint="leave `residual` out, or use target `portable`",
        )
    plan = weight_plan(target, f"int{_BITS}", None, "auto")
    assert plan is not None, "only int8 is no plan"
    return plan


def prepare(model: ir.Model, ctx: Context, plan: WeightPlan) -> None:
    """Convert a model to the first opset that says what is planned; before anything is looked for in it."""
    if walk.opset(model) < plan.opset:
        Opset(to=plan.opset).run(model, ctx)


def candidate_of(layer: LinearLayer, method: Method, plan: WeightPlan) -> Candidate | str:
    """Return a matrix product as a candidate, or why it cannot be one.

    Args:
        layer: A MatMul or Gemm.
        method: How it is judged.
        plan: How the residual is stored.
    """
    reader = reader_of(layer.node)
    if reader is None or reader.transpose is not None or reader.is_lookup:
        return f"its weight is {no_reader(layer)}"
    if len(layer.weight.uses()) > 1:
        return "its weight is read more than once"
    why = can_lower_to_runtime(reader) if plan.uses_runtime_operator else can_lower_to_standard(reader, plan)
    return f"its weight is {why}" if why is not None else CodedProduct(layer, method, plan)


@dataclass(frozen=True, eq=False)
class CodedProduct:
    """A MatMul or Gemm whose weight becomes factors and codes.

    Attributes:
        layer: The layer.
        method: How it is judged.
        plan: How codes are stored.
    """

    layer: LinearLayer
    method: Method
    plan: WeightPlan

    @property
    def nodes(self) -> list[ir.Node]:
        """The operator."""
        return [self.layer.node]

    @property
    def kind(self) -> tuple[object, ...]:
        """Operator and sizes."""
        return self.layer.node.op_type, self.layer.dims

    @property
    def layers(self) -> int:
        """One."""
        return 1

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return int(np.prod(self.layer.dims))

    @property
    def macs(self) -> float:
        """Multiplications, those of one row where shapes are unknown."""
        return float(node_macs(self.layer.node) or self.parameters)

    def curve(self, reads: Reads, ctx: Context) -> Curve:
        """Return codes alone and with factors of every rank with which they take fewer bytes than the weight.

        Parameters are counted by the bytes they take, as many each as the weight's type has.

        Raises:
            PassError: The weight holds NaN or infinity.
        """
        matrix, seen = finite_matrix(self.layer), reads(self.layer)
        bias = bias_of_layer(self.layer, ctx)
        moment = None if seen is None else (seen.second if bias is None else seen.covariance)[0]
        whole = output_error(matrix.astype(np.float32), moment)
        allowed = [0, *reversed(allowed_ranks(len(matrix), matrix.shape[1], ctx.target.width_multiple))]
        ranks = np.array([rank for rank in allowed if self._stored(rank) < self.parameters] or [0])
        looks = np.unique(ranks[np.linspace(0, len(ranks) - 1, _LOOKS + 1).astype(int)])

        def solved(rank: int) -> LowRankCodes:
            with threads_for(inputs_of(self.layer)):
                return low_rank_codes(matrix, self.plan.grid, rank, moment, rounds=_ROUNDS_OF_A_LOOK)

        errors = np.minimum.accumulate([solved(int(rank)).error / (whole or 1.0) for rank in looks])
        known = np.log(np.maximum(errors, np.finfo(np.float64).tiny))
        shares = np.exp(np.interp(ranks, looks, known)) if whole else np.zeros(len(ranks))
        levels = [Level("whole", (), 0.0, self.parameters, self.macs)]
        if self._stored(0) < self.parameters:
            levels += [self._level(int(rank), float(share)) for rank, share in zip(ranks, shares, strict=True)]

        def approximate(place: int) -> Mapping[str, Array]:
            near = solved(levels[place].ranks[0]).values()
            contents = {self.layer.weight.name or "": self.layer.from_matrix(near)}
            if seen is not None and bias is not None and bias.stored is not None:
                contents[bias.stored.name or ""] = bias_for_mean(bias, matrix - near, seen.mean)
            return contents

        return Curve(levels, approximate)

    def apply(self, level: Level, aims: Aims | None, ctx: Context) -> float:
        """Put codes, and a pair of products beside them, in the place of the product; return the share that is lost."""
        layer = self.layer.now()
        aim = aims.of(layer) if aims is not None else None
        weight = finite_matrix(layer) if aim is None else aim.weight
        moment = None if aim is None else aim.second_moment[0]
        with threads_for(inputs_of(layer)):
            found = low_rank_codes(weight, self.plan.grid, level.ranks[0], moment)
        whole = output_error(weight.astype(np.float32), moment)
        with ctx.rewriter.edit(_RULE, layer.node):
            if aim is not None and aim.bias is not None:
                aim.bias.shift(aim.shift(found.values()), ctx)
            base = _beside(layer, found, ctx) if level.ranks[0] else layer.node
            reader = reader_of(base)
            assert reader is not None, "checked when it became a candidate"
            lower = lower_to_runtime if self.plan.uses_runtime_operator else lower_to_standard
            lower(StoredMatrix(layer.weight, (reader,)), found.codes, self.plan, ctx)
        return found.error / whole if whole else 0.0

    def _level(self, rank: int, share: float) -> Level:
        macs = self.macs * (1 + rank * sum(self.layer.dims) / self.parameters)
        return Level("residual", (rank,), share, self._stored(rank), macs)

    def _stored(self, rank: int) -> int:
        """Return what factors and codes take, as so many numbers of the weight's type."""
        outputs, inputs = self.layer.dims[self.layer.output_axis], inputs_of(self.layer)
        size = int(weight_tensor(self.layer).dtype.itemsize)
        return rank * (outputs + inputs) + -(-stored_bytes(outputs, inputs, self.plan, size) // size)


def _beside(layer: LinearLayer, found: LowRankCodes, ctx: Context) -> ir.Node:
    """Add the product of two factors to what a layer gives, and return the copy of the layer that gives the rest.

    The rest keeps the bias.
    """
    rewriter, node = ctx.rewriter, layer.node
    base = rewriter.make(node.op_type, list(node.inputs), dict(node.attributes), sources=[node])
    rewriter.insert(base, before=node)
    read = first_product(layer, found.factors.right, ctx)
    left = found.factors.left * product_scale(layer)
    laid = np.ascontiguousarray(left.T if layer.weight_index == 1 else left)
    name = f"{layer.weight.name}_left"
    factor = rewriter.const(laid.astype(weight_tensor(layer).dtype.numpy()), name, near=node)
    operands = [read, factor] if layer.weight_index == 1 else [factor, read]
    second = rewriter.insert(rewriter.make("MatMul", operands, sources=[node]), before=node)
    total = rewriter.insert(rewriter.make("Add", [base.outputs[0], second.outputs[0]], sources=[node]), before=node)
    rewriter.replace(node.outputs[0], total.outputs[0])
    rewriter.erase(node)
    return base
