"""Padding: which rows of a batch are real, and that second moments are of these alone."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.backend import Array
from graphopt.passes.analyses.linear_layers import LinearLayer, linear_layers
from graphopt.passes.analyses.padding import only, real_rows
from graphopt.token_inputs import mask_of

from .pass_runs import run_passes

RNG = np.random.default_rng
TEXT = """<ir_version: 9, opset_import: ["" : 17]>
encoder (float[n, s, 64] x, int64[n, s] attention_mask) => (float[n, 64] y) {
    h = MatMul (x, w)
    m = Cast <to = 1> (attention_mask)
    a = Constant <value_ints = [2]> ()
    u = Unsqueeze (m, a)
    k = Mul (h, u)
    b = Constant <value_ints = [1]> ()
    y = ReduceSum <keepdims = 0> (k, b)
}"""


def encoder(weight: Array) -> ir.Model:
    """Return a model that sums what it makes of the real positions of each sample."""
    model = ir.from_onnx_text(
        TEXT.replace("int64[n, s] attention_mask)", "int64[n, s] attention_mask, float[64, 64] w)")
    )
    value = next(one for one in model.graph.inputs if one.name == "w")
    value.const_value = ir.tensor(weight, name="w")
    model.graph.inputs[:] = [one for one in model.graph.inputs if one is not value]
    model.graph.register_initializer(value)
    return model


def layer_of(model: ir.Model) -> LinearLayer:
    (layer,) = linear_layers(model)
    return layer


def test_mask_is_found_by_name_and_rank() -> None:
    model = encoder(np.eye(64, dtype=np.float32))
    found = mask_of(model)
    assert found is not None
    assert found.name == "attention_mask"
    found.name = "padding_mask"  # of which nobody knows what 1 means
    assert mask_of(model) is None
    found.name, found.shape = "attention_mask", ir.Shape([1, 1, 4, 4])
    assert mask_of(model) is None


def test_rows_that_are_real() -> None:
    layer = layer_of(encoder(np.eye(64, dtype=np.float32)))
    mask, x = np.array([[1, 1, 0], [1, 0, 0]]), RNG(1).normal(size=(2, 3, 64))
    for values in (x, x.reshape(6, 64)):
        rows = real_rows(layer, values, [mask])
        assert rows is not None
        assert rows.tolist() == [True, True, False, True, False, False]
        np.testing.assert_array_equal(only(rows, values), np.stack([x[0, 0], x[0, 1], x[1, 0]]))


@pytest.mark.parametrize(
    ("mask", "shape"),
    [(None, (2, 3, 64)), (np.ones((2, 3)), (2, 3, 64)), (np.zeros((2, 3)), (2, 3, 64)), (np.eye(2), (2, 3, 64))],
    ids=["no mask", "nothing padded", "nothing real", "another shape"],
)
def test_all_rows_count_where_none_is_known_to_be_padding(mask: Array | None, shape: tuple[int, ...]) -> None:
    layer, x = layer_of(encoder(np.eye(64, dtype=np.float32))), np.zeros(shape)
    rows = real_rows(layer, x, [] if mask is None else [mask])
    assert rows is None
    assert only(rows, x) is x


def test_solvers_look_at_real_positions_alone() -> None:
    rng = RNG(2)
    weight = rng.normal(size=(64, 64)).astype(np.float32)
    # Real positions lie in the first 16 directions, padding, which is most, in all others.
    data = []
    for _ in range(40):
        x = np.zeros((1, 10, 64), np.float32)
        x[0, :3, :16], x[0, 3:, 16:] = rng.normal(size=(3, 16)), 10 * rng.normal(size=(7, 48))
        data.append({"x": x, "attention_mask": np.array([[1] * 3 + [0] * 7])})
    before = encoder(weight)
    run = run_passes(before.clone(), "factorize:rank=16", data=data)
    weights = [one.const_value.numpy() for one in run.model.graph.initializers.values() if one.const_value is not None]
    (right,) = (one for one in weights if one.shape == (64, 16))
    (left,) = (one for one in weights if one.shape == (16, 64))
    near = right @ left
    np.testing.assert_allclose(near[:16], weight[:16], atol=0.02)
