"""Activations from their parts: Gelu in both forms, HardSigmoid, HardSwish, Swish, Mish."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt.pattern import Match, Miss, Rule

from . import chains

_CUBIC = 0.044715
# Where an activation is as exact as its parts, and has a kernel where they have one. Double is out: alpha and beta are
# float32 attributes, and runtimes lack the kernels. So is bfloat16, which several operators refuse before opset 22.
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16})


@dataclass(frozen=True)
class Found:
    """An activation found at its last operator: its input, its parameters, its nodes."""

    x: ir.Value
    nodes: tuple[ir.Node, ...]
    alpha: float = 1.0


def erf_gelu(root: ir.Node) -> Found | None:
    """Recognise x · ½ · (1 + erf(x / √2)), the factors in any order and place."""
    return _gated(root, _erf_gate, 0.5)


def tanh_gelu(root: ir.Node) -> Found | None:
    """Recognise x · ½ · (1 + tanh(√(2/π) · (x + 0.044715 · x³))), the factors in any order and place."""
    return _gated(root, _tanh_gate, 0.5)


def swish(root: ir.Node) -> Found | None:
    """Recognise x · sigmoid(α · x)."""
    for x, gate in chains.sides(root):
        node = chains.made_by(gate, "Sigmoid")
        if node is None or node.inputs[0] is None:
            continue
        if node.inputs[0] is x:
            return Found(x, (root, node))
        inner = chains.product(node.inputs[0])
        if inner.values == (x,) and inner.factor != 0:
            return Found(x, (root, node, *inner.nodes), inner.factor)
    return None


# Looks for a gate on x: what its value is scaled by, and the nodes that compute it.
_Gate = Callable[[ir.Value, ir.Value], tuple[float, tuple[ir.Node, ...]] | None]


def _gated(root: ir.Node, gate: _Gate, factor: float) -> Found | None:
    """Find x · gate(x) · factor as a product of two values and a number."""
    whole = chains.product(root.outputs[0], whole=root)
    if len(whole.values) != 2:
        return None
    for x, other in (whole.values, whole.values[::-1]):
        found = gate(other, x)
        if found is not None and chains.near(whole.factor * found[0], factor, x.dtype):
            return Found(x, (*whole.nodes, *found[1]))
    return None


def _erf_gate(value: ir.Value, x: ir.Value) -> tuple[float, tuple[ir.Node, ...]] | None:
    found = _one_plus(value, "Erf")
    if found is None:
        return None
    scale, inner, nodes = found
    argument = chains.product(inner)
    fits = argument.values == (x,) and chains.near(argument.factor, math.sqrt(0.5), x.dtype)
    return (scale, (*nodes, *argument.nodes)) if fits else None


def _tanh_gate(value: ir.Value, x: ir.Value) -> tuple[float, tuple[ir.Node, ...]] | None:
    found = _one_plus(value, "Tanh")
    if found is None:
        return None
    scale, inner, nodes = found
    argument = chains.product(inner)
    cubic = _plus_cube(argument, x) or _times_one_plus_square(argument, x)
    if cubic is None or not chains.near(argument.factor, math.sqrt(2 / math.pi), x.dtype):
        return None
    return scale, (*nodes, *argument.nodes, *cubic)


def _one_plus(value: ir.Value, op_type: str) -> tuple[float, ir.Value, tuple[ir.Node, ...]] | None:
    """Take a · (1 + f(u)), written a + a · f(u) too, apart: a, u, and the nodes."""
    sum_ = chains.shifted(value)
    if sum_ is None or sum_[1] == 0:
        return None
    scaled = chains.product(sum_[0])
    inner = chains.made_by(scaled.values[0], op_type) if len(scaled.values) == 1 else None
    if inner is None or inner.inputs[0] is None or not chains.near(scaled.factor, sum_[1], value.dtype):
        return None
    return sum_[1], inner.inputs[0], (sum_[2], *scaled.nodes, inner)


def _plus_cube(argument: chains.Product, x: ir.Value) -> tuple[ir.Node, ...] | None:
    """Recognise x + 0.044715 · x³."""
    node = chains.made_by(argument.values[0], "Add") if len(argument.values) == 1 else None
    if node is None:
        return None
    for first, second in chains.sides(node):
        cube = chains.product(second)
        if first is x and cube.values == (x, x, x) and chains.near(cube.factor, _CUBIC, x.dtype):
            return (node, *cube.nodes)
    return None


def _times_one_plus_square(argument: chains.Product, x: ir.Value) -> tuple[ir.Node, ...] | None:
    """Recognise x · (1 + 0.044715 · x²)."""
    if len(argument.values) != 2:
        return None
    for first, second in (argument.values, argument.values[::-1]):
        sum_ = chains.shifted(second)
        if first is not x or sum_ is None or sum_[1] != 1.0:
            continue
        square = chains.product(sum_[0])
        if square.values == (x, x) and chains.near(square.factor, _CUBIC, x.dtype):
            return (sum_[2], *square.nodes)
    return None


class Activation(Rule):
    """A rule for an activation that a function above recognises at its last operator."""

    first_opset = 1
    last: str = "Mul"

    def pattern(self, op: Any, a: Any, b: Any) -> Any:
        return getattr(op, self.last)(a, b)

    def find(self, root: ir.Node) -> Found | None:
        """Return the activation whose last operator this is."""
        raise NotImplementedError

    def applies(self, m: Match) -> bool:
        found = self.find(m.root) if chains.opset(m) >= self.first_opset else None
        return found is not None and found.x.dtype in _FLOATS and m.include(found.nodes)

    def found(self, m: Match) -> Found:
        """Return what `applies` found."""
        found = self.find(m.root)
        assert found is not None, "applies"
        return found


class Gelu(Activation):
    """x · ½ · (1 + erf(x / √2)) = Gelu(x).

    By definition, from opset 20; the number may stand at any factor.
    """

    name = "gelu"
    first_opset = 20

    def find(self, root: ir.Node) -> Found | None:
        return erf_gelu(root)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Gelu(self.found(m).x)


class TanhGelu(Activation):
    """x · ½ · (1 + tanh(√(2/π) · (x + 0.044715 · x³))) = Gelu(x, approximate=tanh).

    By definition, from opset 20; the number may stand at any factor, x may be taken out of the sum.
    """

    name = "gelu-tanh"
    first_opset = 20

    def find(self, root: ir.Node) -> Found | None:
        return tanh_gelu(root)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Gelu(self.found(m).x, approximate="tanh")


class Swish(Activation):
    """x · Sigmoid(α · x) = Swish(x, α).

    By definition, from opset 24.
    """

    name = "swish"
    first_opset = 24

    def find(self, root: ir.Node) -> Found | None:
        return swish(root)

    def rewrite(self, op: Any, m: Match) -> Any:
        found = self.found(m)
        return op.Swish(found.x, alpha=found.alpha)


class Mish(Activation):
    """x · Tanh(Softplus(x)) = Mish(x).

    By definition, from opset 18.
    """

    name = "mish"
    first_opset = 18

    def find(self, root: ir.Node) -> Found | None:
        for x, gate in chains.sides(root):
            tanh = chains.made_by(gate, "Tanh")
            softplus = chains.made_by(tanh.inputs[0], "Softplus") if tanh is not None else None
            if tanh is not None and softplus is not None and softplus.inputs[0] is x:
                return Found(x, (root, tanh, softplus))
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Mish(self.found(m).x)


class HardSwish(Activation):
    """x · HardSigmoid(x, ⅙, ½) = HardSwish(x).

    By definition, from opset 14.
    """

    name = "hard-swish"
    first_opset = 14

    def find(self, root: ir.Node) -> Found | None:
        for x, gate in chains.sides(root):
            node = chains.made_by(gate, "HardSigmoid")
            if node is None or node.inputs[0] is not x:
                continue
            alpha, beta = (node.attributes.get_float(key, default) for key, default in (("alpha", 0.2), ("beta", 0.5)))
            if chains.near(alpha, 1 / 6, x.dtype) and chains.near(beta, 0.5, x.dtype):
                return Found(x, (root, node))
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.HardSwish(self.found(m).x)


class HardSwishDivided(Activation):
    """x · Clip(x + 3, 0, 6) / 6 = HardSwish(x).

    By definition, from opset 14; the division may stand at the product, or before it (`hard-sigmoid`).
    """

    name = "hard-swish-divided"
    first_opset = 14

    def __init__(self, last: str) -> None:
        self.last = last

    def find(self, root: ir.Node) -> Found | None:
        whole = chains.product(root.outputs[0], whole=root)
        if len(whole.values) != 2:
            return None
        for x, gate in (whole.values, whole.values[::-1]):
            found = clipped(gate)
            if found is None or found[0] is not x:
                continue
            _, factor, shift, high, nodes = found
            if all(
                chains.near(a, b, x.dtype)
                for a, b in ((factor, 1.0), (shift, 3.0), (high, 6.0), (whole.factor * 6, 1.0))
            ):
                return Found(x, (*whole.nodes, *nodes))
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.HardSwish(self.found(m).x)


def clipped(value: ir.Value) -> tuple[ir.Value, float, float, float, tuple[ir.Node, ...]] | None:
    """Take Clip(a · x + b, 0, c) apart: x, a, b, c, and the nodes."""
    clip = chains.made_by(value, "Clip")
    limits = _limits(clip) if clip is not None else None
    if clip is None or limits is None or limits[0] != 0 or not 0 < limits[1] < math.inf:
        return None
    sum_ = chains.shifted(clip.inputs[0])
    if sum_ is None:
        return None
    inner = chains.product(sum_[0])
    # An addend that others read too may be a product all the same: then x is that product.
    if len(inner.values) != 1:
        return sum_[0], 1.0, sum_[1], limits[1], (clip, sum_[2])
    return inner.values[0], inner.factor, sum_[1], limits[1], (clip, sum_[2], *inner.nodes)


def _limits(clip: ir.Node) -> tuple[float, float] | None:
    """Return the bounds of a Clip where they are constants: inputs from opset 11, attributes before."""
    if "min" in clip.attributes or "max" in clip.attributes:
        return clip.attributes.get_float("min", -math.inf), clip.attributes.get_float("max", math.inf)
    bounds = [chains.number(value) for value in clip.inputs[1:3]]
    if len(bounds) != 2 or bounds[0] is None or bounds[1] is None:
        return None
    return bounds[0], bounds[1]


class HardSigmoid(Rule):
    """Clip(a · x + b, 0, c) / c = HardSigmoid(x, a/c, b/c).

    By definition; c = 1 needs no division.
    """

    name = "hard-sigmoid"

    def __init__(self, last: str) -> None:
        self.last = last

    def pattern(self, op: Any, a: Any, b: Any = None, c: Any = None) -> Any:
        return op.Clip(a, b, c) if self.last == "Clip" else getattr(op, self.last)(a, b)

    def applies(self, m: Match) -> bool:
        found = self._find(m.root)
        return found is not None and found[0].dtype in _FLOATS and m.include(found[3])

    def check(self, m: Match) -> Miss | None:
        found = self._find(m.root)
        if found is not None and found[1] <= 0:
            return Miss("its slope is not positive", m.root)
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        found = self._find(m.root)
        assert found is not None, "applies"
        return op.HardSigmoid(found[0], alpha=found[1], beta=found[2])

    def _find(self, root: ir.Node) -> tuple[ir.Value, float, float, tuple[ir.Node, ...]] | None:
        whole = chains.product(root.outputs[0], whole=root) if self.last != "Clip" else None
        if whole is not None and len(whole.values) != 1:
            return None
        found = clipped(whole.values[0] if whole is not None else root.outputs[0])
        if found is None:
            return None
        x, factor, shift, high, nodes = found
        scale, outer = (whole.factor, whole.nodes) if whole is not None else (1.0, ())
        if not chains.near(scale * high, 1.0, x.dtype):
            return None
        return x, factor * scale, shift * scale, (*outer, *nodes)
