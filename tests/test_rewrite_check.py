"""Rewrites checked by themselves: a wrong one is left out, the others still apply, and the run says so."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry, shapes, walk
from graphopt.authoring import Context, Guarantee, Pass, RewritePass
from graphopt.errors import VerificationError
from graphopt.pattern import Match, Rule
from graphopt.rewrite_check import Proposal, RewriteChecker, feeds
from graphopt.target import Target

from .pass_runs import PassRun, loaded, run_passes


class Becomes(Rule):
    """One operator of one operand for another."""

    def __init__(self, old: str, new: str) -> None:
        self.name = f"{old.lower()}-to-{new.lower()}"
        self.old, self.new = old, new

    def pattern(self, op: Any, x: Any) -> Any:
        return getattr(op, self.old)(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return getattr(op, self.new)(m.x)


def rewriting(*rules: Rule) -> RewritePass:
    @dataclass(frozen=True)
    class Rewriting(RewritePass):
        name = "rewriting"

        def rules(self, target: Target) -> Sequence[Rule]:
            return rules

    return Rewriting()


def parsed(text: str, opset: int = 18) -> ir.Model:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["" : {opset}, "local" : 1]> {text}')
    return loaded(onnx.shape_inference.infer_shapes(proto))


def checked(text: str, one: Pass) -> PassRun:
    return run_passes(parsed(text), one, check_rewrites=True)


def operators(run: PassRun) -> list[str]:
    return [node.op_type for node in walk.every_node(run.model)]


SEVERAL = """
g (float[4] x) => (float[4] y) {
  [first] a = Abs(x) [second] b = Neg(a) [third] c = Abs(b) [fourth] y = Neg(c)
}
"""


class NegByMul(Rule):
    """-x = x · (-1)."""

    name = "neg-by-mul"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Mul(m.x, op.const(np.array(-1, np.float32), "minus_one"))


def test_a_wrong_rewrite_is_left_out_and_the_others_apply() -> None:
    run = checked(SEVERAL, rewriting(Becomes("Abs", "Relu"), NegByMul()))
    assert operators(run) == ["Abs", "Mul", "Abs", "Mul"]
    refused = run.records[0].refused
    assert [(one.rule, one.nodes, one.origins) for one in refused] == [
        ("abs-to-relu", ("first",), ("first",)),
        ("abs-to-relu", ("third",), ("third",)),
    ]
    assert all(one.why.startswith("changes the outputs by ") for one in refused)
    assert {edit.rule for edit in run.edits} == {"neg-by-mul"}
    assert "2 rewrites checked by themselves, 0 not" in run.remarks


def test_what_a_refused_rewrite_made_is_gone() -> None:
    run = checked(SEVERAL, rewriting(Becomes("Abs", "Relu")))
    assert not run.edits
    for node in walk.every_node(run.model):
        for value in (*node.inputs, *node.outputs):
            assert value is None or all(use.node.graph is not None for use in value.uses())


def test_a_refused_rewrite_is_told_once_whatever_the_rounds() -> None:
    from graphopt import pipeline

    step = pipeline.Step("pair", (rewriting(Becomes("Abs", "Relu")), rewriting(NegByMul())), preset=True)
    run = checked(SEVERAL, pipeline.Pipeline((step,)))
    assert run.records[0].passes[0].rounds == 4  # two of each
    assert len(run.records[0].refused) == 2


def test_strict_stops_at_the_first() -> None:
    one = rewriting(Becomes("Abs", "Relu"), NegByMul())
    with pytest.raises(VerificationError, match=r"rule `abs-to-relu` .* changes the outputs by .* first"):
        graphopt.optimize(parsed(SEVERAL), one, verify="rewrites", strict=True)


def test_the_report_lists_what_was_refused(tmp_path: Path) -> None:
    result = graphopt.optimize(
        parsed(SEVERAL), rewriting(Becomes("Abs", "Relu"), NegByMul()), verify="rewrites", reproducers=tmp_path
    )
    refused = json.loads(result.report.to_json())["steps"][0]["refused"]
    assert [one["nodes"] for one in refused] == [["first"], ["third"]]
    assert refused[0]["pass"] == "rewriting"
    # One folder a rule is enough to see what is wrong.
    assert [one["reproducer"] for one in refused] == [str(tmp_path / "graphopt-reproducer-rewriting-1"), None]
    assert result.report.ok


# Procedural passes


def merging(how: str) -> Pass:
    """Return a pass that lets readers of the node `second` read what `how` says instead, if that is the same."""

    @dataclass(frozen=True)
    class Merging(Pass):
        name = "merging"
        guarantee = Guarantee.EXACT

        def run(self, model: ir.Model, ctx: Context) -> None:
            nodes = {node.name: node for node in walk.every_node(model)}
            node = nodes["second"]
            made = ctx.rewriter.make("Relu", [node.inputs[0]], sources=[node]) if how == "made" else None
            other = made if made is not None else nodes[how]
            if not ctx.agrees("merge", [node], node.outputs, other.outputs, [other]):
                return
            with ctx.rewriter.edit("merge", node):
                if other.graph is None:
                    ctx.rewriter.insert(other, before=node)
                ctx.rewriter.replace(node.outputs[0], other.outputs[0])
                ctx.rewriter.erase(node)

    return Merging()


PROCEDURAL = """
g (float[4] x) => (float[4] y) {
  [first] a = Relu(x) [wrong] b = Abs(x) [second] c = Relu(x) d = Add(a, b) y = Add(c, d)
}
"""


@pytest.mark.parametrize(("how", "edits"), [("first", 1), ("wrong", 0), ("made", 1)])
def test_procedural_passes_ask_too(how: str, edits: int) -> None:
    run = checked(PROCEDURAL, merging(how))
    assert len(run.edits) == edits
    assert len(run.records[0].refused) == 1 - edits


def test_edits_nobody_asked_about_are_told() -> None:
    @dataclass(frozen=True)
    class Silent(Pass):
        name = "silent"
        guarantee = Guarantee.EXACT

        def run(self, model: ir.Model, ctx: Context) -> None:
            ctx.rewriter.set_attribute(model.graph[0], "nothing", 1)

    assert checked(PROCEDURAL, Silent()).remarks == ["edits of kinds that are not checked by themselves: 1"]


def test_random_results_say_nothing_of_a_rewrite() -> None:
    text = "g (float[4] x) => (float[4] y) { r = RandomUniformLike(x) [abs] a = Abs(r) y = Neg(a) }"

    class Shortened(Rule):
        name = "shortened"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Abs(op.RandomUniformLike(x))

        def rewrite(self, op: Any, m: Match) -> Any:
            return op.RandomUniformLike(m.x)

    run = checked(text, rewriting(Shortened()))
    assert not run.records[0].refused
    assert "shortened not checked by itself 1×: the results differ from run to run" in run.remarks


def test_what_is_in_the_graph_stays_when_refused() -> None:
    run = checked(PROCEDURAL, merging("wrong"))
    assert operators(run) == ["Relu", "Abs", "Relu", "Add", "Add"]
    assert next(node for node in walk.every_node(run.model) if node.name == "wrong").inputs[0] is not None


# What can be run apart


NESTED = """
g (float[4] x, bool c) => (float[4] y) <float[4] w = {1, -2, 3, -4}> {
  a = Neg(x)
  [if] y = If(c) <
    then_branch = t () => (float[4] p) { m = Mul(a, w) [inner] p = Abs(m) },
    else_branch = e () => (float[4] q) { q = Add(a, x) }
  >
}
"""


def proposal(model: ir.Model, change: str, value: Any) -> tuple[Proposal, ir.Node]:
    """Propose the node `if` for a copy of itself in which a node has another operator."""
    clone = model.clone()
    old, new = (next(n for n in m.graph if n.name == "if") for m in (model, clone))
    for node in walk.nodes_within(new):
        if node.op_type == change:
            node.op_type = value
        for index, read in enumerate(node.inputs):
            outer = next((v for v in _values(model) if read is not None and v.name == read.name), None)
            if outer is not None:
                node.replace_input_with(index, outer)
    new.replace_input_with(0, old.inputs[0])
    return Proposal(model, "test", "swap", (old,), tuple(old.outputs), tuple(new.outputs), (new,)), new


def _values(model: ir.Model) -> list[ir.Value]:
    return [*model.graph.inputs, *model.graph.initializers.values(), *(v for n in model.graph for v in n.outputs)]


@pytest.mark.parametrize(
    ("change", "value", "same"), [("Abs", "Abs", True), ("Abs", "Relu", False), ("Add", "Sub", False)]
)
def test_nested_graphs_run_apart_with_what_they_capture(change: str, value: str, same: bool) -> None:
    verdict = RewriteChecker(registry.backend("onnxruntime"))(proposal(parsed(NESTED), change, value)[0])
    assert verdict.unchecked is None
    assert (verdict.refusal is None) == same


def test_a_rewrite_inside_a_nested_graph_is_checked() -> None:
    run = checked(NESTED, rewriting(Becomes("Abs", "Relu"), NegByMul()))
    assert [one.nodes for one in run.records[0].refused] == [("inner",)]
    assert [edit.rule for edit in run.edits] == ["neg-by-mul"]


def test_functions_are_carried_along() -> None:
    text = """
        g (float[4] x) => (float[4] y) { [call] y = local.outer(x) }
        <domain: "local", opset_import: ["" : 18, "local" : 1]> outer (a) => (b) { b = local.inner(a) }
        <domain: "local", opset_import: ["" : 18]> inner (a) => (b) { b = Abs(a) }
    """
    for name, same in (("Abs", True), ("Relu", False)):
        model = parsed(text)
        call = model.graph[0]
        new = ir.Node("", name, [call.inputs[0]])
        verdict = RewriteChecker(registry.backend("onnxruntime"))(
            Proposal(model, "test", "inline", (call,), tuple(call.outputs), tuple(new.outputs), (new,))
        )
        assert verdict.unchecked is None
        assert (verdict.refusal is None) == same


def test_a_rewrite_right_at_one_size_only_is_found() -> None:
    text = "g (float[n,4] x) => (float[4] y) <int64[1] axes = {0}> { [max] y = ReduceMax <keepdims = 0> (x, axes) }"

    class FirstRow(Rule):
        name = "first-row"

        def pattern(self, op: Any, x: Any, axes: Any) -> Any:
            return op.ReduceMax(x, axes, keepdims=0)

        def rewrite(self, op: Any, m: Match) -> Any:
            return op.ReduceMean(m.x, m.axes, keepdims=0)

    assert [one.rule for one in checked(text, rewriting(FirstRow())).records[0].refused] == ["first-row"]


def shapes_of(*shapes: Sequence[Any]) -> list[tuple[tuple[int, ...], ...]]:
    values = [
        ir.Value(name=f"v{i}", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape(shape))
        for i, shape in enumerate(shapes)
    ]
    found = [tuple(array.shape for array in feed.values()) for feed in feeds(values, 0)]
    return list(dict.fromkeys(found))


def test_dimensions_of_one_name_have_one_size_and_expressions_hold() -> None:
    for first, second in shapes_of(("n", "m"), ("2*n", "n + m")):
        n, m = first
        assert second == (2 * n, n + m)
    sizes = {first for first, _ in shapes_of(("n", "m"), ("2*n", "m"))}
    assert {(2, 2), (1, 1), (3, 3), (0, 0)} < sizes
    assert any(n != m for n, m in sizes)


def test_a_tensor_of_sizes_holds_those_sizes() -> None:
    """Expand to the shape x has is no change, whatever the node that reads the shape may be fed otherwise."""
    text = """
        g (float[n,4] x) => (float[n,4] y) {
          shape = Shape(x) same = Identity(shape) [expand] e = Expand(x, same) y = Neg(e)
        }
    """

    class NoExpand(Rule):
        name = "no-expand"

        def pattern(self, op: Any, x: Any, shape: Any) -> Any:
            return op.Expand(x, shape)

        def applies(self, m: Match) -> bool:
            return shapes.same_shape(m.x, m.root.outputs[0])

        def rewrite(self, op: Any, m: Match) -> Any:
            return m.x

    model = parsed(text)
    shapes.infer_shapes(model)
    run = run_passes(model, rewriting(NoExpand()), check_rewrites=True)
    assert not run.records[0].refused
    assert len(run.edits) == 1


def test_odd_names_and_unknown_dimensions_are_bound_too() -> None:
    found = shapes_of(("batch size", None, 5))
    assert found[:4] == [((2, 2, 5),), ((1, 1, 5),), ((3, 3, 5),), ((0, 0, 5),)]
    assert all(shape[2] == 5 for (shape,) in found)


def test_dimensions_that_would_be_negative_are_left_out() -> None:
    assert all(min(shape) >= 0 for (shape,) in shapes_of(("n - 2", "n")))


def test_division_does_not_end_the_process() -> None:
    text = "g (int64[4] x) => (int64[4] y) <int64 minus = {-1}> { [div] y = Div(x, minus) }"

    class DivToNeg(Rule):
        name = "div-to-neg"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Div(x, -1)

        def rewrite(self, op: Any, m: Match) -> Any:
            return op.Neg(m.x)

    run = checked(text, rewriting(DivToNeg()))
    assert not run.records[0].refused
    assert len(run.edits) == 1


# What counts as a difference


class Factored(Rule):
    """(x + w)·w = x·w + w·w, for a constant w: the same but for rounding, and for what infinities make on the way."""

    name = "factored"

    def pattern(self, op: Any, x: Any, w: Any) -> Any:
        return op.Mul(op.Add(x, w, _id="sum"), w)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Add(op.Mul(m.x, m.w), op.const(m.array("w") * m.array("w"), "square"))


FACTORS = "g (float[4] x) => (float[4] y) <float[4] w = {0.1, -0.3, 3, 1e6}> { s = Add(x, w) [product] y = Mul(s, w) }"


def test_rounding_is_a_difference_for_exact_passes_only() -> None:
    @dataclass(frozen=True)
    class Exact(RewritePass):
        name = "exact"
        guarantee = Guarantee.EXACT

        def rules(self, target: Target) -> Sequence[Rule]:
            return [Factored()]

    assert [edit.rule for edit in checked(FACTORS, rewriting(Factored())).edits] == ["factored"]
    assert [one.rule for one in checked(FACTORS, Exact()).records[0].refused] == ["factored"]


def test_sums_in_another_order_may_overflow_to_another_kind_of_infinity() -> None:
    """x·W₁·W₂ of an infinite x meets infinities of both signs, x·(W₁·W₂) does not."""
    text = """
        g (float[2,2] x) => (float[2,1] y) <float[2,2] v = {1, -1, 1, -1}, float[2,1] w = {1, 2}> {
          h = MatMul(x, v) [product] y = MatMul(h, w)
        }
    """

    class Products(Rule):
        name = "products"

        def pattern(self, op: Any, x: Any, v: Any, w: Any) -> Any:
            return op.MatMul(op.MatMul(x, v), w)

        def rewrite(self, op: Any, m: Match) -> Any:
            return op.MatMul(m.x, op.const(m.array("v") @ m.array("w"), "product"))

    assert [edit.rule for edit in checked(text, rewriting(Products())).edits] == ["products"]


def test_a_replacement_that_fails_where_the_original_runs_is_wrong() -> None:
    text = "g (float[n,4] x) => (float[k,4] y) <int64[2] to = {-1, 4}> { [view] y = Reshape(x, to) }"

    class Fixed(Rule):
        name = "fixed"

        def pattern(self, op: Any, x: Any, to: Any) -> Any:
            return op.Reshape(x, to)

        def applies(self, m: Match) -> bool:
            return bool((m.array("to") == -1).any())

        def rewrite(self, op: Any, m: Match) -> Any:
            return op.Reshape(m.x, op.const(np.array([2, 4]), "to"))

    (refused,) = checked(text, rewriting(Fixed())).records[0].refused
    assert refused.why.startswith("makes the model fail: ")
