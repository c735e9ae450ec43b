"""Weights stored as codes of a table: packed, and decoded by operators every runtime has, folded as it loads them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.forecast import forecasting
from ..analyses.linear_layers import LinearLayer, is_lookup, linear_layers
from ..analyses.selection import Selection
from ..solvers.codebook import Codebook
from ..solvers.objective import output_error
from .code_planes import packed_planes
from .coded_layers import Coding, Tally, coded_layers, moments_of, solve
from .decoding import Decoding, StoredCodes, scale_dims
from .weight_codes import WeightCodes, of_codebook, scattered

_RULE = "codes"


def store_codes(
    model: ir.Model,
    ctx: Context,
    selection: Selection,
    coding: Coding,
    form: str,
    *,
    bnb_type: int | None = None,
    remark: str = "",
) -> None:
    """Store the chosen weights as codes, and say what that costs and loses.

    Args:
        model: The model.
        ctx: Where edits are made, and data.
        selection: Which nodes may read codes.
        coding: How weights become codes.
        form: What the codes are called, for people.
        bnb_type: As `CodedWeights` takes it.
        remark: What else there is to say of runs.

    Raises:
        PassError: A weight is not finite.
    """
    layers = coded_layers(model, ctx, selection, coding)
    if not layers:
        ctx.note("no weight is smaller stored as codes")
        return
    moments = moments_of(ctx, layers, coding)
    lowering, tally = CodedWeights(ctx, bnb_type), Tally()
    with forecasting(ctx, model, [layer for layer in linear_layers(model) if layer.weight in layers]):
        for layer in layers.values():
            codes = of_codebook(solve(layer, coding, moments.get(layer)))
            tally.add(ctx, layer, codes, output_error(layer.matrix().astype(np.float32), moments.get(layer)))
            lowering.lower(layer, codes)
    tally.note(ctx, form, lowering, remark)


@dataclass
class CodedWeights:
    """Stores weights as codes one by one, for all that read them.

    Attributes:
        ctx: Where edits are made.
        bnb_type: What MatMulBnb4 calls the codebook, where that operator is to be made; else None.
        done: How many readers of each operator.
        direct: How many of them compute on the codes.
        rows: How many look single rows up in codes.
    """

    ctx: Context
    bnb_type: int | None = None
    done: Counter[str] = field(default_factory=Counter)
    direct: int = 0
    rows: int = 0
    _tables: dict[Codebook, ir.Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Begin with nothing decoded."""
        self._decoding = Decoding(self.ctx)

    def readers(self) -> str:
        """Return which operators read codes, for people."""
        return ", ".join(f"{count} {operator}" for operator, count in self.done.most_common())

    def decoding(self) -> str:
        """Return what a runtime does with the codes, for people."""
        parts = []
        if self.direct:
            parts.append(f"{self.direct} products decode them at each run (MatMulBnb4)")
        if self.rows:
            parts.append(f"{self.rows} lookups decode the rows they read")
        if self.direct + self.rows < self.done.total():
            parts.append("the runtime decodes them once as it loads the model, then computes in float32 as before")
        return "; ".join(parts)

    def graph_bytes(self) -> int:
        """Return what operators, names and shapes take in the file that make weights of codes."""
        return self._decoding.graph_bytes()

    def lower(self, layer: LinearLayer, codes: WeightCodes) -> None:
        """Store the weight of a layer and serve all its readers from the codes, as one edit."""
        weight = layer.weight
        reading = {use.node for use in weight.uses()}
        readers = [node for node in walk.every_node(self.ctx.model) if node in reading]
        with self.ctx.rewriter.edit(_RULE, *readers):
            multiplying = {node for node in readers if self._multiplies_directly(node, layer, codes)}
            looking = {node for node in readers if is_lookup(node) and _has_rows(layer, codes)}
            # Where the floats are there anyway, rows are read from them.
            if looking | multiplying != set(readers):
                looking = set()
            # Before any reader is erased, as the first node of the model may be one.
            in_codes = multiplying | looking
            stored = self._store(layer, codes, by_row=bool(in_codes), direct=bool(multiplying))
            floats = None
            if in_codes != set(readers):
                floats = self._decoding.weight(stored, readers[0])
            for node in readers:
                self.done[node.op_type] += 1
                if node in multiplying:
                    self._multiply(node, stored)
                elif node in looking:
                    self._look_up(node, stored)
                else:
                    self._read(node, weight, floats)
            self.ctx.rewriter.remove_if_unread(weight)

    def _read(self, node: ir.Node, weight: ir.Value, floats: ir.Value | None) -> None:
        for index, value in enumerate(node.inputs):
            if value is weight:
                self.ctx.rewriter.set_input(node, index, floats)

    def _store(self, layer: LinearLayer, codes: WeightCodes, *, by_row: bool, direct: bool) -> StoredCodes:
        """Store codes in the order of the weight, or output by output, each in whole bytes where rows are read."""
        rewriter, name = self.ctx.rewriter, layer.weight.name or "weight"

        def const(content: Array, what: str) -> ir.Value:
            return rewriter.const(content, f"{name}_{what}", near=layer.node)

        sheet = codes.sheet()
        if not by_row:
            # Without gaps between rows, and where nothing is decided output by output, as the weight itself lies.
            sheet = (layer.in_layout(sheet) if codes.is_plain else sheet).reshape(1, -1)
        planes = tuple(const(plane, "codes") for plane in packed_planes(sheet, codes.bits))
        scales = steps = exact = None
        if codes.scales is not None:
            dims = codes.scales.shape if direct else scale_dims(codes, layer, by_row=by_row)
            content = codes.scales.reshape(dims)
            # MatMulBnb4 takes float32.
            scales = const(content.astype(np.float16) if codes.halves_scales and not direct else content, "scales")
        if codes.positions.size:
            at, numbers = scattered(codes, layer)
            steps, exact = const(at[None], "steps"), const(numbers[None], "outliers")
        return StoredCodes(planes, self._table(codes, layer.node, name), scales, steps, exact, codes, layer, by_row)

    def _table(self, codes: WeightCodes, near: ir.Node, name: str) -> ir.Value:
        """Return the constant that says what codes stand for, one for each codebook."""
        if codes.book is not None and codes.book in self._tables:
            return self._tables[codes.book]
        entries = codes.tables.reshape(-1, codes.vector)
        entries = entries.astype(np.float16) if codes.halves_tables else entries
        table = entries.reshape(-1) if codes.vector == 1 else entries
        value = self.ctx.rewriter.const(table, f"{name}_values" if codes.book is None else "code_values", near=near)
        if codes.book is not None:
            self._tables[codes.book] = value
        return value

    def _look_up(self, node: ir.Node, stored: StoredCodes) -> None:
        """Look rows up in codes, then decode only those."""
        self.rows += 1
        self.ctx.rewriter.replace(node.outputs[0], self._decoding.rows(node, stored))
        self.ctx.rewriter.erase(node)

    def _multiplies_directly(self, node: ir.Node, layer: LinearLayer, codes: WeightCodes) -> bool:
        """Return whether MatMulBnb4 does what a reader does: x Wᵀ, the rows of W in whole blocks."""
        if self.bnb_type is None or codes.inputs % codes.block or not _is_block(codes.block):
            return False
        if not walk.is_onnx_op(node, "MatMul", "Gemm") or node.inputs[1] is not layer.weight or len(layer.dims) != 2:
            return False
        plain = all(node.attributes.get_float(name, 1.0) == 1.0 for name in ("alpha", "beta"))
        rows_are_outputs = layer.output_axis == node.attributes.get_int("transB", 0) ^ 1
        return plain and not node.attributes.get_int("transA", 0) and rows_are_outputs

    def _multiply(self, node: ir.Node, stored: StoredCodes) -> None:
        """Put a MatMulBnb4 in the place of a matrix product."""
        self.direct += 1
        rewriter = self.ctx.rewriter
        codes = stored.codes
        attributes = {"K": codes.inputs, "N": codes.outputs, "block_size": codes.block, "quant_type": self.bnb_type}
        rewriter.import_domain("com.microsoft", near=node)
        data = [node.inputs[0], *stored.planes, stored.scales]
        made = rewriter.make("MatMulBnb4", data, attributes, sources=[node], domain="com.microsoft")
        result = rewriter.insert(made, before=node).outputs[0]
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if bias is not None:
            made = rewriter.make("Add", [result, bias], sources=[node])
            result = rewriter.insert(made, before=node).outputs[0]
        rewriter.replace(node.outputs[0], result)
        rewriter.erase(node)


def _is_block(block: int) -> bool:
    """Return whether MatMulBnb4 takes a block size."""
    least = 16
    return block >= least and block & (block - 1) == 0


def _has_rows(layer: LinearLayer, codes: WeightCodes) -> bool:
    """Return whether single rows can be decoded: of one table, without outliers, the outputs first."""
    return layer.output_axis == 0 and len(layer.dims) == 2 and len(codes.tables) == 1 and not codes.positions.size
