"""What differs between nodes of one model and what became of them in another, in words, the gravest first."""

from __future__ import annotations

import enum
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.comparing.layer_pairs import OriginIndex
from graphopt.explaining.advice import made_of_constants
from graphopt.model_diff import show_attribute

# Constants of more bytes are not compared element by element.
_COMPARED_BYTES = 1 << 26

# Operators that hand all numbers on as they are; where one is gone, its reader has them from elsewhere.
_MOVES = ("Dropout", "Expand", "Flatten", "Identity", "Reshape", "Squeeze", "Unsqueeze")


class Weight(enum.IntEnum):
    """How much a change alone says about who is to blame; the least says most."""

    RANDOM = 0
    CONSTANT = 1
    GONE = 2
    ATTRIBUTE = 3
    READS = 4
    NEW = 5
    STORED = 6
    OPERATOR = 7
    MOVED = 8


@dataclass(frozen=True)
class Change:
    """A change to one node.

    Attributes:
        node: The node of the first model it is about; of the second, where the first has none.
        origin: Its origin.
        weight: How much it says.
        what: The change, in words.
    """

    node: ir.Node
    origin: str
    weight: Weight
    what: str


class ChangeFinder:
    """Finds what became of nodes.

    Args:
        index: Nodes of the second model by origin.
        pairs: Values of the first model with their counterparts.
    """

    def __init__(self, index: OriginIndex, pairs: Mapping[ir.Value, ir.Value]) -> None:
        self._index, self._pairs = index, pairs
        self._counterparts = frozenset(pairs.values())

    def changes(self, nodes: Iterable[ir.Node], others: Sequence[ir.Node]) -> list[Change]:
        """Return what differs between nodes of the first model and those of the second in their place.

        Args:
            nodes: Nodes of the first model.
            others: Nodes of the second; what stands for none of the first counts as new.
        """
        found: list[Change] = []
        there = dict.fromkeys(one for outer in others for one in (outer, *walk.nodes_within(outer)))
        counted: set[ir.Node] = set()
        for node in (one for outer in nodes for one in (outer, *walk.nodes_within(outer))):
            made = self._index.made_from(node)
            counted.update(made)
            found += self._changes_of(node, made)
        found += [self._addition(node) for node in there if node not in counted and not _is_constant(node)]
        return sorted(found, key=lambda change: change.weight)

    def is_untouched(self, node: ir.Node) -> bool:
        """Return whether a node of the first model is in the second as it was, but for what it reads."""
        made = self._index.made_from(node)
        return (
            len(made) == 1
            and not any(change.weight is not Weight.READS for change in self._changes_of(node, made))
            and not self._reads_otherwise(node, made[0])
        )

    def _addition(self, node: ir.Node) -> Change:
        """Return that there is a node of the second model where none was."""
        sources = sorted(self._index.of(node))
        made_of = f", made of {', '.join(f'`{one}`' for one in sources)}," if sources else ""
        origin = sources[0] if sources else walk.label(node)
        if walk.is_random(node):
            return Change(node, origin, Weight.RANDOM, f"{_call(node)}{made_of} is random")
        return Change(node, origin, Weight.NEW, f"{_call(node)}{made_of} is new")

    def _changes_of(self, node: ir.Node, made: list[ir.Node]) -> Iterator[Change]:
        origin = _origin(node)
        if not made:
            yield Change(node, origin, Weight.GONE if _computes(node) else Weight.MOVED, f"{_call(node)} is gone")
            return
        for one in made:
            if walk.is_random(one) and not walk.is_random(node):
                yield Change(node, origin, Weight.RANDOM, f"{_call(one)}, made of {_call(node)}, is random")
        same = [one for one in made if one.op_identifier() == node.op_identifier()]
        if not same:
            became = ", ".join(dict.fromkeys(one.op_type for one in made))
            yield Change(node, origin, Weight.OPERATOR, f"{_call(node)} has become {became}")
            return
        counterpart = next((one for one in same if one.name == node.name), same[-1])
        yield from self._within(node, counterpart, origin)
        added = [one.op_type for one in made if one is not counterpart and not walk.is_random(one)]
        if added and len(self._index.of(counterpart)) == 1:
            yield Change(node, origin, Weight.NEW, f"{_call(node)} was given {', '.join(dict.fromkeys(added))}")

    def _within(self, node: ir.Node, other: ir.Node, origin: str) -> Iterator[Change]:
        """Yield what differs between two nodes of one operator."""
        for name in dict.fromkeys([*node.attributes, *other.attributes]):
            a, b = node.attributes.get(name), other.attributes.get(name)
            kinds = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
            if any(one is not None and one.type in kinds for one in (a, b)):
                continue  # the nodes inside are looked at by themselves
            shown = [show_attribute(one) if one is not None else _default(node, name) for one in (a, b)]
            if shown[0] != shown[1]:
                what = f"{_call(node)}: attribute `{name}` is {shown[1]}, was {shown[0]}"
                yield Change(node, origin, Weight.ATTRIBUTE, what)
        for place in range(max(len(node.inputs), len(other.inputs))):
            first, second = (one.inputs[place] if place < len(one.inputs) else None for one in (node, other))
            change = self._input_change(first, second)
            if change is not None:
                weight, what = change
                yield Change(node, origin, weight, f"{_call(node)}: input {place} {what}")

    def _input_change(self, a: ir.Value | None, b: ir.Value | None) -> tuple[Weight, str] | None:
        if a is None or b is None:
            return None if a is b else (Weight.READS, f"is {_name(b)}, was {_name(a)}")
        constants = walk.constant_tensor(a), walk.constant_tensor(b)
        if constants[0] is not None and constants[1] is not None:
            how = _differ(constants[0], constants[1])
            return (Weight.CONSTANT, f"(`{b.name}`) {how}") if how is not None else None
        if (constants[0] is None) != (constants[1] is None):
            return Weight.STORED, f"is {_name(b)}, was {_name(a)}"
        if a.is_graph_input() and b.is_graph_input():
            return None if a.name == b.name else (Weight.READS, f"is {_name(b)}, was {_name(a)}")
        known = self._pairs.get(a)
        if known is not None and known is not b and b in self._counterparts:
            return Weight.READS, f"is {_name(b)}, was {_name(a)}"
        return None

    def _reads_otherwise(self, node: ir.Node, other: ir.Node) -> bool:
        for a, b in zip(node.inputs, other.inputs, strict=False):
            if a is None or b is None or walk.constant_tensor(a) is not None:
                continue
            if self._pairs.get(a, b) is not b:
                return True
        return False


