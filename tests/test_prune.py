"""Pruning and the mask solver, against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import PassError
from graphopt.passes import Prune
from graphopt.passes.analyses.linear_layers import linear_layers
from graphopt.passes.solvers import mask

pytest.importorskip("onnxruntime")

RNG = np.random.default_rng(0)


@pytest.mark.parametrize("sparsity", [0.0, 0.25, 0.5, 1.0])
def test_unstructured_is_the_best_of_all_masks(sparsity: float) -> None:
    weight = RNG.standard_normal((2, 4)).astype(np.float32)
    solution = mask.unstructured(weight, sparsity)
    count = round(sparsity * weight.size)
    errors = [
        (weight.reshape(-1)[list(chosen)].astype(np.float64) ** 2).sum()
        for chosen in itertools.combinations(range(weight.size), count)
    ]
    assert (solution.weight == 0).sum() == count
    assert solution.error == pytest.approx(min(errors))


def test_n_of_m_is_the_best_of_all_masks_in_every_group() -> None:
    weight = RNG.standard_normal((3, 8)).astype(np.float32)
    solution = mask.n_of_m(weight, 2, 4)
    assert ((solution.weight != 0).reshape(3, 2, 4).sum(-1) == 2).all()
    best = sum(np.sort(group**2)[:2].sum() for group in weight.astype(np.float64).reshape(-1, 4))
    assert solution.error == pytest.approx(best)


def test_equal_magnitudes_fall_the_same_way_every_time() -> None:
    weight = np.ones((4, 4), np.float32)
    first, second = mask.unstructured(weight, 0.5), mask.unstructured(weight.copy(), 0.5)
    assert np.array_equal(first.weight, second.weight)
    assert (first.weight == 0).sum() == 8


def test_zeros_already_there_count() -> None:
    weight = np.array([[0, 0, 1, 2]], np.float32)
    solution = mask.unstructured(weight, 0.5)
    assert solution.weight.tolist() == [[0, 0, 1, 2]]
    assert (solution.zeroed, solution.error) == (0, 0.0)


def layered(op: str) -> ir.Model:
    """A model of one layer, weights drawn from a fixed seed."""
    shapes = {
        "Conv": ("float[1,4,5,5] x", [8, 4, 3, 3], "y = Conv(x, w)", "float[1,8,3,3] y"),
        "Depthwise": ("float[1,4,5,5] x", [4, 1, 3, 3], "y = Conv<group=4>(x, w)", "float[1,4,3,3] y"),
        "ConvTranspose": ("float[1,4,5,5] x", [4, 6, 3, 3], "y = ConvTranspose(x, w)", "float[1,6,7,7] y"),
        "Gemm": ("float[2,8] x", [6, 8], "y = Gemm<transB=1>(x, w)", "float[2,6] y"),
        "MatMul": ("float[2,3,8] x", [8, 6], "y = MatMul(x, w)", "float[2,3,6] y"),
        "LeftMatMul": ("float[8,3] x", [6, 8], "y = MatMul(w, x)", "float[6,3] y"),
    }
    inputs, shape, body, output = shapes[op]
    dims = ",".join(map(str, shape))
    text = f'<ir_version: 8, opset_import: ["": 17]> agraph ({inputs}, float[{dims}] w) => ({output}) {{ {body} }}'
    model = ir.from_proto(onnx.parser.parse_model(text))
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(RNG.standard_normal(shape).astype(np.float32), name="w")
    model.graph.register_initializer(weight)
    return model


OPS = ["Conv", "Depthwise", "ConvTranspose", "Gemm", "MatMul", "LeftMatMul"]


@pytest.mark.parametrize("op", OPS)
def test_the_matrix_view_and_back_is_the_weight(op: str) -> None:
    model = layered(op)
    (layer,) = linear_layers(model)
    weight = model.graph.initializers["w"].const_value.numpy()
    assert layer.matrix().shape[0] == weight.shape[layer.output_axis]
    assert np.array_equal(layer.from_matrix(layer.matrix()), weight)


@pytest.mark.parametrize("op", OPS)
def test_half_of_each_kind_of_layer_becomes_zero(op: str) -> None:
    model = layered(op)
    before = model.graph.initializers["w"].const_value.numpy().copy()
    result = graphopt.optimize(model, [Prune(0.5)])
    after = linear_layers(result.model)[0].weight.const_value.numpy()
    assert (after == 0).mean() == pytest.approx(0.5, abs=0.02)
    assert np.array_equal(after[after != 0], before[after != 0])
    # The user's own model is not touched.
    assert np.array_equal(model.graph.initializers["w"].const_value.numpy(), before)
    assert result.report.after.nonzero == (after != 0).sum()


def test_two_of_four_runs_along_the_inputs() -> None:
    result = graphopt.optimize(layered("Gemm"), "prune:pattern=2of4")
    weight = linear_layers(result.model)[0].matrix()
    assert ((weight != 0).reshape(6, 2, 4).sum(-1) == 2).all()


def test_two_of_four_runs_along_the_channels_of_a_convolution() -> None:
    """Sparse kernels take the groups at one kernel position."""
    result = graphopt.optimize(layered("Conv"), "prune:pattern=2of4")
    weight = result.model.graph.initializers["w"].const_value.numpy()
    assert ((weight != 0).sum(axis=1) == 2).all()


def test_inputs_that_no_group_divides_are_left_with_a_note() -> None:
    model = layered("Depthwise")
    result = graphopt.optimize(model, "prune:pattern=2of4")
    (note,) = [note for note in result.report.steps[-1].notes if note.left]
    assert "1 input channels are no multiple of 4" in note.text
    assert result.report.steps[-1].edits == 0


def shared_with_gather() -> ir.Model:
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (int64[3] ids) => (float[3, 4] y) <float[4, 4] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 8, 7, 6, 5, 4, 3, 2}> {
      e = Gather(w, ids)
      y = MatMul(e, w)
    }"""
    return ir.from_proto(onnx.parser.parse_model(text))


