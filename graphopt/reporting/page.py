"""The report as a page: one file that loads nothing, with charts and the graph, for people."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from importlib.resources import files
from typing import Any

import onnx_ir as ir

from graphopt.comparing.layer_comparison import LayerComparison
from graphopt.errors import GraphoptError, in_words
from graphopt.explaining.explanation import Explanation
from graphopt.metrics import SQNR
from graphopt.report import NOT_RUN, Report, show_bytes, show_count
from graphopt.reporting.charts import MOST_MEDIANS
from graphopt.reporting.findings import Findings
from graphopt.reporting.rows import (
    STEP_COLUMNS,
    SideRow,
    doubts,
    ratio,
    refusals,
    remarks,
    show_threads,
    side_rows,
    specialised_lines,
    step_cells,
    summaries,
)
from graphopt.reporting.trainings import TRAINING_COLUMNS, training_message, training_rows
from graphopt.reporting.weight_histograms import WeightHistograms
from graphopt.reporting.words import (
    SENSITIVITY_COLUMNS,
    coverage_message,
    float_rows,
    headline,
    layers_message,
    left_message,
    sensitivity_message,
    sensitivity_rows,
    show_time,
    steps_message,
    undecoded_lines,
    verdict,
    weights_message,
    worst_layers,
    worst_rows,
)

# Rows of one table: more are counted, not shown.
_MOST_ROWS = 500
_WORST_SHOWN = 10
# Cards at the top of the page.
_MOST_CARDS = 6
# A section of those runs only that trained.
TRAINING = "training"
SECTIONS = (
    ("figures", "Figures"),
    ("steps", "Steps"),
    (TRAINING, "Training"),
    ("layers", "Layers"),
    ("cost", "Cost"),
    ("coverage", "Integers"),
    ("weights", "Weights"),
    ("sensitivity", "Sensitivity"),
    ("graph", "Graph"),
    ("remarks", "Remarks"),
    ("repeat", "Repeat"),
)
_STATES = {
    "integers": "compute in integers",
    "weights": "read integer weights",
    "absorbed": "done by a conversion",
    "float": "in float",
    "gone": "gone before it ran",
}


def page(name: str, report: Report, findings: Findings, before: ir.Model, after: ir.Model) -> str:
    """Return the page.

    Args:
        name: What was optimized, for people.
        report: The figures of the run.
        findings: What was collected besides.
        before: The original, its nodes stamped with origins.
        after: What became of it.
    """
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment
    from markupsafe import Markup

    graph = _graph(before, after, findings)
    charts = _charts(report, findings)
    script, divisions = components(charts, wrap_script=False) if charts else ("", {})
    # Only what comes from files of this package, from Bokeh and from the graph view goes in unescaped.
    environment = Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["code"] = _with_code
    template = environment.from_string(_resource("page.html.jinja"))
    rendered: str = template.render(
        title=name,
        report=report,
        findings=findings,
        charts={key: Markup(division) for key, division in divisions.items()},
        chart_script=Markup(script),
        bokeh=Markup("\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)) if charts else "",
        style=Markup(_resource("page.css") + (graph.style if graph else "")),
        script=Markup(_resource("page.js")),
        early=Markup(_resource("theme.js")),
        graph={"html": Markup(graph.html), "script": Markup(graph.script), "remark": graph.remark} if graph else None,
        sections=[{"id": key, "short": short} for key, short in SECTIONS if key != TRAINING or findings.trainings],
        **_words(report, findings),
    )
    return rendered


def _with_code(text: Any) -> Any:
    """Return text as HTML in which what stands between backticks is code; whatever is in it is escaped."""
    from markupsafe import Markup, escape

    parts = str(text).split("`")
    if len(parts) % 2 == 0:
        return escape(text)
    pieces = [
        escape(part) if number % 2 == 0 else Markup("<code>{}</code>").format(part) for number, part in enumerate(parts)
    ]
    return Markup("").join(pieces)


def _resource(name: str) -> str:
    return files("graphopt.reporting").joinpath(name).read_text(encoding="utf-8")


def _graph(before: ir.Model, after: ir.Model, findings: Findings) -> Any:
    """Return the graph view, or None with the reason among what is not there; the rest of the page does without."""
    try:
        from graphopt.graph_view.view import graph_view

        return graph_view(before, after)
    except GraphoptError as error:
        findings.not_measured["graph"] = error.message
    except Exception as error:
        findings.not_measured["graph"] = f"a fault of graphopt: {in_words(error)}"
    return None


def _charts(report: Report, findings: Findings) -> dict[str, Any]:
    """Return every chart there are figures for, by the name the template knows it by."""
    from graphopt.reporting import charts as charts

    made: dict[str, Any] = {}
    if report.steps:
        made |= {"bytes": charts.steps_chart(report), "nodes": charts.nodes_chart(report)}
        if any(SQNR.name in step.check.metrics for step in report.steps):
            made["errors"] = charts.errors_chart(report)
    for number, training in enumerate(findings.trainings):
        made[_loss_name(number)] = charts.loss_chart(training)
    if any(one.bytes_before or one.bytes_after for one in findings.operators):
        made["operators"] = charts.operators_chart(findings.operators)
    if findings.kernels:
        made["kernels"] = charts.kernels_chart(findings.kernels)
    if findings.layers is not None and any(not one.has_other_shape for one in findings.layers.layers):
        made["layers"] = charts.layers_chart(findings.layers)
        worst = worst_layers(findings.layers, _WORST_SHOWN)
        if worst:
            made["losses"] = charts.losses_chart(worst)
    if findings.sensitivity:
        made["sensitivity"] = charts.sensitivity_chart(findings.sensitivity)
    for number, one in enumerate(findings.weights.layers if findings.weights is not None else ()):
        made[_histogram_name(number)] = charts.histogram_chart(one)
    return made


def _loss_name(number: int) -> str:
    return f"loss{number}"


def _histogram_name(number: int) -> str:
    return f"weights{number}"


def _words(report: Report, findings: Findings) -> dict[str, Any]:
    """Return everything the template says, as text."""
    rows = side_rows(report)
    return {
        "headline": headline(report, rows),
        "verdict": verdict(report),
        "cards": _cards(report, rows),
        "facts": _facts(report),
        "sides": [(row.name, row.before, row.after, row.change, row.place) for row in rows],
        "step_columns": STEP_COLUMNS,
        "steps": [step_cells(step, report) for step in report.steps],
        "specialised": specialised_lines(report),
        "troubles": [*refusals(report), *doubts(report)],
        "messages": _messages(report, findings),
        **_layer_words(findings.layers),
        "operators": [
            (one.operator, one.count_before, one.count_after, show_bytes(one.bytes_before), show_bytes(one.bytes_after))
            for one in findings.operators[:_MOST_ROWS]
        ],
        "kernels": [
            (one.kernel, show_time(one.ms_before), one.count_before, show_time(one.ms_after), one.count_after)
            for one in findings.kernels[:_MOST_ROWS]
        ],
        "coverage": _coverage_words(findings.coverage),
        **_weight_words(findings.weights),
        "training_columns": TRAINING_COLUMNS,
        "trainings": training_rows(findings.trainings),
        "losses": [(_loss_name(number), one.name) for number, one in enumerate(findings.trainings)],
        "sensitivity_columns": SENSITIVITY_COLUMNS,
        "sensitivity": sensitivity_rows(findings.sensitivity)[:_MOST_ROWS],
        "remarks": _remarks(report),
        "repeat": findings.repetition,
        "files": [(one.path, one.role, show_bytes(one.bytes), one.sha256) for one in findings.repetition.files],
    }


def _cards(report: Report, rows: Sequence[SideRow]) -> list[dict[str, str]]:
    by_name = {row.name: row for row in rows}
    metrics = list(report.after.metrics if report.after is not None else ())
    names = ["size", "size, gzip", "latency", *metrics[:2], "nodes", "parameters"]
    cards = [by_name[name] for name in names if name in by_name and by_name[name].after != NOT_RUN][:_MOST_CARDS]
    return [
        {"name": row.name, "after": row.after, "before": row.before.replace("–", ""), **_mood(row, report)}
        for row in cards
    ]


def _mood(row: SideRow, report: Report) -> dict[str, str]:
    """Return a change in words and whether it is one for the better."""
    if row.name in ("nodes", "parameters") and report.after is not None:
        before, after = (getattr(side, row.name) for side in (report.before, report.after))
        return {"change": ratio(before, after, "fewer", "more"), "mood": ""}
    words = row.change.rpartition(" ")[2]
    mood = {"smaller": "better", "faster": "better", "larger": "worse", "slower": "worse"}.get(words, "")
    change = row.change
    if not change and row.before == "–":
        change = "against the original"
    return {"change": change, "mood": mood}


def _facts(report: Report) -> list[tuple[str, str]]:
    return [
        ("pipeline", report.pipeline),
        ("target", report.target),
        ("measured by", f"{report.backend}, {show_threads(report.threads)}"),
        ("scored on", report.scored),
        ("seed", str(report.seed)),
    ]


def _messages(report: Report, findings: Findings) -> dict[str, str]:
    return {
        "steps": steps_message(report),
        "layers": layers_message(findings.layers),
        "coverage": coverage_message(findings.coverage),
        "weights": weights_message(findings.weights),
        "sensitivity": sensitivity_message(findings.sensitivity),
        "training": training_message(findings.trainings),
    }


def _layer_words(layers: LayerComparison | None) -> dict[str, Any]:
    if layers is None:
        return {"worst": [], "worst_origins": [], "left": "", "medians": False}
    return {
        "worst": worst_rows(layers, _WORST_SHOWN),
        "worst_origins": [one.origin for one in worst_layers(layers, _WORST_SHOWN)],
        "left": left_message(layers),
        "medians": len(layers.by_depth()) <= MOST_MEDIANS,
    }


def _coverage_words(found: Explanation | None) -> dict[str, Any] | None:
    if found is None:
        return None
    if found.quantizable:
        return {"parts": [], "floats": [], "rows": [], "proof": ""}
    counts = Counter[str](one.state for one in found.findings)
    parts = [
        {"state": state, "text": text, "count": counts[state], "share": counts[state] / len(found.findings)}
        for state, text in _STATES.items()
        if counts[state]
    ]
    proof = f"Proven by a run on {found.proven_by}." if found.proven_by else ""
    return {
        "parts": parts,
        "floats": float_rows(found),
        "rows": [
            (
                one.node,
                one.op,
                _STATES[one.state],
                one.kernel,
                show_time(one.milliseconds or 0.0),
                one.why or one.remark,
            )
            for one in found.findings[:_MOST_ROWS]
        ],
        "proof": proof or f"Predicted by the target's rules, not run: {found.unproven}.",
    }


def _weight_words(found: WeightHistograms | None) -> dict[str, Any]:
    if found is None:
        return {"histograms": [], "weight_notes": []}
    shown = [
        {
            "layer": one.layer,
            "origin": next(iter(one.origins), one.layer),
            "chart": _histogram_name(number),
            "text": f"{one.operator} · {one.stored} · {show_count(one.elements)} weights · {one.zeros_after:.0%} zero",
        }
        for number, one in enumerate(found.layers)
    ]
    return {"histograms": shown, "weight_notes": undecoded_lines(found)}


def _remarks(report: Report) -> list[dict[str, Any]]:
    found = []
    for step in report.steps:
        single = [(note.node, note.text) for note in remarks(step) if note.node is not None]
        texts = [note.text for note in summaries(step)]
        left = [note.text for note in step.notes if note.node is None and note.left]
        if texts or left or single:
            cut = f", the first {_MOST_ROWS} shown" if len(single) > _MOST_ROWS else ""
            found.append({"name": step.spec, "texts": texts + left, "nodes": single[:_MOST_ROWS], "cut": cut})
    return found
