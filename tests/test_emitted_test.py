"""`--emit-test`: a test that passes on its model, and fails once something is wrong with it."""

from __future__ import annotations

import ast
import errno
import json
import shlex
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

import graphopt
from graphopt import optimization, registry, walk
from graphopt.backends import targets
from graphopt.comparison import OutputError
from graphopt.errors import BackendError, DataError, UsageError
from graphopt.evaluation import nudged
from graphopt.plain_runs import PlainRuns
from graphopt.regression import emitted_test, recorded_runs
from graphopt.regression.emitted_text import About, Facts, as_python
from graphopt.regression.output_bounds import Bound, Noise, bound, lossy_bound
from graphopt.regression.recorded_model import RecordedModel, place_of
from graphopt.request import Request

from .command_line import contents, run
from .mutants import MUTANTS

pytest.importorskip("onnxruntime")

ROOT = Path(__file__).resolve().parent.parent
# What each mutant must be noticed by, at least.
NOTICED_BY = {
    "weight perturbed": "outputs_are_as_recorded",
    "bias lost": "outputs_are_as_recorded",
    "operands swapped": "outputs_are_near_the_originals",
    "quantization dropped": "operators_in_integers",
    "size doubled": "size",
    "output renamed": "inputs_and_outputs",
    "dtype changed": "inputs_and_outputs",
    "input shape fixed": "inputs_and_outputs",
    "zero point wrong": "outputs_are_as_recorded",
    "axis wrong": "outputs_are_near_the_originals",
}
TESTS = {
    "inputs_and_outputs",
    "outputs_are_as_recorded",
    "outputs_are_near_the_originals",
    "operators_in_integers",
    "size",
}


