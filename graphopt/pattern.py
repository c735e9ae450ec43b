"""Rules that read like algebra: a pattern, a replacement, and a worklist that drives them to a fixpoint."""

from __future__ import annotations

import functools
import inspect
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import EllipsisType
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.errors import PassError
from graphopt.rewriter import Rewriter, let_go

COMMUTATIVE = frozenset({"Add", "Mul", "And", "Or", "Xor", "Equal", "Max", "Min", "Sum"})
# Larger constants are not compared with the number of a pattern: a mask may be 0 everywhere, a weight never is.
LARGEST_COMPARED = 1 << 18
# A rewrite that fires this often per node of the graph is taken for rules undoing each other.
REWRITES_PER_NODE_LIMIT = 50


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

    def include(self, nodes: Iterable[ir.Node]) -> None:
        """Make more nodes part of the match, found by `Rule.applies` where no one pattern can say what fits."""
        known = set(self.nodes.values())
        for node in nodes:
            if node not in known:
                known.add(node)
                self.nodes[PatternNode(node.op_type, (), {}, None, node.domain)] = node

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


class ReplacementBuilder:
    """What a replacement function writes with; nothing enters the graph until the rule has succeeded."""

    def __init__(self, rewriter: Rewriter, match: Match) -> None:
        self._rewriter = rewriter
        self._match = match
        self.nodes: list[ir.Node] = []
        self.heirs: dict[ir.Node, ir.Node] = {}  # matched node -> the one made like it
        self.constants: list[ir.Value] = []

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        def build(
            *inputs: ir.Value | None, _outputs: int = 1, _domain: str = "", _name: str | None = None, **attributes: Any
        ) -> ir.Value | tuple[ir.Value, ...]:
            node = self._rewriter.make(
                op_type,
                inputs,
                attributes,
                sources=self._match.nodes.values(),
                outputs=_outputs,
                domain=_domain,
                name=_name or self._match.root.name,
            )
            self.nodes.append(node)
            return node.outputs[0] if _outputs == 1 else tuple(node.outputs)

        return build

    def like(self, node: ir.Node, *inputs: ir.Value | None) -> ir.Value:
        """Return the output of a node equal to ``node`` but for its inputs: operator, attributes, name kept."""
        value: ir.Value = getattr(self, node.op_type)(
            *inputs, _domain=node.domain, _name=node.name, **dict(node.attributes)
        )
        self.heirs[node] = self.nodes[-1]
        return value

    def const(self, content: Array | ir.TensorProtocol, name: str) -> ir.Value:
        """Return a new constant."""
        value = self._rewriter.make_const(content, name)
        self.constants.append(value)
        return value


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
    # `self` is bound, so the first parameter is the builder.
    parameters = list(inspect.signature(rule.pattern).parameters.values())[1:]
    for parameter in parameters:
        if hasattr(Match, parameter.name) or parameter.name in _MATCH_FIELDS:
            raise TypeError(
                f"rule `{rule.name}`: `{parameter.name}` is a name of Match's own; call the variable otherwise"
            )
    variables = [PatternValue(name=p.name, optional=p.default is None) for p in parameters]
    built = rule.pattern(PatternBuilder(), *variables)
    root = built[0] if isinstance(built, tuple) else built
    if not isinstance(root, PatternValue) or root.node is None:
        raise TypeError(f"the pattern of rule `{rule.name}` must return the output of an operator")
    return Compiled(rule, root.node, _depth(root.node))


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
    if node.op_type != pattern.op_type or _normal(node.domain) != _normal(pattern.domain):
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


def _normal(domain: str) -> str:
    return "" if domain in walk.ONNX_DOMAINS else domain


@dataclass(frozen=True)
class Outcome:
    """What driving rules over a model did.

    Attributes:
        fired: Rule name to number of rewrites.
        held_back: (Rule name, reason) to number of matches not rewritten.
    """

    fired: Counter[str]
    held_back: Counter[tuple[str, str]]


# Says whether values computed by some nodes equal others, computed by nodes made for it; see `Context.agrees`.
Agrees = Callable[[str, Iterable[ir.Node], Iterable[ir.Value], Iterable[ir.Value], Iterable[ir.Node]], bool]


def apply_rules(
    rules: Iterable[Rule], model: ir.Model, rewriter: Rewriter, *, check: Agrees | None = None
) -> Outcome:
    """Rewrite until no rule matches, visiting after each rewrite only the nodes it may have made match.

    Args:
        rules: Rules; where several match at a node the first listed wins.
        model: The model, changed in place.
        rewriter: The edit surface.
        check: Asked before each rewrite is applied; one that it denies is held back.

    Raises:
        PassError: Rules undo each other without end; names them.
    """
    return _Driver(rules, model, rewriter, check).run()


