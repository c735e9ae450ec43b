"""The generator of random models: what it makes is valid, runs, and covers what it promises."""

from __future__ import annotations

import functools
import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from hypothesis import HealthCheck, given, settings

from .graph_generator import OPSETS, Recipe, build, feeds, random_model, random_recipe, recipes
from .graph_motifs import MOTIFS

SEEDS = range(200)
DRAWN_MODELS = 50


@functools.cache
def model_of(seed: int) -> onnx.ModelProto:
    return random_model(seed)


def properties(model: onnx.ModelProto) -> dict[str, str]:
    return {entry.key: entry.value for entry in model.metadata_props}


def run(model: onnx.ModelProto, inputs: dict[str, np.ndarray]) -> list:
    """Return the outputs in ONNX Runtime without its optimizations."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run(None, inputs)


def check(model: onnx.ModelProto) -> None:
    """Check that the model is valid, runs, has outputs, and gives finite numbers unless it says otherwise."""
    onnx.checker.check_model(model, full_check=True)
    outputs = run(model, feeds(model, 0))
    assert len(outputs) == len(model.graph.output) > 0
    for info, output in zip(model.graph.output, outputs, strict=True):
        assert info.type.HasField("tensor_type")
        dims = info.type.tensor_type.shape.dim
        assert len(dims) == output.ndim
        assert all(d.dim_value == size for d, size in zip(dims, output.shape, strict=True) if d.HasField("dim_value"))
        if output.dtype.kind == "f" and "nonfinite" not in properties(model):
            assert np.isfinite(output).all()


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.type == onnx.AttributeProto.GRAPH]
    return [*graph.node, *(node for subgraph in inner for node in all_nodes(subgraph))]


@pytest.mark.parametrize("seed", SEEDS)
def test_model_is_valid_and_runs(seed: int) -> None:
    check(model_of(seed))


@pytest.mark.parametrize("name", MOTIFS)
@pytest.mark.parametrize("opset", [OPSETS[0], 13, 18, OPSETS[-1]])
def test_motif_alone_is_valid_and_runs(name: str, opset: int) -> None:
    for seed in range(3):
        check(build(Recipe(opset, 8, ((name, seed),))))


@settings(max_examples=DRAWN_MODELS, deadline=None, suppress_health_check=[HealthCheck.too_slow], database=None)
@given(recipes())
def test_drawn_model_is_valid_and_runs(recipe: Recipe) -> None:
    check(build(recipe))


def test_models_cover_every_motif_opset_and_feature() -> None:
    models = [model_of(seed) for seed in SEEDS]
    assert {name for model in models for name in properties(model)["motifs"].split()} == set(MOTIFS)
    assert {model.opset_import[0].version for model in models} == set(OPSETS)
    assert {model.ir_version for model in models} >= {3, 4, 8, 10}
    for key in ("nondeterministic", "nonfinite"):
        flagged = sum(key in properties(model) for model in models)
        assert 0 < flagged < len(models) / 4
    assert any(model.functions for model in models)
    assert any(model.graph.value_info for model in models)
    assert any(json.loads(properties(model)["overridable_inputs"]) for model in models)
    nodes = [node for model in models for node in all_nodes(model.graph)]
    assert any("" in node.input[:-1] for node in nodes)
    assert any("" in node.output for node in nodes)
    assert any(" " in name for node in nodes for name in node.output)
    types = {info.type.tensor_type.elem_type for model in models for info in (*model.graph.input, *model.graph.output)}
    assert types >= {onnx.TensorProto.DataType.Value(name) for name in ("FLOAT", "FLOAT16", "DOUBLE", "INT64", "BOOL")}


def test_sibling_subgraphs_share_names() -> None:
    clashes = 0
    for seed in SEEDS:
        for node in all_nodes(model_of(seed).graph):
            first, *others = [
                {name for inner in a.g.node for name in inner.output}
                for a in node.attribute
                if a.type == onnx.AttributeProto.GRAPH
            ] or [set()]
            clashes += any(first & other for other in others)
    assert clashes > 0


def test_the_same_seed_gives_the_same_model_and_feeds() -> None:
    for seed in SEEDS[:20]:
        once, twice = model_of(seed), random_model(seed)
        assert once.SerializeToString(deterministic=True) == twice.SerializeToString(deterministic=True)
        first, second = feeds(once, seed), feeds(twice, seed)
        assert first.keys() == second.keys()
        assert all(np.array_equal(first[name], second[name]) for name in first)


def test_dropping_a_step_leaves_the_others_possible() -> None:
    recipe = random_recipe(7)
    for index in range(len(recipe.steps)):
        fewer = (*recipe.steps[:index], *recipe.steps[index + 1 :])
        check(build(Recipe(recipe.opset, recipe.ir_version, fewer)))


def test_unflagged_models_give_the_same_outputs_twice() -> None:
    for seed in SEEDS[:40]:
        model = model_of(seed)
        if "nondeterministic" in properties(model):
            continue
        fed = feeds(model, seed)
        for first, second in zip(run(model, fed), run(model, fed), strict=True):
            assert np.array_equal(first, second, equal_nan=first.dtype.kind == "f")
