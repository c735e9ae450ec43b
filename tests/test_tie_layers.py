"""Tied layers: near copies are found first, their common weight is the best one, and what cannot be tied is said."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt import walk
from graphopt.authoring import Context
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.data import open_data
from graphopt.errors import PassError, UsageError
from graphopt.passes import TieLayers
from graphopt.passes.analyses.linear_layers import LinearLayer, linear_layers
from graphopt.passes.lossy import similar_layers, tie_layers
from graphopt.passes.lossy.similar_layers import Group, Similarity, alike
from graphopt.rewriter import Rewriter

from .pass_runs import loaded, outputs_of

MODELS = Path(__file__).resolve().parent.parent / "models"
WIDTH, HIDDEN = 12, 24


def transformer(blocks: int = 6, *, bias: bool = True, seed: int = 0) -> onnx.ModelProto:
    """Return residual blocks of two layers each, `up0` to `down5`, no two of which are alike."""
    rng = np.random.default_rng(seed)
    lines, read = [], "x"
    weights: dict[str, np.ndarray] = {}
    for block in range(blocks):
        for name, shape in ((f"up{block}", (WIDTH, HIDDEN)), (f"down{block}", (HIDDEN, WIDTH))):
            weights[f"w_{name}"] = rng.standard_normal(shape) / np.sqrt(shape[0])
            if bias:
                weights[f"b_{name}"] = 0.5 * rng.standard_normal(shape[1])
        up, down = (f", b_{side}{block}" if bias else "" for side in ("up", "down"))
        lines += [
            f"up{block} = Gemm ({read}, w_up{block}{up})",
            f"relu{block} = Relu (up{block})",
            f"down{block} = Gemm (relu{block}, w_down{block}{down})",
            f"sum{block} = Add ({read}, down{block})",
        ]
        read = f"sum{block}"
    text = '<ir_version: 8, opset_import: ["": 17]>\nmodel (float[N, 12] x) => (float[N, 12] y)\n{\n'
    proto = onnx.parser.parse_model(text + "\n".join([*lines, f"y = Identity ({read})"]) + "\n}")
    for name, content in weights.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(content.astype(np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    return proto


def planted(*pairs: tuple[str, str], noise: float = 0.01, **options: Any) -> ir.Model:
    """Return that model with second layers near copies of first ones."""
    proto = transformer(**options)
    content = {tensor.name: tensor for tensor in proto.graph.initializer}
    rng = np.random.default_rng(7)
    for first, second in pairs:
        weight = onnx.numpy_helper.to_array(content[f"w_{first}"])
        near = weight * (1 + noise * rng.standard_normal(weight.shape))
        content[f"w_{second}"].CopyFrom(onnx.numpy_helper.from_array(near.astype(np.float32), f"w_{second}"))
    return loaded(proto)


def samples(count: int = 400, seed: int = 1) -> dict[str, np.ndarray]:
    """Return inputs that go together, in the same way whatever the seed."""
    together = np.random.default_rng(0).standard_normal((WIDTH, WIDTH))
    return {"x": (np.random.default_rng(seed).standard_normal((count, WIDTH)) @ together + 0.5).astype(np.float32)}


def weights_of(model: ir.Model) -> dict[str, str]:
    """Return which weight each layer reads."""
    return {layer.node.name or "": layer.weight.name or "" for layer in linear_layers(model)}


def texts(result: graphopt.Result) -> str:
    return "\n".join(note.text for note in result.report.steps[-1].notes)


def facts(result: graphopt.Result) -> Any:
    return next(note.facts for note in result.report.steps[-1].notes if "groups" in note.facts)


def noise_of(model: ir.Model, other: ir.Model) -> float:
    """Return the noise in the outputs on samples not calibrated on, as a share of their power."""
    feed = samples(64, seed=9)
    (wanted,), (given,) = outputs_of(model, feed).values(), outputs_of(other, feed).values()
    return float(np.square(wanted - given).mean() / np.square(wanted - wanted.mean(0)).mean())


def context(model: ir.Model, data: dict[str, np.ndarray] | None) -> Context:
    opened = open_data(data, model) if data is not None else None
    return Context(model, Rewriter(model), TARGETS["portable"], OnnxRuntime(), threads=1, data=opened)


@pytest.mark.parametrize("data", [True, False])
def test_near_copies_are_found_first(data: bool) -> None:
    model = planted(("up0", "up4"), ("down1", "down2"), ("up0", "up3"))
    result = graphopt.optimize(model, "tie-layers:params=0.75", data=samples() if data else None)
    assert facts(result)["groups"] == [["up0", "up3", "up4"], ["down1", "down2"]]
    assert facts(result)["left"] == pytest.approx(0.75)
    assert max(loss for group in facts(result)["predicted_errors"] for loss in group) < 1e-3
    read = weights_of(result.model)
    assert read["up0"] == read["up3"] == read["up4"] == "w_up0"
    assert read["down1"] == read["down2"] == "w_down1"
    assert len(set(read.values())) == 12 - 3
    stored = set(result.model.graph.initializers)
    assert not {"w_up3", "w_up4", "w_down2"} & stored
    assert result.report.after.parameters < result.report.before.parameters
    assert noise_of(model, result.model) < 1e-3


def test_layers_that_are_not_alike_cost_more_and_say_so() -> None:
    near, far = planted(("up0", "up4")), planted()
    wanted = "tie-layers:params=0.95"
    results = [graphopt.optimize(model, wanted, data=samples()) for model in (near, far)]
    assert noise_of(far, results[1].model) > 10 * noise_of(near, results[0].model)
    losses = [max(facts(result)["predicted_errors"][0]) for result in results]
    assert losses[1] > 10 * losses[0]
    assert "as much as before" in texts(results[1])


@pytest.mark.parametrize("bias", [True, False])
def test_the_weight_loses_less_than_the_average_of_both(bias: bool) -> None:
    """By the objective, on other samples than those it was solved for."""
    model = planted(("up0", "up4"), noise=0.5, bias=bias)
    (group,) = groups_of(model, "up0", "up4")
    layers = group.layers
    seen = [centred(model, layer, samples(2000, seed=5)) if bias else second(model, layer) for layer in layers]

    def lost(weight: np.ndarray) -> list[float]:
        return [
            float(np.trace(d @ moment @ d.T) / np.trace(w @ moment @ w.T))
            for layer, moment in zip(layers, seen, strict=True)
            for w, d in [(layer.matrix(), layer.matrix() - weight)]
        ]

    average = (layers[0].matrix() + layers[1].matrix()) / 2
    assert sum(lost(group.weight)) < 0.95 * sum(lost(average))
    assert group.errors == pytest.approx(lost(group.weight), rel=0.3)


def groups_of(model: ir.Model, *names: str) -> list[Group]:
    ctx = context(model, samples(2000))
    wanted: Any = SimpleNamespace(allows=lambda node: node.name in names)
    return Similarity(alike(linear_layers(model), wanted, ctx), ctx).groups()


def inputs_of(model: ir.Model, layer: LinearLayer, feed: dict[str, np.ndarray]) -> np.ndarray:
    if layer.input.is_graph_input():
        return feed[layer.input.name]
    shown = model.clone()
    value = next(value for node in shown.graph for value in node.outputs if value.name == layer.input.name)
    shown.graph.outputs.append(value)
    return outputs_of(shown, feed)[value.name]


def centred(model: ir.Model, layer: LinearLayer, feed: dict[str, np.ndarray]) -> np.ndarray:
    return np.cov(inputs_of(model, layer, feed).T)


def second(model: ir.Model, layer: LinearLayer) -> np.ndarray:
    rows = inputs_of(model, layer, samples(2000, seed=5))
    return rows.T @ rows / len(rows)


def test_biases_take_what_means_of_outputs_lost() -> None:
    model = planted(("up0", "up4"), noise=0.5)
    before = {layer.node.name: layer for layer in linear_layers(model.clone())}
    means = {name: inputs_of(model, before[name], samples()).mean(0) for name in ("up0", "up4")}
    tied = model.clone()
    TieLayers(params=0.95).run(tied, context(tied, samples()))
    after = {layer.node.name: layer for layer in linear_layers(tied)}
    assert after["up0"].weight is after["up4"].weight
    for name, mean in means.items():
        now = inputs_of(tied, after[name], samples()).mean(0)
        outputs = [
            layer.matrix() @ read + walk.constant_tensor(layer.bias).numpy()
            for layer, read in ((before[name], mean), (after[name], now))
        ]
        assert np.allclose(*outputs, atol=1e-4)
        assert not np.allclose(before[name].matrix() @ mean, after[name].matrix() @ now, atol=1e-2)


def test_other_layers_make_up_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = planted(("up0", "up4"), noise=0.5)
    result = graphopt.optimize(model, "tie-layers:params=0.95:include=up*", data=samples(2000))
    assert "4 other layers solved anew" in texts(result)
    monkeypatch.setattr(tie_layers, "why_fixed", lambda layer, every: "it is to stay")
    alone = graphopt.optimize(model, "tie-layers:params=0.95:include=up*", data=samples(2000))
    assert "solved anew" not in texts(alone)
    assert noise_of(model, result.model) < 0.8 * noise_of(model, alone.model)
    kept = [one.model.graph.initializers["w_down3"].const_value.numpy() for one in (result, alone)]
    assert np.array_equal(*kept), "what is not included stays"


def test_error_says_when_to_stop() -> None:
    model = planted(("up0", "up4"), ("down1", "down2"), ("up2", "up3"), noise=0.02)
    few = graphopt.optimize(model, "tie-layers:error=0.001", data=samples())
    assert sorted(map(tuple, facts(few)["groups"])) == [("down1", "down2"), ("up0", "up4"), ("up2", "up3")]
    more = graphopt.optimize(model, "tie-layers:error=0.3", data=samples())
    assert facts(more)["left"] < facts(few)["left"]
    for result, asked in ((few, 0.001), (more, 0.3)):
        assert sum(loss for group in facts(result)["predicted_errors"] for loss in group) / 12 <= asked
    none = graphopt.optimize(planted(), "tie-layers:error=0.000001", data=samples())
    assert "no two layers are alike enough" in texts(none)
    assert none.report.steps[-1].edits == 0


def test_all_that_can_be_tied_is_not_enough_for_everything() -> None:
    result = graphopt.optimize(planted(blocks=2), "tie-layers:params=0.3")
    assert "30% of the weights cannot be reached" in texts(result)
    assert sorted(map(sorted, facts(result)["groups"])) == [["down0", "down1"], ["up0", "up1"]]


def test_include_and_exclude_choose() -> None:
    model = planted(("up0", "up4"), ("down1", "down2"))
    result = graphopt.optimize(model, "tie-layers:params=0.95:exclude=up4", data=samples())
    assert facts(result)["groups"] == [["down1", "down2"]]
    only = graphopt.optimize(model, "tie-layers:params=0.9:include=up*", data=samples())
    assert facts(only)["groups"] == [["up0", "up4"]]


CONVS = """<ir_version: 8, opset_import: ["": 17]>
convs (float[N, 4, 8, 8] x) => (float[N, 4, 8, 8] y)
{
    c0 = Conv <pads = [1, 1, 1, 1], group = 2> (x, w0, b0)
    r0 = Relu (c0)
    c1 = Conv <pads = [2, 2, 2, 2], dilations = [2, 2], group = 2> (r0, w1, b1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
    r2 = Relu (c2)
    c3 = Conv <pads = [1, 1, 1, 1], group = 2> (r2, w3, b0)
    y = Add (c3, x)
}"""


def test_convolutions_share_kernels_and_keep_their_windows() -> None:
    proto = onnx.parser.parse_model(CONVS)
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((4, 2, 3, 3))
    contents = {"w0": kernel, "w1": kernel + 0.01 * rng.standard_normal(kernel.shape)}
    contents |= {"w2": rng.standard_normal((4, 4, 3, 3)), "w3": rng.standard_normal(kernel.shape)}
    contents |= {"b0": rng.standard_normal(4), "b1": rng.standard_normal(4)}
    for name, content in contents.items():
        proto.graph.initializer.append(onnx.numpy_helper.from_array(content.astype(np.float32), name))
    for node in proto.graph.node:
        node.name = node.output[0]
    model = loaded(proto)
    images = rng.standard_normal((32, 4, 8, 8)).astype(np.float32)
    result = graphopt.optimize(model, "tie-layers:params=0.85", data={"x": images})
    assert facts(result)["groups"] == [["c0", "c1"]]
    assert "layers left: 1, as no other layer has a weight of their shape" in texts(result)
    (wanted,), (given,) = outputs_of(model, {"x": images}).values(), outputs_of(result.model, {"x": images}).values()
    assert np.square(wanted - given).mean() < 1e-3 * np.square(wanted).mean()
    # The bias that two layers shared is shifted for one of them alone.
    read = {node.name: node.inputs[2].name for node in result.model.graph if node.name in ("c0", "c3")}
    assert read["c0"] != read["c3"]


def test_wide_layers_are_looked_at_by_single_inputs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(similar_layers, "SUMS_LIMIT", 1)
    result = graphopt.optimize(planted(("up0", "up4")), "tie-layers:params=0.95", data=samples())
    assert facts(result)["groups"] == [["up0", "up4"]]
    assert "each counts by itself" in texts(result)


def test_what_an_error_does_to_the_outputs_counts() -> None:
    """The last block is multiplied by next to nothing: its layers are tied although they are less alike."""
    proto = transformer(4)
    content = {tensor.name: tensor for tensor in proto.graph.initializer}
    for name in ("w_down2", "w_down3"):
        small = onnx.numpy_helper.to_array(content[name]) * np.float32(1e-4)
        content[name].CopyFrom(onnx.numpy_helper.from_array(small, name))
    model = loaded(proto)
    result = graphopt.optimize(model, "tie-layers:params=0.9:include=down*", data=samples())
    assert facts(result)["groups"] == [["down2", "down3"]]


def test_no_far_smaller_model_is_made_than_was_asked_for() -> None:
    result = graphopt.optimize(planted(blocks=2), "tie-layers:params=0.99")
    assert "no two layers could share a weight and leave about 99%" in texts(result)


def test_shared_and_nested_weights_stay() -> None:
    model = planted()
    nodes = {node.name: node for node in model.graph}
    nodes["up1"].replace_input_with(1, model.graph.initializers["w_up0"])
    result = graphopt.optimize(model, "tie-layers:params=0.9", data=samples())
    assert "layers left: 2, as their weight is shared already" in texts(result)
    again = graphopt.optimize(result.model, "tie-layers:params=0.9", data=samples())
    tied = {name for group in facts(result)["groups"] for name in group}
    assert not tied & {name for group in facts(again)["groups"] for name in group}


def test_a_model_without_a_pair_is_unchanged() -> None:
    result = graphopt.optimize(planted(blocks=1), "tie-layers")
    assert "no two layers that could share a weight" in texts(result)
    assert result.report.steps[-1].edits == 0


def test_zeros_are_no_trouble() -> None:
    proto = transformer(3)
    for tensor in proto.graph.initializer:
        if tensor.name in ("w_up0", "w_up1", "w_down2"):
            tensor.CopyFrom(onnx.numpy_helper.from_array(np.zeros(tensor.dims, np.float32), tensor.name))
    result = graphopt.optimize(loaded(proto), "tie-layers:params=0.9", data=samples())
    assert noise_of(loaded(proto), result.model) < 1
    assert np.isfinite(facts(result)["left"])


def test_nan_weights_are_named() -> None:
    model = planted()
    value = model.graph.initializers["w_down3"]
    value.const_value = ir.tensor(np.full((HIDDEN, WIDTH), np.nan, np.float32), name="w_down3")
    with pytest.raises(PassError, match="`w_down3` holds NaN"):
        graphopt.optimize(model, "tie-layers")


def test_a_quantized_model_is_refused_with_the_right_order() -> None:
    quantized = graphopt.optimize(planted(), "quant:mode=weights").model
    with pytest.raises(PassError, match="already quantized") as caught:
        graphopt.optimize(quantized, "tie-layers")
    assert "tie-layers,quant" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="comes too late") as wrong:
        graphopt.optimize(planted(), "prune,tie-layers")
    assert "tie-layers,prune" in (wrong.value.hint or "")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"params": 0.9, "error": 0.1}, "cannot both be given"),
        ({"params": 1.5}, "`params` is out of range: `1.5`"),
        ({"params": 0.0}, "`params` is out of range: `0`"),
        ({"error": 1.0}, "`error` is out of range: `1`"),
    ],
)
def test_wrong_options_are_refused_where_passes_are_made(options: dict[str, float], message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        TieLayers(**options)
    assert caught.value.hint


def test_a_budget_stops_what_loses_too_much() -> None:
    model = planted()
    with pytest.raises(graphopt.GraphoptError) as caught:
        graphopt.optimize(model, "tie-layers:params=0.3", data=samples(), budget="sqnr=60")
    assert caught.value.hint


def test_ties_survive_what_comes_behind() -> None:
    """Pruned and stored in integers, a common weight is still one."""
    model = planted(("up0", "up4"))
    result = graphopt.optimize(model, "tie-layers:params=0.95,prune:sparsity=0.3,quant:mode=weights", data=samples())
    sources = {}
    for node in result.model.graph:
        if node.name in ("up0", "up4"):
            value = node.inputs[1]
            while value is not None and value.producer() is not None:
                value = value.producer().inputs[0]
            sources[node.name] = value
    assert sources["up0"] is sources["up4"]


def test_classes_hold_what_has_one_layout() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]>
    layouts (float[N, 6] x) => (float[N, 6] y)
    <float[6, 6] w0, float[6, 6] w1, float[6, 6] w2, float[6, 6] w3, float[6, 6] w4>
    {
        a = Gemm (x, w0)
        b = Gemm <transB = 1> (a, w1)
        c = MatMul (b, w2)
        d = Gemm <alpha = 2.0> (c, w3)
        y = Gemm (d, w4)
    }"""
    proto = onnx.parser.parse_model(text)
    for info in list(proto.graph.value_info):
        if info.name.startswith("w"):
            content = np.random.default_rng(0).standard_normal((6, 6)).astype(np.float32)
            proto.graph.initializer.append(onnx.numpy_helper.from_array(content, info.name))
            proto.graph.value_info.remove(info)
    model = loaded(proto)
    ctx = context(model, None)
    everything: Any = SimpleNamespace(allows=lambda node: True)
    (found,) = alike(linear_layers(model), everything, ctx)
    assert [layer.weight.name for layer in found] == ["w0", "w4"]
    (group,) = Similarity([found], ctx).groups()
    assert group.errors == (0.0, 0.0)


def test_a_real_network_is_tied_and_keeps_its_score() -> None:
    samples = {name: array[:256] for name, array in np.load(MODELS / "digits.npz").items()}
    result = graphopt.optimize(MODELS / "digits_cnn.onnx", "tie-layers:params=0.8", data=samples, budget="top1=3%")
    assert result.report.ok
    assert facts(result)["left"] <= 0.8
    assert result.report.after.bytes < 0.85 * result.report.before.bytes
    assert result.report.after.metrics["top1"] >= result.report.before.metrics["top1"] - 0.03
