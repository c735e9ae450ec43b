"""OpenVINO as a backend: the same protocol, its own ways refused in words, and what it says it ran."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry
from graphopt.backend import Backend, Bindable, Diagnosable, Inspectable, is_plain
from graphopt.backends import openvino as module
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.openvino import OpenVino, OpenVinoSession
from graphopt.backends.reference import Reference
from graphopt.backends.torch_fx.backend import Torch
from graphopt.errors import BackendError, UsageError
from graphopt.explaining.explanation import explain
from graphopt.plain_runs import PlainRuns, with_plain_runs

from .command_line import run
from .quantized_graphs import conv, product

pytest.importorskip("onnxruntime")

HEADER = '<ir_version: 9, opset_import: ["": 20]> agraph '
LINEAR = "(float[n, 4] x) => (float[n, 2] y) <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}> { y = MatMul(x, w) }"
X = np.array([[1.0, -5.0, 2.0, 0.5]], np.float32)
Y = [[1 - 15 + 10 + 3.5, 2 - 20 + 12 + 4.0]]

needs_openvino = pytest.mark.skipif(
    OpenVino().missing() is not None, reason="OpenVINO is not installed: `pip install 'graphopt[openvino]'`"
)


def model(text: str = LINEAR) -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(HEADER + text))


def opened(text: str, **options: Any) -> OpenVinoSession:
    return OpenVino(**options).open(model(text))


def large() -> tuple[ir.Model, np.ndarray[Any, Any]]:
    """Return a model whose weight is not written into its bytes, and the weight."""
    subject = model("(float[n, 64] x, float[64, 64] w) => (float[n, 64] y) { y = MatMul(x, w) }")
    content = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weight = subject.graph.inputs.pop()
    weight.const_value = ir.tensor(content, name="w")
    subject.graph.register_initializer(weight)
    return subject, content


@pytest.fixture
def without_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine on which it is not installed."""
    monkeypatch.setattr(module, "_runtime", lambda: None)
    monkeypatch.setattr(module, "_version", lambda: None)


# Without it


@pytest.mark.usefixtures("without_openvino")
def test_where_it_is_missing_it_says_what_to_install() -> None:
    why = OpenVino().missing()
    assert why is not None
    assert "graphopt[openvino]" in (why.hint or "")
    with pytest.raises(BackendError, match="not installed"):
        OpenVino().open(model())
    assert OpenVino().version() is None
    assert not OpenVino().troubles()


@pytest.mark.usefixtures("without_openvino")
def test_its_target_is_refused_before_any_work_where_it_is_missing(tmp_path: Path) -> None:
    graphopt.save(model(), tmp_path / "m.onnx")
    outcome = run("optimize", tmp_path / "m.onnx", "--passes", "simplify", "--target", "openvino")
    assert outcome.code == 2
    assert "OpenVINO is not installed" in outcome.error
    assert "graphopt[openvino]" in outcome.hint
    assert sorted(file.name for file in tmp_path.iterdir()) == ["m.onnx"]


@pytest.mark.usefixtures("without_openvino")
def test_models_are_laid_out_for_it_without_it_where_nothing_is_run() -> None:
    assert graphopt.optimize(model(), "simplify", target="openvino", verify="off").report.ok


@pytest.mark.usefixtures("without_openvino")
def test_explain_says_why_there_is_no_proof() -> None:
    found = explain(ir.from_proto(conv()), target="openvino")
    assert found.proven_by is None
    assert found.unproven == "OpenVINO is not installed"


def test_an_installation_that_does_not_load_is_a_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("libtbb.so.12: cannot open shared object file")

    monkeypatch.setattr(module, "_runtime", lambda: None)
    monkeypatch.setattr(module, "_version", lambda: "2026.4.1")
    monkeypatch.setattr(module.importlib, "import_module", broken)
    (trouble,) = OpenVino().troubles()
    assert trouble.fatal
    assert "libtbb" in trouble.what
    why = OpenVino().missing()
    assert why is not None
    assert "cannot be loaded" in why.message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("openvino:device=tpu", "is no device"),
        ("openvino:precision=f64", "cannot be `f64`"),
        ("openvino:hint=fast", "cannot be `fast`"),
        ("openvino:config=NUM_STREAMS", "is no property"),
        ("openvino:activation_group=-1", "out of range"),
        ("openvino:provider=cuda", "no option `provider`"),
    ],
)
def test_wrong_options_are_refused(text: str, words: str) -> None:
    with pytest.raises(UsageError, match=words) as caught:
        registry.backend(text)
    assert caught.value.hint


