"""Transposes moved behind the operators they feed, to where they meet and cancel."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import onnx_ir as ir

from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.rewriter import let_go

from .renamed_axes import Perm, Renamed, renamed

# Each round removes a Transpose from every region that has one too many; what is left over waits for the next.
ROUNDS_LIMIT = 100


@dataclass(frozen=True)
class MoveTransposes(Pass):
    """Move Transposes behind the operators they feed, where they cancel and fewer of them are left."""

    name = "move-transposes"
    # Sums over renamed axes may be taken in another order.
    guarantee = Guarantee.EQUIVALENT
    edits: ClassVar[Mapping[str, str]] = {
        "sink-transposes": "f(Transpose(x)) = Transpose(f(x)), f over renamed axes, where fewer Transposes are left",
        "transpose-into-gemm": "Gemm(Transpose(x), w) = Gemm(x, w, transA flipped), and so for w and transB",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Move Transposes region by region, until no region is better off without."""
        for graph, opset in list(walk.every_graph_with_opset(model)):
            for node in list(graph):
                absorb_transposes(node, ctx)
            for _ in range(ROUNDS_LIMIT):
                if not _Graph(graph, opset).sink(ctx):
                    break


def absorb_transposes(gemm: ir.Node, ctx: Context) -> None:
    """Gemm(Transpose(x), w) = Gemm(x, w, transA flipped), and so for w and transB."""
    if not walk.is_onnx_op(gemm, "Gemm") or walk.has_references(gemm):
        return
    inputs, attributes, absorbed = list(gemm.inputs), dict(gemm.attributes), []
    for index, name in ((0, "transA"), (1, "transB")):
        value = gemm.inputs[index]
        node = value.producer() if value is not None else None
        if node is None or node.graph is not gemm.graph or not _is_plain_transpose(node) or _is_identity(_perm(node)):
            continue
        inputs[index] = node.inputs[0]
        attributes[name] = ir.AttrInt64(name, 1 - gemm.attributes.get_int(name, 0))
        absorbed.append(node)
    if not absorbed:
        return
    with ctx.rewriter.edit("transpose-into-gemm", gemm, *absorbed):
        made = ctx.rewriter.make("Gemm", inputs, attributes, sources=[gemm, *absorbed], name=gemm.name)
        if not ctx.agrees("transpose-into-gemm", [*absorbed, gemm], gemm.outputs, made.outputs, [made]):
            return
        ctx.rewriter.insert(made, before=gemm)
        ctx.rewriter.replace(gemm.outputs[0], made.outputs[0])
        for node in (gemm, *absorbed):
            if not walk.is_read(node):
                ctx.rewriter.erase(node)
        made.name = gemm.name


def _is_plain_transpose(node: ir.Node) -> bool:
    return walk.is_onnx_op(node, "Transpose") and not walk.has_references(node) and "perm" in node.attributes


def _perm(transpose: ir.Node) -> Perm:
    return tuple(transpose.attributes["perm"].as_ints())


def _is_identity(perm: Perm) -> bool:
    return perm == tuple(range(len(perm)))


@dataclass(eq=False)
class _Region:
    """Operators that can do without the Transposes before them, all connected.

    Attributes:
        nodes: The operators, in order.
        sources: The Transposes before them.
    """

    nodes: list[ir.Node] = field(default_factory=list)
    sources: dict[ir.Node, None] = field(default_factory=dict)


