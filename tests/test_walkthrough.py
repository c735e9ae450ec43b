"""Walkthroughs: values as one run gives them, each piece run once, the model changed in between."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

from graphopt import walkthrough as walkthrough_module
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.data import Batch, open_data
from graphopt.errors import DataError
from graphopt.passes.lossy.sequential_moments import SequentialMoments
from graphopt.walkthrough import Walkthrough

pytest.importorskip("onnxruntime")

CHAIN = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[n, 4] x) => (float[n, 4] y) <float[4] w = {1.0, -2.0, 3.0, 0.5}> {
  a = Mul(x, w)
  b = Relu(a)
  c = Add(b, x)
  d = Exp(b)
  y = Sub(c, d)
}"""
CAPTURE = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[n, 4] x) => (float[n, 4] y) <bool t = {1}> {
  a = Relu(x)
  b = Neg(a)
  y = If(t) <then_branch = then () => (float[n, 4] p) { p = Add(a, b) },
             else_branch = other () => (float[n, 4] q) { q = Neg(a) }>
}"""
X = np.random.default_rng(0).standard_normal((40, 4)).astype(np.float32)


def model(text: str = CHAIN) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(text))


def value(subject: ir.Model, name: str) -> ir.Value:
    made = {one.name: one for node in subject.graph for one in node.outputs}
    return made.get(name) or next(one for one in subject.graph.inputs if one.name == name)


def whole(walk: Walkthrough, *values: ir.Value) -> list[np.ndarray[Any, Any]]:
    return [np.concatenate(parts) for parts in zip(*walk.batches(*values), strict=True)]


class Counting(OnnxRuntime):
    """Keeps the operators of the pieces it is given."""

    def __init__(self) -> None:
        super().__init__()
        object.__setattr__(self, "pieces", [])

    def open(self, model: Any, **options: Any) -> Any:
        self.pieces.append([node.op_type for node in model.graph if node.op_type != "Identity"])  # type: ignore[attr-defined]
        return super().open(model, **options)


def test_values_are_those_of_one_run() -> None:
    subject = model()
    with Walkthrough(subject, open_data({"x": X}, subject), OnnxRuntime()) as walk:
        a, b = whole(walk, value(subject, "a"), value(subject, "b"))
        (y,) = whole(walk, value(subject, "y"))
    np.testing.assert_allclose(a, X * [1.0, -2.0, 3.0, 0.5], rtol=1e-6)
    np.testing.assert_allclose(b, np.maximum(a, 0), rtol=1e-6)
    np.testing.assert_allclose(y, b + X - np.exp(b), rtol=1e-5, atol=1e-5)


def test_each_node_runs_once_and_only_what_is_asked_for() -> None:
    subject, backend = model(), Counting()
    with Walkthrough(subject, open_data({"x": X}, subject), backend) as walk:
        for name in ("a", "b", "b", "c"):
            whole(walk, value(subject, name))
    assert backend.pieces == [["Mul"], ["Relu"], ["Add"]]  # type: ignore[attr-defined]


def test_a_value_let_go_of_is_computed_anew() -> None:
    subject = model()
    with Walkthrough(subject, open_data({"x": X}, subject), OnnxRuntime()) as walk:
        whole(walk, value(subject, "y"))
        (a,) = whole(walk, value(subject, "a"))
    np.testing.assert_allclose(a, X * [1.0, -2.0, 3.0, 0.5], rtol=1e-6)


def test_a_node_changed_before_its_turn_runs_as_it_is_then() -> None:
    subject = model()
    with Walkthrough(subject, open_data({"x": X}, subject), OnnxRuntime()) as walk:
        (b,) = whole(walk, value(subject, "b"))
        subject.graph.initializers["w"].const_value = ir.tensor(np.zeros(4, np.float32))  # has run: no longer read
        adder = value(subject, "c").producer()
        assert adder is not None
        adder.replace_input_with(1, value(subject, "b"))
        (c,) = whole(walk, value(subject, "c"))
    np.testing.assert_allclose(c, 2 * b, rtol=1e-6)


def test_what_nested_graphs_capture_is_kept_for_them() -> None:
    subject = model(CAPTURE)
    with Walkthrough(subject, open_data({"x": X}, subject), OnnxRuntime()) as walk:
        whole(walk, value(subject, "b"))
        (y,) = whole(walk, value(subject, "y"))
    np.testing.assert_allclose(y, np.zeros_like(X))


def test_large_values_go_to_files_and_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(walkthrough_module, "MEMORY_LIMIT", 1000)
    subject = model()
    with Walkthrough(subject, open_data({"x": X}, subject), OnnxRuntime()) as walk:
        (y,) = whole(walk, value(subject, "y"))
        store = walk._store
        assert any(
            isinstance(array, walkthrough_module._Spilled) for arrays in store._arrays.values() for array in arrays
        )
    b = np.maximum(X * np.array([1.0, -2.0, 3.0, 0.5], np.float32), 0)
    np.testing.assert_allclose(y, b + X - np.exp(b), rtol=1e-5, atol=1e-5)


def test_rows_that_pad_a_fixed_batch_are_left_out() -> None:
    subject = model(CHAIN.replace("float[n, 4]", "float[16, 4]"))
    with Walkthrough(subject, open_data({"x": X}, subject), OnnxRuntime()) as walk:
        (a,) = whole(walk, value(subject, "a"))
    np.testing.assert_allclose(a, X * [1.0, -2.0, 3.0, 0.5], rtol=1e-6)


def test_a_constant_can_be_asked_for() -> None:
    subject = model()
    with Walkthrough(subject, open_data({"x": X}, subject), OnnxRuntime()) as walk:
        arrays = list(walk.batches(subject.graph.initializers["w"]))
    assert arrays
    np.testing.assert_array_equal(arrays[0][0], [1.0, -2.0, 3.0, 0.5])


def test_files_that_samples_lie_in_are_left_where_they_are(tmp_path: Path) -> None:
    np.save(tmp_path / "samples.npy", X)
    store, one = walkthrough_module._Store(), ir.Value(name="one")
    store.put(one, np.load(tmp_path / "samples.npy", mmap_mode="r").reshape(4, -1))
    np.testing.assert_array_equal(store.get(one, 0), X.reshape(4, -1))
    store.drop(one)
    assert store._held == 0
    store.close()
    np.testing.assert_array_equal(np.load(tmp_path / "samples.npy"), X)


def test_samples_that_cannot_be_read_leave_no_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(walkthrough_module, "MEMORY_LIMIT", 0)
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    subject = model()
    data = open_data({"x": X}, subject)
    batches = data.batches

    def failing(size: int) -> Iterator[Batch]:
        yield from batches(size)
        raise DataError("cannot be read", hint="try again")

    monkeypatch.setattr(data, "batches", failing)
    with pytest.raises(DataError) as caught:
        Walkthrough(subject, data, OnnxRuntime())
    assert caught.tb is not None  # the traceback still holds the walkthrough
    assert not list(tmp_path.iterdir())


def test_a_node_that_was_changed_runs_anew() -> None:
    subject = model()
    weight = subject.graph.initializers["w"]
    with Walkthrough(subject, open_data({"x": X}, subject), OnnxRuntime()) as walk:
        x, a, y = (value(subject, name) for name in ("x", "a", "y"))
        first = whole(walk, x, a)[1]
        weight.const_value = ir.tensor(weight.const_value.numpy() * np.float32(2), name="w")  # type: ignore[union-attr]
        producer = a.producer()
        assert producer is not None
        walk.repeat(producer)
        (last,) = whole(walk, y)
    b = np.maximum(2 * first, 0)
    np.testing.assert_allclose(last, b + X - np.exp(b), rtol=1e-5)


def test_of_two_walkthroughs_the_first_is_closed_where_the_second_fails() -> None:
    closed = []

    class Context:
        def __init__(self, model: ir.Model) -> None:
            self.model = model

        @contextlib.contextmanager
        def walkthrough(self, copy: ir.Model | None = None) -> Iterator[None]:
            if copy is not None:
                raise DataError("cannot be read", hint="try again")
            try:
                yield
            finally:
                closed.append(True)

    ctx: Any = Context(model())
    with pytest.raises(DataError) as caught:
        SequentialMoments(ctx, compare=True)
    assert closed, f"{caught.value} leaves it open"
