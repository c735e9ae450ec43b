"""What trains in the graphs of branches and in functions, and where it is written back to."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.constant_names import constant_names
from graphopt.passes.recovery.constraints.trainable import GIVEN, trainables
from graphopt.passes.recovery.held import Held

from .pass_runs import loaded, outputs_of, run_passes

torch = pytest.importorskip("torch")

from .trained_models import constrained, difference, is_exact  # noqa: E402

RNG = np.random.default_rng(0)
FEED = {"x": RNG.normal(0, 1, (8, 16)).astype(np.float32)}
# Sums of a few dozen products of numbers around 1 in float32.
CLOSE = 1e-4


def normal(*shape: int) -> np.ndarray:
    return RNG.normal(0, 0.3, shape).astype(np.float32)


def half_zero(*shape: int) -> np.ndarray:
    array = normal(*shape)
    return np.where(np.abs(array) < np.median(np.abs(array)), np.float32(0), array)


def branch(name: str, nodes: list[onnx.NodeProto], result: str, constants: dict[str, np.ndarray]) -> onnx.GraphProto:
    output = helper.make_tensor_value_info(result, TensorProto.FLOAT, None)
    stored = [numpy_helper.from_array(array, one) for one, array in constants.items()]
    return helper.make_graph(nodes, name, [], [output], stored)


def choosing(
    branches: list[onnx.GraphProto], nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray]
) -> onnx.ModelProto:
    """Return a model of x and which: an If that gives `chosen`, and what makes y of that."""
    choose = helper.make_node("If", ["which"], ["chosen"], "choose", then_branch=branches[0], else_branch=branches[1])
    graph = helper.make_graph(
        [choose, *nodes],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 16]),
            helper.make_tensor_value_info("which", TensorProto.BOOL, []),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def multiplying() -> onnx.ModelProto:
    """Return branches of two layers each, whose weights have the names of each other's, and of one behind them."""
    branches = [
        branch(
            name,
            [
                helper.make_node("Constant", [], ["v"], value=numpy_helper.from_array(half_zero(16, 16))),
                helper.make_node("MatMul", ["x", "v"], [f"h_{name}"], f"first_{name}"),
                helper.make_node("MatMul", [f"h_{name}", "w"], [f"y_{name}"], f"second_{name}"),
            ],
            f"y_{name}",
            {"w": normal(16, 4)},
        )
        for name in "ab"
    ]
    return choosing(branches, [helper.make_node("MatMul", ["chosen", "u"], ["y"], "last")], {"u": normal(4, 4)})


@pytest.mark.parametrize("which", [True, False])
def test_each_branch_trains_on_samples_of_its_own(which: bool) -> None:
    trained = constrained(multiplying())
    assert not trained.constrained.left
    feed = {**FEED, "which": np.array(which)}
    trained.train(feed)
    trained.constrained.check()
    place = f"choose.{'then' if which else 'else'}_branch"
    assert sorted(name for name, _ in trained.constrained.stored()) == [f"{place}/v", f"{place}/w", "u"]
    assert (trained.array(f"{place}/v") == 0).sum() == 128
    for either in (True, False):
        assert difference(trained, {**FEED, "which": np.array(either)}) < CLOSE


def test_both_branches_train_where_samples_take_both() -> None:
    trained = constrained(multiplying())
    for _ in range(3):
        for which in (True, False):
            trained.train({**FEED, "which": np.array(which)}, steps=1)
    places = ("choose.else_branch", "choose.then_branch")
    assert sorted(name for name, _ in trained.constrained.stored()) == [
        *(f"{place}/{name}" for place in places for name in "vw"),
        "u",
    ]
    for which in (True, False):
        feed = {**FEED, "which": np.array(which)}
        assert difference(trained, feed) < CLOSE
        assert is_exact(trained, feed)


