"""Execution providers: what is refused before any work, and what sessions on a GPU are told."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry
from graphopt.backend import is_plain
from graphopt.backends import onnxruntime_library
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.onnxruntime_library import Gpu
from graphopt.errors import BackendError, UsageError

from .provider_models import model
from .recorded_session import CPU, CUDA, GPU, Recording

pytest.importorskip("onnxruntime")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    return Recording().install(monkeypatch)


# What is refused


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("device_id=1", "`device_id` is an option of cuda and tensorrt, not of cpu"),
        ("allow_cpu=true", "`allow_cpu` is an option of cuda and tensorrt"),
        ("provider=cuda:trt_sparsity_enable=true", "`trt_sparsity_enable` is an option of tensorrt, not of cuda"),
        ("provider=tensorrt:gpu_mem_limit=1000", "`gpu_mem_limit` is an option of cuda, not of tensorrt"),
        ("dims=batch=1", "`dims` is an option of tensorrt, not of cpu"),
        ("provider=tensorrt:trt_builder_optimization_level=6", "out of range"),
        ("provider=tensorrt:trt_int8_calibration_table_name=t", "does nothing without `trt_int8_enable`"),
        ("provider=tensorrt:trt_dump_ep_context_model=true", "does nothing without `trt_ep_context_file_path`"),
        ("provider=tensorrt:trt_weight_stripped_engine_enable=true", "without `trt_onnx_model_folder_path`"),
        (
            "provider=tensorrt:trt_engine_cache_enable=false:trt_timing_cache_enable=false:trt_engine_cache_path=e",
            "without `trt_engine_cache_enable` or `trt_timing_cache_enable`",
        ),
        ("provider=cuda:provider_options=nonsense", "`nonsense` is no provider option"),
        ("provider=cuda:provider_options=enable_cuda_graph=1", "`enable_cuda_graph` cannot be"),
        ("provider=cuda:provider_options=use_tf32=1", "`use_tf32` is an option of its own"),
        ("provider=tensorrt:dims=batch", "no sizes of a dimension"),
        ("provider=tensorrt:dims=batch=8..4", "not in order"),
        ("provider=tensorrt:dims=batch=0..4", "not in order"),
        ("provider=tensorrt:dims=batch=1+batch=2", "given twice"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_any_work(text: str, says: str) -> None:
    with pytest.raises(UsageError, match=says) as caught:
        registry.backend(f"onnxruntime:{text}")
    assert caught.value.hint


@pytest.mark.parametrize(("provider", "extra"), [("cuda", "gpu"), ("tensorrt", "tensorrt")])
def test_a_build_without_the_provider_says_what_to_install(
    provider: str, extra: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Recording(available=[CPU]).install(monkeypatch)
    with pytest.raises(BackendError, match=f"`onnxruntime {provider}` cannot run here") as caught:
        registry.backend(f"onnxruntime:provider={provider}").open(model())
    assert f"pip install 'graphopt[{extra}]'" in (caught.value.hint or "")
    assert "pip uninstall -y onnxruntime" in (caught.value.hint or "")
    assert "`--backend onnxruntime`" in (caught.value.hint or "")


def test_a_broken_installation_is_not_called_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_library, "runtime", lambda: None)
    for packages, says, hint in (
        ({"onnxruntime-gpu": "1.32.0"}, "is installed and cannot be loaded", "--force-reinstall onnxruntime-gpu"),
        ({}, "is not installed", "pip install 'graphopt[cpu]'"),
    ):
        monkeypatch.setattr(onnxruntime_library, "installed_packages", lambda packages=packages: packages)
        missing = OnnxRuntime().missing()
        assert missing is not None
        assert says in missing.message
        assert hint in (missing.hint or "")


def test_tensorrt_is_not_asked_for_where_another_library_of_nvidia_is_missing() -> None:
    hint = onnxruntime_library._how_to_install(["libnvrtc.so.12", "libcudnn.so.9"])
    assert hint == "`pip install 'onnxruntime-gpu[cuda,cudnn]'`"


def test_a_machine_without_driver_gpu_or_tensorrt_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    Recording().install(monkeypatch, gpus=None)
    assert "no NVIDIA driver" in str(OnnxRuntime(provider="cuda").missing())
    Recording().install(monkeypatch, gpus=())
    assert "finds no GPU" in str(OnnxRuntime(provider="cuda").missing())
    Recording().install(monkeypatch, tensorrt=None)
    assert OnnxRuntime(provider="cuda").missing() is None
    missing = OnnxRuntime(provider="tensorrt").missing()
    assert "TensorRT is not installed" in str(missing)
    wrong = OnnxRuntime(provider="cuda", device_id=1).missing()
    assert wrong is not None
    assert "no GPU number 1" in wrong.message
    assert GPU.name in (wrong.hint or "")


def test_a_driver_that_is_too_old_is_told_so(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording().install(monkeypatch)  # its driver knows 12.8
    for version, says in (("13.0", "knows CUDA 12.8, and this ONNX Runtime is built for CUDA 13.0"), ("12.9", None)):
        recording.cuda_version = version  # type: ignore[attr-defined]
        missing = OnnxRuntime(provider="cuda").missing()
        assert (says in str(missing)) if says is not None else missing is None


class Driver:
    """NVIDIA's driver with two GPUs of one kind."""

    def __init__(self, works: bool = True) -> None:
        self.works = works

    def cuInit(self, _flags: int) -> int:
        return 0 if self.works else 100  # CUDA_ERROR_NO_DEVICE

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = 2
        return 0

    def cuDriverGetVersion(self, release: Any) -> int:
        release._obj.value = 13010
        return 0

    def cuDeviceGet(self, device: Any, number: int) -> int:
        device._obj.value = number
        return 0

    def cuDeviceGetName(self, name: Any, _room: int, device: Any) -> int:
        name.value = f"GPU {device.value}".encode()
        return 0

    def cuDeviceGetAttribute(self, value: Any, attribute: int, _device: Any) -> int:
        value._obj.value = {75: 9, 76: 0}[attribute]
        return 0


