"""Where nodes run, and where what they read lies: placement, bound inputs, kernels."""

from __future__ import annotations

import json
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

import graphopt
from graphopt.backend import Bindable, Placement, Placing
from graphopt.backends.onnxruntime import OnnxRuntime
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
    with pytest.raises(BackendError, match="1 of 5 nodes on the CPU: 1 Reshape"):
        OnnxRuntime(provider="cuda", cpu_ops=("Relu",)).open(model())
    for options in ({"cpu_ops": ("Relu", "Reshape")}, {"allow_cpu": True}):
        with OnnxRuntime(provider="cuda", **options).open(model()) as session:  # type: ignore[arg-type]
            placement = session.placement()
        assert placement is not None
        assert placement.counts == {CUDA: 3, CPU: 2}
        assert placement.as_dict()["elsewhere"] == {CPU: {"Reshape": 1, "Relu": 1}}


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
