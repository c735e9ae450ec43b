"""A matrix product written as two: how factors of a weight enter the graph."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from .integer_weights import release, weight_tensor

_NAME = "factor"


def first_product(layer: LinearLayer, right: Array | ir.Value, ctx: Context) -> ir.Value:
    """Insert the product of what a layer reads by a right factor, before the layer, and return what it gives.

    That lies as the layer's input does, the rank where the inputs were, so that the layer reads it in the same way,
    whatever it transposes.

    Args:
        layer: A MatMul or Gemm with a weight of rank 2, on either side.
        right: [rank, inputs]; or a constant that `right_factor` made for a layer that multiplies from the same side.
        ctx: Where edits are made.
    """
    rewriter, node = ctx.rewriter, layer.node
    factor = right if isinstance(right, ir.Value) else right_factor(layer, right, ctx)
    inputs = [factor, layer.input] if rows_run_down(layer) else [layer.input, factor]
    made = rewriter.make("MatMul", inputs, sources=[node], name=_NAME)
    return rewriter.insert(made, before=node).outputs[0]


def as_second(layer: LinearLayer, left: Array | ir.Value, read: ir.Value, ctx: Context) -> None:
    """Let a layer multiply by a left factor what a first product gives; its bias and all else of it stay.

    Args:
        layer: A MatMul or Gemm with a weight of rank 2, on either side.
        left: [outputs, rank]; or a constant that `left_factor` made for a layer that reads the same weight.
        read: What `first_product` gave, for this layer or one that reads the same.
        ctx: Where edits are made.
    """
    rewriter, node, index = ctx.rewriter, layer.node, layer.weight_index
    factor = left if isinstance(left, ir.Value) else left_factor(layer, left, ctx)
    rewriter.set_input(node, 1 - index, read)
    rewriter.set_input(node, index, factor)
    release(rewriter, layer.weight)


def right_factor(layer: LinearLayer, right: Array, ctx: Context) -> ir.Value:
    """Return a right factor [rank, inputs] as a constant, for the first product of a layer and of others like it."""
    content = right if rows_run_down(layer) else right.T
    return ctx.rewriter.const(_stored(content, layer), f"{layer.weight.name}_right", near=layer.node)


def left_factor(layer: LinearLayer, left: Array, ctx: Context) -> ir.Value:
    """Return a left factor [outputs, rank] as a constant, for all layers that read one weight."""
    content = left if layer.output_axis == 0 else left.T
    return ctx.rewriter.const(_stored(content, layer), f"{layer.weight.name}_left", near=layer.node)


def rows_run_down(layer: LinearLayer) -> bool:
    """Return whether, in what a layer reads, the axis that is multiplied away comes before that of positions."""
    if layer.node.op_type == "MatMul":
        return layer.weight_index == 0
    across = layer.node.attributes.get_int("transA" if layer.weight_index == 1 else "transB", 0)
    return (layer.weight_index == 0) == (across == 0)


def _stored(content: Array, layer: LinearLayer) -> Array:
    return np.ascontiguousarray(content).astype(weight_tensor(layer).dtype.numpy())