def test_a_name_that_only_one_branch_has_is_enough() -> None:
    branches = [
        branch(
            name,
            [helper.make_node("MatMul", ["x", f"w_{name}"], [f"y_{name}"])],
            f"y_{name}",
            {f"w_{name}": normal(16, 4)},
        )
        for name in "ab"
    ]
    trained = constrained(choosing(branches, [helper.make_node("Relu", ["chosen"], ["y"])], {}))
    feed = {**FEED, "which": np.array(True)}
    trained.train(feed)
    assert [name for name, _ in trained.constrained.stored()] == ["w_a"]
    assert difference(trained, feed) < CLOSE


def test_a_weight_that_a_branch_returns_is_what_reads_it_behind_the_branch() -> None:
    constants = [helper.make_node("Constant", [], ["w"], value=numpy_helper.from_array(normal(16, 4))) for _ in "ab"]
    branches = [branch(name, [node], "w", {}) for name, node in zip("ab", constants, strict=True)]
    trained = constrained(choosing(branches, [helper.make_node("MatMul", ["x", "chosen"], ["y"], "last")], {}))
    feed = {**FEED, "which": np.array(False)}
    trained.train(feed)
    assert [name for name, _ in trained.constrained.stored()] == ["choose.else_branch/w"]
    assert difference(trained, feed) < CLOSE


def test_a_branch_is_chosen_by_its_node() -> None:
    model = loaded(multiplying())
    assert {one.name for one in trainables(model, Held(exclude=("choose",)))} == {"u"}
    assert len(trainables(model, Held(include=("choose",)))) == 4


def test_no_two_constants_have_one_name() -> None:
    model = loaded(multiplying())
    model.graph.initializers["u"].name = "choose.then_branch/w"
    names = constant_names(model)
    assert len(set(names.values())) == len(names) == 5
    assert names[model.graph.initializers["choose.then_branch/w"]] == "choose.then_branch/w"


BLOCK = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[N, 16] x) => (float[N, 16] y) <float[16] w = {gain}> {
    normed = own.scaled (x, w)
    h = own.block <by = {half}> (normed)
    m = Relu (h)
    y = own.block <by = {double}> (m)
}
<domain: "own", opset_import: ["" : 21, "own" : 1]>
block <by> (x) => (y) {
    w = Constant <value: tensor = float[16,16] {weight}> () k = Constant <value_floats: floats = @by> ()
    p = MatMul (x, w) b = Constant <value: tensor = float[16] {bias}> () s = Add (p, b) y = Mul (s, k) }
