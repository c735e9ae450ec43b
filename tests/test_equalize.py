"""Cross-layer equalization: the function stays, ranges of channels draw level, what must not be scaled is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from .pass_runs import PassRun, loaded, outputs_of, run_passes

CHANNELS = 8
RNG = np.random.default_rng(0)


def model_of(nodes: list[onnx.NodeProto], constants: dict[str, np.ndarray], *, spatial: bool = True) -> onnx.ModelProto:
    """Return a model from x [N, 3, 6, 6], or [N, 3], to y."""
    shape = ["N", 3, 6, 6] if spatial else ["N", 3]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def uneven(*shape: int) -> np.ndarray:
    """Return a weight whose outputs differ in size by up to eight times."""
    sizes = np.geomspace(1, 8, shape[0]).reshape(-1, *[1] * (len(shape) - 1))
    return (RNG.normal(size=shape) * sizes).astype(np.float32)


def two_layers(*between: onnx.NodeProto, **more: np.ndarray) -> onnx.ModelProto:
    """Return Conv, then what reads `a` and writes `b`, then Conv."""
    constants = {
        "w1": uneven(CHANNELS, 3, 3, 3),
        "b1": uneven(CHANNELS),
        "w2": uneven(4, CHANNELS, 1, 1),
        "b2": uneven(4),
        **more,
    }
    first = helper.make_node("Conv", ["x", "w1", "b1"], ["a"], "first")
    last = helper.make_node("Conv", ["b", "w2", "b2"], ["y"], "last")
    return model_of([first, *between, last], constants)


def node(operator: str, *inputs: str, to: str = "b", **attributes: Any) -> onnx.NodeProto:
    return helper.make_node(operator, list(inputs), [to], **attributes)


def feeds(count: int = 4) -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.normal(size=(1, 3, 6, 6)).astype(np.float32)} for _ in range(count)]


def equalized(
    proto: onnx.ModelProto, data: list[dict[str, np.ndarray]] | None = None, spec: str = "equalize"
) -> PassRun:
    """Run the pass and check that it kept the function."""
    run = run_passes(loaded(proto), spec, data=data)
    feed = feeds(1)[0] if len(proto.graph.input[0].type.tensor_type.shape.dim) == 4 else {"x": np.eye(3, dtype="f")}
    before, after = outputs_of(proto, feed), outputs_of(run.model, feed)
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=1e-4 * np.abs(before["y"]).max())
    return run


def spread(model: ir.Model, name: str) -> float:
    """Return how many times the largest output of a weight exceeds the smallest."""
    value = model.graph.initializers[name].const_value
    assert value is not None
    sizes = np.sqrt(np.square(value.numpy()).reshape(len(value.numpy()), -1).sum(1))
    return float(sizes.max() / sizes.min())


def levels(model: ir.Model, data: list[dict[str, np.ndarray]]) -> np.ndarray:
    """Return how much of a value's range each channel takes, up to 1, where it takes most of one."""
    copy = model.clone()
    first, last = (next(one for one in copy.graph if one.name == name) for name in ("first", "last"))
    made, read = first.outputs[0], last.inputs[0]
    # What only an activation reads is not in integers.
    inner = all(use.node.op_type in ("Relu", "LeakyRelu") for use in made.uses())
    values = [read] if inner else [made, read]
    copy.graph.outputs.extend(values)
    shares = np.zeros(CHANNELS)
    runs = [outputs_of(copy, feed) for feed in data]
    for value in values:
        array = np.concatenate([run[value.name or ""] for run in runs])
        axes = tuple(axis for axis in range(array.ndim) if axis != 1)
        for ends in (array.max(axes), -array.min(axes)):
            shares = np.maximum(shares, ends / max(ends.max(), 1e-9))
    return shares


SCALED = {
    "relu": (node("Relu", "a"),),
    "pool": (node("MaxPool", "a", kernel_shape=[2, 2]),),
    "average": (node("GlobalAveragePool", "a"),),
    "leaky": (node("LeakyRelu", "a", alpha=0.2),),
    "twice": (node("Relu", "a", to="r"), node("Add", "r", "a")),
    "factor": (node("Mul", "factor", "a"),),
}


@pytest.mark.parametrize("with_data", [True, False])
@pytest.mark.parametrize("between", SCALED.values(), ids=SCALED.keys())
def test_channels_draw_level(between: tuple[onnx.NodeProto, ...], with_data: bool) -> None:
    proto = two_layers(*between, factor=np.array(2.0, np.float32))
    data = feeds() if with_data else None
    run = equalized(proto, data, "equalize:headroom=1")
    if data is None:  # the weights are all that is known of the channels
        assert spread(run.model, "w1") < 0.3 * spread(loaded(proto), "w1")
    else:
        assert levels(loaded(proto), data).min() < 0.5
        assert levels(run.model, data).min() > 0.95
    assert not run_passes(run.model, "equalize:headroom=1", data=data).edits