class _Graph:
    """The regions of one graph, as they are now.

    Args:
        graph: The graph.
        opset: The opset of the model.
    """

    def __init__(self, graph: ir.Graph | ir.Function, opset: int) -> None:
        self.perms: dict[ir.Value, Perm] = {}  # of values that are Transposes, or could be
        self.plans: dict[ir.Node, Renamed] = {}  # of operators that can do without, in order
        for node in graph:
            self._look_at(node, opset)
        self._trim()

    def _look_at(self, node: ir.Node, opset: int) -> None:
        if _is_plain_transpose(node):
            self.perms[node.outputs[0]] = _perm(node)
            return
        moved = self._moved(node)
        if not moved or len(set(moved.values())) > 1 or any(True for _ in walk.subgraphs(node)):
            return
        plan = renamed(node, next(iter(moved.values())), moved.keys(), opset)
        if plan is not None:
            self.plans[node] = plan
            self.perms.update(zip(node.outputs, plan.perms, strict=True))

    def _moved(self, node: ir.Node) -> dict[int, Perm]:
        """Return the permutations of the operands of an operator that are Transposes, or could be, by index."""
        perms = {index: self.perms.get(value, ()) for index, value in enumerate(node.inputs) if value is not None}
        return {index: perm for index, perm in perms.items() if not _is_identity(perm)}

    def _trim(self) -> None:
        """Let go of operators, the last ones first, whose Transposes would only be moved from before to behind them."""
        for node in reversed(list(self.plans)):
            readers = [use.node for value in node.outputs for use in value.uses()]
            if any(reader in self.plans for reader in readers):
                continue
            if self._gain_behind([node]) + self._cost_before(node) <= 0:
                del self.plans[node]
                for value in node.outputs:
                    del self.perms[value]

    def _cost_before(self, node: ir.Node) -> int:
        """Return how many Transposes there are before an operator only because it, or nothing but it, needs them."""
        cost = 0
        for value in dict.fromkeys(node.inputs[index] for index in self._moved(node)):
            assert value is not None, "what is moved is there"
            producer = value.producer()
            others = [use.node for use in value.uses() if use.node is not node]
            if producer in self.plans:
                cost += not self._is_read_in_place(value, others)
            else:
                cost += not value.is_graph_output() and all(other in self.plans for other in others)
        return cost

    def _is_read_in_place(self, value: ir.Value, readers: Iterable[ir.Node]) -> bool:
        """Return whether anything needs a value as it is, whatever becomes of the operators around it."""
        return value.is_graph_output() or not all(
            reader in self.plans or _is_plain_transpose(reader) for reader in readers
        )

    def _gain_behind(self, nodes: Iterable[ir.Node]) -> int:
        """Return how many Transposes behind some operators go, less those that come."""
        gain = 0
        for value in (value for node in nodes for value in node.outputs):
            perm, readers = self.perms[value], [use.node for use in value.uses()]
            for reader in dict.fromkeys(readers):
                gain += _is_plain_transpose(reader) and _is_identity(_composed(perm, reader))
            gain -= not _is_identity(perm) and self._is_read_in_place(value, readers)
        return gain

    def sink(self, ctx: Context) -> bool:
        """Move the Transposes of every region that is better off; return whether there was one."""
        touched: set[ir.Node] = set()
        sunk = False
        for region in self._regions():
            behind = set(self._transposes_behind(region))
            # What becomes of a Transpose is decided once a round.
            if self._gain(region) <= 0 or behind & set(region.sources) or touched & {*behind, *region.sources}:
                continue
            touched |= {*behind, *region.sources}
            sunk |= self._sink(region, ctx)
        return sunk

    def _gain(self, region: _Region) -> int:
        inside = set(region.nodes)
        freed = sum(
            not source.outputs[0].is_graph_output() and all(use.node in inside for use in source.outputs[0].uses())
            for source in region.sources
        )
        return freed + self._gain_behind(region.nodes)

    def _regions(self) -> Iterator[_Region]:
        """Yield operators that hang together by their values or by a Transpose before them."""
        region_of: dict[ir.Node, _Region] = {}
        for node in self.plans:
            before = [value.producer() for index in self._moved(node) if (value := node.inputs[index]) is not None]
            region = _Region([node])
            for neighbour in before:
                assert neighbour is not None, "what is moved comes from an operator"
                region = _merged(region, region_of.get(neighbour), region_of)
                if neighbour not in self.plans:
                    region.sources[neighbour] = None
                    region_of[neighbour] = region
            region_of[node] = region
        order = {node: place for place, node in enumerate(self.plans)}
        for region in dict.fromkeys(region_of.values()):
            region.nodes.sort(key=order.__getitem__)
            yield region

    def _transposes_behind(self, region: _Region) -> Iterator[ir.Node]:
        for node in region.nodes:
            for value in node.outputs:
                yield from (use.node for use in value.uses() if _is_plain_transpose(use.node))

    def _sink(self, region: _Region, ctx: Context) -> bool:
        """Compute a region without the Transposes before it, and put them behind it where they are needed."""
        with ctx.rewriter.edit("sink-transposes", *region.nodes, *region.sources):
            now: dict[ir.Value, ir.Value] = {source.outputs[0]: _source(source) for source in region.sources}
            constants: dict[ir.Value, ir.Node] = {}
            made = {node: _remake(node, self.plans[node], now, constants, ctx) for node in region.nodes}
            if not self._agrees(region, made, now, ctx):
                return False
            for constant, reader in constants.items():
                ctx.rewriter.adopt(constant, near=reader)
            for node, heir in made.items():
                ctx.rewriter.insert(heir, before=node)
            inside = set(region.nodes)
            for value in [value for node in region.nodes for value in node.outputs]:
                self._hand_over(value, now[value], inside, ctx)
            for node in [*reversed(region.nodes), *region.sources]:
                if node.graph is not None and not walk.is_read(node):
                    ctx.rewriter.erase(node)
            for node, heir in made.items():
                if node.graph is None and node.name:
                    heir.name = node.name
        return True

    def _agrees(
        self, region: _Region, made: Mapping[ir.Node, ir.Node], now: Mapping[ir.Value, ir.Value], ctx: Context
    ) -> bool:
        """Return whether a region, transposed behind instead of before, computes what it did, if that is checked."""
        if ctx.check_rewrite is None:
            return True
        inside = set(region.nodes)
        before = [value for node in region.nodes for value in node.outputs if _leaves(value, inside)]
        behind = [ctx.rewriter.make("Transpose", [now[value]], {"perm": list(self.perms[value])}) for value in before]
        after = [transpose.outputs[0] for transpose in behind]
        nodes = [*region.sources, *region.nodes]
        if not ctx.agrees("sink-transposes", nodes, before, after, [*made.values(), *behind]):
            return False
        for transpose in behind:
            let_go(transpose)
        return True

    def _hand_over(self, old: ir.Value, new: ir.Value, inside: Container[ir.Node], ctx: Context) -> None:
        """Let the readers of a value outside its region read the new one, transposed where they need it."""
        perm = self.perms[old]
        for reader in dict.fromkeys(use.node for use in old.uses()):
            if _is_plain_transpose(reader):
                self._merge(reader, perm, new, ctx)
        if not (old.is_graph_output() or any(use.node not in inside for use in old.uses())):
            return
        if _is_identity(perm):
            ctx.rewriter.replace(old, new)
            return
        producer = new.producer()
        assert producer is not None, "an operator made it"
        transpose = ctx.rewriter.make("Transpose", [new], {"perm": list(perm)}, sources=[producer])
        ctx.rewriter.insert_after(transpose, producer)
        ctx.rewriter.replace(old, transpose.outputs[0])

    def _merge(self, transpose: ir.Node, perm: Perm, new: ir.Value, ctx: Context) -> None:
        """Let a Transpose behind a region take in the one that would come before it."""
        composed = _composed(perm, transpose)
        if not _is_identity(composed):
            ctx.rewriter.set_attribute(transpose, "perm", list(composed))
            ctx.rewriter.set_input(transpose, 0, new)
            return
        ctx.rewriter.replace(transpose.outputs[0], new)
        ctx.rewriter.erase(transpose)


