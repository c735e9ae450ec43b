"""Rules that fold what scales and shifts the input channels of a linear operator into its weight and bias."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.pattern import Match, Miss, Rule

from ..analyses.channels import ChannelView, per_channel, rounded, view_of
from ..analyses.composites import comes_from_a_normalization
from .batch_norm import scale_and_shift, training


class ScaleBefore(Rule):
    """(s·x)·W = x·(s·W), and (x/s)·W = x·(W/s): each input channel's factor scales the weights that read it.

    The gain of a normalization is left where runtimes look for it.
    """

    def __init__(self, layer: str, op_type: str) -> None:
        self.name = f"scale-{layer.lower()}"
        self._layer, self._op_type = layer, op_type

    def pattern(self, op: Any, x: Any, s: Any, w: Any, b: Any = None) -> Any:
        step = getattr(op, self._op_type)(x, s, _id="step")
        return _layer(op, self._layer, step, w, b)

    def applies(self, m: Match) -> bool:
        return walk.constant_tensor(m.s) is not None and walk.constant_tensor(m.x) is None

    def check(self, m: Match) -> Miss | None:
        view = view_of(m.root)
        if view is None:
            return Miss("needs a constant floating-point weight", m.root)
        if view.weight_is_shared:
            return Miss("its weight is shared", m.root)
        return _refusal(m, view, m.s)

    def rewrite(self, op: Any, m: Match) -> Any:
        view = view_of(m.root)
        assert view is not None, "checked"
        scale = _per_input(m.s, m.x, view)
        if scale is None:
            return Miss("its factor varies along other axes than the channels, or may add some", m.step)
        if self._op_type == "Div":
            with np.errstate(all="ignore"):
                scale = 1 / scale
        scaled = view.scaled(view.over_inputs(scale)) if np.isfinite(scale).all() else None
        if scaled is None:
            return Miss("its weight would leave the range of its dtype", m.root)
        weight = op.const(scaled, view.weight.name)
        return op.like(m.root, m.x, weight, *([m.b] if m.values.get("b") is not None else []))


class ShiftBefore(Rule):
    """(x ± c)·W + b = x·W + (b ± c·W), where nothing pads x.

    Padding is zero before the shift and c after it. The shift of a normalization is left where runtimes look for it.
    """

    def __init__(self, layer: str, op_type: str) -> None:
        self.name = f"shift-{layer.lower()}"
        self._layer, self._op_type = layer, op_type

    def pattern(self, op: Any, x: Any, c: Any, w: Any, b: Any = None) -> Any:
        step = getattr(op, self._op_type)(x, c, _id="step")
        if self._layer == "MatMul":
            return op.Add(op.MatMul(step, w, _id="layer"), b)
        return getattr(op, self._layer)(step, w, b, _id="layer")

    def applies(self, m: Match) -> bool:
        if self._layer == "MatMul" and walk.constant_tensor(m.b) is None:
            return False
        return walk.constant_tensor(m.c) is not None and walk.constant_tensor(m.x) is None

    def check(self, m: Match) -> Miss | None:
        view = view_of(m.layer)
        if view is None:
            return Miss("needs a constant floating-point weight", m.layer)
        if self._layer == "MatMul" and len(view.dims) > 2:
            return Miss("its weight is a batch of matrices", m.layer)
        return _bias_refusal(m, view) or _refusal(m, view, m.c)

    def rewrite(self, op: Any, m: Match) -> Any:
        view = view_of(m.layer)
        assert view is not None, "checked"
        shift = _per_input(m.c, m.x, view)
        if shift is None:
            return Miss("what it adds varies along other axes than the channels, or may add some", m.step)
        carried = _carried(view, shift)
        constant = _moved_bias(op, m, view, carried if self._op_type == "Add" else -carried)
        if isinstance(constant, Miss):
            return constant
        if self._layer == "MatMul":
            return op.like(m.root, op.like(m.layer, m.x, m.w), constant)
        return op.like(m.layer, m.x, m.w, constant)


class BatchNormBefore(Rule):
    """BN(x)·W + b = x·(s·W) + (t·W + b), with s = gamma / sqrt(var + epsilon) and t = beta − mean·s.

    It holds at inference, where the statistics are constants, and where nothing pads what is normalized.
    """

    def __init__(self, layer: str) -> None:
        self.name = f"bn-{layer.lower()}"
        self._layer = layer

    def pattern(self, op: Any, x: Any, gamma: Any, beta: Any, mean: Any, var: Any, w: Any, b: Any = None) -> Any:
        normalized = op.BatchNormalization(x, gamma, beta, mean, var, _id="bn")
        return getattr(op, self._layer)(normalized, w, b, _id="layer")

    def check(self, m: Match) -> Miss | None:
        view = view_of(m.layer)
        if view is None:
            return Miss("needs a constant floating-point weight", m.layer)
        if view.weight_is_shared:
            return Miss("its weight is shared", m.layer)
        return training(m) or _bias_refusal(m, view)

    def rewrite(self, op: Any, m: Match) -> Any:
        view = view_of(m.layer)
        assert view is not None, "checked"
        found = scale_and_shift(m, view.inputs)
        if isinstance(found, Miss):
            return found
        scale, shift = found
        scaled = view.scaled(view.over_inputs(scale)) if np.isfinite(scale).all() else None
        if scaled is None:
            return Miss("its weight would leave the range of its dtype", m.layer)
        bias = _moved_bias(op, m, view, _carried(view, shift))
        return bias if isinstance(bias, Miss) else op.like(m.layer, m.x, op.const(scaled, view.weight.name), bias)


def _layer(op: Any, op_type: str, x: Any, w: Any, b: Any) -> Any:
    return op.MatMul(x, w) if op_type == "MatMul" else getattr(op, op_type)(x, w, b)


def _refusal(m: Match, view: ChannelView, constant: ir.Value) -> Miss | None:
    if view.node.attributes.get_int("transA", 0):
        return Miss("its input is transposed", view.node)
    if constant.dtype is not None and m.x.dtype is not None and constant.dtype != m.x.dtype:
        return Miss("mixes dtypes", m.step)
    if comes_from_a_normalization(m.x):
        return Miss("may be part of a normalization", m.step)
    return None


def _bias_refusal(m: Match, view: ChannelView) -> Miss | None:
    """Return why a shift of the input cannot go into the bias."""
    if view.node.op_type == "Conv" and _may_pad(view.node):
        return Miss("its input is padded", view.node)
    attributes = view.node.attributes
    if attributes.get_int("transA", 0):
        return Miss("its input is transposed", view.node)
    if any(attributes.get_float(name, 1.0) != 1.0 for name in ("alpha", "beta")):
        return Miss("has factors of its own", view.node)
    if m.b is not None and view.bias_vector(m.b) is None:
        return Miss("its bias varies, or is not one number for each channel", view.node)
    return None


def _moved_bias(op: Any, m: Match, view: ChannelView, carried: Array) -> ir.Value | Miss:
    """Return the bias with what a shift of the input comes to behind the weight."""
    old = view.bias_vector(m.b) if m.b is not None else None
    vector = rounded(carried if old is None else old + carried, view.dtype)
    if vector is None:
        return Miss("its bias would leave the range of its dtype", view.node)
    bias: ir.Value = op.const(vector, m.b.name if m.b is not None else f"{view.node.name or view.weight.name}.bias")
    return bias


def _per_input(constant: ir.Value, x: ir.Value, view: ChannelView) -> Array | None:
    """Return a constant as one number for each input channel, if leaving it out keeps the shape of x."""
    tensor = walk.constant_tensor(constant)
    assert tensor is not None, "checked"
    if not walk.dims(tensor):
        return per_channel(constant, view.inputs, view.axis, 0)
    if x.shape is None:
        return None
    result = per_channel(constant, view.inputs, view.axis, len(x.shape))
    if result is None or result.ndim == 0:
        return result
    # A single channel would be broadcast to as many as the constant has.
    return result if len(x.shape) >= -view.axis and x.shape[view.axis] == view.inputs else None


def _carried(view: ChannelView, shift: Array) -> Array:
    """Return what a shift of the input channels adds to each output channel, in float64."""
    weight = view.tensor.numpy()
    if view.node.op_type == "Conv":
        kernel = tuple(range(2, weight.ndim))
        factor = view.over_inputs(shift)
        per_pair = weight.sum(kernel, dtype=np.float64) * factor.reshape(factor.shape[:2])
        return np.asarray(per_pair.sum(1))
    vector = np.broadcast_to(shift, (view.inputs,))
    transposed = view.node.attributes.get_int("transB", 0)
    # float64 comes from the vector, row by row: the weight is never copied as a whole.
    paths = "nk,k->n" if transposed else "kn,k->n"
    return np.asarray(np.einsum(paths, weight, vector, dtype=np.float64, casting="unsafe"))


def _may_pad(conv: ir.Node) -> bool:
    auto_pad = conv.attributes.get_string("auto_pad", "NOTSET")
    return auto_pad not in ("NOTSET", "VALID") or any(conv.attributes.get_ints("pads", ()))
