"""The worklist: drives rules over a model to a fixpoint, visiting again only what a rewrite may have made match."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from graphopt import walk
from graphopt.backend import Array
from graphopt.errors import PassError
from graphopt.pattern import Compiled, Match, Miss, Rule, compile_rule, matches_at, normal_domain
from graphopt.rewriter import Rewriter, let_go

# A rewrite that fires this often per node of the graph is taken for rules undoing each other.
REWRITES_PER_NODE_LIMIT = 50
# Readers of a node with more of them are queued once for all edits near it, not again at each.
FEW_READERS = 8


class ReplacementBuilder:
    """What a replacement function writes with; nothing enters the graph until the rule has succeeded."""

    def __init__(self, rewriter: Rewriter, match: Match) -> None:
        self._rewriter = rewriter
        self._match = match
        self.nodes: list[ir.Node] = []
        self.heirs: dict[ir.Node, ir.Node] = {}  # matched node -> the one made like it
        self.constants: list[ir.Value] = []
        self.bases: dict[str, ir.Value] = {}  # the name asked for -> the constant

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
        self.bases[name] = value
        return value


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


def apply_rules(rules: Iterable[Rule], model: ir.Model, rewriter: Rewriter, *, check: Agrees | None = None) -> Outcome:
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
            key = (normal_domain(compiled.root.domain), compiled.root.op_type)
            self.by_root.setdefault(key, []).append(compiled)
        self.reach = max((rule.depth for group in self.by_root.values() for rule in group), default=1)
        self.queue: deque[ir.Node] = deque()
        self.queued: set[ir.Node] = set()
        self.widely_read: dict[ir.Node, int] = {}  # disturbed -> how many steps downstream are still to be queued
        self.fired: Counter[str] = Counter()
        self.recent: deque[str] = deque(maxlen=16)
        self.missed: dict[tuple[str, ir.Node], str] = {}

    def run(self) -> Outcome:
        nodes = list(walk.every_node(self.model))
        limit = REWRITES_PER_NODE_LIMIT * (len(nodes) + 1)
        for node in nodes:
            self._push(node)
        with self.rewriter.observed_by(self._disturbed):
            while self._refill():
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
        if node not in self.queued and (normal_domain(node.domain), node.op_type) in self.by_root:
            self.queue.append(node)
            self.queued.add(node)

    def _refill(self) -> bool:
        """Return whether a node is queued; the readers of widely read nodes are when all others have been visited."""
        if not self.queue and self.widely_read:
            waiting, self.widely_read = self.widely_read, {}
            for steps in range(self.reach - 1, 0, -1):
                for node in [node for node, left in waiting.items() if left == steps and node.graph is not None]:
                    self._queue_downstream(_readers(node), steps, waiting)
        return bool(self.queue)

    def _disturbed(self, node: ir.Node) -> None:
        """Queue a changed node and every node downstream within a pattern's reach."""
        self._queue_downstream([node], self.reach, {})

    def _queue_downstream(self, nodes: Iterable[ir.Node], steps: int, expanded: Mapping[ir.Node, int]) -> None:
        """Queue nodes and what is less than so many steps downstream; readers of widely read nodes have to wait.

        Without the wait, each of N edits near a node that N others read would walk all N of them.
        """
        frontier = dict.fromkeys(nodes)
        for left in range(steps - 1, -1, -1):
            following: dict[ir.Node, None] = {}
            for node in frontier:
                self._push(node)
                if left <= max(self.widely_read.get(node, 0), expanded.get(node, 0)):
                    continue  # its readers wait, or have just been queued, as far as asked for here
                readers = _readers(node)
                if len(readers) > FEW_READERS:
                    self.widely_read[node] = left
                else:
                    following.update(readers)
            frontier = following

    def _visit(self, node: ir.Node) -> None:
        for compiled in self.by_root[(normal_domain(node.domain), node.op_type)]:
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
        for old in match.root.outputs[len(values) :]:
            if old.uses() or old.is_graph_output():
                raise PassError(
                    f"a rule leaves output `{old.name}` of `{walk.label(match.root)}` without a replacement",
                    hint="return one value for each output of the root",
                )
        for constant in built.constants:
            self.rewriter.adopt(constant, near=match.root)
        for node in built.nodes:
            self.rewriter.import_domain(node.domain, near=match.root)
            self.rewriter.insert(node, before=match.root)
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
        for bound in match.values.values():
            heir = built.bases.get(bound.name or "") if bound is not None else None
            # A name may be taken in another graph.
            if bound and heir and heir.graph is bound.graph and self.rewriter.remove_if_unread(bound):
                heir.name = bound.name


def _readers(node: ir.Node) -> dict[ir.Node, None]:
    """Return the nodes that read an output of a node, each once, in order."""
    return {use.node: None for value in node.outputs for use in value.uses()}


def _read_elsewhere(match: Match) -> ir.Node | None:
    """Return a matched node, other than the root, whose output something outside the match reads."""
    inside = set(match.nodes.values())
    for node in inside - {match.root}:
        for value in node.outputs:
            if value.is_graph_output() or any(use.node not in inside for use in value.uses()):
                return node
    return None
