"""Which node of a model has become which node of another: paired by origin, graph by graph.

A pair is one node before and one node after; it is `kept` or `changed`. That something was put in or taken out between
it and what it reads is no change of its own. What has no partner before is `added`, what has none after is `removed`,
though its origins may live on in other nodes: `Pairs.became` and `Pairs.made_from` say where.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.fragment import values_read
from graphopt.graph_view.tensor_glance import kind, look_alike
from graphopt.model_diff import show_attribute

AnyGraph = ir.Graph | ir.Function
_Item = TypeVar("_Item")

_GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
# After so many values a common source is given up: a reader would not see that it is one.
_LONGEST_LOOK = 64
# What passes put between nodes, and no node has become.
_PUT_BETWEEN = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "Cast")
# How well an after-node fits a node before it that shares an origin, best first.
_SAME_VALUE_SAME_OPERATOR, _SAME_OPERATOR, _SAME_VALUE, _RELATED = range(4)


@dataclass(frozen=True)
class GraphPair:
    """A graph before and after; None where there is none.

    Attributes:
        title: What it is called: an attribute of the node that holds it, the name of a function, "" of the main graph.
        before: The graph before.
        after: The graph after.
        holder_before: The node that holds it before, if it is nested.
        holder_after: The node that holds it after, if it is nested.
        parent: Which of `Pairs.graphs` the holders are in; None of the main graph and of functions.
    """

    title: str
    before: AnyGraph | None
    after: AnyGraph | None
    holder_before: ir.Node | None = None
    holder_after: ir.Node | None = None
    parent: int | None = None


@dataclass
class Pairs:
    """Nodes before and after, paired.

    Attributes:
        before: The partner before of a node after.
        after: The partner after of a node before.
        graphs: The main graph, functions and nested graphs, each behind the one it is nested in.
        changes: Of each pair of nodes that is not kept, what differs, as short texts.
        became: Of each node before, the nodes after that have an origin of it.
        made_from: Of each node after, the nodes before whose origins it has.
    """

    before: dict[ir.Node, ir.Node] = field(default_factory=dict)
    after: dict[ir.Node, ir.Node] = field(default_factory=dict)
    graphs: list[GraphPair] = field(default_factory=list)
    changes: dict[ir.Node, list[str]] = field(default_factory=dict)
    became: dict[ir.Node, list[ir.Node]] = field(default_factory=dict)
    made_from: dict[ir.Node, list[ir.Node]] = field(default_factory=dict)

    def status(self, node: ir.Node, *, is_after: bool) -> str:
        """Return `kept`, `changed`, `removed` or `added`."""
        partner = (self.before if is_after else self.after).get(node)
        if partner is None:
            return "added" if is_after else "removed"
        return "changed" if self.changes.get(node if is_after else partner) else "kept"


def pair_models(before: ir.Model, after: ir.Model) -> Pairs:
    """Pair the nodes of two models by origin; of models from two files, by the names of nodes and values.

    Nodes without an origin get one, in their metadata in memory; nothing else of the models is changed.
    """
    provenance.stamp(before)
    provenance.stamp(after)
    pairs = Pairs()
    _relate(before, after, pairs)
    waiting = [GraphPair("", before.graph, after.graph)]
    functions = _by_key(dict(before.functions), dict(after.functions))
    waiting += [GraphPair(f"{key[0]}::{key[1]}", old, new) for key, old, new in functions]
    while waiting:
        pair = waiting.pop(0)
        pairs.graphs.append(pair)
        if pair.before is not None and pair.after is not None:
            _pair_nodes(pair.before, pair.after, pairs)
        waiting += _nested_pairs(len(pairs.graphs) - 1, pair, pairs)
    for new_node, old_node in pairs.before.items():
        pairs.changes[new_node] = list(_differences(old_node, new_node, pairs))
    _report_inner_changes(pairs)
    return pairs


def _relate(before: ir.Model, after: ir.Model, pairs: Pairs) -> None:
    by_origin: dict[str, list[ir.Node]] = {}
    for node in walk.every_node(before):
        pairs.became[node] = []
        for origin in sorted(provenance.origins(node)):
            by_origin.setdefault(origin, []).append(node)
    for node in walk.every_node(after):
        sources = [old for origin in sorted(provenance.origins(node)) for old in by_origin.get(origin, ())]
        pairs.made_from[node] = list(dict.fromkeys(sources))
        for source in pairs.made_from[node]:
            pairs.became[source].append(node)


def _by_key(old: Mapping[Any, _Item], new: Mapping[Any, _Item]) -> list[tuple[Any, _Item | None, _Item | None]]:
    return [(key, old.get(key), new.get(key)) for key in dict.fromkeys([*old, *new])]


def _pair_nodes(old: AnyGraph, new: AnyGraph, pairs: Pairs) -> None:
    """Pair the nodes of two graphs, each at most once, the best fit first."""
    place = {node: index for index, node in enumerate(old)}
    by_value = {value.name: node for node in old for value in node.outputs if value.name}
    varying = _varying(old) | _varying(new)
    fits: list[list[tuple[ir.Node, ir.Node]]] = [[], [], [], []]
    for node in new:
        related = sorted((one for one in pairs.made_from[node] if one in place), key=place.__getitem__, reverse=True)
        named = next((by_value[value.name] for value in node.outputs if value.name in by_value), None)
        for source in dict.fromkeys([*([named] if named is not None else []), *related]):
            # A weight that is now decoded, and was a constant, or the other way round: one of the two is not drawn.
            if is_shown(source) != is_shown(node):
                continue
            fit = _fit(source, node, same_value=source is named)
            # What prepares a weight is not what has become of a node on the way from inputs to outputs.
            if fit != _RELATED or ((source in varying) == (node in varying) and node.op_type not in _PUT_BETWEEN):
                fits[fit].append((source, node))
    for fit, found in enumerate(fits):
        for source, node in found:
            if source in pairs.after or node in pairs.before:
                continue
            if fit in (_SAME_VALUE_SAME_OPERATOR, _SAME_VALUE) or _is_in_place(node, place[source], place, pairs):
                pairs.after[source], pairs.before[node] = node, source


def _is_in_place(node: ir.Node, at: int, place: Mapping[ir.Node, int], pairs: Pairs) -> bool:
    """Return whether a node, were it paired with the one at a place before, would still be between its neighbours."""
    above = (one for value in node.inputs if value is not None for one in _sources(value, pairs.before))
    partners = [pairs.before[one] for one in above if isinstance(one, ir.Node)]
    if any(place.get(partner, -1) >= at for partner in partners):
        return False
    return all(place.get(pairs.before[one], at + 1) > at for one in _readers(node, pairs.before))


def _readers(node: ir.Node, paired: Mapping[ir.Node, ir.Node]) -> set[ir.Node]:
    """Return the nearest nodes that have a partner and are computed from a node."""
    found: set[ir.Node] = set()
    frontier, seen = [node], {node}
    while frontier and len(seen) < _LONGEST_LOOK:
        for reader in (use.node for value in frontier.pop(0).outputs for use in value.uses()):
            if reader in paired:
                found.add(reader)
            elif reader not in seen:
                seen.add(reader)
                frontier.append(reader)
    return found


def _varying(graph: AnyGraph) -> set[ir.Node]:
    """Return the nodes of a graph that compute something other than from constants alone."""
    found: set[ir.Node] = set()
    for node in graph:
        for value in values_read(node):
            producer = value.producer()
            if producer in found or ((producer is None or producer.graph is not graph) and not _is_constant(value)):
                found.add(node)
                break
    return found


def _is_constant(value: ir.Value) -> bool:
    return walk.constant_tensor(value) is not None


def _fit(source: ir.Node, node: ir.Node, *, same_value: bool) -> int:
    same_operator = source.op_identifier() == node.op_identifier()
    if same_value:
        return _SAME_VALUE_SAME_OPERATOR if same_operator else _SAME_VALUE
    return _SAME_OPERATOR if same_operator else _RELATED


def nested_graphs(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Yield the graphs a node holds and what they are called: the attribute, numbered where it holds several."""
    for name, attribute in node.attributes.items():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((f"{name}[{index}]", graph) for index, graph in enumerate(attribute.as_graphs()))


