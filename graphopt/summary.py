"""What a model is made of: operators, parameters, bytes and multiply-accumulates."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk

_LARGEST_SHOWN = 10
# About what a node, an attribute or a tensor takes in a file besides its names: tags, lengths, a dtype, a few numbers.
_ENTRY_BYTES = 12
# Nonzero elements are counted in pieces, so that a mapped weight is never held whole.
_COUNT_PIECE = 1 << 22


@dataclass(frozen=True)
class LayerCost:
    """A node that holds weights: its own cost."""

    name: str
    op_type: str
    parameters: int
    bytes: int
    macs: int | None


@dataclass(frozen=True)
class ModelSummary:
    """What `graphopt inspect` tells.

    Attributes:
        nodes: Number of nodes, nested graphs and functions included.
        ops: Operator to count.
        parameters: Elements of stored weights; shapes, indices, scales and zero points are none.
        nonzero: How many of them are not zero.
        bytes_by_dtype: Stored bytes by dtype, everything counted.
        macs: Multiply-accumulates of one run, dynamic dimensions counted as 1; None where a shape is unknown.
        inputs: Name, dtype and shape of each input, as text; likewise outputs.
        opsets: Domain to version.
        largest: The nodes that hold most, largest first.
        unknown_cost: Nodes whose MACs could not be told.
    """

    nodes: int
    ops: dict[str, int]
    parameters: int
    nonzero: int
    bytes_by_dtype: dict[str, int]
    macs: int
    inputs: list[tuple[str, str, str]]
    outputs: list[tuple[str, str, str]]
    opsets: dict[str, int]
    ir_version: int
    functions: int
    largest: list[LayerCost]
    unknown_cost: list[str]


def summarize(model: ir.Model) -> ModelSummary:
    """Return a summary of a model; its shapes are inferred on a copy."""
    model = model.clone()
    shapes.infer_shapes(model)
    nodes = list(walk.every_node(model))
    weights = {id(tensor): tensor for tensor in walk.stored_tensors(model)}
    parameters = _parameter_tensors(model)
    macs = {node: node_macs(node) for node in nodes if node.op_type in _MAC_TERMS}
    bytes_by_dtype: Counter[str] = Counter()
    for tensor in weights.values():
        bytes_by_dtype[str(tensor.dtype).lower()] += tensor.nbytes
    layers = [layer for node in nodes if (layer := _layer(node, macs.get(node))) is not None]
    return ModelSummary(
        nodes=len(nodes),
        ops=dict(Counter(_op_name(node) for node in nodes).most_common()),
        parameters=sum(tensor.size for tensor in parameters),
        nonzero=sum(count_nonzero(tensor) for tensor in parameters),
        bytes_by_dtype=dict(bytes_by_dtype.most_common()),
        macs=sum(count or 0 for count in macs.values()),
        inputs=[describe_port(value) for value in model.graph.inputs if not value.is_initializer()],
        outputs=[describe_port(value) for value in model.graph.outputs],
        opsets=dict(model.opset_imports),
        ir_version=int(model.ir_version),
        functions=len(model.functions),
        largest=sorted(layers, key=lambda layer: -layer.bytes)[:_LARGEST_SHOWN],
        unknown_cost=[walk.label(node) for node, count in macs.items() if count is None],
    )


def count_parameters(model: ir.Model) -> int:
    """Return how many weights a model stores, as `ModelSummary.parameters`."""
    return sum(tensor.size for tensor in _parameter_tensors(model))


def count_nonzero_parameters(model: ir.Model) -> int:
    """Return how many of them are not zero; reads them all."""
    return sum(count_nonzero(tensor) for tensor in _parameter_tensors(model))


def approximate_bytes(model: ir.Model) -> int:
    """Return about what a model takes on disk, soon: weights exactly, the graph by the length of what is text."""
    size = sum(tensor.nbytes for tensor in walk.stored_tensors(model))
    for value in walk.initializers(model):
        size += _ENTRY_BYTES + len(value.name or "")
    for node in walk.every_node(model):
        texts = [node.name, node.op_type, *(value.name for value in node.inputs if value is not None)]
        for value in node.outputs:
            # Once where it is made, once with its dtype and shape.
            texts += (value.name, value.name)
            size += _ENTRY_BYTES + 4 * (len(value.shape) if value.shape is not None else 0)
        for key, text in node.metadata_props.items():
            texts += (key, text, None)
        size += _ENTRY_BYTES + sum(2 + len(text or "") for text in texts)
        size += sum(_ENTRY_BYTES + len(name) for name in node.attributes)
    return size


def count_macs(model: ir.Model) -> int:
    """Return the multiply-accumulates of one run, as `ModelSummary.macs`; shapes are inferred on a copy."""
    model = model.clone()
    shapes.infer_shapes(model)
    return sum(node_macs(node) or 0 for node in walk.every_node(model))


def _op_name(node: ir.Node) -> str:
    return node.op_type if node.domain in walk.ONNX_DOMAINS else f"{node.domain}::{node.op_type}"


def describe_port(value: ir.Value) -> tuple[str, str, str]:
    """Return the name, dtype and shape of an input or output, as text."""
    shape = "?" if value.shape is None else "[" + ", ".join(map(_dim, value.shape)) + "]"
    dtype = str(value.dtype).lower() if isinstance(value.type, ir.TensorType) else str(value.type)
    return value.name or "", dtype, shape


def _dim(dim: int | ir.SymbolicDim) -> str:
    return str(dim) if isinstance(dim, int) else dim.value or "?"


def _parameter_tensors(model: ir.Model) -> list[ir.TensorProtocol]:
    """Return the tensors that hold weights, each once."""
    auxiliary = {
        id(tensor)
        for node in walk.every_node(model)
        if walk.is_onnx_op(node, "QuantizeLinear", "DequantizeLinear")
        for value in node.inputs[1:]
        if (tensor := walk.constant_tensor(value)) is not None
    }
    return [t for t in walk.stored_tensors(model) if id(t) not in auxiliary and holds_weights(t.dtype)]


def holds_weights(dtype: ir.DataType) -> bool:
    """Return whether tensors of a dtype count as parameters."""
    # int64 and bool hold shapes, axes and masks; int32 holds quantized biases, which are weights.
    return dtype not in (ir.DataType.INT64, ir.DataType.BOOL, ir.DataType.STRING, ir.DataType.UNDEFINED)


def count_nonzero(tensor: ir.TensorProtocol) -> int:
    """Return how many elements of a tensor are not zero."""
    flat = tensor.numpy().reshape(-1)
    return sum(int(np.count_nonzero(flat[i : i + _COUNT_PIECE])) for i in range(0, flat.size, _COUNT_PIECE))


def _layer(node: ir.Node, macs: int | None) -> LayerCost | None:
    if walk.is_onnx_op(node, "Shape", "Size"):
        return None  # reads the shape of a weight, not the weight
    tensors = [t for value in node.inputs if (t := _weight_of(value)) is not None]
    size = sum(tensor.size for tensor in tensors)
    if size <= 1:
        return None
    return LayerCost(walk.label(node), _op_name(node), size, sum(t.nbytes for t in tensors), macs)


def _weight_of(value: ir.Value | None) -> ir.TensorProtocol | None:
    """Return the constant a node reads, directly or through a DequantizeLinear."""
    producer = value.producer() if value is not None else None
    if producer is not None and walk.is_onnx_op(producer, "DequantizeLinear"):
        value = producer.inputs[0]
    tensor = walk.constant_tensor(value)
    return tensor if tensor is not None and holds_weights(tensor.dtype) else None


# A dimension of a value.
Dimension = tuple[ir.Value, int]


def _dimensions(value: ir.Value | None, start: int = 0, stop: int | None = None) -> list[Dimension] | None:
    """Return some dimensions of a value; None if its rank is unknown."""
    if value is None or value.shape is None:
        return None
    return [(value, axis) for axis in range(len(value.shape))[start:stop]]


def _product(*factors: list[Dimension] | None) -> list[list[Dimension]] | None:
    """Return the product of all these dimensions, as the only term of a sum."""
    known = [factor for factor in factors if factor is not None]
    return [list(itertools.chain(*known))] if len(known) == len(factors) else None


def _conv_terms(node: ir.Node) -> list[list[Dimension]] | None:
    return _product(_dimensions(node.outputs[0]), _dimensions(node.inputs[1], 1))


def _conv_transpose_terms(node: ir.Node) -> list[list[Dimension]] | None:
    return _product(_dimensions(node.inputs[0]), _dimensions(node.inputs[1], 1))


def _gemm_terms(node: ir.Node) -> list[list[Dimension]] | None:
    inner = 0 if node.attributes.get_int("transA", 0) else 1
    return _product(_dimensions(node.outputs[0]), _dimensions(node.inputs[0], inner, inner + 1))


def _matmul_terms(node: ir.Node) -> list[list[Dimension]] | None:
    return _product(_dimensions(node.outputs[0]), _dimensions(node.inputs[0], -1))


def _recurrent_terms(node: ir.Node) -> list[list[Dimension]] | None:
    # Every time step multiplies each weight once per sample: X is [time, batch, features].
    steps = _dimensions(node.inputs[0], 0, 2)
    of_inputs, of_state = (_product(steps, _dimensions(node.inputs[index])) for index in (1, 2))
    return None if of_inputs is None or of_state is None else of_inputs + of_state


_MAC_TERMS: dict[str, Callable[[ir.Node], list[list[Dimension]] | None]] = {
    "Conv": _conv_terms,
    "ConvInteger": _conv_terms,
    "ConvTranspose": _conv_transpose_terms,
    "Gemm": _gemm_terms,
    "MatMul": _matmul_terms,
    "MatMulInteger": _matmul_terms,
    "LSTM": _recurrent_terms,
    "GRU": _recurrent_terms,
    "RNN": _recurrent_terms,
}


def mac_terms(node: ir.Node) -> list[list[Dimension]] | None:
    """Return the multiply-accumulates of a node as a sum of products of dimensions; None where ranks are unknown."""
    return _MAC_TERMS[node.op_type](node) if node.op_type in _MAC_TERMS else []


def node_macs(node: ir.Node) -> int | None:
    """Return the multiply-accumulates of a node, dynamic dimensions counted as 1; None where ranks are unknown."""
    terms = mac_terms(node)
    return None if terms is None else sum(math.prod(map(extent, term)) for term in terms)


def extent(dimension: Dimension) -> int:
    """Return the length of a dimension, 1 of a dynamic one."""
    value, axis = dimension
    assert value.shape is not None, "a dimension is of a value of known rank"
    length = value.shape[axis]
    return length if isinstance(length, int) else 1
