"""Weight-only quantization in few bits: matrices and tables in blocks with a scale each."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.report import show_bytes

from ..analyses.finite_weights import not_finite
from ..analyses.linear_layers import as_linear_layer
from ..analyses.selection import Selection
from ..solvers.grid import GridWeight
from ..solvers.rows import by_rows
from .integer_weights import weight_tensor
from .runtime_blocks import can_lower_to_runtime, lower_to_runtime
from .standard_blocks import can_lower_to_standard, lower_to_standard
from .weight_plan import WeightPlan
from .weight_readers import StoredMatrix, WeightReader, all_readers, no_reader, reader_of
from .weight_rounding import WeightRounding

_RULE = "quant-blocks"
# What the nodes, names and shapes that bring a weight back to float take in a file, roughly.
_OVERHEAD_BYTES = 512
_BYTE_BITS = 8


def quantize_blocks(model: ir.Model, ctx: Context, selection: Selection, plan: WeightPlan) -> dict[ir.Value, str]:
    """Store the matrices of products, and tables that are looked up, as codes of few bits.

    Layers are taken in graph order, so that a solver that looks at data sees what each layer reads once the layers
    before it have been changed. Tables and the output layers tied to them get 8 bits.

    Args:
        model: The model, changed in place.
        ctx: Target, rewriter, and calibration data where the solver wants them.
        selection: Nodes whose weights may be stored as integers.
        plan: Format, solver and how the target reads them.

    Returns:
        Why weights were left as they are.

    Raises:
        PassError: A weight holds NaN or infinity.
    """
    run = _Run(ctx, plan, {node: place for place, node in enumerate(walk.every_node(model))})
    weights = run.choose(selection)
    matrices = [StoredMatrix(weight, all_readers(weight, run.order)[0]) for weight in weights]
    with WeightRounding(ctx, plan.solver, matrices, plan) as rounding:
        for weight in ctx.track(weights, "rounding"):
            run.store(weight, rounding)
        run.summarise(rounding)
    return run.left


@dataclass
class _Run:
    """One run over a model.

    Attributes:
        ctx: Where edits and notes go.
        plan: What was asked for.
        order: The place of each node.
        readers: How many readers of each operator.
        stored: What became of each weight.
        left: Why weights were left.
    """

    ctx: Context
    plan: WeightPlan
    order: dict[ir.Node, int]
    readers: Counter[str] = field(default_factory=Counter)
    stored: list[dict[str, Any]] = field(default_factory=list)
    left: dict[ir.Value, str] = field(default_factory=dict)

    def choose(self, selection: Selection) -> list[ir.Value]:
        """Return the weights to store, in the order of their first readers."""
        chosen: dict[ir.Value, bool] = {}
        for node in self.order:
            if not selection.allows(node):
                continue
            reader = reader_of(node)
            if reader is None:
                self._leave(node)
                continue
            if reader.layer.weight in chosen:
                continue
            reason = self._obstacle(reader, selection)
            if reason is not None:
                self.left[reader.layer.weight] = reason
            chosen[reader.layer.weight] = reason is None
        return [weight for weight, taken in chosen.items() if taken]

    def _leave(self, node: ir.Node) -> None:
        """Remember why a layer is no product or lookup that reads codes."""
        layer = as_linear_layer(node)
        if layer is not None:
            self.left.setdefault(layer.weight, no_reader(layer))

    def _obstacle(self, reader: WeightReader, selection: Selection) -> str | None:
        weight = reader.layer.weight
        if weight.is_graph_output():
            return "an output of the model"
        readers, stranger = all_readers(weight, self.order)
        if stranger is not None:
            return f"also read by {stranger.op_type}"
        if any(not selection.allows(other.node) for other in readers):
            return "also read by a node that is excluded"
        if len({other.layer.output_axis for other in readers}) > 1:
            return "read both as it is and transposed"
        matrix = StoredMatrix(weight, readers)
        plan = self._plan_of(matrix)
        if plan is None:
            return "looked up, for which the target takes no blocks of 8 bits"
        can = [_can_lower(other, plan) for other in readers]
        return next((why for why in can if why is not None), None) or self._too_small(matrix, plan)

    def _plan_of(self, matrix: StoredMatrix) -> WeightPlan | None:
        if not matrix.is_table:
            return self.plan
        return self.plan.table

    def _too_small(self, matrix: StoredMatrix, plan: WeightPlan) -> str | None:
        tensor = weight_tensor(matrix.layer)
        outputs, inputs = _sizes(matrix)
        after = stored_bytes(outputs, inputs, plan, int(tensor.dtype.itemsize)) + _OVERHEAD_BYTES
        return "no smaller in codes and scales" if after >= tensor.nbytes else None

    def store(self, weight: ir.Value, rounding: WeightRounding) -> None:
        """Solve one weight and let all its readers read the codes, as one edit."""
        matrix = StoredMatrix(weight, all_readers(weight, self.order)[0])
        plan = self._plan_of(matrix)
        assert plan is not None, "checked when it was chosen"
        tensor, layer = weight_tensor(matrix.layer), matrix.layer
        # Rounding alone gets through whatever it is given, and what it cannot say makes its error none.
        finite = rounding.solver == "rtn" or all(by_rows(_is_finite, layer.matrix()))
        found = rounding.solve(matrix, plan) if finite else None
        if found is None or not np.isfinite(found.error):
            raise not_finite(f"weight `{weight.name}`")
        self._remember(matrix, plan, found, tensor)
        if self.ctx.forecast is not None:
            for reader in matrix.readers:
                self.ctx.forecast.weight(reader.node, rounding.values(matrix, found))
        with self.ctx.rewriter.edit(_RULE, layer.node):
            if plan.uses_runtime_operator:
                lower_to_runtime(matrix, found, plan, self.ctx)
            else:
                lower_to_standard(matrix, found, plan, self.ctx)
        release = getattr(tensor, "release", None)
        if release is not None:
            release()

    def _remember(self, matrix: StoredMatrix, plan: WeightPlan, found: GridWeight, tensor: ir.TensorProtocol) -> None:
        outputs, inputs = found.codes.shape
        self.readers.update(reader.node.op_type for reader in matrix.readers)
        self.stored.append(
            {
                "weight": matrix.weight.name,
                "format": plan.code,
                "group": plan.group,
                "output_error": found.error,
                "bytes_before": tensor.nbytes,
                "bytes": stored_bytes(outputs, inputs, plan, int(tensor.dtype.itemsize)),
            }
        )

    def summarise(self, rounding: WeightRounding) -> None:
        """Say what was done, and what was left and why."""
        if not self.stored:
            return  # why not is said of what becomes of them instead
        if rounding.blind:
            why = "what they multiply is in a subgraph or function, or several layers share them"
            if rounding.solver == "awq":
                why = "no Mul by a constant or normalization before them takes the factors in, for all that reads it"
            self.ctx.left(f"{rounding.blind} weights rounded without data: {why}", weights=rounding.blind)
        formats = Counter(f"{one['format']} by {one['group']}" for one in self.stored)
        before, after = (sum(one[key] for one in self.stored) for key in ("bytes_before", "bytes"))
        readers = ", ".join(f"{count} {operator}" for operator, count in self.readers.most_common())
        self.ctx.note(
            f"weights stored as {', '.join(f'{code}: {count}' for code, count in formats.most_common())}"
            f"{self._of_tables()} (`solver={rounding.solver}`), for {readers}, "
            f"{show_bytes(before)} → {show_bytes(after)}; {self._computes()}",
            solver=rounding.solver,
            weights=len(self.stored),
            float_bytes=before,
            integer_bytes=after,
            accuracy_level=self.plan.scheme.accuracy_level,
            layers=self.stored,
            stored=dict(Counter(one["format"] for one in self.stored)),
        )

    def _of_tables(self) -> str:
        """Say why some weights are in more bits than was asked for."""
        others = {one["format"] for one in self.stored} - {self.plan.code}
        return f" ({'/'.join(sorted(others))} what is looked up, which loses too much in fewer bits)" if others else ""

    def _computes(self) -> str:
        if not self.plan.uses_runtime_operator:
            return "read through DequantizeLinear"
        level = self.plan.scheme.accuracy_level
        words = {0: "in the input's type", 1: "in float32", 2: "in float16", 3: "in bfloat16", 4: "in int8"}
        return f"MatMulNBits may compute {words[level]} (`accuracy_level={level}`)"


def _is_finite(rows: Array) -> bool:
    return bool(np.isfinite(rows).all())


def _can_lower(reader: WeightReader, plan: WeightPlan) -> str | None:
    return can_lower_to_runtime(reader) if plan.uses_runtime_operator else can_lower_to_standard(reader, plan)


def _sizes(matrix: StoredMatrix) -> tuple[int, int]:
    dims = walk.dims(weight_tensor(matrix.layer))
    axis = matrix.layer.output_axis
    return dims[axis], dims[1 - axis]


def stored_bytes(outputs: int, inputs: int, plan: WeightPlan, scale_bytes: int) -> int:
    """Return what a matrix takes in codes, scales and zero points."""
    grid = plan.grid
    blocks = grid.blocks(inputs)
    filled = blocks * grid.block if grid.block is not None and plan.uses_runtime_operator else inputs
    scales = 1 if grid.tensor else outputs * blocks
    zeros = 0 if grid.symmetric else outputs * -(-blocks * grid.bits // _BYTE_BITS)
    return -(-outputs * filled * grid.bits // _BYTE_BITS) + scales * scale_bytes + zeros
