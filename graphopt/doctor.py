"""`doctor`: whether this machine and what is installed on it can do the work, and what stands in the way."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from graphopt import machine, registry
from graphopt.errors import GraphoptError, in_words, one_line
from graphopt.package_skews import package_skews
from graphopt.versions import all_versions

if TYPE_CHECKING:
    from graphopt.backend_survey import Surveyed

# What imports the IR is imported late, and only once its imports are known to work: a broken one is to be told, too.

Verdict = Literal["fact", "ok", "warning", "error"]

# Without these nothing works; each is imported to see that it can be.
_PILLARS = ("numpy", "google.protobuf", "onnx", "onnx_ir", "ml_dtypes", "onnxscript")
# Weights are read where they lie, but sessions of a runtime copy them, before and after at once.
_LITTLE_MEMORY = 2_000_000_000
# A model of the size of most, staged beside its destination, with what a runtime keeps in its temporary files.
_LITTLE_DISK = 1_000_000_000
_MEMORY = Path("/proc/meminfo")
# Variables that change what runtimes do, and so what is measured.
_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "ORT_DISABLE_ALL_OPTIMIZATION", "OV_THREADING")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        verdict: ``fact``: nothing to judge; ``ok``; ``warning``: it works, and may surprise; ``error``: it does not.
        subject: What was looked at.
        text: What was found.
        hint: What to do about it, or nothing.
    """

    verdict: Verdict
    subject: str
    text: str
    hint: str = ""


