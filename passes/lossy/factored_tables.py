"""Tables that rows are looked up in, as two factors: rows of few numbers, and what brings them to full width."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.errors import DataError
from graphopt.summary import extent, node_macs
from graphopt.token_inputs import mask_of

from ..analyses.finite_weights import refuse_not_finite
from ..analyses.linear_layers import is_lookup
from ..analyses.second_moments import ROWS_PER_SAMPLE
from ..analyses.selection import Selection
from ..solvers.tall_rank import TallSpectrum
from .factor_forms import Candidate, Curve, Level, Method, Reads, allowed_ranks
from .integer_weights import release
from .prune_aims import Aims
from .sequential_moments import SequentialMoments
from .split_products import first_product, rows_run_down
from .weight_readers import WeightReader, all_readers

_RULE = "factorize"
# Dtypes that those who read a table are known for.
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


def counted(ids: Array, rows: int, masks: Sequence[Array] = ()) -> Array:
    """Return how often each row of a table is looked up, int64 [rows].

    Args:
        ids: Integers of any shape; negative ones count from the end of the table.
        rows: How many rows it has.
        masks: What the model's mask holds, where it has one: ids of positions that only fill up are left out.

    Raises:
        DataError: An id is beyond the table.
    """
    if masks and masks[0].shape == ids.shape and masks[0].any():
        ids = ids[masks[0] != 0]
    flat = np.asarray(ids).astype(np.int64).reshape(-1)
    if flat.size and not (-rows <= flat.min() and flat.max() < rows):
        raise DataError(f"an id is beyond the {rows} rows of its table", hint="check the samples")
    return np.bincount(flat % rows, minlength=rows)


def frequencies(counts: Array) -> Array:
    """Return how often each row is expected to be looked up, float64 [rows], summing to 1; never 0.

    Ids not seen together take the share of the ids that were seen once (Good, The population frequencies of species and
    the estimation of population parameters, 1953), evenly; but no more than half, and none more than an id seen once.

    Args:
        counts: int64 [rows]: how often each was seen.
    """
    total, unseen = int(counts.sum()), counts == 0
    if not total:
        return np.full(len(counts), 1 / max(len(counts), 1))
    missing = int(unseen.sum())
    once = max(int((counts == 1).sum()), 1)  # where none is seen once, one might have been
    mass = min(once / (total + 1), 0.5) if missing else 0.0
    each = min(mass / max(missing, 1), 1 / (total + 1))
    found = np.where(unseen, each, counts / total * (1 - each * missing))
    return np.asarray(found / found.sum())


def candidates_of(model: ir.Model, ctx: Context, selection: Selection, method: Method) -> list[Candidate]:
    """Return the tables that can be factored, in graph order, and say which cannot and why.

    Args:
        model: The model; tables of its main graph are looked at.
        ctx: Where it is said.
        selection: Which lookups, and output layers that share their tables, may be changed.
        method: How they are judged.
    """
    order = {node: place for place, node in enumerate(walk.every_node(model))}
    found: dict[ir.Value, Candidate] = {}
    seen: set[ir.Value] = set()
    for node in model.graph:
        table = node.inputs[0] if is_lookup(node) else None
        tensor = walk.constant_tensor(table)
        if table is None or table in seen or tensor is None or not selection.allows(node):
            continue
        if not tensor.dtype.is_floating_point():  # sizes, and the like
            continue
        seen.add(table)
        readers, stranger = all_readers(table, order)
        why = _obstacle(table, readers, stranger, model, selection)
        if why is None:
            found[table] = Table(table, readers, method)
        elif not readers or len(readers[0].layer.dims) == 2:
            ctx.left(why, node)
    return list(found.values())


def _obstacle(
    table: ir.Value,
    readers: Sequence[WeightReader],
    stranger: ir.Node | None,
    model: ir.Model,
    selection: Selection,
) -> str | None:
    tensor = walk.constant_tensor(table)
    if tensor is None or len(tensor.shape) != 2:
        return "its table is no matrix"
    if tensor.dtype not in _FLOATS:
        return "its table is neither float32 nor float16"
    if stranger is not None:
        return f"its table is also read by {stranger.op_type} `{walk.label(stranger)}`"
    if table.is_graph_output():
        return "its table is an output of the model"
    if any(reader.layer.output_axis != 0 for reader in readers):
        return "its table is also multiplied from the other side"
    if any(reader.node.graph is not model.graph for reader in readers):
        return "its table is also read in a subgraph or function"
    if any(not selection.allows(reader.node) for reader in readers if reader.is_lookup):
        return "its table is also read by a node that is excluded"
    return None


@dataclass(frozen=True, eq=False)
class Table:
    """A table that rows are looked up in, and that output layers may share.

    Attributes:
        value: The constant, [rows, width].
        readers: Lookups, and products by its transpose.
        method: How it is judged.
    """

    value: ir.Value
    readers: tuple[WeightReader, ...]
    method: Method
    _known: list[TallSpectrum] = field(default_factory=list, repr=False)

    @property
    def nodes(self) -> Sequence[ir.Node]:
        """The operators that read it, in graph order."""
        return [reader.node for reader in self.readers]

    @property
    def kind(self) -> tuple[object, ...]:
        """What is alike in tables of which the same is expected."""
        return ("table", *self._dims())

    @property
    def layers(self) -> int:
        """One: the table is what counts."""
        return 1

    @property
    def parameters(self) -> int:
        """How many numbers it stores."""
        rows, width = self._dims()
        return rows * width

    @property
    def macs(self) -> float:
        """Multiplications of the output layers that share it; a lookup makes none."""
        return sum(node_macs(reader.node) or self.parameters for reader in self.readers if not reader.is_lookup)

    def curve(self, reads: Reads, ctx: Context) -> Curve:
        """Return the ways to write it, whole and at every rank, by what is looked up and what output layers read.

        Raises:
            PassError: It holds NaN or infinity.
        """
        spectrum = self._spectrum(ctx)
        levels = [Level("whole", (), 0.0, self.parameters, self.macs)]
        ranks = allowed_ranks(*self._dims(), ctx.target.width_multiple)
        for rank, error in zip(ranks, self._shares(spectrum, ranks, ctx), strict=True):
            levels.append(Level("table", (rank,), error, rank * sum(self._dims()), self._macs(rank)))

        def approximate(place: int) -> Mapping[str, Array]:
            factors = spectrum.factors(levels[place].ranks[0])
            dense = factors.left @ factors.right.astype(np.float32)
            return {self.value.name or "": dense.astype(self._tensor().dtype.numpy())}

        return Curve(levels, approximate)

    def apply(self, level: Level, aims: Aims | None, ctx: Context) -> float:
        """Put rows of few numbers in its place, and products behind lookups and before output layers.

        Args:
            level: One of the curve's, not the first.
            aims: Not asked: what is looked up hangs on no layer.
            ctx: Where edits are made.
        """
        spectrum = self._spectrum(ctx)
        factors, whole = spectrum.factors(level.ranks[0]), float(spectrum.errors[0])
        rewriter, dtype, near = ctx.rewriter, self._tensor().dtype.numpy(), self.readers[0].node
        with rewriter.edit(_RULE, *self.nodes):
            left = rewriter.const(factors.left.astype(dtype), f"{self.value.name}_left", near=near)
            right = rewriter.const(factors.right.astype(dtype), f"{self.value.name}_right", near=near)
            for reader in self.readers:
                if reader.is_lookup:
                    _look_up(reader, left, right, ctx)
                else:
                    _multiply(reader, left, right, ctx)
            release(rewriter, self.value)
        return factors.error / whole if whole else 0.0

    def _spectrum(self, ctx: Context) -> TallSpectrum:
        # Tables are the first to be changed, so that what was found while the model was whole still holds.
        if not self._known:
            table = self._tensor().numpy()
            refuse_not_finite(table, f"table `{self.value.name}`")
            blind = self.method == "svd" or ctx.data is None
            rows = None if blind else self._frequencies(ctx)
            columns = None if rows is None else self._columns(table, rows, ctx)
            self._known.append(TallSpectrum([table], None if rows is None else [rows], columns))
        return self._known[0]

    def _shares(self, spectrum: TallSpectrum, ranks: Sequence[int], ctx: Context) -> list[float]:
        """Return the share lost at each rank.

        By ids that were looked at, that is too little, as most of those to come were not. So factors found for every
        other batch are judged by those between, and the other way round.
        """
        whole = float(spectrum.errors[0])
        sides = [] if self.method == "svd" or ctx.data is None else [one for one in self._counts(ctx) if one.any()]
        if len(sides) < 2:
            return [float(spectrum.errors[rank]) / whole if whole else 0.0 for rank in ranks]
        table, columns = self._tensor().numpy(), spectrum.columns
        found = np.zeros(len(ranks))
        for own, other in (sides, sides[::-1]):
            half = TallSpectrum([table], [frequencies(own)], columns)
            found += half.shares_lost(ranks, [other / other.sum()]) / 2
        return [float(share) for share in found]

    def _frequencies(self, ctx: Context) -> Array:
        """Return how often each row is looked up, whichever lookup it is."""
        first, second = self._counts(ctx)
        return frequencies(first + second)

    def _counts(self, ctx: Context) -> tuple[Array, Array]:
        """Return how often each row is looked up in every other batch, and in those between, int64 [rows] each."""
        rows, mask = self._dims()[0], mask_of(ctx.model)
        masks = [mask] if mask is not None else []
        sides = np.zeros(rows, np.int64), np.zeros(rows, np.int64)
        with ctx.walkthrough() as values:
            for reader in self.readers:
                looked_up = values.batches(reader.input, *masks) if reader.is_lookup else ()
                for turn, (ids, *held) in enumerate(looked_up):
                    sides[turn % 2][:] += counted(ids, rows, held)
        return sides

    def _columns(self, table: Array, rows: Array, ctx: Context) -> Array | None:
        """Return H of the columns: what output layers read; and as rows are read as they are, too, the identity.

        Both count by the share of their own power that is lost.
        """
        read = np.zeros((table.shape[1], table.shape[1]))
        with SequentialMoments(ctx, compare=False, limit=ROWS_PER_SAMPLE) as moments:
            for reader in self.readers:
                seen = None if reader.is_lookup else moments.of(reader.layer, reader.input.name or "")
                read += 0 if seen is None else seen.second[0]
        powers = [float(TallSpectrum([table], [rows], one).errors[0]) for one in (None, read)]
        return np.asarray(np.eye(len(read)) / powers[0] + read / powers[1]) if all(powers) else None

    def _macs(self, rank: int) -> float:
        """Return the multiplications of all readers at a rank."""
        width, total = self._dims()[1], 0.0
        for reader in self.readers:
            if reader.is_lookup:
                total += _positions(reader.input) * rank * width
            else:
                total += (node_macs(reader.node) or self.parameters) * rank * sum(self._dims()) / self.parameters
        return total

    def _dims(self) -> tuple[int, int]:
        rows, width = walk.dims(self._tensor())
        return rows, width

    def _tensor(self) -> ir.TensorProtocol:
        tensor = walk.constant_tensor(self.value)
        assert tensor is not None, "a table is a constant"
        return tensor


def _positions(ids: ir.Value) -> float:
    """Return how many rows are looked up at once, dynamic dimensions counted as 1."""
    return math.prod(extent((ids, axis)) for axis in range(len(ids.shape or ())))


def _look_up(reader: WeightReader, left: ir.Value, right: ir.Value, ctx: Context) -> None:
    """Look rows of few numbers up, and bring them to full width."""
    node, rewriter = reader.node, ctx.rewriter
    rows = rewriter.make("Gather", [left, reader.input], {"axis": 0}, sources=[node], name=f"{walk.label(node)}_left")
    rewriter.insert(rows, before=node)
    made = rewriter.make("MatMul", [rows.outputs[0], right], sources=[node], name=walk.label(node))
    rewriter.insert(made, before=node)
    rewriter.replace(node.outputs[0], made.outputs[0])
    rewriter.erase(node)


def _multiply(reader: WeightReader, left: ir.Value, right: ir.Value, ctx: Context) -> None:
    """Let an output layer multiply by the transposes of both factors, one after the other."""
    node, rewriter, index = reader.node, ctx.rewriter, reader.layer.weight_index
    layer, factor, across = replace(reader.layer, input=reader.input), right, {"perm": [1, 0]}
    if not rows_run_down(layer):
        turned = rewriter.make("Transpose", [right], across, sources=[node], name="right")
        factor = rewriter.insert(turned, before=node).outputs[0]
    rewriter.set_input(node, 1 - index, first_product(layer, factor, ctx))
    if reader.transpose is None:  # it reads the table as it is
        rewriter.set_input(node, index, left)
        return
    second = rewriter.make("Transpose", [left], across, sources=[reader.transpose], name="left")
    rewriter.insert(second, before=node)
    rewriter.set_input(node, index, second.outputs[0])
    if not walk.is_read(reader.transpose):
        rewriter.erase(reader.transpose)
