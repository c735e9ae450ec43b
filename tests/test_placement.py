"""Where nodes run, and where what they read lies: placement, bound inputs, kernels."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import pytest

import graphopt
from graphopt import registry
from graphopt.backend import Bindable, PlacedNode, Placement, Placing
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.onnxruntime_kernels import read_kernels
from graphopt.backends.onnxruntime_placement import check_placement
from graphopt.errors import BackendError
from graphopt.explaining.explanation import explain
from graphopt.reporting.rows import side_rows

from .provider_models import model, quantized, tensorrt
from .recorded_session import CPU, CUDA, GPU, TENSORRT, Recording

pytest.importorskip("onnxruntime")


# Placement


def on_cpu(*ops: str) -> Recording:
    return Recording(place=lambda node: CPU if node.op_type in ops else CUDA)


def test_nodes_on_the_cpu_are_an_error_unless_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu("Relu", "Reshape").install(monkeypatch)
    with pytest.raises(BackendError, match=r"would run 2 of 5 nodes on the CPU: 1 Reshape, 1 Relu") as caught:
        OnnxRuntime(provider="cuda").open(model())
    assert "`cpu_ops=Reshape+Relu`" in (caught.value.hint or "")
    with pytest.raises(BackendError, match="1 of 5 nodes on the CPU: 1 Reshape") as caught:
        OnnxRuntime(provider="cuda", cpu_ops=("Relu",)).open(model())
    assert "`cpu_ops=Relu+Reshape`" in (caught.value.hint or "")
    for options in ({"cpu_ops": ("Relu", "Reshape")}, {"allow_cpu": True}):
        with OnnxRuntime(provider="cuda", **options).open(model()) as session:  # type: ignore[arg-type]
            placement = session.placement()
        assert placement is not None
        assert placement.counts == {CUDA: 3, CPU: 2}
        assert placement.as_dict()["elsewhere"] == {CPU: {"Reshape": 1, "Relu": 1}}


def test_operators_of_other_domains_are_named_as_the_command_line_takes_them() -> None:
    placement = Placement(CUDA, (PlacedNode("a", "com.microsoft::QGemm", CPU),))
    with pytest.raises(BackendError) as caught:
        check_placement(placement, ("Relu",), "onnxruntime cuda")
    (text,) = re.findall("`(cpu_ops=.*?)`", caught.value.hint or "")
    assert registry.backend(f"onnxruntime:provider=cuda:{text}").cpu_ops == ("Relu", "com.microsoft::QGemm")


def test_arithmetic_on_shapes_belongs_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu("Shape", "Concat", "Constant").install(monkeypatch)
    graphopt.save(model(), tmp_path / "m.onnx")
    for subject in (model(), tmp_path / "m.onnx"):
        with OnnxRuntime(provider="cuda").open(subject) as session:
            placement = session.placement()
        assert placement is not None
        assert placement.counts[CPU] == 3
        assert not placement.elsewhere


def test_factors_made_of_sizes_are_arithmetic_on_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu("Shape", "Cast", "Div").install(monkeypatch)
    text = """<ir_version: 8, opset_import: ["": 17]>
    agraph (float[1, 3, a, b] x, float[1, 3, c, d] like) => (float[1, 3, e, f] y) {
      wanted = Shape (like)
      w = Cast <to = 1> (wanted)
      had = Shape (x)
      h = Cast <to = 1> (had)
      factors = Div (w, h)
      y = Resize (x, , factors)
    }"""
    with OnnxRuntime(provider="cuda").open(model(text)) as session:
        placement = session.placement()
    assert placement is not None
    assert placement.counts == {CPU: 5, CUDA: 1}
    assert not placement.elsewhere


def test_numbers_that_are_no_shape_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu("Cast").install(monkeypatch)
    text = """<ir_version: 8, opset_import: ["": 17]> agraph (float[100, 100] x) => (int64[100, 100] y)
    { y = Cast <to = 7> (x) }"""
    with pytest.raises(BackendError, match="1 of 1 nodes on the CPU: 1 Cast"):
        OnnxRuntime(provider="cuda").open(model(text))


def test_operators_on_codes_are_told_where_they_belong(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu("MatMulInteger").install(monkeypatch)
    text = """<ir_version: 8, opset_import: ["": 17]> agraph (uint8[2, 4] x, int8[4, 2] w) => (int32[2, 2] y)
    { y = MatMulInteger (x, w) }"""
    with pytest.raises(BackendError) as caught:
        OnnxRuntime(provider="cuda").open(model(text))
    assert "`--target ort-cuda`" in (caught.value.hint or "")


def test_what_tensorrt_leaves_to_cuda_is_reported_and_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recording(place=lambda node: CUDA if node.op_type == "Relu" else TENSORRT).install(monkeypatch)
    with tensorrt(tmp_path).open(model()) as session:
        placement = session.placement()
    assert placement is not None
    assert placement.wanted == TENSORRT
    assert [node.op for node in placement.elsewhere] == ["Relu"]


def test_an_onnx_runtime_that_cannot_tell_is_asked_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording(tells_placement=False).install(monkeypatch)
    with OnnxRuntime(provider="cuda").open(model()) as session:
        assert session.placement() is None
    assert recording.last.entries["session.disable_cpu_ep_fallback"] == "1"
    with pytest.raises(BackendError, match="does not tell where nodes run"):
        OnnxRuntime(provider="cuda", cpu_ops=("Relu",)).open(model())
    for backend in (OnnxRuntime(provider="cuda", allow_cpu=True), OnnxRuntime()):
        with backend.open(model()):
            assert "session.disable_cpu_ep_fallback" not in recording.last.entries


def test_placement_on_a_cpu_is_that_of_the_real_runtime() -> None:
    with OnnxRuntime().open(model()) as session:
        assert isinstance(session, Placing)
        placement = session.placement()
    assert isinstance(placement, Placement)
    assert set(placement.counts) == {CPU}
    assert not placement.elsewhere
    assert json.dumps(placement.as_dict())


# Bound inputs and outputs


def test_a_bound_feed_runs_as_it_was_when_bound() -> None:
    feed = {"x": np.zeros((1, 3, 2, 2), np.float32), "mask": np.array([[-1.0, 2.0]], np.float32)}
    with OnnxRuntime().open(model()) as session:
        assert isinstance(session, Bindable)
        run = session.bind(feed)
        bound = session._session
        seen = []

        class Spy:
            def run_with_iobinding(self, binding: object) -> None:
                bound.run_with_iobinding(binding)
                seen.append(binding.copy_outputs_to_cpu())  # type: ignore[attr-defined]

            def __getattr__(self, name: str) -> object:
                return getattr(bound, name)

        session._session = Spy()
        run = session.bind(feed)
        feed["mask"][:] = 9.0
        run()
        run()
    assert [one[1].tolist() for one in seen] == [[[0.0, 2.0]]] * 2


def test_binding_refuses_what_running_refuses() -> None:
    with OnnxRuntime().open(model()) as session:
        with pytest.raises(BackendError, match="lack the input `mask`") as caught:
            session.bind({"x": np.zeros((1, 3, 2, 2), np.float32)})
        assert caught.value.hint
        with pytest.raises(BackendError) as caught:
            session.bind({"nothing": np.zeros(1, np.float32)})
        assert "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("kind", "array"),
    [
        ("string", np.array(["a", "b"], object)),
        ("bfloat16", np.array([1.5, -2.0], ml_dtypes.bfloat16)),
        ("float8e4m3fn", np.array([1.5, -2.0], ml_dtypes.float8_e4m3fn)),
        ("float8e5m2", np.array([1.5, -2.0], ml_dtypes.float8_e5m2)),
        ("float8e5m2fnuz", np.array([1.5, -2.0], ml_dtypes.float8_e5m2fnuz)),
        ("float16", np.array([1.5, -2.0], np.float16)),
        ("bool", np.array([True, False])),
    ],
)
def test_inputs_and_outputs_of_every_type_run_and_bind(kind: str, array: np.ndarray) -> None:
    text = f'<ir_version: 10, opset_import: ["": 21]> agraph ({kind}[2] x) => ({kind}[2] y) {{ y = Identity (x) }}'
    with OnnxRuntime().open(model(text)) as session:
        output = session.run({"x": array})["y"]
        session.bind({"x": array})()
    assert output.dtype == array.dtype
    assert output.tolist() == array.tolist()


def test_arrays_of_another_byte_order_are_read_as_what_they_mean() -> None:
    text = '<ir_version: 10, opset_import: ["": 21]> agraph (float[2] x) => (float[2] y) { y = Neg (x) }'
    with OnnxRuntime().open(model(text)) as session:
        assert session.run({"x": np.array([1.5, -2.0], ">f4")})["y"].tolist() == [-1.5, 2.0]


def test_kernels_without_a_name_have_run_like_the_others() -> None:
    """ONNX Runtime makes a nameless Cast of a CastLike, and calls it by a number in its profile."""
    text = """<ir_version: 9, opset_import: ["": 17]> agraph (int64[n] x, float[n] like) => (float[n] y, float[n] z) {
        a = CastLike (x, like) y = Sqrt (a) b = Neg (x) c = CastLike (b, like) z = Exp (c) }"""
    feed = {"x": np.arange(4), "like": np.zeros(4, np.float32)}
    kernels = OnnxRuntime().kernels(model(text), feed, runs=1)
    casts = [kernel for kernel in kernels if kernel.op == "Cast"]
    assert [kernel.reads for kernel in casts] == [("int64",)] * 2
    assert all(kernel.provider == CPU for kernel in kernels)


@pytest.mark.parametrize(
    ("ran", "expected"),
    [((7, 9), [2.0, 4.0]), ((7,), [1.0, 1.0]), ((), [0.0, 0.0])],
    ids=["both", "one of them", "none"],
)
def test_times_of_nodes_without_a_name(ran: tuple[int, ...], expected: list[float], tmp_path: Path) -> None:
    nodes = [onnx.helper.make_node("Cast", [name], [name + "_"], to=1, name="") for name in "ab"]
    nodes.append(onnx.helper.make_node("Cast", ["c"], ["c_"], to=1, name="Cast_8"))
    onnx.save(onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", [], [])), tmp_path / "m.onnx")
    events = [
        {"cat": "Node", "name": f"Cast_{number}_kernel_time", "dur": dur, "ts": ts, "args": {"op_name": "Cast"}}
        for ts, (number, dur) in enumerate([(7, 2000), (8, 8000), (9, 4000)] * 2)
        if number == 8 or number in ran
    ]
    (tmp_path / "profile").write_text(json.dumps(events))
    times = [kernel.milliseconds for kernel in read_kernels(tmp_path / "m.onnx", tmp_path / "profile", runs=1)]
    assert times == [*expected, 8.0]


def test_kernels_say_what_ran_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    feed = {"x": np.zeros((1, 3, 2, 2), np.float32), "mask": np.zeros((1, 2), np.float32)}
    named = model()
    for number, node in enumerate(named.graph):
        node.name = f"node_{number}"
    assert {kernel.provider for kernel in OnnxRuntime().kernels(named, feed, runs=1)} == {CPU}
    # No graph is written of a model with engines in it: the profile alone tells.
    Recording(place=lambda node: CUDA if node.op_type == "Relu" else TENSORRT).install(monkeypatch)
    kernels = tensorrt(tmp_path).kernels(model(), feed, runs=3)
    assert [(kernel.op, kernel.provider) for kernel in kernels][-1] == ("Relu", CUDA)
    assert all(kernel.milliseconds == 0.25 for kernel in kernels)
    assert len(kernels) == 5


def test_what_an_engine_holds_is_not_guessed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    Recording().install(monkeypatch)
    found = explain(quantized(), target="tensorrt")
    assert found.proven_by is None
    assert "does not tell as what" in found.unproven
    assert {one.state for one in found.findings} == {"integers"}


def test_a_gpu_session_binds_on_its_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording().install(monkeypatch, gpus=(GPU, GPU))
    with OnnxRuntime(provider="cuda", device_id=1).open(model()) as session:
        session.bind({"x": np.zeros((1, 3, 2, 2), np.float32), "mask": np.zeros((1, 2), np.float32)})()
    assert recording.last.devices == {"y": ("cuda", 1), "z": ("cuda", 1)}
    assert [value.device for value in recording.last.runs[0].values()] == [("cuda", 1)] * 2


def test_recorded_outputs_come_back_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    Recording(outputs={"z": np.array([7.0], np.float32)}).install(monkeypatch)
    with OnnxRuntime(provider="cuda").open(model()) as session:
        assert session.run({"x": np.zeros(1), "mask": np.zeros(1)})["z"].tolist() == [7.0]


# Whole runs


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_run_on_a_gpu_reports_where_nodes_went(
    provider: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as a double can go: the providers are asked for, the numbers are the CPU's."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    wanted = {"cuda": CUDA, "tensorrt": TENSORRT}[provider]
    recording = Recording(computes=True, place=lambda node: CPU if node.op_type == "Relu" else wanted)
    recording.install(monkeypatch)
    text = """<ir_version: 8, opset_import: ["": 17]> agraph (float[n, 8] x) => (float[n, 8] y) {
      same = Identity (x)
      twice = Add (same, same)
      y = Relu (twice)
    }"""
    graphopt.save(model(text), tmp_path / "m.onnx")
    backend = f"onnxruntime:provider={provider}:cpu_ops=Relu"
    done = graphopt.optimize(tmp_path / "m.onnx", "identities", backend=backend, output=tmp_path / "out.onnx")
    report = done.report.as_dict()
    assert report["ok"]
    assert report["before"]["placement"] == {
        "wanted": wanted,
        "nodes": {wanted: 2, CPU: 1},
        "elsewhere": {CPU: {"Relu": 1}},
    }
    assert report["after"]["placement"]["nodes"] == {wanted: 1, CPU: 1}
    shown = {row.name: (row.before, row.after) for row in side_rows(done.report)}
    assert shown[f"on {wanted}"] == ("2", "1")
    # What is compared step by step is run as it stands: by CUDA itself, on the CPU instead of an engine.
    plain = {one.providers[0][0] for one in recording.sessions if not one.optimized}
    assert plain == {CUDA if provider == "cuda" else CPU}
    assert {one.providers[0][0] for one in recording.sessions if one.optimized} == {wanted}


def test_a_cpu_alone_has_no_rows_of_placement(tmp_path: Path) -> None:
    graphopt.save(model(), tmp_path / "m.onnx")
    report = graphopt.optimize(tmp_path / "m.onnx", "identities", output=tmp_path / "out.onnx").report
    assert report.before.placement is not None
    assert set(report.before.placement["nodes"]) == {CPU}
    assert not [row for row in side_rows(report) if row.name.startswith("on ")]
