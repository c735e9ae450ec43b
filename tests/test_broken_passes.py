"""Passes broken on purpose, each caught by the check that is meant for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import walk
from graphopt.authoring import Context, Guarantee, Pass, RewritePass
from graphopt.errors import GraphoptError, PassError, VerificationError
from graphopt.pattern import Match, Rule
from graphopt.target import Target

from .pass_runs import is_deterministic, loaded, run_passes

MODEL = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[2,3] x, bool c) => (float[3,2] y, float[2,3] z) <float[2,3] w = {1, -2, 3, 4, 5, 6}> {
  [add] a = Add(x, w)
  [relu] b = Relu(a)
  [transpose] t = Transpose <perm = [1, 0]> (b)
  [abs] y = Abs(t)
  [if] z = If(c) <
    then_branch = then () => (float[2,3] p) { [neg] p = Neg(b) },
    else_branch = else () => (float[2,3] q) { [then_mul] m = Mul(b, w) [exp] q = Tanh(m) }
  >
}
"""


@pytest.fixture
def model() -> ir.Model:
    return loaded(onnx.parser.parse_model(MODEL))


def node(model: ir.Model, name: str) -> ir.Node:
    return next(node for node in walk.every_node(model) if node.name == name)


def broken(how: Callable[[ir.Model, Context], None], promise: Guarantee = Guarantee.EXACT) -> Pass:
    """Return a pass that does what a function does, and promises something."""

    @dataclass(frozen=True)
    class Broken(Pass):
        name = "broken"
        guarantee = promise

        def run(self, model: ir.Model, ctx: Context) -> None:
            how(model, ctx)

    return Broken()


def touch(model: ir.Model, ctx: Context) -> None:
    """Make an honest edit, so that the others are not found for having made none."""
    ctx.rewriter.set_attribute(node(model, "transpose"), "perm", [1, 0])


def refused(model: ir.Model, one: Any, verify: str = "each", **settings: Any) -> GraphoptError:
    with pytest.raises(GraphoptError) as caught:
        graphopt.optimize(model, one, verify=verify, **settings)
    assert caught.value.hint
    assert "\n" not in caught.value.message
    return caught.value


# Numbers


def scale_weight(by: float) -> Callable[[ir.Model, Context], None]:
    def run(model: ir.Model, ctx: Context) -> None:
        weight = model.graph.initializers["w"]
        ctx.rewriter.set_weight(weight, weight.const_value.numpy() * np.float32(by))

    return run


@pytest.mark.parametrize("promise", [Guarantee.EXACT, Guarantee.EQUIVALENT])
def test_wrong_constant(model: ir.Model, promise: Guarantee) -> None:
    error = refused(model, broken(scale_weight(1.01), promise))
    assert isinstance(error, VerificationError)
    assert "pass `broken` changed the model: output `" in error.message
    assert "is off by 0.0" in error.message


def test_rounding_is_no_equal_bits_but_equivalent(model: ir.Model) -> None:
    one_bit = float(np.nextafter(np.float32(1), np.float32(2)))
    assert "changed the model" in refused(model, broken(scale_weight(one_bit), Guarantee.EXACT)).message
    graphopt.optimize(model, broken(scale_weight(one_bit), Guarantee.EQUIVALENT))


def test_wrong_constant_is_found_at_the_end_too(model: ir.Model) -> None:
    assert "the passes changed the model" in refused(model, broken(scale_weight(1.01)), verify="final").message


def test_lossy_result_that_does_not_run(model: ir.Model) -> None:
    def run(model: ir.Model, ctx: Context) -> None:
        # Right by ONNX, but ONNX Runtime has no kernel for it.
        add = node(model, "add")
        value = add.inputs[0]
        for op_type, attributes in (("Cast", {"to": 11}), ("Erf", {}), ("Cast", {"to": 1})):
            made = ctx.rewriter.make(op_type, [value], attributes, sources=[add])
            value = ctx.rewriter.insert(made, before=add).outputs[0]
        ctx.rewriter.set_input(add, 0, value)

    message = refused(model, broken(run, Guarantee.LOSSY)).message
    assert message.startswith("pass `broken` changed the model: the result does not run: onnxruntime cpu refuses")


