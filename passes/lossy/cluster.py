"""Clustered weights: codes of a table of few values that is found for each weight, by what its layer's output loses."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Literal

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Need, Pass
from graphopt.errors import PassError, UsageError
from graphopt.options import opt

from ..analyses.finite_weights import finite_matrix
from ..analyses.forecast import forecasting
from ..analyses.linear_layers import LinearLayer, is_lookup, linear_layers
from ..analyses.quantized import refuse_quantized
from ..analyses.second_moments import inputs_of
from ..analyses.selection import select
from ..solvers.blas_threads import threads_for
from ..solvers.cluster_fit import MANY_ZEROS
from ..solvers.clustered_weight import Clustering, stored_bytes
from ..solvers.clusters import clustered
from ..solvers.objective import output_error
from .cluster_bits import bits_by_error
from .coded_layers import Tally, coded_layers
from .coded_weights import CodedWeights
from .order import BEFORE_CODES
from .prune_aims import Aims
from .weight_codes import PackedCodes, of_clusters

_RULE = "cluster"
# The first version with the operators that put outliers in.
_OUTLIER_OPSET = 11
# At 4 bits, solved on half of 64 calibration images and KL taken on the other half, both ways: SqueezeNet 0.034, with
# one scale for each output 0.039; MobileNet 0.037 and 0.043. With 32, SqueezeNet's file is 6.45 times smaller, not 6.8.
_BLOCK = 64


@dataclass(frozen=True)
class Cluster(Pass):
    """Store weights as codes of a table of few values, found for each weight by what its layer's output loses."""

    bits: int = opt(4, help="bits of a code: a table has 2 to the power of these entries", low=1, high=8)
    granularity: str = opt("tensor", help="what has a table of its own: tensor, channel, or so many channels together")
    block: int | None = opt(
        _BLOCK,
        help="consecutive inputs that share a scale; 0: all of a channel; none, or tables of channels: no scales",
        low=0,
        high=4096,
    )
    vector: int = opt(1, help="consecutive inputs that one code stands for", low=1, high=8)
    outliers: float = opt(0.0, help="share of the weights that is kept as it is, the farthest off", low=0.0, high=0.1)
    solver: Literal["auto", "kmeans", "compensated", "allocated"] = opt(
        "auto",
        help="k-means of weights; errors made up for (compensated); and more bits for small layers, 3 % of all bytes "
        "at the most (allocated); auto: allocated with data, k-means without",
    )
    include: tuple[str, ...] = opt((), help="only nodes whose name or operator matches one of these globs")
    exclude: tuple[str, ...] = opt((), help="no node whose name or operator matches one of these globs")

    name = "cluster"
    guarantee = Guarantee.LOSSY
    precedes = BEFORE_CODES

    def __post_init__(self) -> None:
        """Refuse words that are no granularity."""
        # Python users write a number as one.
        object.__setattr__(self, "granularity", str(self.granularity))
        _rows(self.granularity)

    @property
    def needs(self) -> frozenset[Need]:
        """Canonical form; data by the solver."""
        wanted = self.solver in ("compensated", "allocated")
        return frozenset({Need.CANONICAL, Need.CALIBRATION if wanted else Need.CALIBRATION_OPTIONAL})

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Store the chosen weights as codes, in graph order, each for what its layer reads by then.

        Raises:
            PassError: The model is quantized already, a weight is not finite, or the operator set is too old for
                outliers.
            UsageError: A glob matches nothing.
        """
        selection = select(model, self.include, self.exclude, where="pass `cluster`")
        refuse_quantized(model, self.name, "cluster first, then quantize: `--passes cluster,quant`")
        opset = walk.opset(model)
        if self.outliers and opset < _OUTLIER_OPSET:
            raise PassError(
                f"pass `cluster:outliers={self.outliers:g}` needs opset {_OUTLIER_OPSET}, the model has {opset}",
                hint=f"put the pass `opset:to={_OUTLIER_OPSET}` before it, or leave `outliers` out",
            )
        layers = coded_layers(model, ctx, selection, _Taken(self._clustering()))
        if not layers:
            ctx.note("no weight is smaller as codes of a table: the model is unchanged")
            return
        run = _Run(ctx, self._clusterings(layers, ctx), Tally())
        with forecasting(ctx, model, [layer for layer in linear_layers(model) if layer.weight in layers]):
            found = run.solve(layers)
            lowering = CodedWeights(ctx)
            for weight, codes in found.items():
                lowering.lower(layers[weight], codes.unpacked())
        run.tally.note(ctx, self._form(ctx), lowering)
        if run.blind:
            ctx.note(
                f"{run.blind} weights by themselves, without data: they are looked up in or shared, or what they "
                "multiply is in a subgraph or not taken row by row",
                blind=run.blind,
            )
        if run.filled:
            ctx.note(
                f"{run.filled} weights lose zeros they had: a code stands for 0 only where so many are 0 as any code "
                "has on average, and with `vector` only where all of its weights are",
                filled=run.filled,
            )

    def _clustering(self) -> Clustering:
        return Clustering(
            bits=self.bits,
            rows=_rows(self.granularity),
            vector=self.vector,
            block=None if self.granularity == "channel" else self.block,
            outliers=self.outliers,
            compensated=self.solver != "kmeans",
        )

    def _clusterings(self, layers: Mapping[ir.Value, LinearLayer], ctx: Context) -> dict[ir.Value, Clustering]:
        """Return how each weight is clustered; those whose layers are not seen as `bits` says."""
        own = self._clustering()
        found = dict.fromkeys(layers, own)
        if not self._allocates(ctx):
            return found
        seen = [layer for layer in layers.values() if _reads_alone(layer)]
        for layer, bits in zip(seen, bits_by_error(seen, own, ctx), strict=True):
            found[layer.weight] = replace(own, bits=bits)
        return found

    def _form(self, ctx: Context) -> str:
        about = "about " if self._allocates(ctx) else ""
        of = f"{self.vector} weights" if self.vector > 1 else "a weight"
        tables = {"tensor": "a table each", "channel": "a table for each channel"}
        shared = tables.get(self.granularity, f"a table for every {self.granularity} channels")
        solver = "k-means" if self.solver == "kmeans" or ctx.data is None else "k-means, errors made up for"
        return f"codes of {about}{self.bits} bits for {of}, {shared} ({solver})"

    def _allocates(self, ctx: Context) -> bool:
        """Return whether layers have as many bits as they need."""
        return self.solver == "allocated" or (self.solver == "auto" and ctx.data is not None)


@dataclass(frozen=True)
class _Taken:
    """What a weight takes once it is clustered."""

    clustering: Clustering

    def stored_bytes(self, outputs: int, inputs: int) -> float:
        """Return what codes, tables and scales take."""
        return stored_bytes(self.clustering, outputs, inputs)


@dataclass
class _Run:
    """One run over a model.

    Attributes:
        ctx: Where edits go.
        clusterings: How each weight is clustered.
        tally: What all cost and lose.
        blind: How many were clustered without data although there are some.
        filled: How many had many zeros that are other numbers now.
    """

    ctx: Context
    clusterings: Mapping[ir.Value, Clustering]
    tally: Tally
    blind: int = 0
    filled: int = 0

    def solve(self, layers: Mapping[ir.Value, LinearLayer]) -> dict[ir.Value, PackedCodes]:
        """Give each weight the values it will have, in graph order, and return the codes to store them by."""
        with ExitStack() as stack:
            aims = stack.enter_context(Aims(self.ctx, removed=0.0)) if self.ctx.data is not None else None
            found = {}
            for weight, layer in self.ctx.track(layers.items(), "clustering"):
                with threads_for(inputs_of(layer)):
                    found[weight] = self._solve(layer, aims)
        return found

    def _solve(self, layer: LinearLayer, aims: Aims | None) -> PackedCodes:
        matrix = finite_matrix(layer)
        aim = aims.of(layer) if aims is not None and _reads_alone(layer) else None
        self.blind += aims is not None and aim is None
        wanted, moment = (matrix, None) if aim is None else (aim.weight, aim.second_moment)
        clustering = _in_even_blocks(self.clusterings[layer.weight], inputs_of(layer))
        codes = of_clusters(clustered(wanted, clustering, moment))
        whole = output_error(wanted, moment)
        self.tally.add(self.ctx, layer, codes, whole)
        values, packed = codes.values(), PackedCodes.of(codes)
        zeros = matrix == 0
        self.filled += bool(zeros.mean() >= MANY_ZEROS and values[zeros].any())
        with self.ctx.rewriter.edit(_RULE, layer.node):
            # What later layers read is what this one gives by then.
            self.ctx.rewriter.set_weight(layer.weight, _decoded(layer, packed))
            if aim is not None and aim.bias is not None:
                aim.bias.shift(aim.shift(values), self.ctx)
        return packed


def _in_even_blocks(clustering: Clustering, inputs: int) -> Clustering:
    """Return how rows of so many inputs are clustered: in as many blocks as asked for, none much shorter."""
    if not clustering.block or not inputs:
        return clustering
    blocks = -(-inputs // clustering.block)
    return replace(clustering, block=-(-inputs // blocks))


def _decoded(layer: LinearLayer, codes: PackedCodes) -> ir.TensorProtocol:
    """Return a weight that is in memory as its codes, and made of them whenever it is read."""
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"

    def made() -> ir.TensorProtocol:
        return ir.tensor(layer.in_layout(codes.unpacked().values()), name=layer.weight.name)

    return ir.LazyTensor(made, dtype=tensor.dtype, shape=ir.Shape(layer.dims), name=layer.weight.name)


def _reads_alone(layer: LinearLayer) -> bool:
    """Return whether a layer multiplies by its weight, and nothing else reads that."""
    return len({use.node for use in layer.weight.uses()}) == 1 and not is_lookup(layer.node)


def _rows(granularity: str) -> int:
    """Return how many outputs share a table; 0 for all.

    Raises:
        UsageError: The word is no granularity.
    """
    known = {"tensor": 0, "channel": 1}
    if granularity in known:
        return known[granularity]
    if not granularity.isdecimal() or not int(granularity):
        raise UsageError(
            f"pass `cluster`: option `granularity` cannot be `{granularity}`",
            hint="tensor, channel, or how many channels share a table, such as `8`",
        )
    return int(granularity)