def test_it_says_what_it_can() -> None:
    assert isinstance(OpenVino(), Inspectable)
    assert isinstance(OpenVino(), Diagnosable)
    assert not is_plain(OpenVino())
    assert registry.find("TARGETS", "openvino").backend == "openvino"


# With it


@needs_openvino
@pytest.mark.parametrize("from_file", [False, True])
@pytest.mark.parametrize("optimize", [False, True])
def test_it_runs_a_model_in_memory_and_from_a_file(from_file: bool, optimize: bool, tmp_path: Path) -> None:
    subject: ir.Model | Path = model()
    if from_file:
        graphopt.save(subject, tmp_path / "m.onnx")
        subject = tmp_path / "m.onnx"
    with OpenVino().open(subject, optimize=optimize) as session:
        assert (list(session.input_names), list(session.output_names)) == (["x"], ["y"])
        assert session.run({"x": X})["y"].tolist() == Y
        assert session.run({"x": np.repeat(X, 3, 0)})["y"].tolist() == Y * 3
        assert session.run({"x": X[:0]})["y"].shape == (0, 2)


@needs_openvino
def test_large_weights_are_read_where_they_lie_and_kept() -> None:
    subject, content = large()
    with OpenVino().open(subject) as session:
        del subject
        gc.collect()
        x = np.ones((2, 64), np.float32)
        np.testing.assert_allclose(session.run({"x": x})["y"], x @ content, rtol=1e-4, atol=1e-4)


@needs_openvino
def test_a_file_with_weights_beside_it_runs(tmp_path: Path) -> None:
    subject, content = large()
    files = graphopt.model_io.save(subject, tmp_path / "m.onnx", external=True)
    assert len(files) == 2
    x = np.ones((2, 64), np.float32)
    for one in (files[0], graphopt.load(files[0])):
        with OpenVino().open(one) as session:
            np.testing.assert_allclose(session.run({"x": x})["y"], x @ content, rtol=1e-4, atol=1e-4)


@needs_openvino
def test_names_survive_whatever_it_makes_of_the_graph() -> None:
    """Outputs that are one value, an input that is an output, and one that nothing reads."""
    with opened("(float[n] x, float[n] z, float[n] u) => (float[n] a, float[n] b, float[n] z) "
                "{ a = Identity(x) b = Identity(a) }") as session:  # fmt: skip
        assert session.input_names == ["x", "z", "u"]
        x = np.ones(2, np.float32)
        found = session.run({"x": x, "z": 2 * x, "u": 3 * x})
    assert {name: array.tolist() for name, array in found.items()} == {"a": [1, 1], "b": [1, 1], "z": [2, 2]}


@needs_openvino
@pytest.mark.parametrize("made", ["Max(x)", "Sum(x)", "Dropout(x)", "Identity(x)", "Einsum<equation = 'i->i'>(x)"])
def test_an_operator_that_does_nothing_does_not_take_the_name_of_its_input(made: str) -> None:
    """It renames the input; a feed that found no input of its name would leave what is in memory to be read."""
    made = made.replace("'", '"')
    with opened(f"(float[3] x) => (float[3] y) {{ y = {made} }}") as session:
        assert session.run({"x": np.array([1, 2, 3], np.float32)})["y"].tolist() == [1, 2, 3]


