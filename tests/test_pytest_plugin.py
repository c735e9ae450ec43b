"""The pytest plugin: its fixtures, golden files under several workers, and that it leaves other suites alone."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

import graphopt
from graphopt.errors import DataError, UsageError
from graphopt.regression.golden_files import Golden, array_difference, file_stem
from graphopt.regression.stored_arrays import pack, unpack
from graphopt.testing import assert_equivalent, optimized_into

from .command_line import classifier, run, samples
from .test_docs import ROOT, blocks, workplace

pytest.importorskip("onnxruntime")


def run_pytest(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run tests in a folder in a process of their own, warnings as errors."""
    command = [sys.executable, "-m", "pytest", "-W", "error", "-p", "no:cacheprovider", "--rootdir", str(folder)]
    given = {**os.environ, **environment}
    return subprocess.run([*command, *arguments], cwd=folder, capture_output=True, text=True, env=given)


def write(folder: Path, files: Mapping[str, str]) -> Path:
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


STRANGER = {
    "test_light.py": """
import sys
HEAVY = ("graphopt.errors", "graphopt.testing", "numpy", "onnx", "onnx_ir", "onnxruntime", "rich", "typer")
def test_nothing_is_loaded():
    assert [name for name in HEAVY if name in sys.modules] == []
""",
    "conftest.py": """
import pytest
@pytest.fixture
def optimized():
    return "the suite's own"
""",
    "test_own.py": """
def test_fixture_of_the_suite(optimized):
    assert optimized == "the suite's own"
def test_fixture_of_another_plugin(golden):
    assert golden == "the other plugin's"
""",
}


def test_other_suites_are_left_alone(tmp_path: Path) -> None:
    site = write(
        tmp_path / "site",
        {
            "other_plugin.py": 'import pytest\n@pytest.fixture\ndef golden():\n    return "the other plugin\'s"\n',
            "other-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: other\nVersion: 1.0\n",
            "other-1.0.dist-info/entry_points.txt": "[pytest11]\nother = other_plugin\n",
        },
    )
    suite = write(tmp_path / "suite", STRANGER)
    done = run_pytest(suite, "-q", "-n0", PYTHONPATH=str(site))
    assert "3 passed" in done.stdout, done.stdout + done.stderr


SUITE = """
import numpy as np
import os
import pytest

SHIFT = float(os.environ.get("SHIFT", 0))

@pytest.mark.parametrize("word", ["plain", "a/b", "a_b", "sea cow"])
def test_values(golden, word):
    golden(np.arange(6.0).reshape(2, 3) + SHIFT)
    golden(f"{word}\\nsecond line {SHIFT}\\n", "text")

class TestGroup:
    def test_json(self, golden):
        golden({"mean": np.float32(1.5 + SHIFT), "names": ["a", "b"]}, rtol=1e-3)
"""


def test_golden_files_of_several_workers(tmp_path: Path) -> None:
    """Written by two workers, each is whole and listed; values that moved are shown."""
    write(tmp_path, {"test_some.py": SUITE})
    updated = run_pytest(tmp_path, "-q", "-n2", "--graphopt-update")
    assert "5 passed" in updated.stdout, updated.stdout + updated.stderr
    assert "wrote golden/test_some/TestGroup.test_json.json" in updated.stdout
    assert "9 written" in updated.stdout
    files = sorted(path.name for path in (tmp_path / "golden" / "test_some").iterdir())
    assert len(files) == 9
    assert {"test_values.plain.npz", "test_values.plain@text.txt"} <= set(files)

    moved = run_pytest(tmp_path, "-q", "-n0", SHIFT="0.5")
    assert "5 failed" in moved.stdout
    assert "value: 6 of 6 elements differ, by 0.5 at most" in moved.stdout
    assert '-  "mean": 1.5,' in moved.stdout
    assert "hint: `pytest --graphopt-update`" in moved.stdout


def test_golden_texts_are_no_doctests(tmp_path: Path) -> None:
    body = 'def test_help(golden):\n    golden(">>> 1 / 0\\n")\n'
    write(tmp_path, {"test_some.py": body, "golden/test_guide.txt": ">>> 1 + 1\n2\n"})
    assert run_pytest(tmp_path, "-q", "-n0", "--graphopt-update").returncode == 0
    done = run_pytest(tmp_path, "-q", "-n0")
    assert "2 passed" in done.stdout, "the test, and the guide, which is nobody's golden file"


