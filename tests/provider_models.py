"""Small models for sessions of execution providers, and TensorRT with its caches out of the user's way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir

from graphopt.backends.onnxruntime import OnnxRuntime

# All but Reshape and Relu is arithmetic on shapes.
TEXT = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[batch, 3, side, side] x, float[batch, seq] mask) => (float[batch, n] y, float[batch, seq] z) {
  size = Shape <start = 0, end = 1> (x)
  rest = Constant <value = int64[1] {-1}> ()
  shape = Concat <axis = 0> (size, rest)
  y = Reshape (x, shape)
  z = Relu (mask)
}"""
QDQ = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[1, 4, 8, 8] x) => (float[1, 8, 6, 6] y)
<float s = {0.1}, int8 zero = {0}, int8[8, 4, 3, 3] w, float[8] b> {
  q = QuantizeLinear (x, s, zero)
  d = DequantizeLinear (q, s, zero)
  v = DequantizeLinear (w, s, zero)
  c = Conv (d, v, b)
  p = QuantizeLinear (c, s, zero)
  y = DequantizeLinear (p, s, zero)
}"""


def model(text: str = TEXT) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def quantized() -> ir.Model:
    """A convolution between Q and DQ, with a float bias, as for TensorRT."""
    proto = onnx.parser.parse_model(QDQ)
    rng = np.random.default_rng(0)
    stored = {"w": rng.integers(-127, 127, (8, 4, 3, 3)).astype(np.int8), "b": np.ones(8, np.float32)}
    kept = [one for one in proto.graph.initializer if one.name not in stored]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in stored.items())
    del proto.graph.input[1:]
    return ir.from_proto(proto)


def tensorrt(tmp_path: Path, **options: object) -> OnnxRuntime:
    """Return the backend with its engines in a folder of the test."""
    return OnnxRuntime(provider="tensorrt", **{"trt_engine_cache_path": str(tmp_path / "engines"), **options})  # type: ignore[arg-type]