@needs_openvino
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        ("float16", np.float16),
        ("bfloat16", ml_dtypes.bfloat16),
        ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
        ("double", np.float64),
        ("int8", np.int8),
        ("uint8", np.uint8),
        ("int32", np.int32),
        ("int64", np.int64),
        ("bool", np.bool_),
    ],
)
def test_dtypes_come_back_as_they_went_in(kind: str, dtype: Any) -> None:
    x = np.array([[0, 1], [1, 1]], dtype)
    with opened(f"({kind}[a, b] x) => ({kind}[b, a] y) {{ y = Transpose<perm = [1, 0]>(x) }}") as session:
        for given in (x, np.asfortranarray(x)):
            found = session.run({"x": given})["y"]
            assert found.dtype == x.dtype
            assert found.tolist() == x.T.tolist()


@needs_openvino
def test_a_feed_that_may_not_be_written_to_is_read() -> None:
    with OpenVino().open(model()) as session:
        given = np.broadcast_to(X, (2, 4))
        assert not given.flags.writeable
        assert session.run({"x": given})["y"].tolist() == Y * 2
        frozen = X.copy()
        frozen.setflags(write=False)
        assert session.run({"x": frozen})["y"].tolist() == Y


@needs_openvino
def test_scalars_are_scalars() -> None:
    with opened("(float x) => (float y) { y = Add(x, x) }") as session:
        found = session.run({"x": np.array(2, np.float32)})["y"]
    assert (found.shape, float(found)) == ((), 4.0)


@needs_openvino
@pytest.mark.parametrize(
    ("feed", "words"),
    [
        ({}, "`x` is not fed"),
        ({"x": X, "q": X}, "no input `q`"),
        ({"x": X.astype(np.float64)}, "is float32, and was given float64"),
        ({"x": X[:, :3]}, "refuses the feed of `x`"),
    ],
)
def test_feeds_it_would_misread_are_one_line(feed: dict[str, Any], words: str) -> None:
    """By itself it takes what it was last given for an input left out, and casts what is of another dtype."""
    with OpenVino().open(model()) as session:
        session.run({"x": X})
        with pytest.raises(BackendError, match=words) as caught:
            session.run(feed)
    assert "\n" not in caught.value.message
    assert caught.value.hint


@needs_openvino
def test_integers_it_would_cut_are_refused() -> None:
    with opened("(int64[n] x) => (int64[n] y) { y = Add(x, x) }") as session:
        assert session.run({"x": np.array([2**20])})["y"].tolist() == [2**21]
        with pytest.raises(BackendError, match="integers of 32 bits"):
            session.run({"x": np.array([2**40])})


@needs_openvino
def test_an_input_with_a_default_cannot_be_fed() -> None:
    with opened("(float[2] x, float[2] w) => (float[2] y) <float[2] w = {1.0, 2.0}> { y = Add(x, w) }") as session:
        assert session.input_names == ["x"]
        x = np.zeros(2, np.float32)
        assert session.run({"x": x})["y"].tolist() == [1.0, 2.0]
        with pytest.raises(BackendError, match="takes `w` for a constant"):
            session.run({"x": x, "w": x})


@needs_openvino
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("(float[n] x) => (float[n] y) { y = NoSuch(x) }", "No conversion rule found for operations: NoSuch"),
        ("(string[n] x) => (string[n] y) { y = Identity(x) }", "`x` is of STRING"),
        ("(int4[2] x) => (float[2] y) { y = Cast<to = 1>(x) }", "`x` is of INT4"),
        ("(seq(float[n]) x) => (float[n] y) { y = ConcatFromSequence<axis = 0>(x) }", "`x` is no tensor"),
    ],
)
def test_a_model_it_refuses_is_one_line(text: str, words: str) -> None:
    with pytest.raises(BackendError, match=words) as caught:
        opened(text)
    assert "\n" not in caught.value.message
    assert "src/" not in caught.value.message


@needs_openvino
def test_a_device_that_is_not_here_is_named_with_those_that_are() -> None:
    why = OpenVino(device="npu").missing()
    assert why is not None
    assert "OpenVINO finds cpu" in why.message
    assert "driver of the NPU" in (why.hint or "")


