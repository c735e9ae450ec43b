"""Shape inference: what it finds, what it trusts, and that nothing of it is saved."""

from __future__ import annotations

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt import shapes
from graphopt.dims import Symbol, at_least, named
from graphopt.inference import Inference
from graphopt.rewriter import Rewriter

from . import graph_generator, shape_truth
from .node_cases import NodeCase, node_cases, with_constant_inputs
from .pass_runs import to_bytes

RANDOM_MODELS = 30
# Each form of the node cases is tried on every so many of them.
STRIDE = 4
FORMS = ("static", "constant", "symbolic")
BATCH, SEQ = named("batch"), named("seq")


def parsed(text: str, opset: int = 18) -> ir.Model:
    header = f'<ir_version: 8, opset_import: ["" : {opset}, "com.microsoft" : 1, "f" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(header + text))


def value(model: ir.Model, name: str) -> ir.Value:
    graphs = [model.graph, *(a.as_graph() for n in model.graph for a in n.attributes.values() if a.name == "body")]
    return next(
        v for graph in graphs for v in [*graph.inputs, *(o for n in graph for o in n.outputs)] if v.name == name
    )


def dims(model: ir.Model, name: str) -> tuple[object, ...] | None:
    return shapes.dims_of(value(model, name))


# What it finds


def test_symbols_go_through_shape_arithmetic() -> None:
    model = parsed("""
    g (float[batch, seq, 12] x) => (float[a, b] y) <int64[1] zero = {0}, int64[1] one = {1}, int64[1] end = {12}> {
        s = Shape(x)
        b = Gather(s, zero)
        n = Gather(s, one)
        rows = Mul(b, n)
        wanted = Concat <axis = 0> (rows, end)
        r = Reshape(x, wanted)
        twice = Concat <axis = 1> (r, r)
        y = Relu(twice)
    }""")
    assert shapes.infer_shapes(model) is None
    assert dims(model, "r") == (BATCH * SEQ, 12)
    assert dims(model, "twice") == (BATCH * SEQ, 24)
    assert shapes.contents(value(model, "wanted")).entries == (BATCH * SEQ, 12)  # type: ignore[union-attr]
    assert all(at_least(entry, 0) for entry in shapes.contents(value(model, "rows")).entries)  # type: ignore[union-attr]
    assert shapes.same_shape(value(model, "twice"), value(model, "y"))
    assert [str(dim) for dim in value(model, "r").shape] == ["=batch*seq", "12"]  # type: ignore[union-attr]
    assert [str(dim) for dim in value(model, "y").shape] == ["a", "b"]  # type: ignore[union-attr]


def test_zero_that_copies_is_not_the_size_it_was_meant_to_be() -> None:
    model = parsed("""
    g (float[seq, batch] x) => (float[a, b] y) <int64[1] rest = {-1}> {
        b = Shape <start = 1> (x)
        wanted = Concat <axis = 0> (b, rest)
        y = Reshape(x, wanted)
    }""")
    shapes.infer_shapes(model)
    assert dims(model, "y") != (BATCH, SEQ)  # with no batch, the 0 stands for seq


def test_named_sizes_of_inner_values_are_trusted_where_nothing_is_inferred() -> None:
    model = parsed("g (float[n] x) => (float[n] y) <float[7, n] a, float[k] b> { a = o.F(x) b = o.G(x) y = o.H(a, b) }")
    shapes.infer_shapes(model)
    assert dims(model, "a") == (7, named("n"))
    assert dims(model, "b") == (named("k"),)


def test_loop_keeps_only_what_its_body_keeps() -> None:
    model = parsed("""
    g (float[n] x, float[n, 3] k, int64 times, bool go) => (float[m] y, float[o, p] z, float[q, r, s] all) {
        y, z, all = Loop(times, go, x, k) <body = b (int64 i, bool c, float[n] v, float[n, 3] w)
            => (bool d, float[v1] v2, float[w1, w2] w3, float[t1, t2] t)
            { d = Identity(c) v2 = Concat <axis = 0> (v, v) w3 = Neg(w) t = Relu(w) }>
    }""")
    shapes.infer_shapes(model)
    assert shapes.static_shape(value(model, "y")) is None
    assert dims(model, "y") != (named("n"),)
    assert dims(model, "z") == (named("n"), 3)
    assert dims(model, "w") == (named("n"), 3)
    assert dims(model, "v") != (named("n"),)


