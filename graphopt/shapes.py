"""Shape and dtype inference over the graph alone: weights stay where they are."""

from __future__ import annotations

import math
from dataclasses import dataclass

import onnx
import onnx_ir as ir

from graphopt import walk

# Constants up to this size may hold shapes, axes or sizes, which inference reads; larger ones are weights.
SHAPE_CONSTANT_LIMIT = 1024
_SKELETON_DOMAIN = "graphopt.skeleton"
# Marks values that learned something, with an `_Inferred`.
INFERRED = "graphopt.inferred"


@dataclass(frozen=True)
class _Inferred:
    """Type and shape of a value as the file says, and as inference made them."""

    before: tuple[ir.TypeProtocol | None, ir.Shape | None]
    after: tuple[ir.TypeProtocol | None, ir.Shape | None]


def infer_shapes(model: ir.Model) -> str | None:
    """Fill in missing dtypes and shapes of values, by ONNX's own inference on a model without its weights.

    Symbolic dimensions stay symbolic. What is known already is kept.

    Returns:
        Why nothing was inferred (runtimes run models whose declared shapes contradict each other), or None.
    """
    inferred = _inferred(model, strict=False)
    if isinstance(inferred, str):
        return inferred
    _merge(model.graph, inferred.graph)
    return None


def contradiction(model: ir.Model) -> str | None:
    """Return how declared dtypes and shapes contradict what inference finds, or None; the model is left as it is."""
    inferred = _inferred(model, strict=True)
    return inferred if isinstance(inferred, str) else None


def _inferred(model: ir.Model, *, strict: bool) -> onnx.ModelProto | str:
    try:
        return onnx.shape_inference.infer_shapes(_skeleton(model), strict_mode=strict, data_prop=True)
    except onnx.shape_inference.InferenceError as error:
        return f"shapes of the model contradict each other: {' '.join(str(error).split())[:300]}"


def forget_inferred(model: ir.Model) -> None:
    """Take back what `infer_shapes` filled in, so that a saved file holds no more than it came with."""
    for node in walk.every_node(model):
        for value in node.outputs:
            inferred = value.meta.pop(INFERRED, None)
            # What a pass has stamped since is the pass's own.
            if inferred is not None and (value.type, value.shape) == inferred.after:
                value.type, value.shape = inferred.before


def _skeleton(model: ir.Model) -> onnx.ModelProto:
    """Return the model with every weight turned into an input of the same dtype and shape."""
    copy = model.clone()
    copy.opset_imports[_SKELETON_DOMAIN] = 1
    weights = []
    for value in list(copy.graph.initializers.values()):
        tensor = value.const_value
        if tensor is not None and tensor.size > SHAPE_CONSTANT_LIMIT:
            value.shape, value.type = ir.Shape(walk.dims(tensor)), ir.TensorType(tensor.dtype)
            del copy.graph.initializers[value.name or ""]
            value.const_value = None
            if not value.is_graph_input():
                weights.append(value)
    copy.graph.inputs.extend(weights)
    for node in walk.every_node(copy):
        if walk.is_onnx_op(node, "Constant") and "value" in node.attributes:
            _shrink_constant(node)
    return ir.to_proto(copy)


def _shrink_constant(node: ir.Node) -> None:
    """Replace a large Constant by an operator inference passes over, its dtype and shape declared."""
    attribute = node.attributes["value"]
    if attribute.is_ref() or attribute.as_tensor().size <= SHAPE_CONSTANT_LIMIT:
        return
    tensor = attribute.as_tensor()
    output = node.outputs[0]
    output.shape, output.type = ir.Shape(walk.dims(tensor)), ir.TensorType(tensor.dtype)
    node.attributes.clear()
    node.op_type, node.domain = "_Weight", _SKELETON_DOMAIN


def _merge(graph: ir.Graph, inferred: onnx.GraphProto) -> None:
    """Copy inferred types into a graph and, name by name, into its nested graphs."""
    known = {info.name: info for info in (*inferred.value_info, *inferred.output)}
    for node, proto in zip(graph, inferred.node, strict=True):
        for value in node.outputs:
            if value.name in known:
                _learn(value, known[value.name])
        nested = [
            g
            for attr in proto.attribute
            for g in ([attr.g] if attr.type == onnx.AttributeProto.GRAPH else list(attr.graphs))
        ]
        for inner, inner_proto in zip(walk.subgraphs(node), nested, strict=True):
            _merge(inner, inner_proto)


def _learn(value: ir.Value, info: onnx.ValueInfoProto) -> None:
    """Take over what inference knows of a value and the value does not, and mark it."""
    if not info.type.HasField("tensor_type"):
        return
    found = ir.serde.deserialize_value_info_proto(info, None)
    before = value.type, value.shape
    if value.type is None and found.dtype != ir.DataType.UNDEFINED:
        value.type = found.type
    if found.shape is not None and not value.is_graph_output():  # what an output declares is the signature
        value.shape = _refined(value.shape, found.shape)
    if (value.type, value.shape) != before:
        known = value.meta.get(INFERRED)
        value.meta[INFERRED] = _Inferred(known.before if known is not None else before, (value.type, value.shape))


def _refined(known: ir.Shape | None, found: ir.Shape) -> ir.Shape:
    """Return what is known of a shape, with the dimensions filled in that were found static."""
    if known is None or len(known) != len(found):
        return found if known is None else known
    pairs = zip(known, found, strict=True)
    dims = [new if isinstance(new, int) and not isinstance(old, int) else old for old, new in pairs]
    return known if tuple(dims) == tuple(known) else ir.Shape(dims)


def static_bytes(value: ir.Value) -> int | None:
    """Return how many bytes a value takes where its dtype and every dimension are known, else None."""
    shape = static_shape(value)
    if shape is None or value.dtype is None or value.dtype == ir.DataType.STRING:
        return None
    return math.prod(shape) * value.dtype.bitwidth // 8


def static_shape(value: ir.Value | None) -> tuple[int, ...] | None:
    """Return a value's shape where every dimension is known, else None."""
    if value is None or value.shape is None or not value.shape.is_static():
        return None
    return tuple(int(dim) for dim in value.shape)  # type: ignore[arg-type]


def same_shape(a: ir.Value | None, b: ir.Value | None) -> bool:
    """Return whether two values provably have equal shapes; equal symbols are equal sizes."""
    if a is None or b is None or a.shape is None or b.shape is None or len(a.shape) != len(b.shape):
        return False
    pairs = zip(a.shape, b.shape, strict=True)
    return all(x == y and (isinstance(x, int) or x.value is not None) for x, y in pairs)
