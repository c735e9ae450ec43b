"""What a constant of a model is to what reads it: a weight, a bias, a scale, or nothing that anybody learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.explaining.advice import made_of_constants

from .constant_readers import Reader
from .crossings import Crossed, Crossings
from .known_tables import is_known_table

WEIGHT, BIAS, NORM, SCALE, TABLE = "weights", "biases", "norms", "scales", "tables"
ZERO_POINT = "zero-points"
_SHARED = (WEIGHT, NORM, BIAS)

# What each operator's inputs are, by place.
_INPUTS: Mapping[str, Mapping[int, str]] = {
    "Attention": {1: WEIGHT, 2: BIAS},
    "BatchNormalization": {1: NORM, 2: NORM},
    "BiasGelu": {1: BIAS},
    "Conv": {1: WEIGHT, 2: BIAS},
    "ConvTranspose": {1: WEIGHT, 2: BIAS},
    "DeformConv": {1: WEIGHT, 3: BIAS},
    "DequantizeLinear": {1: SCALE, 2: ZERO_POINT},
    "EmbedLayerNormalization": {2: WEIGHT, 3: WEIGHT, 4: WEIGHT, 5: NORM, 6: NORM},
    "Einsum": {0: WEIGHT, 1: WEIGHT, 2: WEIGHT},
    "FastGelu": {1: BIAS},
    "FusedConv": {1: WEIGHT, 2: BIAS},
    "FusedGemm": {0: WEIGHT, 1: WEIGHT, 2: BIAS},
    "FusedMatMul": {0: WEIGHT, 1: WEIGHT},
    "GRU": {1: WEIGHT, 2: WEIGHT, 3: BIAS},
    "Gemm": {0: WEIGHT, 1: WEIGHT, 2: BIAS},
    "GroupNorm": {1: NORM, 2: NORM},
    "GroupNormalization": {1: NORM, 2: NORM},
    "InstanceNormalization": {1: NORM, 2: NORM},
    "LSTM": {1: WEIGHT, 2: WEIGHT, 3: BIAS, 7: WEIGHT},
    "LayerNormalization": {1: NORM, 2: NORM},
    "MatMul": {0: WEIGHT, 1: WEIGHT},
    "MultiHeadAttention": {3: BIAS},
    "PRelu": {1: NORM},
    "QuantizeLinear": {1: SCALE, 2: ZERO_POINT},
    "RMSNormalization": {1: NORM},
    "RNN": {1: WEIGHT, 2: WEIGHT, 3: BIAS},
    "SimplifiedLayerNormalization": {1: NORM},
    "SkipLayerNormalization": {2: NORM, 3: NORM, 4: BIAS},
    "SkipSimplifiedLayerNormalization": {2: NORM, 3: BIAS},
}
# Numbers of this size stand for minus infinity in masks, not for anything learnt.
_MASKING = 1e4
# A learnt vector put beside others has at least as many numbers; fewer are coordinates and sizes.
_LEAST_TOKEN = 8
# The first places of these hold what varies; a constant beside it is added to, or multiplies it.
_SUMS, _PRODUCTS = ("Add", "Sub", "Sum"), ("Mul", "Div")
_WAVES = ("Cos", "Sin")
# What decodes a weight, or hands a table on, is shorter than this; a walk that goes on is of something else.
_MANY_STEPS = 256
_MOVES = frozenset(
    {
        "Cast",
        "Concat",
        "DequantizeLinear",
        "Expand",
        "Gather",
        "Identity",
        "Reshape",
        "Slice",
        "Split",
        "Squeeze",
        "Transpose",
        "Unsqueeze",
    }
)


def kind_of(value: ir.Value, readers: tuple[Reader, ...], crossings: Crossings) -> str | None:
    """Return what a constant is, of `KINDS`; None for one that is not to change, or that is read in two ways."""
    tensor = walk.constant_tensor(value)
    if tensor is None or tensor.dtype == ir.DataType.STRING or not tensor.size:
        return None
    kind = _common({_kind_for(tensor, reader, crossings) for reader in readers if not _reads_form(reader)})
    is_float = tensor.dtype.is_floating_point() and tensor.dtype.bitwidth > 8
    if kind == ZERO_POINT:
        # Codes that are floats have no other zero point than 0.
        return (
            kind
            if tensor.dtype.is_integer() and all(_varies(one.node.inputs[0], crossings) for one in readers)
            else None
        )
    is_coded = all(reader.dequantize is not None for reader in readers)
    if kind is None or not (is_float or (is_coded and kind != SCALE)):
        return None
    return kind


def _varies(value: ir.Value | None, crossings: Crossings) -> bool:
    """Return whether what a Q or DQ converts is an activation."""
    given = list(crossings.arguments(value)) if value is not None else []
    return any(_varies(one, crossings) for one in given) if given else not made_of_constants(value)


def _common(kinds: set[str | None]) -> str | None:
    """Return what a constant is that is several things: exporters store equal ones once, such as vectors of zeros."""
    if len(kinds) == 1:
        return kinds.pop()
    return next((kind for kind in _SHARED if kind in kinds), None) if kinds <= set(_SHARED) else None


def _reads_form(reader: Reader) -> bool:
    """Return whether a reader looks at the shape or the type of a constant alone."""
    return reader.node.op_type in ("Shape", "Size") or (reader.node.op_type == "CastLike" and reader.index == 1)


def _kind_for(tensor: ir.TensorProtocol, reader: Reader, crossings: Crossings) -> str | None:
    """Return what a constant is to one reader."""
    node, index = reader.node, reader.index
    if node.op_type == "Gather" and index == 0:
        return _kind_of_table(tensor, reader, crossings)
    if node.op_type in (*_SUMS, *_PRODUCTS):
        return _kind_of_operand(tensor, reader, crossings)
    if node.op_type == "Concat":
        return _kind_of_part(tensor, reader)
    if node.op_type == "Attention" and node.domain in walk.ONNX_DOMAINS:
        return None  # the contributed operator has weights, ONNX's has none
    kind = _INPUTS.get(node.op_type, {}).get(index)
    if kind == WEIGHT and long_axes(tensor) <= 1 and _makes_waves(node, crossings):
        return None  # frequencies of positions
    return kind


def _kind_of_table(tensor: ir.TensorProtocol, reader: Reader, crossings: Crossings) -> str | None:
    """Return what a table is that is looked up in: of embeddings, of the values codes stand for, or of a cache."""
    if _hangs_on_bytes(reader.node.inputs[1], crossings):
        return None if is_known_table(tensor) else TABLE
    if long_axes(tensor) <= 1:
        return None
    found = list(_past_moves(reader.node, crossings))
    if found and all(node.op_type in ("Mul", "RotaryEmbedding") and not _by_constant(node) for node in found):
        return None  # a rotary cache, of which rows are looked up by position
    return WEIGHT


def _kind_of_operand(tensor: ir.TensorProtocol, reader: Reader, crossings: Crossings) -> str | None:
    """Return what a constant is that is added, or multiplied by."""
    node = reader.node
    if _makes_waves(node, crossings):
        return None
    others = [value for index, value in enumerate(node.inputs) if value is not None and index != reader.index]
    other = next((value for value in others if not made_of_constants(value)), None)
    if other is None:
        # A factor of what is made of constants scales a weight; it is one itself where it is a table of its own.
        return SCALE if node.op_type == "Mul" and tensor.size > 1 else None
    if tensor.size == 1 or _is_of_input(other, crossings) or not _is_finite(tensor) or _is_counted(tensor):
        return None
    several = long_axes(tensor) > 1
    if node.op_type in _PRODUCTS:
        return None if several else NORM
    if not several:
        return BIAS
    return None if _is_mask(tensor) else WEIGHT


def _kind_of_part(tensor: ir.TensorProtocol, reader: Reader) -> str | None:
    """Return what a constant is that varying values are put beside, such as the token of a class."""
    if long_axes(tensor) != 1 or not _is_finite(tensor) or _is_counted(tensor):
        return None
    array = np.asarray(tensor.numpy())
    return WEIGHT if (array != array.flat[0]).any() and tensor.size >= _LEAST_TOKEN else None


def _hangs_on_bytes(value: ir.Value | None, crossings: Crossings) -> bool:
    """Return whether indices are made of stored bytes, and so are codes."""
    seen: set[ir.Value] = set()
    frontier = [value]
    while frontier and len(seen) < _MANY_STEPS:
        one = frontier.pop()
        if one is None or one in seen:
            continue
        seen.add(one)
        tensor, node = walk.constant_tensor(one), one.producer()
        if tensor is not None and tensor.dtype == ir.DataType.UINT8:
            return True
        frontier.extend(node.inputs if node is not None else crossings.arguments(one))
    return False


def _is_of_input(value: ir.Value | None, crossings: Crossings) -> bool:
    """Return whether a value is an input of the model, moved at the most: a constant there normalizes samples."""
    while value is not None and (node := value.producer()) is not None:
        if node.op_type not in ("Cast", "Transpose", "Reshape", "Unsqueeze", "Squeeze", *_SUMS, *_PRODUCTS):
            return False
        varying = [one for one in node.inputs if one is not None and walk.constant_tensor(one) is None]
        if len(varying) != 1:
            return False
        value = varying[0]
    if value is None:
        return False
    return value in crossings.inputs or any(_is_of_input(one, crossings) for one in crossings.arguments(value))


def _makes_waves(node: ir.Node, crossings: Crossings) -> bool:
    """Return whether all that is made of a node goes into sines and cosines."""
    users = list(_past_moves(node, crossings))
    return bool(users) and all(user.op_type in _WAVES for user in users)


def _past_moves(maker: ir.Node, crossings: Crossings) -> Iterator[ir.Node]:
    """Yield what reads a node's outputs, and in the place of what only moves values what reads these."""
    seen: set[ir.Node] = set()
    crossed: set[Crossed] = set()

    def users(node: ir.Node) -> Iterator[ir.Node]:
        for output in node.outputs:
            yield from (reader for _, reader, _ in crossings.uses(output, crossed))

    frontier = list(users(maker))
    while frontier:
        node = frontier.pop()
        if node in seen:
            continue
        seen.add(node)
        if node.op_type in _MOVES and len(seen) < _MANY_STEPS:
            frontier.extend(users(node))
        else:
            yield node


