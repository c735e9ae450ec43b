"""Fold what scales and shifts channels into the weight and bias of the linear operator beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import RewritePass
from graphopt.backend import Array
from graphopt.pattern import Match, Miss, Rule
from graphopt.target import Target

from ..analyses.channels import ChannelView, per_channel, rounded, view_of
from .batch_norm import scale_and_shift, training
from .fuse_affine_inputs import BatchNormBefore, ScaleBefore, ShiftBefore

_ONE = np.ones(())


@dataclass(frozen=True)
class FuseAffine(RewritePass):
    """Fold BatchNormalization and Mul, Div, Add, Sub, Neg by constants into Conv, ConvTranspose, Gemm and MatMul."""

    name = "fuse-affine"

    def rules(self, target: Target) -> Sequence[Rule]:
        """Return the rules for each linear operator: what follows it, then what precedes it."""
        layers = [Layer(op_type) for op_type in ("Conv", "ConvTranspose", "Gemm", "MatMul")]
        biased = Layer("MatMul", with_add=True)
        return (
            *(BatchNormAfter(layer) for layer in (*layers, biased)),
            *(ScaleAfter(layer, op_type) for layer in (*layers, biased) for op_type in ("Mul", "Div", "Neg")),
            *(ShiftAfter(layer, op_type) for layer in layers[:3] for op_type in ("Add", "Sub", "-Sub")),
            *(BatchNormBefore(op_type) for op_type in ("Conv", "Gemm")),
            *(ScaleBefore(layer.op_type, op_type) for layer in layers for op_type in ("Mul", "Div")),
            *(ShiftBefore(op_type, step) for op_type in ("Conv", "Gemm", "MatMul") for step in ("Add", "Sub")),
        )


@dataclass(frozen=True)
class Layer:
    """A linear operator as a pattern; a MatMul may have its bias in an Add.

    Attributes:
        op_type: The operator.
        with_add: Whether a constant is added behind it.
    """

    op_type: str
    with_add: bool = False

    def pattern(self, op: Any, x: Any, w: Any, b: Any) -> Any:
        """Return the pattern; its operator is called ``layer``."""
        if self.op_type == "MatMul":
            product = op.MatMul(x, w, _id="layer")
            return op.Add(product, b) if self.with_add else product
        return getattr(op, self.op_type)(x, w, b, _id="layer")


class BatchNormAfter(Rule):
    """BN(x·W + b) = x·(s·W) + (b − mean)·s + beta, with s = gamma / sqrt(var + epsilon).

    It holds channel by channel, at inference, where the statistics are constants.
    """

    def __init__(self, layer: Layer) -> None:
        self.name = f"{layer.op_type.lower()}-bn"
        self._layer = layer

    def pattern(self, op: Any, x: Any, w: Any, gamma: Any, beta: Any, mean: Any, var: Any, b: Any = None) -> Any:
        return op.BatchNormalization(self._layer.pattern(op, x, w, b), gamma, beta, mean, var, _id="bn")

    def check(self, m: Match) -> Miss | None:
        trains = training(m)
        if trains is not None:
            return trains
        if self._layer.op_type == "MatMul" and not _has_rank_2(m.x, m.w):
            return Miss("its channels may be another axis than those of the product", m.bn)
        return _refusal(m)

    def rewrite(self, op: Any, m: Match) -> Any:
        view = view_of(m.layer)
        assert view is not None, "checked"
        found = scale_and_shift(m, view.outputs)
        return found if isinstance(found, Miss) else _fold(op, m, view, *found)


class ScaleAfter(Rule):
    """(x·W + b)·s = x·(s·W) + s·b; the same for / s, which is · 1/s, and for −, which is · −1.

    s is one number, or one for each output channel.
    """

    def __init__(self, layer: Layer, op_type: str) -> None:
        self.name = f"{layer.op_type.lower()}-scale"
        self._layer, self._op_type = layer, op_type

    def pattern(self, op: Any, x: Any, w: Any, b: Any = None, s: Any = None) -> Any:
        result = self._layer.pattern(op, x, w, b)
        return op.Neg(result) if self._op_type == "Neg" else getattr(op, self._op_type)(result, s)

    def applies(self, m: Match) -> bool:
        return self._op_type == "Neg" or walk.constant_tensor(m.s) is not None

    def check(self, m: Match) -> Miss | None:
        return _refusal(m)

    def rewrite(self, op: Any, m: Match) -> Any:
        view = view_of(m.layer)
        assert view is not None, "checked"
        scale = -_ONE if self._op_type == "Neg" else per_channel(m.s, view.outputs, view.axis, view.least_rank)
        if scale is None:
            return Miss("its factor varies along other axes than the channels", m.root)
        if self._op_type == "Div":
            with np.errstate(all="ignore"):
                scale = 1 / scale
        return _fold(op, m, view, scale, np.zeros(()))


class ShiftAfter(Rule):
    """(x·W + b) ± c = x·W + (b ± c), and c − (x·W + b) = x·(−W) + (c − b).

    c is one number, or one for each output channel.
    """

    def __init__(self, layer: Layer, op_type: str) -> None:
        self.name = f"{layer.op_type.lower()}-shift"
        self._layer, self._op_type = layer, op_type

    def pattern(self, op: Any, x: Any, w: Any, c: Any, b: Any = None) -> Any:
        result = self._layer.pattern(op, x, w, b)
        match self._op_type:
            case "Add":
                return op.Add(result, c)
            case "Sub":
                return op.Sub(result, c)
            case _:
                return op.Sub(c, result)

    def applies(self, m: Match) -> bool:
        return walk.constant_tensor(m.c) is not None

    def check(self, m: Match) -> Miss | None:
        return _refusal(m, weight_stays=self._op_type != "-Sub")

    def rewrite(self, op: Any, m: Match) -> Any:
        view = view_of(m.layer)
        assert view is not None, "checked"
        shift = per_channel(m.c, view.outputs, view.axis, view.least_rank)
        if shift is None:
            return Miss("what it adds varies along other axes than the channels", m.root)
        if self._op_type == "-Sub":
            return _fold(op, m, view, -_ONE, shift)
        return _fold(op, m, view, _ONE, shift if self._op_type == "Add" else -shift)


def _has_rank_2(x: ir.Value, weight: ir.Value) -> bool:
    """Return whether a product with a weight is known to be a matrix."""
    tensor = walk.constant_tensor(weight)
    return x.shape is not None and len(x.shape) == 2 and tensor is not None and len(tensor.shape) == 2


def _refusal(m: Match, *, weight_stays: bool = False) -> Miss | None:
    """Return why weight and bias cannot take anything in."""
    view = view_of(m.layer)
    if view is None:
        return Miss("needs a constant floating-point weight", m.layer)
    if view.weight_is_shared and not weight_stays:
        return Miss("its weight is shared", m.layer)
    # It would be the factor of a new bias, too.
    if m.layer.attributes.get_float("beta", 1.0) != 1.0:
        return Miss("its bias has a factor of its own", m.layer)
    bias = m.values.get("b")
    if bias is None:
        return None
    if walk.constant_tensor(bias) is None:
        return Miss("its bias varies", m.layer)
    if view.bias_vector(bias) is None:
        return Miss("its bias is not one number for each channel", m.layer)
    return None


def _fold(op: Any, m: Match, view: ChannelView, scale: Array, shift: Array) -> Any:
    """Return the layer with its outputs scaled, then shifted; all in float64, rounded once."""
    bias: ir.Value | None = m.values.get("b")
    old = view.bias_vector(bias) if bias is not None else None
    with np.errstate(all="ignore"):
        new = shift if old is None else old * scale + shift
    weight = view.weight
    if scale is not _ONE:
        scaled = view.scaled(view.over_outputs(scale)) if np.isfinite(scale).all() else None
        if scaled is None:
            return Miss("its weight would leave the range of its dtype", m.layer)
        weight = op.const(scaled, weight.name)
    if bias is None and not new.any():
        return op.like(m.layer, m.x, weight)
    vector = rounded(np.broadcast_to(new, (view.outputs,)), view.dtype)
    if vector is None:
        return Miss("its bias would leave the range of its dtype", m.layer)
    constant = op.const(vector, bias.name if bias is not None else f"{m.layer.name or view.weight.name}.bias")
    if view.node.op_type == "MatMul":
        return op.Add(op.like(m.layer, m.x, weight), constant)
    return op.like(m.layer, m.x, weight, constant)