@needs_openvino
def test_floats_are_computed_in_float32_unless_asked() -> None:
    read = {one: str(_property(OpenVino(precision=one), "INFERENCE_PRECISION_HINT")) for one in ("f32", "bf16")}
    assert read == {"f32": "<Type: 'float32'>", "bf16": "<Type: 'bfloat16'>"}
    assert _property(OpenVino(), "DYNAMIC_QUANTIZATION_GROUP_SIZE") == 0
    assert _property(OpenVino(), "ENABLE_CPU_PINNING") is False
    assert str(_property(OpenVino(config=("EXECUTION_MODE_HINT=ACCURACY",)), "EXECUTION_MODE_HINT")).endswith(
        "ACCURACY"
    )


def _property(backend: OpenVino, name: str) -> Any:
    with backend.open(model(), threads=1) as session:
        return session._compiled.get_property(name)


@needs_openvino
def test_a_property_it_does_not_know_is_one_line() -> None:
    with pytest.raises(BackendError, match="Unsupported property NO_SUCH"):
        OpenVino(config=("NO_SUCH=1",)).open(model())


@needs_openvino
def test_compiled_models_are_kept_by_what_they_hold(tmp_path: Path) -> None:
    """Two models of one graph lie at one address one after the other: each finds its own."""
    x, buffer = np.ones((1, 64), np.float32), np.zeros((64, 64), np.float32)
    for factor in (1.0, 2.0, 1.0):
        subject, content = large()
        buffer[:] = factor * content
        subject.graph.initializers["w"].const_value = ir.tensor(buffer, name="w")
        with OpenVino(cache=str(tmp_path)).open(subject) as session:
            np.testing.assert_allclose(session.run({"x": x})["y"], factor * x @ content, rtol=1e-4, atol=1e-4)
    assert len(list(tmp_path.iterdir())) == 2


@needs_openvino
def test_a_folder_that_cannot_be_is_not_the_models_fault(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="cannot be kept in") as caught:
        OpenVino(cache=str(tmp_path / "file" / "cache")).open(model())
    assert "`cache`" in (caught.value.hint or "")


@needs_openvino
def test_a_bound_feed_is_run_in_place() -> None:
    with OpenVino().open(model()) as session:
        assert isinstance(session, Bindable)
        given = X.copy()
        again = session.bind({"x": given})
        given[:] = 0  # it is the session's own by now
        again()
        assert session._request.get_output_tensor(0).data.tolist() == Y
        with pytest.raises(BackendError, match="not fed"):
            session.bind({})


@needs_openvino
def test_each_bound_feed_is_run_whichever_was_taken_last() -> None:
    with OpenVino().open(model()) as session:
        first = session.bind({"x": X})
        session.bind({"x": X * 0})()
        first()
        assert session._request.get_output_tensor(0).data.tolist() == Y
        session.run({"x": X * 0})
        with pytest.raises(BackendError, match="no input"):
            session.run({"x": X * 0, "other": X})
        first()
        assert session._request.get_output_tensor(0).data.tolist() == Y


@pytest.mark.parametrize(
    ("first", "mean", "expected"), [(0.100, 0.025, 0.010), (0.007, 0.001, 0.0005), (0.0, 0.0, 0.0005)]
)
def test_the_first_run_is_taken_out_of_the_mean(first: float, mean: float, expected: float) -> None:
    """OpenVINO counts whole microseconds: rounded down, nothing and less than nothing would be left."""
    assert module._without(first, mean, 5) == pytest.approx(expected)


@needs_openvino
def test_the_profile_lands_where_asked(tmp_path: Path) -> None:
    with OpenVino().open(model(), profile=tmp_path / "profile") as session:
        session.run({"x": X})
        file = session.end_profiling()
    assert file.parent == tmp_path
    assert any(row["op"] in ("FullyConnected", "MatMul") for row in json.loads(file.read_text()))


# What it ran


@needs_openvino
def test_a_quantized_convolution_is_proven_to_run_in_integers() -> None:
    found = explain(ir.from_proto(conv()), target="openvino", threads=1)
    assert found.proven_by == "openvino cpu"
    (finding,) = [one for one in found.findings if one.op == "Conv"]
    assert (finding.state, finding.kernel, finding.agrees) == ("integers", "Convolution", True)
    assert finding.milliseconds is not None
    assert found.milliseconds is not None
    assert found.milliseconds > 0


