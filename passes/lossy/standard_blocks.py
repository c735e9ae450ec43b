"""Weights in few bits read through DequantizeLinear, as the ONNX standard says it, in blocks from opset 21."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..solvers.grid import GridWeight
from .integer_weights import release, weight_tensor
from .weight_plan import WeightPlan
from .weight_readers import StoredMatrix, WeightReader

_NAME = "w"
_BYTE_BITS = 8


@dataclass(frozen=True, eq=False)
class _Stored:
    """A weight as the constants of a DequantizeLinear, laid out like the weight, and its attributes."""

    codes: ir.Value
    scales: ir.Value
    zero_points: ir.Value | None
    attributes: dict[str, int]

    @property
    def inputs(self) -> list[ir.Value]:
        """What a DequantizeLinear reads."""
        return [self.codes, self.scales, *([self.zero_points] if self.zero_points is not None else [])]


def lower_to_standard(matrix: StoredMatrix, found: GridWeight, plan: WeightPlan, ctx: Context) -> None:
    """Let every reader of a weight read it through a DequantizeLinear of its own; the codes are stored once.

    ONNX Runtime makes one MatMulNBits of a product and a DequantizeLinear that nothing else reads. A lookup gathers
    codes and scales, and brings only the rows it wants to float.
    """
    rewriter, near, layer = ctx.rewriter, matrix.layer.node, matrix.layer
    name, dtype = matrix.weight.name, ir.DataType[plan.code.upper()].numpy()
    scales = _laid_out(found.scales.astype(weight_tensor(layer).dtype.numpy(), copy=False), found, layer.output_axis)
    zeros = None if found.zero_points is None else _laid_out(found.zero_points, found, layer.output_axis).astype(dtype)
    if found.grid.block is not None:
        attributes = {"axis": 1 - layer.output_axis, "block_size": found.grid.block}
    else:
        attributes = {} if found.grid.tensor else {"axis": layer.output_axis}
    stored = _Stored(
        rewriter.const(ir.tensor(layer.in_layout(found.codes).astype(dtype)), f"{name}_q", near=near),
        rewriter.const(ir.tensor(scales), f"{name}_scales", near=near),
        None if zeros is None else rewriter.const(ir.tensor(zeros), f"{name}_zeros", near=near),
        attributes,
    )
    for reader in matrix.readers:
        if reader.is_lookup:
            _look_up(reader, stored, ctx)
        else:
            _multiply(reader, stored, ctx)
    release(rewriter, matrix.weight)


def can_lower_to_standard(reader: WeightReader, plan: WeightPlan) -> str | None:
    """Return why a reader cannot read a DequantizeLinear, or None where it can."""
    if reader.is_lookup:
        return None if isinstance(plan.group, int) else "its rows have no blocks"
    columns = walk.dims(weight_tensor(reader.layer))[1]
    misread = plan.bits in plan.scheme.whole_bytes and reader.layer.output_axis == 1
    if misread and columns * plan.bits % _BYTE_BITS:
        return f"misread by the target in {plan.bits} bits, as its outputs fill no whole bytes; `weights=int4` is not"
    return None


def _laid_out(per_block: Array, found: GridWeight, output_axis: int) -> Array:
    if found.grid.tensor:
        return per_block.reshape(())
    if found.grid.block is None:
        return per_block.reshape(-1)
    return np.ascontiguousarray(per_block if output_axis == 0 else per_block.T)


def _multiply(reader: WeightReader, stored: _Stored, ctx: Context) -> None:
    make = functools.partial(_insert, reader.node, ctx)
    weight = make("DequantizeLinear", stored.inputs, stored.attributes)
    if reader.transpose is not None:
        weight = make("Transpose", [weight], {"perm": [1, 0]})
    ctx.rewriter.set_input(reader.node, reader.layer.weight_index, weight)
    _flatten_bias(reader, ctx)
    if reader.transpose is not None and not reader.transpose.outputs[0].uses():
        ctx.rewriter.erase(reader.transpose)


def _flatten_bias(reader: WeightReader, ctx: Context) -> None:
    """Let a Gemm read its bias [1, outputs] as a vector, as ONNX Runtime 1.31 makes no MatMulNBits of it otherwise."""
    tensor = walk.constant_tensor(reader.layer.bias)
    if reader.node.op_type != "Gemm" or tensor is None or len(tensor.shape) != 2 or tensor.shape[0] != 1:
        return
    vector = ctx.rewriter.const(ir.tensor(tensor.numpy().reshape(-1)), "bias", near=reader.node)
    ctx.rewriter.set_input(reader.node, 2, vector)
    release(ctx.rewriter, reader.layer.bias)


def _look_up(reader: WeightReader, stored: _Stored, ctx: Context) -> None:
    make = functools.partial(_insert, reader.node, ctx)
    rows = [make("Gather", [constant, reader.input]) for constant in stored.inputs]
    result = make("DequantizeLinear", rows, {"axis": -1, "block_size": stored.attributes["block_size"]})
    ctx.rewriter.replace(reader.node.outputs[0], result)
    ctx.rewriter.erase(reader.node)


def _insert(
    node: ir.Node, ctx: Context, op_type: str, inputs: list[ir.Value], attributes: Mapping[str, object] | None = None
) -> ir.Value:
    made = ctx.rewriter.make(op_type, inputs, attributes, sources=[node], name=_NAME)
    return ctx.rewriter.insert(made, before=node).outputs[0]
