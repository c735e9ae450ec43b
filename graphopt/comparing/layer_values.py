"""The values of a model that a comparison looks at, and how each is read so that its runtime keeps integer kernels."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.explaining.codes import is_dequantize, is_quantize
from graphopt.fragment import constant_content, values_read

# Dtypes that no error is computed of, or that runtimes do not hand out; those of less than a byte besides.
_NO_NUMBERS = (
    ir.DataType.STRING,
    ir.DataType.COMPLEX64,
    ir.DataType.COMPLEX128,
    ir.DataType.FLOAT8E4M3FN,
    ir.DataType.FLOAT8E4M3FNUZ,
    ir.DataType.FLOAT8E5M2,
    ir.DataType.FLOAT8E5M2FNUZ,
    ir.DataType.FLOAT8E8M0,
)
# Codes that runtimes hand out.
_CODES = (ir.DataType.INT8, ir.DataType.UINT8, ir.DataType.INT16, ir.DataType.UINT16)
# What a runtime makes part of the kernel before it, if Q follows.
_ACTIVATIONS = ("Clip", "Elu", "HardSigmoid", "HardSwish", "LeakyRelu", "Relu", "Sigmoid", "Tanh")


@dataclass(frozen=True, eq=False)
class Reading:
    """How a value is read.

    Attributes:
        value: The value meant.
        asked: What the runtime is asked for: the value itself, or the codes that are all that is read of it.
        codes: The node that says what the codes mean; None where there are none.
        constant: Whether it hangs on no input.
    """

    value: ir.Value
    asked: ir.Value
    codes: ir.Node | None = None
    constant: bool = False

    def numbers(self, array: Array) -> Array:
        """Return what was read as the numbers it stands for."""
        return dequantized(array, self.codes) if self.codes is not None else array


@dataclass
class ReadValues:
    """What is read of a model's main graph, and what is not.

    Attributes:
        readings: By value, in graph order.
        hidden: Values that would have kept the runtime from an integer kernel, had they been asked for.
        stands_for: Codes, and what is read back from them, to the value they are of.
    """

    readings: dict[ir.Value, Reading] = field(default_factory=dict)
    hidden: list[ir.Value] = field(default_factory=list)
    no_numbers: list[ir.Value] = field(default_factory=list)
    stands_for: dict[ir.Value, ir.Value] = field(default_factory=dict)

    def meant(self, value: ir.Value) -> ir.Value:
        """Return the value that codes, or what is read back from them, are of; any other as it is."""
        return self.stands_for.get(value, value)


def read_values(model: ir.Model) -> ReadValues:
    """Return what to read of the values that a model's main graph computes.

    Where a value is written as codes and only these are read, it is the codes that are read, as what they mean: asking
    for the value itself would keep the runtime from making one integer kernel of all that is around it.
    """
    found, constant = ReadValues(), _computed_from_constants(model)
    for node in model.graph:
        for value in node.outputs:
            if not value.name or constant_content(value) is not None or value in found.stands_for:
                continue
            if not _holds_numbers(value):
                found.no_numbers.append(value)
                continue
            quantize = _sole_quantize(value)
            if quantize is not None:
                codes = quantize.outputs[0]
                found.readings[value] = Reading(value, codes, _reader_of(codes) or quantize, value in constant)
                found.stands_for[codes] = value
                for use in codes.uses():
                    if is_dequantize(use.node) and use.idx == 0 and not use.node.outputs[0].is_graph_output():
                        found.stands_for[use.node.outputs[0]] = value
            elif value not in constant and _is_inside_kernel(value):
                found.hidden.append(value)
            else:
                found.readings[value] = Reading(value, value, constant=value in constant)
    return found


def dequantized(codes: Array, node: ir.Node) -> Array:
    """Return the numbers that codes stand for, as float32.

    Args:
        codes: The codes.
        node: DequantizeLinear or QuantizeLinear with a constant scale, for the tensor or along one axis.
    """
    scale, zero_point = (_constant(node, index) for index in (1, 2))
    assert scale is not None, "only codes of a constant scale are read"
    if scale.ndim:
        shape = [1] * codes.ndim
        shape[node.attributes.get_int("axis", 1)] = -1
        scale = scale.reshape(shape)
        zero_point = zero_point.reshape(shape) if zero_point is not None else None
    numbers = codes.astype(np.float32)
    if zero_point is not None:
        numbers = numbers - zero_point.astype(np.float32)
    scaled: Array = numbers * scale.astype(np.float32)
    return scaled


def _sole_quantize(value: ir.Value) -> ir.Node | None:
    """Return the node that quantizes a value by constants, if nothing else reads it."""
    uses = list(value.uses())
    if len(uses) != 1 or uses[0].idx != 0 or value.is_graph_output():
        return None
    node = uses[0].node
    if not is_quantize(node) or node.graph is not value.graph or node.outputs[0].is_graph_output():
        return None
    return node if node.outputs[0].dtype in _CODES and _says_what_codes_mean(node) else None


def _reader_of(codes: ir.Value) -> ir.Node | None:
    """Return what reads codes back, if it says what they mean; a fault may have it say otherwise than Q does."""
    readers = [use.node for use in codes.uses() if use.idx == 0 and is_dequantize(use.node)]
    return readers[0] if readers and _says_what_codes_mean(readers[0]) else None


def _says_what_codes_mean(node: ir.Node) -> bool:
    scale = _constant(node, 1)
    zero_point_is_known = len(node.inputs) < 3 or node.inputs[2] is None or _constant(node, 2) is not None
    blocks = node.attributes.get_int("block_size", 0)
    return scale is not None and scale.ndim <= 1 and zero_point_is_known and not blocks


def _constant(node: ir.Node, index: int) -> Array | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    tensor = walk.constant_tensor(value)
    return np.asarray(tensor.numpy()) if tensor is not None else None


def _is_inside_kernel(value: ir.Value) -> bool:
    """Return whether a runtime may keep a value in one kernel with what reads codes before it and writes them behind.

    A value that is read back from codes is in no case asked for.
    """
    producer = value.producer()
    if producer is None or value.is_graph_output():
        return False
    uses = list(value.uses())
    if len(uses) != 1 or not walk.is_onnx_op(uses[0].node, *_ACTIVATIONS):
        return False
    reads_codes = any(one is not None and is_dequantize(one.producer()) for one in producer.inputs)
    return reads_codes and _sole_quantize(uses[0].node.outputs[0]) is not None


def _holds_numbers(value: ir.Value) -> bool:
    if value.type is not None and not isinstance(value.type, ir.TensorType):
        return False
    return value.dtype not in _NO_NUMBERS and (value.dtype is None or value.dtype.itemsize >= 1)


def _computed_from_constants(model: ir.Model) -> set[ir.Value]:
    """Return the values of the main graph that no input, and nothing random, has a part in."""
    random = walk.random_functions(model)
    found: set[ir.Value] = set()
    for node in model.graph:
        inner = (node, *walk.nodes_within(node))
        if any(walk.is_random(one) or one.op_identifier() in random for one in inner):
            continue
        if all(value in found or constant_content(value) is not None for value in values_read(node)):
            found.update(node.outputs)
    return found


def values_inside(model: ir.Model) -> Iterator[ir.Value]:
    """Yield the values that nodes of nested graphs and functions make: nobody outside can ask for them."""
    for node in walk.every_node(model):
        if node.graph is not model.graph:
            yield from (value for value in node.outputs if value.name)
