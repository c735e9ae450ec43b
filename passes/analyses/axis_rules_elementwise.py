"""Rules of the channel analysis for operators that treat each element by itself, and for those along one axis."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .axis_ties import AxisRule, Emit, NodeAxes

# Before this version, binary operators broadcast by an attribute, and the slope of PRelu is one number a channel.
_FIRST_NUMPY_BROADCASTING = 7
# Before this version, the softmax family sees a matrix, cut at its axis.
_FIRST_SOFTMAX_OF_ONE_AXIS = 13


def unary(node: NodeAxes, emit: Emit) -> None:
    """Each output has the axes of the first input."""
    for index, output in enumerate(node.node.outputs):
        if node.gives(index):
            emit.tie_values(node.value(), output)


def broadcasting(node: NodeAxes, emit: Emit) -> None:
    """The axes of the inputs, aligned at the right, are those of the output."""
    output = node.node.outputs[0]
    old = 0 < node.opset < _FIRST_NUMPY_BROADCASTING
    for index, value in enumerate(node.node.inputs):
        if value is None:
            continue
        if old and index > 0 and len(node.sizes_in(index)) < len(node.sizes_out()):
            if node.node.op_type == "PRelu" and len(node.sizes_in(index)) == 1:
                if node.sizes_in(index) != (1,):
                    emit.tie(node.input(index, 0), node.output(0, 1))
            else:
                emit.freeze_value(value, "it broadcasts as operators did before opset 7")
                emit.freeze_value(output, "it broadcasts as operators did before opset 7")
        else:
            emit.tie_broadcast(value, output)


def softmax(node: NodeAxes, emit: Emit) -> None:
    """What is normalised over an axis depends on how many elements there are."""
    rank = len(node.sizes_in(0))
    one_axis = not 0 < node.opset < _FIRST_SOFTMAX_OF_ONE_AXIS
    axis = node.integer("axis", -1 if one_axis else 1) % rank
    for frozen in range(axis, axis + 1 if one_axis else rank):
        emit.freeze(node.input(0, frozen), f"{node.node.op_type} goes over it")
    unary(node, emit)


def cumulative(node: NodeAxes, emit: Emit) -> None:
    """A running sum along an axis is over what comes before, in order."""
    numbers = node.numbers(1) if node.has(1) else (node.integer("axis"),)
    rank = len(node.sizes_in(0))
    for axis in range(rank):
        if numbers is None or axis == numbers[0] % rank:
            emit.freeze(node.input(0, axis), f"{node.node.op_type} goes along it")
    unary(node, emit)


def triangle(node: NodeAxes, emit: Emit) -> None:
    """A triangle is cut out of the last two axes."""
    for axis in (-2, -1):
        emit.freeze(node.input(0, axis), "a triangle is cut out of it")
    unary(node, emit)


def quantized(node: NodeAxes, emit: Emit) -> None:
    """Codes and their scales stay as they are."""
    for value in (*node.node.inputs, *node.node.outputs):
        emit.freeze_value(value, "it is quantized")


_UNARY = (
    *("Abs", "Acos", "Acosh", "Asin", "Asinh", "Atan", "Atanh", "Bernoulli", "BitwiseNot", "Cast", "CastLike", "Ceil"),
    *("Celu", "Clip", "Cos", "Cosh", "Dropout", "Elu", "Erf", "Exp", "Floor", "Gelu", "HardSigmoid", "HardSwish"),
    *("Identity", "IsInf", "IsNaN", "LeakyRelu", "Log", "Mish", "Neg", "Not", "RandomNormalLike"),
    *("RandomUniformLike", "Reciprocal", "Relu", "Round", "Selu", "Shrink", "Sigmoid", "Sign", "Sin", "Sinh"),
    *("Softplus", "Softsign", "Sqrt", "Swish", "Tan", "Tanh", "ThresholdedRelu"),
)
_BROADCASTING = (
    *("Add", "And", "BitShift", "BitwiseAnd", "BitwiseOr", "BitwiseXor", "Div", "Equal", "Greater", "GreaterOrEqual"),
    *("Less", "LessOrEqual", "Max", "Mean", "Min", "Mod", "Mul", "Or", "PRelu", "Pow", "Sub", "Sum"),
    *("Where", "Xor"),
)
_QUANTIZED = (
    *("ConvInteger", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "QLinearConv", "QLinearMatMul"),
    "QuantizeLinear",
)

ELEMENTWISE_AXES: Mapping[tuple[str, str], AxisRule] = MappingProxyType(
    {
        **{("", name): unary for name in _UNARY},
        **{("", name): broadcasting for name in _BROADCASTING},
        **{("", name): softmax for name in ("Softmax", "LogSoftmax", "Hardmax")},
        **{("", name): quantized for name in _QUANTIZED},
        **{("", name): cumulative for name in ("CumSum", "CumProd")},
        ("", "Trilu"): triangle,
    }
)
