"""Layers and products that integer kernels do not suit: too small, mostly, or better off as part of a whole."""

from __future__ import annotations

import math

import onnx_ir as ir

from graphopt import walk

# What divides the channels of the small convolutions such kernels take all the same, and their least kernel if grouped.
_SMALLER_TILE = 8
_LEAST_GROUPED_KERNEL = 3
# Kernels of convolutions in 8-bit floats hold no more positions than this.
_LARGEST_KERNEL_OF_FLOATS = 32
# What may stand between a product of attention and the Softmax: scales and masks, and how heads are laid out.
_BETWEEN = ("Add", "Cast", "Div", "Mul", "Reshape", "Sub", "Transpose", "Where")


def unfit_for_tiles(node: ir.Node, weight: ir.Value, read: ir.Value, least: int, *, floats: bool = False) -> str | None:
    """Return why a layer does not fit kernels whose tiles have so many rows and columns, or None if it does.

    The rules NVIDIA's ModelOpt leaves layers in float by (``graph_utils.py``), which TensorRT runs slower in 8 bits.

    Args:
        node: A Conv, ConvTranspose, Gemm or MatMul.
        weight: Its constant weight.
        read: What it multiplies with the weight.
        least: The fewest inputs and outputs that fill a tile; up to 1, every layer fits.
        floats: Whether the codes are floats.
    """
    if least <= 1:
        return None
    dims = _dims(weight)
    if node.op_type in ("Conv", "ConvTranspose"):
        if floats and math.prod(dims[2:]) > _LARGEST_KERNEL_OF_FLOATS:
            return f"a kernel of more than {_LARGEST_KERNEL_OF_FLOATS} positions"
        return _small_convolution(node, dims, least)
    if min(dims[-2:]) < least:
        return f"fewer than {least} inputs or outputs"
    return "a product with a vector" if _rows(read) == 1 else None


def is_depthwise(node: ir.Node, weight: ir.Value) -> bool:
    """Return whether a Conv reads a single channel for each of its outputs, as many as there are groups."""
    if node.op_type != "Conv":
        return False
    outputs, channels = _dims(weight)[:2]
    # A single channel is a depthwise convolution of its own, where it reads one.
    return channels == 1 and node.attributes.get_int("group", 1) == outputs


def has_narrow_groups(node: ir.Node, weight: ir.Value, least: int) -> bool:
    """Return whether a Conv has groups, of fewer inputs or outputs each than ``least``, and is not depthwise."""
    groups = node.attributes.get_int("group", 1)
    if node.op_type != "Conv" or groups == 1 or is_depthwise(node, weight):
        return False
    outputs, channels = _dims(weight)[:2]
    return min(channels, outputs // groups) < least


def is_attention_product(node: ir.Node) -> bool:
    """Return whether a MatMul of two activations reads what a Softmax makes, or makes what a Softmax reads."""
    if not walk.is_onnx_op(node, "MatMul"):
        return False
    maker = node.inputs[0].producer() if node.inputs[0] is not None else None
    while maker is not None and walk.is_onnx_op(maker, *_BETWEEN):
        maker = maker.inputs[0].producer() if maker.inputs and maker.inputs[0] is not None else None
    if maker is not None and walk.is_onnx_op(maker, "Softmax"):
        return True
    reader: ir.Node | None = node
    while reader is not None:
        uses = reader.outputs[0].uses()
        reader = next((use.node for use in uses), None) if len(uses) == 1 else None
        if reader is not None and walk.is_onnx_op(reader, "Softmax"):
            return True
        if reader is not None and not walk.is_onnx_op(reader, *_BETWEEN):
            return False
    return False


def _dims(weight: ir.Value) -> tuple[int, ...]:
    tensor = walk.constant_tensor(weight)
    assert tensor is not None, "a linear layer has a constant weight"
    return walk.dims(tensor)


def _small_convolution(node: ir.Node, dims: tuple[int, ...], least: int) -> str | None:
    first, second, *kernel = dims
    group = node.attributes.get_int("group", 1)
    inputs, outputs = (second * group, first) if node.op_type == "Conv" else (first, second * group)
    if inputs >= least and outputs >= least:
        return None
    if group == 1:
        fits = inputs % _SMALLER_TILE == outputs % _SMALLER_TILE == 0 and len(set(kernel)) == 1
    else:
        fits = outputs % _SMALLER_TILE == 0 and math.prod(kernel) >= _LEAST_GROUPED_KERNEL ** len(kernel)
    return None if fits else f"fewer than {least} channels"


def _rows(value: ir.Value) -> int | None:
    """Return how many rows a matrix product reads, or None where that varies."""
    if value.shape is None or len(value.shape) < 2:
        return None
    sizes = [size for size in list(value.shape)[:-1] if isinstance(size, int)]
    return math.prod(sizes) if len(sizes) == len(value.shape) - 1 else None