class _Driver:
    def __init__(self, rules: Iterable[Rule], model: ir.Model, rewriter: Rewriter, check: Agrees | None) -> None:
        self.rewriter = rewriter
        self.model = model
        self.opset = walk.opset(model)
        self.check = check
        self.by_root: dict[tuple[str, str], list[Compiled]] = {}
        for compiled in map(compile_rule, rules):
            key = (_normal(compiled.root.domain), compiled.root.op_type)
            self.by_root.setdefault(key, []).append(compiled)
        self.reach = max((rule.depth for group in self.by_root.values() for rule in group), default=1)
        self.queue: deque[ir.Node] = deque()
        self.queued: set[ir.Node] = set()
        self.fired: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=16)
        self.missed: dict[tuple[str, ir.Node], str] = {}

    def run(self) -> Outcome:
        nodes = list(walk.every_node(self.model))
        limit = REWRITES_PER_NODE_LIMIT * (len(nodes) + 1)
        for node in nodes:
            self._push(node)
        with self.rewriter.observed_by(self._disturbed):
            while self.queue:
                node = self.queue.popleft()
                self.queued.discard(node)
                if node.graph is not None:
                    self._visit(node)
                if self.fired.total() > limit:
                    names = ", ".join(f"`{name}`" for name in sorted(set(self.recent)))
                    raise PassError(f"rules undo each other without end: {names}", hint="leave one of them out")
        held_back = Counter((rule, reason) for (rule, node), reason in self.missed.items() if node.graph is not None)
        return Outcome(self.fired, held_back)

    def _push(self, node: ir.Node) -> None:
        if node not in self.queued and (_normal(node.domain), node.op_type) in self.by_root:
            self.queue.append(node)
            self.queued.add(node)

    def _disturbed(self, node: ir.Node) -> None:
        """Queue a changed node and every node downstream within a pattern's reach."""
        frontier = {node}
        for _ in range(self.reach):
            for near in frontier:
                self._push(near)
            frontier = {use.node for near in frontier for value in near.outputs for use in value.uses()}

    def _visit(self, node: ir.Node) -> None:
        for compiled in self.by_root[(_normal(node.domain), node.op_type)]:
            for match in matches_at(compiled.root, node, self.opset):
                if not compiled.rule.applies(match):
                    continue
                miss = self._apply(compiled.rule, match)
                if miss is None:
                    self.fired[compiled.rule.name] += 1
                    self.recent.append(compiled.rule.name)
                    return
                self.missed[compiled.rule.name, miss.node or node] = miss.reason

    def _apply(self, rule: Rule, match: Match) -> Miss | None:
        """Rewrite one match, or return why not; the graph changes only on success."""
        busy = None if rule.inner_may_be_read else _read_elsewhere(match)
        if busy is not None:
            return Miss(f"`{busy.op_type}` also feeds other nodes", busy)
        miss = rule.check(match)
        if miss is not None:
            return miss
        builder = ReplacementBuilder(self.rewriter, match)
        with self.rewriter.edit(rule.name, *match.nodes.values()):
            result = rule.rewrite(builder, match)
            if isinstance(result, Miss):
                for node in reversed(builder.nodes):
                    let_go(node)
                return result
            values = result if isinstance(result, tuple) else (result,)
            if self.check is not None:
                before = match.root.outputs[: len(values)]
                if not self.check(rule.name, list(match.nodes.values()), before, values, builder.nodes):
                    return Miss("it would change the outputs", match.root)
            self._splice(match, builder, values)
        return None

    def _splice(self, match: Match, built: ReplacementBuilder, values: Sequence[ir.Value]) -> None:
        for constant in built.constants:
            self.rewriter.adopt(constant, near=match.root)
        for node in built.nodes:
            self.rewriter.import_domain(node.domain, near=match.root)
            self.rewriter.insert(node, before=match.root)
        for old in match.root.outputs[len(values) :]:
            if old.uses() or old.is_graph_output():
                raise PassError(
                    f"a rule leaves output `{old.name}` of `{walk.label(match.root)}` without a replacement",
                    hint="return one value for each output of the root",
                )
        for old, new in zip(match.root.outputs, values, strict=False):
            self.rewriter.replace(old, new)
        # Erasing a reader frees what it reads, so go on until nothing more is free.
        left = list(match.nodes.values())
        while dead := [node for node in left if not walk.is_read(node)]:
            left = [node for node in left if node not in dead]
            for node in dead:
                self.rewriter.erase(node)
        self._hand_down_names(match, built, values)

    def _hand_down_names(self, match: Match, built: ReplacementBuilder, values: Sequence[ir.Value]) -> None:
        """Give names that have become free to what replaced their bearers, so that people find them again."""
        heirs = dict(built.heirs)
        made_by = values[0].producer() if values else None
        if made_by in built.nodes and made_by not in heirs.values():
            heirs.setdefault(match.root, made_by)
        for old, new in heirs.items():
            if old.graph is None and old.name:
                new.name = old.name
        for before, after in zip(match.root.outputs, values, strict=False):
            if match.root.graph is None and after.producer() in built.nodes and not after.is_graph_output():
                after.name = before.name


def _read_elsewhere(match: Match) -> ir.Node | None:
    """Return a matched node, other than the root, whose output something outside the match reads."""
    inside = set(match.nodes.values())
    for node in inside - {match.root}:
        for value in node.outputs:
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                return node
    return None
