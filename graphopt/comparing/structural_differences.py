"""What two models differ in, and what is wrong with the second, seen without running them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import onnx_ir as ir

from graphopt import provenance, walk
from graphopt.comparing.layer_errors import Difference
from graphopt.comparing.layer_pairs import OriginIndex
from graphopt.comparing.node_changes import ChangeFinder
from graphopt.content_keys import ContentKeys
from graphopt.shapes import contradiction
from graphopt.verify import problems_of

# One node is told to have been left as it was where at least so many of its operator, and so large a share, were not.
_LIKE_IT, _SHARE_CHANGED = 4, 0.9
# How many of one kind are named.
_NAMED = 5


def structural_differences(a: ir.Model, b: ir.Model, index: OriginIndex) -> list[Difference]:
    """Return what a second model lacks, has besides, or has wrong; what is wrong with the first alike is left out.

    Args:
        a: The first model, as it was loaded, origins stamped; its shapes need not be inferred.
        b: The second.
        index: Nodes of the second by origin.
    """
    found = [*_ports(a, b, "input"), *_ports(a, b, "output"), *_malformed(a, b), *_contradictory(a, b)]
    return found + list(_random(a, b, index))


def is_identical(a: ir.Model, b: ir.Model) -> bool:
    """Return whether two models compute the same outputs by the same operators from the same bits, whatever the names.

    Inputs that take other sizes make another model.

    Large weights are read for it.
    """
    ports = [
        [value.name for value in one.graph.outputs]
        + [f"{value.name} {value.shape}" for value in one.graph.inputs if not value.is_initializer()]
        for one in (a, b)
    ]
    if ports[0] != ports[1] or len(list(a.graph)) != len(list(b.graph)):
        return False
    keys = [list(ContentKeys(one).of(one.graph.outputs).values()) for one in (a, b)]
    return None not in keys[0] and keys[0] == keys[1]


def left_alone(a: ir.Model, finder: ChangeFinder) -> list[Difference]:
    """Return nodes that are as they were while nearly all of their operator were changed: a pass may have missed them.

    Args:
        a: The first model.
        finder: Finds what became of its nodes.
    """
    kinds: dict[ir.OperatorIdentifier, list[ir.Node]] = {}
    for node in a.graph:
        if not walk.is_onnx_op(node, "Constant"):
            kinds.setdefault(node.op_identifier(), []).append(node)
    found = []
    for nodes in kinds.values():
        if len(nodes) <= _LIKE_IT:
            continue
        same = [node for node in nodes if finder.is_untouched(node)]
        changed = len(nodes) - len(same)
        if same and changed >= _LIKE_IT and changed / len(nodes) >= _SHARE_CHANGED:
            names = [walk.label(node) for node in same]
            what = f"of {len(nodes)} {nodes[0].op_type}, {changed} were changed, and {_listed(names)} not"
            found.append(Difference("left", names[0], what, is_fault=False, origin=origin_of(same[0])))
    return found


def _ports(a: ir.Model, b: ir.Model, kind: str) -> Iterator[Difference]:
    before, after = (list(one.graph.inputs if kind == "input" else one.graph.outputs) for one in (a, b))
    others = {value.name: value for value in after}
    names = {value.name for value in before}
    added = [value for value in after if value.name not in names]
    for place, value in enumerate(before):
        other = others.get(value.name)
        origin = origin_of(value.producer())
        if other is None:
            new = _renamed(value, place, before, after, added)
            what = (
                f"{kind} `{value.name}` is lost" if new is None else f"{kind} `{value.name}` is now called `{new.name}`"
            )
            added = [one for one in added if one is not new]
            yield Difference(kind, value.name or "", what, origin=origin)
        elif value.dtype is not None and other.dtype is not None and value.dtype != other.dtype:
            what = f"{kind} `{value.name}` is {other.dtype}, was {value.dtype}"
            yield Difference("dtype", value.name or "", what, origin=origin)
        elif _rank(value) is not None and _rank(other) is not None and _rank(value) != _rank(other):
            what = f"{kind} `{value.name}` is of rank {_rank(other)}, was of {_rank(value)}"
            yield Difference("shape", value.name or "", what, origin=origin)
        elif kind == "input" and _takes_less(value, other):
            what = f"input `{value.name}` is of {_shape(other)}, was of {_shape(value)}"
            yield Difference("shape", value.name or "", what, is_fault=False)
    orders = [[value.name for value in one] for one in (before, after)]
    if orders[0] != orders[1] and sorted(map(str, orders[0])) == sorted(map(str, orders[1])):
        yield Difference("order", "", f"{kind}s are in another order", is_fault=False)
    for value in added:
        yield Difference(kind, value.name or "", f"{kind} `{value.name}` is new", origin=origin_of(value.producer()))


def _renamed(
    value: ir.Value, place: int, before: Sequence[ir.Value], after: Sequence[ir.Value], added: Sequence[ir.Value]
) -> ir.Value | None:
    """Return which new output or input is a lost one under another name: made by the same node, or in its place."""
    producer = value.producer()
    for other in added:
        maker = other.producer()
        if producer is not None and maker is not None and provenance.origins(producer) & provenance.origins(maker):
            return other
    in_place = after[place] if len(before) == len(after) else None
    return in_place if in_place is not None and any(one is in_place for one in added) else None


def _malformed(a: ir.Model, b: ir.Model) -> Iterator[Difference]:
    known = problems_of(a)
    nodes = {f"`{walk.label(node)}` (": node for node in walk.every_node(b)}
    for problem in sorted(problems_of(b) - known):
        node = next((node for text, node in nodes.items() if text in problem), None)
        where = walk.label(node) if node is not None else ""
        yield Difference("malformed", where, problem, origin=origin_of(node))


def _contradictory(a: ir.Model, b: ir.Model) -> Iterator[Difference]:
    """Yield how dtypes and shapes that are written down contradict the operators, if those of the first do not."""
    reason = contradiction(b)
    if reason is None or contradiction(a) is not None:
        return
    text = reason.partition(": ")[2]
    node = next((node for node in b.graph if text.startswith(f"{walk.label(node)} (")), None)
    where = walk.label(node) if node is not None else ""
    kind = "dtype" if "elem type" in text else "shape"
    yield Difference(kind, where, text, origin=origin_of(node))


def _random(a: ir.Model, b: ir.Model, index: OriginIndex) -> Iterator[Difference]:
    """Yield random operators that stand for none of the first model."""
    known = {origin for node in walk.every_node(a) if walk.is_random(node) for origin in provenance.origins(node)}
    for node in walk.every_node(b):
        if walk.is_random(node) and not index.of(node) & known:
            origin = min(index.of(node), default=walk.label(node))
            what = f"`{walk.label(node)}` ({node.op_type}) makes the outputs differ from run to run"
            yield Difference("random", walk.label(node), what, origin=origin)


def origin_of(node: ir.Node | None) -> str:
    """Return the origin of a node, or what it is called where it has none; nothing of no node."""
    return min(provenance.origins(node), default=walk.label(node)) if node is not None else ""


def _rank(value: ir.Value) -> int | None:
    return len(value.shape) if value.shape is not None else None


def _takes_less(value: ir.Value, other: ir.Value) -> bool:
    """Return whether an input takes one size only where it took another, or any."""
    pairs = zip(value.shape or (), other.shape or (), strict=False)
    return any(isinstance(after, int) and before != after for before, after in pairs)


def _shape(value: ir.Value) -> str:
    dims = [str(dim) if isinstance(dim, int) else dim.value or "?" for dim in value.shape or ()]
    return f"[{', '.join(dims)}]"


def _listed(names: Iterable[str]) -> str:
    shown = [f"`{name}`" for name in names]
    more = f" and {len(shown) - _NAMED} more" if len(shown) > _NAMED else ""
    return ", ".join(shown[:_NAMED]) + more