def network() -> onnx.ModelProto:
    """Return ``image`` [batch, 3, 8, 8] to ``shares`` [batch, 5]: two Conv, a Gemm, a Sub and a Softmax."""
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((16, 3, 3, 3)) / 5,
        "b1": rng.standard_normal(16) / 4,
        "w2": rng.standard_normal((16, 16, 3, 3)) / 12,
        "b2": rng.standard_normal(16) / 4,
        "w3": rng.standard_normal((16, 5)),
        "b3": rng.standard_normal(5),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1", "b1"], ["c1"], "first", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c1"], ["r1"], "relu"),
        helper.make_node("Conv", ["r1", "w2", "b2"], ["c2"], "second", pads=[1, 1, 1, 1]),
        helper.make_node("Relu", ["c2"], ["r2"], "relu2"),
        helper.make_node("GlobalAveragePool", ["r2"], ["pooled"], "pool"),
        helper.make_node("Flatten", ["pooled"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "w3", "b3"], ["logits"], "head"),
        helper.make_node("ReduceMean", ["logits"], ["mean"], "mean", axes=[-1]),
        helper.make_node("Sub", ["logits", "mean"], ["centred"], "centre"),
        helper.make_node("Softmax", ["centred"], ["shares"], "softmax", axis=-1),
    ]
    graph = helper.make_graph(
        nodes,
        "network",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, ["batch", 3, 8, 8])],
        [helper.make_tensor_value_info("shares", TensorProto.FLOAT, ["batch", 5])],
        [numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the network, data, the network in integers and its test."""
    folder = tmp_path_factory.mktemp("emitted")
    onnx.save(network(), folder / "net.onnx")
    images = np.random.default_rng(1).standard_normal((64, 3, 8, 8)).astype(np.float32)
    np.savez(folder / "data.npz", image=images)
    graphopt.optimize(
        folder / "net.onnx",
        "quant:mode=static",
        data=folder / "data.npz",
        output=folder / "int8.onnx",
        emit_test=folder / "test_int8.py",
    )
    return folder


def outcomes(folder: Path) -> dict[tuple[str, str], str]:
    """Run every test below a folder: (its folder, its name without `test_`) to what it failed with, or nothing."""
    report = folder / "report.xml"
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", "--import-mode=importlib"]
    done = subprocess.run(
        [*command, "--rootdir", str(folder), f"--junitxml={report}", str(folder)],
        cwd=folder,
        capture_output=True,
        text=True,
    )
    assert done.returncode in (0, 1), done.stdout + done.stderr
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        faults = [one.text or "" for one in case if one.tag in ("failure", "error")]
        place = (case.get("classname") or "").split(".")[0]
        found[place, (case.get("name") or "").removeprefix("test_")] = "\n".join(faults)
    return found


@pytest.fixture(scope="module")
def judged(home: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], str]:
    """Return what the test says of its model and of each mutant."""
    folder = tmp_path_factory.mktemp("mutants")
    for number, mutate in enumerate([None, *MUTANTS.values()]):
        place = folder / f"m{number}"
        shutil.copytree(home, place)
        if mutate is not None:
            model = onnx.load(place / "int8.onnx")
            mutate(model)
            onnx.save(model, place / "int8.onnx")
    return outcomes(folder)


def test_it_passes_on_the_model_it_came_from(judged: dict[tuple[str, str], str]) -> None:
    assert {name: fault for (place, name), fault in judged.items() if place == "m0"} == dict.fromkeys(TESTS, "")


@pytest.mark.parametrize("name", MUTANTS)
def test_it_fails_on_a_mutant(name: str, judged: dict[tuple[str, str], str]) -> None:
    place = f"m{list(MUTANTS).index(name) + 1}"
    failed = {test for (where, test), fault in judged.items() if where == place and fault}
    assert NOTICED_BY[name] in failed


def emit(folder: Path, passes: str = "simplify", name: str = "test_net.py", **options: Any) -> Path:
    """Optimize the network in a folder with its test, and return the test."""
    if not (folder / "net.onnx").exists():
        onnx.save(network(), folder / "net.onnx")
    result = graphopt.optimize(
        folder / "net.onnx", passes, output=folder / "out.onnx", emit_test=folder / name, **options
    )
    assert result.test == folder / name
    return result.test


def test_test_of_a_lossless_run_holds_it_to_the_original(tmp_path: Path) -> None:
    text = emit(tmp_path).read_text()
    assert 'model.assert_outputs("original", OFF_THE_ORIGINAL)' in text
    assert "OFF_THE_RECORD" not in text
    assert "IN_INTEGERS" not in text
    assert "(made-up inputs)" in text
    assert {side for run in recorded_runs.read(tmp_path / "test_net.npz") for side in run.outputs} == {"original"}


def test_command_in_the_test_makes_it_again(home: Path, tmp_path: Path) -> None:
    [line] = [line for line in (home / "test_int8.py").read_text().splitlines() if line.startswith("#     graphopt")]
    words = [word.replace(str(home), str(tmp_path)) for word in shlex.split(line.removeprefix("#     graphopt"))]
    for name in ("net.onnx", "data.npz"):
        shutil.copy(home / name, tmp_path)
    outcome = run(*words)
    assert outcome.code == 0, outcome.err
    assert outcome.out.splitlines()[-1] == f"wrote {tmp_path / 'int8.onnx'}   test: {tmp_path / 'test_int8.py'}"
    assert (tmp_path / "test_int8.npz").read_bytes() == (home / "test_int8.npz").read_bytes()
    texts = [(folder / "test_int8.py").read_text().partition("from pathlib")[2] for folder in (home, tmp_path)]
    assert texts[0] == texts[1]


def test_test_of_data_in_memory_names_no_command(tmp_path: Path) -> None:
    images = {"image": np.random.default_rng(1).standard_normal((8, 3, 8, 8)).astype(np.float32)}
    text = emit(tmp_path, data=images).read_text()
    assert "graphopt optimize " not in text.replace("graphopt optimize --emit-test", "")
    assert "(2 of 2 samples of `data`, not calibrated on)" in text


@pytest.mark.parametrize(
    "arguments", [("check", "--select=E,F,W,I,B,UP", "--ignore=E501", "--target-version=py311"), ("format", "--check")]
)
def test_test_is_formatted_as_people_do(home: Path, arguments: tuple[str, ...]) -> None:
    command = [sys.executable, "-m", "ruff", *arguments, "--isolated", str(home / "test_int8.py")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_own_test_is_written_anew_and_no_other(tmp_path: Path) -> None:
    first = emit(tmp_path).read_text()
    assert emit(tmp_path).read_text() == first
    (tmp_path / "test_net.py").write_text("def test_mine(): pass\n")
    with pytest.raises(UsageError, match=r"test_net.py` was not written by graphopt"):
        emit(tmp_path)
    assert (tmp_path / "test_net.py").read_text() == "def test_mine(): pass\n"


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("net.py", "pytest would not find the test"),
        ("test_net.txt", "pytest would not find the test"),
        ("nowhere/test_net.py", "the folder of test .* does not exist"),
        ("test_data.py", r"its record `test_data\.npz`, is the model or its data"),
        ("test_foreign.py", r"test_foreign.npz` was not written by graphopt"),
        ("test_folder.py", "is no regular file"),
    ],
)
def test_place_that_does_not_do_is_refused_before_any_work(
    name: str, error: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "test_data.npz", image=np.zeros((4, 3, 8, 8), np.float32))
    (tmp_path / "test_foreign.npz").write_bytes(b"")
    (tmp_path / "test_folder.py").mkdir()
    onnx.save(network(), tmp_path / "net.onnx")
    before = contents(tmp_path)
    monkeypatch.setattr(optimization.Run, "open_judge", lambda _: pytest.fail("work was begun"))
    with pytest.raises(UsageError, match=error) as caught:
        emit(tmp_path, name=name, data=tmp_path / "test_data.npz")
    assert caught.value.hint
    assert contents(tmp_path) == before


def test_test_without_a_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="is no file"):
        emitted_test.EmittedTest(Path(""), tmp_path / "out.onnx")


def test_test_without_a_model_is_refused(tmp_path: Path) -> None:
    onnx.save(network(), tmp_path / "net.onnx")
    with pytest.raises(UsageError, match="would have no model to test"):
        graphopt.optimize(tmp_path / "net.onnx", "simplify", emit_test=tmp_path / "test_net.py")


RANDOM = """
<ir_version: 9, opset_import: ["" : 17]>
noisy (float[4] x) => (float[4] y) { r = RandomNormalLike(x) y = Add(x, r) }
"""


def test_model_of_random_outputs_is_refused(tmp_path: Path) -> None:
    onnx.save(onnx.parser.parse_model(RANDOM), tmp_path / "net.onnx")
    with pytest.raises(BackendError, match="no test can be written: the original's outputs are random"):
        emit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def test_failed_run_leaves_no_test(home: Path, tmp_path: Path) -> None:
    asked = ("--passes", "prune:sparsity=0.9", "--data", home / "data.npz", "--budget", "sqnr_db=1", "--keep-failed")
    places = ("-o", tmp_path / "out.onnx", "--emit-test", tmp_path / "test_net.py")
    outcome = run("optimize", home / "net.onnx", *asked, *places)
    assert outcome.code == 1
    assert "test: none, the run failed" in outcome.out
    assert [path.name for path in tmp_path.iterdir()] == ["out.onnx"]


def test_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> bytes:
        raise OSError(errno.ENOSPC, "no space left")

    onnx.save(network(), tmp_path / "net.onnx")

    class NoSpace(emitted_test.StagedFiles):
        open = full

    monkeypatch.setattr(emitted_test, "StagedFiles", NoSpace)
    with pytest.raises(UsageError, match=r"cannot write test .*: no space left"):
        emit(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["net.onnx"]


def noise(max_abs: float, sqnr_db: float, *, dtype: str = "float32", peak: float = 10.0) -> Noise:
    return Noise(dtype, peak, max_abs, sqnr_db)


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        (noise(0.0, 200.0), Bound(0.00201, 73.9)),  # rounding of float32
        (noise(0.5, 40.0), Bound(1.0, 33.9)),  # twice what was measured
        (noise(0.0, 200.0, dtype="int64"), Bound(0.0)),
        (noise(1.0, 30.0, dtype="uint8"), Bound(2.0)),
        (noise(0.0, 200.0, peak=1e-6), Bound(1.01e-05)),  # so small that no ratio means anything
        (noise(float("inf"), float("-inf")), Bound()),
    ],
)
def test_bound_of_what_was_measured(measured: Noise, expected: Bound) -> None:
    assert bound(measured) == expected


def test_bound_against_the_original_leaves_room_for_both() -> None:
    steady = Bound(1.0, 20.0)
    found = lossy_bound(noise(0.1, 60.0), steady)
    assert found.max_abs_error == pytest.approx(1.1)
    assert found.sqnr_db is not None
    assert found.sqnr_db < 20.0
    assert lossy_bound(noise(2.0, 20.0), Bound(0.001, 73.9)) == Bound(3.0, 16.4)


def test_large_outputs_are_kept_by_some_elements(tmp_path: Path) -> None:
    feeds = [{"x": np.float32([1.0])}]
    outputs = [{"y": np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32), "n": np.int64(3)}]
    runs = recorded_runs.record(feeds, {"model": outputs}, most=1 << 14)
    (tmp_path / "r.npz").write_bytes(recorded_runs.to_bytes(runs))
    read = recorded_runs.read(tmp_path / "r.npz")
    assert read[0].outputs["model"]["y"].values.nbytes <= 1 << 14
    assert read[0].outputs["model"]["y"].stride % 2 == 1
    assert all(error.equal for error in recorded_runs.errors(read, "model", outputs).values())
    moved = [{**outputs[0], "y": outputs[0]["y"] + np.float32(0.5)}]
    assert recorded_runs.errors(read, "model", moved)["y"].max_abs == pytest.approx(0.5, rel=1e-3)
    assert recorded_runs.errors(read, "model", [{"y": outputs[0]["y"][:1]}])["n"].mismatch == "it is not there any more"


def test_outputs_that_are_no_tensors_are_kept(tmp_path: Path) -> None:
    outputs = {
        "parts": [np.float32([1]), np.float32([2, 3])],
        "votes": {"cat": 0.25, "dog": 0.75},
        "words": np.array(["a", "b"], dtype=object),
        "nothing": None,
        "half": np.array([1.5], ml_dtypes.bfloat16),
    }
    (tmp_path / "r.npz").write_bytes(recorded_runs.to_bytes(recorded_runs.record([{}], {"model": [outputs]})))
    read = recorded_runs.read(tmp_path / "r.npz")
    assert all(error.equal for error in recorded_runs.errors(read, "model", [outputs]).values())
    changed = {**outputs, "parts": [np.float32([1])], "words": np.array(["a", "c"], dtype=object)}
    found = recorded_runs.errors(read, "model", [changed])
    assert {name for name, error in found.items() if not error.equal} == {"parts[1]", "words"}


def test_model_with_a_data_file(tmp_path: Path) -> None:
    """The size is that of both files, and the test is of the model that has both."""
    model = network()
    onnx.save(model, tmp_path / "net.onnx", save_as_external_data=True, location="weights", size_threshold=0)
    emit(tmp_path)
    record = RecordedModel(tmp_path / "out.onnx", tmp_path / "test_net.npz")
    size = sum((tmp_path / name).stat().st_size for name in ("out.onnx", "out.onnx.data"))
    record.assert_size(size)
    with pytest.raises(AssertionError, match=f"takes {size:,} bytes"):
        record.assert_size(size - 1)
    record.assert_outputs("original", {"shares": Bound(1e-5)})
    with pytest.raises(AssertionError, match="`other`: not among the recorded outputs\n  `shares`: no bound for it"):
        record.assert_outputs("original", {"other": Bound()})


def test_where_runs_repeat_nothing_but_rounding_is_allowed(home: Path, tmp_path: Path) -> None:
    model = onnx.load(home / "int8.onnx")
    MUTANTS["weight perturbed"](model)
    onnx.save(model, tmp_path / "mutant.onnx")
    loose = {"shares": Bound(max_abs_error=1.0)}
    mutant = RecordedModel(tmp_path / "mutant.onnx", home / "test_int8.npz")
    mutant.assert_outputs("model", loose, repeats_on="another machine")
    with pytest.raises(AssertionError, match="which is no rounding, and runs repeat"):
        mutant.assert_outputs("model", loose, repeats_on=mutant.place)
    RecordedModel(home / "int8.onnx", home / "test_int8.npz").assert_outputs("model", loose, repeats_on=mutant.place)


@pytest.mark.parametrize(("max_abs", "repeats_on"), [(0.5, "a runtime 1.0 on a processor"), (0.0, None)])
def test_place_where_runs_repeat_is_named(max_abs: float, repeats_on: str | None) -> None:
    about = About("out.onnx", "test_out.npz", "net.onnx", "made-up inputs", "cpu", "runtime", None, {"graphopt": "1"})
    one = {"y": noise(max_abs, 40.0)}
    text = as_python(about, Facts(["x: float [1]"], ["y: float [1]"], one, repeats_on, one, {}, 1000))
    compile(text, "test_out.py", "exec")
    assert ("repeats_on=REPEATS_ON" in text) is (repeats_on is not None)
    assert 'BACKEND = "runtime"' in text
    assert "backend=BACKEND" in text


def test_runtime_with_another_beside_it_is_told_as_it_runs_in_the_test(home: Path, tmp_path: Path) -> None:
    files = [Path(shutil.copy(home / "int8.onnx", tmp_path))]
    runtime = registry.backend("onnxruntime")
    subject = emitted_test.Subject(
        original=graphopt.load(home / "net.onnx"),
        model=graphopt.load(files[0]),
        files=files,
        name="net",
        feeds=[one.feeds for one in recorded_runs.read(home / "test_int8.npz")],
        inputs="some",
        target="ort-cpu-x86",
        backend=PlainRuns(runtime, registry.backend("reference")),
        backend_text=None,
        lossless=False,
        command=None,
    )
    with emitted_test.EmittedTest(tmp_path / "test_int8.py", files[0]) as emitted:
        emitted.stage(subject)
        text = emitted.publish().read_text()
    assert f", {place_of(runtime).partition(' on ')[0]}, for target" in " ".join(text.replace("\n# ", " ").split())
    assert ("REPEATS_ON" not in text) or (f'REPEATS_ON = "{place_of(runtime)}"' in text)


def test_any_file_name_is_written_as_python() -> None:
    name = 'o"ut \\N "quoted""" é.onnx'
    about = About(f"../{name}", "test_out.npz", name, "made-up inputs", "cpu", None, f"graphopt {name}", {})
    facts = Facts(["x: float [1]"], ["y: float [1]"], {"y": noise(0.5, 40.0)}, None, None, {}, 1000)
    said = ast.get_docstring(ast.parse(as_python(about, facts)))
    assert said == f"`{name}` does what it did when graphopt wrote it."


def test_processors_of_one_name_that_can_do_other_things_are_other_places(monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = registry.backend("onnxruntime")
    places = []
    for flags in ({"avx2"}, {"avx2", "avx512_vnni"}):
        monkeypatch.setattr(targets, "_cpu_flags", lambda flags=flags: flags)
        places.append(place_of(runtime))
    assert len(set(places)) == 2


def test_bound_that_asks_for_nothing_still_asks_for_the_shape() -> None:
    moved, other = OutputError("y"), OutputError("y")
    moved.update(np.float32([1, np.nan]), np.float32([np.nan, 1]))
    other.update(np.float32([1]), np.float32([1, 2]))
    assert Bound().fault(moved) is None
    assert Bound(1.0).fault(moved) is not None
    assert Bound().fault(other) == "float32[1] against float32[2]"


EXACT_FLOATS = """
<ir_version: 9, opset_import: ["" : 17]>
powers (float[2] x) => (float[2] y)
<float two = {2}, float[2] mask = {-3.4028234e38, 0}, float[2] w = {0.5, -4}>
{ p = Pow(x, two) m = Add(p, mask) y = Mul(m, w) }
"""


def test_nudge_moves_weights_and_nothing_that_must_be_exact() -> None:
    """A negative number to the power of 2.00001 is no number, and the lowest number grown by a bit is infinite."""
    model = ir.from_proto(onnx.parser.parse_model(EXACT_FLOATS))
    before, after = (
        {value.name: walk.constant_tensor(value).numpy() for value in walk.initializers(one)}
        for one in (model, nudged(model, 1e-3))
    )
    assert after["two"] == 2
    assert (after["mask"] == before["mask"]).all()
    assert (after["w"] != before["w"]).all()
    assert np.allclose(after["w"], before["w"], rtol=1e-3)


def test_model_in_memory(tmp_path: Path) -> None:
    model = graphopt.ir.from_proto(network())
    result = graphopt.optimize(
        model, "simplify", output=tmp_path / "out.onnx", emit_test=tmp_path / "test_out.py", verify="off", timed=False
    )
    assert result.report.after is not None
    assert result.report.after.latency_ms is None
    assert "# of `network`, with graphopt" in (tmp_path / "test_out.py").read_text()


def test_model_that_is_gone_is_said(home: Path) -> None:
    with pytest.raises(graphopt.GraphoptError, match=r"gone\.onnx"):
        RecordedModel(home / "gone.onnx", home / "test_int8.npz")
    with pytest.raises(DataError, match="there is no file") as caught:
        RecordedModel(home / "int8.onnx", home / "gone.npz")
    assert caught.value.__notes__ == [f"hint: {caught.value.hint}"]


def test_request_of_a_test_runs_models_and_is_no_option_to_repeat() -> None:
    request = Request(model="m.onnx", passes="quant", emit_test=Path("test_m.py"))
    assert "emit_test" not in json.dumps(request.plain_options)
    assert not request.runs_nothing
    assert not Request(model="m.onnx", passes="quant", emit_test=Path("test_m.py"), verify="off").runs_nothing