def _nested_pairs(index: int, pair: GraphPair, pairs: Pairs) -> Iterator[GraphPair]:
    """Yield the nested graphs of a pair of graphs, those of paired nodes together."""
    for node in pair.before or ():
        partner = pairs.after.get(node)
        own: dict[str, AnyGraph] = dict(nested_graphs(node))
        others: dict[str, AnyGraph] = dict(nested_graphs(partner)) if partner is not None else {}
        for name, old, new in _by_key(own, others):
            yield GraphPair(name, old, new, node, partner, index)
    for node in pair.after or ():
        if node not in pairs.before:
            yield from (GraphPair(name, None, graph, None, node, index) for name, graph in nested_graphs(node))


def _differences(old: ir.Node, new: ir.Node, pairs: Pairs) -> Iterator[str]:
    """Yield what differs between two nodes of a pair."""
    if old.op_identifier() != new.op_identifier():
        yield f"operator: {old.op_type} → {new.op_type}"
    yield from _attribute_differences(old, new)
    if len(old.inputs) != len(new.inputs):
        yield f"inputs: {len(old.inputs)} → {len(new.inputs)}"
    for index, (was, now) in enumerate(zip(old.inputs, new.inputs, strict=False)):
        yield from _input_differences(index, was, now, pairs)
    if len(old.outputs) != len(new.outputs):
        yield f"outputs: {len(old.outputs)} → {len(new.outputs)}"
    for index, (made, makes) in enumerate(zip(old.outputs, new.outputs, strict=False)):
        if made.dtype is not None and makes.dtype is not None and made.dtype != makes.dtype:
            yield f"output {index}: {made.dtype} → {makes.dtype}"