@dataclass(frozen=True)
class Diagnosis:
    """Everything that was looked at.

    Attributes:
        findings: In the order people read them.
        backends: The backends, whether or not they run here.
    """

    findings: tuple[Finding, ...]
    backends: tuple[Surveyed, ...]

    @property
    def ok(self) -> bool:
        """Whether nothing is in the way."""
        return all(finding.verdict != "error" for finding in self.findings)

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON values."""
        findings = [asdict(finding) for finding in self.findings]
        return {"ok": self.ok, "findings": findings, "backends": [one.as_dict() for one in self.backends]}


def examine() -> Diagnosis:
    """Look at the machine and at what is installed on it; nothing is changed.

    Where what graphopt stands on cannot be imported, nothing that hangs on it is looked at.
    """
    broken = tuple(_imports())
    ground = (*_versions(), *broken, *_skews(), *_processor())
    if broken:
        return Diagnosis(ground, ())
    backends, plugins = _survey()
    machine_wide = (*_target(), *_memory(), *_disk(), *_variables())
    return Diagnosis((*ground, *plugins, *machine_wide, *_of_backends(backends)), tuple(backends))


def _survey() -> tuple[Sequence[Surveyed], list[Finding]]:
    """Return the backends, or what keeps them from being listed."""
    from graphopt.backend_survey import survey_backends

    try:
        return survey_backends(), []
    except GraphoptError as error:
        return (), [Finding("error", "plug-ins", error.message, error.hint or "")]


def _versions() -> Iterator[Finding]:
    for name, text in all_versions().items():
        yield Finding("fact", name, text)


def _imports() -> Iterator[Finding]:
    """Yield what cannot be imported: packages built for another version of what they stand on fail here."""
    for name in _PILLARS:
        try:
            importlib.import_module(name)
        except Exception as error:  # protobuf, for one, raises TypeErrors of its own
            package = name.removeprefix("google.")
            anew = " ".join(dict.fromkeys((package, "onnx")))
            yield Finding("error", package, f"cannot be imported: {in_words(error)}", f"`pip install --upgrade {anew}`")


def _skews() -> Iterator[Finding]:
    found = list(package_skews())
    for what, fix in found:
        yield Finding("error", "packages", what, fix)
    if not found:
        yield Finding("ok", "packages", "what graphopt and its runtimes ask of other packages is met")


def _processor() -> Iterator[Finding]:
    allowed, physical = len(machine.allowed_cores()), len(machine.physical_cores())
    cores = f"{physical} {'core' if physical == 1 else 'cores'}"
    cores += f" of two threads, {allowed} in all" if allowed > physical else ""
    yield Finding("fact", "processor", f"{machine.cpu_name()}, {cores}")
    quota = machine.cpu_quota()
    if quota is not None and quota < allowed:
        yield Finding(
            "warning",
            "processor",
            f"this container may use {quota:g} of the {allowed} cores it sees; runtimes start a thread for each",
            f"`--threads {max(1, int(quota))}`",
        )


def _target() -> Iterator[Finding]:
    try:
        name, why = registry.host_target(), registry.host_reason()
    except GraphoptError as error:
        yield Finding("error", "target", error.message, error.hint or "")
        return
    yield Finding("fact", "target", f"{name}: {why}" if why else name)


def _memory() -> Iterator[Finding]:
    from graphopt.report import show_bytes

    try:
        rows = (line.split() for line in _MEMORY.read_text().splitlines())
        sizes = {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) > 1}
        total, free = sizes["MemTotal"], sizes["MemAvailable"]
    except (OSError, ValueError, KeyError):
        return
    limit = machine.memory_left()
    where, more = "", "close other programs"
    if limit is not None and limit[1] < total:
        free, total = min(free, limit[0]), limit[1]
        where, more = " that this container may use", "give it more"
    text = f"{show_bytes(free)} free of {show_bytes(total)}{where}"
    if free < _LITTLE_MEMORY:
        yield Finding("warning", "memory", text, f"{more}: large models need about three times their size")
    else:
        yield Finding("ok", "memory", text)


def _disk() -> Iterator[Finding]:
    from graphopt.report import show_bytes

    places: tuple[tuple[str, Callable[[], str], Verdict, str], ...] = (
        ("temporary files", tempfile.gettempdir, "error", "make room, or name a folder that can be written to: TMPDIR"),
        ("this folder", os.getcwd, "warning", "go to another, or ask for permission"),
    )
    for subject, find, verdict, hint in places:
        try:
            folder = find()
            free = shutil.disk_usage(folder).free
        except OSError as error:  # a full disk, too: Python tries to write before it names a folder
            yield Finding(verdict, subject, error.strerror or one_line(error), hint)
            continue
        text = f"`{folder}`, {show_bytes(free)} free"
        if not os.access(folder, os.W_OK):
            yield Finding(verdict, subject, f"`{folder}` cannot be written to", hint)
        elif free < _LITTLE_DISK:
            yield Finding("warning", subject, text, "make room: a result is written beside its destination first")
        else:
            yield Finding("ok", subject, text)


def _variables() -> Iterator[Finding]:
    for name in _VARIABLES:
        if name in os.environ:
            yield Finding("fact", name, f"{os.environ[name]} (runtimes read it; `--threads` says how many for sure)")


def _of_backends(backends: Sequence[Surveyed]) -> Iterator[Finding]:
    for one in backends:
        version = f" ({one.version})" if one.version is not None else ""
        for place in one.places:
            if place.runs:
                yield Finding("ok", place.text, f"runs here{version}")
            else:
                yield Finding("fact", place.text, f"not here: {place.why}", place.hint)
        for trouble in one.troubles:
            yield Finding("error" if trouble.fatal else "warning", one.name, trouble.what, trouble.fix)
    if not any(place.runs for one in backends for place in one.places):
        yield Finding("error", "backends", "no runtime can run a model here", "`pip install 'graphopt[cpu]'`")
    else:
        yield from _default_runtime()


def _default_runtime() -> Iterator[Finding]:
    """Yield what keeps models from being run where no target and no backend is asked for."""
    from graphopt.choices import backend_of, find_target

    missing = {}
    for name in registry.table("TARGETS"):
        with contextlib.suppress(GraphoptError):  # a target of a plug-in that brings no backend for it
            missing[name] = backend_of(find_target(name)).missing()
    try:
        own = missing.get(registry.host_target())
    except GraphoptError:  # said where the target is
        return
    if own is None:
        return
    others = [f"`--target {name}`" for name, why in missing.items() if why is None]
    text = f"nothing runs what is made for this machine's own target: {own.message}"
    yield Finding("warning" if others else "error", "target", text, ", or ".join([own.hint or "", *others]))
