"""Quantized operators in torch: codes as ONNX Runtime has them, and gradients through them."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest

from .torch_models import assert_same_as_onnxruntime, model_of, run_in

torch = pytest.importorskip("torch")

from graphopt.backends.torch_fx.lowering import lower  # noqa: E402


def quantized_model(
    code: str, low: int, axis: str = "", scale: str = "{0.1}", shape: str = "", zero: str = "0"
) -> ir.Model:
    return model_of(f"""g (float[4,6] x) => (float[4,6] y) <float{shape} s = {scale}, {code}{shape} z = {{{zero}}}> {{
        q = QuantizeLinear{axis}(x, s, z) y = DequantizeLinear{axis}(q, s, z) }}""")


QDQ = {
    "int8": quantized_model("int8", -128),
    "uint8": quantized_model("uint8", 0, zero="100"),
    "int16": quantized_model("int16", -32768),
    "rows": quantized_model("int8", -128, "<axis = 0>", "{0.1, 0.2, 0.01, 0.004}", "[4]", "0, 0, 1, -3"),
    "blocks": quantized_model(
        "uint8",
        0,
        "<axis = 1, block_size = 3>",
        ", ".join(["{0.1"] + ["0.2"] * 6 + ["0.01}"]),
        "[4,2]",
        "7, 1, 2, 3, 4, 5, 6, 8",
    ),
    "int4": quantized_model("int4", -8, scale="{0.5}"),
}


@pytest.mark.parametrize("case", QDQ)
def test_quantized_values_are_the_same_plain_and_while_they_are_trained(case: str) -> None:
    pytest.importorskip("onnxruntime")
    model = QDQ[case]
    x = np.random.default_rng(0).standard_normal((4, 6)).astype(np.float32) * 8
    assert_same_as_onnxruntime(model, {"x": x}, 0)
    plain, training = lower(model), lower(model, differentiable=True)
    given = torch.from_numpy(x)
    assert torch.equal(plain(given)[0], training(given)[0])
    assert training.meta["graphopt"].buffers.keys() == {"z"}


@pytest.mark.parametrize(("code", "zero"), [("int16", 0), ("int16", -5), ("uint16", 40001)])
def test_codes_of_16_bits_of_floats_of_16_bits(code: str, zero: int) -> None:
    """Float16 holds no whole number beyond 2048 but some: codes are found in a wider type."""
    pytest.importorskip("onnxruntime")
    model = model_of(f"""g (float16[6] x) => ({code}[6] q, float16[6] y) <float s = {{0.5}}, {code} z = {{{zero}}}> {{
        h = Cast<to = 10>(s) q = QuantizeLinear(x, h, z) y = DequantizeLinear(q, h, z) }}""")
    x = np.array([1.5, -2.0, 60000.0, -60000.0, 1000.0, 0.0], np.float16)
    assert_same_as_onnxruntime(model, {"x": x}, 0)
    given = torch.from_numpy(x)
    assert torch.equal(lower(model)(given)[1], lower(model, differentiable=True)(given)[1])


def test_the_gradient_of_a_scale_is_that_of_lsq() -> None:
    model = QDQ["int8"]
    module = lower(model, differentiable=True)
    module.s.requires_grad_(True)
    x = torch.tensor([[3.21, -1.04, 40.0, -40.0, 0.049, 12.64]]).repeat(4, 1).requires_grad_(True)
    module(x)[0].sum().backward()
    v = (x / module.s).detach()
    inside = (v > -128) & (v < 127)
    wanted = torch.where(inside, v.round() - v, v.clamp(-128, 127)).sum()
    torch.testing.assert_close(module.s.grad, wanted)
    torch.testing.assert_close(x.grad, inside.float())


def test_gradients_of_narrow_floats_end_where_their_range_does() -> None:
    model = quantized_model("float8e4m3fn", 0, scale="{0.5}")
    x = torch.tensor([[1.0, 224.0, 500.0, -900.0, 3.3, 0.0]]).repeat(4, 1).requires_grad_(True)
    plain, training = lower(model), lower(model, differentiable=True)
    assert torch.equal(plain(x)[0], training(x)[0])
    training(x)[0].sum().backward()
    assert x.grad is not None
    assert x.grad[0].tolist() == [1, 1, 0, 0, 1, 1]


QLINEAR = {
    "QLinearAdd": "y = com.microsoft.QLinearAdd(a, s, z, b, s, z, t, u)",
    "QLinearMul": "y = com.microsoft.QLinearMul(a, s, z, b, s, z, t, u)",
    "QLinearSigmoid": "y = com.microsoft.QLinearSigmoid(a, s, z, t, u)",
    "QLinearLeakyRelu": "y = com.microsoft.QLinearLeakyRelu <alpha = 0.2> (a, s, z, t, u)",
    "QLinearConcat": "y = com.microsoft.QLinearConcat <axis = 1> (t, u, a, s, z, b, t, u)",
    "QLinearAveragePool": "y = com.microsoft.QLinearAveragePool <kernel_shape = [2, 2]> (a, s, z, t, u)",
    "QLinearGlobalAveragePool": "y = com.microsoft.QLinearGlobalAveragePool(a, s, z, t, u)",
    "QLinearSoftmax": "y = com.microsoft.QLinearSoftmax <axis = -1, opset = 13> (a, s, z, t, u)",
    "QGemm": "y = com.microsoft.QGemm <transB = 1> (m, s, z, n, s, z, c, t, u)",
    "QGemm to floats": "f = com.microsoft.QGemm <transB = 1> (m, s, z, n, s, z) y = QuantizeLinear(f, t, u)",
    "MatMulIntegerToFloat": """p = Transpose(n) f = com.microsoft.MatMulIntegerToFloat(m, p, s, t, z, z, d)
        y = QuantizeLinear(f, t, u)""",
    "DynamicQuantizeMatMul": """p = Transpose(n) e = DequantizeLinear(m, s, z)
        f = com.microsoft.DynamicQuantizeMatMul(e, p, t, z, d) y = QuantizeLinear(f, t, u)""",
}


@pytest.mark.parametrize("case", QLINEAR)
def test_operators_on_codes(case: str) -> None:
    pytest.importorskip("onnxruntime")
    model = model_of(f"""g (uint8[1,2,4,6] a, uint8[1,2,4,6] b, uint8[3,5] m, uint8[4,5] n) => (uint8[i,j] y)
        <float s = {{0.05}}, float t = {{0.07}}, uint8 z = {{120}}, uint8 u = {{100}},
        int32[4] c = {{100, -200, 3000, 7}}, float[4] d = {{1, 2, 3, 4}}> {{ {QLINEAR[case]} }}""")
    model.graph.outputs[0].shape = None
    rng = np.random.default_rng(0)
    shapes = {"a": (1, 2, 4, 6), "b": (1, 2, 4, 6), "m": (3, 5), "n": (4, 5)}
    feeds = {name: rng.integers(0, 256, shape).astype(np.uint8) for name, shape in shapes.items()}
    found, wanted = (run_in(one, model, feeds)["y"].astype(int) for one in ("torch", "onnxruntime"))
    assert found.shape == wanted.shape
    assert np.abs(found - wanted).max() <= 1  # where a number lies between two codes
    assert len(np.unique(wanted)) > 1


def test_codes_of_types_the_model_does_not_tell() -> None:
    model = model_of("""g (float[3] x) => (int8[3] y, int4[3] v) {
        s = Constant<value = float {0.1}>() a = Constant<value = int8 {-3}>() z = Identity(a)
        y = QuantizeLinear(x, s, z)
        b = Cast<to = 22>(a) u = Identity(b) v = QuantizeLinear(x, s, u) }""")
    found = run_in("torch", model, {"x": np.array([-100, 0, 100], np.float32)})
    assert found["y"].tolist() == [-128, -3, 127]
    assert found["v"].astype(int).tolist() == [-8, -3, 7]