def test_branches_agree_or_the_condition_decides() -> None:
    text = """
    g (float[n, 3] x, bool c) => (float[a, b] y) COND {
        y = If(c) <then_branch = t () => (float[k, l] p) { p = Relu(x) },
                   else_branch = e () => (float[k, l] q) { q = Concat <axis = 1> (x, x) }>
    }"""
    model = parsed(text.replace("COND", ""))
    shapes.infer_shapes(model)
    first, second = dims(model, "y") or ()
    assert first == named("n")
    assert not isinstance(second, int)
    known = parsed(text.replace(", bool c", "").replace("COND", "<bool c = {1}>"))
    shapes.infer_shapes(known)
    assert dims(known, "y") == (named("n"), 3)


def test_call_of_a_function_is_inferred_and_its_body_is_not() -> None:
    model = parsed(
        """
    g (float[n] x, float[2, 3] z) => (float[a] y, float[b, c] w) { y = f.F <by = 2> (x) w = f.F <by = 1> (z) }
    <domain: "f", opset_import: ["" : 18]>
    F <by> (x) => (y) { a = Flatten <axis: int = @by> (x) b = Shape(a) y = Neg(x) }""".replace("by = 2", "by = 1")
    )
    shapes.infer_shapes(model)
    assert dims(model, "y") == (named("n"),)
    assert dims(model, "w") == (2, 3)
    [function] = model.functions.values()
    assert all(output.shape is None for node in function for output in node.outputs)


def test_contents_of_a_large_constant_are_not_read() -> None:
    class Unread(ir.Tensor):
        def numpy(self) -> np.ndarray:
            raise AssertionError("read")

    weight = ir.Value(name="w", const_value=Unread(np.zeros(2048, np.int64), name="w"))
    model = parsed("g (int64[2048] x) => (int64[2048] y) { y = Identity(x) }")
    model.graph.register_initializer(weight)
    assert shapes.contents(weight) is None
    assert shapes.dims_of(weight) == (2048,)


# What it trusts


@pytest.mark.parametrize(
    ("body", "part"),
    [
        ("y = Add(x, z)", "do not broadcast"),
        ("y = MatMul(x, z)", "inner dimensions 3 and 5 differ"),
        ("y = Transpose <perm = [0, 1, 2]> (x)", "perm [0, 1, 2] of a tensor of rank 2"),
        ("y = Concat <axis = 0> (x, z)", "sizes 3 and 4"),
        ("y = Squeeze(x, one)", "squeezes a dimension of 3"),
    ],
)
def test_what_a_node_cannot_take_is_a_contradiction(body: str, part: str) -> None:
    model = parsed(f"g (float[2, 3] x, float[5, 4] z) => (y) <int64[1] one = {{1}}> {{ a = Neg(x) {body} }}")
    assert part in (shapes.contradiction(model) or "")
    assert part in (shapes.infer_shapes(model) or "")
    assert value(model, "a").shape is None


def test_declared_shape_of_an_inner_value_gives_way() -> None:
    model = parsed("g (float[2, 3] x) => (float[2, 3] y) <float[7] a> { a = Neg(x) b = Neg(a) y = Neg(b) }")
    before = to_bytes(model)
    assert "`a` is declared [7]" in (shapes.contradiction(model) or "")
    assert to_bytes(model) == before
    assert "`a` is declared [7]" in (shapes.infer_shapes(model) or "")
    assert dims(model, "b") == (2, 3)
    shapes.forget_inferred(model)
    assert to_bytes(model) == before


def test_a_branch_that_never_runs_contradicts_nothing() -> None:
    model = parsed("""
    g (float[2, 3] x, bool c) => (float[a, b] y) <int64[1] one = {1}> {
        y = If(c) <then_branch = t () => (float[k] p) { p = Squeeze(x, one) },
                   else_branch = e () => (float[k, l] q) { q = Relu(x) }>
    }""")
    assert shapes.contradiction(model) is None


# What stays behind


@pytest.mark.parametrize("seed", range(12))
def test_nothing_inferred_is_kept(seed: int) -> None:
    model = ir.from_proto(graph_generator.random_model(seed))
    before = to_bytes(model)
    for _ in range(2):
        shapes.infer_shapes(model)
    shapes.forget_inferred(model)
    assert to_bytes(model) == before


