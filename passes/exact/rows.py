"""Rows: what treats the rows of a stack of matrices each by itself, done to one matrix of them all."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass
from graphopt.rewriter import let_go
from graphopt.shape_rules.shape_facts import Dims

from .arguments import rank_of
from .row_operators import RowWise, row_wise, told

_VIEWS = ("Flatten", "Reshape", "Squeeze", "Unsqueeze")
# Trimming from both ends settles in two rounds or three.
TRIMMING_ROUNDS = 4
# A region at the edge of another may be better off once that is flat.
ROUNDS_LIMIT = 10


@dataclass(frozen=True)
class FlattenRows(Pass):
    """Compute on one matrix what is done row by row, where this saves Reshapes or lets MatMul and Add be a Gemm."""

    name = "flatten-rows"
    # Products and sums may be taken in another order.
    guarantee = Guarantee.EQUIVALENT
    edits: ClassVar[Mapping[str, str]] = {
        "flatten-rows": "f(x) = Reshape(f(Reshape(x))), all axes but the last made one, for an f that treats each row "
        "by itself; where Reshapes meet and cancel, or MatMul and Add of matrices become a Gemm"
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Flatten region by region, until no region is better off with matrices."""
        has_gemm = "Gemm" in ctx.target.fast_ops
        for graph, opset in list(walk.every_graph_with_opset(model)):
            for _ in range(ROUNDS_LIMIT):
                edits = ctx.rewriter.edits
                _Graph(graph, opset, has_gemm).flatten(ctx)
                if ctx.rewriter.edits == edits:
                    break


class _Graph:
    """The row-wise operators of one graph that are better off with matrices.

    Args:
        graph: The graph.
        opset: The opset of the model.
        has_gemm: Whether MatMul and Add of matrices will be one operator.
    """

    def __init__(self, graph: ir.Graph | ir.Function, opset: int, has_gemm: bool) -> None:
        plans = ((node, row_wise(node, opset)) for node in graph)
        self.plans = {node: plan for node, plan in plans if plan is not None}
        self.inside = set(self.plans)
        self.has_gemm = has_gemm
        self._trim()

    def _rows(self, node: ir.Node) -> list[ir.Value]:
        """Return the operands of an operator that become matrices, each once."""
        values = (node.inputs[index] for index in self.plans[node].rows)
        return list(dict.fromkeys(value for value in values if value is not None))

    def _trim(self) -> None:
        """Let go of operators at either end that have no use for matrices."""
        for _ in range(TRIMMING_ROUNDS):
            before = len(self.inside)
            for node in self.plans:
                if node in self.inside and not any(value.producer() in self.inside for value in self._rows(node)):
                    self._let_go_if_useless(node)
            for node in reversed(list(self.plans)):
                if node in self.inside and not any(
                    use.node in self.inside for value in node.outputs for use in value.uses()
                ):
                    self._let_go_if_useless(node)
            if len(self.inside) == before:
                return

    def _let_go_if_useless(self, node: ir.Node) -> None:
        around = [*self._rows(node), *node.outputs]
        products = [node, *(value.producer() for value in self._rows(node))]
        kept = self._cost(around, products)
        self.inside.discard(node)
        if self._cost(around, products) > kept:
            self.inside.add(node)

    def _cost(self, values: Iterable[ir.Value], products: Iterable[ir.Node | None]) -> int:
        """Return how many operators come, less those that go, at some values and some matrix products."""
        saved = sum(self._becomes_gemm(node) for node in products if node is not None)
        return sum(self._cost_at(value) for value in dict.fromkeys(values)) - saved

    def _cost_at(self, value: ir.Value) -> int:
        readers = list(dict.fromkeys(use.node for use in value.uses()))
        views = [node for node in readers if node not in self.inside and _is_told_view(node)]
        rows = [node for node in readers if node in self.inside and value in self._rows(node)]
        others = value.is_graph_output() or len(views) + len(rows) < len(readers)
        producer = value.producer()
        if producer in self.inside:
            return int(others) - sum(shapes.dims_of(view.outputs[0]) == _flat(value) for view in views)
        if not rows:
            return 0
        if producer is None or not _is_view(producer):
            return 1
        is_flat_before = shapes.dims_of(producer.inputs[0]) == _flat(value)
        return int(others or bool(views)) - is_flat_before

    def _becomes_gemm(self, node: ir.Node) -> bool:
        """Return whether a MatMul is one that an Add of a bias follows, and nothing else does."""
        if not self.has_gemm or node.op_type != "MatMul" or node not in self.inside:
            return False
        uses = list(node.outputs[0].uses())
        if len(uses) != 1 or node.outputs[0].is_graph_output():
            return False
        add = uses[0].node
        return add.op_type == "Add" and add in self.inside and any(rank_of(value) == 1 for value in add.inputs)

    def flatten(self, ctx: Context) -> None:
        """Compute every region on matrices that is better off."""
        for region in self._regions():
            values = [value for node in region for value in (*self._rows(node), *node.outputs)]
            # With known sizes runtimes make the same Gemms themselves; with others they do not, and are faster without.
            if not all(shapes.static_shape(value) is not None for value in values):
                continue
            if self._cost(values, region) < 0:
                self._flatten(region, ctx)

    def _regions(self) -> Iterator[list[ir.Node]]:
        """Yield operators that hang together by their values, in the order of the graph."""
        region_of: dict[ir.Value, list[ir.Node]] = {}
        order = {node: place for place, node in enumerate(self.plans) if node in self.inside}
        for node in order:
            region = [node]
            for value in (*self._rows(node), *node.outputs):
                other = region_of.get(value, region)
                if other is not region:
                    large, small = (other, region) if len(other) > len(region) else (region, other)
                    large += small
                    region_of.update((known, large) for one in small for known in (*self._rows(one), *one.outputs))
                    region = large
                region_of[value] = region
        found = {id(region): region for region in region_of.values()}
        for region in found.values():
            yield sorted(region, key=order.__getitem__)

    def _flatten(self, region: Sequence[ir.Node], ctx: Context) -> None:
        with ctx.rewriter.edit("flatten-rows", *region):
            _Flattening(region, self.plans, ctx).run()


