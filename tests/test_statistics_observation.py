"""Observing values of models: what is run, what is held at once, and what is kept for later."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from graphopt.backend import Array
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.calibration_cache import CalibrationCache
from graphopt.content_keys import ContentKeys
from graphopt.data import Dataset, open_data
from graphopt.errors import DataError, PassError
from graphopt.observation import LARGEST_BATCH, observe
from graphopt.progress import Display
from graphopt.shapes import infer_shapes
from graphopt.statistics import Histogram, MinMax, Moments, MovingAverage

pytest.importorskip("onnxruntime")

SAMPLES = 20
NET = """<ir_version: 10, opset_import: ["": 17]>
net (float[n, 3, s, t] x) => (float[n, 4] y, float[n, 8, h, w] spare)
<CONSTANTS> {
  a = Conv <pads = [1, 1, 1, 1]> (x, k)
  b = Relu (a)
  c = Conv <pads = [1, 1, 1, 1]> (b, k2)
  d = Add (c, b)
  spare = Conv <pads = [1, 1, 1, 1]> (d, k2)
  e = GlobalAveragePool (d)
  f = Flatten (e)
  y = MatMul (f, m)
}
"""
NAMES = ["x", "a", "b", "c", "d", "e", "f", "y"]


@dataclass
class Watched:
    """ONNX Runtime, each opened model and each run of it remembered."""

    inner: OnnxRuntime = field(default_factory=OnnxRuntime)
    opened: list[list[str]] = field(default_factory=list)
    batches: list[int] = field(default_factory=list)
    largest_result: int = 0
    at_once: int = 0
    open_now: int = 0

    name = "watched"
    help = "for tests"

    def missing(self) -> None:
        return None

    def describe(self) -> str:
        return "watched"

    @contextlib.contextmanager
    def open(self, model: ir.Model, **options: Any) -> Iterator[Watched]:
        self.opened.append([node.op_type for node in model.graph])
        self.open_now += 1
        self.at_once = max(self.at_once, self.open_now)
        with self.inner.open(model, **options) as self.session:
            yield self
        self.open_now -= 1

    def run(self, feeds: dict[str, Array]) -> dict[str, Array]:
        self.batches.append(len(next(iter(feeds.values()))))
        results = self.session.run(feeds)
        self.largest_result = max(self.largest_result, sum(array.nbytes for array in results.values()))
        return results


class Unable:
    """A backend that must not be used."""

    name = "unable"
    help = "for tests"

    def missing(self) -> None:
        return None

    def describe(self) -> str:
        return "unable"

    def open(self, model: Any, **options: Any) -> Any:
        raise AssertionError("the model is run")


def net(seed: int = 0, text: str = NET, *, inferred: bool = True) -> ir.Model:
    draw = np.random.default_rng(seed)
    constants = []
    for name, dims in (("k", (8, 3, 3, 3)), ("k2", (8, 8, 3, 3)), ("m", (8, 4))):
        numbers = ", ".join(f"{number:.6f}" for number in draw.standard_normal(dims).reshape(-1) / 4)
        constants.append(f"float[{', '.join(map(str, dims))}] {name} = {{{numbers}}}")
    model = ir.from_onnx_text(text.replace("CONSTANTS", ", ".join(constants)))
    if inferred:
        infer_shapes(model)
    return model


def samples(model: ir.Model, size: int = 8, seed: int = 1) -> Dataset:
    x = np.random.default_rng(seed).standard_normal((SAMPLES, 3, size, size)).astype(np.float32)
    return open_data({"x": x}, model)


def value_of(model: ir.Model, name: str) -> ir.Value:
    values = [*model.graph.inputs, *model.graph.initializers.values()]
    return next(v for v in [*values, *(v for node in model.graph for v in node.outputs)] if v.name == name)


def raw(model: ir.Model, data: Dataset, names: list[str]) -> dict[str, Array]:
    """Return all values at once, by a model of which all of them are outputs."""
    copy = model.clone()
    copy.graph.outputs.clear()
    copy.graph.outputs.extend(value_of(copy, name) for name in names if name != "x")
    batch = next(iter(data.batches(SAMPLES)))
    with OnnxRuntime().open(copy) as session:
        return session.run(batch.feeds) | batch.feeds


# Whether everything fits, a few values do at a time, or not even one.
@pytest.mark.parametrize("limit", [1 << 30, 5000, 1])
@pytest.mark.parametrize("inferred", [True, False])
def test_statistics_are_those_of_all_values(limit: int, inferred: bool) -> None:
    model = net(inferred=inferred)
    data = samples(model)
    backend, expected = Watched(), raw(model, data, NAMES)
    several = (MinMax(), MovingAverage(), Moments(1), Histogram())
    requests = {value_of(model, name): several for name in reversed(NAMES)}
    found = observe(model, requests, data, backend, CalibrationCache(), limit=limit)  # type: ignore[arg-type]
    assert (found.observed, found.reused) == (len(NAMES) * 4, 0)
    for name in NAMES:
        value, array = value_of(model, name), expected[name]
        assert found[value, MinMax()].low == pytest.approx(array.min(), abs=1e-5)
        assert found[value, MinMax()].high == pytest.approx(array.max(), abs=1e-5)
        rows = array.reshape(SAMPLES, -1)
        assert found[value, MovingAverage()].high == pytest.approx(rows.max(1).mean(), abs=1e-4)
        others = tuple(axis for axis in range(array.ndim) if axis != 1)
        np.testing.assert_allclose(found[value, Moments(1)].mean, array.mean(others), atol=1e-4)
        assert found[value, Histogram()].counts.sum() == array.size
    assert all(operators.count("Conv") <= 2 for operators in backend.opened), "what nothing hangs on is not run"


@pytest.mark.parametrize("limit", [1 << 30, 1])
def test_samples_are_counted_once(monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    display, model = Display(True), net()
    data = open_data({"x": np.zeros((SAMPLES, 3, 8, 8), np.float32)}, model, advance=display.advance)
    counted: list[float] = []
    # The stage is gone once all is observed.
    monkeypatch.setattr(
        display._progress, "remove_task", lambda own: counted.append(display._progress.tasks[own].completed)
    )
    requests = {value_of(model, name): MinMax() for name in ("b", "e")}
    observe(model, requests, data, OnnxRuntime(), CalibrationCache(), limit=limit, display=display)
    assert counted == [SAMPLES]


def test_a_batch_is_as_large_as_the_limit_allows() -> None:
    model = net()
    data, value = samples(model), value_of(model, "b")
    one = 8 * 8 * 8 * 4
    for limit, size in ((3 * one, 3), (one, 1), (1 << 30, min(LARGEST_BATCH, SAMPLES))):
        backend = Watched()
        observe(model, {value: MinMax()}, data, backend, CalibrationCache(), limit=limit)  # type: ignore[arg-type]
        assert max(backend.batches) == size
        assert backend.largest_result <= limit
        assert len(backend.opened) == 1


def test_values_too_large_together_are_run_in_pieces_each_node_once_a_sample() -> None:
    model = net()
    data = samples(model)
    requests = {value_of(model, name): MinMax() for name in NAMES}
    one, backend = 8 * 8 * 8 * 4, Watched()
    observe(model, requests, data, backend, CalibrationCache(), limit=2 * one)  # type: ignore[arg-type]
    assert set(backend.batches) == {1}
    assert backend.at_once == 1
    # What is looked at, and beside it what the next piece reads.
    assert backend.largest_result <= 3 * one
    operators = [operator for opened in backend.opened for operator in opened if operator != "Identity"]
    assert len(operators) == SAMPLES * 7


def test_sizes_that_shapes_do_not_tell_are_asked_of_the_runtime() -> None:
    model = net(inferred=False)
    data, backend = samples(model), Watched()
    value = value_of(model, "b")
    observe(model, {value: MinMax()}, data, backend, CalibrationCache(), limit=3 * 8 * 8 * 8 * 4)  # type: ignore[arg-type]
    assert "Size" in backend.opened[0]
    assert max(backend.batches) == 3


def test_inputs_and_constants_need_no_run() -> None:
    model = net()
    data = samples(model)
    requests = {value_of(model, "x"): MinMax(), value_of(model, "k"): MinMax()}
    found = observe(model, requests, data, Unable(), CalibrationCache())  # type: ignore[arg-type]
    kernel = value_of(model, "k").const_value
    assert kernel is not None
    assert found[value_of(model, "k"), MinMax()].high == kernel.numpy().max()


TURNED = """<ir_version: 10, opset_import: ["": 17]>
net (float[BATCH, 16, 3] x) => (float[BATCH, 16, 3] y) {
  t = Transpose <perm = [1, 0, 2]> (x)
  y = Transpose <perm = [1, 0, 2]> (t)
}
"""


@pytest.mark.parametrize("batch", ["n", "?"])
def test_an_average_over_samples_along_another_axis_is_one(batch: str) -> None:
    model = ir.from_onnx_text(TURNED.replace("BATCH", batch))
    infer_shapes(model)
    draw = np.random.default_rng(5)
    x = (draw.standard_normal((8, 16, 3)) * np.arange(1, 9)[:, None, None]).astype(np.float32)
    data, backend = open_data({"x": x}, model), Watched()
    t, y = value_of(model, "t"), value_of(model, "y")
    found = observe(model, {t: MovingAverage(), y: MovingAverage()}, data, backend, CalibrationCache())  # type: ignore[arg-type]
    expected = x.max((1, 2)).mean(dtype=np.float64)
    assert float(found[t, MovingAverage()].high) == pytest.approx(expected, rel=1e-6)
    assert float(found[y, MovingAverage()].high) == pytest.approx(expected, rel=1e-6)
    # What does not tell samples apart, and what has them first, takes batches.
    for requests in ({t: MinMax()}, {y: MovingAverage()}):
        backend = Watched()
        observe(model, requests, data, backend, CalibrationCache())  # type: ignore[arg-type]
        assert max(backend.batches) == 8


def test_rows_that_only_pad_are_not_counted() -> None:
    model = net(text=NET.replace("float[n, 3, s, t]", "float[8, 3, 8, 8]"))
    data = samples(model)
    value = value_of(model, "b")
    found = observe(model, {value: Histogram()}, data, OnnxRuntime(), CalibrationCache())
    assert found[value, Histogram()].counts.sum() == SAMPLES * 8 * 8 * 8


def test_infinity_on_the_way_is_an_error_that_names_the_value() -> None:
    model = net(text=NET.replace("b = Relu (a)", "b = Log (a)"))
    with pytest.raises(DataError, match="`b` becomes NaN or infinite on `data`"):
        observe(model, {value_of(model, "b"): MinMax()}, samples(model), OnnxRuntime(), CalibrationCache())


def test_an_axis_that_does_not_exist_is_an_error_that_names_the_value() -> None:
    model = net()
    with pytest.raises(DataError, match="`f` has 2 axes, and none is number 3"):
        observe(model, {value_of(model, "f"): MinMax(3)}, samples(model), OnnxRuntime(), CalibrationCache())


def test_values_inside_subgraphs_are_refused() -> None:
    model = ir.from_onnx_text("""<ir_version: 10, opset_import: ["": 17]>
    net (bool c, float[n] x) => (float[n] y) {
      y = If (c) <
        then_branch = yes () => (float[n] p) { p = Abs (x) },
        else_branch = no () => (float[n] q) { q = Neg (x) }
      >
    }""")
    inner = next(iter(model.graph.node(0).attributes["then_branch"].as_graph())).outputs[0]
    data = open_data([{"c": np.array(True), "x": np.ones(3, np.float32)}], model)
    with pytest.raises(PassError, match="`p` cannot be observed: it is inside a subgraph"):
        observe(model, {inner: MinMax()}, data, OnnxRuntime(), CalibrationCache())
    outer = model.graph.outputs[0]
    found = observe(model, {outer: MinMax()}, data, OnnxRuntime(), CalibrationCache(), limit=1)
    assert found[outer, MinMax()].high == 1.0


def test_text_is_refused() -> None:
    model = ir.from_onnx_text(
        '<ir_version: 10, opset_import: ["": 17]> net (string[n] x) => (string[n] y) { y = Identity(x) }'
    )
    data = open_data({"x": np.array(["a", "b"])}, model)
    with pytest.raises(PassError, match="`y` cannot be observed: it holds no numbers"):
        observe(model, {value_of(model, "y"): MinMax()}, data, OnnxRuntime(), CalibrationCache())


# ------------------------------------------------------------------------------------------------------------------
# Content keys


def keys(model: ir.Model) -> dict[str, str | None]:
    values = [value_of(model, name) for name in NAMES]
    return {value.name or "": key for value, key in ContentKeys(model).of(values).items()}


def test_equal_models_have_equal_keys_whatever_their_names() -> None:
    first, second = net(), net(text=re.sub(r"\b([bcde])\b", r"renamed_\1", NET))
    for node in second.graph:
        node.name = f"node of {node.op_type}"
    renamed = [value for node in second.graph for value in node.outputs if value.name != "spare"]
    plain = [value for node in first.graph for value in node.outputs if value.name != "spare"]
    assert list(ContentKeys(first).of(plain).values()) == list(ContentKeys(second).of(renamed).values())
    assert len(set(keys(first).values())) == len(NAMES)


@pytest.mark.parametrize(
    ("old", "new", "first_changed"),
    [
        ("float[n, 3, s, t] x", "float[n, 3, s, t] z", "x"),
        ("a = Conv <pads = [1, 1, 1, 1]> (x, k)", "a = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (x, k)", "a"),
        ("b = Relu (a)", "b = Abs (a)", "b"),
        ("d = Add (c, b)", "d = Add (c, c)", "d"),
        ('opset_import: ["": 17]', 'opset_import: ["": 18]', "a"),
        ("f = Flatten (e)", "f = Flatten <axis = 1> (e)", "f"),
    ],
)
def test_what_computes_differently_has_another_key(old: str, new: str, first_changed: str) -> None:
    first = keys(net())
    text = NET.replace(old, new).replace(
        "Conv <pads = [1, 1, 1, 1]> (x, k)",
        "Conv <pads = [1, 1, 1, 1]> (z, k)" if " z)" in new else "Conv <pads = [1, 1, 1, 1]> (x, k)",
    )
    model = net(text=text)
    values = [model.graph.inputs[0], *(value_of(model, name) for name in NAMES[1:])]
    second = list(ContentKeys(model).of(values).values())
    position = NAMES.index(first_changed)
    assert list(first.values())[:position] == second[:position]
    assert all(a != b for a, b in zip(list(first.values())[position:], second[position:], strict=True))


def test_one_bit_of_a_weight_changes_the_keys_behind_it() -> None:
    model, before = net(), keys(net())
    kernel = value_of(model, "k2")
    assert kernel.const_value is not None
    array = kernel.const_value.numpy().copy()
    array[0, 0, 0, 0] = np.nextafter(array[0, 0, 0, 0], np.float32(9))
    kernel.const_value = ir.tensor(array)
    after = keys(model)
    assert [name for name in NAMES if before[name] == after[name]] == ["x", "a", "b"]


def test_what_is_random_has_no_key_and_is_observed_each_time(tmp_path: Path) -> None:
    model = net(text=NET.replace("b = Relu (a)", "noise = RandomNormalLike (a)\n  b = Add (a, noise)"))
    found = keys(model)
    assert [name for name in NAMES if found[name] is None] == ["b", "c", "d", "e", "f", "y"]
    cache, data = CalibrationCache(tmp_path), samples(model)
    for _ in range(2):
        assert observe(model, {value_of(model, "b"): MinMax()}, data, OnnxRuntime(), cache).reused == 0
    assert not list(tmp_path.iterdir())


FUNCTION = """<ir_version: 10, opset_import: ["": 17, "own": 1]>
net (float[n] x) => (float[n] y, float[n] z) { y = own.Leak (x)  z = own.Leak <alpha = 0.5> (x) }
<domain: "own", opset_import: ["": 17]>
Leak <alpha: float = DEFAULT> (x) => (y) { y = LeakyRelu <alpha: float = @alpha> (x) }
"""
SCAN = """<ir_version: 10, opset_import: ["": 17]>
net (float[2] i, float[3, 2] x) => (float[3, 2] y, float[2] r) {
  r = Relu (i)
  f, y = Scan <num_scan_inputs = 1, body = step (float[2] s, float[2] e) => (float[2] s2, float[2] o) {
    s2 = Add (s, e)
    o = Identity (s2)
  }> (i, x)
}
"""


def test_what_a_function_says_of_attributes_left_out_is_part_of_the_key() -> None:
    found = [keys_of(ir.from_onnx_text(FUNCTION.replace("DEFAULT", default))) for default in ("0.1", "0.9", "0.1")]
    assert found[0] == found[2]
    assert found[0]["y"] != found[1]["y"]
    assert found[0]["y"] != found[0]["z"]


def test_keys_do_not_hang_on_what_was_asked_before() -> None:
    model = ir.from_onnx_text(SCAN)
    y, r = model.graph.outputs
    after = ContentKeys(model)
    after.of([r])
    assert after.of([y]) == ContentKeys(model).of([y])
    assert ContentKeys(model).of([r, y]) == ContentKeys(model).of([y, r])


def keys_of(model: ir.Model) -> dict[str, str | None]:
    return {value.name or "": key for value, key in ContentKeys(model).of(model.graph.outputs).items()}


# ------------------------------------------------------------------------------------------------------------------
# The cache


def requests_of(model: ir.Model) -> dict[ir.Value, Any]:
    return {value_of(model, name): [MinMax(), Histogram(1, bins=64)] for name in ("b", "y")}


def test_a_second_run_runs_nothing(tmp_path: Path) -> None:
    model = net()
    first = observe(
        model, requests_of(model), samples(model), OnnxRuntime(), CalibrationCache(tmp_path / "new" / "one")
    )
    other = net()
    cache = CalibrationCache(tmp_path / "new" / "one")
    second = observe(other, requests_of(other), samples(other), Unable(), cache)  # type: ignore[arg-type]
    assert (second.observed, second.reused) == (0, 4)
    for name in ("b", "y"):
        one, two = (found[value_of(m, name), Histogram(1, bins=64)] for found, m in ((first, model), (second, other)))
        for part in ("low", "high", "exponent", "counts"):
            np.testing.assert_array_equal(getattr(one, part), getattr(two, part))
    assert not cache.remarks


def test_within_a_run_no_folder_is_needed() -> None:
    model, cache = net(), CalibrationCache()
    observe(model, requests_of(model), samples(model), OnnxRuntime(), cache)
    found = observe(model, requests_of(model), samples(model), Unable(), cache)  # type: ignore[arg-type]
    assert found.reused == 4


@pytest.mark.parametrize("changed", ["samples", "statistic", "weight", "fewer"])
def test_anything_else_is_observed_anew(tmp_path: Path, changed: str) -> None:
    model, cache = net(), CalibrationCache(tmp_path)
    value = value_of(model, "b")
    observe(model, {value: MinMax()}, samples(model), OnnxRuntime(), cache)
    data, statistic = samples(model), MinMax()
    match changed:
        case "samples":
            data = samples(model, seed=2)
        case "fewer":
            data = data.take(SAMPLES - 1)
        case "statistic":
            statistic = MinMax(1)
        case _:
            model = net(seed=5)
    found = observe(model, {value_of(model, "b"): statistic}, data, OnnxRuntime(), cache)
    assert (found.observed, found.reused) == (1, 0)


@pytest.mark.parametrize("harm", ["empty", "cut", "bit", "text", "foreign", "other statistic"])
def test_a_harmed_file_is_noted_and_written_anew(tmp_path: Path, harm: str) -> None:
    model = net()
    requests = {value_of(model, "b"): Histogram()}
    first = observe(model, requests, samples(model), OnnxRuntime(), CalibrationCache(tmp_path))
    (file,) = tmp_path.glob("*.npz")
    whole = file.read_bytes()
    match harm:
        case "empty":
            file.write_bytes(b"")
        case "cut":
            file.write_bytes(whole[: len(whole) // 2])
        case "bit":
            middle = len(whole) // 2
            file.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
        case "text":
            file.write_text("notes of somebody")
        case "foreign":
            np.savez(file, about=np.array("something else"), low=np.zeros(()), high=np.ones(()))
        case _:
            np.savez(file, about=np.array(file.stem), low=np.zeros(()), high=np.ones(()))
    cache = CalibrationCache(tmp_path)
    again = observe(model, requests, samples(model), OnnxRuntime(), cache)
    assert (again.observed, again.reused) == (1, 0)
    (remark,) = cache.take_remarks()
    assert f"`{file.name}` is not used" in remark
    assert again[value_of(model, "b"), Histogram()].high == first[value_of(model, "b"), Histogram()].high
    third = observe(model, requests, samples(model), Unable(), CalibrationCache(tmp_path))  # type: ignore[arg-type]
    assert third.reused == 1
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]


def test_a_folder_that_takes_no_more_does_not_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    model, cache = net(), CalibrationCache(tmp_path)
    monkeypatch.setattr(np, "savez", full)
    found = observe(model, requests_of(model), samples(model), OnnxRuntime(), cache)
    assert found.observed == 4
    (remark,) = cache.take_remarks()
    assert "takes no more files: No space left on device" in remark
    assert not list(tmp_path.iterdir())


def test_an_interrupt_leaves_nothing_half_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    cache = CalibrationCache(tmp_path)
    monkeypatch.setattr(np, "savez", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cache.put("name", {"low": np.zeros(1)})
    assert not list(tmp_path.iterdir())
