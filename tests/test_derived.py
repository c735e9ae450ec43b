"""Tensors derived from stored ones: the same bytes as numpy makes, a block at a time, and no pages kept."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt import derived
from graphopt.derived import DerivedTensor

from .pass_runs import run_passes

RNG = np.random.default_rng(0)


def written(tensor: DerivedTensor) -> bytes:
    file = io.BytesIO()
    tensor.tofile(file)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(7, 5), (600, 1100), (3, 4, 5, 6), (1, 9), (9, 1), (4,), ()])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, np.int64, np.uint8, np.bool_])
def test_transposed_bytes_are_those_of_numpy(shape: tuple[int, ...], dtype: type) -> None:
    array = (RNG.standard_normal(shape) * 100).astype(dtype)
    perm = tuple(reversed(range(len(shape))))
    tensor = derived.transposed(ir.tensor(array), perm)
    assert tensor.shape.numpy() == array.transpose(perm).shape
    assert written(tensor) == tensor.tobytes() == array.transpose(perm).tobytes()
    assert tensor.nbytes == len(tensor.tobytes())


def test_views_of_views_are_written_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(derived, "BLOCK_BYTES", 1000)
    array = RNG.standard_normal((40, 3, 50)).astype(np.float32)
    tensor = derived.reshaped(derived.transposed(ir.tensor(array), (2, 0, 1)), (50, 120))
    tensor = derived.sliced(tensor, (slice(1, 50, 2), slice(0, 100)))
    tensor = derived.cast(tensor, ir.DataType.BFLOAT16)
    view = array.transpose(2, 0, 1).reshape(50, 120)[1:50:2, 0:100]
    expected = view.astype(ir.DataType.BFLOAT16.numpy())
    assert tensor.shape.numpy() == expected.shape
    assert written(tensor) == expected.tobytes()
    assert len(list(tensor._blocks())) > 1
    np.testing.assert_array_equal(np.asarray(tensor), expected)


def test_empty_tensor_is_written() -> None:
    tensor = derived.transposed(ir.tensor(np.zeros((0, 3), np.float32)), (1, 0))
    assert written(tensor) == b""


def test_reshape_to_another_number_of_elements_is_refused() -> None:
    with pytest.raises(ValueError, match="6 elements have no shape"):
        derived.reshaped(ir.tensor(np.zeros((2, 3), np.float32)), (4,))


@pytest.mark.parametrize("external", [False, True])
def test_folded_weight_is_moved_while_it_is_written(tmp_path: Path, external: bool) -> None:
    weight = RNG.standard_normal((300, 200)).astype(np.float32)
    text = """<ir_version: 8, opset_import: ["" : 18]>
    g (float[N,200] x) => (float[N,300] y) { t = Transpose <perm = [1, 0]> (w)  y = MatMul(x, t) }"""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    onnx.save(proto, tmp_path / "a.onnx", save_as_external_data=external, location="a.data")
    run = run_passes(graphopt.load(tmp_path / "a.onnx"), "fold-constants,dead-code")
    (value,) = run.model.graph.initializers.values()
    assert isinstance(value.const_value, DerivedTensor)
    graphopt.save(run.model, tmp_path / "b.onnx")
    (stored,) = onnx.load(tmp_path / "b.onnx").graph.initializer
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(stored), weight.T)


@pytest.mark.parametrize("axes", [(0,), (2,), (0, 1), (0, 1, 2)])
@pytest.mark.parametrize("source", ["stored", "transposed"])
def test_thinned_bytes_are_those_of_numpy(monkeypatch: pytest.MonkeyPatch, axes: tuple[int, ...], source: str) -> None:
    monkeypatch.setattr(derived, "BLOCK_BYTES", 500)
    array = RNG.standard_normal((30, 6, 7)).astype(np.float16)
    stored = ir.tensor(array) if source == "stored" else derived.transposed(ir.tensor(array.T.copy()), (2, 1, 0))
    kept = {axis: np.flatnonzero(RNG.random(array.shape[axis]) < 0.6) for axis in axes}
    expected = array
    for axis, chosen in kept.items():
        expected = expected.take(chosen, axis)
    tensor = derived.thinned(stored, kept)
    assert tensor.shape.numpy() == expected.shape
    assert written(tensor) == tensor.tobytes() == expected.tobytes()
    assert len(list(tensor._blocks())) > 1
    np.testing.assert_array_equal(tensor.numpy(), expected)
    again = derived.thinned(tensor, {0: np.array([1, 3])})
    assert written(again) == expected[[1, 3]].tobytes()