def test_dtype_stamped_wrong(model: ir.Model) -> None:
    def run(model: ir.Model, ctx: Context) -> None:
        touch(model, ctx)
        node(model, "add").outputs[0].type = ir.TensorType(ir.DataType.INT8)

    error = refused(model, broken(run))
    assert "after pass `broken`: shapes of the model contradict each other" in error.message
    assert "elem type" in error.message


def test_stale_shape(model: ir.Model) -> None:
    def run(model: ir.Model, ctx: Context) -> None:
        transpose = node(model, "transpose")
        twice = ctx.rewriter.make("Transpose", [transpose.outputs[0]], {"perm": [1, 0]}, sources=[transpose])
        ctx.rewriter.insert(twice, before=node(model, "abs"))
        twice.outputs[0].type, twice.outputs[0].shape = ir.TensorType(ir.DataType.FLOAT), ir.Shape([3, 2])
        again = ctx.rewriter.make("Transpose", [twice.outputs[0]], {"perm": [1, 0]}, sources=[transpose])
        ctx.rewriter.insert(again, before=node(model, "abs"))
        ctx.rewriter.set_input(node(model, "abs"), 0, again.outputs[0])

    error = refused(model, broken(run))
    assert "after pass `broken`: shapes of the model contradict each other" in error.message


def test_shapes_that_came_wrong_are_no_fault_of_a_pass() -> None:
    wrong = onnx.parser.parse_model(MODEL)
    wrong.graph.value_info.append(onnx.helper.make_tensor_value_info("t", onnx.TensorProto.FLOAT, [7, 7, 7]))
    graphopt.optimize(loaded(wrong), broken(touch))


# Structure


def drop_output(model: ir.Model, ctx: Context) -> None:
    del model.graph.outputs[1]


def rename_output(model: ir.Model, ctx: Context) -> None:
    model.graph.outputs[0].name = "other"


def declare_output_anew(model: ir.Model, ctx: Context) -> None:
    model.graph.outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)


def break_capture(model: ir.Model, ctx: Context) -> None:
    branch = next(iter(walk.subgraphs(node(model, "if"))))
    other = node(model, "then_mul") if node(model, "neg").graph is branch else node(model, "neg")
    node(model, "neg").replace_input_with(0, other.outputs[0])


def capture_too_early(model: ir.Model, ctx: Context) -> None:
    late = ctx.rewriter.make("Neg", [model.graph.inputs[0]], sources=[node(model, "add")])
    ctx.rewriter.insert_after(late, node(model, "if"))
    node(model, "neg").replace_input_with(0, late.outputs[0])


def make_cycle(model: ir.Model, ctx: Context) -> None:
    node(model, "add").replace_input_with(0, node(model, "relu").outputs[0])


def forget_use(model: ir.Model, ctx: Context) -> None:
    relu = node(model, "relu")
    relu._inputs = (model.graph.inputs[0],)  # what nobody can do by mistake without the underscore


def keep_removed_reader(model: ir.Model, ctx: Context) -> None:
    reader = ir.Node("", "Neg", [node(model, "add").outputs[0]], name="reader")
    model.graph.append(reader)
    model.graph.remove(reader)


def add_unknown_op(model: ir.Model, ctx: Context) -> None:
    made = ctx.rewriter.make("Nonsense", [model.graph.inputs[0]], sources=[node(model, "add")])
    ctx.rewriter.insert(made)


def add_unknown_domain(model: ir.Model, ctx: Context) -> None:
    made = ctx.rewriter.make("Gelu", [model.graph.inputs[0]], domain="com.microsoft", sources=[node(model, "add")])
    ctx.rewriter.insert(made)


def add_unknown_attribute(model: ir.Model, ctx: Context) -> None:
    ctx.rewriter.set_attribute(node(model, "relu"), "alpha", 0.5)


def leave_input_out(model: ir.Model, ctx: Context) -> None:
    ctx.rewriter.set_input(node(model, "add"), 1, None)


