"""Weights in blocks of few bits, multiplied and looked up by ONNX Runtime's own operators."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context

from ..solvers.grid import GridWeight
from .integer_weights import release, weight_tensor
from .packed_codes import packed, packed_codes
from .weight_plan import WeightPlan
from .weight_readers import StoredMatrix, WeightReader

_DOMAIN = "com.microsoft"
_NAME = "nbits"


@dataclass(frozen=True, eq=False)
class _Packed:
    """A weight as constants.

    Attributes:
        codes: uint8 [outputs, blocks, bytes of a block]; [outputs, bytes] where it is only looked up.
        scales: [outputs, blocks], of the weight's dtype.
        zero_points: uint8 [outputs, bytes], packed like codes, or None.
        found: The solver's answer.
        inputs: Inputs of each output.
    """

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    found: GridWeight
    inputs: int

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return self.found.grid.block or self.inputs

    @property
    def blocks(self) -> int:
        """Scales of each output."""
        return int(self.found.scales.shape[1])

    @property
    def filled(self) -> int:
        """Inputs of each output, those that fill its last block included."""
        return self.blocks * self.block


def lower_to_runtime(matrix: StoredMatrix, found: GridWeight, plan: WeightPlan, ctx: Context) -> None:
    """Let every reader of a weight read its codes, which are stored once for all of them.

    A product becomes MatMulNBits, a lookup GatherBlockQuantized. Both read the same bytes: a table looked up is cut
    into its blocks by one more axis, which the lookup's result loses again.
    """
    rewriter, near = ctx.rewriter, matrix.layer.node
    name = matrix.weight.name
    codes = packed_codes(found.codes, found.grid)
    single = _only_looked_up(matrix, found)
    scales = found.scales.astype(weight_tensor(matrix.layer).dtype.numpy(), copy=False)
    zeros = None if found.zero_points is None else packed(found.zero_points, found.grid.bits)
    stored = _Packed(
        rewriter.const(codes.reshape(len(codes), -1) if single else codes, f"{name}_q", near=near),
        rewriter.const(ir.tensor(scales), f"{name}_scales", near=near),
        rewriter.const(zeros, f"{name}_zeros", near=near) if zeros is not None else None,
        found,
        found.codes.shape[1],
    )
    for reader in matrix.readers:
        if reader.is_lookup:
            _look_up(reader, stored, ctx, whole_rows=single)
        else:
            _multiply(reader, stored, plan, ctx)
    release(rewriter, matrix.weight)
    release(rewriter, stored.scales)  # where every reader multiplies them by a factor of its own


def _only_looked_up(matrix: StoredMatrix, found: GridWeight) -> bool:
    whole = found.grid.block is not None and found.codes.shape[1] % found.grid.block == 0
    return whole and all(reader.is_lookup for reader in matrix.readers)


def can_lower_to_runtime(reader: WeightReader) -> str | None:
    """Return why a reader has no operator on blocks, or None where it has."""
    shape = reader.input.shape
    if reader.is_lookup:
        return None
    if reader.on_left and (shape is None or len(shape) < 2):
        return "it is multiplied from the left, by a value of no known rank"
    return "it is multiplied by a vector" if shape is not None and len(shape) < 2 else None


def _multiply(reader: WeightReader, stored: _Packed, plan: WeightPlan, ctx: Context) -> None:
    node, layer, rewriter = reader.node, reader.layer, ctx.rewriter
    make = functools.partial(_insert, node, ctx)
    outputs = stored.found.codes.shape[0]
    attributes = {
        "K": stored.inputs,
        "N": outputs,
        "bits": stored.found.grid.bits,
        "block_size": stored.block,
        "accuracy_level": plan.scheme.accuracy_level,
    }
    rewriter.import_domain(_DOMAIN, near=node)
    x = reader.input
    exchanged = list(range(len(x.shape))) if reader.on_left and x.shape is not None else []
    if exchanged:
        exchanged[-2:] = reversed(exchanged[-2:])
        x = make("Transpose", [x], {"perm": exchanged})
    inputs = [x, stored.codes, _scaled(stored, node, ctx)]
    if stored.zero_points is not None:
        inputs.append(stored.zero_points)
    result = make("MatMulNBits", inputs, attributes, _DOMAIN)
    if exchanged:
        result = make("Transpose", [result], {"perm": exchanged})
    if layer.bias is not None:
        result = make("Add", [result, layer.bias])
    rewriter.replace(node.outputs[0], result)
    rewriter.erase(node)
    if reader.transpose is not None and not reader.transpose.outputs[0].uses():
        rewriter.erase(reader.transpose)


def _scaled(stored: _Packed, node: ir.Node, ctx: Context) -> ir.Value:
    """Return the scales, times α of a Gemm."""
    alpha = node.attributes.get_float("alpha", 1.0)
    if alpha == 1.0:
        return stored.scales
    tensor = stored.scales.const_value
    scales = stored.found.scales * np.float32(alpha)
    dtype = tensor.dtype.numpy() if tensor is not None else scales.dtype
    return ctx.rewriter.const(ir.tensor(scales.astype(dtype)), "scales", near=node)


def _look_up(reader: WeightReader, stored: _Packed, ctx: Context, *, whole_rows: bool) -> None:
    node, rewriter = reader.node, ctx.rewriter
    make = functools.partial(_insert, node, ctx)
    rewriter.import_domain(_DOMAIN, near=node)
    attributes = {
        "bits": stored.found.grid.bits,
        "block_size": stored.block,
        "gather_axis": 0,
        "quantize_axis": 1 if whole_rows else 2,
    }
    scales, zeros = stored.scales, stored.zero_points
    if not whole_rows:
        scales = make("Reshape", [scales, _sizes([*stored.found.scales.shape, 1], node, ctx)])
        if stored.found.zero_points is not None:
            zeros = rewriter.const(stored.found.zero_points[..., None], "zeros", near=node)
    inputs = [stored.codes, reader.input, scales, *([zeros] if zeros is not None else [])]
    result = make("GatherBlockQuantized", inputs, attributes, _DOMAIN)
    if not whole_rows:
        result = _as_rows(result, reader, stored, ctx)
    rewriter.replace(node.outputs[0], result)
    rewriter.erase(node)


def _as_rows(blocks: ir.Value, reader: WeightReader, stored: _Packed, ctx: Context) -> ir.Value:
    """Return rows [..., inputs] of what was looked up as [..., blocks, block]."""
    node = reader.node
    make = functools.partial(_insert, node, ctx)
    if reader.input.shape is not None:
        # 0 keeps the size of an axis; the last two become one.
        sizes = _sizes([0] * len(reader.input.shape) + [stored.filled], node, ctx)
        result = make("Reshape", [blocks, sizes])
    else:
        shape = make("Shape", [reader.input])
        sizes = make("Concat", [shape, _sizes([stored.filled], node, ctx)], {"axis": 0})
        result = make("Reshape", [blocks, sizes])
    if stored.filled == stored.inputs:
        return result
    ends = [_sizes([number], node, ctx) for number in (0, stored.inputs, -1)]
    return make("Slice", [result, *ends])


def _sizes(numbers: list[int], node: ir.Node, ctx: Context) -> ir.Value:
    return ctx.rewriter.const(np.array(numbers, np.int64), "sizes", near=node)


def _insert(
    node: ir.Node,
    ctx: Context,
    op_type: str,
    inputs: list[ir.Value],
    attributes: Mapping[str, object] | None = None,
    domain: str = "",
) -> ir.Value:
    made = ctx.rewriter.make(op_type, inputs, attributes, domain=domain, sources=[node], name=_NAME)
    return ctx.rewriter.insert(made, before=node).outputs[0]
