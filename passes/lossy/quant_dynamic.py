"""Dynamic quantization: matrix products in integers, each activation's range taken as it passes by."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context

from ..analyses.linear_layers import LinearLayer, as_linear_layer, linear_layers, readers_elsewhere
from ..analyses.selection import Selection
from .dynamic_trial import try_rounding
from .integer_weights import WeightStore, weight_tensor

_RULE = "quant-dynamic"
_NAME = "dyn"
# The version that brought DynamicQuantizeLinear.
FIRST_OPSET = 11


@dataclass(frozen=True)
class Product:
    """A matrix product with a constant right factor.

    Attributes:
        layer: The layer; its weight is the constant that is stored.
        transpose: The node between the constant and the product that exchanges its axes, or None.
    """

    layer: LinearLayer
    transpose: ir.Node | None = None


def quantize_dynamic(model: ir.Model, ctx: Context, selection: Selection, weights: WeightStore) -> frozenset[ir.Node]:
    """Put the matrix products the target runs well on dynamic ranges into integers, in subgraphs too.

    Each becomes DynamicQuantizeLinear, MatMulInteger, Cast, Mul and Add, which ONNX Runtime fuses into one kernel, or
    into two where products share the quantization of one activation. Measured on MiniLM, 8×64 tokens: merging the
    products of q, k and v into one (QAttention included) gains nothing over that, as the result has to be taken apart.

    With calibration data, activations whose rounding hurts the outputs stay float, unless the run has a budget, which
    judges that itself.

    Args:
        model: The model, changed in place.
        ctx: Target and rewriter.
        selection: Nodes that may run in integers.
        weights: Where weights are stored.

    Returns:
        The products that had better go on in float.
    """
    layers = linear_layers(model)
    lowering = _Lowering(ctx, weights)
    done: Counter[str] = Counter()
    left: Counter[tuple[str, str]] = Counter()
    products: list[Product] = []
    for node in list(walk.every_node(model)):
        if not walk.is_onnx_op(node, *ctx.target.dynamic_ops) or not selection.allows(node):
            continue
        product = as_product(node)
        least = ctx.target.dynamic_least
        reason = _obstacle(product, layers, least) if product is not None else "no constant right factor"
        if product is None or reason is not None:
            left[node.op_type, reason or ""] += 1
            continue
        products.append(product)
    is_judged = ctx.weigh is not None or ctx.is_attempt
    trial = None if is_judged else try_rounding(ctx, [product.layer for product in products])
    spared = trial.spared if trial is not None else frozenset()
    for product in products:
        node = product.layer.node
        if node in spared:
            left[node.op_type, "its activation in 8 bits hurts the outputs"] += 1
            continue
        done[node.op_type] += 1
        # Seen anew: its input may be what a product lowered before it gave.
        lowering.lower(as_product(node) or product)
    _summarise(done, left, lowering, ctx)
    if trial is not None:
        trial.say(ctx)
    elif ctx.data is None and products:
        ctx.note(
            "what activations lose in 8 bits was not looked at, for want of calibration data: give it with `--data`"
        )
    return spared


def as_product(node: ir.Node) -> Product | None:
    """Return a node as a product with a constant, read directly or through a Transpose (a tied output layer)."""
    layer = as_linear_layer(node)
    if layer is not None:
        return Product(layer) if layer.weight_index == 1 and weight_tensor(layer).dtype == ir.DataType.FLOAT else None
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or not walk.is_onnx_op(transpose, "Transpose") or transpose.inputs[0] is None:
        return None
    tensor = walk.constant_tensor(transpose.inputs[0])
    if tensor is None or tensor.dtype != ir.DataType.FLOAT or len(tensor.shape) != 2:
        return None
    if list(transpose.attributes.get_ints("perm", [1, 0])) != [1, 0]:
        return None
    return Product(LinearLayer(node, node.inputs[0], transpose.inputs[0], 1, 0, None), transpose)


def _pays(layer: LinearLayer, least: int) -> bool:
    """Return whether a layer has as many inputs and outputs as integers need to pay."""
    return min(walk.dims(weight_tensor(layer))) >= least


def _obstacle(product: Product, layers: list[LinearLayer], least: int) -> str | None:
    """Return why a product stays in float, or None; `least` is the fewest inputs and outputs that pay."""
    layer = product.layer
    if layer.node.op_type == "Gemm":
        if layer.node.attributes.get_int("transA", 0):
            return "its input is transposed"
        if layer.bias is not None and walk.constant_tensor(layer.bias) is None:
            return "its bias is no constant"
    if len(weight_tensor(layer).shape) != 2:
        return "its weight is no matrix"
    if not _pays(layer, least):
        return f"fewer than {least} inputs or outputs"
    if product.transpose is None:
        others = readers_elsewhere(layer, layers)
        if others:
            return f"its weight is also read by {others[0].op_type}"
    return None


@dataclass
class _Lowering:
    """Puts products into integers one by one.

    Attributes:
        ctx: Where edits are made.
        weights: Weights stored so far.
        quantized: Integers, scale and zero point of each activation, by the graph that reads it.
    """

    ctx: Context
    weights: WeightStore
    quantized: dict[tuple[ir.Value, object], tuple[ir.Value, ...]] = field(default_factory=dict)

    def lower(self, product: Product) -> None:
        """Put one product into integers, as one edit."""
        layer, rewriter = product.layer, self.ctx.rewriter
        node = layer.node
        with rewriter.edit(_RULE, node):
            make = functools.partial(self._make, node)
            codes, scale, zero_point = self._quantized(layer.input, node)
            # What a Gemm transposes at run time is stored transposed.
            transposed = node.attributes.get_int("transB", 0) == 1
            stored = self.weights.store(layer, factor=node.attributes.get_float("alpha", 1.0), transposed=transposed)
            matrix = stored.codes
            if product.transpose is not None:
                matrix = make("Transpose", [matrix], {"perm": [1, 0]})
            total = make("MatMulInteger", [codes, matrix, zero_point])
            rescale = make("Mul", [scale, self.weights.scales(stored, node)])
            result = make("Mul", [make("Cast", [total], {"to": ir.DataType.FLOAT}), rescale])
            if layer.bias is not None:
                result = make("Add", [result, self._bias(layer)])
            rewriter.replace(node.outputs[0], result)
            rewriter.erase(node)
            if product.transpose is not None and not product.transpose.outputs[0].uses():
                rewriter.erase(product.transpose)
            self.weights.release(layer.weight)
            self.weights.release(layer.bias)

    def _make(
        self, node: ir.Node, op_type: str, inputs: list[ir.Value], attributes: dict[str, object] | None = None
    ) -> ir.Value:
        made = self.ctx.rewriter.make(op_type, inputs, attributes, sources=[node], name=_NAME)
        return self.ctx.rewriter.insert(made, before=node).outputs[0]

    def _quantized(self, value: ir.Value, node: ir.Node) -> tuple[ir.Value, ...]:
        key = (value, node.graph)
        if key not in self.quantized:
            made = self.ctx.rewriter.make("DynamicQuantizeLinear", [value], sources=[node], outputs=3, name=_NAME)
            self.quantized[key] = tuple(self.ctx.rewriter.insert(made, before=node).outputs)
        return self.quantized[key]

    def _bias(self, layer: LinearLayer) -> ir.Value:
        assert layer.bias is not None, "asked for where there is one"
        beta = layer.node.attributes.get_float("beta", 1.0)
        if beta == 1.0:
            return layer.bias
        tensor = walk.constant_tensor(layer.bias)
        assert tensor is not None, "checked before"
        content = np.asarray(tensor.numpy() * np.float32(beta), np.float32)
        return self.ctx.rewriter.const(ir.tensor(content), f"{layer.bias.name}_scaled", near=layer.node)


def _summarise(done: Counter[str], left: Counter[tuple[str, str]], lowering: _Lowering, ctx: Context) -> None:
    reasons = ", ".join(f"{count} {operator} ({reason})" for (operator, reason), count in left.items())
    parts = ", ".join(f"{count} {operator}" for operator, count in done.most_common()) or "nothing"
    inputs = len(lowering.quantized)
    ctx.note(
        f"{parts} in integers, on {inputs} activations quantized as they come" + (f"; left: {reasons}" if left else ""),
        integers=dict(done),
        activations=inputs,
        left=left.total(),
        stored={"int8": done.total()} if done else {},
    )