@pytest.fixture
def keep(tmp_path: Path) -> Any:
    """Write a value as golden, and return what compares others with it."""

    def compare(stored: Any, now: Any, **tolerance: float) -> None:
        Golden(tmp_path, "one", update=True)(stored)
        Golden(tmp_path, "one")(now, **tolerance)

    return compare


@pytest.mark.parametrize(
    "value",
    [
        "text\n",
        "a bar\rdrawn anew\r\n\ud800",
        np.arange(3, dtype=">f4"),
        np.array([b"a", b"bcd"]),
        np.array(["2020-01-01"], "M8[D]"),
        np.zeros(2, [("a", "f4"), ("b", "i8")]),
        np.float32([[1, np.nan], [-np.inf, -0.0]]),
        np.array([1.5, -2], ml_dtypes.bfloat16),
        np.array([[1, -8]], ml_dtypes.int4),
        np.array(["a", "ü"], dtype=object),
        np.zeros((0, 3), np.int64),
        np.array(True),
        {"file": np.arange(3), "a/b:0": np.float16([1])},
        {"count": np.int64(3), "list": [1.5, None, "x"], "path": Path("a/b")},
    ],
    ids=repr,
)
def test_value_is_kept(value: Any, keep: Any) -> None:
    keep(value, value)


@pytest.mark.parametrize(
    ("stored", "now", "said"),
    [
        ("a\nb\n", "a\nc\n", r"-b\n\+c"),
        (np.zeros(3), np.zeros(4), r"float64\[3\] stored, float64\[4\] now"),
        (np.zeros(3), np.zeros(3, np.float32), "float64"),
        (np.zeros(2), np.array([0, -0.0]), "1 of 2 elements differ"),
        (np.array([2**53]), np.array([2**53 + 1]), "1 of 1 elements differ"),
        (np.zeros(2), np.array([0, np.nan]), r"at \[1\]: 0.0 stored, nan now"),
        (np.array(["a"], dtype=object), np.array(["b"], dtype=object), r"at \[0\]: a stored, b now"),
        (np.zeros(1, [("a", "f4")]), np.ones(1, [("a", "f4")]), r"at \[0\]: \(0.0,\) stored, \(1.0,\) now"),
        ({"a": np.zeros(1)}, {"b": np.zeros(1)}, "a: only stored\n  b: only now"),
        ({"a": 1}, {"a": 2}, '-  "a": 1'),
        ([1, 2], [1, 2, 3], r"\+  3"),
        ({"a": 1}, {"a": True}, '-  "a": 1'),
        (np.zeros(100), np.ones(100), "100 of 100 elements differ, by 1 at most"),
    ],
)
def test_difference_is_shown(stored: Any, now: Any, said: str, keep: Any) -> None:
    with pytest.raises(AssertionError, match=said):
        keep(stored, now)


@pytest.mark.parametrize(("stored", "now"), [(np.float32([1, 2]), np.float32([1, 2.0001])), ([1.0], [1.0001])])
def test_tolerance_is_for_floats(stored: Any, now: Any, keep: Any) -> None:
    keep(stored, now, rtol=1e-3)
    with pytest.raises(AssertionError):
        keep(stored, now, rtol=1e-6)
    assert array_difference(np.array([1000]), np.array([1001]), rtol=0.1)


def test_model_is_kept_as_text(keep: Any) -> None:
    model = ir.from_proto(classifier())
    keep(model, model)
    keep(model, classifier())
    with pytest.raises(AssertionError, match=r"-w1 = .* crc32 \w+\n"):
        keep(model, ir.from_proto(classifier(seed=1)))


def test_golden_is_refused_what_it_cannot_keep(tmp_path: Path) -> None:
    golden = Golden(tmp_path, "one", update=True)
    with pytest.raises(UsageError, match="cannot be a `object`") as refused:
        golden(object())
    assert refused.value.__notes__ == ["hint: text, arrays, a model, or values that JSON has"], "pytest shows notes"
    with pytest.raises(UsageError, match="a golden array cannot hold objects"):
        golden(np.array([object()]))
    golden(1)
    with pytest.raises(UsageError, match="is used twice in one test"):
        golden(2)
    assert [path.name for path in tmp_path.iterdir()] == ["one.json"]


def test_golden_that_is_missing_or_as_it_was(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match=r"there is no golden file `.*one\.json`\nhint: "):
        Golden(tmp_path / "none", "one")(1)
    assert not (tmp_path / "none").exists()
    first, second = (Golden(tmp_path, "one", update=True) for _ in range(2))
    first(np.float32([1.0]))
    second(np.float32([1.0001]), rtol=1e-3)
    assert (len(first.written), second.written) == (1, [])