LEFT = {
    "sigmoid": (node("Sigmoid", "a"),),
    "clip": (node("Clip", "a", "zero", "six"),),
    "square": (node("Mul", "a", "a"),),
    "softmax": (node("Softmax", "a", axis=1),),
    "one of two": (node("Relu", "a", to="r"), node("Sigmoid", "a", to="e"), node("Add", "r", "e")),
}


@pytest.mark.parametrize("between", LEFT.values(), ids=LEFT.keys())
def test_what_is_not_homogeneous_is_left(between: tuple[onnx.NodeProto, ...]) -> None:
    run = equalized(two_layers(*between, zero=np.array(0, np.float32), six=np.array(6, np.float32)), feeds())
    assert not [edit for edit in run.edits if edit.pass_name == "equalize"]


def test_outputs_of_the_model_are_left() -> None:
    proto = two_layers(node("Relu", "a"))
    proto.graph.output.append(helper.make_tensor_value_info("b", TensorProto.FLOAT, None))
    run = run_passes(loaded(proto), "equalize", data=feeds())
    assert not [edit for edit in run.edits if edit.pass_name == "equalize"]


def test_concatenated_channels_keep_their_order() -> None:
    proto = model_of(
        [
            node("Conv", "x", "w1", to="a"),
            node("Relu", "a", to="r"),
            node("Conv", "x", "w3", to="c"),
            node("Concat", "r", "c", axis=1),
            node("Conv", "b", "w2", to="y"),
        ],
        {"w1": uneven(4, 3, 1, 1), "w3": uneven(6, 3, 1, 1), "w2": uneven(5, 10, 3, 3)},
    )
    run = equalized(proto, feeds())
    assert run.edits


def test_depthwise_layers_take_part_on_both_sides() -> None:
    proto = model_of(
        [
            node("Conv", "x", "w1", to="a"),
            node("Relu", "a", to="r"),
            node("Conv", "r", "w3", "b3", to="c", group=CHANNELS, pads=[1, 1, 1, 1]),
            node("Relu", "c", to="b"),
            node("Conv", "b", "w2", to="y"),
        ],
        {
            "w1": uneven(CHANNELS, 3, 1, 1),
            "w3": uneven(CHANNELS, 1, 3, 3),
            "b3": uneven(CHANNELS),
            "w2": uneven(5, CHANNELS, 1, 1),
        },
    )
    assert len(equalized(proto, feeds()).edits) >= 2


def test_residuals_share_their_scales() -> None:
    proto = model_of(
        [
            node("Conv", "x", "w1", to="a"),
            node("Relu", "a", to="r"),
            node("Conv", "r", "w3", to="c"),
            node("Add", "r", "c", to="s"),
            node("Relu", "s", to="b"),
            node("Conv", "b", "w2", to="y"),
        ],
        {"w1": uneven(8, 3, 1, 1), "w3": uneven(8, 8, 1, 1) * 0.01, "w2": uneven(5, 8, 1, 1)},
    )
    assert equalized(proto, feeds()).edits


def test_products_of_matrices_with_a_bias_behind() -> None:
    proto = model_of(
        [
            node("MatMul", "x", "w1", to="p"),
            node("Add", "p", "b1", to="a"),
            node("Relu", "a", to="b"),
            node("Gemm", "b", "w2", to="y", transB=1),
        ],
        {"w1": np.ascontiguousarray(uneven(8, 3).T), "b1": uneven(8), "w2": uneven(5, 8)},
        spatial=False,
    )
    assert equalized(proto, [{"x": row[None]} for row in np.eye(3, dtype="f")]).edits


def test_silent_channels_and_rare_ones_are_left() -> None:
    proto = two_layers(node("Relu", "a"))
    weight = np.array(numpy_helper.to_array(proto.graph.initializer[0]))
    bias = np.array(numpy_helper.to_array(proto.graph.initializer[1]))
    weight[0], bias[0] = 0, 0
    weight[1], bias[1] = weight[1] * 1e-4, 0
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "w1"))
    proto.graph.initializer[1].CopyFrom(numpy_helper.from_array(bias, "b1"))
    run = equalized(proto, feeds(), "equalize:most=16")
    content = run.model.graph.initializers["w1"].const_value
    assert content is not None
    np.testing.assert_array_equal(content.numpy()[:2], weight[:2])
    assert run.edits


def test_no_weight_leaves_its_range() -> None:
    proto = two_layers(node("Relu", "a"))
    weight = np.array(numpy_helper.to_array(proto.graph.initializer[0]))
    proto.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight.astype(np.float32) * np.float32(1e37), "w1"))
    run = run_passes(loaded(proto), "equalize")
    for value in run.model.graph.initializers.values():
        assert value.const_value is not None
        assert np.isfinite(value.const_value.numpy()).all()
