"""Which operators the lowering knows: every table, and the search in them."""

from __future__ import annotations

from collections.abc import Mapping

from graphopt.walk import ONNX_DOMAINS

from . import (
    ops_activations,
    ops_attention,
    ops_casts,
    ops_contrib,
    ops_contrib_attention,
    ops_contrib_blocks,
    ops_control,
    ops_indexing,
    ops_layout,
    ops_logic,
    ops_losses,
    ops_math,
    ops_normalization,
    ops_pooling,
    ops_products,
    ops_qlinear,
    ops_quantization,
    ops_random,
    ops_recurrent,
    ops_reductions,
    ops_resize,
    ops_sampling,
    ops_sequence,
    ops_shapes,
    ops_signal,
    ops_text,
    ops_vision,
)
from .operators import Operator, Table

_ONNX: tuple[Table, ...] = (
    ops_activations.OPERATORS,
    ops_attention.OPERATORS,
    ops_casts.OPERATORS,
    ops_contrib.OPERATORS,
    ops_control.OPERATORS,
    ops_indexing.OPERATORS,
    ops_layout.OPERATORS,
    ops_logic.OPERATORS,
    ops_losses.OPERATORS,
    ops_math.OPERATORS,
    ops_normalization.OPERATORS,
    ops_pooling.OPERATORS,
    ops_products.OPERATORS,
    ops_quantization.OPERATORS,
    ops_random.OPERATORS,
    ops_recurrent.OPERATORS,
    ops_reductions.OPERATORS,
    ops_resize.OPERATORS,
    ops_sampling.OPERATORS,
    ops_sequence.OPERATORS,
    ops_shapes.OPERATORS,
    ops_signal.OPERATORS,
    ops_text.OPERATORS,
    ops_vision.OPERATORS,
)

TABLES: Mapping[str, tuple[Table, ...]] = {
    "": _ONNX,
    "ai.onnx.preview": (ops_attention.PREVIEW,),
    "ai.onnx.preview.training": (ops_losses.TRAINING,),
    "com.microsoft": (
        ops_contrib.CONTRIB,
        ops_contrib_attention.CONTRIB,
        ops_contrib_blocks.CONTRIB,
        ops_qlinear.CONTRIB,
        ops_quantization.CONTRIB,
    ),
}
"""Tables by domain; no operator is in two of them."""


def find(domain: str, op_type: str, opset: int, *, differentiable: bool = False) -> Operator | None:
    """Return what computes an operator in a version of its operator set, or None where nothing does."""
    tables = TABLES.get("" if domain in ONNX_DOMAINS else domain, ())
    for table in (ops_quantization.DIFFERENTIABLE, *tables) if differentiable else tables:
        if op_type in table:
            return _of_version(table[op_type], opset)
    return None


def _of_version(found: Operator | tuple[Operator, ...], opset: int) -> Operator | None:
    versions = found if isinstance(found, tuple) else (found,)
    return next((one for one in reversed(versions) if one.since <= opset), None)