def test_stored_arrays_are_the_same_bytes_each_time(tmp_path: Path) -> None:
    arrays = {"a": np.arange(3), "b": np.array([1], ml_dtypes.bfloat16)}
    assert pack(arrays) == pack(arrays)
    (tmp_path / "x.npz").write_bytes(b"nothing of the sort")
    for name, said in (("x.npz", "holds no arrays"), ("y.npz", "there is no file")):
        with pytest.raises(DataError, match=said):
            unpack(tmp_path / name)


def test_file_stems_are_told_apart() -> None:
    names = ["a/b", "a_b", "a b", "x" * 300, "x" * 301, "plain"]
    stems = [file_stem(name) for name in names]
    assert len(set(stems)) == len(names)
    assert file_stem("plain") == "plain"
    assert max(map(len, stems)) < 120


def test_fixtures_on_a_model(
    tmp_path: Path,
    optimized: Any,
    assert_equivalent: Any,  # the plugin's, over the function of that name
) -> None:
    source = tmp_path / "net.onnx"
    onnx.save(classifier(), source)
    result = optimized(source, "simplify")
    assert result.output.is_file()
    assert result.output != source
    assert result.report.after.latency_ms is None  # nobody looks at it
    found = assert_equivalent(source, result, samples(8))
    assert found.samples == 8
    with pytest.raises(graphopt.GraphoptError) as caught:
        optimized(source, "simplyfy")
    assert any("did you mean" in note for note in caught.value.__notes__)


def test_models_that_are_not_equivalent(tmp_path: Path) -> None:
    a, b = classifier(), classifier(seed=1)
    with pytest.raises(AssertionError, match=r"`scores`: off by .* dB, .* of rows agree; rounding of its dtype"):
        assert_equivalent(a, b)
    assert_equivalent(a, b, tolerance=1e3)
    with pytest.raises(AssertionError, match="at least 20 dB"):
        assert_equivalent(a, b, tolerance=1e3, sqnr_db=20)
    with pytest.raises(AssertionError, match=r"at least 1.0 of rows"):
        assert_equivalent(a, b, samples(), agreement=1.0)


def test_nothing_passes_because_nothing_was_compared(tmp_path: Path) -> None:
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[4] x) => (float[4] y) {{ y = {} (x) }}'
    log, root = (onnx.parser.parse_model(text.format(name)) for name in ("Log", "Sqrt"))
    with pytest.raises(AssertionError, match="nothing can be told"):
        assert_equivalent(log, root, [{"x": np.full(4, -1, np.float32)}])
    with pytest.raises(UsageError, match="no output has rows"):
        assert_equivalent(log, root, agreement=0.5)
    with pytest.raises(graphopt.GraphoptError, match=r"nowhere\.onnx"):
        assert_equivalent(log, tmp_path / "nowhere.onnx")


def test_models_with_other_outputs() -> None:
    other = classifier()
    other.graph.node[-1].output[0] = other.graph.output[0].name = "logits"
    with pytest.raises(AssertionError, match="different outputs: `logits`, `scores`"):
        assert_equivalent(classifier(), other)


def test_optimized_model_in_memory(tmp_path: Path) -> None:
    result = optimized_into(tmp_path, classifier(), "simplify")
    assert_equivalent(classifier(), result)


def test_document_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the commands of `docs/regression-tests.md`, and the tests they write and it shows, in one run of pytest."""
    folder = workplace(tmp_path)
    found = blocks(ROOT / "docs" / "regression-tests.md")
    [commands] = [block for block in found if block.marker == "run"]
    [shown] = [block for block in found if block.marker.startswith("file: ")]
    made, optimize, tested = commands.code.splitlines()
    assert (made, tested) == ("mkdir tests", "pytest -q tests")
    write(folder, {shown.marker.removeprefix("file: "): shown.code})
    monkeypatch.chdir(folder)
    outcome = run(*shlex.split(optimize)[1:], "-q")
    assert outcome.code == 0, outcome.err
    done = run_pytest(folder, "-q", "-n0", "--graphopt-update", "tests")
    assert "8 passed" in done.stdout, done.stdout + done.stderr
    assert "wrote tests/golden/test_models/test_weights_are_what_they_were.json" in done.stdout
