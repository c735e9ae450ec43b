"""Pruning of layers: which residual blocks are found, which of them go, what makes up for it, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import shapes
from graphopt.errors import GraphoptError, PassError, UsageError
from graphopt.passes import PruneLayers
from graphopt.passes.analyses.residual_blocks import residual_blocks

from .pass_runs import outputs_of
from .removed_channels import parsed

# Three blocks: the second adds next to nothing, and the last changes the width, which makes it none.
CNN = """<ir_version: 8, opset_import: ["": 17]>
cnn (float[N, 3, 8, 8] x) => (float[N, 4] y)
<float[8, 3, 3, 3] w0, float[8, 8, 3, 3] w1, float[8, 8, 3, 3] w2, float[8, 8, 3, 3] w3, float[8, 8, 3, 3] weak,
 float[16, 8, 1, 1] w5, float[16, 8, 3, 3] w6, float[16, 16, 3, 3] w7, float[4, 16] w8>
{
    c0 = Conv <pads = [1, 1, 1, 1]> (x, w0)
    s0 = Relu (c0)
    c1 = Conv <pads = [1, 1, 1, 1]> (s0, w1)
    r1 = Relu (c1)
    c2 = Conv <pads = [1, 1, 1, 1]> (r1, w2)
    a1 = Add (c2, s0)
    s1 = Relu (a1)
    c3 = Conv <pads = [1, 1, 1, 1]> (s1, w3)
    r3 = Relu (c3)
    c4 = Conv <pads = [1, 1, 1, 1]> (r3, weak)
    a2 = Add (s1, c4)
    s2 = Relu (a2)
    c5 = Conv (s2, w5)
    c6 = Conv <pads = [1, 1, 1, 1]> (s2, w6)
    r6 = Relu (c6)
    c7 = Conv <pads = [1, 1, 1, 1]> (r6, w7)
    a3 = Add (c5, c7)
    p = GlobalAveragePool (a3)
    f = Flatten (p)
    y = Gemm <transB = 1> (f, w8)
}"""

# Two branches of one value, as GPT-J has them; the first sum is a term of the second.
PARALLEL = """<ir_version: 8, opset_import: ["": 17]>
parallel (float[N, 6] x) => (float[N, 3] y)
<float[6, 6] w0, float[6, 9] w1, float[9, 6] w2, float[6, 6] w3, float[6, 3] w4>
{
    h = MatMul (x, w0)
    u = MatMul (h, w1)
    g = Relu (u)
    d = MatMul (g, w2)
    a1 = Add (h, d)
    m = MatMul (h, w3)
    t = Tanh (m)
    a2 = Add (a1, t)
    r = Relu (a2)
    y = MatMul (r, w4)
}"""


def named(text: str) -> ir.Model:
    model = parsed(text)
    for node in model.graph:
        node.name = node.outputs[0].name
    for value in model.graph.initializers.values():
        if value.name == "weak" and value.const_value is not None:
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1e-3), name="weak")
    return model


def images(count: int = 32) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 3, 8, 8)).astype(np.float32)


def rows(count: int = 64) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 6)).astype(np.float32)


def run(model: ir.Model, spec: Any, data: np.ndarray | None = None) -> graphopt.Result:
    return graphopt.optimize(model, spec, data={"x": images() if data is None else data})


def remarks(result: graphopt.Result) -> str:
    return " ".join(note.text for step in result.report.steps for note in step.notes)


def noise(was: ir.Model, now: ir.Model, data: np.ndarray) -> float:
    before, after = (outputs_of(model, {"x": data})["y"] for model in (was, now))
    return float(np.square(after - before).sum() / np.square(before).sum())


def test_blocks_with_an_identity_shortcut_are_found() -> None:
    model = named(CNN)
    assert [(block.name, block.kind) for block in residual_blocks(model)] == [
        ("c1", "convolutions"),
        ("c3", "convolutions"),
    ]
    first = residual_blocks(model)[0]
    assert [node.name for node in first.nodes] == ["c1", "r1", "c2"]
    assert first.skip.name == "s0"
    assert first.feature_axis == -3


def test_parallel_branches_are_two_blocks() -> None:
    assert [[node.name for node in block.nodes] for block in residual_blocks(named(PARALLEL))] == [
        ["u", "g", "d"],
        ["m", "t"],
    ]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "y = Gemm <transB = 1> (f, w8)",
            "z = Gemm <transB = 1> (f, w8)\n y = Identity (c4)",
        ),  # an output of the model
        (
            "p = GlobalAveragePool (a3)",
            "b = ReduceMean <axes = [1]> (c4)\n q = Add (b, a3)\n p = GlobalAveragePool (q)",
        ),
        ("a2 = Add (s1, c4)", "a2 = Mul (s1, c4)"),
    ],
)
def test_a_branch_with_another_reader_is_no_block(old: str, new: str) -> None:
    text = CNN.replace(old, new)
    if "z = Gemm" in text:
        text = text.replace("(float[N, 4] y)", "(float[N, 4] z, float[N, 8, 8, 8] y)")
    assert [block.name for block in residual_blocks(named(text))] == ["c1"]


def test_a_sum_of_positions_is_no_block() -> None:
    text = PARALLEL.replace("h = MatMul (x, w0)", "e = MatMul (x, w0)\n pos = MatMul (x, w3)\n h = Add (e, pos)")
    assert [block.name for block in residual_blocks(named(text))] == ["u", "m"]


@pytest.mark.parametrize("criterion", ["measured", "influence"])
def test_the_block_that_adds_least_goes(criterion: str) -> None:
    model = named(CNN)
    result = run(model, PruneLayers(count=1, criterion=criterion, compensate=False))  # type: ignore[arg-type]
    names = {node.name for node in result.model.graph}
    assert {"c1", "c2", "c6"} <= names
    assert names.isdisjoint({"c3", "c4", "a2"})
    assert "weak" not in result.model.graph.initializers
    assert noise(model, result.model, images(8)) < 1e-3


def test_removing_all_of_them_gives_the_model_written_without_branches() -> None:
    text = CNN.replace("a1 = Add (c2, s0)", "a1 = Identity (s0)").replace("a2 = Add (s1, c4)", "a2 = Identity (s1)")
    result = run(named(CNN), PruneLayers(count=2, compensate=False))
    expected = outputs_of(named(text), {"x": images(4)})["y"]
    np.testing.assert_allclose(outputs_of(result.model, {"x": images(4)})["y"], expected, rtol=1e-4, atol=1e-5)
    assert sum(node.op_type == "Add" for node in result.model.graph) == 1


def test_layers_behind_make_up_for_it() -> None:
    model, fresh = named(CNN), np.random.default_rng(1).standard_normal((16, 3, 8, 8)).astype(np.float32)
    losses = [
        noise(model, run(named(CNN), PruneLayers(count=1, compensate=compensate, include=("c1",))).model, fresh)
        for compensate in (False, True)
    ]
    assert losses[1] < 0.7 * losses[0]


def test_macs_are_reached() -> None:
    model = named(CNN)
    result = run(model, PruneLayers(macs=0.8))
    assert result.report.after.macs <= 0.8 * result.report.before.macs
    assert f"{result.report.after.macs / result.report.before.macs:.1%} of the multiplications left" in remarks(result)


def test_blocks_are_chosen_by_name() -> None:
    kept = run(named(CNN), PruneLayers(ratio=0.5, exclude=("c3",)))
    assert "c3" in {node.name for node in kept.model.graph}
    with pytest.raises(UsageError, match="matches no node"):
        run(named(CNN), PruneLayers(include=("nothing*",)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("ratio=0", "`ratio` is out of range"),
        ("ratio=1", "`ratio` is out of range"),
        ("ratio=1.5", "`ratio` is out of range"),
        ("ratio=-0.1", "`ratio` is out of range"),
        ("macs=1", "`macs` is out of range"),
        ("count=0", "out of range"),
        ("ratio=0.5:count=1", "cannot both be given"),
    ],
)
def test_options_that_mean_nothing_are_refused(options: str, message: str) -> None:
    with pytest.raises(UsageError, match=message) as caught:
        run(named(CNN), f"prune-layers:{options}")
    assert caught.value.hint


@pytest.mark.parametrize(("options", "message"), [("count=3", "finds 2"), ("macs=0.01", "without any residual block")])
def test_more_than_there_is_is_refused(options: str, message: str) -> None:
    with pytest.raises(PassError, match=message) as caught:
        run(named(CNN), f"prune-layers:{options}")
    assert caught.value.hint


def test_nothing_to_prune_leaves_the_model_unchanged() -> None:
    text = CNN.replace("a1 = Add (c2, s0)", "a1 = Identity (c2)").replace("a2 = Add (s1, c4)", "a2 = Identity (c4)")
    result = run(named(text), "prune-layers")
    assert "found no residual blocks: the model is unchanged" in remarks(result)
    few = run(named(CNN), "prune-layers:ratio=0.1")
    assert "is none: the model is unchanged" in remarks(few)
    assert result.report.steps[-1].edits == few.report.steps[-1].edits == 0


def test_a_quantized_model_is_refused_with_the_right_order() -> None:
    quantized = run(named(CNN), "quant:mode=weights").model
    with pytest.raises(GraphoptError, match="already quantized") as caught:
        run(quantized, "prune-layers")
    assert "prune-layers,quant" in (caught.value.hint or "")


def test_other_passes_follow() -> None:
    result = run(named(CNN), "prune-layers:count=1,prune-channels,prune,quant:mode=static")
    names = [step.spec.split(":")[0] for step in result.report.steps]
    assert names == ["simplify", "prune-layers", "simplify", "prune-channels", "prune", "quant"]
    assert all(np.isfinite(output).all() for output in outputs_of(result.model, {"x": images(3)}).values())


def test_data_is_needed() -> None:
    with pytest.raises(GraphoptError, match="data"):
        graphopt.optimize(named(CNN), "prune-layers")


@pytest.mark.parametrize(("asset", "count"), [("resnet20", 7), ("stories_lm", 10)])
def test_real_models_lose_a_block_and_run(shared: Path, asset: str, count: int) -> None:
    files = {"resnet20": "resnet20_cifar10.onnx", "stories_lm": "stories260k.onnx"}
    model = graphopt.load(shared / "assets" / "models" / files[asset])
    rng = np.random.default_rng(0)
    name = model.graph.inputs[0].name or ""
    samples = rng.standard_normal((8, 3, 32, 32)).astype(np.float32)
    if asset == "stories_lm":
        samples = rng.integers(0, 500, (4, 32))
    result = graphopt.optimize(model, PruneLayers(count=1, criterion="influence"), data={name: samples})
    assert f"1 of {count} residual blocks removed" in remarks(result)
    assert shapes.infer_shapes(result.model) is None
    assert result.report.after.parameters < result.report.before.parameters
