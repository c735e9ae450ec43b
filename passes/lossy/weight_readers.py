"""Who reads a stored weight: matrix products, lookups, and others."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass

import onnx_ir as ir

from graphopt import walk

from ..analyses.linear_layers import LinearLayer, as_linear_layer

_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16)


@dataclass(frozen=True, eq=False)
class WeightReader:
    """A node that multiplies by a constant matrix, or looks rows of it up.

    Attributes:
        node: The node.
        layer: Its view as a linear layer; rows of a table count as outputs.
        transpose: The Transpose between the constant and a product, which is left out, or None.
        is_lookup: Whether the node is a Gather of rows.
    """

    node: ir.Node
    layer: LinearLayer
    transpose: ir.Node | None = None
    is_lookup: bool = False

    @property
    def input(self) -> ir.Value:
        """The activation as it is now: lowering another reader may have put a new value in its place."""
        value = self.node.inputs[1 if self.is_lookup else 1 - self.layer.weight_index]
        assert value is not None, "a reader has an activation"
        return value

    @property
    def on_left(self) -> bool:
        """Whether the constant is the left factor: y = W x."""
        return self.layer.weight_index == 0 and not self.is_lookup


@dataclass(frozen=True, eq=False)
class StoredMatrix:
    """A constant matrix and all its readers, in graph order.

    Attributes:
        weight: The constant, of rank 2.
        readers: Who reads it; all of them see the same axis as outputs.
    """

    weight: ir.Value
    readers: tuple[WeightReader, ...]

    @property
    def layer(self) -> LinearLayer:
        """The first reader's view."""
        return self.readers[0].layer

    @functools.cached_property
    def is_table(self) -> bool:
        """Whether rows of it are looked up."""
        return any(reader.is_lookup for reader in self.readers)


def reader_of(node: ir.Node) -> WeightReader | None:
    """Return a node as a reader of a constant matrix of float32 or float16, or None where it is none.

    These are MatMul with a constant on either side, directly or through a Transpose; Gemm whose other factor is
    not transposed; and Gather of rows.
    """
    if walk.has_references(node):
        return None
    if walk.is_onnx_op(node, "Gather"):
        return _as_lookup(node)
    if not walk.is_onnx_op(node, "MatMul", "Gemm"):
        return None
    layer = as_linear_layer(node)
    if layer is None:
        return _through_transpose(node)
    if _matrix(layer.weight) is None or (node.op_type == "Gemm" and not _fits(layer)):
        return None
    return WeightReader(node, layer)


def no_reader(layer: LinearLayer) -> str:
    """Return why a linear layer is no reader of a constant matrix."""
    node, tensor = layer.node, walk.constant_tensor(layer.weight)
    if node.op_type not in ("MatMul", "Gemm"):
        return f"of a {node.op_type}, which multiplies by no matrix"
    if tensor is None or tensor.dtype not in _FLOATS:
        return "neither float32 nor float16"
    if len(tensor.shape) != 2 or tensor.size == 0:
        return "no matrix"
    return "of a Gemm that transposes its input, scales its bias, or has its constant on the left"


def _as_lookup(node: ir.Node) -> WeightReader | None:
    table, indices = node.inputs
    if _matrix(table) is None or table is None or indices is None or node.attributes.get_int("axis", 0) != 0:
        return None
    return WeightReader(node, LinearLayer(node, indices, table, 0, 0, None), is_lookup=True)


def _through_transpose(node: ir.Node) -> WeightReader | None:
    """Return MatMul(x, Transpose(W)) as a product by W, whose rows are then the outputs: a tied output layer."""
    if node.op_type != "MatMul" or node.inputs[0] is None or node.inputs[1] is None:
        return None
    transpose = node.inputs[1].producer()
    if transpose is None or not walk.is_onnx_op(transpose, "Transpose") or walk.has_references(transpose):
        return None
    weight = transpose.inputs[0]
    if weight is None or _matrix(weight) is None or list(transpose.attributes.get_ints("perm", [1, 0])) != [1, 0]:
        return None
    if walk.constant_tensor(node.inputs[0]) is not None:
        return None
    return WeightReader(node, LinearLayer(node, node.inputs[0], weight, 1, 0, None), transpose)


def _matrix(value: ir.Value | None) -> ir.TensorProtocol | None:
    tensor = walk.constant_tensor(value)
    usable = tensor is not None and tensor.dtype in _FLOATS and len(tensor.shape) == 2 and tensor.size > 0
    return tensor if usable else None


def _fits(layer: LinearLayer) -> bool:
    """Return whether a Gemm is a product from the right by its constant, and a bias there is anything to do with."""
    transposed = layer.node.attributes.get_int("transA", 0) == 1
    if layer.weight_index != 1 or transposed:
        return False
    return layer.bias is None or layer.node.attributes.get_float("beta", 1.0) == 1.0


def all_readers(weight: ir.Value, order: Mapping[ir.Node, int]) -> tuple[tuple[WeightReader, ...], ir.Node | None]:
    """Return the readers of a constant, and its first use that is of no such kind.

    Args:
        weight: The constant.
        order: The place of every node of the model; readers come in this order.
    """
    direct = {use.node for use in weight.uses()}
    between = {node for node in direct if _only_between(node)}
    nodes = (direct - between) | {use.node for node in between for use in node.outputs[0].uses()}
    readers: list[WeightReader] = []
    stranger: ir.Node | None = None
    for node in sorted(nodes, key=lambda one: order.get(one, len(order))):
        found = reader_of(node)
        if found is not None and found.layer.weight is weight:
            readers.append(found)
        else:
            stranger = stranger or node
    return tuple(readers), stranger


def _only_between(node: ir.Node) -> bool:
    """Return whether a node is a Transpose that only products read."""
    if not walk.is_onnx_op(node, "Transpose") or node.outputs[0].is_graph_output():
        return False
    found = [reader_of(use.node) for use in node.outputs[0].uses()]
    return bool(found) and all(reader is not None and reader.transpose is node for reader in found)
