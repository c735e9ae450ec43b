"""Control flow that is known before the run: branches, bodies and conditions that need no If, Loop or Scan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from graphopt import shapes, walk
from graphopt.authoring import Context, Guarantee, Pass

from ..analyses.sameness import Keys
from .dissolving import can_dissolve, dissolve

# From here on the axes of Squeeze and Unsqueeze are an input.
_FIRST_OPSET_WITH_AXES_AS_INPUT = 13
# Before opset 9 a Scan had a batch axis, and an input for the lengths of its sequences.
_FIRST_OPSET_WITH_PLAIN_SCAN = 9

# Values known to be true or false where one stands: the conditions of the branches around.
Truths = Mapping[ir.Value, bool]


@dataclass(frozen=True)
class ControlFlow(Pass):
    """Dissolve If, Loop and Scan where it is known which way they go."""

    name = "control-flow"
    guarantee = Guarantee.EXACT
    edits: ClassVar[Mapping[str, str]] = {
        "constant-if": "an If whose condition is known is the branch it takes",
        "equal-branches": "an If whose branches compute the same is either of them",
        "negated-condition": "If(Not(c)) = If(c) with its branches exchanged",
        "loop-never": "a Loop that never goes round gives what it was given, and collects nothing",
        "loop-once": "a Loop or Scan that goes round once is its body",
    }

    def run(self, model: ir.Model, ctx: Context) -> None:
        """Visit inner graphs before outer ones, again and again while anything changes."""
        roots: list[ir.Graph | ir.Function] = [model.graph, *model.functions.values()]
        while True:
            edits, kept = ctx.rewriter.edits, dict[ir.Node, str]()
            keys = Keys.of(model)
            for graph in roots:
                _Dissolver(ctx, keys, walk.imported(graph.opset_imports), kept).visit(graph, {})
            if ctx.rewriter.edits == edits:
                break
        for node, why in kept.items():
            ctx.left(why, node)


@dataclass(frozen=True)
class _Dissolver:
    """Visits one graph and those nested in it; ``kept`` is what was left as it was, and why."""

    ctx: Context
    keys: Keys
    opset: int
    kept: dict[ir.Node, str]

    def visit(self, graph: ir.Graph | ir.Function, truths: Truths) -> None:
        for node in list(graph):
            if walk.is_onnx_op(node, "If") and not walk.has_references(node):
                then_branch, else_branch = _branches(node)
                condition = node.inputs[0]
                assert condition is not None, "an If has a condition"
                self.visit(then_branch, {**truths, condition: True})
                self.visit(else_branch, {**truths, condition: False})
                self._simplify_if(node, then_branch, else_branch, truths)
                continue
            for inner in walk.subgraphs(node):
                self.visit(inner, truths)
            if not _is_whole(node):
                continue
            if node.op_type == "Loop":
                self._simplify_loop(node, truths)
            elif self.opset >= _FIRST_OPSET_WITH_PLAIN_SCAN:
                self._simplify_scan(node)

    def _simplify_if(self, node: ir.Node, then_branch: ir.Graph, else_branch: ir.Graph, truths: Truths) -> None:
        taken = _truth(node.inputs[0], truths)
        if taken is not None:
            with self.ctx.rewriter.edit("constant-if", node):
                dissolve(node, then_branch if taken else else_branch, self.ctx)
            return
        key = self.keys.of_graph(then_branch, self.opset)
        if key is not None and key == self.keys.of_graph(else_branch, self.opset):
            with self.ctx.rewriter.edit("equal-branches", node):
                dissolve(node, then_branch, self.ctx)
            return
        negation = node.inputs[0].producer() if node.inputs[0] is not None else None
        if negation is not None and walk.is_onnx_op(negation, "Not"):
            with self.ctx.rewriter.edit("negated-condition", node, negation):
                self.ctx.rewriter.set_input(node, 0, negation.inputs[0])
                self.ctx.rewriter.set_attribute(node, "then_branch", else_branch)
                self.ctx.rewriter.set_attribute(node, "else_branch", then_branch)

    def _simplify_loop(self, node: ir.Node, truths: Truths) -> None:
        body = node.attributes["body"].as_graph()
        rounds = _rounds(node, body, truths)
        if rounds == 0:
            self._skip_loop(node, body)
        if rounds != 1:
            return
        given = dict(zip(body.inputs[2:], node.inputs[2:], strict=True))
        if not can_dissolve(body, given):
            self.kept[node] = "a Loop that goes round once is kept: its body contradicts what it is given"
            return
        with self.ctx.rewriter.edit("loop-once", node):
            for port, content in zip(body.inputs[:2], (np.int64(0), np.bool_(True)), strict=True):
                if _is_read(port):
                    # A runtime hands them over in the rank that the body declares.
                    rank = len(port.shape) if port.shape is not None else 0
                    array = np.reshape(content, (1,) * rank)
                    given[port] = self.ctx.rewriter.const(array, port.name or "iteration", near=node)
            dissolve(node, body, self.ctx, arguments=_present(given), finish=lambda values: self._stacked(node, values))

    def _stacked(self, node: ir.Node, values: list[ir.Value]) -> list[ir.Value]:
        """Return what a Loop gives after one iteration: its values, and what it collects with an axis more."""
        states = len(node.inputs) - 2
        collected = zip(values[1 + states :], node.outputs[states:], strict=True)
        return values[1 : 1 + states] + [self._unsqueezed(value, 0, node, port) for value, port in collected]

    def _skip_loop(self, node: ir.Node, body: ir.Graph) -> None:
        states = max(len(node.inputs) - 2, 0)
        collected = list(zip(node.outputs[states:], body.outputs[1 + states :], strict=True))
        empty = {port: _nothing_of(port, value) for port, value in collected if _is_read(port)}
        if None in empty.values():
            self.kept[node] = "a Loop that never goes round is kept: the shape of what it collects is unknown"
            return
        with self.ctx.rewriter.edit("loop-never", node):
            for port, value in zip(node.outputs[:states], node.inputs[2:], strict=True):
                if value is not None and _is_read(port):
                    self.ctx.rewriter.replace(port, value)
            for port, tensor in empty.items():
                if tensor is not None:
                    nothing = self.ctx.rewriter.const(tensor, f"{port.name}_empty", near=node)
                    self.ctx.rewriter.replace(port, nothing)
            self.ctx.rewriter.erase(node)

    def _simplify_scan(self, node: ir.Node) -> None:
        """Dissolve a Scan over one element."""
        body = node.attributes["body"].as_graph()
        elements = node.attributes["num_scan_inputs"].as_int()
        states = len(node.inputs) - elements
        axes_in = _axes(node, "scan_input_axes", elements)
        axes_out = _axes(node, "scan_output_axes", len(node.outputs) - states)
        if not any(_size(value, axis) == 1 for value, axis in zip(node.inputs[states:], axes_in, strict=True)):
            return
        given: dict[ir.Value, ir.Value | None] = dict(zip(body.inputs, node.inputs, strict=True))
        if not can_dissolve(body, given):
            self.kept[node] = "a Scan over one element is kept: its body contradicts what it is given"
            return

        def finish(values: list[ir.Value]) -> list[ir.Value]:
            collected = zip(values[states:], axes_out, node.outputs[states:], strict=True)
            return values[:states] + [self._unsqueezed(v, axis, node, port) for v, axis, port in collected]

        with self.ctx.rewriter.edit("loop-once", node):
            for port, value, axis in zip(body.inputs[states:], node.inputs[states:], axes_in, strict=True):
                if value is not None and _is_read(port):
                    given[port] = self._with_axes("Squeeze", value, axis, node)
            dissolve(node, body, self.ctx, arguments=_present(given), finish=finish)

    def _unsqueezed(self, value: ir.Value, axis: int, node: ir.Node, port: ir.Value) -> ir.Value:
        return self._with_axes("Unsqueeze", value, axis, node) if _is_read(port) else value

    def _with_axes(self, op_type: str, value: ir.Value, axis: int, node: ir.Node) -> ir.Value:
        """Return a value with an axis more or less, computed right before a node."""
        inputs, attributes = [value], {}
        if self.opset >= _FIRST_OPSET_WITH_AXES_AS_INPUT:
            inputs.append(self.ctx.rewriter.const(np.array([axis], np.int64), "axes", near=node))
        else:
            attributes["axes"] = [axis]
        made = self.ctx.rewriter.make(op_type, inputs, attributes, sources=[node])
        return self.ctx.rewriter.insert(made, before=node).outputs[0]


def _branches(node: ir.Node) -> tuple[ir.Graph, ir.Graph]:
    return node.attributes["then_branch"].as_graph(), node.attributes["else_branch"].as_graph()


def _is_whole(node: ir.Node) -> bool:
    """Return whether a node is a Loop or Scan that gives its body as many inputs as that has, and none left out."""
    if not walk.is_onnx_op(node, "Loop", "Scan") or walk.has_references(node):
        return False
    body = node.attributes["body"].as_graph()
    lead = 2 if node.op_type == "Loop" else 0
    given = node.inputs[lead:]
    fits = len(body.inputs) == lead + len(given) and len(body.outputs) == len(node.outputs) + lead // 2
    return fits and None not in given


def _truth(value: ir.Value | None, truths: Truths) -> bool | None:
    """Return whether a condition holds, where that is known."""
    if value is not None and value in truths:
        return truths[value]
    tensor = walk.constant_tensor(value)
    return bool(tensor.numpy().reshape(-1)[0]) if tensor is not None and tensor.size == 1 else None


def _rounds(node: ir.Node, body: ir.Graph, truths: Truths) -> int | None:
    """Return how often a Loop goes round where that is known to be never or once, else None."""
    limit_value, condition = (*node.inputs[:2], None, None)[:2]
    limit = walk.constant_tensor(limit_value)
    most = int(limit.numpy().reshape(-1)[0]) if limit is not None and limit.size == 1 else None
    starts = True if condition is None else _truth(condition, truths)
    if (most is not None and most <= 0) or starts is False:
        return 0
    if not starts:
        return None
    stops = _truth(body.outputs[0], truths) is False
    at_least_once = limit_value is None or most is not None
    return 1 if most == 1 or (stops and at_least_once) else None


def _nothing_of(port: ir.Value, element: ir.Value) -> ir.TensorProtocol | None:
    """Return what a Loop collects in no iteration: no elements, of the shape they would have."""
    dims, dtype = shapes.static_shape(element), element.dtype or port.dtype
    if dims is None and port.shape is not None and all(isinstance(dim, int) for dim in port.shape[1:]):
        dims = tuple(int(dim) for dim in port.shape[1:])  # type: ignore[arg-type]
    if dims is None or dtype is None:
        return None
    if dtype == ir.DataType.STRING:
        return ir.StringTensor([], shape=ir.Shape((0, *dims)))
    return ir.tensor(np.zeros((0, *dims), dtype.numpy()), dtype=dtype)


def _axes(node: ir.Node, name: str, count: int) -> Sequence[int]:
    attribute = node.attributes.get(name)
    return attribute.as_ints() if attribute is not None else [0] * count


def _size(value: ir.Value | None, axis: int) -> object:
    if value is None or value.shape is None or not -len(value.shape) <= axis < len(value.shape):
        return None
    return value.shape[axis]


def _present(given: Mapping[ir.Value, ir.Value | None]) -> dict[ir.Value, ir.Value]:
    return {port: value for port, value in given.items() if value is not None and _is_read(port)}


def _is_read(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()
