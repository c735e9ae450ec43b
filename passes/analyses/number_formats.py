"""Which inputs and outputs of a node may be of another float format: what ONNX's schemas allow."""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import MappingProxyType

import onnx
import onnx_ir as ir

from graphopt import walk

from ..exact.opset_history import schema_at

# ONNX Runtime's own operators of which every float input and output may be of either half format alike.
_RUNTIME_OPS = frozenset(
    {
        "Attention",
        "BiasGelu",
        "FastGelu",
        "FusedMatMul",
        "Gelu",
        "GroupQueryAttention",
        "LayerNormalization",
        "MatMulNBits",
        "MultiHeadAttention",
        "QuickGelu",
        "RotaryEmbedding",
        "SimplifiedLayerNormalization",
        "SkipLayerNormalization",
        "SkipSimplifiedLayerNormalization",
    }
)
# What is random, or is quantized by scales of its own, stays as it is.
_KEPT_OPS = walk.NONDETERMINISTIC_OPS | {"DequantizeLinear", "DynamicQuantizeLinear", "EyeLike", "QuantizeLinear"}
# Operators whose output's format is an attribute.
BY_ATTRIBUTE: Mapping[str, str] = MappingProxyType({"Cast": "to", "ConstantOfShape": "value"})
# Inputs that are sizes and ratios, not data; kernels want them in float32 whatever the data are.
_PARAMETERS: Mapping[str, frozenset[int]] = MappingProxyType(
    {"Dropout": frozenset({1}), "Resize": frozenset({1, 2}), "Upsample": frozenset({1})}
)


@dataclass(frozen=True)
class Ports:
    """The float32 inputs and outputs of a node that would be of another format, by index."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def float_ports(node: ir.Node) -> Ports:
    """Return the inputs and outputs of a node that are float32 tensors now."""
    return Ports(
        tuple(index for index, value in enumerate(node.inputs) if is_float(value)),
        tuple(index for index, value in enumerate(node.outputs) if is_float(value)),
    )


def is_float(value: ir.Value | None) -> bool:
    """Return whether a value is known to be a float32 tensor."""
    return value is not None and isinstance(value.type, ir.TensorType) and dtype_of(value) is ir.DataType.FLOAT


def dtype_of(value: ir.Value) -> ir.DataType | None:
    """Return the dtype of a value; a constant's is that of what it holds."""
    tensor = walk.constant_tensor(value)
    return tensor.dtype if tensor is not None else value.dtype


def ports_in(node: ir.Node, dtype: ir.DataType, opset: int, functions: Set[ir.OperatorIdentifier]) -> Ports | str:
    """Return which of a node's ports change for it to compute in a format, or why it cannot.

    Args:
        node: The node; dtypes of its values are inferred.
        dtype: FLOAT16 or BFLOAT16.
        opset: The version of the ONNX domain it is of.
        functions: Identifiers of the model's functions.
    """
    why = _strangeness(node, functions)
    if why is not None:
        return why
    if node.domain == "com.microsoft":
        return float_ports(node) if node.op_type in _RUNTIME_OPS else f"nothing is known of formats of {node.op_type}"
    schema = schema_at(node.op_type, opset)
    if schema is None:
        return f"opset {opset} has no {node.op_type}"
    found = _by_schema(node, schema, dtype)
    if not found.inputs and not found.outputs:
        return f"{node.op_type} of opset {opset} takes no {dtype.name.lower()}"
    return found


def _strangeness(node: ir.Node, functions: Set[ir.OperatorIdentifier]) -> str | None:
    """Return why a node is none whose schema could say anything, or None."""
    if node.op_identifier() in functions:
        return "it calls a function"
    if any(True for _ in walk.subgraphs(node)):
        return "values enter and leave nested graphs in float32"
    if node.domain not in (*walk.ONNX_DOMAINS, "com.microsoft"):
        return f"nothing is known of domain `{node.domain}`"
    if walk.has_references(node):
        return "its attributes are what a caller gives"
    if node.op_type in _KEPT_OPS:
        return f"{node.op_type} has a format of its own"
    if node.op_type == "LayerNormalization" and len([value for value in node.outputs if value.name]) > 1:
        return "its statistics are asked for"
    values = [value for value in (*node.inputs, *node.outputs) if value is not None and value.name]
    if any(value.type is not None and not isinstance(value.type, ir.TensorType) for value in values):
        return "it takes or gives what is no tensor"
    if any(dtype_of(value) is None for value in values):
        return "not all of its dtypes are known"
    return None


def _by_schema(node: ir.Node, schema: onnx.defs.OpSchema, dtype: ir.DataType) -> Ports:
    name = f"tensor({dtype.name.lower()})"
    allowed = {one.type_param_str for one in schema.type_constraints if name in one.allowed_type_strs}
    parameters = _PARAMETERS.get(node.op_type, frozenset())
    inputs = [
        index
        for index, value in enumerate(node.inputs)
        if is_float(value) and index not in parameters and _variable(schema.inputs, index) in allowed
    ]
    read = {_variable(schema.inputs, index) for index in inputs}
    by_attribute = node.op_type in BY_ATTRIBUTE
    outputs = [
        index
        for index, value in enumerate(node.outputs)
        if is_float(value) and (variable := _variable(schema.outputs, index)) in allowed
        if variable in read or by_attribute
    ]
    return Ports(tuple(inputs), tuple(outputs))


def _variable(ports: object, index: int) -> str:
    """Return the type variable, or the type, of an input or output; the last one may stand for any further ones."""
    known = list(ports)  # type: ignore[call-overload]
    return str(known[min(index, len(known) - 1)].type_str) if known else ""


def first_opset(op_type: str, dtype: ir.DataType) -> int | None:
    """Return the first opset in which an operator of the ONNX domain takes a format, or None."""
    name = f"tensor({dtype.name.lower()})"
    for version in range(1, onnx.defs.onnx_opset_version() + 1):
        schema = schema_at(op_type, version)
        if schema is not None and any(name in one.allowed_type_strs for one in schema.type_constraints):
            return version
    return None
