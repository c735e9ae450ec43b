"""`graphopt doctor` and `graphopt list backends`: what stands in the way is found, said, and told by the exit code."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest

from graphopt import backend_survey, doctor, machine, package_skews, registry
from graphopt.backend import Backend
from graphopt.backends import onnxruntime_health, targets
from graphopt.backends.onnxruntime import OnnxRuntime
from graphopt.backends.openvino import OpenVino
from graphopt.backends.reference import Reference
from graphopt.doctor import Diagnosis, Finding, examine
from graphopt.errors import BackendError, UsageError

from .command_line import run

pytest.importorskip("onnxruntime")


def found(diagnosis: Diagnosis, subject: str) -> list[Finding]:
    return [one for one in diagnosis.findings if one.subject == subject]


def errors(diagnosis: Diagnosis) -> list[str]:
    return [f"{one.subject}: {one.text}" for one in diagnosis.findings if one.verdict == "error"]


def with_backends(monkeypatch: pytest.MonkeyPatch, *backends: Backend) -> None:
    """Let these be all that is installed."""
    by_name: Mapping[str, Backend] = {one.name: one for one in backends}
    monkeypatch.setattr(backend_survey.registry, "backend", by_name.__getitem__)
    real = registry.table
    monkeypatch.setattr(
        backend_survey.registry, "table", lambda kind: by_name if kind == "BACKENDS" else real(kind)
    )  # fmt: skip


class Missing(Reference):
    """A backend that cannot run here."""

    name: ClassVar[str] = "missing"

    def missing(self) -> BackendError | None:
        return BackendError("no such hardware", hint="buy it")


class Rude(Reference):
    """A stranger's backend that fails when it is asked."""

    name: ClassVar[str] = "rude"

    def missing(self) -> BackendError | None:
        raise ZeroDivisionError("of its own")


def test_this_machine_is_looked_at() -> None:
    diagnosis = examine()
    for subject in ("graphopt", "python", "onnx", "protobuf", "processor", "target", "memory", "temporary files"):
        assert found(diagnosis, subject), subject
    assert found(diagnosis, "onnxruntime cpu")[0].verdict == "ok"
    assert all(one.hint for one in diagnosis.findings if one.verdict in ("warning", "error"))
    (target,) = found(diagnosis, "target")
    assert target.text.startswith(f"{registry.host_target()}: an ")


def test_the_command_prints_a_table_and_json() -> None:
    table, values = run("doctor"), run("doctor", "--json")
    assert table.code == values.code
    assert "onnxruntime cpu" in table.out
    told = json.loads(values.out)
    assert told["ok"] == (values.code == 0)
    assert {one["name"] for one in told["backends"]} >= {"onnxruntime", "openvino", "reference"}
    assert {"verdict", "subject", "text", "hint"} == set(told["findings"][0])


def test_two_packages_that_lie_over_one_another_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    versions = {"onnxruntime": "1.32.0", "onnxruntime-gpu": "1.31.0"}
    monkeypatch.setattr(onnxruntime_health, "installed_packages", lambda: versions)
    outcome = run("doctor")
    assert outcome.code == 1
    assert "onnxruntime and onnxruntime-gpu are both installed" in " ".join(outcome.out.split())
    assert "pip uninstall -y onnxruntime onnxruntime-gpu" in " ".join(outcome.out.split())
    assert "✗" in outcome.out
    assert "TROUBLE" in run("list", "backends").out


def test_a_runtime_of_another_version_than_is_installed_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime_health, "installed_packages", lambda: {"onnxruntime": "0.1"})
    (trouble,) = onnxruntime_health.troubles()
    assert trouble.fatal
    assert "0.1 is installed" in trouble.what


def test_a_runtime_that_does_not_load_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ImportError("GLIBC_2.38 not found")

    monkeypatch.setattr(onnxruntime_health, "installed_packages", lambda: {"onnxruntime": "1.32.0"})
    monkeypatch.setattr(onnxruntime_health.importlib, "import_module", broken)
    (trouble,) = onnxruntime_health.troubles()
    assert "GLIBC_2.38" in trouble.what


