"""Views of weights: what moves or casts the elements of a constant, as a tensor that is made when it is written."""

from __future__ import annotations

import onnx_ir as ir

from graphopt import derived, shapes, walk

from .arguments import integers

# Casts among these round as numpy does; what a cast to an integer does out of range is the runtime's business.
_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_RESHAPING = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")
_BYTE_BITS = 8


def stored_view(node: ir.Node) -> derived.DerivedTensor | None:
    """Return what a node makes of a constant as a view of it, or None where it does anything else."""
    source = walk.constant_tensor(node.inputs[0]) if node.inputs else None
    if source is None or node.domain not in walk.ONNX_DOMAINS or walk.has_references(node):
        return None
    # Numbers of less than a byte are packed: an axis cannot be moved without unpacking them.
    if source.dtype == ir.DataType.STRING or source.dtype.bitwidth < _BYTE_BITS:
        return None
    if node.op_type == "Transpose":
        return _transposed(node, source)
    if node.op_type in _RESHAPING:
        return _reshaped(node, source)
    if node.op_type == "Slice":
        return _sliced(node, source)
    return _cast(node, source) if node.op_type == "Cast" else None


def _transposed(node: ir.Node, source: ir.TensorProtocol) -> derived.DerivedTensor:
    reversed_axes = list(range(len(walk.dims(source))))[::-1]
    return derived.transposed(source, node.attributes.get_ints("perm", reversed_axes))


def _reshaped(node: ir.Node, source: ir.TensorProtocol) -> derived.DerivedTensor | None:
    shape = shapes.static_shape(node.outputs[0])
    return derived.reshaped(source, shape) if shape is not None else None


def _sliced(node: ir.Node, source: ir.TensorProtocol) -> derived.DerivedTensor | None:
    numbers = [integers(value) for value in node.inputs[1:]]
    if len(numbers) < 2 or numbers[0] is None or numbers[1] is None:
        return None  # before opset 10 these were attributes
    starts, ends = numbers[0], numbers[1]
    given = [len(node.inputs) > index and node.inputs[index] is not None for index in (3, 4)]
    axes = numbers[2] if given[0] else list(range(len(starts)))
    steps = numbers[3] if given[1] else [1] * len(starts)
    if axes is None or steps is None or any(step <= 0 for step in steps):
        return None
    dims = walk.dims(source)
    slices = [slice(0, size) for size in dims]
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        slices[axis] = slice(*slice(start, end, step).indices(dims[axis]))
    return derived.sliced(source, slices)


def _cast(node: ir.Node, source: ir.TensorProtocol) -> derived.DerivedTensor | None:
    wanted = ir.DataType(node.attributes["to"].as_int())
    return derived.cast(source, wanted) if {source.dtype, wanted} <= _FLOATS else None
