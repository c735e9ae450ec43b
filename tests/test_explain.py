"""`explain`: what it predicts is what ONNX Runtime runs, and what it cannot know it says."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import platform
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from graphopt import registry
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.explaining.explanation import Explanation, explain
from graphopt.explaining.proof import numbered, prove
from graphopt.explaining.rules import predict
from graphopt.generated import generated_feeds
from graphopt.shapes import infer_shapes

from .command_line import run
from .quantized_graphs import (
    IMAGE,
    Builder,
    conv,
    every_case,
    fan_out,
    few_bits,
    join,
    moved,
    product,
    unary,
    weight_in_codes,
)

X86 = "ort-cpu-x86"
CASES = every_case()
on_x86 = pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="the rules are those of x86")


def explained(proto: onnx.ModelProto, **options: Any) -> Explanation:
    """Return what becomes of a model on x86, each node run once."""
    options = {"target": X86, "runs": 1, "threads": 1} | options
    return explain(ir.from_proto(proto), **options)


def finding(found: Explanation, op: str) -> Any:
    return next(one for one in found.findings if one.op == op)


def saved(proto: onnx.ModelProto, folder: Path) -> Path:
    file = folder / "model.onnx"
    onnx.save(proto, file)
    return file


@on_x86
@pytest.mark.parametrize("case", CASES)
def test_what_is_predicted_is_what_runs(case: str) -> None:
    found = explained(CASES[case]())
    assert found.proven_by is not None, found.unproven
    wrong = [one for one in found.findings if one.agrees is False]
    assert not wrong
    for one in found.findings:
        if one.state in ("integers", "weights"):
            assert one.kernel.removeprefix("Nhwc") == one.predicted_kernel


@on_x86
def test_a_wrong_rule_shows_as_a_disagreement() -> None:
    """The proof is no echo of the prediction: without the rule for int8 codes they differ."""
    target = registry.find("TARGETS", X86)
    wrong = replace(target, fusions=replace(target.fusions, rewrites_int8=False))
    model = ir.from_proto(conv(np.int8))
    inferred = model.clone()
    infer_shapes(inferred)
    predicted = {one.node.op_type: one.state for one in predict(inferred, wrong)}
    feeds = generated_feeds(model, 0, sets=1, batch=1)[0]
    number = next(at for at, node in enumerate(numbered(model)) if node.op_type == "Conv")
    assert predicted["Conv"] == "float"
    assert prove(model, OnnxRuntime(), feeds, threads=1, runs=1).ran[number].state == "integers"


@on_x86
@pytest.mark.parametrize(
    ("proto", "op", "words"),
    [
        (lambda: fan_out(np.int8), "Conv", "int8 activations have no kernel here unless one DQ alone reads them"),
        (lambda: fan_out(np.int8), "Add", "the runtime makes uint8 of int8"),
        (lambda: conv(np.uint16), "Conv", "uint16 activations have no kernel here"),
        (lambda: conv(weight=np.int16), "Conv", "int16 weights have no kernel here"),
        (lambda: conv(ending="output"), "Conv", "makes an output of the model"),
        (lambda: conv(ending="float"), "Conv", "its result is not quantized: Erf reads it in float"),
        (lambda: conv(ending="both"), "Conv", "its result is also read in float, by Tanh"),
        (lambda: conv(ending="two"), "Conv", "its result is quantized 2 times"),
        (lambda: conv(bias_scale=0.001), "Conv", "the scale of its bias is not that of input and weight multiplied"),
        (lambda: conv(tail="Relu"), "Conv", "the Relu behind it lets less through than the codes"),
        (lambda: conv(op="ConvTranspose"), "ConvTranspose", "no integer kernel for ConvTranspose"),
        (lambda: join("Add", "constant"), "Add", "is a float constant"),
        (lambda: join("Mul", "float"), "Mul", "is float"),
        (lambda: join("Concat", dtypes=(np.uint16, np.uint16)), "Concat", "uint16 activations"),
        (lambda: unary("Flatten", scale=0.5), "Flatten", "different scales or zero points"),
        (lambda: unary("Transpose", scale=0.5, perm=[0, 2, 3, 1]), "Transpose", "different scales or zero points"),
        (lambda: product("Gemm", zero=False), "Gemm", "the DQ of input 1 has no zero point"),
        (lambda: product("Gemm", bias="int32", beta=0.5), "Gemm", "`beta` is not 1"),
        (lambda: product(tail=True, ending="float"), "MatMul", "a Relu and no Q follows it"),
        (lambda: few_bits(op="Gather"), "Gather", "the whole table is dequantized in every run"),
        (lambda: weight_in_codes("Conv", (16, 16, 1, 1), IMAGE), "Conv", "only its weight is in codes"),
        (lambda: few_bits(block=8), "MatMul", "blocks of 8 along axis 0"),
        (lambda: few_bits(readers=2), "MatMul", "its DQ has several readers"),
        (lambda: few_bits(tail=True), "MatMul", "the Relu behind it keeps MatMulNBits away"),
        (lambda: few_bits(op="Gemm", bias=(1, 32)), "Gemm", "its bias is no vector"),
    ],
)
def test_why_an_operator_is_in_float(proto: Any, op: str, words: str) -> None:
    one = finding(explained(proto()), op)
    assert one.state == "float"
    assert words in one.why
    assert one.fix


@on_x86
@pytest.mark.parametrize(
    ("proto", "op"), [(lambda: conv(axis=1), "Conv"), (lambda: product("Gemm", bias="int32", alpha=1.0), "Gemm")]
)
def test_results_that_are_wrong_without_a_word_are_named(proto: Any, op: str) -> None:
    """Both hold: the remark is there, and the runtime's optimized graph computes something else than the model says."""
    made = proto()
    for tensor in made.graph.initializer:
        scales = tensor.data_type == TensorProto.FLOAT and tensor.dims and tensor.dims[0] > 1
        if scales:  # as they are all alike, the axis would not matter; and a bias of other scales
            values = np.linspace(0.001, 0.03, tensor.dims[0], dtype=np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(values, tensor.name))
    if op == "Conv":  # its bias must be on its grid to be fused
        del made.graph.node[next(at for at, node in enumerate(made.graph.node) if node.op_type == "Conv")].input[2]
    found = explained(made)
    assert finding(found, op).state == "integers"
    assert "WRONG results" in finding(found, op).remark
    model = ir.from_proto(made)
    feeds = generated_feeds(model, 0, sets=1, batch=1)[0]
    with OnnxRuntime().open(model) as fast, OnnxRuntime().open(model, optimize=False) as plain:
        ((name, value),) = fast.run(feeds).items()
        assert np.abs(value - plain.run(feeds)[name]).max() > 0.1


