"""What computes the same: keys that two nodes share only if their results are equal, bit for bit."""

from __future__ import annotations

import functools
import hashlib
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx
import onnx_ir as ir

from graphopt import walk
from graphopt.mapped import MappedTensor

# Constants up to this many elements are compared by content, larger ones by where their bytes lie.
CONTENT_LIMIT = 1024
# Operators of other domains may be anything, a counter or a dice.
_PURE_DOMAINS = frozenset({*walk.ONNX_DOMAINS, "ai.onnx.ml", "com.microsoft"})
_RANDOM_CONTRIB_OPS = frozenset({"BiasDropout", "BitmaskDropout", "BitmaskBiasDropout", "Sampling"})
# The two operands of these may change places and no bit changes.
_COMMUTATIVE = frozenset(
    {"Add", "Mul", "Sum", "Mean", "And", "Or", "Xor", "Equal", "BitwiseAnd", "BitwiseOr", "BitwiseXor"}
)
# So may any number of whole ones; the sum of floats hangs on their order, and Max(−0, 0) on who comes first.
_COMMUTATIVE_FOR_INTEGERS = frozenset({"Sum", "Max", "Min"})
# Before opset 7 one operand was broadcast to the other, and said along which axis.
_FIRST_OPSET_WITH_BROADCASTING = 7
PLAIN_ATTRIBUTES = frozenset(
    {
        ir.AttributeType.FLOAT,
        ir.AttributeType.FLOATS,
        ir.AttributeType.INT,
        ir.AttributeType.INTS,
        ir.AttributeType.STRING,
        ir.AttributeType.STRINGS,
    }
)

Numbers = dict[ir.Value, int]


@dataclass
class Keys:
    """Makes keys of nodes and of nested graphs.

    Attributes:
        functions: The functions of the model.
        random: Those whose result may differ from run to run.
    """

    functions: Mapping[ir.OperatorIdentifier, ir.Function]
    random: set[ir.OperatorIdentifier]
    _constants: dict[ir.Value, Hashable] = field(default_factory=dict)

    @classmethod
    def of(cls, model: ir.Model) -> Keys:
        """Return what makes the keys of a model's nodes."""
        return cls(model.functions, walk.random_functions(model))

    def of_node(self, node: ir.Node, opset: int) -> Hashable:
        """Return what a node shares with those that compute the same from the same, or None where that cannot be told.

        Args:
            node: A node, with nested graphs or without.
            opset: The version of the ONNX operators where the node stands.
        """
        return self._node(node, opset, {})

    def of_graph(self, graph: ir.Graph, opset: int) -> Hashable:
        """Return what a nested graph shares with those that compute the same, or None where that cannot be told."""
        return self._graph(graph, opset, {})

    def _node(self, node: ir.Node, opset: int, numbers: Numbers) -> Hashable:
        if not self._is_pure(node):
            return None
        if walk.is_onnx_op(node, "Constant") and walk.constant_tensor(node.outputs[0]) is not None:
            return "Constant", self._value(node.outputs[0], numbers)
        attributes = self._attributes(node, opset, numbers)
        if attributes is None:
            return None
        inputs: Sequence[Hashable] = [self._value(value, numbers) for value in _without_trailing_gaps(node.inputs)]
        operands = frozenset(Counter(inputs).items()) if _is_commutative(node, opset) else tuple(inputs)
        return node.op_identifier(), operands, attributes, tuple(bool(value.name) for value in node.outputs)

    def _graph(self, graph: ir.Graph, opset: int, numbers: Numbers) -> Hashable:
        """Number the values of a nested graph in order, so that equal graphs have equal keys whatever their names."""
        for value in graph.inputs:
            numbers[value] = len(numbers)
        keys: list[Hashable] = [_declared(value) for value in graph.inputs]
        for node in graph:
            key = self._node(node, opset, numbers)
            if key is None:
                return None
            keys.append(key)
            for value in node.outputs:
                numbers[value] = len(numbers)
        return tuple(keys), tuple(self._value(value, numbers) for value in graph.outputs)

    def _is_pure(self, node: ir.Node) -> bool:
        """Return whether a node gives the same whenever it is given the same."""
        if node.op_identifier() in self.functions:
            return node.op_identifier() not in self.random
        return node.domain in _PURE_DOMAINS and not walk.is_random(node) and node.op_type not in _RANDOM_CONTRIB_OPS

    def _attributes(self, node: ir.Node, opset: int, numbers: Numbers) -> Hashable:
        """Return the attributes without those that say what is so by default; None where one cannot be told apart."""
        defaults: Mapping[str, Hashable] = {}
        if node.domain in walk.ONNX_DOMAINS and node.op_identifier() not in self.functions:
            defaults = _defaults(node.op_type, opset)
        keys = []
        for name, attribute in sorted(node.attributes.items()):
            key = self._attribute(attribute, opset, numbers)
            if key is None:
                return None
            if key != defaults.get(name):
                keys.append((name, key))
        return tuple(keys)

    def _attribute(self, attribute: ir.Attr, opset: int, numbers: Numbers) -> Hashable:
        if attribute.is_ref():
            return "reference", attribute.ref_attr_name
        if attribute.type in PLAIN_ATTRIBUTES:
            return attribute.type.name, repr(attribute.value)
        match attribute.type:
            case ir.AttributeType.TENSOR:
                return tensor_key(attribute.as_tensor())
            case ir.AttributeType.GRAPH:
                return self._graph(attribute.as_graph(), opset, numbers)
            case _:
                return None

    def _value(self, value: ir.Value | None, numbers: Numbers) -> Hashable:
        """Return the content of a constant, the number of a value made inside a nested graph, or the value itself."""
        if value is None:
            return None
        if value in self._constants:
            return self._constants[value]
        tensor = walk.constant_tensor(value)
        if tensor is not None:
            self._constants[value] = tensor_key(tensor)
            return self._constants[value]
        return numbers.get(value, value)