def _by_constant(node: ir.Node) -> bool:
    return any(walk.constant_tensor(value) is not None for value in node.inputs)


def long_axes(tensor: ir.TensorProtocol) -> int:
    """Return along how many axes a constant is longer than 1."""
    return sum(size > 1 for size in walk.dims(tensor))


def _is_finite(tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant holds numbers, none of which stands for infinity; not read where it is a large one."""
    array = np.asarray(tensor.numpy())
    if array.dtype.kind != "f":
        array = array.astype(np.float32)
    low, high = array.min(initial=0), array.max(initial=0)
    return bool(np.isfinite(low) and np.isfinite(high) and max(-low, high) < _MASKING)


def _is_counted(tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant holds halves of whole numbers beyond 1: places, strides and anchors, never learnt."""
    doubled = 2 * np.asarray(tensor.numpy()).astype(np.float64)
    return bool(np.abs(doubled).max(initial=0) > 2 and (doubled == np.rint(doubled)).all())


def _is_mask(tensor: ir.TensorProtocol) -> bool:
    """Return whether a constant of several axes holds two numbers only, one of them 0."""
    array = np.asarray(tensor.numpy())
    low, high = array.min(), array.max()
    return bool(((array == low) | (array == high)).all() and (low == 0 or high == 0))
