"""Targets: their data hangs together, and what they say of ONNX Runtime's CPU kernels is what it does."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import registry
from graphopt.backends import targets as known
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.explaining.proof import prove
from graphopt.fusion_rules import Fusion
from graphopt.generated import generated_feeds
from graphopt.target import Target

from .quantized_graphs import FLOAT_ONLY, UNARY, conv, dynamic, fan_out, few_bits, join, moved, product, split, unary

ROOT = Path(__file__).resolve().parent.parent
TARGETS: dict[str, Target] = dict(registry.table("TARGETS"))
ORT_CPU = [target for name, target in TARGETS.items() if name.startswith("ort-cpu-")]
RULES = TARGETS["ort-cpu-x86"].fusions
WANTED = {"ort-cpu-x86", "ort-cpu-x86-avx2", "ort-cpu-arm", "ort-cuda", "tensorrt", "openvino", "portable"}


def ran(proto: onnx.ModelProto, op: str) -> tuple[str | None, str]:
    """Return in what an operator of a model ran, and as which kernel, by ONNX Runtime's own graph and profile."""
    model = ir.from_proto(proto)
    index = next(at for at, node in enumerate(model.graph) if node.op_type == op)
    feeds = generated_feeds(model, 0, sets=1, batch=1)[0]
    found = prove(model, OnnxRuntime(), feeds, threads=1, runs=1).ran[index]
    return found.state, found.kernel.removeprefix("Nhwc")


def model_of(rule: Fusion, *, to_float: bool = False) -> onnx.ModelProto:
    """Return a model in which a rule holds."""
    ending = "float" if to_float else "q"
    if rule.op == "Conv":
        return conv(ending=ending)
    if rule.op in ("MatMul", "Gemm"):
        return product(rule.op, ending=ending)
    if rule.op in ("Add", "Mul", "Concat", "Where"):
        return join(rule.op, ending=ending)
    if rule.op == "Split":
        return split()
    if rule.op == "ArgMax":
        data = unary("ArgMax", ending="output", axis=1)
        data.graph.output[0].type.tensor_type.elem_type = TensorProto.INT64
        return data
    return unary(rule.op, **UNARY[rule.op], ending=ending)


def test_every_wanted_target_is_there() -> None:
    assert set(TARGETS) >= WANTED


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_the_data_of_a_target_hangs_together(target: Target) -> None:
    rules = {fusion.op for fusion in target.fusions.fusions}
    assert len(rules) == len(target.fusions.fusions), "one rule for each operator"
    if rules:
        assert target.integer_ops <= rules
        assert target.shared_scale_ops <= {one.op for one in target.fusions.fusions if not one.weights}
    for scheme in filter(None, (target.static, *target.alternatives)):
        assert scheme.activation_symmetric or scheme.activation.startswith(("u", "int"))
        assert scheme.weight.startswith("float") == scheme.activation.startswith("float")
    if target.static is not None and rules:
        heart = target.fusions.of("Conv")
        assert heart is not None
        assert target.static.activation in heart.codes
        assert heart.symmetric <= target.static.activation_symmetric
        assert (heart.float_bias is not None) <= (target.static.bias == "float")
    if target.weight_only is not None and target.weight_only.form == "MatMulNBits":
        assert "com.microsoft::MatMulNBits" in target.fusions.written
        assert target.fusions.weights is not None
        assert min(target.weight_only.blocks) >= target.fusions.weights.least_block
    assert target.describe()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_widths_come_in_multiples_that_vectors_have(target: Target) -> None:
    assert target.width_multiple in (8, 16)
    assert f"widths in multiples of {target.width_multiple}" in target.describe()


def test_nothing_is_assumed_of_the_widths_of_a_target_that_says_nothing() -> None:
    bare = Target("bare", "says nothing", "onnxruntime")
    assert bare.width_multiple == 1
    assert "widths" not in bare.describe()


def test_integer_arithmetic_is_kept_off_cuda() -> None:
    cuda = TARGETS["ort-cuda"]
    assert cuda.static is None
    assert not cuda.alternatives
    assert not cuda.integer_ops | cuda.shared_scale_ops | cuda.dynamic_ops
    assert not cuda.fusions.fusions
    assert cuda.floats == {"float16", "bfloat16"}


