"""The pass `prune`: which weights it takes, what makes up for them, and what it refuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import onnxruntime
import pytest

import graphopt
from graphopt.errors import PassError, UsageError
from graphopt.passes import Prune
from graphopt.passes.analyses.linear_layers import linear_layers

pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)


def layered(op: str) -> ir.Model:
    """A model of one layer, weights drawn from a fixed seed."""
    shapes = {
        "Conv": ("float[1,4,5,5] x", [8, 4, 3, 3], "y = Conv(x, w)", "float[1,8,3,3] y"),
        "Depthwise": ("float[1,4,5,5] x", [4, 1, 3, 3], "y = Conv<group=4>(x, w)", "float[1,4,3,3] y"),
        "ConvTranspose": ("float[1,4,5,5] x", [4, 6, 3, 3], "y = ConvTranspose(x, w)", "float[1,6,7,7] y"),
        "Gemm": ("float[2,8] x", [6, 8], "y = Gemm<transB=1>(x, w)", "float[2,6] y"),
        "MatMul": ("float[2,3,8] x", [8, 6], "y = MatMul(x, w)", "float[2,3,6] y"),
        "LeftMatMul": ("float[8,3] x", [6, 8], "y = MatMul(w, x)", "float[6,3] y"),
    }
    inputs, shape, body, output = shapes[op]
    dims = ",".join(map(str, shape))
    text = f'<ir_version: 8, opset_import: ["": 17]> agraph ({inputs}, float[{dims}] w) => ({output}) {{ {body} }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(RNG.standard_normal(shape).astype(np.float32), name="w")
    model.graph.register_initializer(weight)
    return model


OPS = ["Conv", "Depthwise", "ConvTranspose", "Gemm", "MatMul", "LeftMatMul"]


@pytest.mark.parametrize("op", OPS)
def test_the_matrix_view_and_back_is_the_weight(op: str) -> None:
    model = layered(op)
    (layer,) = linear_layers(model)
    weight = model.graph.initializers["w"].const_value.numpy()
    assert layer.matrix().shape[0] == weight.shape[layer.output_axis]
    assert np.array_equal(layer.from_matrix(layer.matrix()), weight)


@pytest.mark.parametrize("op", OPS)
def test_half_of_each_kind_of_layer_becomes_zero(op: str) -> None:
    model = layered(op)
    before = model.graph.initializers["w"].const_value.numpy().copy()
    result = graphopt.optimize(model, [Prune(0.5)])
    after = linear_layers(result.model)[0].weight.const_value.numpy()
    assert (after == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(after[after != 0], before[after != 0])
    # The user's own model is not touched.
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), before)
    assert result.report.after.nonzero == (after != 0).sum()


def test_two_of_four_runs_along_the_inputs() -> None:
    result = graphopt.optimize(layered("Gemm"), "prune:pattern=2of4")
    weight = linear_layers(result.model)[0].matrix()
    assert ((weight != 0).reshape(6, 2, 4).sum(-1) == 2).all()


def test_two_of_four_runs_along_the_channels_of_a_convolution() -> None:
    """Sparse kernels take the groups at one kernel position."""
    result = graphopt.optimize(layered("Conv"), "prune:pattern=2of4")
    weight = result.model.graph.initializers["w"].const_value.numpy()
    assert ((weight != 0).sum(axis=1) == 2).all()


def test_inputs_that_no_group_divides_are_left_with_a_note() -> None:
    model = layered("Depthwise")
    result = graphopt.optimize(model, "prune:pattern=2of4")
    (note,) = [note for note in result.report.steps[-1].notes if note.left]
    assert "1 input channels are no multiple of 4" in note.text
    last = result.report.steps[-1].notes[-1].text
    assert last == "found no layer (1 left as they were, `-v` says why) to prune: the model is unchanged"
    assert result.report.steps[-1].edits == 0


def shared_with_gather() -> ir.Model:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (int64[3] ids) => (float[3, 4] y) <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2}> {
      e = Gather(w, ids)
      y = MatMul(e, w)
    }"""
    return ir.from_proto(onnx.parser.parse_model(text))


def test_a_weight_that_is_an_embedding_too_is_left_with_a_note() -> None:
    result = graphopt.optimize(shared_with_gather(), "prune")
    assert any("also read by Gather" in note.text for note in result.report.steps[-1].notes)
    assert result.report.after.nonzero == result.report.before.nonzero


