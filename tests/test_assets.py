"""Real trained models, end to end: nothing crashes, every output loads and runs, every figure is the file's own."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest

import graphopt
from graphopt import provenance, walk

pytest.importorskip("onnxruntime")

NAMES = [
    "squeezenet",
    "mobilenet",
    "resnet20",
    "minilm",
    "gutenberg_lm",
    "stories_lm",
    "silero_vad",
    "magika",
    "yunet",
    "digits",
]
SAMPLES = 12
LARGE = ("gutenberg_lm", "minilm")


@pytest.fixture(scope="session")
def score(shared: Path) -> ModuleType:
    """The scorer that lies beside the models."""
    spec = importlib.util.spec_from_file_location("score", shared / "assets" / "score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def model_file(score: ModuleType, name: str) -> Path:
    return Path(score.HERE) / "models" / str(score.ASSETS[name][0])


def samples(score: ModuleType, name: str) -> dict[str, np.ndarray]:
    """A few samples, named as the model's inputs."""
    if name == "silero_vad":
        frames = score.data("vad_speech_16k.npz")["pcm"].astype(np.float32)[: SAMPLES * 576] / 32768
        return {
            "input": frames.reshape(SAMPLES, 1, 576),
            "state": np.zeros((SAMPLES, 2, 1, 128), np.float32),
            "sr": np.full(SAMPLES, 16000, np.int64),
        }
    found = score.ASSETS[name][2](SAMPLES)
    if isinstance(found, dict):
        return found
    return {graphopt.load(model_file(score, name)).graph.inputs[0].name: found}


def quickly(name: str, passes: str) -> str:
    """Return a pipeline in which what takes minutes on the largest models is left to the benchmarks."""
    return passes.replace("prune", "prune:method=wanda") if name in LARGE else passes


@pytest.mark.parametrize("passes", ["simplify", "prune:sparsity=0.5", "quant", "prune:sparsity=0.5,quant"])
@pytest.mark.parametrize("name", NAMES)
def test_every_model_goes_through(name: str, passes: str, score: ModuleType, tmp_path: Path) -> None:
    source = model_file(score, name)
    output = tmp_path / "out.onnx"
    result = graphopt.optimize(source, quickly(name, passes), data=samples(score, name), output=output, threads=2)
    report = result.report

    assert report.ok
    assert report.before.bytes == source.stat().st_size
    assert report.after.bytes == output.stat().st_size
    assert report.after.nodes == sum(1 for _ in walk.every_node(graphopt.load(output)))
    onnx.checker.check_model(str(output))
    for step in report.steps:
        if step.edits:
            assert step.check.ok is True, (step.spec, step.check)
    loaded = set().union(*(provenance.origins(node) for node in walk.every_node(_stamped(source))))
    for node in walk.every_node(result.model):
        assert provenance.origins(node) <= loaded
    if passes == "simplify":
        assert report.deployed.ok
    if "quant" in passes:
        assert report.after.bytes < report.before.bytes


def _stamped(source: Path) -> graphopt.ir.Model:
    model = graphopt.load(source)
    provenance.stamp(model)
    return model


@pytest.mark.parametrize("name", ["squeezenet", "resnet20", "mobilenet", "digits"])
def test_static_int8_keeps_the_score(name: str, score: ModuleType, tmp_path: Path) -> None:
    source, output = model_file(score, name), tmp_path / "out.onnx"
    data = score.ASSETS[name][2](64)
    feed = {graphopt.load(source).graph.inputs[0].name: data}
    graphopt.optimize(source, "quant:mode=static", data=feed, output=output, threads=2)
    before, after = (score.ASSETS[name][1](path)["top1"] for path in (source, output))
    # Half a point, but never less than one sample of the 136 of the ImageNet models.
    assert after >= before - max(0.005, 1.01 / 136)
    assert output.stat().st_size * 3 < source.stat().st_size


def test_pruned_zeros_survive_quantization(score: ModuleType, tmp_path: Path) -> None:
    source = model_file(score, "squeezenet")
    data = {graphopt.load(source).graph.inputs[0].name: score.ASSETS["squeezenet"][2](16)}
    report = graphopt.optimize(source, "prune:sparsity=0.6,quant", data=data, threads=2).report
    assert report.after.nonzero <= 0.42 * report.after.parameters
