"""Rounding layer by layer: what a layer reads in integers decides its codes, and its bias takes what is left."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt.errors import UsageError
from graphopt.passes.lossy.layer_rounding import rounding_of
from graphopt.passes.solvers.grid import Grid

from .pass_runs import loaded, outputs_of, run_passes

RNG = np.random.default_rng(0)
# Channels that hang together, as they do in trained networks: what rounding loses in one, others can make up for.
MIXING = RNG.normal(size=(6, 6)) * 0.3 + 1.0


def samples(count: int, mean: float = 0.3) -> list[dict[str, np.ndarray]]:
    """Return inputs [1, 6, 8, 8] with a mean that is not zero."""
    return [
        {"x": np.einsum("ij,njhw->nihw", MIXING, RNG.normal(mean, 1, size=(1, 6, 8, 8))).astype(np.float32)}
        for _ in range(count)
    ]


def network(*, bias: bool = True, group: int = 1) -> onnx.ModelProto:
    """Return Conv, Relu, Conv, Relu, Conv; more weights are positive than not, so that channels hang together."""
    shapes = [(12, 6 // group, 3, 3), (12, 12 // group, 3, 3), (4, 12, 1, 1)]
    nodes, constants, value = [], [], "x"
    for index, shape in enumerate(shapes):
        weight = (RNG.normal(0.5, 1, shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)
        constants.append(numpy_helper.from_array(weight, f"w{index}"))
        inputs = [value, f"w{index}"]
        if bias:
            constants.append(numpy_helper.from_array(RNG.normal(size=shape[0]).astype(np.float32), f"b{index}"))
            inputs.append(f"b{index}")
        last = index == len(shapes) - 1
        attributes = {} if last else {"group": group}
        nodes.append(helper.make_node("Conv", inputs, ["y" if last else f"c{index}"], f"conv{index}", **attributes))
        if not last:
            nodes.append(helper.make_node("Relu", [f"c{index}"], [f"r{index}"], f"relu{index}"))
            value = f"r{index}"
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 6, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 4, 4, 4])],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def shares_left(proto: onnx.ModelProto, mean: float = 0.3) -> tuple[float, float]:
    """Return what gptq leaves of the mean squared error of rtn, and of that of the channel means, on other samples."""
    calibration, held_out = samples(16, mean), samples(48, mean)
    found = []
    for solver in ("rtn", "gptq"):
        model = run_passes(loaded(proto), f"quant:mode=static:solver={solver}", data=calibration).model
        differences = np.concatenate(
            [outputs_of(model, feed)["y"] - outputs_of(proto, feed)["y"] for feed in held_out]
        ).astype(np.float64)
        found.append((np.square(differences).mean(), np.square(differences.mean(axis=(0, 2, 3))).mean()))
    nearest, compensated = found
    return float(compensated[0] / nearest[0]), float(compensated[1] / nearest[1])


@pytest.fixture
def few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Round weights to four bits, so that what they lose stands out from what activations do."""
    monkeypatch.setattr("graphopt.passes.lossy.static_weights.weight_grid", lambda *_: Grid(bits=4))


@pytest.mark.usefixtures("few_bits")
@pytest.mark.parametrize("group", [1, 2])
def test_loses_less_than_rounding_to_nearest(group: int) -> None:
    # Of two networks, as rounding to nearest is lucky with one of forty.
    first, second = (shares_left(network(group=group))[0] for _ in range(2))
    assert np.sqrt(first * second) < 0.5


@pytest.mark.usefixtures("few_bits")
def test_bias_takes_the_mean_of_the_error() -> None:
    # Rounding itself takes no notice of means: it minimizes what is left around them.
    assert shares_left(network(), mean=2.0)[1] < 0.005


def test_layers_without_a_bias_get_none() -> None:
    model = run_passes(loaded(network(bias=False)), "quant:mode=static", data=samples(4)).model
    for node in model.graph:
        assert node.op_type != "Conv" or len([value for value in node.inputs if value is not None]) == 2


def test_codes_are_the_same_twice() -> None:
    proto, data = network(), samples(4)
    one, other = (run_passes(loaded(proto), "quant:mode=static", data=data).model for _ in range(2))
    for name, value in one.graph.initializers.items():
        assert value.const_value is not None
        np.testing.assert_array_equal(value.const_value.numpy(), other.graph.initializers[name].const_value.numpy())


def test_a_solver_of_another_mode_is_refused() -> None:
    with pytest.raises(UsageError, match="has no `solver=hqq`") as caught:
        rounding_of("hqq")
    assert "rtn" in caught.value.hint