def _attribute_differences(old: ir.Node, new: ir.Node) -> Iterator[str]:
    for name in dict.fromkeys([*old.attributes, *new.attributes]):
        was, now = old.attributes.get(name), new.attributes.get(name)
        if was is None or now is None:
            yield f"{name}: {_text(was)} → {_text(now)}"
        elif was.type in _GRAPHS or now.type in _GRAPHS or _same_attribute(was, now):
            continue
        else:
            yield f"{name}: {_text(was)} → {_text(now)}"


def _text(attribute: ir.Attr | None) -> str:
    return "(not set)" if attribute is None else show_attribute(attribute)


def _same_attribute(was: ir.Attr, now: ir.Attr) -> bool:
    if was.type != now.type or was.is_ref() != now.is_ref():
        return False
    if was.is_ref():
        return was.ref_attr_name == now.ref_attr_name
    if was.type == ir.AttributeType.TENSOR:
        return look_alike(was.as_tensor(), now.as_tensor())
    return bool(was.value == now.value)


def _input_differences(index: int, was: ir.Value | None, now: ir.Value | None, pairs: Pairs) -> Iterator[str]:
    if was is None or now is None:
        if was is not now:
            yield f"input {index}: {'(none)' if was is None else was.name} → {'(none)' if now is None else now.name}"
        return
    old_tensor, new_tensor = walk.constant_tensor(was), walk.constant_tensor(now)
    if old_tensor is not None and new_tensor is not None:
        if not look_alike(old_tensor, new_tensor):
            yield f"input {index}: {kind(old_tensor)} → {kind(new_tensor)}{_only_numbers(old_tensor, new_tensor)}"
        return
    if was.name == now.name and (old_tensor is None) == (new_tensor is None):
        return
    producer, other = was.producer(), now.producer()
    if producer is not None and other is not None and pairs.before.get(other) is producer:
        if was.index() != now.index():
            yield f"input {index}: output {was.index()} of {producer.op_type} → output {now.index()}"
        return
    if not _same_source(was, now, pairs):
        yield f"input {index}: {_source(was)} → {_source(now)}"


def _same_source(was: ir.Value, now: ir.Value, pairs: Pairs) -> bool:
    """Return whether nothing but removed and added nodes are between two values and one that both come from."""
    old = {pairs.after.get(end, end) if isinstance(end, ir.Node) else end for end in _sources(was, pairs.after)}
    return not old.isdisjoint(_sources(now, pairs.before))


def _sources(value: ir.Value, paired: Mapping[ir.Node, ir.Node]) -> set[ir.Node | str]:
    """Return the nearest nodes that have a partner, and graph inputs by name, that a value is computed from."""
    found: set[ir.Node | str] = set()
    frontier, seen = [value], {value}
    while frontier and len(seen) < _LONGEST_LOOK:
        producer = frontier[0].producer()
        if producer is None:
            found.update([frontier[0].name or ""] if walk.constant_tensor(frontier[0]) is None else [])
        elif producer in paired:
            found.add(producer)
        else:
            new = [one for one in dict.fromkeys(producer.inputs) if one is not None and one not in seen]
            seen.update(new)
            frontier += new
        frontier.pop(0)
    return found


def _only_numbers(old: ir.TensorProtocol, new: ir.TensorProtocol) -> str:
    return ", other numbers" if old.dtype == new.dtype and walk.dims(old) == walk.dims(new) else ""


def _source(value: ir.Value) -> str:
    producer = value.producer()
    if walk.constant_tensor(value) is not None:
        return f"constant {value.name}"
    return f"{value.name} of {producer.op_type}" if producer is not None else f"{value.name}"


def _report_inner_changes(pairs: Pairs) -> None:
    """Call a node changed whose nested graphs are, from the innermost outwards."""
    for pair in reversed(pairs.graphs):
        if pair.holder_before is not None and pair.holder_after is not None:
            count = count_changed(pair, pairs)
            if count:
                pairs.changes[pair.holder_after].append(f"{pair.title}: {count} changed, removed or added")


def count_changed(pair: GraphPair, pairs: Pairs) -> int:
    """Return how many nodes of a pair of graphs are not kept; those of graphs nested in them count in their holder."""
    gone = sum(node not in pairs.after for node in shown_nodes(pair.before))
    return gone + sum(pairs.status(node, is_after=True) != "kept" for node in shown_nodes(pair.after))


def is_shown(node: ir.Node) -> bool:
    """Return whether a viewer draws a node: a constant is shown with what reads it."""
    return not (walk.is_onnx_op(node, "Constant") and walk.constant_tensor(node.outputs[0]) is not None)


def shown_nodes(graph: AnyGraph | None) -> Sequence[ir.Node]:
    """Return the nodes of a graph that a viewer draws."""
    return [node for node in graph or () if is_shown(node)]
