"""Linear layers that kernels which multiply codes in tiles do not suit: too small, mostly."""

from __future__ import annotations

import math

import onnx_ir as ir

from graphopt import walk

from .linear_layers import LinearLayer

# What divides the channels of the small convolutions such kernels take all the same, and their least kernel if grouped.
_SMALLER_TILE = 8
_LEAST_GROUPED_KERNEL = 3
# Kernels of convolutions in 8-bit floats hold no more positions than this.
_LARGEST_KERNEL_OF_FLOATS = 32


def unfit_for_tiles(layer: LinearLayer, least: int, *, as_floats: bool = False) -> str | None:
    """Return why a layer does not fit kernels whose tiles have so many rows and columns, or None if it does.

    The rules NVIDIA's ModelOpt leaves layers in float by (``graph_utils.py``), which TensorRT runs slower in 8 bits.

    Args:
        layer: The layer.
        least: The fewest inputs and outputs that fill a tile; up to 1, every layer fits.
        as_floats: Whether the codes are floats.
    """
    if least <= 1:
        return None
    if as_floats and layer.node.op_type in ("Conv", "ConvTranspose"):
        tensor = walk.constant_tensor(layer.weight)
        assert tensor is not None, "a linear layer has a constant weight"
        if math.prod(walk.dims(tensor)[2:]) > _LARGEST_KERNEL_OF_FLOATS:
            return f"a kernel of more than {_LARGEST_KERNEL_OF_FLOATS} positions"
    if layer.node.op_type in ("Conv", "ConvTranspose"):
        return _small_convolution(layer, least)
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"
    if min(walk.dims(tensor)[-2:]) < least:
        return f"fewer than {least} inputs or outputs"
    return "a product with a vector" if _rows(layer.input) == 1 else None


def _small_convolution(layer: LinearLayer, least: int) -> str | None:
    tensor = walk.constant_tensor(layer.weight)
    assert tensor is not None, "a linear layer has a constant weight"
    first, second, *kernel = walk.dims(tensor)
    group = layer.node.attributes.get_int("group", 1)
    inputs, outputs = (second * group, first) if layer.node.op_type == "Conv" else (first, second * group)
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
