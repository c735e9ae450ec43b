"""Candidates for integers: which operators a target could run in integers, were all around them in integers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.explaining.products import fits_gemm
from graphopt.target import IntegerScheme, Target
from graphopt.unfit_layers import is_attention_product, unfit_for_tiles

from .linear_layers import LINEAR_OPS, LinearLayer, as_linear_layer, has_channel_bias, linear_layers, readers_elsewhere
from .selection import Selection

_ACTIVATIONS = ("Relu", "Clip")
_ATTENTION = "com.microsoft::MultiHeadAttention"
# Operators that move values of any dtype: where a runtime does not fuse Q and DQ around them, they can be given
# the integers themselves. Operator -> first version that takes 8-bit integers.
_ANY_DTYPE_MOVES = {"DepthToSpace": 13, "Pad": 13, "SpaceToDepth": 13, "Split": 2, "Tile": 6}
# Operators of activations only, and how many they read.
OPERANDS = {"Add": 2, "Mul": 2, "MatMul": 2}

Kind = Literal["linear", "join", "move", "residual"]


@dataclass(frozen=True, eq=False)
class Unit:
    """An operator that runs in integers, with the activation behind it.

    Attributes:
        node: The operator.
        kind: ``linear`` computes with weights, ``join`` has an integer kernel of its own, ``move`` only moves
            or selects values, so that its inputs and outputs share one scale, ``residual`` is an Add that the kernel
            of the layer before it makes, given its other branch in integers.
        inputs: (Position, value) of each activation it reads.
        adder: The Add that gives a MatMul its bias, which runtimes fuse with it, or None.
        tail: The Relu or Clip that ends it, or None.
        layer: The linear layer, where it has constant weights.
        on_integers: Whether it reads the integers themselves, with no Q and DQ around it.
    """

    node: ir.Node
    kind: Kind
    inputs: tuple[tuple[int, ir.Value], ...]
    adder: ir.Node | None = None
    tail: ir.Node | None = None
    layer: LinearLayer | None = None
    on_integers: bool = False

    @property
    def core(self) -> ir.Node:
        """The node that makes its values, before the activation."""
        return self.adder if self.adder is not None else self.node

    @property
    def end(self) -> ir.Node:
        """The node that makes the values later nodes read."""
        return self.tail if self.tail is not None else self.core

    @property
    def outputs(self) -> tuple[ir.Value, ...]:
        """The values that later nodes read."""
        return tuple(self.end.outputs)

    def read(self) -> tuple[ir.Value, ...]:
        """Return the activations it reads."""
        return tuple(value for _, value in self.inputs)


@dataclass
class Candidates:
    """Finds the operators that can run in integers, and says why others cannot.

    Attributes:
        model: The model.
        target: What it will run on.
        scheme: What integers the target's kernels take.
        selection: Nodes that may run in integers.
        obstacles: Why a node that was asked about cannot.
    """

    model: ir.Model
    target: Target
    scheme: IntegerScheme
    selection: Selection
    obstacles: dict[ir.Node, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.opset = walk.opset(self.model)
        self.layers = linear_layers(self.model)
        self.positions = {node: position for position, node in enumerate(self.model.graph)}

    def unit_of(self, node: ir.Node) -> Unit | None:
        """Return a node as a unit, were all around it in integers; None where it cannot be one."""
        if not walk.is_onnx_op(node, node.op_type):
            return None
        layer = as_linear_layer(node)
        if layer is not None and _is_mean(layer):
            layer = None
        kind = self._kind(node, layer)
        if kind is None:
            return None
        reason = self._obstacle(node, layer)
        if reason is not None:
            self.obstacles[node] = reason
            return None
        on_integers = kind == "move" and node.op_type not in self.target.shared_scale_ops
        adder = self._adder(layer) if layer is not None and node.op_type == "MatMul" else None
        if adder is not None and layer is not None:
            layer = replace(layer, bias=next(value for value in adder.inputs if value is not node.outputs[0]))
        if kind == "residual":
            identity = self._identity_branch(node)
            return Unit(node, kind, (identity,)) if identity is not None else None
        inputs = tuple(_activations(node, kind, layer))
        # A move shares the scale of what it reads, which is wider than what an activation behind it lets through.
        tail = _tail(adder or node) if kind != "move" else None
        unit = Unit(node, kind, inputs, adder, tail, layer, on_integers)
        if _reaches_subgraph(unit.outputs, self.target.shared_scale_ops):
            self.obstacles[node] = "what moves its result is read inside a subgraph"
            return None
        return unit

    def has_kernel(self, node: ir.Node) -> bool:
        """Return whether the target runs such operators in integers at all."""
        return self._kind(node, None) is not None

    def _identity_branch(self, node: ir.Node) -> tuple[int, ir.Value] | None:
        """Return the operand of an Add that is given in integers while a layer's kernel adds it to its own result.

        Of two layers, the one that is computed last takes the Add with it.
        """
        fresh = [
            (self.positions.get(producer, 0), index)
            for index, value in enumerate(node.inputs)
            if value is not None
            and (producer := value.producer()) is not None
            and as_linear_layer(producer) is not None
            and _only_reader(producer) is node
        ]
        if not fresh:
            return None
        other = 1 - max(fresh)[1]
        value = node.inputs[other]
        return (other, value) if value is not None and walk.constant_tensor(value) is None else None

    def _adder(self, layer: LinearLayer) -> ir.Node | None:
        """Return the Add of a constant per channel behind a MatMul, where the two run as one integer kernel.

        ONNX Runtime makes a Gemm of them if their shapes are known, and an integer Gemm only if the bias is in
        integers too. Elsewhere the Add stays in float, and to bring its bias there in each run only costs time.
        """
        adder = _only_reader(layer.node)
        if self.scheme.bias != "int32" or adder is None or not walk.is_onnx_op(adder, "Add"):
            return None
        biases = [value for value in adder.inputs if value is not layer.node.outputs[0]]
        if len(biases) != 1 or not self.selection.allows(adder):
            return None
        bias, product = walk.constant_tensor(biases[0]), layer.node.outputs[0].shape
        # A bias of more axes than the product would add axes to the result.
        if bias is None or product is None or len(bias.shape) > len(product):
            return None
        if biases[0] is None or (self.target.fusions.joins_bias and not fits_gemm(layer.node, biases[0])):
            return None
        return adder if has_channel_bias(replace(layer, bias=biases[0])) else None

    def _kind(self, node: ir.Node, layer: LinearLayer | None) -> Kind | None:
        if self.scheme.residual and node.op_type == "Add":
            return "residual"
        if node.op_type in self.target.integer_ops:
            return "linear" if layer is not None or node.op_type in LINEAR_OPS else "join"
        if node.op_type in self.target.shared_scale_ops:
            return "move"
        # Only where the target fuses moves at all is it known to keep integers in between.
        return "move" if node.op_type in _ANY_DTYPE_MOVES and self.target.shared_scale_ops else None

    def _obstacle(self, node: ir.Node, layer: LinearLayer | None) -> str | None:
        """Return why a node cannot run in integers, or None if it can."""
        if not self.selection.allows(node):
            return "excluded"
        if any(_is_dequantized(value) for value in node.inputs):
            return "quantized already"
        if layer is None and node.op_type in ("Conv", "ConvTranspose", "Gemm"):
            return "its weight is no constant"
        if layer is None and node.op_type == "MatMul" and not self.scheme.quantize_outputs:
            return "a product of two activations, which the runtime fuses with what is around it in float"
        if layer is None and _ATTENTION in self.target.fast_ops and is_attention_product(node):
            # MiniLM, 8×64 tokens: 2.01× against 1.99× as it stands, 2.83× against 2.74× once it is MultiHeadAttention.
            return "a product of attention, which costs less as a whole in float"
        if node.op_type == "Add" and self._adds_bias(node):
            return "adds a bias, which costs less in float"
        if not _is_float32(node, layer):
            return "not known to be float32"
        if layer is not None:
            return self._weight_obstacle(layer)
        if node.op_type == "Mul" and node.inputs[0] is node.inputs[1]:
            return "squares, whose range is too wide"
        if node.op_type == "Mul" and any(_is_product(value) for value in node.inputs):
            return "multiplies a product, whose rounding grows with it"
        return self._version_obstacle(node)

    def _adds_bias(self, node: ir.Node) -> bool:
        """Return whether an Add gives a MatMul its bias, where the runtime's kernel of the product may end in floats.

        In integers, the sum would be rounded once more without it.
        """
        product = self.target.fusions.of("MatMul")
        if product is None or product.writes == "codes" or sum(map(_is_constant, node.inputs)) != 1:
            return False
        makers = [value.producer() for value in node.inputs if value is not None and not _is_constant(value)]
        return any(
            maker is not None and maker.op_type == "MatMul" and as_linear_layer(maker) is not None for maker in makers
        )

    def _weight_obstacle(self, layer: LinearLayer) -> str | None:
        if layer.weight_index == 0:
            return "its weight is the left factor"
        others = readers_elsewhere(layer, self.layers)
        if others:
            return f"its weight is also read by {others[0].op_type}"
        if layer.bias is not None and self.scheme.bias == "int32" and not has_channel_bias(layer):
            return "its bias is no constant per channel"
        as_floats = self.scheme.weight.startswith("float")
        return unfit_for_tiles(layer.node, layer.weight, layer.input, self.scheme.least_channels, floats=as_floats)

    def _version_obstacle(self, node: ir.Node) -> str | None:
        rule = self.target.fusions.of(node.op_type)
        first = max(rule.since if rule is not None else 1, _ANY_DTYPE_MOVES.get(node.op_type, 1))
        if self.opset < first:
            return f"takes integers only from opset {first}"
        if node.op_type == "Resize" and node.attributes.get_string("mode", "nearest") != "nearest":
            return "interpolates"
        if node.op_type == "MaxPool" and len(node.outputs) > 1:
            return "also returns indices"
        if node.op_type == "Pad" and not _pads_zeros(node):
            return "pads with other values than zero"
        return None


def _is_constant(value: ir.Value | None) -> bool:
    return walk.constant_tensor(value) is not None


def _is_mean(layer: LinearLayer) -> bool:
    """Return whether a MatMul has one number throughout on its left: what loses nothing on any grid."""
    if layer.weight_index == 1 or layer.node.op_type != "MatMul":
        return False
    tensor = walk.constant_tensor(layer.weight)
    return tensor is not None and tensor.dtype is ir.DataType.FLOAT and len(np.unique(tensor.numpy())) == 1


def _is_product(value: ir.Value | None) -> bool:
    """Return whether two values that vary are multiplied to a value."""
    producer = value.producer() if value is not None else None
    if producer is None or not walk.is_onnx_op(producer, "Mul"):
        return False
    return all(walk.constant_tensor(factor) is None for factor in producer.inputs)


def is_quantized(value: ir.Value) -> bool:
    """Return whether a value is quantized by the model as it stands."""
    return any(walk.is_onnx_op(use.node, "QuantizeLinear") for use in value.uses())


def _is_dequantized(value: ir.Value | None) -> bool:
    producer = value.producer() if value is not None else None
    return producer is not None and walk.is_onnx_op(producer, "DequantizeLinear")


def _is_float32(node: ir.Node, layer: LinearLayer | None) -> bool:
    """Return whether a node computes in float32; a constant weight tells even where no dtype was inferred."""
    if layer is not None:
        tensor = walk.constant_tensor(layer.weight)
        return tensor is not None and tensor.dtype == ir.DataType.FLOAT
    known = {value.dtype for value in (*node.inputs[:1], *node.outputs[:1]) if value is not None}
    return ir.DataType.FLOAT in known and known <= {None, ir.DataType.FLOAT}


def _activations(node: ir.Node, kind: Kind, layer: LinearLayer | None) -> Iterator[tuple[int, ir.Value]]:
    """Yield the position and value of each activation a node reads; of shapes and indices, none."""
    if layer is not None:
        yield 1 - layer.weight_index, layer.input
        return
    count = len(node.inputs) if node.op_type == "Concat" else OPERANDS.get(node.op_type, 1)
    for index, value in enumerate(node.inputs[: 1 if kind == "move" else count]):
        if value is not None:
            yield index, value


def _reaches_subgraph(values: Iterable[ir.Value], moves: frozenset[str]) -> bool:
    """Return whether a nested graph reads a value behind operators that move it.

    ONNX Runtime 1.31 propagates a DequantizeLinear through such operators, takes the capture behind them for an
    input of the If, Loop or Scan and aborts the process. What captures the dequantized value itself is fine.
    """
    behind = [
        output
        for value in values
        for use in value.uses()
        if walk.is_onnx_op(use.node, *moves) and use.idx == 0
        for output in use.node.outputs
    ]
    captured = any(use.node.graph is not output.graph for output in behind for use in output.uses())
    return captured or (bool(behind) and _reaches_subgraph(behind, moves))


def _only_reader(node: ir.Node) -> ir.Node | None:
    """Return the node of the same graph that alone reads what a node makes."""
    output = node.outputs[0]
    if len(node.outputs) > 1 or output.is_graph_output() or len(output.uses()) != 1:
        return None
    (use,) = output.uses()
    return use.node if use.node.graph is node.graph else None


def _tail(node: ir.Node) -> ir.Node | None:
    """Return the Relu or Clip that alone reads a node, if a range that holds zero can stand for what it clips."""
    tail = _only_reader(node)
    if tail is None or not walk.is_onnx_op(tail, *_ACTIVATIONS) or tail.inputs[0] is not node.outputs[0]:
        return None
    bounds = clip_bounds(tail)
    return tail if bounds is not None and bounds[0] <= 0.0 <= bounds[1] else None


def clip_bounds(activation: ir.Node) -> tuple[float, float] | None:
    """Return what a Relu or Clip lets through, or None where that is no constant."""
    if activation.op_type == "Relu":
        return 0.0, np.inf
    bounds = [activation.attributes.get_float("min", -np.inf), activation.attributes.get_float("max", np.inf)]
    for index, value in enumerate(activation.inputs[1:3]):
        if value is None:
            continue
        tensor = walk.constant_tensor(value)
        if tensor is None:
            return None
        bounds[index] = float(tensor.numpy().item())
    return bounds[0], bounds[1]


def _pads_zeros(node: ir.Node) -> bool:
    if node.attributes.get_string("mode", "constant") != "constant":
        return True
    if len(node.inputs) < 3 or node.inputs[2] is None:
        return True
    tensor = walk.constant_tensor(node.inputs[2])
    return tensor is not None and not np.any(tensor.numpy())
