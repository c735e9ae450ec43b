"""Sessions on TensorRT: what they are given, the shapes they are built for, and where engines are kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

import graphopt
from graphopt.backends import onnxruntime_tensorrt
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.onnxruntime_profiles import spans_of
from graphopt.errors import BackendError, UsageError

from .provider_models import TEXT, model, quantized, tensorrt
from .recorded_session import CUDA, GPU, TENSORRT, Recording

pytest.importorskip("onnxruntime")

DIMS = ("batch=1..8..32", "side=224", "seq=1..16..128")


@pytest.fixture
def recording(monkeypatch: pytest.MonkeyPatch) -> Recording:
    return Recording().install(monkeypatch)


# What it is given


def test_tensorrt_11_takes_precision_from_the_model_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Recording().install(monkeypatch, tensorrt=(11, 0, 0))
    with pytest.raises(UsageError, match=r"TensorRT 11\.0\.0 has no `trt_fp16_enable`"):
        tensorrt(tmp_path, trt_fp16_enable=True).open(model())
    with tensorrt(tmp_path).open(model()):
        pass


def test_a_calibration_table_is_refused_with_a_quantized_model(tmp_path: Path, recording: Recording) -> None:
    backend = tensorrt(tmp_path, trt_int8_enable=True, trt_int8_calibration_table_name="table")
    with pytest.raises(UsageError, match="quantized already"):
        backend.open(quantized())
    assert not recording.sessions
    with backend.open(model()):
        assert recording.last.options(TENSORRT)["trt_int8_calibration_table_name"] == "table"


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


def test_engines_that_fit_no_file_are_refused(
    tmp_path: Path, recording: Recording, monkeypatch: pytest.MonkeyPatch
) -> None:
    inside = {
        "trt_dump_ep_context_model": True,
        "trt_ep_context_file_path": str(tmp_path / "with_engines.onnx"),
        "trt_ep_context_embed_mode": True,
    }
    with tensorrt(tmp_path, **inside).open(quantized()):
        options = recording.last.options(TENSORRT)
    assert options["trt_ep_context_embed_mode"] == "1"
    # The engines lie where the file is: a folder of ours would be outside of what it may refer to.
    assert "trt_engine_cache_path" not in options
    monkeypatch.setattr(onnxruntime_tensorrt, "PROTOBUF_LIMIT", 100)
    with pytest.raises(UsageError, match="do not fit into one file"):
        tensorrt(tmp_path, **inside).open(quantized())


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