def _flat(value: ir.Value) -> Dims | None:
    """Return the shape of a value when its leading axes are one."""
    dims = shapes.dims_of(value)
    if dims is None:
        return None
    rows = dims[0]
    for size in dims[1:-1]:
        rows = rows * size
    return (rows, dims[-1])


def _is_view(node: ir.Node) -> bool:
    return walk.is_onnx_op(node, *_VIEWS) and not walk.has_references(node) and node.inputs[0] is not None


def _is_told_view(node: ir.Node) -> bool:
    """Return whether a Reshape that is told a constant shape can take the place of a node, whatever view it reads."""
    dims = shapes.dims_of(node.outputs[0]) if node.outputs else None
    return _is_view(node) and dims is not None and told(dims) is not None


class _Flattening:
    """One region, rewritten.

    Args:
        region: Its operators, in order.
        plans: What each becomes.
        ctx: The context.
    """

    def __init__(self, region: Sequence[ir.Node], plans: Mapping[ir.Node, RowWise], ctx: Context) -> None:
        self.region, self.plans, self.ctx = region, plans, ctx
        self.inside = set(region)
        self.now: dict[ir.Value, ir.Value] = {}
        self.made: list[tuple[ir.Node, ir.Node]] = []  # (new operator, the one to put it before)
        self.constants: dict[tuple[int, ...], ir.Value] = {}

    def run(self) -> None:
        for node in self.region:
            self._remake(node)
        if not self._agrees():
            return
        for constant in self.constants.values():
            self.ctx.rewriter.adopt(constant, near=self.region[0])
        for made, place in self.made:
            self.ctx.rewriter.insert(made, before=place)
        views = [
            producer
            for value in self.now
            if (producer := value.producer()) is not None and producer not in self.inside and _is_view(producer)
        ]
        for value in [value for node in self.region for value in node.outputs]:
            self._hand_over(value, self.now[value])
        for node in [*reversed(self.region), *views]:
            if node.graph is not None and not walk.is_read(node):
                self.ctx.rewriter.erase(node)
        for made, place in self.made:
            if place.graph is None and place.name and made.op_type == place.op_type:
                made.name = place.name

    def _remake(self, node: ir.Node) -> None:
        """Make an operator on matrices, and the Reshapes of what comes from outside."""
        plan = self.plans[node]
        inputs = list(node.inputs)
        for index in plan.rows:
            value = inputs[index]
            assert value is not None, "rows are there"
            if value not in self.now:
                self.now[value] = self._enter(value, node)
            inputs[index] = self.now[value]
        for index, content in plan.constants.items():
            inputs[index] = self._constant(
                tuple(content.tolist()), f"{node.name or node.op_type}_{index}", content.dtype
            )
        attributes = {**node.attributes, **plan.attributes}
        made = self.ctx.rewriter.make(
            node.op_type, inputs, attributes, sources=[node], outputs=len(node.outputs), name=node.name
        )
        self.made.append((made, node))
        self.now.update(zip(node.outputs, made.outputs, strict=True))

    def _enter(self, value: ir.Value, reader: ir.Node) -> ir.Value:
        """Return a value from outside as a matrix."""
        flat, producer = _flat(value), value.producer()
        assert flat is not None, "it has rows"
        source = producer.inputs[0] if producer is not None and _is_view(producer) else value
        assert source is not None, "a view has an input"
        return source if shapes.dims_of(source) == flat else self._reshaped(source, flat, reader, reader)

    def _reshaped(self, value: ir.Value, dims: Dims, origin: ir.Node, place: ir.Node) -> ir.Value:
        sizes = told(dims)
        assert sizes is not None, "it was asked before"
        shape = self._constant(tuple(sizes), f"{origin.name or origin.op_type}_shape", np.dtype(np.int64))
        made = self.ctx.rewriter.make(
            "Reshape", [value, shape], sources=[origin], name=f"{origin.name or 'rows'}_reshape"
        )
        self.made.append((made, place))
        return made.outputs[0]

    def _constant(self, numbers: tuple[int, ...], name: str, dtype: np.dtype[Any]) -> ir.Value:
        key = (*numbers, -dtype.itemsize)
        if key not in self.constants:
            self.constants[key] = self.ctx.rewriter.make_const(np.array(numbers, dtype), name)
        return self.constants[key]

    def _agrees(self) -> bool:
        """Return whether the region computes what it did, if that is checked."""
        if self.ctx.check_rewrite is None:
            return True
        values = [value for node in self.region for value in node.outputs]
        before = [v for v in values if v.is_graph_output() or any(use.node not in self.inside for use in v.uses())]
        kept = list(self.made)
        after = [self._reshaped(self.now[v], shapes.dims_of(v) or (), self.region[0], self.region[0]) for v in before]
        entering = [value.producer() for value in self.now if value.producer() not in self.inside]
        nodes = [*(node for node in dict.fromkeys(entering) if node is not None and _is_view(node)), *self.region]
        if not self.ctx.agrees("flatten-rows", nodes, before, after, [made for made, _ in self.made]):
            return False
        for made, _ in self.made[len(kept) :]:
            let_go(made)
        self.made = kept
        return True

    def _hand_over(self, old: ir.Value, new: ir.Value) -> None:
        """Let the readers of a value outside the region read the matrix, as they need it."""
        for view in dict.fromkeys(use.node for use in old.uses()):
            if view not in self.inside and _is_told_view(view):
                self._redirect(view, new)
        if not (old.is_graph_output() or any(use.node not in self.inside for use in old.uses())):
            return
        producer, dims = new.producer(), shapes.dims_of(old)
        assert producer is not None, "an operator made it"
        assert dims is not None, "it has rows"
        self.ctx.rewriter.replace(old, self._insert_reshaped(new, dims, producer))

    def _redirect(self, view: ir.Node, new: ir.Value) -> None:
        """Let a view look at the matrix."""
        dims = shapes.dims_of(view.outputs[0])
        assert dims is not None, "it is told"
        result = new if dims == shapes.dims_of(new) else self._insert_reshaped(new, dims, view)
        self.ctx.rewriter.replace(view.outputs[0], result)
        self.ctx.rewriter.erase(view)

    def _insert_reshaped(self, value: ir.Value, dims: Dims, near: ir.Node) -> ir.Value:
        """Insert a Reshape: in the place of a view, or behind the operator that made the value."""
        sizes = told(dims)
        assert sizes is not None, "it was asked before"
        shape = self.ctx.rewriter.const(np.array(sizes, np.int64), f"{near.name or near.op_type}_shape", near=near)
        made = self.ctx.rewriter.make("Reshape", [value, shape], sources=[near], name=near.name)
        if value.producer() is near:
            self.ctx.rewriter.insert_after(made, near)
        else:
            self.ctx.rewriter.insert(made, before=near)
        return made.outputs[0]