@on_x86
@pytest.mark.parametrize("form", ["block", "channel", "tensor"])
@pytest.mark.parametrize("outputs", [36, 37, 38])
def test_two_bits_misread_where_rows_end_within_a_byte_are_named(outputs: int, form: str) -> None:
    """The remark is there exactly where the fused product gives something else than the model says."""
    made = few_bits(TensorProto.INT2, shape=(64, outputs), axis=0 if form == "block" else 1, form=form)
    codes = np.random.default_rng(0).integers(-2, 2, (64, outputs)).astype(ml_dtypes.int2)
    packed = next(tensor for tensor in made.graph.initializer if tensor.data_type == TensorProto.INT2)
    packed.CopyFrom(onnx.numpy_helper.from_array(codes, packed.name))
    found = finding(explained(made), "MatMul")
    assert found.state == "weights"
    model = ir.from_proto(made)
    feeds = generated_feeds(model, 0, sets=1, batch=1)[0]
    with OnnxRuntime().open(model) as fast, OnnxRuntime().open(model, optimize=False) as plain:
        ((name, value),) = fast.run(feeds).items()
        wrong = np.abs(value - plain.run(feeds)[name]).max() > 0.05
    assert ("WRONG results" in found.remark) == wrong == bool(outputs % 4)


@on_x86
def test_a_weight_the_runtime_quantizes_itself_is_named() -> None:
    assert "quantizes its weight itself" in finding(explained(conv(weight=None, bias="float")), "Conv").remark


@on_x86
def test_slow_int8_activations_are_named() -> None:
    b = Builder()
    scale, zero = b.const(np.float32(0.02)), b.const(np.int8(0))
    codes = b.op("QuantizeLinear", [b.input(IMAGE), scale, zero])
    weight = b.const(np.ones((16, 16, 1, 1), np.int8))
    made = b.op("QLinearConv", [codes, scale, zero, weight, scale, zero, scale, zero])
    found = explained(b.result(b.op("DequantizeLinear", [made, scale, zero])))
    assert finding(found, "QLinearConv").state == "integers"
    assert "slow kernel" in finding(found, "QLinearConv").remark