def _source(transpose: ir.Node) -> ir.Value:
    value = transpose.inputs[0]
    assert value is not None, "a Transpose has an input"
    return value


def _composed(perm: Perm, transpose: ir.Node) -> Perm:
    """Return the permutation of one Transpose and another behind it."""
    return tuple(perm[axis] for axis in _perm(transpose))


def _merged(one: _Region, other: _Region | None, region_of: dict[ir.Node, _Region]) -> _Region:
    """Return one region of two; the smaller is added to the larger."""
    if other is None or other is one:
        return one
    large, small = (one, other) if len(one.nodes) > len(other.nodes) else (other, one)
    large.nodes += small.nodes
    large.sources |= small.sources
    for node in (*small.nodes, *small.sources):
        region_of[node] = large
    return large


def _leaves(value: ir.Value, inside: Container[ir.Node]) -> bool:
    """Return whether anything but some nodes reads a value."""
    return value.is_graph_output() or any(use.node not in inside for use in value.uses())


def _remake(
    node: ir.Node,
    plan: Renamed,
    now: dict[ir.Value, ir.Value],
    constants: dict[ir.Value, ir.Node],
    ctx: Context,
) -> ir.Node:
    """Make an operator like another, over renamed axes; its outputs join ``now``, what it reads anew ``constants``."""
    inputs = [now.get(value, value) if value is not None else None for value in node.inputs]
    for index, content in plan.constants.items():
        inputs += [None] * (index + 1 - len(inputs))
        old = node.inputs[index] if index < len(node.inputs) else None
        base = old.name if old is not None and old.name else f"{node.name or node.op_type}_{index}"
        constant = ctx.rewriter.make_const(content, base)
        constants[constant] = node
        inputs[index] = constant
    attributes = {**node.attributes, **plan.attributes}
    outputs = len(node.outputs)
    made = ctx.rewriter.make(
        node.op_type, inputs, attributes, sources=[node], outputs=outputs, domain=node.domain, name=node.name
    )
    now.update(zip(node.outputs, made.outputs, strict=True))
    return made