def test_requirements_that_are_not_met_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = {"onnx": ["protobuf>=99", "numpy>=1", "sphinx; extra == 'docs'", "no-such-package>=1"]}
    real = package_skews.requires
    monkeypatch.setattr(package_skews, "requires", lambda name: asked.get(name, real(name)))
    told = errors(examine())
    assert any("needs protobuf>=99, and protobuf" in one for one in told)
    assert any("needs no-such-package>=1, and no-such-package is not installed" in one for one in told)
    assert not any("sphinx" in one for one in told)


def test_onnx_that_cannot_be_imported_is_told_and_no_traceback(tmp_path: Path) -> None:
    """protobuf refuses generated code of another version by a TypeError."""
    (tmp_path / "onnx").mkdir()
    (tmp_path / "onnx" / "__init__.py").write_text('raise TypeError("Descriptors cannot be created directly")\n')
    command = [sys.executable, "-c", "from graphopt.cli import main; main()"]
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([*command, "doctor"], capture_output=True, text=True, env=env)
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert "cannot be imported: TypeError: Descriptors cannot be created directly" in done.stdout
    assert "`pip install --upgrade onnx`" in done.stdout
    (tmp_path / "onnx" / "__init__.py").write_text('raise ImportError("built for another Python")\n')
    (tmp_path / "net.onnx").write_bytes(b"\0")
    failed = subprocess.run([*command, "inspect", tmp_path / "net.onnx"], capture_output=True, text=True, env=env)
    assert failed.stderr.startswith(
        "error: graphopt failed: ImportError: built for another Python\nhint: `graphopt doctor`"
    )


def test_little_memory_and_disk_are_warnings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal: 8000000 kB\nMemAvailable: 900000 kB\n")
    monkeypatch.setattr(doctor, "_MEMORY", memory)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=1000))
    diagnosis = examine()
    assert [one.verdict for one in found(diagnosis, "memory")] == ["warning"]
    assert [one.verdict for one in found(diagnosis, "temporary files")] == ["warning"]
    assert diagnosis.ok