def test_a_weight_that_is_an_embedding_too_is_left_with_a_note() -> None:
    result = graphopt.optimize(shared_with_gather(), "prune")
    assert any("also read by Gather" in note.text for note in result.report.steps[-1].notes)
    assert result.report.after.nonzero == result.report.before.nonzero


def test_nothing_to_prune_is_said_and_no_error() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> agraph (float[2] x) => (float[2] y) { y = Relu(x) }'
    result = graphopt.optimize(ir.from_proto(onnx.parser.parse_model(text)), "prune")
    assert any("no layer with constant weights" in note.text for note in result.report.steps[-1].notes)


def test_nan_in_a_weight_is_an_error_that_names_it() -> None:
    model = layered("Gemm")
    broken = model.graph.initializers["w"].const_value.numpy().copy()
    broken[0, 0] = np.nan
    model.graph.initializers["w"].const_value = ir.tensor(broken, name="w")
    with pytest.raises(PassError, match="`w` holds NaN"):
        graphopt.optimize(model, "prune")


def test_a_quantized_model_is_refused_with_the_right_order() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> agraph (float[2,64] x) => (float[2,64] y) { y = MatMul(x, w) }'
    model = ir.from_proto(onnx.parser.parse_model(text.replace("float[2,64] x", "float[2,64] x, float[64,64] w")))
    weight = model.graph.inputs.pop()
    weight.const_value = ir.tensor(RNG.standard_normal((64, 64)).astype(np.float32), name="w")
    model.graph.register_initializer(weight)
    quantized = graphopt.optimize(model, "quant:mode=weights").model
    with pytest.raises(PassError) as caught:
        graphopt.optimize(quantized, "prune")
    assert "prune,quant" in (caught.value.hint or "")


def test_weights_in_branches_and_functions_are_pruned_too() -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "local": 1]>
    agraph (float[2, 2] x, bool c) => (float[2, 2] y) {
      a = If (c) <
        then_branch = t () => (float[2, 2] p) {
          w = Constant<value = float[2, 2] {1.0, 2.0, 3.0, 4.0}>() p = MatMul(x, w)
        },
        else_branch = e () => (float[2, 2] q) { q = Abs(x) }
      >
      y = local.layer(a)
    }
    <domain: "local", opset_import: ["": 17]>
    layer (a) => (b) { w = Constant<value = float[2, 2] {1.0, 2.0, 3.0, 4.0}>() b = MatMul(a, w) }"""
    result = graphopt.optimize(ir.from_proto(onnx.parser.parse_model(text)), "prune")
    layers = linear_layers(result.model)
    assert [int((layer.matrix() != 0).sum()) for layer in layers] == [2, 2]
