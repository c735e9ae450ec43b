"""A fifth of every group of every real model removed: it runs, its outputs are shaped as before, its sizes agree."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import shapes, walk
from graphopt.passes.analyses.channel_groups import ChannelGroup, Layout, Side, channel_groups
from graphopt.passes.lossy.separate_sizes import separate_sizes
from graphopt.passes.lossy.separate_vectors import separate_vectors
from graphopt.passes.lossy.shrinking import shrink
from graphopt.rewriter import Rewriter

pytest.importorskip("onnxruntime")

from .pass_runs import outputs_of, run_passes
from .removed_channels import check_removal, context, feed_of

# File to the least share of its parameters that goes with a fifth of every group.
SHARE_GONE = {
    "all-MiniLM-L6-v2": 0.07,  # more than half are embeddings as wide as the output
    "digits_resnet": 0.3,
    "gutenberg_llama_7m": 0.3,
    "magika_v3_3": 0.3,
    "mobilenet_v1_0.5_160_imagenet": 0.25,
    "resnet20_cifar10": 0.3,
    "silero_vad": 0.1,
    "squeezenet1.1_imagenet": 0.25,
    "stories260k": 0.3,
    "yunet_n_dynamic": 0.25,
}
LAYOUTS = {"minor": Layout(), "major": Layout(Side.MAJOR, Side.MAJOR)}
RATIO = 0.2


@pytest.fixture(scope="module", params=SHARE_GONE)
def prepared(request: pytest.FixtureRequest, shared: Path) -> tuple[str, ir.Model]:
    """A model in the form in which channels are looked for."""
    model = graphopt.load(shared / "assets" / "models" / f"{request.param}.onnx")
    run_passes(model, "simplify")
    shapes.infer_shapes(model)
    rewriter = Rewriter(model)
    separate_vectors(model, rewriter)
    separate_sizes(model, rewriter)
    return request.param, model


def feed_for(name: str, model: ir.Model) -> Mapping[str, np.ndarray]:
    if name == "silero_vad":
        frame = np.random.default_rng(0).standard_normal((1, 576)).astype(np.float32)
        return {"input": frame, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000, np.int64)}
    return feed_of(model, batch=2, seq=8, height=64, width=64)


def least_by_norm(group: ChannelGroup, ratio: float) -> np.ndarray:
    """Return which units stay when those go whose weights are smallest, in absolute numbers."""
    norms = np.zeros(group.size)
    for layer in group.writers:
        tensor = walk.constant_tensor(layer.weight)
        assert tensor is not None
        for axis, units in group.axes.items():
            if axis.value is layer.weight and axis.axis == layer.output_axis:
                weights = np.abs(np.moveaxis(tensor.numpy(), axis.axis, 0)).reshape(len(units), -1).sum(1)
                np.add.at(norms, units[units >= 0], weights[units >= 0])
    kept = np.ones(group.size, bool)
    kept[np.argsort(norms, kind="stable")[: max(int(ratio * group.size), 1)]] = False
    return kept


def inferred(model: ir.Model) -> ir.Model:
    """Return a copy with inferred shapes."""
    copy = model.clone()
    shapes.infer_shapes(copy)
    return copy


def parameters(model: ir.Model) -> int:
    return sum(tensor.size for tensor in walk.stored_tensors(model))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_model_loses_a_fifth(prepared: tuple[str, ir.Model], layout: str) -> None:
    name, model = prepared
    feed = feed_for(name, model)
    before, parameters_before = outputs_of(model, feed), parameters(model)
    # Where nothing but layers sees the channels, the outputs are known; a normalization over them sees fewer.
    plain, mixed = inferred(model), inferred(model)
    groups = channel_groups(plain, LAYOUTS[layout]).groups
    check_removal(plain, {group: least_by_norm(group, RATIO) for group in groups if not group.mixers}, feed)
    groups = channel_groups(mixed, LAYOUTS[layout]).groups
    shrink(context(mixed), {group: least_by_norm(group, RATIO) for group in groups})
    after = outputs_of(mixed, feed)
    assert {key: value.shape for key, value in after.items()} == {key: value.shape for key, value in before.items()}
    assert all(np.isfinite(value).all() for value in after.values())
    assert parameters(mixed) <= (1 - SHARE_GONE[name]) * parameters_before
