"""SmoothQuant: the function stays, outliers move into the weights, and quantization then loses less."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from .pass_runs import loaded, outputs_of, run_passes

SIZE = 16
RNG = np.random.default_rng(0)


def network(*, outlier: float = 40.0, read_elsewhere: bool = False) -> onnx.ModelProto:
    """Return LayerNormalization, of which one factor is an outlier, and two products that read it."""
    factors = RNG.uniform(0.5, 1.5, SIZE).astype(np.float32)
    factors[3] *= outlier
    constants = {
        "gamma": factors,
        "beta": RNG.normal(0, 0.1, SIZE).astype(np.float32),
        "w1": RNG.normal(size=(SIZE, 8)).astype(np.float32),
        "w2": RNG.normal(size=(8, SIZE)).astype(np.float32),
        "b2": RNG.normal(size=8).astype(np.float32),
    }
    nodes = [
        helper.make_node("LayerNormalization", ["x", "gamma", "beta"], ["n"], "norm"),
        helper.make_node("MatMul", ["n", "w1"], ["p"], "left"),
        helper.make_node("Gemm", ["n", "w2", "b2"], ["q"], "right", transB=1),
    ]
    if read_elsewhere:
        nodes.append(helper.make_node("ReduceSum", ["n"], ["y"], "sum"))
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", SIZE])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("p", "q", "y")[: len(nodes) - 1]],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def samples(count: int) -> list[dict[str, np.ndarray]]:
    return [{"x": RNG.normal(size=(1, SIZE)).astype(np.float32)} for _ in range(count)]


def factors_of(model: ir.Model) -> np.ndarray:
    value = model.graph.initializers["gamma"].const_value
    assert value is not None
    return value.numpy()


@pytest.mark.parametrize("with_data", [True, False])
def test_outlier_moves_into_the_weights(with_data: bool) -> None:
    proto, data = network(), samples(32) if with_data else None
    run = run_passes(loaded(proto), "smooth-quant", data=data)
    before, after = factors_of(loaded(proto)), factors_of(run.model)
    assert after.max() / np.median(after) < 0.5 * before.max() / np.median(before)
    for feed in samples(4):
        for expected, found in zip(outputs_of(proto, feed).values(), outputs_of(run.model, feed).values(), strict=True):
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)
    assert "1 of 1 normalizations smoothed" in run.remarks[-1]
    assert not run_passes(run.model, "smooth-quant", data=data).edits


def test_quantization_then_loses_less() -> None:
    # Judged on the samples it was calibrated with: what lies outside the ranges is clipped either way.
    proto, data = network(), samples(64)

    def lost(spec: str) -> float:
        model = run_passes(loaded(proto), spec, data=data).model
        return sum(float(np.square(outputs_of(model, feed)["p"] - outputs_of(proto, feed)["p"]).sum()) for feed in data)

    assert lost("smooth-quant,quant:mode=static:solver=rtn") < 0.7 * lost("quant:mode=static:solver=rtn")


def test_nothing_is_moved_where_nothing_is_gained() -> None:
    run = run_passes(loaded(network(outlier=1.0)), "smooth-quant:least_gain=0.9", data=samples(8))
    assert not run.edits
    assert "none gains" in run.remarks[-1]


def test_what_others_read_too_is_left() -> None:
    assert not run_passes(loaded(network(read_elsewhere=True)), "smooth-quant", data=samples(8)).edits
