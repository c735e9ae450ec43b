"""What quantization says it did is what is in the model, and what it left is named with the reason."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import walk
from graphopt.errors import LONGEST_CAUSE, one_line

from .pass_runs import loaded
from .quant_runs import Array, model_of, quantize, random

ROOT = Path(__file__).resolve().parent.parent
MODEL, DATA = ROOT / "models" / "digits_cnn.onnx", ROOT / "models" / "digits.npz"
HIDDEN = 32


def remarks(result: graphopt.Result) -> str:
    return "\n".join(note.text for step in result.report.steps for note in step.notes)


def stored_dtypes(model: ir.Model) -> Counter[ir.DataType]:
    return Counter(tensor.dtype for tensor in walk.stored_tensors(model) if tensor.size > 64)


def halves(*nodes: onnx.NodeProto, **weights: Array) -> ir.Model:
    """Return a model of float16 from `x` [2, 16, 12, 12] to `y`."""
    graph = helper.make_graph(
        list(nodes),
        "halves",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT16, [2, 16, 12, 12])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT16, None)],
        [numpy_helper.from_array(array.astype(np.float16), name) for name, array in weights.items()],
    )
    return loaded(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def recurrent() -> ir.Model:
    """Return an LSTM behind a product."""
    nodes = [
        helper.make_node("MatMul", ["x", "m"], ["h"], name="product"),
        helper.make_node("LSTM", ["h", "w", "r"], ["y"], hidden_size=HIDDEN, name="memory"),
    ]
    weights = {"m": random(0, 64, 64), "w": random(1, 1, 4 * HIDDEN, 64), "r": random(2, 1, 4 * HIDDEN, HIDDEN)}
    graph = helper.make_graph(
        nodes,
        "recurrent",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [5, 4, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return loaded(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_mixed_precision_tells_the_formats_and_bytes_that_are_stored() -> None:
    passes = "mixed-quant:mode=weights:weights=int2:solver=rtn"
    result = graphopt.optimize(MODEL, passes, data=DATA, budget="top1=1%")
    (facts,) = [note.facts for step in result.report.steps for note in step.notes if "weights_stored" in note.facts]
    assert facts["weights_stored"] == {"int2": 1, "int8": 5}  # a Conv takes int8 instead
    assert facts["constant_bytes"] == sum(tensor.nbytes for tensor in walk.stored_tensors(result.model))
    assert "1 as int2, 5 as int8" in remarks(result)


def test_sensitivity_tells_what_a_layer_is_stored_as() -> None:
    found = graphopt.sensitivity(MODEL, "quant:mode=weights:weights=int2:solver=rtn", data=DATA, samples=8)
    assert {(row.operators, row.stored) for row in found.rows} == {(("Conv",), ("int8",)), (("Gemm",), ("int2",))}


def test_weights_of_halves_are_stored_in_fewer_bits() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    weight = random(0, 32, 16, 3, 3) * 1e-5  # a scale of float16 would be next to nothing here
    result = graphopt.optimize(halves(conv, w=weight), "quant:mode=weights")
    assert "weights stored as int8: 1, for 1 Conv, 9.2 kB → 4.6 kB" in remarks(result)
    assert stored_dtypes(result.model) == {ir.DataType.INT8: 1}
    codes = next(tensor.numpy() for tensor in walk.stored_tensors(result.model) if tensor.dtype == ir.DataType.INT8)
    scales = next(tensor.numpy() for tensor in walk.stored_tensors(result.model) if tensor.dtype == ir.DataType.FLOAT)
    np.testing.assert_allclose(codes * scales, weight, atol=np.abs(weight).max() / 100)


@pytest.mark.parametrize(
    ("body", "weights", "reason"),
    [
        ("y = Conv(x, w)", {"w": random(1, 16, 8, 3, 3)}, "not int4: 1 of a Conv, which multiplies by no matrix"),
        ("f = Flatten(x) y = Gemm<transA=1>(f, w)", {"w": random(1, 4, 512)}, "not int4: 1 of a Gemm that transposes"),
        ("y = MatMul(x, w)", {"w": random(1, 8, 32, 64)}, "not int4: 1 no matrix"),
    ],
)
def test_why_a_weight_takes_int8_instead_is_said(body: str, weights: dict[str, Array], reason: str) -> None:
    result = quantize(model_of(body, "4,8,32,32", weights), None, mode="weights", weights="int4", solver="rtn")
    assert any(reason in note for note in result.notes), result.notes


def test_why_a_table_takes_more_bits_than_asked_is_said() -> None:
    body = "i = Cast<to=7>(x) e = Gather(w, i) y = MatMul(e, v)"
    model = model_of(body, "2,4", {"w": random(1, 64, 64), "v": random(2, 64, 64)})
    result = graphopt.optimize(model, "quant:mode=weights:weights=int4:solver=rtn", verify="off")
    assert "int8 by 32: 1, int4 by 32: 1 (int8 what is looked up" in remarks(result)


def test_weights_left_in_float_are_named_with_the_reason() -> None:
    body = "a = MatMul(x, w) y = MatMul(a, v)"
    result = quantize(model_of(body, "4,8", {"w": random(1, 8, 4), "v": random(2, 4, 3)}), None, mode="weights")
    assert result.notes == ["weights left in float: 2 MatMul (no smaller as int8 with its scales)"]


def test_nothing_is_said_of_weights_where_all_are_integers() -> None:
    result = quantize(model_of("y = MatMul(x, w)", "4,64", {"w": random(1, 64, 64)}), None, mode="dynamic")
    assert not any("weight" in note for note in result.notes)


@pytest.mark.parametrize("mode", ["static", "dynamic", "weights"])
def test_recurrent_weights_that_stay_are_named(mode: str) -> None:
    data = [{"x": random(seed, 5, 4, 64)} for seed in range(3)]
    result = graphopt.optimize(recurrent(), f"quant:mode={mode}", data=data, verify="off")
    size = 4 * HIDDEN * (64 + HIDDEN) * 4
    assert f"left: 1 LSTM (weights of recurrent operators, {size / 1000:.1f} kB" in remarks(result)


def test_codes_that_several_read_are_folded_as_no_kernel_takes_them() -> None:
    body = "a = MatMul(x, w) r = Relu(a) y = MatMul(r, w)"
    result = quantize(model_of(body, "4,64", {"w": random(1, 64, 64)}), None, mode="weights")
    assert result.ops["DequantizeLinear"] == 0
    assert result.ops["Cast"] == 1
    assert "for 2 MatMul, 16.4 kB → 4.1 kB; the runtime computes in float as before" in result.notes[0]


def test_a_model_without_linear_layers_is_said_to_have_none() -> None:
    result = quantize(model_of("y = Relu(x)", "4,64", {}), None)
    assert result.notes[0].startswith("chose `mode=weights`: no convolution or matrix product")
    assert result.notes[1].startswith("no weight to store")


def test_every_operator_that_reads_integers_and_stays_is_counted() -> None:
    result = graphopt.optimize(MODEL, "quant:mode=static:activations=int16", data=DATA, target="portable")
    assert "left: 2 Add" in remarks(result)


def test_no_constant_is_left_unread() -> None:
    model = graphopt.optimize(MODEL, "quant:mode=static", data=DATA).model
    unread = [
        name for name, value in model.graph.initializers.items() if not value.uses() and not value.is_graph_output()
    ]
    assert not unread


def test_cast_says_that_halves_are_halves_already() -> None:
    conv = helper.make_node("Conv", ["x", "w"], ["y"], name="conv")
    text = remarks(graphopt.optimize(halves(conv, w=random(0, 32, 16, 3, 3)), "cast", target="ort-cpu-x86"))
    assert "nothing to store in float16" in text
    assert "halves," not in text


def test_long_errors_are_cut_between_words() -> None:
    text = one_line(ValueError("word " * LONGEST_CAUSE))
    assert text.endswith("word …")
    assert len(text) <= LONGEST_CAUSE
    assert len(one_line(ValueError("x" * 2 * LONGEST_CAUSE))) == LONGEST_CAUSE
    assert one_line(ValueError("short\nand sweet")) == "short and sweet"