def add_node_from_nowhere(model: ir.Model, ctx: Context) -> None:
    made = ctx.rewriter.make("Neg", [model.graph.inputs[0]], sources=[], name="nowhere")
    ctx.rewriter.insert(made)


def take_name(model: ir.Model, ctx: Context) -> None:
    node(model, "add").outputs[0].name = "b"


def stamp_initializer(model: ir.Model, ctx: Context) -> None:
    model.graph.initializers["w"].shape = ir.Shape([3, 2])


STRUCTURE = {
    drop_output: "outputs changed from ['y', 'z'] to ['y']",
    rename_output: "outputs changed from ['y', 'z'] to ['other', 'z']",
    declare_output_anew: "output `y` changed from FLOAT, rank 2 to DOUBLE, rank 2",
    break_capture: "before it is produced",
    capture_too_early: "before it is produced",
    make_cycle: "`add` (Add) reads `b` before it is produced",
    forget_use: "`x` does not know that `relu` reads it",
    keep_removed_reader: "`a` is still held by the removed node `reader`",
    add_unknown_op: "`add_1` (Nonsense) does not exist in opset 18",
    add_unknown_domain: "is of domain `com.microsoft`, which the model does not import",
    add_unknown_attribute: "`relu` (Relu) has no attribute `alpha` in opset 18",
    leave_input_out: "`add` (Add) lacks input `B`",
    add_node_from_nowhere: "`nowhere` has no origin",
    take_name: "the name `b` is taken 2 times",
    stamp_initializer: "initializer `w` is declared [3,2] and holds [2,3]",
}


@pytest.mark.parametrize("how", STRUCTURE, ids=lambda how: how.__name__)
def test_malformed_model(model: ir.Model, how: Callable[[ir.Model, Context], None]) -> None:
    def run(model: ir.Model, ctx: Context) -> None:
        touch(model, ctx)
        how(model, ctx)

    error = refused(model, broken(run))
    assert isinstance(error, VerificationError)
    assert error.message.startswith("after pass `broken`: the model is malformed: ")
    assert STRUCTURE[how] in error.message


@pytest.mark.parametrize("verify", ["final", "rewrites"])
def test_malformed_model_is_found_however_late(model: ir.Model, verify: str) -> None:
    def run(model: ir.Model, ctx: Context) -> None:
        touch(model, ctx)
        rename_output(model, ctx)

    assert "outputs changed" in refused(model, broken(run), verify=verify).message


def replace_node_by_hand(model: ir.Model, ctx: Context) -> None:
    relu = node(model, "relu")
    made = ir.Node("", "Neg", [relu.inputs[0]], name="relu")
    made.outputs[0].name = "b"
    relu.graph.insert_before(relu, made)
    relu.outputs[0].replace_all_uses_with(made.outputs[0])
    relu.graph.remove(relu, safe=True)


def change_attribute_by_hand(model: ir.Model, ctx: Context) -> None:
    node(model, "transpose").attributes["perm"] = ir.AttrInt64s("perm", [1, 0])


def change_weight_by_hand(model: ir.Model, ctx: Context) -> None:
    model.graph.initializers["w"].const_value = ir.tensor(np.ones((2, 3), np.float32), name="w")


def change_branch_by_hand(model: ir.Model, ctx: Context) -> None:
    node(model, "neg").op_type = "Abs"


@pytest.mark.parametrize(
    "how",
    [drop_output, rename_output, replace_node_by_hand, change_attribute_by_hand, change_weight_by_hand,
     change_branch_by_hand, make_cycle],
    ids=lambda how: how.__name__,
)  # fmt: skip
def test_change_that_no_edit_tells_of(model: ir.Model, how: Callable[[ir.Model, Context], None]) -> None:
    error = refused(model, broken(how, Guarantee.LOSSY))
    assert error.message == "pass `broken` changed the model and reported no edit"
    assert "ctx.rewriter" in str(error.hint)


