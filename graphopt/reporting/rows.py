"""What a report says, row by row, for tables on a terminal, pages and Markdown alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.authoring import Note
from graphopt.metrics import show_number
from graphopt.report import NOT_RUN, Report, Side, StepRecord, show_bytes, show_change, show_check, show_count

# Ratios of sizes are shown to two digits; what is 1.00 then is the same.
_ROUNDING = 0.005

# Facts of notes that forecast what single layers lose.
FORECASTS = frozenset({"predicted_error", "error_curve"})
STEP_COLUMNS = ("pass", "edits", "nodes", "size", "time", "check")


@dataclass(frozen=True)
class SideRow:
    """One figure before and after: what changed in words, and what it was taken on."""

    name: str
    before: str
    after: str
    change: str = ""
    place: str = ""


def side_rows(report: Report) -> list[SideRow]:
    """Return every figure of the model before and after; none where nothing came out."""
    before, after = report.before, report.after
    if after is None:
        return []
    rows = [SideRow("size", *_sizes(before.bytes, after.bytes))]
    if before.bytes_gzip is not None and after.bytes_gzip is not None:
        rows.append(SideRow("size, gzip", *_sizes(before.bytes_gzip, after.bytes_gzip)))
    if before.latency_ms is not None and after.latency_ms is not None:
        change = latency_change(before.latency_ms, after.latency_ms, report.latency_ratio, report.latency_verdict)
        place = f"{report.backend}, {show_threads(report.threads)}, batch {report.latency_batch}"
        rows.append(SideRow("latency", f"{before.latency_ms:.3g} ms", f"{after.latency_ms:.3g} ms", change, place))
    elif report.scored == NOT_RUN:
        rows.append(SideRow("latency", NOT_RUN, NOT_RUN))
    rows.append(SideRow("nodes", str(before.nodes), str(after.nodes)))
    rows += _placement_rows(before.placement, after.placement)
    rows.append(SideRow("parameters", show_count(before.parameters), show_count(after.parameters)))
    if before.nonzero is not None and after.nonzero is not None:
        rows.append(SideRow("nonzero", _share(before), _share(after)))
    return rows + _metric_rows(report, before, after)


def _placement_rows(before: Mapping[str, Any] | None, after: Mapping[str, Any] | None) -> list[SideRow]:
    """Return how many nodes each part of the runtime runs, where there is more than one."""
    if before is None or after is None:
        return []
    providers = dict.fromkeys([*before["nodes"], *after["nodes"]])
    if len(providers) < 2:
        return []
    return [
        SideRow(f"on {name}", str(before["nodes"].get(name, 0)), str(after["nodes"].get(name, 0)), "", "as divided")
        for name in providers
    ]


def _metric_rows(report: Report, before: Side, after: Side) -> list[SideRow]:
    rows = []
    scored, teacher = report.scored, report.teacher or {}
    standard = "original" if report.teacher is None else "teacher"
    for name, value in after.metrics.items():
        metric = report.metric_types.get(name)
        shown = metric.show if metric is not None else show_number
        old = before.metrics.get(name)
        if old is None:
            place = ", ".join(filter(None, (f"against the {standard}", scored)))
            rows.append(SideRow(name, "–", shown(value), "", place))
        else:
            aim = f"the teacher: {shown(teacher[name])}" if name in teacher else ""
            aim = f"against the {standard}" if metric is not None and metric.against_original else aim
            place = ", ".join(filter(None, (aim, scored)))
            rows.append(SideRow(name, shown(old), shown(value), show_change(metric, old, value), place))
        scored = ""  # the same for all of them
    return rows


def _sizes(before: int, after: int) -> tuple[str, str, str]:
    return show_bytes(before), show_bytes(after), ratio(before, after, "smaller", "larger")


def step_cells(step: StepRecord, report: Report) -> tuple[str, ...]:
    """Return the cells of one step, as `STEP_COLUMNS` names them."""
    nodes = str(step.nodes_after)
    if step.nodes_after != step.nodes_before:
        nodes = f"{step.nodes_before}→{step.nodes_after}"
    return (
        step.spec,
        str(step.edits),
        nodes,
        show_bytes(step.bytes_after),
        f"{step.seconds:.1f} s",
        show_check(step.check, report.metric_types, report.before.metrics),
    )


def remarks(step: StepRecord) -> list[Note]:
    """Return every remark about a step that says something to people; forecasts of layers are figures for a chart."""
    return [note for note in step.notes if not FORECASTS & note.facts.keys()]


def summaries(step: StepRecord) -> list[Note]:
    """Return the remarks about a step as a whole; the ones about single nodes wait for ``-v``."""
    return [note for note in step.notes if note.node is None and not note.left]


def specialised_lines(report: Report) -> list[str]:
    """Return how inputs and outputs changed because sizes were fixed."""
    changed = report.specialised or {}
    sides = [("input", changed.get("inputs", {})), ("output", changed.get("outputs", {}))]
    return [
        f"{kind} `{name}`: {_shape(one['before'])} → {_shape(one['after'])}, as asked"
        for kind, ports in sides
        for name, one in ports.items()
    ]


def _shape(dims: Sequence[int | str | None] | None) -> str:
    return "?" if dims is None else "×".join("?" if dim is None else str(dim) for dim in dims) or "scalar"


def refusals(report: Report) -> list[str]:
    """Return what was refused because it is wrong, and where to see that."""
    refused = [refusal for step in report.steps for refusal in step.refused]
    shown = {str(one): f"; see `{one.reproducer}`" if one.reproducer is not None else "" for one in refused}
    return [f"REFUSED: {text}{where}" for text, where in shown.items()]


def doubts(report: Report) -> list[str]:
    """Return why steps failed, or could not be checked, a reason that several share only once; and all warnings."""
    found: dict[str, list[str]] = {}
    for step in report.steps:
        if not step.check.ok and step.check.why != NOT_RUN:
            why = f"{'FAILED' if step.check.ok is False else 'not checked'}: {step.check.why}"
            found.setdefault(why, []).append(step.name)
    if report.deployed is not None and not report.deployed.ok:
        found[f"{'FAILED' if report.deployed.ok is False else 'not checked'}: {report.deployed.why}"] = ["as deployed"]
    reasons = [f"{', '.join(dict.fromkeys(names))}: {why}" for why, names in found.items()]
    return reasons + [f"WARNING: {text}" for text in report.warnings]


def counted(count: int, noun: str) -> str:
    """Return a count with its noun, in the plural where there is not one."""
    return f"{count} {noun}" if count == 1 else f"{count} {noun}s"


def show_threads(count: int) -> str:
    """Return how many threads a backend had, in words."""
    return counted(count, "thread") if count else "default threads"


def latency_change(before: float, after: float, paired: float | None, verdict: str | None) -> str:
    """Return how much faster, in words: what can be told by the interval of the ratio, in a figure that claims less.

    Args:
        before: Median time of a run, of the original.
        after: Likewise, of the result.
        paired: Median of after / before in the same round.
        verdict: As `graphopt.latency.Latency.verdict`.
    """
    if verdict not in ("faster", "slower"):
        return verdict or ""
    ratios = [before / after, 1 / paired if paired else before / after]
    if min(ratios) < 1 < max(ratios):
        return "cannot tell"
    return ratio(min(ratios, key=lambda ratio: abs(ratio - 1)), 1.0, "faster", "slower")


def _share(side: Side) -> str:
    return f"{(side.nonzero or 0) / side.parameters:.1%}" if side.parameters else "–"


def ratio(before: float, after: float, better: str, worse: str) -> str:
    """Return before/after in words; what is 1.00 to two digits is called the same."""
    if not before or not after:
        return ""
    quotient = before / after
    if abs(quotient - 1) < _ROUNDING:
        return "the same"
    factor, word = (quotient, better) if quotient > 1 else (1 / quotient, worse)
    return f"{factor:.{1 if factor >= 1.1 else 2}f}× {word}"