def test_nothing_to_prune_is_said_and_no_error() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> agraph (float[2] x) => (float[2] y) { y = Relu(x) }'
    result = graphopt.optimize(ir.from_proto(onnx.parser.parse_model(text)), "prune")
    assert any("no layer with constant weights" in note.text for note in result.report.steps[-1].notes)


def test_nan_in_a_weight_is_an_error_that_names_it() -> None:
    model = layered("Gemm")
    broken = model.graph.initializers["w"].const_value.numpy().copy()
    broken[0, 0] = np.nan
    model.graph.initializers["w"].const_value = ir.tensor(broken, name="w")
    with pytest.raises(PassError, match="`w` holds NaN"):
        graphopt.optimize(model, "prune")


def test_a_quantized_model_is_refused_with_the_right_order() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> agraph (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }'
    model = ir.from_proto(onnx.parser.parse_model(text.replace("float[2,64] x", "float[2,64] x, float[64,64] w")))
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(RNG.standard_normal((64, 64)).astype(np.float32), name="w")
    model.graph.register_initializer(weight)
    quantized = graphopt.optimize(model, "quant:mode=weights").model
    with pytest.raises(PassError) as caught:
        graphopt.optimize(quantized, "prune")
    assert "prune,quant" in (caught.value.hint or "")


def test_weights_in_branches_and_functions_are_pruned_too() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
    agraph (float[2, 2] x, bool c) => (float[2, 2] y) {
      a = If (c) <
        then_branch = t () => (float[2, 2] p) {
          w = Constant<value = float[2, 2] {1.0, 2.0, 3.0, 4.0}>() p = MatMul(x, w)
        },
        else_branch = e () => (float[2, 2] q) { q = Abs(x) }
      >
      y = local.layer(a)
    }
    <domain: "local", opset_import: ["": 17]>
    layer (a) => (b) { w = Constant<value = float[2, 2] {1.0, 2.0, 3.0, 4.0}>() b = MatMul(a, w) }"""
    result = graphopt.optimize(ir.from_proto(onnx.parser.parse_model(text)), "prune")
    layers = linear_layers(result.model)
    assert [int((layer.matrix() != 0).sum()) for layer in layers] == [2, 2]


def two_layers() -> ir.Model:
    """A model of two layers with a bias each, wide enough for inputs to go together."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 12] x, float[16, 12] w, float[16] b, float[6, 16] v, float[6] c) => (float[N, 6] y) {
      h = Gemm<transB=1>(x, w, b)
      r = Relu(h)
      y = Gemm<transB=1>(r, v, c)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rng = np.random.default_rng(1)
    while len(model.graph.inputs) > 1:
        value = model.graph.inputs.pop()
        shape = tuple(int(dim) for dim in value.shape)
        value.const_value = ir.tensor(rng.standard_normal(shape).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    return model


def samples(count: int = 200) -> dict[str, Any]:
    rng = np.random.default_rng(2)
    mixing = rng.standard_normal((4, 12))
    mixed = rng.standard_normal((count, 4)) @ mixing + 0.3 * rng.standard_normal((count, 12))
    return {"x": (mixed + 1).astype(np.float32)}


def lost(spec: str, data: dict[str, Any] | None = None, **options: Any) -> tuple[float, ir.Model]:
    """Return how far the outputs of `two_layers` move on other samples, and the model."""
    before, fresh = two_layers(), {"x": samples(400)["x"][200:]}
    after = graphopt.optimize(before, spec, data=data, **options).model
    one, other = (run_model(model, fresh) for model in (before, after))
    return float(np.mean((one - other) ** 2)), after


def run_model(model: ir.Model, feed: dict[str, Any]) -> Any:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, feed)[0]


def zeros_of(model: ir.Model) -> list[float]:
    return [float((layer.matrix() == 0).mean()) for layer in linear_layers(model)]


@pytest.mark.parametrize("options", ["sparsity=0.5", "sparsity=0.7", "pattern=2of4", "block=2x2"])
def test_with_data_the_other_weights_make_up_for_most_of_it(options: str) -> None:
    by_magnitude, _ = lost(f"prune:{options}:method=magnitude")
    made_up_for, model = lost(f"prune:{options}", samples())
    assert made_up_for < 0.3 * by_magnitude
    assert zeros_of(model) == pytest.approx([0.7 if "0.7" in options else 0.5] * 2, abs=0.01)