def test_tensorrt_is_symmetric_with_float_bias_and_float_outputs() -> None:
    scheme = TARGETS["tensorrt"].static
    assert scheme is not None
    assert (scheme.activation, scheme.activation_symmetric, scheme.bias) == ("int8", True, "float")
    assert scheme.residual
    assert not scheme.quantize_outputs
    assert scheme.least_channels > 1
    assert not TARGETS["tensorrt"].fusions.written, "it takes no operators of ONNX Runtime's"


def test_only_where_16_bit_sums_saturate_are_weights_kept_to_7_bits() -> None:
    reduced = {name for name, target in TARGETS.items() if target.static is not None and target.static.reduce_range}
    assert reduced == {"ort-cpu-x86-avx2"}


@pytest.mark.parametrize(
    ("machine", "flags", "expected"),
    [
        ("x86_64", {"avx2", "avx512_vnni"}, "ort-cpu-x86"),
        ("x86_64", {"avx2", "avx_vnni"}, "ort-cpu-x86"),
        ("x86_64", {"avx2", "avx512f"}, "ort-cpu-x86-avx2"),
        ("x86_64", set(), "ort-cpu-x86-avx2"),
        ("aarch64", set(), "ort-cpu-arm"),
        ("arm64", set(), "ort-cpu-arm"),
    ],
)
def test_the_host_is_told_by_its_features(
    machine: str, flags: set[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(known.platform, "machine", lambda: machine)
    monkeypatch.setattr(known, "_cpu_flags", lambda: flags)
    assert known.host_target() == expected


@pytest.mark.parametrize("rule", RULES.fusions, ids=lambda rule: rule.op)
def test_onnx_runtime_fuses_what_a_rule_says(rule: Fusion) -> None:
    assert ran(model_of(rule), rule.op) == ("integers", rule.kernel)


@pytest.mark.parametrize("rule", [one for one in RULES.fusions if one.writes != "float"], ids=lambda rule: rule.op)
def test_a_float_result_is_as_a_rule_says(rule: Fusion) -> None:
    state, kernel = ran(model_of(rule, to_float=rule.op != "Split"), rule.op)
    carried = rule.op in dict(RULES.propagates)
    if rule.op == "Split":
        assert state == "integers"
    elif rule.writes == "either":
        assert (state, kernel) == ("integers", rule.kernel_to_float or rule.kernel)
    else:
        assert state == ("integers" if carried else "float")


@pytest.mark.parametrize("op", sorted(FLOAT_ONLY))
def test_what_has_no_rule_stays_in_float(op: str) -> None:
    assert RULES.of(op) is None
    assert ran(unary(op, **FLOAT_ONLY[op]), op)[0] == "float"


@pytest.mark.parametrize(
    "case",
    ["bias off its grid", "int16 weights", "uint16", "clip", "output", "fan-out of int8"],
)
def test_a_convolution_stays_in_float(case: str) -> None:
    made = {
        "bias off its grid": lambda: conv(bias_scale=0.001),
        "int16 weights": lambda: conv(weight=np.int16),
        "uint16": lambda: conv(np.uint16),
        "clip": lambda: conv(tail="Relu"),
        "output": lambda: conv(ending="output"),
        "fan-out of int8": lambda: fan_out(np.int8),
    }[case]()
    assert ran(made, "Conv")[0] == "float"


@pytest.mark.parametrize("op", [op for op, _ in RULES.propagates])
@pytest.mark.parametrize("before", [True, False])
def test_q_and_dq_are_carried_across_moves(op: str, before: bool) -> None:
    if op in ("Slice", "Squeeze", "Unsqueeze"):
        if before:
            pytest.skip("made by `unary`, which begins with DQ")
        assert ran(unary(op, **UNARY[op], ending="float"), op)[0] == "integers"
        return
    assert ran(moved(op, before=before), op)[0] == "integers"


def test_an_int8_move_towards_floats_breaks_onnx_runtime() -> None:
    """A fault of ONNX Runtime 1.31; where this fails, it is mended, and `docs/targets.md` can say so."""
    proto = moved("Transpose", before=False, dtype=np.int8)
    onnxruntime.set_default_logger_severity(4)
    with pytest.raises(Exception, match="output_dtype INT8"):
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])


