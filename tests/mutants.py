"""Ten ways in which a model goes wrong, each done to a written file: what a regression test of it has to notice."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper, numpy_helper

Mutate = Callable[[onnx.ModelProto], None]


def perturb_one_weight(model: onnx.ModelProto) -> None:
    """Move the codes of one layer's weight by one, every fifth of them."""
    tensor = _weight_of(model, _first(model, "Conv"))
    codes = numpy_helper.to_array(tensor).copy()
    codes.reshape(-1)[::5] -= np.sign(codes.reshape(-1)[::5]).astype(codes.dtype)
    tensor.CopyFrom(numpy_helper.from_array(codes, tensor.name))


def lose_a_bias(model: onnx.ModelProto) -> None:
    del _first(model, "Conv").input[2]


def swap_operands(model: onnx.ModelProto) -> None:
    node = _first(model, "Sub")
    node.input[0], node.input[1] = node.input[1], node.input[0]


def drop_quantization(model: onnx.ModelProto) -> None:
    """Let the first layer read floats instead of codes: the outputs hardly change, the kernel does."""
    conv = _first(model, "Conv")
    dequantize = _producer(model, conv.input[0])
    conv.input[0] = _producer(model, dequantize.input[0]).input[0]


def double_the_size(model: onnx.ModelProto) -> None:
    padding = np.random.default_rng(0).integers(0, 255, model.ByteSize(), np.uint8)
    model.graph.initializer.append(numpy_helper.from_array(padding, "padding"))


def rename_the_output(model: onnx.ModelProto) -> None:
    _rename_output(model, "probabilities")


def change_the_dtype(model: onnx.ModelProto) -> None:
    """Give the output in half precision, under its old name."""
    name = model.graph.output[0].name
    _rename_output(model, "wide")
    model.graph.node.append(helper.make_node("Cast", ["wide"], [name], "narrow", to=TensorProto.FLOAT16))
    model.graph.output[0].name = name
    model.graph.output[0].type.tensor_type.elem_type = TensorProto.FLOAT16


def fix_the_input_shape(model: onnx.ModelProto) -> None:
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 8


def shift_a_zero_point(model: onnx.ModelProto) -> None:
    """Read the codes of the last layer's input by one off."""
    node = _producer(model, [node for node in model.graph.node if node.op_type == "Conv"][-1].input[0])
    [tensor] = [one for one in model.graph.initializer if one.name == node.input[2]]
    shifted = numpy_helper.to_array(tensor) + np.ones((), numpy_helper.to_array(tensor).dtype)
    model.graph.initializer.append(numpy_helper.from_array(shifted, "shifted"))
    node.input[2] = "shifted"


def take_the_wrong_axis(model: onnx.ModelProto) -> None:
    _set(_first(model, "Softmax"), helper.make_attribute("axis", 0))


MUTANTS: dict[str, Mutate] = {
    "weight perturbed": perturb_one_weight,
    "bias lost": lose_a_bias,
    "operands swapped": swap_operands,
    "quantization dropped": drop_quantization,
    "size doubled": double_the_size,
    "output renamed": rename_the_output,
    "dtype changed": change_the_dtype,
    "input shape fixed": fix_the_input_shape,
    "zero point wrong": shift_a_zero_point,
    "axis wrong": take_the_wrong_axis,
}


def _first(model: onnx.ModelProto, op: str) -> NodeProto:
    return next(node for node in model.graph.node if node.op_type == op)


def _producer(model: onnx.ModelProto, name: str) -> NodeProto:
    return next(node for node in model.graph.node if name in node.output)


def _weight_of(model: onnx.ModelProto, node: NodeProto) -> TensorProto:
    codes = _producer(model, node.input[1]).input[0]
    return next(tensor for tensor in model.graph.initializer if tensor.name == codes)


def _rename_output(model: onnx.ModelProto, name: str) -> None:
    producer = _producer(model, model.graph.output[0].name)
    producer.output[0] = model.graph.output[0].name = name


def _set(node: NodeProto, attribute: AttributeProto) -> None:
    kept = [one for one in node.attribute if one.name != attribute.name]
    del node.attribute[:]
    node.attribute.extend([*kept, attribute])