def test_pass_that_only_looks_is_no_pass_that_changes(model: ir.Model) -> None:
    result = graphopt.optimize(model, broken(lambda model, ctx: None))
    assert [step.edits for step in result.report.steps] == [0]


def test_pass_that_differs_from_run_to_run(model: ir.Model) -> None:
    """Nothing in one run can tell; the property of every registered pass, tested in `test_properties`, does."""
    count = itertools.count()

    def run(model: ir.Model, ctx: Context) -> None:
        made = ctx.rewriter.make("Neg", [model.graph.inputs[0]], sources=[node(model, "add")], name=f"n{next(count)}")
        ctx.rewriter.insert(made)

    assert not is_deterministic(model, broken(run))
    assert is_deterministic(model, broken(touch))


# Rules


class Becomes(Rule):
    """One operator of one operand for another."""

    def __init__(self, old: str, new: str) -> None:
        self.name = f"{old.lower()}-to-{new.lower()}"
        self.old, self.new = old, new

    def pattern(self, op: Any, x: Any) -> Any:
        return getattr(op, self.old)(x)

    def rewrite(self, op: Any, m: Match) -> Any:
        return getattr(op, self.new)(m.x)


class TimesZero(Rule):
    """x · 0 = 0: right but for NaN and infinities."""

    name = "times-zero"

    def pattern(self, op: Any, x: Any) -> Any:
        return op.Mul(x, 0.0)

    def rewrite(self, op: Any, m: Match) -> Any:
        return op.Sub(m.x, m.x) if m.x.shape is None else op.const(np.zeros(tuple(m.x.shape), np.float32), "zero")


def rewriting(*rules: Rule) -> RewritePass:
    @dataclass(frozen=True)
    class Rewriting(RewritePass):
        name = "rewriting"

        def rules(self, target: Target) -> Sequence[Rule]:
            return rules

    return Rewriting()


def test_rules_that_undo_each_other(model: ir.Model) -> None:
    error = refused(model, rewriting(Becomes("Tanh", "Erf"), Becomes("Erf", "Tanh")))
    assert isinstance(error, PassError)
    assert error.message == "rules undo each other without end: `erf-to-tanh`, `tanh-to-erf`"


def test_passes_of_a_preset_that_undo_each_other_are_named(model: ir.Model, monkeypatch: pytest.MonkeyPatch) -> None:
    from graphopt import pipeline

    there, back = rewriting(Becomes("Tanh", "Erf")), rewriting(Becomes("Erf", "Tanh"))
    monkeypatch.setattr(pipeline, "schedule", lambda *_, **__: ())
    step = pipeline.Step("pair", (there, back), preset=True)
    run = run_passes(model, pipeline.Pipeline((step,)))
    assert any("still changing the model after 10 rounds: `rewriting`, `rewriting`" in text for text in run.remarks)


def test_rewrite_wrong_for_negative_numbers() -> None:
    """The rest of the model hides it: only a check of the rewrite by itself can see it."""
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[4] x) => (float[4] y) { a = Sigmoid(x) [abs] b = Abs(a) y = Neg(b) }
    """)
    model = onnx.shape_inference.infer_shapes(model)
    one = rewriting(Becomes("Abs", "Identity"))
    graphopt.optimize(loaded(model), one)
    error = refused(loaded(model), one, verify="rewrites", strict=True)
    assert error.message.startswith("rule `abs-to-identity` of pass `rewriting` changes the outputs by ")
    assert error.message.endswith("at abs (from abs)")


def test_rewrite_wrong_for_nan_only() -> None:
    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        g (float[4] x) => (float[4] y) <float zero = {0}> { [mul] a = Mul(x, zero) b = Abs(a) y = Add(x, b) }
    """)
    one = rewriting(TimesZero())
    graphopt.optimize(loaded(model), one)
    error = refused(loaded(model), one, verify="rewrites", strict=True)
    assert error.message.startswith("rule `times-zero` of pass `rewriting` changes the outputs by inf at mul")