class _Itself:
    """The key of a tensor that equals no other one; it keeps the tensor, whose address would be another's next."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._tensor = tensor

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Itself) and other._tensor is self._tensor

    def __hash__(self) -> int:
        return id(self._tensor)


def tensor_key(tensor: ir.TensorProtocol) -> Hashable:
    """Return what tensors of equal content share; large ones, which are not read, only if they are the same bytes."""
    if tensor.size > CONTENT_LIMIT:
        if isinstance(tensor, MappedTensor):
            return tensor.dtype, walk.dims(tensor), id(tensor.file), tensor.offset
        return _Itself(tensor)
    if tensor.dtype == ir.DataType.STRING:
        return tensor.dtype, walk.dims(tensor), tuple(tensor.numpy().reshape(-1).tolist())
    return tensor.dtype, walk.dims(tensor), hashlib.sha256(tensor.tobytes()).digest()


def _without_trailing_gaps(inputs: Sequence[ir.Value | None]) -> Sequence[ir.Value | None]:
    """Return the inputs up to the last one given: an optional input left out is one not mentioned."""
    count = len(inputs)
    while count and inputs[count - 1] is None:
        count -= 1
    return inputs[:count]


def _is_commutative(node: ir.Node, opset: int) -> bool:
    if node.domain not in walk.ONNX_DOMAINS or opset < _FIRST_OPSET_WITH_BROADCASTING:
        return False
    if node.op_type in _COMMUTATIVE and len(node.inputs) == 2:
        return True
    if node.op_type not in _COMMUTATIVE_FOR_INTEGERS:
        return False
    # All are of one dtype, of which one may know.
    dtypes = (value.dtype for value in (*node.inputs, *node.outputs) if value is not None)
    return any(dtype is not None and dtype.is_integer() for dtype in dtypes)


def _declared(value: ir.Value) -> Hashable:
    """Return what a nested graph declares of an input; a Loop counts in the rank that its body declares."""
    return str(value.type), len(value.shape) if value.shape is not None else None


@functools.lru_cache(maxsize=4096)
def _defaults(op_type: str, opset: int) -> Mapping[str, Hashable]:
    """Return what absent attributes of a standard operator stand for."""
    try:
        schema = onnx.defs.get_schema(op_type, opset, "")
    except onnx.defs.SchemaError:
        return {}
    found: dict[str, Hashable] = {}
    for name, attribute in schema.attributes.items():
        if attribute.default_value.name:
            default = ir.serde.deserialize_attribute(attribute.default_value)
            if default.type in PLAIN_ATTRIBUTES:
                found[name] = (default.type.name, repr(default.value))
    return found