def test_data_decide_the_method_unless_it_is_named() -> None:
    for spec, data, expected in (
        ("prune", None, "magnitude"),
        ("prune", samples(), "obs"),
        ("prune:method=magnitude", samples(), "magnitude"),
        ("prune:method=wanda", samples(), "wanda"),
    ):
        note = graphopt.optimize(two_layers(), spec, data=data).report.steps[-1].notes[-1]
        assert note.facts["method"] == expected


def test_wanda_takes_inputs_into_account_and_leaves_the_other_weights() -> None:
    before = linear_layers(two_layers())[0].matrix()
    _, model = lost("prune:method=wanda", samples())
    after = linear_layers(model)[0].matrix()
    assert np.array_equal(after[after != 0], before[after != 0])
    assert ((after == 0).sum(axis=1) == 6).all()
    x = samples()["x"]
    costs = np.abs(before) * np.sqrt(np.mean(x.astype(np.float64) ** 2, axis=0))
    for row, own in zip(after, costs, strict=True):
        assert own[row == 0].max() <= own[row != 0].min() * 1.1  # the pass sees some of the samples, not all


@pytest.mark.parametrize("method", ["wanda", "obs"])
def test_methods_that_need_data_ask_for_them(method: str) -> None:
    with pytest.raises(UsageError, match="calibration data"):
        graphopt.optimize(two_layers(), f"prune:method={method}")


def test_the_mean_of_what_comes_out_stays() -> None:
    data = samples(1000)
    want = run_model(two_layers(), data).mean(axis=0)
    specs = "prune:sparsity=0.8", "prune:sparsity=0.8:method=magnitude"
    obs, magnitude = (np.abs(run_model(lost(spec, data)[1], data).mean(axis=0) - want).max() for spec in specs)
    assert obs < 0.05 * magnitude


