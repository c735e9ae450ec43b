"""Adaptive rounding of codes that a model holds: by the definition of its objective."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import walk
from graphopt.errors import PassError
from graphopt.passes.analyses.linear_layers import as_linear_layer
from graphopt.passes.lossy.compared_layers import ComparedLayer
from graphopt.passes.lossy.dequantized_weights import DequantizedWeight, dequantized_weight
from graphopt.passes.solvers.grid import Grid
from graphopt.report import StepRecord

from .pass_runs import loaded, outputs_of, run_passes

RNG = np.random.default_rng(0)
MIXING = RNG.normal(size=(8, 8)) * 0.3 + 1.0


def samples(count: int, seed: int) -> list[dict[str, Any]]:
    rng = np.random.default_rng(seed)
    return [
        {"x": np.einsum("ij,njhw->nihw", MIXING, rng.normal(0.3, 1, (1, 8, 6, 6))).astype(np.float32)}
        for _ in range(count)
    ]


DATA, HELD_BACK = samples(16, 1), samples(32, 2)


def network(*, bias: bool = True, channels: int = 8) -> onnx.ModelProto:
    """Return Conv, Relu, Conv."""
    rng = np.random.default_rng(3)
    shapes = {"w0": (16, channels, 3, 3), "w1": (4, 16, 1, 1), **({"b0": (16,), "b1": (4,)} if bias else {})}
    constants = [numpy_helper.from_array(rng.normal(0, 0.2, d).astype(np.float32), n) for n, d in shapes.items()]
    nodes = [
        helper.make_node("Conv", ["x", "w0", *(["b0"] if bias else [])], ["c"], "conv0"),
        helper.make_node("Relu", ["c"], ["r"], "relu"),
        helper.make_node("Conv", ["r", "w1", *(["b1"] if bias else [])], ["y"], "conv1"),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", channels, 6, 6])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 4, 4])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def error(proto: onnx.ModelProto, model: ir.Model) -> float:
    pairs = [(outputs_of(model, feed)["y"], outputs_of(proto, feed)["y"]) for feed in HELD_BACK]
    return float(np.mean([np.square(after - before).mean() for after, before in pairs]))


def facts(record: StepRecord) -> dict[str, Any]:
    return dict(next(note.facts for note in record.notes if "changed" in note.facts))


@pytest.fixture
def few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes of four bits, so that what the weights lose stands out from what activations do."""
    monkeypatch.setattr("graphopt.passes.lossy.static_weights.weight_grid", lambda *_: Grid(bits=4))


@pytest.mark.usefixtures("few_bits")
@pytest.mark.parametrize("bias", [True, False])
def test_loses_less_on_samples_never_seen(bias: bool) -> None:
    proto = network(bias=bias)
    spec = "quant:mode=static:solver=rtn"
    before = run_passes(loaded(proto), spec, data=DATA)
    after = run_passes(loaded(proto), f"{spec},ada-round", data=DATA)
    assert error(proto, after.model) < 0.8 * error(proto, before.model)
    said = facts(after.records[-1])
    assert said["layers"] == 2
    assert said["changed"] > 0
    assert said["predicted"] < 1.0


def stored(model: ir.Model, original: ir.Model, name: str) -> DequantizedWeight:
    one, other = (next(node for node in graph if node.name == name) for graph in (model.graph, original.graph))
    before = as_linear_layer(other)
    assert before is not None
    found = dequantized_weight(ComparedLayer(one, before))
    assert isinstance(found, DequantizedWeight), found
    return found


def dequantized(node: ir.Node) -> Any:
    """Return what a DequantizeLinear of constants gives in ONNX Runtime."""
    tensors = [ir.to_proto(tensor) for value in node.inputs if (tensor := walk.constant_tensor(value)) is not None]
    for tensor, name in zip(tensors, ("codes", "scales", "zeros"), strict=False):
        tensor.name = name
    attributes = {attribute.name: attribute.value for attribute in node.attributes.values()}
    made = helper.make_node("DequantizeLinear", [tensor.name for tensor in tensors], ["y"], **attributes)
    output = helper.make_tensor_value_info("y", TensorProto.FLOAT, tensors[0].dims)
    graph = helper.make_graph([made], "g", [], [output], tensors)
    return outputs_of(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), {})["y"]