def _differ(a: ir.TensorProtocol, b: ir.TensorProtocol) -> str | None:
    if a is b:
        return None
    if a.dtype != b.dtype or walk.dims(a) != walk.dims(b):
        return f"is {b.dtype}{list(walk.dims(b))}, was {a.dtype}{list(walk.dims(a))}"
    if a.nbytes > _COMPARED_BYTES:
        return None if a.tobytes() == b.tobytes() else "holds other numbers"
    x, y = np.asarray(a.numpy()), np.asarray(b.numpy())
    if a.dtype == ir.DataType.STRING:
        return None if np.array_equal(x, y) else "holds other strings"
    if x.tobytes() == y.tobytes():
        return None
    with np.errstate(invalid="ignore"):
        return f"differs by up to {np.abs(x.astype(np.float64) - y.astype(np.float64)).max(initial=0):.3g}"


def _origin(node: ir.Node) -> str:
    return min(provenance.origins(node), default=walk.label(node))


def _call(node: ir.Node) -> str:
    return f"`{walk.label(node)}` ({node.op_type})"


def _name(value: ir.Value | None) -> str:
    return f"`{value.name}`" if value is not None else "left out"


@functools.lru_cache(maxsize=1024)
def _defaults(op_type: str, domain: str) -> dict[str, str]:
    try:
        schema = onnx.defs.get_schema(op_type, domain=domain)
    except onnx.defs.SchemaError:
        return {}
    given = {name: one.default_value for name, one in schema.attributes.items() if one.default_value.type}
    return {name: str(onnx.helper.get_attribute_value(one)) for name, one in given.items()}


def _default(node: ir.Node, name: str) -> str:
    """Return what an attribute that is left out stands for."""
    return _defaults(node.op_type, node.domain).get(name, "none")


def _computes(node: ir.Node) -> bool:
    """Return whether numbers hang on a node: it neither only moves them, nor computes sizes or what is known ahead."""
    dtypes = [value.dtype for value in node.outputs if value.dtype is not None]
    is_integer = bool(dtypes) and not any(dtype.is_floating_point() for dtype in dtypes)
    return not is_integer and not walk.is_onnx_op(node, *_MOVES) and not _is_known_ahead(node)


def _is_known_ahead(node: ir.Node) -> bool:
    """Return whether a node computes from constants alone; of what CastLike reads second, only the type counts."""
    read = node.inputs[:1] if walk.is_onnx_op(node, "CastLike") else node.inputs
    return bool(read) and all(made_of_constants(value) for value in read if value is not None)


def _is_constant(node: ir.Node) -> bool:
    return bool(node.outputs) and all(walk.constant_tensor(value) is not None for value in node.outputs)
