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
from ..solvers.codebook import Codebook, CodebookWeight
from .coded_layers import Coding, Tally, coded_layers, moments_of, solve

_RULE = "codes"
_BYTE_CODES = 256


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
            solution = solve(layer, coding, moments.get(layer))
            tally.add(ctx, layer, coding, solution, moments.get(layer))
            lowering.lower(layer, solution)
    tally.note(ctx, form, "; ".join(filter(None, (lowering.decoding(), remark))), lowering.readers())


@dataclass(frozen=True, eq=False)
class StoredCodes:
    """A weight as constants of the model.

    Attributes:
        packed: uint8 [outputs, bytes]; in each byte the first code has the highest bits.
        scales: float32 [outputs, blocks].
        table: float32 [256, codes in a byte], what each byte stands for.
        solution: The solver's answer.
    """

    packed: ir.Value
    scales: ir.Value
    table: ir.Value
    solution: CodebookWeight

    @property
    def padded(self) -> int:
        """Inputs, with those that fill the last block."""
        return int(self.solution.scales.shape[1]) * self.solution.block


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
    _tables: dict[tuple[Codebook, int], ir.Value] = field(default_factory=dict)

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

    def lower(self, layer: LinearLayer, solution: CodebookWeight) -> None:
        """Store the weight of a layer and serve all its readers from the codes, as one edit."""
        weight = layer.weight
        reading = {use.node for use in weight.uses()}
        readers = [node for node in walk.every_node(self.ctx.model) if node in reading]
        with self.ctx.rewriter.edit(_RULE, *readers):
            stored = self._store(layer, solution)
            multiplying = {node for node in readers if self._multiplies_directly(node, layer, solution)}
            # Where the floats are there anyway, rows are read from them.
            looking = {node for node in readers if is_lookup(node) and layer.output_axis == 0}
            if looking | multiplying != set(readers):
                looking = set()
            # Before any reader is erased, as the first node of the model may be one.
            in_codes = multiplying | looking
            floats = None
            if in_codes != set(readers):
                floats = self._decode(self.ctx.model.graph[0], readers[0], layer, stored)
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

    def _store(self, layer: LinearLayer, solution: CodebookWeight) -> StoredCodes:
        rewriter, name = self.ctx.rewriter, layer.weight.name or "weight"
        in_byte = codes_in_byte(solution.book)
        missing = solution.scales.shape[1] * solution.block - solution.codes.shape[1]
        zero = int(solution.book.encode(np.zeros(1, np.float32))[0])
        codes = np.pad(solution.codes, ((0, 0), (0, missing)), constant_values=zero)
        return StoredCodes(
            rewriter.const(packed(codes, in_byte), f"{name}_codes", near=layer.node),
            rewriter.const(solution.scales, f"{name}_scales", near=layer.node),
            self._table(solution.book, layer.node),
            solution,
        )

    def _table(self, book: Codebook, near: ir.Node) -> ir.Value:
        """Return the constant that says what each byte stands for, one for each codebook."""
        key = book, codes_in_byte(book)
        if key not in self._tables:
            self._tables[key] = self.ctx.rewriter.const(byte_table(book), "code_table", near=near)
        return self._tables[key]

    def _decode(self, place: ir.Node, source: ir.Node, layer: LinearLayer, stored: StoredCodes) -> ir.Value:
        """Put what makes the float weight of the codes at the start of the model, where all read it."""
        outputs, inputs = stored.solution.codes.shape
        blocks, block = stored.solution.scales.shape[1], stored.solution.block

        def add(op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
            node = self.ctx.rewriter.make(op_type, inputs, attributes, sources=[source], name="decode")
            return self.ctx.rewriter.insert(node, before=place).outputs[0]

        def shape(*dims: int) -> ir.Value:
            return self.ctx.rewriter.const(np.array(dims, np.int64), "dims", near=source)

        indices = add("Cast", [stored.packed], to=int(ir.DataType.INT32))
        values = add("Reshape", [add("Gather", [stored.table, indices]), shape(outputs, blocks, block)])
        scales = add("Reshape", [stored.scales, shape(outputs, blocks, 1)])
        matrix = add("Reshape", [add("Mul", [values, scales]), shape(outputs, stored.padded)])
        if stored.padded != inputs:
            matrix = add("Gather", [matrix, self.ctx.rewriter.const(np.arange(inputs), "kept", near=source)], axis=1)
        dims, perm = _layout(layer)
        if len(dims) != 2:
            matrix = add("Reshape", [matrix, shape(*dims)])
        return matrix if perm == sorted(perm) else add("Transpose", [matrix], perm=perm)

    def _look_up(self, node: ir.Node, stored: StoredCodes) -> None:
        """Look rows up in codes, then decode only those."""
        indices = node.inputs[1]
        assert indices is not None, "a lookup has indices"
        inputs = stored.solution.codes.shape[1]
        blocks, block = stored.solution.scales.shape[1], stored.solution.block
        self.rows += 1

        def add(op_type: str, inputs: list[ir.Value], **attributes: object) -> ir.Value:
            made = self.ctx.rewriter.make(op_type, inputs, attributes, sources=[node], name="rows")
            return self.ctx.rewriter.insert(made, before=node).outputs[0]

        def numbers(*content: int) -> ir.Value:
            return self.ctx.rewriter.const(np.array(content, np.int64), "dims", near=node)

        codes = add("Cast", [add("Gather", [stored.packed, indices])], to=int(ir.DataType.INT32))
        values = add("Reshape", [add("Gather", [stored.table, codes]), numbers(-1, blocks, block)])
        scales = add("Reshape", [add("Gather", [stored.scales, indices]), numbers(-1, blocks, 1)])
        rows = add("Reshape", [add("Mul", [values, scales]), numbers(-1, stored.padded)])
        if stored.padded != inputs:
            rows = add("Gather", [rows, self.ctx.rewriter.const(np.arange(inputs), "kept", near=node)], axis=1)
        dims = add("Concat", [add("Shape", [indices]), numbers(inputs)], axis=0)
        self.ctx.rewriter.replace(node.outputs[0], add("Reshape", [rows, dims]))
        self.ctx.rewriter.erase(node)

    def _multiplies_directly(self, node: ir.Node, layer: LinearLayer, solution: CodebookWeight) -> bool:
        """Return whether MatMulBnb4 does what a reader does: x Wᵀ, the rows of W in whole blocks."""
        if self.bnb_type is None or solution.codes.shape[1] % solution.block or not _is_block(solution.block):
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
        outputs, inputs = stored.solution.codes.shape
        attributes = {"K": inputs, "N": outputs, "block_size": stored.solution.block, "quant_type": self.bnb_type}
        rewriter.import_domain("com.microsoft", near=node)
        data = [node.inputs[0], stored.packed, stored.scales]
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


def _layout(layer: LinearLayer) -> tuple[list[int], list[int]]:
    """Return the shape that `LinearLayer.matrix` is a flat view of, and how its axes lie in the weight."""
    dims = list(layer.dims)
    outputs = dims.pop(layer.output_axis)
    axes = list(range(1, len(dims) + 1))
    if layer.node.op_type.startswith("Conv"):
        channels, *kernel = dims
        dims, axes = [*kernel, channels], [axes[-1], *axes[:-1]]
    axes.insert(layer.output_axis, 0)
    return [outputs, *dims], axes


def codes_in_byte(book: Codebook) -> int:
    """Return how many codes a byte holds: 1, 2 or 4."""
    return next(count for count in (4, 2, 1) if len(book.values) ** count <= _BYTE_CODES)


def packed(codes: Array, in_byte: int) -> Array:
    """Return codes [outputs, inputs] as uint8 [outputs, inputs / in_byte]; a byte's first code has its high bits."""
    bits = 8 // in_byte
    result = np.zeros((codes.shape[0], codes.shape[1] // in_byte), np.uint8)
    for place in range(in_byte):
        result |= codes[:, place::in_byte] << np.uint8(bits * (in_byte - 1 - place))
    return result


def byte_table(book: Codebook) -> Array:
    """Return the values of the codes of each byte, float32 [256, codes in a byte]."""
    in_byte = codes_in_byte(book)
    bits, numbers = 8 // in_byte, np.arange(_BYTE_CODES)
    table = np.zeros(_BYTE_CODES, np.float32)
    table[: len(book.values)] = book.table()
    columns = [numbers >> (bits * (in_byte - 1 - place)) & (2**bits - 1) for place in range(in_byte)]
    return np.ascontiguousarray(np.stack([table[column] for column in columns], axis=1))