@needs_openvino
def test_a_convolution_on_floats_is_proven_to_run_on_floats() -> None:
    text = "(float[1, 8, 8, 8] x, float[16, 8, 3, 3] w) => (float[1, 16, 6, 6] y) { y = Conv(x, w) }"
    subject = model(text)
    weight = subject.graph.inputs.pop()
    weight.const_value = ir.tensor(np.ones((16, 8, 3, 3), np.float32), name="w")
    subject.graph.register_initializer(weight)
    feeds = {"x": np.ones((1, 8, 8, 8), np.float32)}
    (kernel,) = [one for one in OpenVino().kernels(subject, feeds, threads=1, runs=2) if "Convolution" in one.op]
    assert kernel.reads[:2] == ("float32", "float32")
    assert kernel.milliseconds > 0


@needs_openvino
def test_a_quantized_product_is_proven() -> None:
    found = explain(ir.from_proto(product("MatMul")), target="openvino", threads=1)
    (finding,) = [one for one in found.findings if one.op == "MatMul"]
    assert finding.state == "integers"
    assert finding.kernel == "FullyConnected"


@needs_openvino
def test_what_openvino_does_is_predicted_on_a_real_model(shared: Path, tmp_path: Path) -> None:
    file = shared / "assets" / "models" / "digits_resnet.onnx"
    with np.load(shared / "assets" / "data" / "digits_train.npz") as arrays:
        images = next(arrays[name] for name in arrays.files if arrays[name].dtype.kind in "fu")[:16]
    name = graphopt.load(file).graph.inputs[0].name or ""
    data = {name: images.astype(np.float32)}
    result = graphopt.optimize(file, "quant:mode=static", data=data, target="openvino", output=tmp_path / "q.onnx")
    assert "openvino cpu, steps checked by onnxruntime cpu" in result.report.backend
    found = explain(tmp_path / "q.onnx", target="openvino", threads=1)
    assert found.agreement is not None
    right, judged = found.agreement
    assert right == judged > 0


# Beside another that checks steps


def test_a_plain_backend_needs_no_other() -> None:
    backend = OnnxRuntime()
    assert with_plain_runs(backend) is backend


@needs_openvino
def test_steps_are_checked_by_a_runtime_that_leaves_models_as_they_stand() -> None:
    both = with_plain_runs(OpenVino())
    assert isinstance(both, PlainRuns)
    assert isinstance(both, Inspectable)
    assert is_plain(both)
    assert both.describe() == "openvino cpu, steps checked by onnxruntime cpu"
    with both.open(model(), optimize=True) as optimized, both.open(model(), optimize=False) as plain:
        assert isinstance(optimized, OpenVinoSession)
        assert not isinstance(plain, OpenVinoSession)


@needs_openvino
def test_where_no_other_runtime_is_onnx_checks_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    for runtime in (OnnxRuntime, Torch):
        monkeypatch.setattr(runtime, "missing", lambda self: BackendError("not installed", hint="install it"))
    both = with_plain_runs(OpenVino())
    assert isinstance(both, PlainRuns)
    assert isinstance(both.plain_one, Reference)


@needs_openvino
def test_an_exact_pass_is_checked_bit_by_bit_and_a_wrong_one_is_not_let_through() -> None:
    result = graphopt.optimize(model(), "simplify", backend="openvino", output=None)
    assert result.report.ok
    assert result.report.backend.startswith("openvino cpu")


@needs_openvino
def test_a_model_openvino_refuses_is_refused_before_any_pass() -> None:
    """The runtime that checks steps takes it; what was asked for does not."""
    subject = model("(float[n, 3, 3] x) => (float[n] y) { y = Det(x) }")
    if _runs(OpenVino(), subject):
        pytest.skip("OpenVINO has learnt the operator")
    assert _runs(OnnxRuntime(), subject)
    with pytest.raises(BackendError, match="openvino cpu refuses the model"):
        graphopt.optimize(subject, "simplify", backend="openvino")


def _runs(backend: Backend, subject: ir.Model) -> bool:
    try:
        with backend.open(subject):
            return True
    except BackendError:
        return False