def test_rewrite_wrong_for_integers_beyond_0_and_1() -> None:
    class SquareToAbs(Rule):
        name = "square-to-abs"

        def pattern(self, op: Any, x: Any) -> Any:
            return op.Mul(x, x)

        def rewrite(self, op: Any, m: Match) -> Any:
            return op.Abs(m.x)

    model = onnx.parser.parse_model("""
        <ir_version: 8, opset_import: ["" : 18]>
        g (int64[4] x) => (int64[4] y) { y = Mul(x, x) }
    """)
    error = refused(loaded(model), rewriting(SquareToAbs()), verify="rewrites", strict=True)
    assert error.message.startswith("rule `square-to-abs` of pass `rewriting` changes the outputs by ")


# Budgets and exceptions


def samples() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((64, 4)).astype(np.float32)
    return {"x": x, "labels": x.argmax(-1)}


CLASSIFIER = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[N,4] x) => (float[N,4] y) <float[4,4] w = {1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 1}> {
  [matmul] y = MatMul(x, w)
}
"""


@pytest.mark.parametrize(("verify", "message"), [("each", "`y`: NaN where there was none"), ("off", "over budget")])
def test_nan_is_never_averaged_away(verify: str, message: str) -> None:
    class Poison(Pass):
        name = "poison"
        guarantee = Guarantee.LOSSY

        def run(self, model: ir.Model, ctx: Context) -> None:
            for value in list(model.graph.initializers.values()):
                tensor = value.const_value
                if tensor is not None and tensor.dtype == ir.DataType.FLOAT:
                    ctx.rewriter.set_weight(value, np.full(tensor.shape, np.nan, np.float32))

    model = ir.from_proto(onnx.parser.parse_model(CLASSIFIER))
    with pytest.raises(VerificationError, match=message):
        graphopt.optimize(model, Poison(), data=samples(), budget="sqnr_db=1000", verify=verify)


def test_lossy_pass_over_budget_stops_the_run_and_leaves_a_report() -> None:
    def run(model: ir.Model, ctx: Context) -> None:
        weight = model.graph.initializers["w"]
        ctx.rewriter.set_weight(weight, weight.const_value.numpy()[::-1])

    after: list[str] = []
    later = broken(lambda model, ctx: after.append("ran"), Guarantee.LOSSY)
    model = loaded(onnx.parser.parse_model(CLASSIFIER))
    error = refused(model, [broken(run, Guarantee.LOSSY), later], data=samples(), budget="top1=1%")
    assert isinstance(error, VerificationError)
    assert error.exit_code == 1
    assert error.message.startswith("over budget after pass `broken`: top1 went from 100.0 % to ")
    assert not after
    assert error.report.ok is False
    assert error.report.failure == error.message
    assert [step.edits for step in error.report.steps] == [1]
    assert error.report.steps[0].check.metrics["top1"] < 0.5


def test_lossy_pass_within_budget_passes() -> None:
    model = loaded(onnx.parser.parse_model(CLASSIFIER))
    graphopt.optimize(model, broken(scale_weight(0.5), Guarantee.LOSSY), data=samples(), budget="top1=1%")


def test_exception_in_a_pass(model: ir.Model) -> None:
    def run(model: ir.Model, ctx: Context) -> None:
        raise KeyError("a\nlong\nstory " + "x" * 1000)

    error = refused(model, broken(run))
    assert isinstance(error, PassError)
    assert error.exit_code == 3
    assert error.message.startswith("pass `broken` failed: KeyError: ")
    assert len(error.message) < 400
    assert "mistake of the pass, not yours" in str(error.hint)
    assert isinstance(error.__cause__, KeyError)


def test_erasing_what_is_read_is_refused_at_once(model: ir.Model) -> None:
    error = refused(model, broken(lambda model, ctx: ctx.rewriter.erase(node(model, "relu"))))
    assert "cannot erase `relu`: an output of it is still read" in error.message


def test_model_given_is_not_changed_by_a_pass_that_fails(model: ir.Model) -> None:
    before = bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    refused(model, broken(scale_weight(2.0)))
    assert bytes(ir.to_proto(model).SerializeToString(deterministic=True)) == before
