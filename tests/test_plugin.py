"""A third party's package is found, listed and used like ours; a bad one is named."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest

SAMPLE = Path(__file__).parent / "plugin"
MODEL = """
<ir_version: 9, opset_import: ["" : 17]>
linear (float[batch, 3] x) => (float[batch, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> { y = MatMul(x, w) }
"""


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the sample package installed in it."""
    source = tmp_path_factory.mktemp("source") / "plugin"
    shutil.copytree(SAMPLE, source)  # building leaves files behind
    folder = tmp_path_factory.mktemp("site")
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(folder)]
    done = subprocess.run([sys.executable, "-m", "pip", *install, str(source)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / "linear.onnx"
    onnx.save(onnx.parser.parse_model(MODEL), path)
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    path = tmp_path / "samples.npz"
    np.savez(path, x=np.random.default_rng(0).normal(size=(16, 3)).astype(np.float32))
    return path


def graphopt(*arguments: object, site: Path) -> subprocess.CompletedProcess[str]:
    """Run the command line with the packages of a folder installed."""
    command = [sys.executable, "-c", "from graphopt.cli import main; main()", *map(str, arguments)]
    environment = {**os.environ, "PYTHONPATH": str(site)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def distribution(folder: Path, package: str, source: str, module: str | None = None) -> None:
    """Put a package of one module with a plug-in entry point in a folder, as an installer would."""
    module = module or package.replace("-", "_")
    (folder / f"{module}.py").write_text(source)
    info = folder / f"{package.replace('-', '_')}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[graphopt.plugins]\n{package} = {module}\n")


def refusal(site: Path, *arguments: object) -> tuple[str, str]:
    """Run the command line, which must end in one line of error and one of hint, and return the two."""
    done = graphopt(*arguments, site=site)
    assert done.returncode == 2, done.stderr
    error, hint = done.stderr.splitlines()
    assert error.startswith("error: ")
    assert hint.startswith("hint: ")
    return error, hint


@pytest.fixture(scope="module")
def listings(site: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Return what `graphopt list` prints with the package and without it."""
    with_it, without_it = (graphopt("list", site=folder) for folder in (site, tmp_path_factory.mktemp("empty")))
    assert (with_it.returncode, without_it.returncode) == (0, 0), with_it.stderr + without_it.stderr
    return with_it.stdout, without_it.stdout


@pytest.mark.parametrize(
    "listed",
    [
        "sample-scale",
        "what to multiply by",
        "sample-preset",
        "sample-runtime",
        "sample-target",
        "sample-gap",
    ],
)
def test_listed(listings: tuple[str, str], listed: str) -> None:
    with_it, without_it = listings
    assert listed in with_it
    assert listed not in without_it


def optimized(
    site: Path, model: Path, data: Path, passes: str, *more: object
) -> tuple[Mapping[str, object], Sequence[float]]:
    """Optimize and return the report and the weights."""
    out, report = model.with_name("out.onnx"), model.with_name("out.json")
    done = graphopt(
        "optimize", model, "--passes", passes, "--data", data, "-o", out, "--report", report, "-q", *more, site=site
    )
    assert done.returncode == 0, done.stderr
    weights = onnx.numpy_helper.to_array(onnx.load(out).graph.initializer[0])
    return json.loads(report.read_text()), weights.ravel().tolist()


def test_pass_runs_on_target_and_its_backend(site: Path, model: Path, data: Path) -> None:
    report, weights = optimized(site, model, data, "sample-scale:factor=0.5", "--target", "sample-target")
    assert weights == [0.5, 1.0, 1.5, 2.0, 2.5, 3.0]
    assert report["pipeline"] == "sample-scale:factor=0.5"
    assert (report["target"], report["backend"]) == ("sample-target", "sample runtime")
    assert report["steps"][0]["notes"][0]["text"] == "scaled by 0.5 for `sample-target`"


def test_preset_backend_and_metric(site: Path, model: Path, data: Path) -> None:
    report, weights = optimized(
        site, model, data, "sample-preset", "--backend", "sample-runtime", "--metric", "sample-gap"
    )
    # A preset with a lossy pass in it runs once: scaling never comes to an end of its own.
    assert weights == [3.0, 6.0, 9.0, 12.0, 15.0, 18.0]
    assert report["backend"] == "sample runtime"
    samples = np.load(data)["x"]
    held_back = report["after"]["metrics"]["sample-gap"]
    assert 0 < held_back <= 2 * np.abs(samples @ np.arange(1, 7).reshape(3, 2)).max() * 1.001


def test_budget_on_its_metric(site: Path, model: Path, data: Path) -> None:
    out = model.with_name("over.onnx")
    arguments = ("--passes", "sample-scale", "--data", data, "-o", out, "--budget", "sample-gap=0.001")
    over = graphopt("optimize", model, *arguments, site=site)
    assert over.returncode == 1
    assert "sample-gap" in over.stderr
    assert not out.exists()


def test_python_and_text_are_one(site: Path) -> None:
    code = (
        "from graphopt import Pipeline\nfrom graphopt_sample_plugin.passes import Scale\n"
        "text = str(Pipeline.of([Scale(factor=0.25)]))\n"
        "assert text == 'sample-scale:factor=0.25', text\n"
        "assert Pipeline.parse(text) == Pipeline.of([Scale(factor=0.25)])\n"
        "assert Pipeline.from_toml(Pipeline.parse(text).to_toml()) == Pipeline.parse(text)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr


def test_option_out_of_range(site: Path, model: Path) -> None:
    error, hint = refusal(site, "optimize", model, "--passes", "sample-scale:factor=-1")
    assert error == "error: pass `sample-scale`: option `factor` is out of range: `-1.0`"
    assert hint == "hint: at least 0"


def test_misspelt_name_is_met_with_a_suggestion(site: Path, model: Path) -> None:
    assert "did you mean `sample-scale`?" in refusal(site, "optimize", model, "--passes", "sample-scal")[1]


@pytest.mark.parametrize(
    ("kind", "name", "listed"),
    [("PASSES", "prune", "passes"), ("PASSES", "simplify", "presets"), ("METRICS", "top1", "metrics")],
)
def test_name_that_is_taken(tmp_path: Path, kind: str, name: str, listed: str) -> None:
    distribution(tmp_path, "copy-cat", f"{kind} = {{{name!r}: 'nowhere:Nothing'}}")
    error, hint = refusal(tmp_path, "list", listed)
    assert f"`{name}`" in error
    assert "uninstall" in hint
    if kind == "PASSES":
        assert "`copy_cat` of package `copy-cat`" in error
        assert "`graphopt.passes` of package `graphopt`" in error


def test_two_packages_of_one_mind(tmp_path: Path) -> None:
    for package in ("first-plugin", "second-plugin"):
        distribution(tmp_path, package, "PASSES = {'same': 'nowhere:Nothing'}")
    error, _ = refusal(tmp_path, "list", "passes")
    assert "`first-plugin`" in error
    assert "`second-plugin`" in error


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import not_installed_anywhere", "ModuleNotFoundError: No module named 'not_installed_anywhere'"),
        ("raise RuntimeError('two\\nlines')", "RuntimeError: two lines"),
    ],
)
def test_plugin_that_fails_to_import(tmp_path: Path, source: str, reason: str) -> None:
    distribution(tmp_path, "broken-plugin", source)
    error, hint = refusal(tmp_path, "list", "passes")
    assert error == f"error: plug-in `broken_plugin` of package `broken-plugin` fails to load: {reason}"
    assert hint == "hint: repair or uninstall `broken-plugin`"


def test_pass_that_fails_to_import(tmp_path: Path, model: Path) -> None:
    distribution(tmp_path, "half-plugin", "PASSES = {'gone': 'half_plugin:Gone'}")
    error, _ = refusal(tmp_path, "optimize", model, "--passes", "gone")
    assert error.startswith("error: pass `gone` cannot be imported from `half_plugin:Gone`: AttributeError: ")


def test_pass_that_fails_to_import_harms_no_other(tmp_path: Path, model: Path) -> None:
    distribution(tmp_path, "half-plugin", "PASSES = {'gone': 'half_plugin:Gone'}")
    out = tmp_path / "out.onnx"
    done = graphopt("optimize", model, "--passes", "dead-code", "-o", out, site=tmp_path)
    assert done.returncode == 0, done.stderr
    assert out.exists()


def test_table_that_is_none(tmp_path: Path) -> None:
    distribution(tmp_path, "odd-plugin", "PASSES = ['prune-more']")
    error, hint = refusal(tmp_path, "list", "passes")
    assert error == "error: plug-in `odd_plugin` of package `odd-plugin`: `PASSES` is no table of names"
    assert hint == "hint: repair or uninstall `odd-plugin`"