@on_x86
def test_operators_of_nested_graphs_are_looked_at() -> None:
    inner, outer = conv().graph, Builder()
    data = outer.input(IMAGE)
    condition = outer.input([], TensorProto.BOOL)
    inner.output[0].type.tensor_type.ClearField("shape")
    taken = helper.make_graph(inner.node, "taken", [], inner.output, inner.initializer)
    result = helper.make_tensor_value_info("other", TensorProto.FLOAT, None)
    other = helper.make_graph([helper.make_node("Erf", [data], ["other"])], "other", [], [result])
    outer.output(outer.op("If", [condition], then_branch=taken, else_branch=other))
    found = finding(explained(outer.model()), "Conv")
    assert (found.predicted, found.state) == ("integers", "integers")


@on_x86
def test_a_model_that_would_end_the_process_is_not_run() -> None:
    b = Builder()
    condition = b.input([], TensorProto.BOOL)
    moved_value = b.op("Transpose", [b.qdq(b.input(IMAGE))], perm=[0, 2, 3, 1])
    branches = {}
    for name in ("then_branch", "else_branch"):
        result = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        branches[name] = helper.make_graph([helper.make_node("Erf", [moved_value], [name])], name, [], [result])
    b.output(b.op("If", [condition], **branches))
    found = explained(b.model())
    assert found.proven_by is None
    assert "end the process" in found.unproven


@pytest.mark.parametrize("op", ["QuantizeLinear", "DequantizeLinear", "Add", "MatMul", "Conv"])
def test_a_node_without_its_inputs_breaks_nothing(op: str) -> None:
    """The runtime says what is wrong with the model."""
    proto = {"Add": product(bias="int32"), "MatMul": product()}.get(op) or conv()
    del next(node for node in proto.graph.node if node.op_type == op).input[1:]
    found = explained(proto)
    assert found.proven_by is None
    assert found.unproven


@on_x86
def test_times_are_parts_of_the_whole() -> None:
    found = explained(conv(ending="float"), runs=3)
    assert found.milliseconds is not None
    assert found.conversion_milliseconds is not None
    assert found.conversions == 4  # in front of the convolution: Q and DQ of the data, DQ of weight and bias
    assert 0 < found.conversion_milliseconds < found.milliseconds
    own = sum(one.milliseconds or 0 for one in found.findings)
    assert own + found.conversion_milliseconds <= found.milliseconds


@on_x86
def test_operators_fused_in_float_are_found() -> None:
    """A Conv and a Relu are one kernel in a layout of the runtime's own; both are in float, neither is gone."""
    b = Builder()
    weight = b.const(np.ones((16, 16, 3, 3), np.float32))
    for _ in range(2):
        made = b.op("Relu", [b.op("Conv", [b.input(IMAGE), weight], pads=[1] * 4)])
        b.output(made)
    found = explained(b.model())
    assert [(one.op, one.state) for one in found.findings] == [("Conv", "float")] * 2


@on_x86
def test_a_float_model_is_told_what_the_target_could_do() -> None:
    b = Builder()
    made = b.op("Conv", [b.input(IMAGE), b.const(np.ones((16, 16, 3, 3), np.float32))])
    found = explained(b.result(b.op("MatMul", [made, made])))
    assert found.quantizable == (("Conv", "QLinearConv", 1),)  # a product of activations has no weight to quantize
    assert all(not one.in_integers for one in found.findings)


@on_x86
def test_what_decodes_a_weight_is_not_promised_but_its_layer_is() -> None:
    b = Builder()
    weight = b.op("Mul", [b.const(np.ones((16, 16, 3, 3), np.float32)), b.const(np.full((16, 1, 1, 1), 2, np.float32))])
    found = explained(b.result(b.op("Conv", [b.input(IMAGE), weight])))
    assert found.quantizable == (("Conv", "QLinearConv", 1),)
    assert finding(found, "Conv").why == "its weight is made as the model is loaded"
    assert "quant:mode=static" in finding(found, "Conv").fix


def attention(b: Builder) -> str:
    """Add a product of queries with keys, and one of probabilities with values; return the result."""
    rows = b.input([4, 32])
    scores = b.op("MatMul", [rows, b.op("Transpose", [rows], perm=[1, 0])])
    return str(b.op("MatMul", [b.op("Softmax", [scores]), rows]))


@pytest.mark.parametrize("target", [X86, "ort-cuda"])
def test_products_of_attention_are_left_to_float(target: str) -> None:
    b = Builder()
    found = explained(b.result(attention(b)), target=target)
    assert [(one.why, "--passes" in one.fix) for one in found.findings] == [
        ("an attention product of two activations", False)
    ] * 2