def assert_read_as_stored(model: ir.Model, original: ir.Model, name: str) -> None:
    found = stored(model, original, name)
    value = next(node for node in model.graph if node.name == name).inputs[1]
    producer = value.producer() if value is not None else None
    assert producer is not None
    np.testing.assert_allclose(found.layer.in_layout(found.stored.values()), dequantized(producer), rtol=1e-6)
    # Rounded to nearest, no weight is off by more than half a step.
    grid, scales = found.stored.grid, found.stored.scales
    steps = np.abs(found.target - found.stored.values()) / grid.spread(scales, found.target.shape[1])
    assert steps.max() < 0.51


@pytest.mark.parametrize("grid", [Grid(), Grid(tensor=True), Grid(bits=7), Grid(bits=4, block=8)], ids=str)
def test_reads_what_dequantize_linear_says(grid: Grid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("graphopt.passes.lossy.static_weights.weight_grid", lambda *_: grid)
    original = loaded(network())
    model = run_passes(original.clone(), "quant:mode=static:solver=rtn", data=DATA).model
    for name in ("conv0", "conv1"):
        assert_read_as_stored(model, original, name)


def product(weight: np.ndarray[Any, Any] | None, codes: dict[str, Any], **attributes: int) -> ir.Model:
    """Return a MatMul of a constant weight, or of one dequantized from codes."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    if weight is None:
        nodes.insert(0, helper.make_node("DequantizeLinear", list(codes), ["w"], "dq", **attributes))
    constants = {"w": weight} if weight is not None else codes
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return loaded(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize("block", [None, 4])
def test_reads_zero_points(block: int | None) -> None:
    rng = np.random.default_rng(5)
    dims = (4,) if block is None else (2, 4)
    codes = rng.integers(0, 256, (8, 4), np.uint8)
    scales, zeros = rng.uniform(0.1, 1, dims).astype(np.float32), rng.integers(100, 150, dims, np.uint8)
    spread = (
        (lambda a: a.astype(np.float32)) if block is None else (lambda a: np.repeat(a.astype(np.float32), 4, axis=0))
    )
    weight = (codes - spread(zeros)) * spread(scales)
    attributes = {"axis": 1} if block is None else {"axis": 0, "block_size": 4}
    now = product(None, {"codes": codes, "scales": scales, "zeros": zeros}, **attributes)
    assert_read_as_stored(now, product(weight, {}), "product")


def test_the_predicted_error_never_grows_and_a_second_time_nothing_changes() -> None:
    proto = network()
    run = run_passes(loaded(proto), "quant:mode=static,ada-round,ada-round", data=DATA)
    first, second = (facts(record) for record in run.records[-2:])
    assert first["predicted"] <= 1.0
    assert second["predicted"] <= 1.0
    assert second["changed"] <= first["changed"] // 10


def test_channels_of_zeros_are_no_other_layout() -> None:
    proto = network(channels=3)
    data = [{"x": feed["x"][:, :3]} for feed in DATA]
    run = run_passes(loaded(proto), "quant:mode=static:solver=rtn,ada-round", data=data)
    assert facts(run.records[-1])["layers"] == 2


def test_weights_stored_otherwise_are_said_to_be_left() -> None:
    run = run_passes(loaded(network()), "prune,ada-round", data=DATA)
    assert any("layers left: 2, as their weight is read through no DequantizeLinear" in text for text in run.remarks)


def test_without_a_lossy_pass_before_it() -> None:
    with pytest.raises(PassError, match="no lossy pass ran before it") as caught:
        run_passes(loaded(network()), "ada-round", data=DATA)
    assert "quant:mode=static,ada-round" in caught.value.hint
