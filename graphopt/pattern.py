"""Rules that read like algebra: a pattern, what it matches, and the replacement."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum"})
# Larger constants are not compared with the number of a pattern: a mask may be 0 everywhere, a weight never is.
LARGEST_COMPARED = 1 << 18


@dataclass(frozen=True, eq=False)
class PatternValue:
    """A variable of a pattern (``node`` is None) or an output of one of its operators."""

    name: str | None = None
    optional: bool = False
    node: PatternNode | None = None
    index: int = 0


# An ellipsis, as last operand, stands for any further inputs.
Operand = PatternValue | float | EllipsisType | None
_MATCH_FIELDS = ("root", "opset", "values", "nodes")


@dataclass(frozen=True, eq=False)
class PatternNode:
    """An operator of a pattern; a number among its inputs matches a constant equal to it everywhere."""

    op_type: str
    inputs: tuple[Operand, ...]
    attributes: Mapping[str, Any]
    id: str | None
    domain: str = ""


class PatternBuilder:
    """What a pattern function writes with: ``op.Conv(x, w, _id="conv", group=1)``, ``op.Concat(...)``."""

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        def build(
            *inputs: Operand, _id: str | None = None, _outputs: int = 1, _domain: str = "", **attributes: Any
        ) -> PatternValue | tuple[PatternValue, ...]:
            node = PatternNode(op_type, inputs, attributes, _id, _domain)
            values = tuple(PatternValue(node=node, index=index) for index in range(_outputs))
            return values[0] if _outputs == 1 else values

        return build


class Match:
    """What a pattern bound: values by variable name, nodes by ``_id``, both as attributes."""

    def __init__(self, root: ir.Node, opset: int) -> None:
        self.root = root
        self.opset = opset
        self.values: dict[str, ir.Value | None] = {}
        self.nodes: dict[PatternNode, ir.Node] = {}

    def __getattr__(self, name: str) -> Any:
        values, nodes = self.__dict__.get("values", {}), self.__dict__.get("nodes", {})
        if name in values:
            return values[name]
        for pattern_node, node in nodes.items():
            if pattern_node.id == name:
                return node
        raise AttributeError(f"the pattern binds no `{name}`")

    def all_constant(self, *names: str) -> bool:
        """Return whether every named variable that is bound holds a constant."""
        bound = [self.values[name] for name in names]
        return all(value is None or walk.constant_tensor(value) is not None for value in bound)

    def array(self, name: str) -> Array:
        """Return what a constant variable holds.

        Raises:
            ValueError: The variable is not constant.
        """
        tensor = walk.constant_tensor(self.values[name])
        if tensor is None:
            raise ValueError(f"`{name}` is not constant")
        return tensor.numpy()

    def include(self, nodes: Iterable[ir.Node]) -> bool:
        """Make more nodes part of the match, as `Rule.applies` found them; False if one is in another graph."""
        more = dict.fromkeys(nodes)
        if any(node.graph is not self.root.graph for node in more):
            return False
        known = set(self.nodes.values())
        self.nodes.update((PatternNode(n.op_type, (), {}, None, n.domain), n) for n in more if n not in known)
        return True

    def copy(self) -> Match:
        """Return an independent copy, for the matcher to backtrack to."""
        other = Match(self.root, self.opset)
        other.values, other.nodes = dict(self.values), dict(self.nodes)
        return other


@dataclass(frozen=True)
class Miss:
    """Why a rule held back although its pattern matched."""

    reason: str
    node: ir.Node | None = None


class Rule:
    """A rewrite: what to look for, and what to put in its place.

    Subclasses set ``name`` and write ``pattern(self, op, ...)``, whose further parameters are the pattern's
    variables (one with a default of None is an optional input), and ``rewrite(self, op, m)``. The last operator of
    the pattern is its root; operators inside the pattern must feed nothing else, unless ``inner_may_be_read``. The
    docstring's first line is the equation the rule rests on; the rest of its first paragraph says why it holds.

    Attributes:
        name: What journals and messages call it.
        inner_may_be_read: Whether operators inside the pattern may feed others too; they then stay for these.
    """

    name: str = ""
    inner_may_be_read: bool = False

    def pattern(self, op: Any, *variables: Any) -> Any:
        """Return the pattern's root value, built from variables."""
        raise NotImplementedError

    def applies(self, m: Match) -> bool:
        """Return whether a match is one at all, by what a pattern cannot say; a no needs no reason."""
        return True

    def check(self, m: Match) -> Miss | None:
        """Return why a match must not be rewritten, or None; runs before anything is built."""
        return None

    def rewrite(self, op: Any, m: Match) -> Any:
        """Return the value, or tuple of values, that replaces the root's outputs, or a Miss."""
        raise NotImplementedError


@dataclass(frozen=True)
class Compiled:
    """A rule with its pattern built once."""

    rule: Rule
    root: PatternNode
    depth: int


@functools.lru_cache(maxsize=4096)
def _default_attribute(op_type: str, name: str, opset: int) -> Any:
    """Return what an absent attribute of a standard operator stands for in an opset."""
    try:
        attribute = onnx.defs.get_schema(op_type, opset, "").attributes.get(name)
    except onnx.defs.SchemaError:
        return None
    if attribute is None or not attribute.default_value.name:
        return None
    value = onnx.helper.get_attribute_value(attribute.default_value)
    return value.decode() if isinstance(value, bytes) else value


