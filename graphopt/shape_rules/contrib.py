"""Shapes of ONNX Runtime's own operators, as far as they are plain to see."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import onnx_ir as ir

from graphopt import dims as d
from graphopt.dims import Size
from graphopt.shape_rules.math import product_of_matrices
from graphopt.shape_rules.shape_facts import Call, Dims, Rule, axis_of
from graphopt.shape_rules.windows import layer_normalization

FLOAT, INT32 = ir.DataType.FLOAT, ir.DataType.INT32


def like_first(call: Call) -> None:
    """The shape and dtype of its first input."""
    call.give(call.dims(), call.dtype())


def normalization(call: Call) -> None:
    """LayerNormalization before it became ONNX's."""
    layer_normalization(call)
    call.give(call.dims(), call.dtype())


def skip_normalization(call: Call) -> None:
    """The shape of its input, for the sum too; statistics have a last dimension of 1."""
    dims, dtype = call.dims(), call.dtype()
    call.give(dims, dtype)
    call.give(dims, dtype, at=3)
    kept = (*dims[:-1], 1) if dims else None
    call.give(kept, FLOAT, at=1)
    call.give(kept, FLOAT, at=2)


def fused_matmul(call: Call) -> None:
    """A matrix product with transposes of its own."""
    a, b = _turned(call, 0, "A"), _turned(call, 1, "B")
    call.give(product_of_matrices(a, b), call.dtype())


def _turned(call: Call, index: int, letter: str) -> Dims | None:
    dims = call.dims(index)
    if dims is None or len(dims) < 2:
        return dims
    if call.integer(f"transBatch{letter}"):  # the batch lies before the columns
        dims = (*dims[1:-1], dims[0], dims[-1])
    return (*dims[:-2], dims[-1], dims[-2]) if call.integer(f"trans{letter}") else dims


def matmul_to_float(call: Call) -> None:
    """A matrix product that ends in float."""
    call.give(product_of_matrices(call.dims(0), call.dims(1)), FLOAT)


def dynamic_quantize_matmul(call: Call) -> None:
    """A matrix product of floats by integers."""
    call.give(product_of_matrices(call.dims(0), call.dims(1)), call.dtype())


def matmul_of_blocks(call: Call) -> None:
    """As many columns as the packed weight says."""
    dims, columns = call.dims(), call.integer("N")
    call.give([*dims[:-1], columns] if dims else None, call.dtype())


def multi_head_attention(call: Call) -> None:
    """The queries' rows, the values' columns; keys and values with those of the past before them."""
    query, key, value = call.dims(0), call.dims(1), call.dims(2)
    heads, dtype = call.integer("num_heads"), call.dtype()
    for at in range(len(call.node.outputs)):
        call.give(None, dtype, at=at)
    if query is None or len(query) != 3 or key is None or value is None or not heads:
        return
    width = value[2] if len(value) == 3 else value[1] * value[3] if len(value) == 4 else None
    call.give([query[0], query[1], width], dtype)
    if call.has(6) or call.has(7) or len(key) != 3 or len(value) != 3:
        return
    for at, dims in ((1, key), (2, value)):
        call.give([dims[0], heads, dims[1], d.floordiv(dims[2], heads)], dtype, at=at)


def group_query_attention(call: Call) -> None:
    """The shape of the queries, or their part of queries, keys and values packed together."""
    query, heads, groups = call.dims(0), call.integer("num_heads"), call.integer("kv_num_heads")
    for at in range(len(call.node.outputs)):
        call.give(None, call.dtype(), at=at)
    if query is None or len(query) != 3 or not heads or not groups:
        return
    packed = not call.has(1)
    width: Size = d.floordiv(query[2], heads + 2 * groups) * heads if packed else query[2]
    call.give([query[0], query[1], width], call.dtype())


def quantize(call: Call) -> None:
    """The shape of its input; the dtype of the zero point."""
    call.give(call.dims(), call.dtype(2) if call.has(2) else ir.DataType.UINT8)


def dequantize(call: Call) -> None:
    """The shape of its input; the dtype of the scale."""
    call.give(call.dims(), call.dtype(1))


def embed_normalization(call: Call) -> None:
    """The hidden size for each token."""
    ids, words = call.dims(0), call.dims(2)
    call.give([*ids, words[-1]] if ids is not None and words else None, call.dtype(2))


def gather_blocks(call: Call) -> None:
    """The indices' shape in place of one axis."""
    dims, indices = call.dims(0), call.dims(1)
    if dims is None or indices is None or call.dtype(0) is ir.DataType.UINT8:
        return call.give(None, call.dtype(2))
    axis = axis_of(call.integer("gather_axis"), len(dims))
    return call.give([*dims[:axis], *indices, *dims[axis + 1 :]], call.dtype(2))


CONTRIB_RULES: Mapping[str, Rule] = MappingProxyType(
    {
        **dict.fromkeys(("Gelu", "FastGelu", "BiasGelu", "QuickGelu"), like_first),
        "RotaryEmbedding": like_first,
        "LayerNormalization": normalization,
        "SimplifiedLayerNormalization": normalization,
        "SkipLayerNormalization": skip_normalization,
        "SkipSimplifiedLayerNormalization": skip_normalization,
        "EmbedLayerNormalization": embed_normalization,
        "FusedMatMul": fused_matmul,
        "TransposeMatMul": fused_matmul,
        "MatMulIntegerToFloat": matmul_to_float,
        "DynamicQuantizeMatMul": dynamic_quantize_matmul,
        "MatMulBnb4": matmul_of_blocks,
        "MatMulNBits": matmul_of_blocks,
        "GatherBlockQuantized": gather_blocks,
        "MultiHeadAttention": multi_head_attention,
        "GroupQueryAttention": group_query_attention,
        "QuantizeLinear": quantize,
        "DequantizeLinear": dequantize,
    }
)
