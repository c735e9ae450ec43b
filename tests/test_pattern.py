"""Rules: matching, holding back, the worklist, and rules that undo each other."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt import provenance, worklist
from graphopt.errors import PassError
from graphopt.pattern import Match, Miss, PatternNode, Rule, compile_rule, matches_at
from graphopt.rewriter import Rewriter
from graphopt.verify import verify
from graphopt.worklist import Outcome, apply_rules


def parse(body: str, inputs: str = "float[2] x", outputs: str = "float[2] y") -> ir.Model:
    text = f'<ir_version: 8, opset_import: ["": 17]> agraph ({inputs}) => ({outputs}) {body}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    provenance.stamp(model)
    return model


def apply(model: ir.Model, *rules: Rule) -> Outcome:
    outcome = apply_rules(rules, model, Rewriter(model))
    verify(model, provenance_too=True)
    return outcome


def match_at(pattern: PatternNode, node: ir.Node, opset: int = 17) -> Match | None:
    return next(matches_at(pattern, node, opset), None)


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


class DoubleNeg(Rule):
    name = "double-neg"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(op.Neg(x, _id="inner"), _id="outer")

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Identity(m.x)


class AddZero(Rule):
    name = "add-zero"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Add(x, 0.0)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Identity(m.x)


class NegToSub(Rule):
    name = "neg-to-sub"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Neg(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Sub(op.const(ir.tensor([0.0]), "zero"), m.x)


class SubToNeg(Rule):
    name = "sub-to-neg"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Sub(0.0, x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Neg(m.x)


def test_a_chain_is_rewritten_to_a_fixpoint() -> None:
    model = parse("{ a = Neg(x) b = Neg(a) c = Neg(b) y = Neg(c) }")
    assert apply(model, DoubleNeg()).fired["double-neg"] == 2
    assert "Neg" not in ops(model)


def test_an_inner_value_read_elsewhere_holds_a_rule_back_with_its_reason() -> None:
    model = parse("{ a = Neg(x) z = Abs(a) y = Neg(a) }", outputs="float[2] y, float[2] z")
    outcome = apply(model, DoubleNeg())
    assert not outcome.fired
    assert list(outcome.held_back) == [("double-neg", "`Neg` also feeds other nodes")]


def test_an_inner_value_that_is_a_graph_output_holds_back() -> None:
    model = parse("{ a = Neg(x) y = Neg(a) }", outputs="float[2] y, float[2] a")
    assert not apply(model, DoubleNeg()).fired


def test_an_inner_value_captured_by_a_branch_holds_back() -> None:
    body = """{
      a = Neg(x)
      y = Neg(a)
      z = If (c) <then_branch = t () => (float[2] p) { p = Abs(a) }, else_branch = e () => (float[2] q) { q = Abs(x) }>
    }"""
    model = parse(body, inputs="float[2] x, bool c", outputs="float[2] y, float[2] z")
    assert not apply(model, DoubleNeg()).fired


def test_rules_reach_into_branches() -> None:
    body = """{
      y = If (c) <
        then_branch = t () => (float[2] p) { a = Neg(x) p = Neg(a) },
        else_branch = e () => (float[2] q) { q = Abs(x) }>
    }"""
    assert apply(parse(body, inputs="float[2] x, bool c"), DoubleNeg()).fired["double-neg"] == 1


@pytest.mark.parametrize("body", ["{ y = Add(x, z) }", "{ y = Add(z, x) }"])
def test_commutative_operators_match_either_way(body: str) -> None:
    model = parse("<float[1] z = {0.0}> " + body)
    assert apply(model, AddZero()).fired["add-zero"] == 1


def test_a_number_matches_only_a_constant_equal_to_it_everywhere() -> None:
    assert not apply(parse("<float[2] z = {0.0, 1.0}> { y = Add(x, z) }"), AddZero()).fired
    assert not apply(parse("{ y = Add(x, z) }", inputs="float[2] x, float[2] z"), AddZero()).fired


def test_an_initializer_that_may_be_overridden_is_not_constant() -> None:
    model = parse("<float[2] z = {0.0, 0.0}> { y = Add(x, z) }", inputs="float[2] x, float[2] z")
    assert model.graph.initializers["z"].is_graph_input()
    assert not apply(model, AddZero()).fired


def test_rules_that_undo_each_other_are_named() -> None:
    with pytest.raises(PassError, match="`neg-to-sub`, `sub-to-neg`"):
        apply(parse("{ y = Neg(x) }"), NegToSub(), SubToNeg())


def test_an_optional_input_binds_none() -> None:
    class AnyConv(Rule):
        def pattern(self, op: Any, x: Any, w: Any, b: Any = None) -> Any:
            return op.Conv(x, w, b)

    model = parse("{ y = Conv(x, w) }", inputs="float[1,1,4] x, float[1,1,1] w", outputs="float[1,1,4] y")
    found = match_at(compile_rule(AnyConv()).root, model.graph[0])
    assert found is not None
    assert found.b is None
    assert found.w.name == "w"


def test_a_required_input_that_is_missing_is_no_match() -> None:
    class Clipped(Rule):
        def pattern(self, op: Any, x: Any, low: Any) -> Any:
            return op.Clip(x, low)

    assert match_at(compile_rule(Clipped()).root, parse("{ y = Clip(x) }").graph[0]) is None


def test_attributes_match_their_defaults_too() -> None:
    class Softmaxed(Rule):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Softmax(x, axis=-1)

    assert match_at(compile_rule(Softmaxed()).root, parse("{ y = Softmax(x) }").graph[0]) is not None
    assert match_at(compile_rule(Softmaxed()).root, parse("{ y = Softmax<axis=0>(x) }").graph[0]) is None
    # Up to opset 12 the default was another.
    assert match_at(compile_rule(Softmaxed()).root, parse("{ y = Softmax(x) }").graph[0], opset=12) is None


def test_an_attribute_given_by_a_functions_caller_matches_nothing() -> None:
    text = """<ir_version: 9, opset_import: ["": 17, "local": 1]>
    agraph (float[2] x) => (float[2] y) { y = local.f<a=0>(x) }
    <domain: "local", opset_import: ["": 17]>
    f <a> (x) => (y) { y = Softmax<axis: int = @a>(x) }"""

    class Any_(Rule):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Softmax(x)

    model = ir.from_proto(onnx.parser.parse_model(text))
    (node,) = next(iter(model.functions.values()))
    assert match_at(compile_rule(Any_()).root, node) is None


def test_text_attributes_match_their_defaults() -> None:
    class NotPadded(Rule):
        def pattern(self, op: Any, x: Any, w: Any) -> Any:
            return op.Conv(x, w, auto_pad="NOTSET")

    model = parse("{ y = Conv(x, w) }", inputs="float[1,1,4] x, float[1,1,1] w", outputs="float[1,1,4] y")
    assert match_at(compile_rule(NotPadded()).root, model.graph[0]) is not None


@pytest.mark.parametrize("name", ["values", "root", "copy", "array"])
def test_a_variable_cannot_take_a_name_of_matchs_own(name: str) -> None:
    namespace: dict[str, Any] = {}
    exec(f"def pattern(self, op, {name}): return op.Relu({name})", namespace)
    rule = type("Named", (Rule,), {"name": "named", "pattern": namespace["pattern"]})()
    with pytest.raises(TypeError, match=name):
        compile_rule(rule)


def test_an_output_that_is_read_must_be_replaced() -> None:
    class Half(Rule):
        name = "half"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Split(x, _outputs=2)

        def rewrite(self, op: Any, m: Match) -> Any:
            return op.Identity(m.x)

    model = parse("{ y, z = Split(x) }", inputs="float[4] x", outputs="float[2] y, float[2] z")
    with pytest.raises(PassError, match="without a replacement"):
        apply(model, Half())
    assert ops(model) == ["Split"]  # refused before anything was edited


def test_one_variable_bound_twice_must_be_one_value() -> None:
    class Square(Rule):
        def pattern(self, op: Any, x: Any) -> Any:
            return op.Mul(x, x)

    root = compile_rule(Square()).root
    assert match_at(root, parse("{ y = Mul(x, x) }").graph[0]) is not None
    assert match_at(root, parse("{ y = Mul(x, z) }", inputs="float[2] x, float[2] z").graph[0]) is None


def test_a_rewrite_that_holds_back_late_leaves_nothing_behind() -> None:
    class Late(DoubleNeg):
        def rewrite(self, op: Any, m: Match) -> Any:
            op.Abs(m.x)
            op.const(ir.tensor([1.0]), "left-over")
            return Miss("changed its mind", m.outer)

    model = parse("{ a = Neg(x) y = Neg(a) }")
    rewriter = Rewriter(model)
    outcome = apply_rules([Late()], model, rewriter)
    assert rewriter.edits == 0
    assert outcome.held_back["double-neg", "changed its mind"] == 1
    assert not model.graph.initializers
    assert len(model.graph.inputs[0].uses()) == 1


def test_a_pattern_must_return_what_an_operator_built() -> None:
    class Wrong(Rule):
        name = "wrong"

        def pattern(self, op: Any, x: Any) -> Any:
            return x

    with pytest.raises(TypeError, match="wrong"):
        compile_rule(Wrong())


def test_an_ellipsis_stands_for_any_further_inputs() -> None:
    class Any2(Rule):
        name = "any"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Sum(x, ...)

    root = compile_rule(Any2()).root
    for inputs in ("x", "x, x", "x, x, x"):
        found = match_at(root, parse(f"{{ y = Sum({inputs}) }}").graph[0])
        assert found is not None
        assert found.x.name == "x"


def test_a_large_constant_may_be_neutral_too() -> None:
    root = compile_rule(AddZero()).root
    model = parse("{ y = Add(x, x) }")
    for content, matches in ((np.zeros((100, 100)), True), (np.eye(100), False), (1 - np.eye(100), False)):
        rewriter = Rewriter(model)
        rewriter.set_input(model.graph[0], 1, rewriter.const(content.astype(np.float32), "z"))
        assert (match_at(root, model.graph[0]) is not None) == matches


class NoIdentity(Rule):
    name = "no-identity"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Identity(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return m.x


class Untouched(Rule):
    """Matches no Softplus, and counts those it is asked about."""

    name = "untouched"

    def __init__(self) -> None:
        self.tried = 0

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Softplus(x)

    def applies(self, m: Match) -> bool:
        self.tried += 1
        return False


def readers_of_one(count: int) -> ir.Model:
    """Relu, read by many Identity nodes, each read by a Softplus, all read by one Sum."""
    readers = " ".join(f"i{n} = Identity(r) s{n} = Softplus(i{n})" for n in range(count))
    return parse(f"{{ r = Relu(x) {readers} y = Sum({', '.join(f's{n}' for n in range(count))}) }}")


def test_edits_near_a_widely_read_node_do_not_each_visit_all_its_readers(monkeypatch: pytest.MonkeyPatch) -> None:
    count, pushed = 100, Counter[str]()
    push = worklist._Driver._push
    monkeypatch.setattr(worklist._Driver, "_push", lambda self, node: pushed.update([node.op_type]) or push(self, node))
    watcher = Untouched()
    assert apply(readers_of_one(count), NoIdentity(), DoubleNeg(), watcher).fired["no-identity"] == count
    assert watcher.tried <= 5 * count
    assert pushed.total() <= 20 * count


def test_a_rule_matches_once_the_last_other_reader_of_many_is_gone() -> None:
    class Absorb(Rule):
        name = "absorb"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Sqrt(op.Relu(x))

        def rewrite(self, op: Any, m: Match) -> Any:
            return op.Sqrt(m.x)

    class Same(Rule):
        name = "same"

        def pattern(self, op: Any, x: Any, a: Any) -> Any:
            return op.Where(op.Equal(a, a), x, op.Abs(op.Identity(a)))

        def rewrite(self, op: Any, m: Match) -> Any:
            return m.x

    count = 3 * worklist.FEW_READERS
    steps = [f"v{n + 1} = Where(e{n}, v{n}, b{n})" for n in range(count)]
    reads = [f"e{n} = Equal(r, r) i{n} = Identity(r) b{n} = Abs(i{n})" for n in range(count)]
    model = parse(
        f"{{ r = Relu(x) y = Sqrt(r) v0 = Neg(x) {' '.join(reads + steps)} z = Neg(v{count}) }}",
        outputs="float[2] y, float[2] z",
    )
    fired = apply(model, Absorb(), Same()).fired
    assert fired == {"absorb": 1, "same": count}
    assert "Relu" not in ops(model)