@pytest.mark.parametrize("code", sorted(RULES.weights.codes) if RULES.weights else [])
def test_few_bit_weights_become_one_kernel(code: str) -> None:
    dtype = int(TensorProto.DataType.Value(code.upper()))
    assert ran(few_bits(dtype), "MatMul") == ("weights", "MatMulNBits")


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_sixteen_bits_around_a_product_are_what_the_rule_says(op: str, dtype: type[np.generic]) -> None:
    """As good as floats from ONNX Runtime 1.32 on: until then, they keep the product in float."""
    assert RULES.weights is not None
    newer = tuple(map(int, onnxruntime.__version__.split(".")[:2])) >= (1, 32)
    assert (np.dtype(dtype).name in RULES.weights.floats) == newer
    state = "weights" if newer else "float"
    assert ran(product(op, dtype), op)[0] == state
    assert ran(product(op, dtype, ending="float"), op)[0] == state
    assert ran(product(op, dtype, np.uint8), op)[0] == "float"


def test_the_smallest_block_is_the_one_named() -> None:
    assert RULES.weights is not None
    least = RULES.weights.least_block
    assert ran(few_bits(block=least), "MatMul")[0] == "weights"
    assert ran(few_bits(block=least // 2), "MatMul")[0] == "float"


@pytest.mark.parametrize("readers", [1, 2])
def test_dynamic_products_are_fused(readers: int) -> None:
    kernel = "DynamicQuantizeMatMul" if readers == 1 else "MatMulIntegerToFloat"
    assert ran(dynamic(readers=readers), "MatMulInteger") == ("integers", kernel)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("block", [16, 32, 256])
def test_the_weight_only_form_runs_as_the_target_says(bits: int, block: int) -> None:
    """MatMulNBits as it is written, at the accuracy level of the target: the codes are the numbers they stand for."""
    scheme = TARGETS["ort-cpu-x86"].weight_only
    assert scheme is not None
    assert bits in scheme.bits
    assert block in scheme.blocks
    inner, outer = 256, 16
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (outer, inner // block, block)).astype(np.uint8)
    scales = rng.uniform(0.5, 1.5, (outer, inner // block)).astype(np.float32)
    per_byte = 8 // bits
    packed = sum(codes[..., at::per_byte] << (bits * at) for at in range(per_byte)).astype(np.uint8)
    node = helper.make_node(
        "MatMulNBits",
        ["x", "w", "s"],
        ["y"],
        domain="com.microsoft",
        K=inner,
        N=outer,
        bits=bits,
        block_size=block,
        accuracy_level=scheme.accuracy_level,
    )
    graph = helper.make_graph(
        [node],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, inner])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, outer])],
        [numpy_helper.from_array(packed, "w"), numpy_helper.from_array(scales.reshape(-1), "s")],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=10))
    feeds = {"x": rng.standard_normal((2, inner)).astype(np.float32)}
    with OnnxRuntime().open(model) as session:
        found = session.run(feeds)["y"]
    weight = ((codes.astype(np.float32) - 2 ** (bits - 1)) * scales[..., None]).reshape(outer, inner)
    expected = feeds["x"] @ weight.T
    # Activations are rounded to 8 bits where the accuracy level lets them.
    assert np.abs(found - expected).max() < 0.02 * np.abs(expected).max()


def test_the_doc_holds_the_table_of_targets() -> None:
    """Write it anew with `python -m tests.test_targets`."""
    text = (ROOT / "docs" / "targets.md").read_text()
    assert table() in text


def test_the_doc_names_every_rule() -> None:
    text = (ROOT / "docs" / "targets.md").read_text()
    missing = [rule.op for rule in RULES.fusions if not re.search(rf"\b{rule.op}\b", text)]
    assert not missing


def test_a_wrong_rule_would_be_seen() -> None:
    rule = RULES.of("Conv")
    assert rule is not None
    wrong = replace(rule, kernel="QLinearMatMul")
    assert ran(model_of(wrong), "Conv")[1] != wrong.kernel


def table() -> str:
    """Return the table of `docs/targets.md`."""
    rows = ["| target | what it is | what pays |", "|---|---|---|"]
    rows += [f"| `{name}` | {target.help} | {target.describe()} |" for name, target in sorted(TARGETS.items())]
    return "\n".join(rows)


if __name__ == "__main__":
    doc = ROOT / "docs" / "targets.md"
    doc.write_text(re.sub(r"\| target \|.*?(?=\n\n)", lambda _: table(), doc.read_text(), count=1, flags=re.DOTALL))
