"""`--emit-test`: a test that passes on its model, and fails once something is wrong with it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt

from .mutants import MUTANTS

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parent.parent
# What each mutant must be noticed by, at least.
NOTICED_BY = {
    "weight perturbed": "outputs_are_as_recorded",
    "bias lost": "outputs_are_as_recorded",
    "operands swapped": "outputs_are_near_the_originals",
    "quantization dropped": "operators_in_integers",
    "size doubled": "size",
    "output renamed": "inputs_and_outputs",
    "dtype changed": "inputs_and_outputs",
    "input shape fixed": "inputs_and_outputs",
    "zero point wrong": "outputs_are_as_recorded",
    "axis wrong": "outputs_are_near_the_originals",
}
TESTS = {
    "inputs_and_outputs",
    "outputs_are_as_recorded",
    "outputs_are_near_the_originals",
    "operators_in_integers",
    "size",
}


def network() -> onnx.ModelProto:
    """Return ``image`` [batch, 3, 8, 8] to ``shares`` [batch, 5]: two Conv, a Gemm, a Sub and a Softmax."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((16, 3, 3, 3)) / 5,
        "b1": rng.standard_normal(16) / 4,
        "w2": rng.standard_normal((16, 16, 3, 3)) / 12,
        "b2": rng.standard_normal(16) / 4,
        "w3": rng.standard_normal((16, 5)),
        "b3": rng.standard_normal(5),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"], "head"),
        helper.make_node("ReduceMean", ["logits"], ["mean"], "mean", axes=[-1]),
        helper.make_node("Sub", ["logits", "mean"], ["centred"], "centre"),
        helper.make_node("Softmax", ["centred"], ["shares"], "softmax", axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("shares", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the network, data, the network in integers and its test."""
    folder = tmp_path_factory.mktemp("emitted")
    onnx.save(network(), folder / "net.onnx")
    images = np.random.default_rng(1).standard_normal((64, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", image=images)
    graphopt.optimize(
        folder / "net.onnx",
        "quant:mode=static",
        data=folder / "data.npz",
        output=folder / "int8.onnx",
        emit_test=folder / "test_int8.py",
    )
    return folder


def outcomes(folder: Path) -> dict[tuple[str, str], str]:
    """Run every test below a folder; return (folder of the test, test without `test_`) to what it failed with, or ''."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--import-mode=importlib"]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), f"--junitxml={report}", str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        faults = [one.text or "" for one in case if one.tag in ("failure", "error")]
        place = (case.get("classname") or "").split(".")[0]
        found[place, (case.get("name") or "").removeprefix("test_")] = "\n".join(faults)
    return found


@pytest.fixture(scope="module")
def judged(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Return what the test says of its model and of each mutant."""
    folder = tmp_path_factory.mktemp("mutants")
    for number, mutate in enumerate([None, *MUTANTS.values()]):
        place = folder / f"m{number}"
        shutil.copytree(home, place)
        if mutate is not None:
            model = onnx.load(place / "int8.onnx")
            mutate(model)
            onnx.save(model, place / "int8.onnx")
    return outcomes(folder)


def test_it_passes_on_the_model_it_came_from(judged: dict[tuple[str, str], str]) -> None:
    assert {name: fault for (place, name), fault in judged.items() if place == "m0"} == dict.fromkeys(TESTS, "")


@pytest.mark.parametrize("name", MUTANTS)
def test_it_fails_on_a_mutant(name: str, judged: dict[tuple[str, str], str]) -> None:
    place = f"m{list(MUTANTS).index(name) + 1}"
    failed = {test for (where, test), fault in judged.items() if where == place and fault}
    assert NOTICED_BY[name] in failed
