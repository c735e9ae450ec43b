"""Backends: two judges of one protocol, and clear words where one cannot run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest

import graphopt
from graphopt import registry
from graphopt.backend import is_timed
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.reference import Reference
from graphopt.choices import find_backend
from graphopt.errors import BackendError, UsageError

pytest.importorskip("onnxruntime")

TEXT = """<ir_version: 8, opset_import: ["": 17]>
agraph (float[n, 2] x, float[2] w) => (float[n, 2] y, float[n, 2] z) <float[2] w = {1.0, 2.0}> {
  y = Add(x, w)
  z = Relu(y)
}"""
FEED = {"x": np.array([[1.0, -5.0]], np.float32)}


def model() -> ir.Model:
    return ir.from_proto(onnx.parser.parse_model(TEXT))


@pytest.mark.parametrize("backend", [OnnxRuntime(), Reference()], ids=lambda backend: backend.name)
@pytest.mark.parametrize("from_file", [False, True])
def test_both_backends_run_a_model_in_memory_and_from_a_file(
    backend: OnnxRuntime | Reference, from_file: bool, tmp_path: Path
) -> None:
    subject: ir.Model | Path = model()
    if from_file:
        graphopt.save(subject, tmp_path / "m.onnx")
        subject = tmp_path / "m.onnx"
    with backend.open(subject) as session:
        assert list(session.input_names) == ["x"]  # w has a default
        assert list(session.output_names) == ["y", "z"]
        outputs = session.run(FEED)
    assert outputs["y"].tolist() == [[2.0, -3.0]]
    assert outputs["z"].tolist() == [[2.0, 0.0]]


@pytest.mark.parametrize("backend", [OnnxRuntime(), Reference()], ids=lambda backend: backend.name)
def test_a_default_input_can_be_fed(backend: OnnxRuntime | Reference) -> None:
    with backend.open(model()) as session:
        outputs = session.run({**FEED, "w": np.array([0.0, 0.0], np.float32)})
    assert outputs["y"].tolist() == [[1.0, -5.0]]


@pytest.mark.parametrize("backend", [OnnxRuntime(), Reference()], ids=lambda backend: backend.name)
def test_a_missing_feed_is_one_line(backend: OnnxRuntime | Reference) -> None:
    with backend.open(model()) as session, pytest.raises(BackendError) as caught:
        session.run({})
    assert "\n" not in caught.value.message


def test_a_model_the_runtime_refuses_is_one_line() -> None:
    broken = model()
    broken.graph[1].op_type = "NoSuchOp"
    with pytest.raises(BackendError, match="refuses the model"):
        OnnxRuntime().open(broken)


def test_large_weights_are_read_where_they_lie() -> None:
    """A weight over the inline limit reaches the runtime as the array itself."""
    text = '<ir_version: 8, opset_import: ["": 17]> agraph (float[2, 64] x, float[64, 64] w) => (float[2, 64] y) '
    subject = ir.from_proto(onnx.parser.parse_model(text + "{ y = MatMul(x, w) }"))
    weight = subject.graph.inputs.pop()
    content = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    weight.const_value = ir.tensor(content, name="w")
    subject.graph.register_initializer(weight)
    x = np.ones((2, 64), np.float32)
    for optimize in (False, True):
        with OnnxRuntime().open(subject, optimize=optimize) as session:
            np.testing.assert_allclose(session.run({"x": x})["y"], x @ content, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("optimize", [False, True])
def test_a_large_weight_nothing_reads_is_no_obstacle(optimize: bool) -> None:
    subject = model()
    weight = ir.Value(name="unread", const_value=ir.tensor(np.zeros((64, 64), np.float32), name="unread"))
    subject.graph.register_initializer(weight)
    with OnnxRuntime().open(subject, optimize=optimize) as session:
        assert session.run(FEED)["y"].tolist() == [[2.0, -3.0]]


def test_the_profile_lands_where_asked(tmp_path: Path) -> None:
    with OnnxRuntime().open(model(), profile=tmp_path / "profile") as session:
        session.run(FEED)
        file = session.end_profiling()
    assert file.parent == tmp_path
    assert "Add" in file.read_text()


def test_the_reference_has_no_profiler(tmp_path: Path) -> None:
    with pytest.raises(BackendError, match="no profiler"):
        Reference().open(model(), profile=tmp_path / "profile")


def test_without_onnxruntime_the_message_says_what_to_install() -> None:
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "from graphopt.backends import onnxruntime_library\n"
        "from graphopt.backends.onnxruntime import OnnxRuntime\n"
        "onnxruntime_library.installed_packages = dict\n"
        "print(OnnxRuntime().missing().hint)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'graphopt[cpu]'" in done.stdout


def test_unknown_backends_and_options_are_usage_errors() -> None:
    with pytest.raises(UsageError) as caught:
        registry.backend("onnxruntim")
    assert "did you mean `onnxruntime`?" in (caught.value.hint or "")
    with pytest.raises(UsageError, match="cannot be `cdua`"):
        registry.backend("onnxruntime:provider=cdua")
    with pytest.raises(UsageError, match=r"`session\.load` is no configuration entry"):
        registry.backend("onnxruntime:config=session.load")


def test_configuration_entries_reach_the_session(tmp_path: Path) -> None:
    backend = registry.backend("onnxruntime:config=session.disable_prepacking=1+session.intra_op.allow_spinning=0")
    assert backend.config == ("session.disable_prepacking=1", "session.intra_op.allow_spinning=0")
    with backend.open(model()) as session:
        assert session._session.get_session_options().get_session_config_entry("session.disable_prepacking") == "1"


def test_every_target_names_an_installed_backend_and_provider() -> None:
    for name, target in registry.table("TARGETS").items():
        assert target.name == name
        assert find_backend(None, target, must_run=False).describe()


def test_the_host_target_is_known() -> None:
    assert registry.host_target() in registry.table("TARGETS")


def test_a_runtime_is_worth_timing_unless_it_says_otherwise() -> None:
    class Stranger(OnnxRuntime):
        """What says nothing of its time."""

    class Slow(OnnxRuntime):
        timed = False

    assert is_timed(Stranger())
    assert not is_timed(Slow())
    assert not is_timed(Reference())


def test_reference_dequantizes_at_every_opset_that_can() -> None:
    results = []
    for opset in (13, 18, 19, 21):
        model = onnx.parser.parse_model(f"""
        <ir_version: 8, opset_import: ["" : {opset}]>
        g (float[2,3] x) => (float[2,3] y) <float[3] s = {{0.1, 0.2, 0.4}}, int8[3] z = {{1, 0, -2}}> {{
          q = QuantizeLinear <axis = 1> (x, s, z)
          y = DequantizeLinear <axis = 1> (q, s, z)
        }}""")
        with Reference().open(ir.from_proto(model)) as session:
            results.append(session.run({"x": np.array([[0.26, -1, 3], [0.11, 0.5, -8]], np.float32)})["y"])
    np.testing.assert_allclose(results[0], [[0.3, -1, 3.2], [0.1, 0.4, -8]], rtol=1e-6)
    for other in results[1:]:
        np.testing.assert_array_equal(results[0], other)
