"""The report as Markdown: the same facts as the page, for terminals, pull requests and archives."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from graphopt.comparing.layer_comparison import LayerComparison
from graphopt.explaining.explanation import Explanation
from graphopt.report import NOT_RUN, Report, show_bytes, show_count
from graphopt.reporting.findings import Findings
from graphopt.reporting.rows import STEP_COLUMNS, doubts, refusals, side_rows, specialised_lines, step_cells
from graphopt.reporting.trainings import TRAINING_COLUMNS, training_message, training_rows
from graphopt.reporting.weight_histograms import WeightHistograms
from graphopt.reporting.words import (
    SENSITIVITY_COLUMNS,
    coverage_message,
    float_rows,
    headline,
    layers_message,
    left_message,
    sensitivity_rows,
    show_time,
    steps_message,
    verdict,
    weights_message,
    worst_rows,
)

# Rows of one table; the JSON form has all of them.
_MOST_ROWS = 20
_WORST_SHOWN = 10


def markdown(name: str, report: Report, findings: Findings) -> str:
    """Return the report as Markdown.

    Args:
        name: What was optimized, for people.
        report: The figures of the run.
        findings: What was collected besides.
    """
    rows = side_rows(report)
    missing, sentence = findings.not_measured, verdict(report)
    run = NOT_RUN if report.scored == NOT_RUN else f"run by {report.backend}, scored on {report.scored}"
    parts = [
        f"# {_cell(name)}: {headline(report, rows)}",
        f"{sentence[:1].upper()}{sentence[1:]}.",
        f"Pipeline `{report.pipeline}`, target {report.target}, {run}.",
        "## Before and after",
        _table(("", "before", "after", "change", "measured on"), [_fields(row) for row in rows], "no model came out"),
        *specialised_lines(report),
        "## Step by step",
        steps_message(report),
        _table(STEP_COLUMNS, [step_cells(step, report) for step in report.steps], "no step was run"),
        *refusals(report),
        *doubts(report),
        *_trainings(findings),
        "## Error by layer",
        *_layers(findings.layers),
        _why(missing, "layers"),
        "## What it is made of, what takes the time",
        _operators(findings),
        _kernels(findings),
        _why(missing, "kernels"),
        "## In integers",
        *_coverage(findings.coverage),
        _why(missing, "coverage"),
        "## Weights",
        *_weights(findings.weights),
        _why(missing, "weights"),
        "## Sensitivity",
        _sensitivity(findings),
        _why(missing, "sensitivity"),
        "## Remarks",
        _remarks(report),
        "## How to repeat it",
        *_repetition(findings),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _fields(row: Any) -> tuple[str, ...]:
    return (row.name, row.before, row.after, row.change, row.place)


def _why(missing: dict[str, str], name: str) -> str:
    return f"Not measured: {missing[name]}." if name in missing else ""


def _table(columns: Sequence[str], rows: Iterable[Sequence[Any]], otherwise: str = "") -> str:
    shown = list(rows)
    if not shown:
        return f"Nothing: {otherwise}." if otherwise else ""
    lines = [columns, ["---"] * len(columns), *shown[:_MOST_ROWS]]
    text = "\n".join("| " + " | ".join(_cell(cell) for cell in line) + " |" for line in lines)
    more = len(shown) - _MOST_ROWS
    return text + (f"\n\n{more} more in the JSON form of this report." if more > 0 else "")


def _cell(value: Any) -> str:
    """Return a text that stays in its cell, whatever is in it."""
    return " ".join(str(value).replace("|", "\\|").split())


def _trainings(findings: Findings) -> list[str]:
    if not findings.trainings:
        return []
    table = _table(TRAINING_COLUMNS, training_rows(findings.trainings))
    return ["## Training", training_message(findings.trainings), table]


def _layers(layers: LayerComparison | None) -> list[str]:
    if layers is None or layers.cannot_run is not None:
        return []
    columns = ("value made", "operator", "signal to noise", "noise of its own", "largest error")
    return [layers_message(layers), _table(columns, worst_rows(layers, _WORST_SHOWN)), left_message(layers)]


def _operators(findings: Findings) -> str:
    rows = [
        (one.operator, one.count_before, one.count_after, show_bytes(one.bytes_before), show_bytes(one.bytes_after))
        for one in findings.operators
    ]
    return _table(("operator", "nodes before", "after", "weights before", "after"), rows)


def _kernels(findings: Findings) -> str:
    rows = [(one.kernel, show_time(one.ms_before), show_time(one.ms_after)) for one in findings.kernels]
    return _table(("kernel", "time before", "after"), rows)


def _coverage(found: Explanation | None) -> list[str]:
    if found is None:
        return []
    floats = [] if found.quantizable else float_rows(found)
    return [coverage_message(found), _table(("operators in float", "why", "what would help", "time"), floats)]


def _weights(found: WeightHistograms | None) -> list[str]:
    if found is None:
        return []
    rows = [
        (
            one.layer,
            one.operator,
            one.stored,
            show_count(one.elements),
            "–" if one.zeros_before is None else f"{one.zeros_before:.0%}",
            f"{one.zeros_after:.0%}",
        )
        for one in found.layers
    ]
    table = _table(("layer", "operator", "stored as", "weights", "zero before", "after"), rows)
    return [weights_message(found), table]


def _sensitivity(findings: Findings) -> str:
    return _table(SENSITIVITY_COLUMNS, sensitivity_rows(findings.sensitivity))


def _remarks(report: Report) -> str:
    lines = [f"- {step.name}: {_cell(note.text)}" for step in report.steps for note in step.notes if note.node is None]
    return "\n".join(lines) or "The passes made none."


def _repetition(findings: Findings) -> list[str]:
    again = findings.repetition
    command = f"```bash\n{again.command}\n```" if again.command is not None else f"There is no command: {again.why}."
    files = [(f"`{one.path}`", one.role, show_bytes(one.bytes), f"`{one.sha256}`") for one in again.files]
    versions = ", ".join(f"{name} {text}" for name, text in again.versions.items())
    return [command, _table(("file", "what", "size", "SHA-256"), files), f"Versions: {versions}."]