def test_gpus_are_what_the_driver_says(monkeypatch: pytest.MonkeyPatch) -> None:
    library = onnxruntime_library.gpus.__wrapped__
    monkeypatch.setattr(onnxruntime_library.ctypes, "CDLL", lambda _name: Driver())
    assert library() == (Gpu("GPU 0", "9.0", "13.1"), Gpu("GPU 1", "9.0", "13.1"))
    monkeypatch.setattr(onnxruntime_library.ctypes, "CDLL", lambda _name: Driver(works=False))
    assert library() == ()

    def absent(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(onnxruntime_library.ctypes, "CDLL", absent)
    assert library() is None


def test_libraries_of_another_version_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = b"\0libnvinfer.so.77\0libcuda.so.1\0libcudnn.so.66\0libc.so.6\0libcudnn.so.66\0"
    (tmp_path / "capi").mkdir()
    (tmp_path / "capi" / "libonnxruntime_providers_tensorrt.so").write_bytes(b"\x7fELF" + names)
    (tmp_path / "capi" / "libonnxruntime_providers_cuda.so").write_bytes(b"\x7fELF\0libcudnn.so.66\0")
    recording = Recording().install(monkeypatch)
    recording.__file__ = str(tmp_path / "__init__.py")  # type: ignore[attr-defined]
    missing = OnnxRuntime(provider="tensorrt").missing()
    assert missing is not None
    assert missing.message.endswith("this ONNX Runtime needs libnvinfer.so.77, libcudnn.so.66")
    assert "`pip install 'tensorrt==77.*' 'onnxruntime-gpu[cuda,cudnn]'`" in (missing.hint or "")
    missing = OnnxRuntime(provider="cuda").missing()
    assert missing is not None
    assert "`pip install 'onnxruntime-gpu[cuda,cudnn]'`" in (missing.hint or "")


def test_a_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Recording(started=[]).install(monkeypatch)
    with pytest.raises(BackendError, match="did not start: ONNX Runtime fell back to CPUExecutionProvider") as caught:
        OnnxRuntime(provider="cuda").open(model())
    assert "CUDA and cuDNN" in (caught.value.hint or "")


def test_steps_are_not_checked_by_engines() -> None:
    assert is_plain(OnnxRuntime())
    assert is_plain(OnnxRuntime(provider="cuda"))
    assert not is_plain(OnnxRuntime(provider="tensorrt"))


# What sessions are told


def test_cuda_is_asked_for_with_its_options(recording: Recording) -> None:
    text = "onnxruntime:provider=cuda:gpu_mem_limit=4096:cudnn_conv_algo_search=HEURISTIC:prefer_nhwc=true"
    with registry.backend(text + ":provider_options=new_option=7").open(model()):
        pass
    assert recording.last.providers == [
        (
            CUDA,
            {
                "device_id": "0",
                "use_tf32": "0",
                "gpu_mem_limit": "4096",
                "cudnn_conv_algo_search": "HEURISTIC",
                "prefer_nhwc": "1",
                "new_option": "7",
            },
        )
    ]
    assert "optimization.disable_specified_optimizers" not in recording.last.entries


def test_plain_runs_on_cuda_choose_no_kernels_by_the_clock(recording: Recording) -> None:
    backend = OnnxRuntime(provider="cuda")
    for optimize, expected in ((True, None), (False, "DEFAULT")):
        with backend.open(model(), optimize=optimize):
            assert recording.last.options(CUDA).get("cudnn_conv_algo_search") == expected
            assert recording.last.deterministic is not optimize


def test_the_cpu_is_given_no_options_of_others(recording: Recording) -> None:
    with OnnxRuntime().open(model()):
        pass
    assert recording.last.providers == [(CPU, {})]


# The benchmark that runs the real ones


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return runpy.run_path(str(BENCHMARKS / "gpu.py"))


def test_the_benchmark_says_why_there_are_no_figures(
    benchmark: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Recording(available=[CPU]).install(monkeypatch)
    assert benchmark["main"]([]) == 1
    said = capsys.readouterr().out
    assert said.count("No figures: backend `onnxruntime") == 2
    assert "|" not in said


def test_the_benchmark_compares_what_it_wrote(benchmark: dict[str, Any], tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> agraph (float[n, 64] x, float[64, 64] w) => (float[n, 64] y)
    { y = MatMul (x, w) }"""
    subject = model(text)
    weight = subject.graph.inputs.pop()
    rng = np.random.default_rng(0)
    weight.const_value = ir.tensor(rng.standard_normal((64, 64)).astype(np.float32), name="w")
    subject.graph.register_initializer(weight)
    graphopt.save(subject, tmp_path / "m.onnx")
    feeds = [{"x": rng.standard_normal((2, 64)).astype(np.float32)}]
    rows = list(benchmark["rows"]("m", tmp_path / "m.onnx", feeds, None, OnnxRuntime(), 0.01, tmp_path))
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    assert [row[2] for row in cells] == ["float32", "dynamic int8"]
    assert [row[4] for row in cells] == ["equal", "equal"]
    assert cells[0][5] == "equal"
    assert 20 < float(cells[1][5]) < 60
    assert [row[8] for row in cells] == ["0", "0"]


def test_the_benchmark_goes_on_after_a_model_that_is_refused(benchmark: dict[str, Any], tmp_path: Path) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "nobody": 1]> agraph (float[2] x) => (float[2] y)
    { y = nobody.Frobnicate (x) }"""
    graphopt.save(model(text), tmp_path / "m.onnx")
    feeds = [{"x": np.zeros(2, np.float32)}]
    (row,) = benchmark["rows"]("m", tmp_path / "m.onnx", feeds, None, OnnxRuntime(), 0.01, tmp_path)
    assert row.startswith("| m | cpu | float32 | onnxruntime cpu refuses the model")
