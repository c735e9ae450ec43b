"""Second moments against their definition, E[x xᵀ] over all rows that a layer multiplies."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.authoring import Context
from graphopt.backend import Array
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.targets import TARGETS
from graphopt.calibration_cache import CalibrationCache
from graphopt.data import open_data
from graphopt.errors import DataError
from graphopt.passes.analyses.layer_rows import layer_rows
from graphopt.passes.analyses.linear_layers import LinearLayer, linear_layers
from graphopt.passes.analyses.second_moments import Gram, gram, in_portions
from graphopt.rewriter import Rewriter
from graphopt.shapes import infer_shapes

pytest.importorskip("onnxruntime")

SAMPLES = 9


def numbers(name: str, *dims: int, seed: int = 0) -> str:
    content = ", ".join(f"{x:.4f}" for x in np.random.default_rng(seed).standard_normal(dims).reshape(-1))
    return f"float[{', '.join(map(str, dims))}] {name} = {{{content}}}"


def layered() -> ir.Model:
    constants = [
        numbers("k", 8, 4, 3, 3), numbers("deep", 8, 1, 3, 3), numbers("one", 6, 8, 1, 1), numbers("pair", 6, 4, 3, 1),
        numbers("q", 6, 5), numbers("v", 6, 5), numbers("g", 7, 6), numbers("left", 3, 36),
    ]  # fmt: skip
    model = ir.from_onnx_text(f"""<ir_version: 10, opset_import: ["": 17]>
    net (float[n, 4, 6, 6] x) => (float[n, 7] y, float[n, 36, 5] z, float[n, 36, 5] z2, float[n, 3, 6] w)
    <{", ".join(constants)}> {{
      a = Conv <pads = [1, 1, 1, 1]> (x, k)
      b = Conv <pads = [1, 1, 1, 1], group = 8> (a, deep)
      c = Conv (b, one)
      d = Conv <pads = [1, 0, 1, 0], group = 2, dilations = [1, 1]> (b, pair)
      e = Add (c, d)
      flat = Flatten <axis = 2> (e)
      shape = Constant <value_ints = [0, 6, 36]> ()
      rows = Reshape (e, shape)
      columns = Transpose <perm = [0, 2, 1]> (rows)
      z = MatMul (columns, q)
      z2 = MatMul (columns, v)
      w = MatMul (left, columns)
      mean = GlobalAveragePool (e)
      flat2 = Flatten (mean)
      y = Gemm <transB = 1> (flat2, g)
    }}""")
    infer_shapes(model)
    return model


def context(model: ir.Model, data: Any, cache: CalibrationCache | None = None) -> Context:
    return Context(
        model,
        Rewriter(model),
        TARGETS["ort-cpu-x86"],
        OnnxRuntime(),
        threads=1,
        data=open_data(data, model),
        calibration=cache or CalibrationCache(),
    )


def samples() -> dict[str, Array]:
    return {"x": np.random.default_rng(5).standard_normal((SAMPLES, 4, 6, 6)).astype(np.float32)}


def inputs_of_layers(model: ir.Model, layers: list[LinearLayer], feeds: dict[str, Array]) -> dict[str, Array]:
    copy = model.clone()
    names = {layer.input.name for layer in layers} - {"x"}
    copy.graph.outputs.extend(v for node in copy.graph for v in node.outputs if v.name in names)
    with OnnxRuntime().open(copy) as session:
        return session.run(feeds) | feeds


def test_second_moments_are_those_of_all_rows() -> None:
    model, data = layered(), samples()
    layers = linear_layers(model)
    assert len(layers) == 8
    found = gram(context(model, data), layers)
    arrays = inputs_of_layers(model, layers, data)
    for layer in layers:
        rows = layer_rows(layer, arrays[layer.input.name or ""]).astype(np.float64)
        expected = np.matmul(rows.transpose(0, 2, 1), rows) / rows.shape[1]
        assert found[layer].dtype == np.float32
        np.testing.assert_allclose(found[layer], expected, rtol=1e-3, atol=1e-4)


def test_the_error_of_a_changed_weight_is_what_the_moments_say() -> None:
    """The objective itself: E‖(W − Ŵ) x‖² = tr((W − Ŵ) H (W − Ŵ)ᵀ), measured on the outputs of a convolution."""
    model, data = layered(), samples()
    layer = linear_layers(model)[0]
    moment = gram(context(model, data), [layer])[layer][0]
    changed = layer.matrix() + np.random.default_rng(1).standard_normal(layer.matrix().shape).astype(np.float32) / 9
    difference = changed - layer.matrix()
    predicted = np.trace(difference @ moment @ difference.T)
    other = model.clone()
    twin = linear_layers(other)[0]
    twin.weight.const_value = ir.tensor(layer.from_matrix(changed))
    before, after = (inputs_of_layers(m, [linear_layers(m)[1]], data)["a"] for m in (model, other))
    assert predicted == pytest.approx(np.square(after - before).sum(1).mean(), rel=1e-4)


def test_layers_that_read_the_same_rows_share_one_array() -> None:
    model = layered()
    layers = {layer.node.outputs[0].name: layer for layer in linear_layers(model)}
    found = gram(context(model, samples()), layers.values())
    assert found[layers["z"]] is found[layers["z2"]]
    assert found[layers["c"]] is not found[layers["d"]]
    assert not found[layers["z"]].flags.writeable
    assert len({Gram.of(layer) for layer in layers.values()}) == 7


def test_rows_are_limited_by_sample() -> None:
    model, data = layered(), samples()
    layer = linear_layers(model)[0]
    found = gram(context(model, data), [layer], rows=5)
    rows = layer_rows(layer, data["x"], limit=5)
    assert rows.shape[1] == 5 * SAMPLES
    np.testing.assert_allclose(found[layer][0], rows[0].T @ rows[0] / rows.shape[1], rtol=1e-4, atol=1e-5)


def test_portions_keep_to_the_limit_and_to_the_order() -> None:
    layers = linear_layers(layered())
    assert in_portions(layers) == [layers]
    portions = in_portions(layers, limit=12_000)
    assert [layer for portion in portions for layer in portion] == layers
    assert len(portions) > 1
    assert len(in_portions(layers, limit=1)) == len(layers) - 1  # two share one


def test_the_cache_holds_moments_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = layered()
    first = gram(context(model, samples(), CalibrationCache(tmp_path)), linear_layers(model))
    again = layered()
    ctx = context(again, samples(), CalibrationCache(tmp_path))
    monkeypatch.setattr(OnnxRuntime, "open", None)
    second = gram(ctx, linear_layers(again))
    for one, two in zip(first.values(), second.values(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_overflow_is_an_error_that_names_the_value() -> None:
    model = layered()
    data = {"x": np.full((2, 4, 6, 6), 1e25, np.float32)}
    with pytest.raises(DataError, match="`x` becomes NaN or infinite, or its square does"):
        gram(context(model, data), [linear_layers(model)[0]])


def test_a_second_target_asks_nothing_of_the_runtime(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model quantized for one target is quantized for another without being run again."""
    model = layered()
    options: dict[str, Any] = {"data": samples(), "verify": "off", "calibration_cache": tmp_path}
    first = graphopt.optimize(layered(), "quant:mode=static", target="ort-cpu-x86", **options)
    assert any(tmp_path.iterdir())

    def observed(*_: Any, **__: Any) -> Any:
        raise AssertionError("the model is observed again")

    monkeypatch.setattr("graphopt.observation._Run.run", observed)
    second = graphopt.optimize(model, "quant:mode=static", target="tensorrt", backend="onnxruntime", **options)
    for result in (first, second):
        assert any(node.op_type == "QuantizeLinear" for node in result.model.graph)
    assert str(first.model.graph) != str(second.model.graph)
