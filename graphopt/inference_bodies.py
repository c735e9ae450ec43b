"""Shapes through nested graphs: what If joins, what Loop and Scan keep from one iteration to the next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import onnx_ir as ir

from graphopt import dims as d
from graphopt.dims import Atom, Dim, Size
from graphopt.shape_rules.shape_facts import Call, Contents, Fact, LooseDims, axis_of

# Carried dimensions settle after one generalization each; what takes longer is given up.
ROUNDS_LIMIT = 8
# From here on the scanned inputs have no batch axis of their own.
FIRST_SCAN_WITHOUT_BATCH = 9
BOOL, INT64 = ir.DataType.BOOL, ir.DataType.INT64


class Bodies(Protocol):
    """What infers a nested graph."""

    def body(self, graph: ir.Graph, inputs: Sequence[Fact], *, repeated: bool) -> tuple[list[Fact], set[Atom]]:
        """Return what is known of a graph's outputs, and the unknown sizes that mean something in it alone."""
        ...

    def mint(self, *, signed: bool = False) -> Dim:
        """Return a size that equals nothing else."""
        ...


def infer_if(bodies: Bodies, call: Call) -> list[Fact]:
    """Return what both branches agree on, or what the branch taken gives where the condition is known."""
    then, otherwise = (_graph(call, name) for name in ("then_branch", "else_branch"))
    first, _ = bodies.body(then, [], repeated=False)
    second, _ = bodies.body(otherwise, [], repeated=False)
    condition = call.sizes(0)
    if condition is not None and len(condition) == 1:
        taken = condition[0]
        if isinstance(taken, int):
            return first if taken else second
        return [_either(taken, one, other) for one, other in zip(first, second, strict=True)]
    return [_either(None, one, other) for one, other in zip(first, second, strict=True)]


def _graph(call: Call, name: str) -> ir.Graph:
    attribute = call.attribute(name)
    if attribute is None:
        raise LookupError(f"no `{name}`")
    return attribute.as_graph()


def _either(condition: Dim | None, a: Fact, b: Fact) -> Fact:
    dims: LooseDims | None = None
    if a.dims is not None and b.dims is not None and len(a.dims) == len(b.dims):
        dims = [_choice(condition, one, other) for one, other in zip(a.dims, b.dims, strict=True)]
    contents = None
    mine, theirs = a.contents, b.contents
    if mine is not None and theirs is not None and mine.shape == theirs.shape:
        entries = [_choice(condition, one, other) for one, other in zip(mine.entries, theirs.entries, strict=True)]
        contents = Contents.of(entries, mine.shape) if None not in entries else None
    dtype = a.dtype if a.dtype == b.dtype else None
    return Fact(dtype, dims, contents, other=a.type if a.type == b.type else None)  # type: ignore[arg-type]


def _choice(condition: Dim | None, a: Size, b: Size) -> Size | None:
    if a == b:
        return a
    return None if condition is None else d.choose(condition, a, b)


def infer_loop(bodies: Bodies, call: Call) -> list[Fact]:
    """Return what a Loop gives: carried values as far as the body keeps their dimensions, and what it stacks up."""
    body = _graph(call, "body")
    step = Fact(INT64, (), Contents.of([bodies.mint()], ()))
    # The body runs only where the condition holds.
    going_on = Fact(BOOL, (), Contents.of([1], ()))
    carried = [_shape_of(fact) for fact in call.inputs[2:]]
    carried, results, local = _settled(bodies, body, [step, going_on], carried, [])
    return [
        *carried,
        *(_stacked(fact, _trip_count(call, results[0]), 0, local) for fact in results[1 + len(carried) :]),
    ]


def _trip_count(call: Call, condition: Fact) -> Size | None:
    limit = call.sizes(0) if call.has(0) else None
    starts = not call.has(1) or call.numbers(1) == (1,)
    stays = condition.contents is not None and condition.contents.known == (1,)
    return d.as_dimension(d.maximum(limit[0], 0)) if limit and starts and stays else None


def infer_scan(bodies: Bodies, call: Call) -> list[Fact]:
    """Return what a Scan gives: states as far as the body keeps their dimensions, and what it stacks up."""
    if call.opset < FIRST_SCAN_WITHOUT_BATCH:
        return []
    body, scanned = _graph(call, "body"), call.integer("num_scan_inputs")
    states = len(call.inputs) - scanned
    axes = call.integers("scan_input_axes") or (0,) * scanned
    length: Size | None = None
    slices = []
    for fact, axis in zip(call.inputs[states:], axes, strict=True):
        dims = fact.dims if fact is not None else None
        rest: LooseDims | None = None
        if dims is not None:
            place = axis_of(axis, len(dims))
            length = dims[place] if not isinstance(length, int) else length
            rest = dims[:place] + dims[place + 1 :]
        slices.append(Fact(fact.dtype if fact is not None else None, rest))  # type: ignore[arg-type]
    carried = [_shape_of(fact) for fact in call.inputs[:states]]
    carried, results, local = _settled(bodies, body, [], carried, slices)
    stacked = results[states:]
    places = call.integers("scan_output_axes") or (0,) * len(stacked)
    return [*carried, *(_stacked(fact, length, axis, local) for fact, axis in zip(stacked, places, strict=True))]


def _settled(
    bodies: Bodies, body: ir.Graph, before: list[Fact], carried: list[Fact], behind: list[Fact]
) -> tuple[list[Fact], list[Fact], set[Atom]]:
    """Run a body until what it carries has the shapes it came with, taking back each dimension that changes."""
    skipped = len([fact for fact in before if fact.dtype is BOOL])  # the condition comes out, the counter does not
    for rounds in range(ROUNDS_LIMIT):
        results, local = bodies.body(body, [*before, *carried, *behind], repeated=True)
        came_out = results[skipped : skipped + len(carried)]
        general = [_general(one, other, local) for one, other in zip(carried, came_out, strict=True)]
        if all(one.dims == other.dims for one, other in zip(general, carried, strict=True)):
            return carried, results, local
        carried = general if rounds < ROUNDS_LIMIT - 2 else [Fact(fact.dtype, None) for fact in carried]
    raise ArithmeticError("the shapes a body carries do not settle")


def _shape_of(fact: Fact | None) -> Fact:
    return Fact(fact.dtype, fact.dims, other=fact.type) if fact is not None else Fact(None, None)


def _general(carried: Fact, came_out: Fact, local: set[Atom]) -> Fact:
    """Return what holds of a carried value before and after the body; None for a dimension that may change."""
    before, after = carried.dims, came_out.dims
    if before is None or after is None or len(before) != len(after):
        return Fact(carried.dtype, None, other=carried.type)
    dims = [one if one == other and _lasts(one, local) else None for one, other in zip(before, after, strict=True)]
    return Fact(carried.dtype, tuple(dims), other=carried.type)  # type: ignore[arg-type]


def _lasts(size: Size | None, local: set[Atom]) -> bool:
    """Return whether a size means the same outside a body."""
    return isinstance(size, int) or (size is not None and local.isdisjoint(size.unknowns))


def _stacked(fact: Fact, length: Size | None, axis: int, local: set[Atom]) -> Fact:
    if fact.dims is None:
        return Fact(fact.dtype, None)
    # Where a body never ran, runtimes give whatever they can tell of its outputs without running it, else zeros.
    ran = length is not None and d.at_least(length, 1)
    dims = [dim if ran and _lasts(dim, local) else None for dim in fact.dims]
    place = axis_of(axis, len(dims) + 1)
    return Fact(fact.dtype, (*dims[:place], length, *dims[place:]))  # type: ignore[arg-type]