def test_shape_a_pass_has_copied_is_not_kept_either() -> None:
    model = parsed("g (float[n] x) => (float[a] y) { b = Concat <axis = 0> (x, x) y = Neg(b) }")
    shapes.infer_shapes(model)
    y = value(model, "y")
    y.shape = value(model, "b").shape
    shapes.forget_inferred(model)
    assert not any(isinstance(dim, Symbol) for dim in y.shape or ())


def test_inserted_nodes_know_their_shapes_and_heirs_what_they_inherit() -> None:
    model = parsed("g (float[n, 3] x) => (float[a, b] y) { s = o.Strange(x) y = Neg(s) }")
    value(model, "s").shape = ir.Shape(["n", 5])
    shapes.infer_shapes(model)
    rewriter = Rewriter(model)
    node = model.graph.node(1)
    made = rewriter.insert(rewriter.make("Concat", [value(model, "x")] * 2, {"axis": 0}), before=node)
    assert shapes.dims_of(made.outputs[0]) == (2 * named("n"), 3)
    odd = rewriter.insert(rewriter.make("Odd", [value(model, "x")], domain="o"), before=node)
    assert shapes.dims_of(odd.outputs[0]) is None
    rewriter.replace(value(model, "s"), odd.outputs[0])
    assert shapes.dims_of(odd.outputs[0]) == (named("n"), 5)


def test_a_clone_knows_as_much() -> None:
    model = parsed("g (float[n] x) => (float[a] y) { b = Concat <axis = 0> (x, x) y = Neg(b) }")
    shapes.infer_shapes(model)
    assert dims(model.clone(), "b") == (2 * named("n"),)


# The truth


def with_symbols(case: NodeCase) -> onnx.ModelProto:
    """Return a case whose inputs have a name for each dimension, so that nothing can be read off them."""
    model = onnx.ModelProto()
    model.CopyFrom(case.model)
    for info in model.graph.input:
        for axis, dim in enumerate(info.type.tensor_type.shape.dim):
            dim.dim_param = f"{info.name}_{axis}"
    return model


def without_shapes_of_outputs(model: onnx.ModelProto) -> onnx.ModelProto:
    bare = onnx.ModelProto()
    bare.CopyFrom(model)
    for info in bare.graph.output:
        if info.type.HasField("tensor_type"):
            info.type.tensor_type.ClearField("shape")
    return bare


@pytest.mark.parametrize("form", FORMS)
def test_node_cases_give_what_was_inferred(form: str) -> None:
    tally = shape_truth.Tally()
    for case in node_cases()[FORMS.index(form) :: STRIDE]:
        made = {"static": case.model, "constant": with_constant_inputs(case), "symbolic": with_symbols(case)}[form]
        truth = made and shape_truth.computed(made, {} if form == "constant" else case.inputs)
        if made is None or truth is None:
            continue
        model = ir.from_proto(without_shapes_of_outputs(made))
        shapes.infer_shapes(model)
        shape_truth.check(model, {} if form == "constant" else case.inputs, truth, tally)
    assert not tally.wrong, "\n".join(tally.wrong[:20])
    assert tally.values > 1000
    # Of nearly every value the rank is known, and most dimensions by name or number.
    assert tally.ranks > 0.97 * tally.values
    assert tally.exact > 0.95 * tally.dims


@pytest.mark.parametrize("sizes", [(0, 2), (1, 5)], ids=["empty", "ordinary"])
def test_random_models_give_what_was_inferred(sizes: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph_generator, "SIZE_RANGE", sizes)
    tally = shape_truth.Tally()
    for seed in range(RANDOM_MODELS):
        proto = graph_generator.random_model(seed)
        del proto.graph.value_info[:]
        feed = graph_generator.feeds(proto, seed)
        truth = shape_truth.computed(proto, feed)
        if truth is None:
            continue
        model = ir.from_proto(without_shapes_of_outputs(proto))
        assert shapes.infer_shapes(model) is None
        shape_truth.check(model, feed, truth, tally)
        inference = Inference(model.opset_imports, model.functions)
        inference.run(model.graph)
        assert not inference.malformed
    assert not tally.wrong, "\n".join(tally.wrong[:20])
    assert tally.ranks > 0.95 * tally.values
