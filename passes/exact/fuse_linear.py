"""Matrix products made fewer: a bias inside a Gemm, two constant matrices as one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import shapes
from graphopt.authoring import RewritePass
from graphopt.backend import Array
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target

from ..analyses.channels import ChannelView, rounded, view_of

_GEMM_DTYPES = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.DOUBLE)
# Multiplications that merging two weights may take: some seconds.
_MOST_WORK = 1 << 35


@dataclass(frozen=True)
class FuseLinear(RewritePass):
    """Turn MatMul and Add into a Gemm where the target gains; merge consecutive products where that is less work."""

    name = "fuse-linear"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return the rules; `matmul-add` only for a target that has a fast Gemm."""
        products = (Products("MatMul"), Products("MatMul", biased=True), Products("Gemm"))
        return (*products, MatMulAdd()) if "Gemm" in target.fast_ops else products


class MatMulAdd(Rule):
    """MatMul(x, w) + b = Gemm(x, w, b), for matrices x and w."""

    name = "matmul-add"

    def pattern(self, op: Any, x: Any, w: Any, b: Any) -> Any:
        return op.Add(op.MatMul(x, w, _id="product"), b)

    def check(self, m: Match) -> Miss | None:
        if any(value.shape is None for value in (m.x, m.w, m.b)):
            return Miss("the rank of an input is unknown", m.product)
        if len(m.x.shape) != 2 or len(m.w.shape) != 2:
            return Miss("is no product of two matrices", m.product)
        if m.x.dtype not in _GEMM_DTYPES:
            return Miss("a Gemm does not take its dtype", m.product)
        if not _broadcasts_to_rows(m.b, m.w.shape[1]):
            return Miss("what it adds is not one number for each column", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Gemm(m.x, m.w, m.b, _name=m.product.name)


class Products(Rule):
    """(x·A + a)·B + b = x·(A·B) + (a·B + b), where A·B has fewer elements than A and B together.

    Then it takes fewer multiplications, too, and less memory.
    """

    name = "products"

    def __init__(self, op_type: str, *, biased: bool = False) -> None:
        self._op_type, self._biased = op_type, biased

    def pattern(self, op: Any, x: Any, first: Any, second: Any, a: Any = None, b: Any = None) -> Any:
        if self._op_type == "Gemm":
            return op.Gemm(op.Gemm(x, first, a, _id="inner"), second, b, _id="outer")
        inner = op.MatMul(x, first, _id="inner")
        return op.MatMul(op.Add(inner, a) if self._biased else inner, second, _id="outer")

    def applies(self, m: Match) -> bool:
        return view_of(m.inner) is not None and view_of(m.outer) is not None

    def check(self, m: Match) -> Miss | None:
        first, second = _views(m)
        if len(first.dims) != 2 or len(second.dims) != 2:
            return Miss("its weights are batches of matrices", m.outer)
        if first.tensor.dtype not in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
            return Miss("would round what its dtype cannot spare", m.outer)
        if first.weight_is_shared or second.weight_is_shared:
            return Miss("its weights are shared", m.outer)
        if first.inputs * second.outputs >= first.tensor.size + second.tensor.size:
            return Miss("one product would be more work than two", m.outer)
        if first.inputs * first.outputs * second.outputs > _MOST_WORK:
            return Miss("merging its weights would take too long", m.outer)
        return next(filter(None, map(_oddity, (first, second), (m.values.get("a"), m.values.get("b")))), None)

    def rewrite(self, op: Any, m: Match) -> Any:
        first, second = _views(m)
        right = _matrix(second)
        product = rounded(_matrix(first) @ right, first.dtype)
        bias = _merged_bias(m, first, second, right)
        vector = rounded(bias, first.dtype) if bias is not None else None
        if product is None or (bias is not None and vector is None):
            return Miss("its weight would leave the range of its dtype", m.outer)
        transposed = bool(m.outer.attributes.get_int("transB", 0))
        weight = op.const(np.ascontiguousarray(product.T) if transposed else product, second.weight.name)
        if vector is None:
            return op.like(m.outer, m.x, weight)
        constant = op.const(vector, f"{m.outer.name or second.weight.name}.bias")
        if self._op_type == "Gemm":
            return op.like(m.outer, m.x, weight, constant)
        return op.Add(op.like(m.outer, m.x, weight), constant)


def _broadcasts_to_rows(bias: ir.Value, columns: Any) -> bool:
    """Return whether a bias is one number, or one for each column, whatever the number of rows."""
    shape = shapes.static_shape(bias)
    if shape is None or len(shape) > 2:
        return False
    return all(size == 1 for size in shape[:-1]) and (not shape or shape[-1] == 1 or shape[-1] == columns)


def _views(m: Match) -> tuple[ChannelView, ChannelView]:
    first, second = view_of(m.inner), view_of(m.outer)
    assert first is not None, "a match has constant weights"
    assert second is not None, "a match has constant weights"
    return first, second


def _oddity(view: ChannelView, bias: ir.Value | None) -> Miss | None:
    attributes = view.node.attributes
    if attributes.get_int("transA", 0) or any(attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return Miss("has factors of its own, or a transposed input", view.node)
    if bias is not None and view.bias_vector(bias) is None:
        return Miss("its bias varies, or is not one number for each column", view.node)
    return None


def _matrix(view: ChannelView) -> Array:
    """Return the weight as [inputs, outputs] in float64."""
    matrix = view.tensor.numpy().astype(np.float64)
    view.release()
    return matrix.T if view.node.attributes.get_int("transB", 0) else matrix


def _merged_bias(m: Match, first: ChannelView, second: ChannelView, right: Array) -> Array | None:
    """Return a·B + b, or None where there is neither."""
    a, b = m.values.get("a"), m.values.get("b")
    if a is None and b is None:
        return None
    bias = np.zeros(second.outputs)
    if a is not None:
        vector = first.bias_vector(a)
        assert vector is not None, "checked"
        bias = bias + np.broadcast_to(vector, (first.outputs,)) @ right
    if b is not None:
        vector = second.bias_vector(b)
        assert vector is not None, "checked"
        bias = bias + vector
    return bias