@pytest.mark.parametrize(
    ("most", "told"), [("1000000000", "400 MB free of 1.0 GB that"), ("max", "8.0 GB free of 16.0 GB")]
)
def test_the_memory_of_a_container_is_what_it_may_use(
    most: str, told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, text in {
        "meminfo": "MemTotal: 15625000 kB\nMemAvailable: 7812500 kB\n",
        "memory.max": most,
        "memory.current": "700000000",
        "memory.stat": "anon 600000000\ninactive_file 100000000\n",
    }.items():
        (tmp_path / name).write_text(text + "\n")
    monkeypatch.setattr(doctor, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    (finding,) = doctor._memory()
    assert finding.text.startswith(told)
    assert finding.verdict == ("ok" if most == "max" else "warning")


def test_nowhere_to_write_is_an_error_and_no_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def nowhere() -> str:
        raise FileNotFoundError(2, "No usable temporary directory found in ['/tmp']")

    def gone() -> str:
        raise FileNotFoundError(2, "No such file or directory")

    monkeypatch.setattr(doctor.tempfile, "gettempdir", nowhere)
    monkeypatch.setattr(doctor.os, "getcwd", gone)
    told = list(doctor._disk())
    assert [(one.verdict, one.subject) for one in told] == [("error", "temporary files"), ("warning", "this folder")]
    assert "No usable temporary directory" in told[0].text
    assert "TMPDIR" in told[0].hint


def test_a_system_that_tells_nothing_is_no_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(doctor, "_MEMORY", tmp_path / "none")
    monkeypatch.setattr(machine, "_GROUP", tmp_path / "none")
    diagnosis = examine()
    assert diagnosis.ok
    assert not found(diagnosis, "memory")


@pytest.mark.parametrize(("text", "warned"), [("50000 100000", True), ("max 100000", False), ("9900000 100000", False)])
def test_a_container_that_may_use_less_than_it_sees(
    text: str, warned: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "cpu.max").write_text(text + "\n")
    monkeypatch.setattr(machine, "_GROUP", tmp_path)
    told = [one for one in found(examine(), "processor") if one.verdict == "warning"]
    assert bool(told) == warned
    assert all("--threads 1" in one.hint for one in told)


@pytest.mark.parametrize("others", [True, False])
def test_a_machine_without_the_runtime_of_its_own_target(others: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    gone = BackendError("ONNX Runtime is not installed", hint="`pip install it`")
    monkeypatch.setattr(OnnxRuntime, "missing", lambda self: gone)
    monkeypatch.setattr(OpenVino, "missing", lambda self: None if others else gone)
    (told,) = [one for one in found(examine(), "target") if one.verdict != "fact"]
    assert told.verdict == ("warning" if others else "error")
    assert "ONNX Runtime is not installed" in told.text
    assert told.hint == ("`pip install it`, or `--target openvino`" if others else "`pip install it`")


def test_a_machine_without_any_runtime_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with_backends(monkeypatch, Missing())
    diagnosis = examine()
    assert errors(diagnosis) == ["backends: no runtime can run a model here"]
    (place,) = found(diagnosis, "onnx reference")
    assert (place.verdict, place.text, place.hint) == ("fact", "not here: no such hardware", "buy it")


def test_a_strangers_backend_that_fails_is_shown_with_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    with_backends(monkeypatch, Reference(), Rude())
    told = {one.name: one for one in backend_survey.survey_backends()}
    assert told["reference"].places[0].runs
    assert told["rude"].places[0].why == "ZeroDivisionError: of its own"


def test_a_plugin_that_fails_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing() -> Sequence[backend_survey.Surveyed]:
        raise UsageError("plug-in `x` of package `y` fails to load", hint="uninstall `y`")

    monkeypatch.setattr(backend_survey, "survey_backends", failing)
    assert "plug-ins: plug-in `x` of package `y` fails to load" in errors(examine())


@pytest.mark.parametrize(
    ("flags", "machine", "name", "why"),
    [
        ({"avx2", "avx512_vnni"}, "x86_64", "ort-cpu-x86", "with VNNI (features: avx2, avx512_vnni)"),
        ({"avx2"}, "AMD64", "ort-cpu-x86-avx2", "without VNNI (features: avx2)"),
        (set(), "x86_64", "ort-cpu-x86-avx2", "features cannot be read"),
        ({"asimddp"}, "aarch64", "ort-cpu-arm", "an ARM CPU (features: asimddp)"),
    ],
)
def test_the_target_is_told_with_why(
    flags: set[str], machine: str, name: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(targets, "_cpu_flags", lambda: flags)
    monkeypatch.setattr(targets.platform, "machine", lambda: machine)
    assert registry.host_target() == name
    assert why in registry.host_reason()


def test_list_backends_says_what_runs_here_and_why_the_rest_does_not() -> None:
    told = {one["name"]: one for one in json.loads(run("list", "backends", "--json").out)}
    places = {place["option"]: place for place in told["onnxruntime"]["places"]}
    assert places["onnxruntime"]["runs"]
    assert set(places) == {"onnxruntime", "onnxruntime:provider=cuda", "onnxruntime:provider=tensorrt"}
    for place in places.values():
        assert place["runs"] or (place["why"] and place["hint"])
    assert told["onnxruntime"]["version"].startswith("onnxruntime")
    table = " ".join(run("list", "backends").out.split())
    assert "onnxruntime cpu runs here" in table
    assert "openvino cpu" in table


def test_json_is_for_rules_and_backends_only() -> None:
    outcome = run("list", "passes", "--json")
    assert outcome.code == 2
    assert "rules and backends as JSON" in outcome.error


@pytest.fixture(autouse=True)
def _plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the machine the tests run on have room enough."""
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=10**12))
    monkeypatch.setattr(package_skews, "requires", lambda name: [])
