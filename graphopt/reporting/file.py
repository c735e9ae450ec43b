"""The report as a file: refused before any work where it cannot be written, written once the run is over."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import onnx_ir as ir

from graphopt.backend import Array
from graphopt.errors import UsageError
from graphopt.model_io import source
from graphopt.optimization import Run
from graphopt.output_files import is_same_file
from graphopt.repetition import command_of
from graphopt.report import Report
from graphopt.reporting.findings import LAYER_SAMPLES, Findings, Material, collect
from graphopt.request import Request
from graphopt.staged_files import write_text

KINDS = (".html", ".json", ".md")
# What only pages need, and its extra brings.
_PAGE_NEEDS = ("bokeh", "jinja2")


def check_reports(request: Request) -> None:
    """Raise an error, before any work, if a report cannot be written where it is wanted.

    Args:
        request: All that was asked for.

    Raises:
        UsageError: It is of no known kind, or the model or its data; its folder is missing or not writable; or what
            makes pages is not installed.
    """
    for report in request.reports:
        _check(report, request)


def _check(report: Path, request: Request) -> None:
    if report.suffix not in KINDS:
        raise UsageError(
            f"report `{report}` is of unknown kind", hint=f"name it {', '.join(f'`{one}`' for one in KINDS)}"
        )
    for what, given in (
        ("the model", (request.model, request.output)),
        ("the data", (request.data, request.evaluation)),
        ("the teacher", (request.teacher,)),
    ):
        if any(isinstance(one, (str, Path)) and is_same_file(report, Path(one)) for one in given):
            raise UsageError(f"cannot write report `{report}`: it is {what}", hint="name another file")
    if not report.parent.is_dir():
        raise UsageError(f"the folder of report `{report}` does not exist", hint=f"create `{report.parent}` first")
    if not os.access(report.parent, os.W_OK) or (report.exists() and not os.access(report, os.W_OK)):
        raise UsageError(f"cannot write report `{report}`: no permission", hint="choose another place")
    if report.exists() and not report.is_file():
        raise UsageError(f"cannot write report `{report}`: it is no regular file", hint="name a file")
    missing = [name for name in _PAGE_NEEDS if importlib.util.find_spec(name) is None]
    if report.suffix == ".html" and missing:
        names, verb = " and ".join(f"`{name}`" for name in missing), "is" if len(missing) == 1 else "are"
        raise UsageError(
            f"report `{report}` needs {names}, which {verb} not installed",
            hint='`pip install "graphopt[report]"`, or write `.md` or `.json`',
        )


def write_reports(run: Run, report: Report, output: Path | None) -> None:
    """Collect what reports show, once, and write each in the form that the name of its file asks for.

    Args:
        run: The run, over or failed.
        report: Its figures.
        output: The model that was written, or None.

    Raises:
        UsageError: A file cannot be written after all.
    """
    if not run.request.reports:
        return
    findings = collect(_material(run, report, output))
    for file in run.request.reports:
        with run.display.stage(f"writing {file.name}"):
            text = _text(file, run, report, findings)
        try:
            write_text(file, text)
        except OSError as error:
            raise UsageError(f"cannot write report `{file}`: {error.strerror}", hint="choose another place") from error


def _text(file: Path, run: Run, report: Report, findings: Findings) -> str:
    if file.suffix == ".json":
        return report.to_json(findings=findings.as_dict())
    name = str(run.request.model) if not isinstance(run.request.model, ir.Model) else "a model in memory"
    if file.suffix == ".md":
        from graphopt.reporting.markdown import markdown

        return markdown(name, report, findings)
    from graphopt.reporting.page import page

    return page(name, report, findings, run.open_original(), run.model)


def _material(run: Run, report: Report, output: Path | None) -> Material:
    request = run.request
    command, why = command_of(run.request, run.pipeline)
    return Material(
        original=run.open_original(),
        result=run.model,
        report=report,
        backend=run.backend,
        asked_backend=request.backend,
        feeds=_feeds(run),
        source=run.scored.name if run.scored is not None else None,
        files=_files(run, output),
        command=command,
        why_no_command=why,
        threads=request.threads,
        display=run.display,
    )


def _feeds(run: Run) -> list[dict[str, Array]]:
    """Return what the run was scored on, a sample each, else what it made up; nothing where nothing may be run."""
    if run.judge is None or run.judge.refusal is not None:
        return []
    if run.scored is not None:
        return [dict(batch.feeds) for batch in run.scored.take(LAYER_SAMPLES).batches(1)]
    first = run.judge.single_feed()
    return [first, *run.judge.feeds] if first is not None else []


def _files(run: Run, output: Path | None) -> list[tuple[str, Path]]:
    request = run.request
    files: list[tuple[str, Path]] = []
    if not isinstance(request.model, ir.Model):
        origin = source(run.original)
        files += [("model", Path(request.model))]
        files += [
            ("its weights", Path(file)) for file in dict.fromkeys(origin.data_files if origin is not None else ())
        ]
    for role, given in (("data", request.data), ("evaluation data", request.evaluation)):
        if isinstance(given, (str, Path)):
            files.append((role, Path(str(given).partition(".py:")[0] + ".py" if ".py:" in str(given) else given)))
    if isinstance(request.teacher, (str, Path)):
        files.append(("teacher", Path(request.teacher)))
    if output is not None:
        files.append(("result", output))
        beside = output.with_name(output.name + ".data")
        files += [("its weights", beside)] if beside.is_file() else []
    return files