<domain: "own", opset_import: ["" : 21]>
scaled (x, gain) => (y) { t = Tanh (x) y = Mul (t, gain) }"""


def text_of(array: np.ndarray) -> str:
    return f"{{{','.join(f'{number:.6f}' for number in array.reshape(-1))}}}"


def blocks() -> ir.Model:
    """Return a model that calls a function of a weight, a bias and what callers give twice, and one of none once."""
    constants = {"weight": half_zero(16, 16), "bias": normal(16), "gain": normal(16)}
    source = BLOCK.replace("{half}", "[0.5]").replace("{double}", "[2.0]")
    for name, array in constants.items():
        source = source.replace(f"{{{name}}}", text_of(array))
    return ir.from_proto(onnx.parser.parse_model(source))


def test_constants_of_functions_train_once_for_all_calls() -> None:
    model = blocks()
    trained = constrained(model)
    assert trained.constrained.left == {GIVEN: 1}
    kinds = {name: group.name for group in trained.constrained.parameters() for name in group.names}
    assert kinds == {"block/w": "weights", "block/b": "biases", "w": "norms"}
    trained.train(FEED)
    trained.constrained.check()
    assert sorted(name for name, _ in trained.constrained.stored()) == ["block/b", "block/w", "w"]
    assert (trained.array("block/w") == 0).sum() == 128
    assert difference(trained, FEED) < CLOSE
    assert is_exact(trained, FEED)


def test_gradients_of_all_calls_of_a_function_add_up() -> None:
    model = blocks()
    inlined = model.clone()
    run_passes(inlined, "inline-functions")
    assert not any(node.domain == "own" for node in inlined.graph)
    found = []
    for one in (constrained(model), constrained(inlined)):
        one.module(torch.from_numpy(FEED["x"]))[0].square().sum().backward()
        found.append([tensor.grad for tensor in one.constrained.weights().values()])
    (whole,), (first, second) = found
    torch.testing.assert_close(whole, first + second)


def test_what_normalizes_an_input_inside_of_a_function_is_held() -> None:
    model = blocks()
    scaled = next(one for one in model.functions.values() if one.name == "scaled")
    scaled[1].replace_input_with(0, scaled.inputs[0])
    assert {one.name for one in trainables(model, Held())} == {"block/w", "block/b"}


def test_a_function_is_chosen_by_its_calls() -> None:
    model = blocks()
    for index, node in enumerate(model.graph):
        node.name = f"call {index}"
    block = next(one for one in model.functions.values() if one.name == "block")
    for node in block:
        node.name = f"inner {node.op_type}"
    assert {one.name for one in trainables(model, Held(exclude=("inner Add",)))} == {"block/w", "w"}
    assert {one.name for one in trainables(model, Held(include=("call 0",)))} == {"w"}
    assert {one.name for one in trainables(model, Held(include=("call 1",)))} == {"block/w", "block/b"}
    assert {one.name for one in trainables(model, Held(exclude=("call 3",)))} == {"w"}


GIVEN_WEIGHTS = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[N, 4] x) => (float[N, 4] y)
    <int8[4, 4] q = {codes}, float s = {0.1}, float r = {0.2}, float[4, 4] v = {weight}> {
    first = DequantizeLinear (q, s) second = DequantizeLinear (q, r)
    a = own.layer (x, first) b = own.layer (a, second) y = own.layer (b, v)
}
<domain: "own", opset_import: ["" : 21]>
layer (x, w) => (y) { p = MatMul (x, w) y = Tanh (p) }"""


def given_weights() -> ir.Model:
    """Return a model that gives a function codes with one scale, the same with another one, and a weight."""
    source = GIVEN_WEIGHTS.replace("{codes}", f"{{{','.join(str(code - 8) for code in range(16))}}}")
    model = ir.from_proto(onnx.parser.parse_model(source.replace("{weight}", text_of(normal(4, 4)))))
    for index, node in enumerate(model.graph):
        node.name = f"call {index - 2}"
    return model


def test_a_call_stands_for_what_it_gives_a_function_and_no_other_call_does() -> None:
    weights = Held(train=("weights",))
    model = given_weights()
    assert {one.name for one in trainables(model, weights)} == {"q", "v"}
    for index, others in enumerate(["v", "v", "q"]):
        (found,) = trainables(model, Held(train=("weights",), exclude=(f"call {index}",)))
        assert found.name == others
    (found,) = trainables(model, Held(train=("weights",), include=("call 2",)))
    assert found.name == "v"


def test_codes_that_calls_of_a_function_scale_differently_stay() -> None:
    trained = constrained(given_weights())
    assert trained.constrained.left == {"they are codes that are read by several scales": 1}