@pytest.mark.parametrize(
    ("op", "weight", "image", "words"),
    [
        ("Conv", (12, 16, 3, 3), IMAGE, "fewer than 16 channels"),
        ("MatMul", (32, 8), [4, 32], "fewer than 16 inputs or outputs"),
        ("MatMul", (32, 32), [1, 32], "a product with a vector"),
    ],
)
def test_what_is_too_small_for_a_target_is_not_promised(op: str, weight: Any, image: list[int], words: str) -> None:
    b = Builder()
    found = explained(b.result(b.op(op, [b.input(image), b.const(np.ones(weight, np.float32))])), target="tensorrt")
    assert not found.quantizable
    assert finding(found, op).why == words
    assert finding(found, op).fix == "leave it in float: too small to pay there"


def test_what_is_too_small_to_be_quantized_as_it_runs_is_told() -> None:
    b = Builder()
    rows = b.input([4, 32])
    codes, _, zero = b.op("DynamicQuantizeLinear", [rows], outputs=3)
    b.output(b.op("MatMulInteger", [codes, b.const(np.ones((32, 32), np.int8)), zero]), TensorProto.INT32)
    found = explained(b.result(b.op("MatMul", [rows, b.const(np.ones((32, 8), np.float32))])))
    assert finding(found, "MatMul").why == "fewer than 32 inputs or outputs"


