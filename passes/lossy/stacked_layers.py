"""Layers that read the same rows, such as the projections of attention, factored with one first product for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.finite_weights import finite_matrix
from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import inputs_of
from ..solvers.blas_threads import threads_for
from ..solvers.objective import output_error
from ..solvers.stacked_rank import Part, joint_factors, stack_levels
from .factor_forms import Candidate, Curve, Level, Reads, allowed_ranks, steadied
from .factored_products import Product
from .layer_bias import bias_for_mean, bias_of_layer
from .layer_targets import residual_of
from .prune_aims import Aims
from .split_products import as_second, first_product, rows_run_down

_RULE = "factorize"


def stacked(candidates: Sequence[Candidate], ctx: Context) -> list[Candidate]:
    """Return candidates with matrix products that read the same rows put together, each where its first one was.

    Args:
        candidates: All, in graph order.
        ctx: Not used to change anything.
    """
    groups: dict[object, list[Product]] = {}
    for candidate in candidates:
        if isinstance(candidate, Product) and _can_share(candidate, ctx):
            groups.setdefault(_read_by(candidate.layer), []).append(candidate)
    stacks: dict[Candidate, Candidate] = {}
    inner: set[Candidate] = set()
    for members in groups.values():
        if len(members) > 1:
            stacks[members[0]] = Stack(tuple(members))
            inner.update(members[1:])
    return [stacks.get(one, one) for one in candidates if one not in inner]


def _can_share(product: Product, ctx: Context) -> bool:
    """Return whether a layer can be factored before its own turn, when the first of its stack is.

    At the end of a residual block it is to make up for what the other term lost, which by then may not be settled.
    """
    layer = product.layer
    return len(product.readers) == 1 and residual_of(layer, bias_of_layer(layer, ctx)) is None


def _read_by(layer: LinearLayer) -> object:
    """Return what layers that can share a first product have in common: the value, and which of its axes is inputs."""
    return layer.input, rows_run_down(layer), layer.node.graph


@dataclass(frozen=True, eq=False)
class Stack:
    """Matrix products that read the same rows.

    Attributes:
        products: Each by itself, in graph order.
    """

    products: tuple[Product, ...]

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The operators, in graph order."""
        return [product.layer.node for product in self.products]

    @property
    def kind(self) -> tuple[object, ...]:
        """What is alike in stacks of which the same is expected."""
        return ("stack", *(product.kind for product in self.products))

    @property
    def layers(self) -> int:
        """How many they are."""
        return len(self.products)

    @property
    def parameters(self) -> int:
        """How many numbers they store together."""
        return sum(product.parameters for product in self.products)

    @property
    def macs(self) -> float:
        """How many multiplications they take together."""
        return sum(product.macs for product in self.products)

    def curve(self, reads: Reads, ctx: Context) -> Curve:
        """Return all ways to write them that no other beats, joint and separate.

        Raises:
            PassError: A weight holds NaN or infinity.
        """
        layers = [product.layer for product in self.products]
        matrices = [finite_matrix(layer) for layer in layers]
        seen = reads(layers[0])
        biases = [bias_of_layer(layer, ctx) for layer in layers]
        # Around the mean where every one of them has a bias to take it.
        moment = None if seen is None else steadied(seen.second if None in biases else seen.covariance, seen.rows)[0]
        scales = _shares(matrices, [moment] * len(layers))
        multiple = ctx.target.width_multiple
        found = stack_levels(matrices, moment, scales, lambda rows, columns: allowed_ranks(rows, columns, multiple))
        per_parameter = self.macs / max(self.parameters, 1)
        levels = []
        for error, cost, plan in zip(found.errors, found.costs, found.plans, strict=True):
            ranks = tuple(part.rank for part in plan if part.rank is not None)
            joint = any(len(part.members) > 1 for part in plan)
            form = "stacked" if joint else "pair" if ranks else "whole"
            levels.append(Level(form, ranks, float(error), int(cost), per_parameter * float(cost), plan))

        def approximate(place: int) -> Mapping[str, Array]:
            contents = {}
            for part in found.plans[place]:
                if part.rank is None:
                    continue
                chosen = [matrices[one] for one in part.members]
                counts = [scales[one] for one in part.members]
                lefts, right = joint_factors(chosen, [moment] * len(chosen), counts, part.rank)
                for one, left in zip(part.members, lefts, strict=True):
                    near, bias = left @ right, biases[one]
                    contents[layers[one].weight.name or ""] = layers[one].from_matrix(near)
                    if seen is not None and bias is not None and bias.stored is not None:
                        contents[bias.stored.name or ""] = bias_for_mean(bias, matrices[one] - near, seen.mean)
            return contents

        return Curve(levels, approximate)

    def apply(self, level: Level, aims: Aims | None, ctx: Context) -> float:
        """Write them as a level says, as one edit, and return the share of their outputs' power that is lost.

        Args:
            level: One of the curve's, not the first.
            aims: What layers are to give and read by now; None where nothing is to be seen of it.
            ctx: Where edits are made.
        """
        assert isinstance(level.plan, tuple), "levels of a stack say what becomes of its layers"
        lost = 0.0
        with ctx.rewriter.edit(_RULE, *self.nodes):
            for part in level.plan:
                if part.rank is not None:
                    lost += self._factor(part, part.rank, aims, ctx)
        return lost

    def _factor(self, part: Part, rank: int, aims: Aims | None, ctx: Context) -> float:
        layers = [self.products[one].layer.now() for one in part.members]
        # Before the first of them is changed, as all read the same.
        found = [aims.of(layer) if aims is not None else None for layer in layers]
        seen = [aim for aim in found if aim is not None]
        if len(seen) == len(layers):
            weights, moments = [aim.weight for aim in seen], [aim.second_moment[0] for aim in seen]
        else:
            weights, moments = [finite_matrix(layer) for layer in layers], [None] * len(layers)
        scales = _shares(weights, moments)
        with threads_for(inputs_of(layers[0])):
            lefts, right = joint_factors(weights, moments, scales, rank)
        read = first_product(layers[0], right, ctx)
        lost = 0.0
        for layer, aim, weight, moment, scale, left in zip(layers, found, weights, moments, scales, lefts, strict=True):
            near = left @ right
            as_second(layer, left, read, ctx)
            lost += scale * output_error(weight - near, moment)
            if aim is not None and aim.bias is not None:
                aim.bias.shift(aim.shift(near), ctx)
        return lost


def _shares(weights: Sequence[Array], moments: Sequence[Array | None]) -> list[float]:
    """Return what errors of layers count for each to be a share of its power; nothing, where it gives nothing."""
    powers = [output_error(weight, moment) for weight, moment in zip(weights, moments, strict=True)]
    return [1 / power if power else 0.0 for power in powers]
