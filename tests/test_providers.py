"""Execution providers: what sessions on CUDA and TensorRT are told, and what is refused before they are."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry
from graphopt.backend import Bindable, Placement, Placing, is_plain
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.onnxruntime_profiles import spans_of
from graphopt.errors import BackendError, UsageError

from .recorded_session import CPU, CUDA, GPU, TENSORRT, Recording

pytest.importorskip("onnxruntime")

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

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
DIMS = ("batch=1..8..32", "side=224", "seq=1..16..128")


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


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    return Recording().install(monkeypatch)


def tensorrt(tmp_path: Path, **options: object) -> OnnxRuntime:
    return OnnxRuntime(provider="tensorrt", **{"trt_engine_cache_path": str(tmp_path / "engines"), **options})  # type: ignore[arg-type]


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
            "provider=tensorrt:trt_engine_cache_enable=false:trt_engine_cache_path=e",
            "without `trt_engine_cache_enable`",
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


def test_tensorrt_11_takes_precision_from_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recording().install(monkeypatch, tensorrt=(11, 0, 0))
    with pytest.raises(UsageError, match=r"TensorRT 11\.0\.0 has no `trt_fp16_enable`"):
        tensorrt(tmp_path, trt_fp16_enable=True).open(model())
    with tensorrt(tmp_path).open(model()):
        pass


def test_a_provider_that_does_not_start_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    Recording(started=[]).install(monkeypatch)
    with pytest.raises(BackendError, match="did not start: ONNX Runtime fell back to CPUExecutionProvider") as caught:
        OnnxRuntime(provider="cuda").open(model())
    assert "CUDA and cuDNN" in (caught.value.hint or "")


def test_a_calibration_table_is_refused_with_a_quantized_model(tmp_path: Path, recording: Recording) -> None:
    backend = tensorrt(tmp_path, trt_int8_enable=True, trt_int8_calibration_table_name="table")
    with pytest.raises(UsageError, match="quantized already"):
        backend.open(quantized())
    assert not recording.sessions
    with backend.open(model()):
        assert recording.last.options(TENSORRT)["trt_int8_calibration_table_name"] == "table"


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


def test_tensorrt_leaves_the_rest_to_cuda_and_biases_in_float(tmp_path: Path, recording: Recording) -> None:
    config = ("optimization.disable_specified_optimizers=ConstantSharing",)
    with tensorrt(tmp_path, config=config, trt_op_types_to_exclude=("NonZero", "RoiAlign")).open(quantized()):
        pass
    assert [name for name, _ in recording.last.providers] == [TENSORRT, CUDA]
    disabled = recording.last.entries["optimization.disable_specified_optimizers"]
    assert disabled == "ConstantSharing;WeightBiasQuantization"
    options = recording.last.options(TENSORRT)
    assert options["trt_op_types_to_exclude"] == "NonZero,RoiAlign"
    # Precision is the model's own: none of the switches that let TensorRT choose another.
    assert not {"trt_fp16_enable", "trt_bf16_enable", "trt_int8_enable"} & set(options)


def test_the_switch_keeps_onnx_runtime_from_quantizing_biases(tmp_path: Path) -> None:
    """The one part of a TensorRT session that the real ONNX Runtime shows on a CPU."""
    entry = ("optimization.disable_specified_optimizers=WeightBiasQuantization",)
    names = {}
    for config in ((), entry):
        with OnnxRuntime(config=config).open(quantized()) as session:
            placed = session.placement()
            assert placed is not None
            names[config] = [node.op for node in placed.nodes]
    assert names[()].count("DequantizeLinear") == 4
    assert names[entry].count("DequantizeLinear") == 3


def test_tensorrt_is_given_every_shape_that_can_be_inferred(tmp_path: Path, recording: Recording) -> None:
    with tensorrt(tmp_path).open(quantized()):
        path = recording.last.path
        assert path is not None
        assert path.exists(), "engines of dynamic shapes are built when they first run"
    known = {value.name: value.type.tensor_type.shape.dim for value in recording.last.model.graph.value_info}
    assert [dim.dim_value for dim in known["c"]] == [1, 8, 6, 6]
    assert not path.exists()


def test_files_that_hang_on_their_place_or_name_keep_them(tmp_path: Path, recording: Recording) -> None:
    text = """<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]> agraph (float[1] x) => (float[1] y)
    { y = com.microsoft.EPContext <ep_cache_context = "beside.engine"> (x) }"""
    graphopt.save(model(text), tmp_path / "with_engines.onnx")
    with tensorrt(tmp_path).open(tmp_path / "with_engines.onnx"):
        assert recording.last.path == tmp_path / "with_engines.onnx"
    graphopt.save(quantized(), tmp_path / "named.onnx")
    stripped = {"trt_weight_stripped_engine_enable": True, "trt_onnx_model_folder_path": str(tmp_path)}
    for options, name in (({}, "model.onnx"), (stripped, "named.onnx")):
        with tensorrt(tmp_path, **options).open(tmp_path / "named.onnx"):
            path = recording.last.path
            assert path is not None
            assert path.name == name
            assert path.parent != tmp_path


# Profiles


def test_profiles_cover_every_dynamic_input(tmp_path: Path, recording: Recording) -> None:
    with tensorrt(tmp_path, dims=DIMS).open(model()):
        options = recording.last.options(TENSORRT)
    assert options["trt_profile_min_shapes"] == "x:1x3x224x224,mask:1x1"
    assert options["trt_profile_opt_shapes"] == "x:8x3x224x224,mask:8x16"
    assert options["trt_profile_max_shapes"] == "x:32x3x224x224,mask:32x128"


def test_a_profile_that_leaves_inputs_out_names_them(tmp_path: Path, recording: Recording) -> None:
    with pytest.raises(UsageError, match="`x`: side, side; `mask`: seq"):
        tensorrt(tmp_path, dims=("batch=1..4",)).open(model())
    with pytest.raises(UsageError, match="is called `bach`") as caught:
        tensorrt(tmp_path, dims=("bach=1",)).open(model())
    assert "did you mean `batch`?" in (caught.value.hint or "")
    assert not recording.sessions


def test_without_sizes_tensorrt_finds_them_by_itself(tmp_path: Path, recording: Recording) -> None:
    with tensorrt(tmp_path).open(model()):
        assert not [key for key in recording.last.options(TENSORRT) if "profile" in key]


def test_sizes_of_data_make_a_profile(tmp_path: Path, recording: Recording) -> None:
    feeds = [
        {"x": np.zeros((batch, 3, side, side), np.float32), "mask": np.zeros((batch, 5), np.float32)}
        for batch, side in ((4, 32), (1, 64), (2, 48))
    ]
    dims = spans_of(model(), feeds)
    assert dims == ("batch=1..2..4", "side=32..48..64", "seq=5..5..5")
    with tensorrt(tmp_path, dims=dims).open(model()):
        assert recording.last.options(TENSORRT)["trt_profile_max_shapes"] == "x:4x3x64x64,mask:4x5"


def test_dimensions_without_a_name_or_named_by_a_sum(tmp_path: Path, recording: Recording) -> None:
    subject = model(TEXT)
    subject.graph.inputs[0].shape = ir.Shape([None, 3, 2, 2])
    subject.graph.inputs[1].shape = ir.Shape(["batch", "past + seq"])
    with tensorrt(tmp_path, dims=("x[0]=1..2", "batch=1..2", "past=1..3", "seq=1")).open(subject):
        assert recording.last.options(TENSORRT)["trt_profile_max_shapes"] == "x:2x3x2x2,mask:2x4"
    with pytest.raises(UsageError, match=r"`mask`: past \+ seq"):
        tensorrt(tmp_path, dims=("x[0]=1", "batch=1", "seq=1")).open(subject)


def test_a_part_that_begins_inside_the_model_gets_its_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    says = "Following input(s) has no associated shape profiles provided: pooled"
    recording = Recording(refuses=[RuntimeError(says)]).install(monkeypatch)
    text = """<ir_version: 8, opset_import: ["": 17]> agraph (float[n, 3, side, side] x) => (float[n, 3, a, b] y) {
      pooled = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x)
      y = Relu (pooled)
    }"""
    with tensorrt(tmp_path, dims=("n=1..4", "side=9..17..33")).open(model(text)):
        options = recording.last.options(TENSORRT)
    assert options["trt_profile_min_shapes"] == "x:1x3x9x9,pooled:1x3x4x4"
    assert options["trt_profile_opt_shapes"] == "x:4x3x17x17,pooled:4x3x8x8"
    assert options["trt_profile_max_shapes"] == "x:4x3x33x33,pooled:4x3x16x16"
    # Once is enough: what it asks for again is its own affair.
    recording.refuses = [RuntimeError(says)] * 2
    with pytest.raises(BackendError, match="no associated shape profiles"):
        tensorrt(tmp_path, dims=("n=1..4", "side=9..17..33")).open(model(text))


def test_sizes_that_hang_on_data_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = RuntimeError("has no associated shape profiles provided: found")
    Recording(refuses=[refused]).install(monkeypatch)
    text = """<ir_version: 8, opset_import: ["": 17]> agraph (float[n] x) => (int64[1, m] y) {
      found = NonZero (x)
      y = Abs (found)
    }"""
    with pytest.raises(UsageError, match="begins at `found`"):
        tensorrt(tmp_path, dims=("n=1..4",)).open(model(text))


# Caches


def folders(recording: Recording) -> tuple[str, str]:
    options = recording.last.options(TENSORRT)
    return options["trt_engine_cache_path"], options["trt_timing_cache_path"]


def test_engines_are_kept_by_content_versions_and_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, tuple[str, str]] = {}

    def note(name: str, subject: ir.Model | Path, **options: object) -> None:
        with tensorrt(tmp_path, **options).open(subject):
            seen[name] = folders(recording)

    recording = Recording().install(monkeypatch)
    note("first", quantized())
    note("again", quantized())
    graphopt.save(quantized(), tmp_path / "m.onnx")
    note("file", tmp_path / "m.onnx")
    changed = quantized()
    weights = changed.graph.initializers["w"]
    assert weights.const_value is not None
    weights.const_value = ir.tensor(np.flip(weights.const_value.numpy()).copy(), name="w")
    note("weights", changed)
    note("options", quantized(), trt_builder_optimization_level=5)
    note("log", quantized(), trt_detailed_build_log=True)
    recording = Recording().install(monkeypatch, tensorrt=(10, 10, 0))
    note("tensorrt", quantized())
    recording = Recording().install(monkeypatch, gpus=(type(GPU)("Another GPU", "8.6", "12.8"),))
    note("gpu", quantized())
    engines = {name: one for name, (one, _) in seen.items()}
    timings = {name: one for name, (_, one) in seen.items()}
    assert engines["first"] == engines["again"] == engines["log"]
    assert len({engines[name] for name in ("first", "weights", "options", "tensorrt", "gpu")}) == 5
    # Timings are of kernels on a machine, whatever the model.
    assert timings["first"] == timings["weights"] == timings["options"]
    assert len({timings[name] for name in ("first", "tensorrt", "gpu")}) == 3
    assert all(Path(one).is_dir() for pair in seen.values() for one in pair)
    assert engines["first"] == engines["file"]


def test_caches_lie_with_the_user_s_unless_said_otherwise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    recording = Recording().install(monkeypatch)
    with OnnxRuntime(provider="tensorrt").open(quantized()):
        assert all(Path(one).is_relative_to(tmp_path / "graphopt") for one in folders(recording))
    off = OnnxRuntime(provider="tensorrt", trt_engine_cache_enable=False, trt_timing_cache_enable=False)
    with off.open(quantized()):
        options = recording.last.options(TENSORRT)
    assert "trt_engine_cache_path" not in options
    assert "trt_timing_cache_path" not in options


def test_a_cache_that_cannot_be_is_one_line(tmp_path: Path, recording: Recording) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="the engine cache cannot be in"):
        tensorrt(tmp_path, trt_engine_cache_path=str(tmp_path / "file")).open(quantized())


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