def compile_rule(rule: Rule) -> Compiled:
    """Build a rule's pattern.

    Raises:
        TypeError: The pattern function does not return what an operator built, or a variable has a name of Match's.
    """
    named = _variables(type(rule).pattern, rule.name)
    variables = [PatternValue(name=name, optional=optional) for name, optional in named]
    built = rule.pattern(PatternBuilder(), *variables)
    root = built[0] if isinstance(built, tuple) else built
    if not isinstance(root, PatternValue) or root.node is None:
        raise TypeError(f"the pattern of rule `{rule.name}` must return the output of an operator")
    return Compiled(rule, root.node, _depth(root.node))


@functools.lru_cache(maxsize=4096)
def _variables(pattern: Callable[..., Any], rule: str) -> list[tuple[str, bool]]:
    """Return the variables of a rule's pattern, each with whether it is optional."""
    # The first parameters are `self` and the builder.
    parameters = list(inspect.signature(pattern).parameters.values())[2:]
    for parameter in parameters:
        if hasattr(Match, parameter.name) or parameter.name in _MATCH_FIELDS:
            raise TypeError(f"rule `{rule}`: `{parameter.name}` is a name of Match's own; call the variable otherwise")
    return [(parameter.name, parameter.default is None) for parameter in parameters]


def _depth(node: PatternNode) -> int:
    inner = [operand.node for operand in node.inputs if isinstance(operand, PatternValue) and operand.node]
    return 1 + max((_depth(child) for child in inner), default=0)


def matches_at(pattern: PatternNode, node: ir.Node, opset: int) -> Iterator[Match]:
    """Yield every way a pattern matches with its root at ``node``, in a model of the given opset."""
    # Most rules of an operator do not match at most of its nodes: that is told without building a Match.
    if not _may_match(pattern, node):
        return iter(())
    return _match_node(pattern, node, Match(node, opset))


def _may_match(pattern: PatternNode, node: ir.Node) -> bool:
    """Return whether operators fit, the root's and those right before it."""
    if node.op_type != pattern.op_type:
        return False
    return any(
        all(_may_be(operand, value) for operand, value in zip(pattern.inputs, inputs, strict=False))
        for inputs in _input_orders(pattern, node)
    )


def _may_be(operand: Operand, value: ir.Value | None) -> bool:
    if not isinstance(operand, PatternValue):
        return operand is None or operand is ... or walk.constant_tensor(value) is not None
    if operand.node is None or value is None:
        return True
    producer = value.producer()
    return producer is not None and producer.op_type == operand.node.op_type


def _match_node(pattern: PatternNode, node: ir.Node, found: Match) -> Iterator[Match]:
    if node.op_type != pattern.op_type or normal_domain(node.domain) != normal_domain(pattern.domain):
        return
    known = found.nodes.get(pattern)
    if known is not None:
        if known is node:
            yield found
        return
    if node.graph is not found.root.graph or walk.has_references(node) or not _attributes_fit(pattern, node, found):
        return
    for inputs in _input_orders(pattern, node):
        attempt = found.copy()
        attempt.nodes[pattern] = node
        yield from _match_inputs(pattern.inputs, inputs, attempt)


def _match_inputs(operands: Sequence[Operand], inputs: Sequence[ir.Value | None], found: Match) -> Iterator[Match]:
    if operands and operands[0] is ...:
        yield found
        return
    if len(inputs) > len(operands) and ... not in operands:
        if any(value is not None for value in inputs[len(operands) :]):
            return
        inputs = inputs[: len(operands)]
    if not operands:
        yield found
        return
    value = inputs[0] if inputs else None
    for attempt in _match_operand(operands[0], value, found):
        yield from _match_inputs(operands[1:], inputs[1:], attempt)


def _match_operand(operand: Operand, value: ir.Value | None, found: Match) -> Iterator[Match]:
    if operand is None or value is None:
        absent_is_fine = operand is None or (isinstance(operand, PatternValue) and operand.optional)
        if value is None and absent_is_fine:
            if isinstance(operand, PatternValue) and operand.name:
                found.values[operand.name] = None
            yield found
        return
    if not isinstance(operand, PatternValue):
        tensor = walk.constant_tensor(value)
        if tensor is not None and _is_everywhere(tensor, operand):
            yield found
        return
    if operand.node is None:
        assert operand.name is not None
        bound = found.values.get(operand.name, value)
        if bound is value:
            found.values[operand.name] = value
            yield found
        return
    producer = value.producer()
    if producer is not None and value.index() == operand.index:
        yield from _match_node(operand.node, producer, found)


def _is_everywhere(tensor: ir.TensorProtocol, number: Any) -> bool:
    """Return whether a constant equals a number everywhere; its first element tells most that do not."""
    if not 0 < tensor.size <= LARGEST_COMPARED:
        return False
    array = tensor.numpy()
    return bool(array.flat[0] == number) and bool(np.all(array == number))


def _input_orders(pattern: PatternNode, node: ir.Node) -> Iterator[Sequence[ir.Value | None]]:
    yield node.inputs
    if pattern.op_type in COMMUTATIVE and len(node.inputs) == 2:
        yield tuple(reversed(node.inputs))


def _attributes_fit(pattern: PatternNode, node: ir.Node, found: Match) -> bool:
    for name, wanted in pattern.attributes.items():
        attribute = node.attributes.get(name)
        if attribute is not None:
            actual = attribute.value
        elif node.domain in walk.ONNX_DOMAINS:
            actual = _default_attribute(node.op_type, name, found.opset)
        else:
            actual = None
        if isinstance(actual, tuple):
            actual = list(actual)
        if actual != wanted:
            return False
    return True


def normal_domain(domain: str) -> str:
    """Return a domain in the spelling rules are found by: the ONNX domain has two."""
    return "" if domain in walk.ONNX_DOMAINS else domain