@pytest.mark.parametrize(
    ("channels", "group", "why"),
    [
        (16, 16, "a depthwise convolution of fewer than 32 channels"),
        (16, 2, "a convolution in groups of fewer than 32 channels"),
        (64, 2, "not quantized"),
        (64, 64, "not quantized"),
    ],
)
def test_convolutions_with_slow_kernels_are_told(channels: int, group: int, why: str) -> None:
    b = Builder()
    first = b.op("Conv", [b.input([1, 16, 8, 8]), b.const(np.ones((channels, 16, 1, 1), np.float32))])
    weight = b.const(np.ones((channels, channels // group, 3, 3), np.float32))
    found = explained(b.result(b.op("Conv", [b.op("Relu", [first]), weight], group=group)))
    leads = f"leads to {why}" if "depthwise" in why else "not quantized"
    assert [one.why for one in found.findings] == [leads, why]
    assert all(("--passes" in one.fix) == (one.why == "not quantized") for one in found.findings)


def test_where_codes_begin_or_end_nothing_is_wasted() -> None:
    b = Builder()
    made = b.op("Conv", [b.qdq(b.op("Erf", [b.input(IMAGE)])), b.weight((16, 16, 3, 3), 0)])
    found = explained(b.result(b.op("Erf", [b.qdq(made)])))
    assert [one.op for one in found.findings] == ["Conv"]


@pytest.mark.parametrize(
    ("around", "fix"), [("Conv", "nothing: what is around it needs"), ("Erf", "leave Q and DQ away")]
)
def test_codes_around_a_float_operator_may_serve_others(around: str, fix: str) -> None:
    b = Builder()

    def layer(value: str) -> str:
        return str(b.op(around, [value, b.weight((16, 16, 1, 1), 0)] if around == "Conv" else [value]))

    middle = b.op("Tanh", [b.qdq(layer(b.qdq(b.input(IMAGE))))])
    found = explained(b.result(b.qdq(layer(b.qdq(middle)))))
    assert finding(found, "Tanh").fix.startswith(fix)


def test_other_runtimes_are_predicted_and_not_proven() -> None:
    b = Builder()
    made = b.op("Conv", [b.qdq(b.input(IMAGE), np.int8), b.weight((16, 16, 3, 3), 0), b.const(np.ones(16, np.float32))])
    found = explained(b.result(made), target="tensorrt")
    assert found.proven_by is None
    assert "tensorrt" in found.unproven
    assert found.agreement is None
    assert (finding(found, "Conv").state, finding(found, "Conv").kernel) == ("integers", "int8 Conv")


@pytest.mark.parametrize(
    ("proto", "words"),
    [
        (conv, "uint8 activations have no kernel here"),
        (lambda: conv(np.int8), "its bias is in codes"),
        (lambda: conv(np.int8, bias=None, zero=3), "a zero point is not 0"),
    ],
)
def test_what_tensorrt_does_not_take(proto: Any, words: str) -> None:
    assert finding(explained(proto(), target="tensorrt"), "Conv").why == words


def test_cuda_takes_few_bits_and_nothing_else() -> None:
    assert finding(explained(conv(), target="ort-cuda"), "Conv").state == "float"
    assert finding(explained(few_bits(), target="ort-cuda"), "MatMul").kernel == "MatMulNBits"


@on_x86
def test_a_model_the_runtime_refuses_is_still_explained() -> None:
    found = explained(moved("Transpose", before=False, dtype=np.int8))
    assert found.proven_by is None
    assert "refuses the model" in found.unproven
    assert finding(found, "Transpose").milliseconds is None


def test_a_backend_that_does_not_tell_is_named() -> None:
    found = explained(conv(), backend="reference")
    assert found.proven_by is None
    assert "does not tell" in found.unproven


def test_inputs_of_unknown_rank_need_data(tmp_path: Path) -> None:
    proto = conv()
    proto.graph.input[0].type.tensor_type.ClearField("shape")
    assert "--data" in explained(proto).unproven
    if platform.machine() in ("x86_64", "AMD64"):
        data = {"x0": np.zeros((2, *IMAGE[1:]), np.float32)}
        assert explained(proto, data=data).proven_by is not None


@on_x86
def test_the_command_prints_what_ran(tmp_path: Path) -> None:
    shown = run("explain", saved(fan_out(np.int8), tmp_path), "--target", X86, "--runs", 1)
    assert (shown.code, shown.err) == (0, "")
    lines = shown.out.splitlines()
    assert lines[0] == f" {X86}: proven by onnxruntime cpu on made-up inputs"
    assert any("Conv" in line and "0/1" in line for line in lines)
    assert any("uint8 activations" in line for line in lines)
    assert any("QuantizeLinear and DequantizeLinear: " in line and "left" in line for line in lines)


@on_x86
def test_the_command_as_json(tmp_path: Path) -> None:
    shown = run("explain", saved(conv(), tmp_path), "--target", X86, "--json", "--runs", 1)
    found = json.loads(shown.out)
    assert found["target"] == X86
    assert found["agreement"] == {"as_predicted": 1, "of": 1}
    assert found["findings"][0]["state"] == "integers"
    assert found["findings"][0]["kernel"] == "QLinearConv"
    assert found["findings"][0]["milliseconds"] > 0


@on_x86
def test_every_operator_is_listed_with_v(tmp_path: Path) -> None:
    file = saved(fan_out(np.uint8), tmp_path)
    shown = run("explain", file, "--target", X86, "-v", "--runs", 1).out
    assert all(node.name in shown for node in onnx.load(file).graph.node if node.op_type in ("Conv", "Add"))


def test_the_command_on_a_float_model_is_one_line(tmp_path: Path) -> None:
    b = Builder()
    file = saved(b.result(b.op("Conv", [b.input(IMAGE), b.const(np.ones((16, 16, 3, 3), np.float32))])), tmp_path)
    shown = run("explain", file, "--target", X86)
    assert len(shown.out.splitlines()) == 2
    assert "nothing is quantized; `--passes quant --target ort-cpu-x86` could run 1 Conv → QLinearConv" in shown.out


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--target", "ort-cpu-x68"], "unknown target"),
        (["--data", "nothing.npz"], "nothing.npz"),
        (["--backend", "tflite"], "unknown backend"),
        (["--runs", "0"], "--runs"),
    ],
)
def test_mistakes_are_told(options: list[str], words: str, tmp_path: Path) -> None:
    shown = run("explain", saved(conv(), tmp_path), *options)
    assert shown.code == 2
    assert words in shown.error


def test_a_file_that_is_not_there() -> None:
    assert run("explain", "nothing.onnx").code == 2


@on_x86
@pytest.mark.parametrize("name", ["digits", "resnet20"])
@pytest.mark.parametrize("signed", [False, True])
def test_real_models_of_another_tool(name: str, signed: bool, shared: Path, tmp_path: Path) -> None:
    """As `benchmarks/explain.py` on all models: ONNX Runtime's own quantizer, U8S8 and S8S8."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    source = shared / "assets" / "models" / {"digits": "digits_resnet.onnx", "resnet20": "resnet20_cifar10.onnx"}[name]
    model = ir.load(source)
    feeds = generated_feeds(model, 0, sets=2, batch=1)

    class Reader(quantization.CalibrationDataReader):  # type: ignore[misc,name-defined]
        rest = iter(feeds)

        def get_next(self) -> Any:
            return next(self.rest, None)

    kind = quantization.QuantType.QInt8 if signed else quantization.QuantType.QUInt8
    output = tmp_path / "quantized.onnx"
    logging.disable(logging.WARNING)
    with contextlib.redirect_stderr(io.StringIO()):
        quantization.quantize_static(
            str(source),
            str(output),
            Reader(),
            per_channel=True,
            activation_type=kind,
            weight_type=quantization.QuantType.QInt8,
        )
    logging.disable(logging.NOTSET)
    found = explain(output, target=X86, runs=1, threads=1)
    right, judged = found.agreement or (0, 0)
    assert judged > 10
    assert right == judged
