"""The bias of a linear layer wherever it is stored: found, and moved by a shift of each output."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context
from graphopt.backend import Array

from ..analyses.linear_layers import LinearLayer
from ..analyses.second_moments import group_count
from ..solvers.grid import LARGEST_BIAS_CODE
from ..solvers.objective import by_group
from .integer_weights import release

_RULE = "correct-bias"
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE)


@dataclass(frozen=True, eq=False)
class LayerBias:
    """Where a layer's bias is, or may be put.

    Attributes:
        layer: The operator that makes the products.
        adder: The node that adds the bias: the layer itself, or an Add behind it.
        index: Which of its inputs the bias is.
        factor: What the bias is multiplied by, which is not zero.
        stored: The constant that holds it, as floats or codes; None where there is none yet.
        scales: What codes are multiplied by, one number or [outputs]; None for floats.
    """

    layer: ir.Node
    adder: ir.Node
    index: int
    factor: float = 1.0
    stored: ir.Value | None = None
    scales: Array | None = None

    def shift(self, by: Array, ctx: Context) -> bool:
        """Add a number to each output, as exactly as the bias can say it, and return whether anything changed.

        Args:
            by: float64 [outputs].
            ctx: Where edits are made.
        """
        by = by / self.factor
        if self.stored is None:
            return self._put(by, ctx)
        tensor = walk.constant_tensor(self.stored)
        assert tensor is not None, "what is stored is a constant"
        old = tensor.numpy()
        wide = old.astype(np.float64) + (by if self.scales is None else np.rint(by / self.scales)).reshape(old.shape)
        if self.scales is not None:
            wide = np.clip(wide, -LARGEST_BIAS_CODE, LARGEST_BIAS_CODE)
        new = wide.astype(old.dtype)
        if np.array_equal(new, old) or not np.isfinite(new.astype(np.float64)).all():
            return False
        with ctx.rewriter.edit(_RULE, self.layer):
            self._store(new, self.stored, ctx)
        return True

    def _store(self, new: Array, stored: ir.Value, ctx: Context) -> None:
        rewriter, given = ctx.rewriter, self.adder.inputs[self.index]
        assert given is not None, "the bias is there"
        if len(given.uses()) == 1 and len(stored.uses()) == 1 and not stored.is_graph_output():
            rewriter.set_weight(stored, new)
            return
        value = rewriter.const(new, stored.name or "bias", near=self.adder)
        dequantize = given.producer()
        if given is not stored and dequantize is not None:
            inputs = [value, *list(dequantize.inputs)[1:]]
            attributes = {attribute.name: attribute for attribute in dequantize.attributes.values()}
            made = rewriter.make("DequantizeLinear", inputs, attributes, sources=[self.layer], name="b")
            value = rewriter.insert(made, before=self.adder).outputs[0]
        rewriter.set_input(self.adder, self.index, value)
        if given is not stored and dequantize is not None and not walk.is_read(dequantize):
            rewriter.erase(dequantize)
        release(rewriter, stored)

    def _put(self, by: Array, ctx: Context) -> bool:
        """Give the layer the bias it has none of: int32 where its products are of integers, else floats."""
        rewriter = ctx.rewriter
        if self.scales is not None:
            codes = np.clip(np.rint(by / self.scales), -LARGEST_BIAS_CODE, LARGEST_BIAS_CODE).astype(np.int32)
            if not codes.any():
                return False
            with ctx.rewriter.edit(_RULE, self.layer):
                scales = rewriter.const(self.scales.astype(np.float32), "bias_scale", near=self.adder)
                inputs = [rewriter.const(codes, "bias", near=self.adder), scales]
                axis = {"axis": 0} if self.scales.ndim else {}
                made = rewriter.make("DequantizeLinear", inputs, axis, sources=[self.layer], name="b")
                value = rewriter.insert(made, before=self.adder).outputs[0]
                rewriter.set_input(self.adder, self.index, value)
            return True
        dtype = self.layer.outputs[0].dtype or ir.DataType.FLOAT
        floats = by.astype(dtype.numpy())
        if dtype not in _FLOATS or not floats.any() or not np.isfinite(floats.astype(np.float64)).all():
            return False
        with ctx.rewriter.edit(_RULE, self.layer):
            rewriter.set_input(self.adder, self.index, rewriter.const(floats, "bias", near=self.adder))
        return True


def bias_of(node: ir.Node, outputs: int, ctx: Context) -> LayerBias | str:
    """Return the bias of a linear layer, or where one may be put; or why there can be none.

    Args:
        node: Conv, ConvTranspose, Gemm or MatMul whose weight is the second input.
        outputs: How many outputs it has.
        ctx: Its target says of what kind a new bias of integer products is.
    """
    if node.op_type == "MatMul":
        return _behind(node, outputs)
    factor = node.attributes.get_float("beta", 1.0) if node.op_type == "Gemm" else 1.0
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return LayerBias(node, node, 2, factor or 1.0, None, _scales_of_products(node, outputs, ctx))
    if factor == 0:
        return "their bias is multiplied by zero"
    return _stored(node, node, 2, factor, outputs)


def bias_of_layer(layer: LinearLayer, ctx: Context) -> LayerBias | None:
    """Return a layer's bias of floats, or where one may be put; None where there can be none.

    What it holds counts in products of weight and input: that of a Gemm is multiplied by beta, and they by alpha.
    """
    if layer.weight_index != 1:
        return None
    weight = walk.constant_tensor(layer.weight)
    assert weight is not None, "a linear layer has a constant weight"
    groups = group_count(layer) if layer.node.op_type == "ConvTranspose" else 1
    found = bias_of(layer.node, walk.dims(weight)[layer.output_axis] * groups, ctx)
    scale = product_scale(layer)
    if not isinstance(found, LayerBias) or found.scales is not None or scale == 0:
        return None
    return replace(found, factor=found.factor / scale)


def product_scale(layer: LinearLayer) -> float:
    """Return what a layer multiplies the products of its weight and its input by: alpha of a Gemm, else 1."""
    return layer.node.attributes.get_float("alpha", 1.0) if layer.node.op_type == "Gemm" else 1.0


def bias_content(bias: LayerBias | None, outputs: int) -> Array:
    """Return what a bias of floats adds to the products of each output, float64 [outputs]."""
    tensor = walk.constant_tensor(bias.stored) if bias is not None else None
    if bias is None or tensor is None:
        return np.zeros(outputs)
    return np.asarray(tensor.numpy().astype(np.float64).reshape(-1) * bias.factor)


def bias_for_mean(bias: LayerBias, difference: Array, mean: Array) -> Array:
    """Return what a stored bias of floats is to hold for the mean of the outputs to stay.

    Args:
        bias: Where it is stored.
        difference: W − Ŵ, [outputs, inputs].
        mean: E[x], [groups, inputs].
    """
    tensor = walk.constant_tensor(bias.stored)
    assert tensor is not None, "what is stored is a constant"
    lost = by_group(difference.astype(np.float64), mean[:, None]) @ mean[:, :, None]
    whole = tensor.numpy().astype(np.float64).reshape(-1) + lost.reshape(-1) / bias.factor
    return np.asarray(whole.reshape(walk.dims(tensor)).astype(tensor.dtype.numpy()))


def _behind(node: ir.Node, outputs: int) -> LayerBias | str:
    """Return the bias that an Add behind a MatMul adds."""
    uses = list(node.outputs[0].uses())
    adder = uses[0].node if len(uses) == 1 and not node.outputs[0].is_graph_output() else None
    if adder is None or not walk.is_onnx_op(adder, "Add"):
        return "they have no bias, and their operator takes none"
    return _stored(node, adder, 1 - uses[0].idx, 1.0, outputs)


def _stored(node: ir.Node, adder: ir.Node, index: int, factor: float, outputs: int) -> LayerBias | str:
    value = adder.inputs[index]
    producer = value.producer() if value is not None else None
    scales, stored = None, value
    if producer is not None and walk.is_onnx_op(producer, "DequantizeLinear"):
        if len(producer.inputs) > 2 and producer.inputs[2] is not None:
            return "their bias is stored with a zero point"
        stored, scale = producer.inputs[0], walk.constant_tensor(producer.inputs[1])
        if scale is None:
            return "their bias is not constant"
        scales = scale.numpy().astype(np.float64)
    tensor = walk.constant_tensor(stored)
    if tensor is None:
        return "their bias is not constant" if adder is node else "they have no bias, and their operator takes none"
    dims = walk.dims(tensor)
    # One number for each output, along the last axis; of a Gemm or Add, others would be spread over rows.
    if not dims or dims[-1] != outputs or tensor.size != outputs or (scales is not None and len(dims) != 1):
        return "their bias is no number for each output"
    if scales is None and tensor.dtype not in _FLOATS:
        return "their bias is stored in another way"
    return LayerBias(node, adder, index, factor, stored, scales)


def _scales_of_products(node: ir.Node, outputs: int, ctx: Context) -> Array | None:
    """Return the scales of the sums of products of integers, one number or [outputs]; None where these are floats."""
    if ctx.target.static is None or ctx.target.static.bias != "int32":
        return None
    scales = []
    for value in list(node.inputs)[:2]:
        producer = value.producer() if value is not None else None
        if producer is None or not walk.is_onnx_op(producer, "DequantizeLinear"):
            return None
        tensor = walk.constant_tensor(producer.inputs[1])
        blocked = producer.attributes.get_int("block_size", 0) > 0
        if tensor is None or blocked or tensor.dtype != ir.DataType.FLOAT:
            return None
        scales.append(tensor.numpy().astype(np.float64))
    read, weight = scales
    if read.size != 1 or weight.size not in (1, outputs):
        return None
    product: Array = read.reshape(()) * (weight.reshape(-1) if weight.size > 1 else weight.reshape(()))
    return product