@pytest.mark.parametrize(("read", "kinds"), [("codes", {"scales"}), ("x", {"scales", "zero-points"})])
def test_zero_points_are_of_what_the_callers_of_a_function_convert(read: str, kinds: set[str]) -> None:
    source = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
    g (int8[4, 4] x) => (float[4, 4] y) <int8[4, 4] codes = {weight}, float s = {0.1}, int8 z = {1}> {
        y = own.decoded ({read}, s, z) }
    <domain: "own", opset_import: ["" : 21]>
    decoded (q, s, z) => (y) { y = DequantizeLinear (q, s, z) }"""
    source = source.replace("{weight}", f"{{{','.join(map(str, range(16)))}}}").replace("{read}", read)
    model = ir.from_proto(onnx.parser.parse_model(source))
    assert {one.kind for one in trainables(model, Held(train=("scales", "zero-points")))} == kinds


def test_what_holds_a_graph_stands_for_what_is_in_it() -> None:
    source = LOOPED.replace("{first}", text_of(normal(16))).replace("{second}", text_of(normal(16)))
    model = ir.from_proto(onnx.parser.parse_model(source))
    assert {one.name for one in trainables(model, Held(exclude=("Loop",)))} == {"w"}
    source = PICKED.replace("{first}", text_of(normal(16))).replace("{second}", text_of(normal(16)))
    model = ir.from_proto(onnx.parser.parse_model(source))
    next(iter(model.graph)).name = "first call"
    assert trainables(model, Held(exclude=("first call",))) == []
    assert len(trainables(model, Held(include=("first call",)))) == 2


CODED = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[N, 16] x) => (float[N, 16] y) <float[16, 16] w = {weight}, float s = {0.02}, {type} z = {zero}> {
    q = own.coded (x, s, z) d = own.decoded (q, s, z) y = MatMul (d, w) }
<domain: "own", opset_import: ["" : 21, "own" : 1]>
coded (x, s, z) => (q) { q = own.rounded (x, s, z) }
<domain: "own", opset_import: ["" : 21]>
rounded (x, s, z) => (q) { q = QuantizeLinear (x, s, z) }
<domain: "own", opset_import: ["" : 21]>
decoded (q, s, z) => (y) { y = DequantizeLinear (q, s, z) }"""


@pytest.mark.parametrize(("kind", "zero"), [("uint8", 100), ("int4", 2)])
def test_codes_of_a_function_are_of_the_type_its_caller_says(kind: str, zero: int) -> None:
    source = CODED.replace("{weight}", text_of(half_zero(16, 16))).replace("{type}", kind)
    model = ir.from_proto(onnx.parser.parse_model(source.replace("{zero}", f"{{{zero}}}")))
    trained = constrained(model, train=("weights", "scales", "zero-points"))
    for steps in (0, 3):
        trained.train(FEED, steps=steps)
        written = trained.written()
        run_passes(written, "inline-functions")  # ONNX Runtime gives functions no int4
        np.testing.assert_allclose(trained.outputs(FEED)[0], outputs_of(written, FEED)["y"], atol=CLOSE)
    assert {"s", "w"} <= {name for name, _ in trained.constrained.stored()}


PICKED = """<ir_version: 10, opset_import: ["" : 21, "own" : 1]>
g (float[N, 16] x, bool which) => (float[N, 16] y) { h = own.pick (x, which) off = Not (which) y = own.pick (h, off) }
<domain: "own", opset_import: ["" : 21]>
pick (x, which) => (y) {
    y = If (which) <then_branch = t () => (float[N, 16] p) <float[16] w = {first}> { r = Relu (x) p = Mul (r, w) },
                    else_branch = e () => (float[N, 16] q) <float[16] w = {second}> { s = Tanh (x) q = Mul (s, w) }>
}"""
LOOPED = """<ir_version: 10, opset_import: ["" : 21]>
g (float[N, 16] x, int64 n) => (float[N, 16] y) <bool on = {1}, float[16] w = {first}> {
    t = Tanh (x) s = Mul (t, w)
    y = Loop (n, on, s) <body = l (int64 i, bool c, float[N, 16] a) => (bool d, float[N, 16] r)
        <float[16] w = {second}> { d = Identity (c) u = Tanh (a) r = Mul (u, w) }> }"""


@pytest.mark.parametrize(
    ("source", "other", "names"),
    [
        (PICKED, {"which": np.array(True)}, {"pick/If->y.then_branch/w", "pick/If->y.else_branch/w"}),
        (LOOPED, {"n": np.array(3)}, {"w", "Loop->y.body/w"}),
    ],
    ids=["branches of a function", "loop"],
)
def test_weights_deep_inside_train(source: str, other: dict[str, np.ndarray], names: set[str]) -> None:
    for place in ("{first}", "{second}"):
        source = source.replace(place, text_of(1 + normal(16)))
    model = ir.from_proto(onnx.parser.parse_model(source))
    trained = constrained(model)
    feed = {**FEED, **other}
    trained.train(feed)
    assert {name for name, _ in trained.constrained.stored()} == names
    assert difference(trained, feed) < CLOSE
    assert is_exact(trained, feed)