def test_a_residual_branch_makes_up_for_what_the_other_term_lost() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 12] x, float[12, 12] w, float[12, 12] v) => (float[N, 12] y) {
      h = MatMul(x, w)
      g = MatMul(h, v)
      y = Add(h, g)
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    rng = np.random.default_rng(3)
    while len(model.graph.inputs) > 1:
        value = model.graph.inputs.pop()
        value.const_value = ir.tensor(rng.standard_normal((12, 12)).astype(np.float32), name=value.name)
        model.graph.register_initializer(value)
    data = samples()
    want = run_model(model, data)
    pruned = graphopt.optimize(model, "prune:sparsity=0.6", data=data).model
    x, (one, other) = data["x"], linear_layers(pruned)
    h = x @ one.matrix().T
    kept = np.abs(run_model(pruned, data) - want).mean()
    # Solved only for what it gave itself, the second layer would leave the loss of the first in the sum.
    itself = linear_layers(model)[1].matrix()
    assert kept < np.abs(h + h @ itself.T - want).mean()
    assert (other.matrix() == 0).mean() == pytest.approx(0.6, abs=0.01)


def test_globally_the_share_is_that_of_all_layers_together() -> None:
    for data in (None, samples()):
        _, model = lost("prune:sparsity=0.6:scope=global", data)
        sizes = [layer.matrix().size for layer in linear_layers(model)]
        shares = zeros_of(model)
        assert np.average(shares, weights=sizes) == pytest.approx(0.6, abs=0.02)
        assert shares[0] != pytest.approx(shares[1], abs=1e-6)


def test_globally_without_data_one_threshold_holds_for_all() -> None:
    before = two_layers()
    after = graphopt.optimize(before, "prune:sparsity=0.6:scope=global").model
    old = np.concatenate([np.abs(layer.matrix()).reshape(-1) for layer in linear_layers(before)])
    new = np.concatenate([layer.matrix().reshape(-1) for layer in linear_layers(after)])
    assert old[new == 0].max() < old[new != 0].min()


def test_what_is_excluded_stays_and_what_matches_nothing_is_an_error() -> None:
    layered_model = two_layers()
    for index, node in enumerate(node for node in layered_model.graph if node.op_type == "Gemm"):
        node.name = f"gemm{index}"
    assert zeros_of(graphopt.optimize(layered_model, "prune:exclude=gemm0").model) == pytest.approx([0, 0.5], abs=0.01)
    assert zeros_of(graphopt.optimize(layered_model, "prune:include=gemm0").model) == pytest.approx([0.5, 0], abs=0.01)
    with pytest.raises(UsageError, match="matches no node"):
        graphopt.optimize(layered_model, "prune:include=conv*")


def test_no_sparsity_leaves_the_model_and_says_so() -> None:
    for data in (None, samples()):
        result = graphopt.optimize(two_layers(), "prune:sparsity=0", data=data)
        assert result.report.steps[-1].edits == 0
        assert any("unchanged" in note.text for note in result.report.steps[-1].notes)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("prune:sparsity=1", "leaves no weight"),
        ("prune:sparsity=1.5", "out of range"),
        ("prune:sparsity=-0.1", "out of range"),
        ("prune:block=4", "`block` cannot be `4`"),
        ("prune:block=0x4", "`block` cannot be `0x4`"),
        ("prune:pattern=2of4:block=1x4", "exclude each other"),
        ("prune:pattern=2of4:scope=global", "exclude each other"),
        ("prune:pattern=4of4", "`pattern` cannot be"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_a_hint(spec: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        graphopt.optimize(two_layers(), spec)
    assert caught.value.hint


def test_layers_nothing_can_be_seen_of_are_pruned_by_magnitude_and_said() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 4] x, bool c) => (float[N, 4] y) {
      y = If (c) <
        then_branch = t () => (float[N, 4] p) {
          w = Constant<value = float[4, 4] {1,2,3,4,5,6,7,8,9,10,11,12,13,14,15,16}>() p = MatMul(x, w)
        },
        else_branch = e () => (float[N, 4] q) { q = Abs(x) }
      >
    }"""
    data = {"x": np.ones((3, 4), np.float32), "c": np.ones(3, bool)}
    model = ir.from_proto(onnx.parser.parse_model(text))
    result = graphopt.optimize(model, "prune:method=obs", data=data)
    assert any("pruned by magnitude" in note.text and not note.left for note in result.report.steps[-1].notes)
    assert zeros_of(result.model) == [0.5]


def test_half_precision_weights_stay_in_their_type() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float16[N, 12] x) => (float16[N, 12] y) { y = MatMul(x, w) }"""
    model = ir.from_proto(
        onnx.parser.parse_model(text.replace("(float16[N, 12] x)", "(float16[N, 12] x, float16[12, 12] w)"))
    )
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(RNG.standard_normal((12, 12)).astype(np.float16), name="w")
    model.graph.register_initializer(value)
    result = graphopt.optimize(model, "prune", data={"x": samples()["x"].astype(np.float16)})
    (layer,) = linear_layers(result.model)
    assert layer.matrix().dtype == np.float16
    assert (layer.matrix() == 0).mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize(
    "spec", ["quant:mode=static", "quant:mode=weights", "quant:mode=weights:weights=int4:group=16"]
)
@pytest.mark.parametrize("pattern", ["sparsity=0.6", "pattern=2of4"])
def test_zeros_stay_zero_through_quantization(spec: str, pattern: str) -> None:
    """What unit vectors come out as are the weights, as they are read: zero where they were pruned."""
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[N, 64] x, float[64, 64] w) => (float[N, 64] y) { y = MatMul(x, w) }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    value = model.graph.inputs.pop()
    value.const_value = ir.tensor(RNG.standard_normal((64, 64)).astype(np.float32), name="w")
    model.graph.register_initializer(value)
    data = {"x": RNG.standard_normal((200, 64)).astype(np.float32)}
    pruned = graphopt.optimize(model, f"prune:{pattern}", data=data).model
    quantized = graphopt.optimize(model, f"prune:{pattern},{spec}", data=data).model
    assert [node.op_type for node in quantized.graph] != ["MatMul"]
    weights = run_model(quantized, {"x": np.eye(64, dtype=np.float32)})
    # Kernels that take zero points out at the end leave what float32 rounds off.
    assert np.abs(weights[linear_layers(pruned)[0].matrix().T == 0]).max() < 1e-5
