"""Pruning of the residual width: which streams may get narrower, that normalizations follow, what makes up for it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import shapes
from graphopt.data import open_data
from graphopt.errors import GraphoptError, UsageError
from graphopt.passes import PruneHidden
from graphopt.passes.analyses.channel_groups import channel_groups
from graphopt.passes.lossy.stream_norms import keep_norms

from .pass_runs import outputs_of
from .removed_channels import context, parsed

WIDTH, LENGTH = 16, 5

# Two blocks of a language model: a table, a stream, root mean square norms as exporters write them.
LANGUAGE = """<ir_version: 8, opset_import: ["": 17]>
language (int64[N, 5] ids) => (float[N, 5, 40] y)
<float[40, 16] table, float[16] varied1, float[16] varied2, float[16] varied3, float[16, 24] up1, float[24, 16] down1,
 float[16, 24] up2, float[24, 16] down2, float[16, 40] head, float tiny = {1e-5}>
{
    x0 = Gather (table, ids)
    q1 = Mul (x0, x0)
    m1 = ReduceMean <axes = [-1]> (q1)
    e1 = Add (m1, tiny)
    t1 = Sqrt (e1)
    d1 = Div (x0, t1)
    n1 = Mul (d1, varied1)
    u1 = MatMul (n1, up1)
    g1 = Relu (u1)
    o1 = MatMul (g1, down1)
    x1 = Add (x0, o1)
    q2 = Mul (x1, x1)
    m2 = ReduceMean <axes = [-1]> (q2)
    e2 = Add (m2, tiny)
    t2 = Sqrt (e2)
    d2 = Div (x1, t2)
    n2 = Mul (d2, varied2)
    u2 = MatMul (n2, up2)
    g2 = Relu (u2)
    o2 = MatMul (g2, down2)
    x2 = Add (x1, o2)
    q3 = Mul (x2, x2)
    m3 = ReduceMean <axes = [-1]> (q3)
    e3 = Add (m3, tiny)
    t3 = Sqrt (e3)
    d3 = Div (x2, t3)
    n3 = Mul (d3, varied3)
    y = MatMul (n3, head)
}"""

WITH_LAYER_NORM = """<ir_version: 8, opset_import: ["": 17]>
norms (float[N, 5, 6] x) => (float[N, 5, 9] y)
<float[6, 16] w0, float[16] varied1, float[16] shift1, float[16] varied2, float[16] shift2, float[16, 24] up,
 float[24, 16] down, float[16, 9] head>
{
    x0 = MatMul (x, w0)
    n1 = LayerNormalization <axis = -1> (x0, varied1, shift1)
    u1 = MatMul (n1, up)
    g1 = Relu (u1)
    o1 = MatMul (g1, down)
    x1 = Add (x0, o1)
    n2 = LayerNormalization <axis = -1> (x1, varied2, shift2)
    y = MatMul (n2, head)
}"""

IMAGES = """<ir_version: 8, opset_import: ["": 17]>
images (float[N, 3, 8, 8] x) => (float[N, 4] y)
<float[16, 3, 3, 3] w0, float[16] b0, float[8, 16, 3, 3] w1, float[16, 8, 3, 3] w2, float[16] b2, float[4, 16] w3>
{
    c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
    s0 = Relu (c0)
    c1 = Conv <pads = [1, 1, 1, 1]> (s0, w1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2, b2)
    a1 = Add (s0, c2)
    s1 = Relu (a1)
    p = GlobalAveragePool (s1)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w3)
}"""


def named(text: str) -> ir.Model:
    model = parsed(text)
    for node in model.graph:
        node.name = node.outputs[0].name
    return model


def samples(text: str, seed: int = 0, count: int = 64) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    if "language" in text:
        return {"ids": rng.integers(0, 40, (count, LENGTH))}
    size = (count, 3, 8, 8) if "images (" in text else (count, LENGTH, 6)
    return {"x": rng.standard_normal(size).astype(np.float32)}


def run(text: str, spec: Any, *, data: bool = True, model: ir.Model | None = None) -> graphopt.Result:
    return graphopt.optimize(model or named(text), spec, data=samples(text) if data else None)


def remarks(result: graphopt.Result) -> str:
    return " ".join(note.text for step in result.report.steps for note in step.notes)


def noise(was: ir.Model, now: ir.Model, feed: dict[str, np.ndarray]) -> float:
    before, after = (outputs_of(model, feed)["y"] for model in (was, now))
    return float(np.square(after - before).sum() / np.square(before).sum())


def with_content(model: ir.Model, **contents: np.ndarray) -> ir.Model:
    for name, content in contents.items():
        model.graph.initializers[name].const_value = ir.tensor(content.astype(np.float32), name=name)
    return model


def content(model: ir.Model, name: str) -> np.ndarray:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor.numpy()


@pytest.mark.parametrize("text", [LANGUAGE, WITH_LAYER_NORM, IMAGES])
@pytest.mark.parametrize("data", [False, True])
def test_the_stream_gets_narrower(text: str, data: bool) -> None:
    result = run(text, PruneHidden(ratio=0.25, multiple=4), data=data)
    assert "(left: 12 of 16)" in remarks(result)
    assert shapes.infer_shapes(result.model) is None
    assert np.isfinite(outputs_of(result.model, samples(text, count=2))["y"]).all()
    name = {LANGUAGE: "table", WITH_LAYER_NORM: "w0", IMAGES: "w0"}[text]
    assert (
        content(result.model, name).shape == {LANGUAGE: (40, 12), WITH_LAYER_NORM: (6, 12), IMAGES: (12, 3, 3, 3)}[text]
    )


@pytest.mark.parametrize("text", [LANGUAGE, WITH_LAYER_NORM, IMAGES])
def test_all_layers_make_up_for_it(text: str) -> None:
    fresh = samples(text, seed=5, count=16)
    by_data, by_weights = (run(text, PruneHidden(ratio=0.25, multiple=4), data=data).model for data in (True, False))
    assert noise(named(text), by_data, fresh) < 0.7 * noise(named(text), by_weights, fresh)


def test_features_nobody_writes_cost_nothing() -> None:
    """Of a root mean square over fewer features, the scale makes up for exactly the zeros that are gone."""
    model, empty = named(LANGUAGE), [2, 7, 8, 13]
    zeroed = {name: content(model, name).copy() for name in ("table", "down1", "down2")}
    for array in zeroed.values():
        array[:, empty] = 0
    with_content(model, **zeroed)
    result = run(LANGUAGE, PruneHidden(ratio=0.25, multiple=4), model=model.clone())
    np.testing.assert_array_equal(content(result.model, "table"), np.delete(zeroed["table"], empty, axis=1))
    assert noise(model, result.model, samples(LANGUAGE, seed=5)) < 1e-6


@pytest.mark.parametrize(("text", "norms"), [(LANGUAGE, 3), (WITH_LAYER_NORM, 2)])
def test_scales_follow_the_share_of_what_is_left(text: str, norms: int) -> None:
    model = named(text)
    ctx = context(model)
    ctx.data = open_data(samples(text), model)
    (group,) = [one for one in channel_groups(model).groups if one.mixers]
    kept = np.arange(WIDTH) < 12
    factors = keep_norms({group: kept}, ctx).factors
    assert len(factors) == norms
    reads = {"varied1": "x0", "varied2": "x1", "varied3": "x2"}
    probe = model.clone()
    for value in [value for node in probe.graph for value in node.outputs if value.name in reads.values()]:
        probe.graph.outputs.append(value)
    found = outputs_of(probe, samples(text))
    units = {axis.value.name: numbers for axis, numbers in group.axes.items()}
    for scale, factor in factors.items():
        x = found[reads[scale.name or ""]].astype(np.float64)
        stays = kept[units[scale.name]]
        if text == WITH_LAYER_NORM:
            x -= x.mean(axis=(0, 1, 2))
        powers = np.square(x).mean(axis=(0, 1))
        assert factor == pytest.approx(np.sqrt(powers[stays].mean() / powers.mean()), rel=1e-3)


def test_a_stream_mixed_otherwise_is_left() -> None:
    text = IMAGES.replace("p = GlobalAveragePool (s1)", "n = LRN <size = 3> (s1)\n    p = GlobalAveragePool (n)")
    result = run(text, PruneHidden(ratio=0.25))
    assert "LRN mixes their features" in remarks(result)
    assert "the model is unchanged" in remarks(result)


def test_a_stream_that_is_an_output_is_said_to_stay() -> None:
    text = LANGUAGE.replace("(float[N, 5, 40] y)", "(float[N, 5, 40] y, float[N, 5, 16] x2)")
    result = run(text, PruneHidden(ratio=0.25))
    assert "is an output of the model" in remarks(result)
    assert content(result.model, "table").shape == (40, WIDTH)


@pytest.mark.parametrize("ratio", ["0", "1", "2", "-0.5"])
def test_ratios_that_mean_nothing_are_refused(ratio: str) -> None:
    with pytest.raises(UsageError, match="pass `prune-hidden`: option `ratio` is out of range") as caught:
        run(IMAGES, f"prune-hidden:ratio={ratio}")
    assert caught.value.hint


def test_streams_are_chosen_by_name() -> None:
    assert "the model is unchanged" in remarks(run(IMAGES, PruneHidden(ratio=0.25, exclude=("c0",))))
    with pytest.raises(UsageError, match="matches no node"):
        run(IMAGES, PruneHidden(include=("nothing*",)))


def test_a_quantized_model_is_refused_with_the_right_order() -> None:
    quantized = run(IMAGES, "quant:mode=weights").model
    with pytest.raises(GraphoptError, match="already quantized") as caught:
        graphopt.optimize(quantized, "prune-hidden")
    assert "prune-hidden,quant" in (caught.value.hint or "")


@pytest.mark.parametrize(("file", "left"), [("stories260k.onnx", "56 of 64"), ("resnet20_cifar10.onnx", "14 of 16")])
def test_real_models_get_narrower_and_run(shared: Path, file: str, left: str) -> None:
    model = graphopt.load(shared / "assets" / "models" / file)
    result = graphopt.optimize(model, PruneHidden(ratio=0.125, multiple=2), verify="off")
    assert left in remarks(result)
    name = result.model.graph.inputs[0].name or ""
    feed = np.ones((2, 16), np.int64) if "stories" in file else np.ones((2, 3, 32, 32), np.float32)
    assert all(np.isfinite(value).all() for value in outputs_of(result.model, {name: feed}).values())
    assert result.report.after.parameters < result.report.before.parameters
