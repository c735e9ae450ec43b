"""The pass `fold-shapes` on random shape operands, run with sizes of every kind, zero and one included."""

from __future__ import annotations

import itertools
import random

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from .pass_runs import loaded, outputs_of, run_passes

MODELS = 1500
SIZES = (0, 1, 2, 3)
# What a feed refuses, in whatever words.
REFUSED = "refused"


def random_model(seed: int) -> onnx.ModelProto:
    """Return a model whose Reshape, Expand and Slice read sizes computed from the shapes of its inputs."""
    rng = random.Random(seed)
    nodes: list[onnx.NodeProto] = []
    constants: dict[int, str] = {}

    def constant(number: int) -> str:
        return constants.setdefault(number, f"c{len(constants)}")

    def op(kind: str, *inputs: str, **attributes: object) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [f"v{len(nodes)}"], **attributes))
        return f"v{len(nodes) - 1}"

    def entry() -> str:
        kind = rng.choice(["number", "size", "size", "size", "product", "sum", "smaller"])
        if kind == "number":
            return constant(rng.choice([-1, -1, 0, 1, 2, 4]))
        axis = rng.randrange(3)
        size = op("Shape", rng.choice(["x", "z"]), start=axis, end=axis + 1)
        if kind == "size":
            return size
        if kind == "product":
            return op("Mul", size, rng.choice([entry(), constant(4)]))
        return op("Add" if kind == "sum" else "Min", size, constant(rng.choice([1, 2])))

    def shape() -> str:
        return op("Concat", *(entry() for _ in range(rng.randint(1, 4))), axis=0)

    kind = rng.choice(["Reshape", "Reshape", "Expand", "Slice"])
    if kind == "Reshape":
        result = op("Reshape", "x", shape(), allowzero=int(rng.random() < 0.2))
    elif kind == "Expand":
        result = op("Expand", rng.choice(["x", "z"]), shape())
    else:
        axes = rng.sample(range(3), 2)
        starts = op("Concat", constant(rng.choice([0, 1, -2])), entry(), axis=0)
        ends = op("Concat", entry(), entry(), axis=0)
        places = op("Concat", *(constant(axis) for axis in axes), axis=0)
        result = op("Slice", "x", starts, ends, places)
    nodes.append(helper.make_node("Neg", [result], ["y"]))
    nodes.append(helper.make_node("Shape", [result], ["s"]))
    inputs = [
        helper.make_tensor_value_info("x", TensorProto.FLOAT, ["a", "b", 4]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["a", 1, "b"]),
    ]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, None),
        helper.make_tensor_value_info("s", TensorProto.INT64, None),
    ]
    initializers = [helper.make_tensor(name, TensorProto.INT64, [1], [number]) for number, name in constants.items()]
    graph = helper.make_graph(nodes, "g", inputs, outputs, initializers)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def result_of(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> dict[str, np.ndarray] | str:
    try:
        return outputs_of(model, feed)
    except Exception as error:
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return REFUSED


@pytest.mark.parametrize("seed", range(800, MODELS))
def test_random_shape_operands_mean_the_same(seed: int) -> None:
    model = random_model(seed)
    run = run_passes(loaded(model), "fold-shapes")
    after = ir.to_proto(run.model)
    assert len(after.graph.node) <= len(model.graph.node)
    for a, b in itertools.product(SIZES, SIZES):
        rng = np.random.default_rng(0)
        feed = {"x": rng.random((a, b, 4), np.float32), "z": rng.random((a, 1, b), np.float32)}
        expected = result_of(model, feed)
        if isinstance(expected, str):
            continue  # what was refused may run now
        got = result_of(after, feed)
        assert not isinstance(got, str), (a, b)
        assert all(np.array_equal(expected[name], got[name]) for name in expected), (a, b)
        assert all(expected[name].shape == got[name].shape for name in expected), (a, b)
    assert not run_passes(run.model, "fold-shapes").edits
