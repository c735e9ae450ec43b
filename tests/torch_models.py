"""Models in ONNX's text form, and runs of them in torch and in ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt import registry
from graphopt.backend import Array

# What float32 sums in another order differ by, of the largest output.
CLOSE = 1e-4


def model_of(text: str, *, opset: int = 21) -> ir.Model:
    """Return a model of ONNX's text form."""
    head = f'<ir_version: 10, opset_import: ["" : {opset}, "com.microsoft" : 1, "own" : 1]>\n'
    return ir.from_proto(onnx.parser.parse_model(head + text))


def run_in(backend: str, model: ir.Model, feeds: Mapping[str, Any]) -> dict[str, Array]:
    with registry.backend(backend).open(model, threads=1, optimize=False) as session:
        found: dict[str, Array] = session.run(feeds)
        return found


def assert_close(found: Mapping[str, Array], wanted: Mapping[str, Array], close: float = CLOSE) -> None:
    assert list(found) == list(wanted)
    for name, array in wanted.items():
        assert found[name].dtype == array.dtype, name
        assert found[name].shape == array.shape, name
        largest = np.abs(array).max() if array.size else 0
        np.testing.assert_allclose(found[name], array, rtol=0, atol=close * max(float(largest), 1e-6), err_msg=name)


def assert_same_as_onnxruntime(model: ir.Model, feeds: Mapping[str, Any], close: float = CLOSE) -> None:
    assert_close(run_in("torch", model, feeds), run_in("onnxruntime", model, feeds), close)
