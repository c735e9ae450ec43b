"""Operators of a runtime's own, where the target says that they are worth it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import RewritePass
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target

from ..analyses.quantized import is_rescaled_product
from . import activations, chains, heads, integer_products, rotary, runtime_attention

_DOMAIN = "com.microsoft"


@dataclass(frozen=True)
class RuntimeOperators(RewritePass):
    """Put in the operators of its own that the target's runtime has for what standard ones take several for."""

    name = "runtime-operators"
    # What quantizes or prunes looks for the layers themselves.
    keeps_canonical = False

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return the rules for operators that the target runs fast, and against those it should not make."""
        rules: dict[str, tuple[Rule, ...]] = {
            "MatMulIntegerToFloat": (integer_products.IntegerProduct(),),
            "GroupQueryAttention": (runtime_attention.GroupQueryAttention(),),
            "MultiHeadAttention": (runtime_attention.MultiHeadAttention(),),
            "RotaryEmbedding": (RotaryEmbedding(),),
            "Gelu": (Gelu(),),
            "FastGelu": (FastGelu(), FastGeluBias()),
            "BiasGelu": (BiasGelu(""), BiasGelu(_DOMAIN)),
            "QuickGelu": (QuickGelu(),),
        }
        fast = [rule for name, group in rules.items() if f"{_DOMAIN}::{name}" in target.fast_ops for rule in group]
        slow: list[Rule] = (
            [LastingSum(), SumOfThree()] if f"{_DOMAIN}::SkipLayerNormalization" in target.slow_ops else []
        )
        return fast + slow


class Gelu(activations.Activation):
    """x · ½ · (1 + erf(x / √2)) = Gelu(x) of the runtime.

    By definition, where the opset has no Gelu yet.
    """

    name = "runtime-gelu"

    def applies(self, m: Match) -> bool:
        return chains.opset(m) < 20 and super().applies(m)

    def find(self, root: ir.Node) -> activations.Found | None:
        return _in_float(activations.erf_gelu(root))

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Gelu(self.found(m).x, _domain=_DOMAIN)


class FastGelu(activations.Activation):
    """x · ½ · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) = FastGelu(x) of the runtime.

    By definition, where the opset has no Gelu yet.
    """

    name = "fast-gelu"

    def applies(self, m: Match) -> bool:
        return chains.opset(m) < 20 and super().applies(m)

    def find(self, root: ir.Node) -> activations.Found | None:
        return _in_float(activations.tanh_gelu(root))

    def check(self, m: Match) -> Miss | None:
        return (
            None if chains.rank_of(self.found(m).x) else Miss("may be of a scalar, which the operator refuses", m.root)
        )

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.FastGelu(self.found(m).x, _domain=_DOMAIN)


class QuickGelu(activations.Activation):
    """x · Sigmoid(α · x) = QuickGelu(x, α) of the runtime.

    By definition.
    """

    name = "quick-gelu"

    def find(self, root: ir.Node) -> activations.Found | None:
        return _in_float(activations.swish(root))

    def rewrite(self, op: Any, m: Match) -> Any:
        found = self.found(m)
        return op.QuickGelu(found.x, alpha=found.alpha, _domain=_DOMAIN)


def _in_float(found: activations.Found | None) -> activations.Found | None:
    """Return what was found where it is in float32, which is all the runtime has these operators for."""
    return found if found is not None and found.x.dtype == ir.DataType.FLOAT else None


class _BiasInto(Rule):
    """What rules for an activation behind the sum with a bias share: the bias is as long as the last axis."""

    def applies(self, m: Match) -> bool:
        width = shapes.static_shape(m.b)
        is_wide = width is not None and len(width) == 1 and width[0] == heads.dim(m.x, -1)
        return is_wide and m.x.dtype == ir.DataType.FLOAT and walk.constant_tensor(m.b) is not None

    def check(self, m: Match) -> Miss | None:
        rank = chains.rank_of(m.x)
        if rank is None or rank < 2:
            return Miss("adds its bias to a vector", m.root)
        if is_rescaled_product(m.x):
            return Miss("its bias is added by the integer product before it", m.root)
        return None


class BiasGelu(_BiasInto):
    """Gelu(x + b) = BiasGelu(x, b) of the runtime.

    By definition, for a bias of the last axis, in float32.
    """

    name = "bias-gelu"

    def __init__(self, domain: str) -> None:
        self._gelu_domain = domain

    def pattern(self, op: Any, x: Any, b: Any) -> Any:
        if self._gelu_domain:
            return op.Gelu(op.Add(x, b), _domain=self._gelu_domain)
        return op.Gelu(op.Add(x, b), approximate="none")

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.BiasGelu(m.x, m.b, _domain=_DOMAIN)


class FastGeluBias(_BiasInto):
    """Gelu(x + b, approximate=tanh) = FastGelu(x, b) of the runtime.

    By definition, for a bias of the last axis, in float32.
    """

    name = "bias-fast-gelu"

    def pattern(self, op: Any, x: Any, b: Any) -> Any:
        return op.Gelu(op.Add(x, b), approximate="tanh")

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.FastGelu(m.x, m.b, _domain=_DOMAIN)


class RotaryEmbedding(Rule):
    """x · cos + concat(−x₂, x₁) · sin = RotaryEmbedding(x, 0, half of cos, half of sin) of the runtime.

    By definition, where the opset has no RotaryEmbedding yet; its positions count from 0 in every sample.
    """

    name = "runtime-rotary-embedding"
    inner_may_be_read = True

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return op.Add(a, b)

    def applies(self, m: Match) -> bool:
        found = rotary.find(m.root) if chains.opset(m) < 23 else None
        return found is not None and m.include(rotary.nodes_of(found))

    def check(self, m: Match) -> Miss | None:
        found = rotary.find(m.root)
        assert found is not None, "applies"
        why = rotary.obstacle(found)
        if why is None and chains.opset(m) < 13 and walk.constant_tensor(found.cos) is None:
            why = "its tables vary, and the opset is older than 13"
        if why is None and any(heads.dim(one, 0) != 1 for one in (found.cos, found.sin)):
            why = "its tables differ from sample to sample"
        return Miss(why, m.root) if why is not None else None

    def rewrite(self, op: Any, m: Match) -> Any:
        found = rotary.find(m.root)
        assert found is not None, "applies"
        caches = [rotary.flat_half(op, one) for one in (found.cos, found.sin)]
        start = op.const(np.zeros(1, np.int64), "first_position")
        parts = heads.split(found.x)
        if parts is None or len(found.x.uses()) > len({*found.nodes}):
            return op.RotaryEmbedding(found.x, start, *caches, _domain=_DOMAIN)
        turned = op.RotaryEmbedding(parts.whole, start, *caches, num_heads=parts.count, _domain=_DOMAIN)
        return heads.split_again(op, turned, parts)


class LastingSum(Rule):
    """a + b = Sum(a, b) before a LayerNormalization.

    The same sum under a name that keeps the runtime from fusing the two into an operator that is slower.
    """

    name = "lasting-sum"

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return op.Add(a, b)

    def applies(self, m: Match) -> bool:
        uses = m.root.outputs[0].uses()
        is_read = any(walk.is_onnx_op(use.node, "LayerNormalization") and use.idx == 0 for use in uses)
        return is_read and m.a.dtype == ir.DataType.FLOAT and chains.opset(m) >= 8

    def check(self, m: Match) -> Miss | None:
        if len(m.root.outputs[0].uses()) > 1 or m.root.outputs[0].is_graph_output():
            return Miss("its sum feeds other nodes, and is not fused", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Sum(m.a, m.b)


class SumOfThree(Rule):
    """Sum(a + b, c) = Sum(a, b, c).

    Sums are computed from left to right.
    """

    name = "sum-of-three"

    def pattern(self, op: Any, a: Any, b: Any, c: Any) -> Any:
        return op.Sum(op.Add(a, b), c)

    def applies(self, m: Match) -> bool:
        return bool(m.a.dtype == ir.DataType.FLOAT)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Sum(m.a, m.b, m.c)
