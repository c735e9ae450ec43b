"""Matrix products as candidates of `factorize`: y = W x as y = A (B x), the original operator the second of the two."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.summary import node_macs

from ..analyses.finite_weights import finite_matrix
from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import gram, inputs_of
from ..solvers.blas_threads import threads_for
from ..solvers.rank import Factors, Spectrum
from .factor_forms import Curve, Level, Method, Reads, allowed_ranks, steadied
from .layer_bias import bias_for_mean, bias_of_layer
from .prune_aims import Aim, Aims
from .split_products import as_second, first_product, left_factor, right_factor, rows_run_down

_RULE = "factorize"


@dataclass(frozen=True, eq=False)
class Product:
    """A MatMul or Gemm with a constant matrix, or several that read the same one, each applied to rows of its own.

    Attributes:
        layer: The first of its layers.
        readers: All of its layers, in graph order; more than one where they share the weight.
        method: How it is judged.
    """

    layer: LinearLayer
    readers: Sequence[LinearLayer]
    method: Method

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The operators, in graph order."""
        return [reader.node for reader in self.readers]

    @property
    def kind(self) -> tuple[object, ...]:
        """Operator and sizes."""
        return self.layer.node.op_type, self.layer.dims

    @property
    def layers(self) -> int:
        """One: of readers of one weight the error is that of all rows together."""
        return 1

    @property
    def parameters(self) -> int:
        """How many weights it has."""
        return math.prod(self.layer.dims)

    @property
    def macs(self) -> float:
        """Multiplications of all its layers; those of one row each where shapes are unknown."""
        return sum(node_macs(node) or self.parameters for node in self.nodes)

    def curve(self, reads: Reads, ctx: Context) -> Curve:
        """Return two products at every rank that saves something.

        Raises:
            PassError: The weight holds NaN or infinity.
        """
        matrix = finite_matrix(self.layer)
        alone = len(self.readers) == 1
        seen = reads(self.layer) if alone else None
        bias = bias_of_layer(self.layer, ctx)
        moment = None if seen is None else steadied(seen.second if bias is None else seen.covariance, seen.rows)
        with threads_for(inputs_of(self.layer)):
            spectrum = Spectrum(matrix, moment if alone else self._shared_moment(ctx))
            if not spectrum.errors[0]:  # the data say nothing of a layer that gives nothing on them
                spectrum = Spectrum(matrix)
        ranks = allowed_ranks(len(matrix), matrix.shape[1], ctx.target.width_multiple)
        levels = [Level("whole", (), 0.0, self.parameters, self.macs)]
        levels += [self._level(rank, spectrum) for rank in ranks]

        def approximate(place: int) -> Mapping[str, Array]:
            near = spectrum.factors(levels[place].ranks[0]).matrix()
            contents = {self.layer.weight.name or "": self.layer.from_matrix(near)}
            if seen is not None and bias is not None and bias.stored is not None:
                contents[bias.stored.name or ""] = bias_for_mean(bias, matrix - near, seen.mean)
            return contents

        return Curve(levels, approximate)

    def apply(self, level: Level, aims: Aims | None, ctx: Context) -> float:
        """Put two products in the place of each, and return the share of the output's power that is lost."""
        readers = [reader.now() for reader in self.readers]
        aim = aims.of(readers[0]) if aims is not None and len(readers) == 1 else None
        factors, share = self._solve(level.ranks[0], aim, ctx)
        with ctx.rewriter.edit(_RULE, *self.nodes):
            _put(readers, factors, ctx)
            if aim is not None and aim.bias is not None:
                aim.bias.shift(aim.shift(factors.matrix()), ctx)
        return share

    def _solve(self, rank: int, aim: Aim | None, ctx: Context) -> tuple[Factors, float]:
        """Return factors for what the layer is to give by now, and the share of its power they lose."""
        weight = finite_matrix(self.layer) if aim is None else aim.weight
        moment = self._shared_moment(ctx) if aim is None else aim.second_moment
        with threads_for(inputs_of(self.layer)):
            spectrum = Spectrum(weight, moment)
            factors = spectrum.factors(rank)
        whole = float(spectrum.errors[0])
        return factors, factors.error / whole if whole else 0.0

    def _level(self, rank: int, spectrum: Spectrum) -> Level:
        dims = self.layer.dims
        parameters, whole = rank * sum(dims), float(spectrum.errors[0])
        error = float(spectrum.errors[rank]) / whole if whole else 0.0
        return Level("pair", (rank,), error, parameters, self.macs * parameters / self.parameters)

    def _shared_moment(self, ctx: Context) -> Array | None:
        """Return H of all that read a shared weight together, as the model is now; None where one cannot be seen."""
        if ctx.data is None or self.method == "svd" or len(self.readers) == 1:
            return None
        moments = gram(ctx, self.readers)
        return np.sum(list(moments.values()), axis=0) if len(moments) == len(self.readers) else None


def _put(readers: Sequence[LinearLayer], factors: Factors, ctx: Context) -> None:
    """Put two products in the place of each layer that reads a weight; all share the factors."""
    left = left_factor(readers[0], factors.left, ctx)
    rights: dict[bool, ir.Value] = {}
    for reader in readers:
        across = rows_run_down(reader)
        if across not in rights:
            rights[across] = right_factor(reader, factors.right, ctx)
        as_second(reader, left, first_product(reader, rights[across], ctx), ctx)
