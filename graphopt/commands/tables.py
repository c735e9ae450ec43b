"""Tables on stdout: what people read after a run."""

from __future__ import annotations

import dataclasses
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Column, Table

from graphopt import options, registry
from graphopt.backend_survey import survey_backends
from graphopt.choices import known_metrics
from graphopt.comparison import Comparison
from graphopt.explaining.explanation import Explanation, Finding
from graphopt.layer_sensitivity import LayerSensitivity, Sensitivity
from graphopt.listing import Listing
from graphopt.metrics import show_number
from graphopt.report import Report, show_bytes, show_count
from graphopt.reporting.rows import (
    STEP_COLUMNS,
    counted,
    doubts,
    refusals,
    remarks,
    side_rows,
    specialised_lines,
    step_cells,
    summaries,
)
from graphopt.rulebook import Entry
from graphopt.summary import ModelSummary

# Where stdout is no terminal nothing may wrap: a script reads lines.
_WIDTH_OF_PIPE = 10_000
# Text in a column may be folded to so many characters where a terminal is narrow; numbers are never folded.
_LEAST_FOLDED = 12
_BETWEEN_COLUMNS = 2


def _print(content: Table | str = "", style: str | None = None) -> None:
    """Print a table, or a line that the terminal may wrap; no line ends in spaces."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else _WIDTH_OF_PIPE
    if isinstance(content, Table):
        width = max(width, _least_width(content))
    # Names and shapes hold brackets, which must not be taken for markup.
    console = Console(width=width, highlight=False, markup=False, emoji=False)
    with console.capture() as captured:
        console.print(content, style=style, soft_wrap=isinstance(content, str))
    sys.stdout.write("".join(line.rstrip() + "\n" for line in captured.get().splitlines()))


def _least_width(table: Table) -> int:
    """Return how wide a table is with all that may be folded folded; a narrower terminal wraps its lines."""
    return sum(_least(column) + _BETWEEN_COLUMNS for column in table.columns)


def _least(column: Column) -> int:
    widest = max(cell_len(str(text)) for text in (column.header, *column.cells))
    return widest if column.no_wrap else min(widest, _LEAST_FOLDED)


def _table(*headers: str, right: Sequence[str] = ()) -> Table:
    table = Table(box=None, pad_edge=True, header_style="bold", show_header=any(headers))
    for header in headers:
        number = header in right
        table.add_column(header, justify="right" if number else "left", overflow="fold", no_wrap=number)
    return table


def as_values(record: Any) -> dict[str, Any]:
    """Return a dataclass as JSON values."""
    return dataclasses.asdict(record)


def print_report(report: Report, *, verbose: bool = False) -> None:
    """Print the steps of a run, what it measured, and the remarks of its passes."""
    table = _table("step", *STEP_COLUMNS, right=("edits",))
    total = len(report.steps)
    for index, step in enumerate(report.steps, 1):
        table.add_row(f"{index}/{total}", *step_cells(step, report))
    for line in specialised_lines(report):
        _print(f" {line}")
    _print(table)
    for step in report.steps:
        for note in remarks(step) if verbose else summaries(step):
            where = f" [{note.node}]" if note.node else ""
            _print(f" {note.pass_name}{where}: {note.text}", style="dim")
    for line in (*refusals(report), *doubts(report)):
        _print(f" {line}")
    if report.stopped_after_edits is not None:
        _print(f" stopped after {counted(report.stopped_after_edits, 'edit')}, as asked")
    if report.after is not None:
        _print()
        _print(_sides(report))
    if report.advice is not None:
        _print(f" advice: {report.advice['text']}")


def _sides(report: Report) -> Table:
    table = _table("", "before", "after", " ", "  ", right=("before", "after"))
    for row in side_rows(report):
        table.add_row(row.name, row.before, row.after, row.change, row.place)
    return table


def print_summary(name: str, summary: ModelSummary, size: int) -> None:
    """Print what a model is made of."""
    facts = _table("", "")
    facts.add_row("model", name)
    opsets = ", ".join(f"{domain or 'ai.onnx'} {version}" for domain, version in summary.opsets.items())
    facts.add_row("opset", f"{opsets} (IR {summary.ir_version})")
    facts.add_row("size", show_bytes(size))
    functions = f", {counted(summary.functions, 'function')}" if summary.functions else ""
    facts.add_row("nodes", f"{summary.nodes}{functions}")
    facts.add_row(
        "parameters", f"{show_count(summary.parameters)}, {summary.nonzero:,} of {summary.parameters:,} nonzero"
    )
    least = "at least " if summary.unknown_cost else ""
    unknown = f", {counted(len(summary.unknown_cost), 'node')} of unknown cost" if summary.unknown_cost else ""
    facts.add_row("MACs", f"{least}{show_count(summary.macs)} per run (dynamic dimensions as 1){unknown}")
    for kind, ports in (("input", summary.inputs), ("output", summary.outputs)):
        for port, dtype, shape in ports:
            facts.add_row(kind, f"{port}: {dtype} {shape}")
    _print(facts)
    _print_columns("operator", "count", [(op, str(count)) for op, count in summary.ops.items()])
    _print_columns("dtype", "bytes", [(d, show_bytes(n)) for d, n in summary.bytes_by_dtype.items()])
    layers = _table("largest layers", "operator", "parameters", "bytes", "MACs", right=("parameters", "bytes", "MACs"))
    for layer in summary.largest:
        macs = "–" if layer.macs is None else show_count(layer.macs)
        layers.add_row(layer.name, layer.op_type, show_count(layer.parameters), show_bytes(layer.bytes), macs)
    _print(layers)


def _print_columns(left: str, right: str, rows: Sequence[tuple[str, str]]) -> None:
    table = _table(left, right, right=(right,))
    for row in rows:
        table.add_row(*row)
    _print()
    _print(table)


def print_comparison(comparison: Comparison, tolerance: float | None) -> None:
    """Print the errors of all outputs, the metrics of both sides, and what they were taken on."""
    table = _table("output", "max |Δ|", "max relative", "cosine", "SQNR", "top-1 agreement", "verdict")
    for name, error in comparison.outputs.items():
        agreement = error.top1_agreement
        verdict = "equal" if error.equal else "within tolerance" if error.within(tolerance) else "DIFFERS"
        table.add_row(
            name,
            f"{error.max_abs:.3g}",
            f"{error.max_rel:.3g}",
            f"{error.cosine:.6f}",
            f"{error.sqnr_db:.1f} dB",
            "–" if agreement is None else f"{agreement:.1%}",
            f"{verdict}: {error.mismatch}" if error.mismatch else verdict,
        )
    _print(table)
    for name, (a, b) in comparison.metrics.items():
        show = comparison.metric_types[name].show
        _print(f" {name}: {show(b)}" if a is None else f" {name}: {show(a)} → {show(b)}")
    allowed = "rounding" if tolerance is None else f"|Δ| up to {tolerance:g}"
    source = f"of `{comparison.source}`" if comparison.source is not None else "made up"
    _print(f" {counted(comparison.samples, 'sample')} {source}; tolerance: {allowed}", style="dim")


def print_sensitivity(result: Sensitivity, *, verbose: bool = False) -> None:
    """Print what each layer costs, the most sensitive first, and what all of them cost together."""
    measured = "KL" if result.whole.kind == "kl" else "noise"
    task = next(
        (name for name in result.whole.metrics if name in result.baseline and not _is_against(result, name)), None
    )
    has_formats = any(row.stored for row in result.rows)
    named = ["layer", "operator", *(["stored as"] if has_formats else [])]
    columns = [*named, "weights", measured, "SQNR", *([task] if task else []), "predicted"]
    table = _table(*columns, right=columns[len(named) :])
    for row in result.rows:
        table.add_row(*_sensitivity_cells(row, result, task, has_formats=has_formats))
    _print(table)
    whole = [f"{measured} {show_number(result.whole.divergence)}"]
    if task is not None:
        show = result.metric_types[task].show
        whole.append(f"{task} {show(result.baseline[task])} → {show(result.whole.metrics[task])}")
    _print(f" all of them together: {', '.join(whole)}")
    if result.rank_correlation is not None:
        _print(f" rank correlation of predicted and measured (Spearman): {result.rank_correlation:.2f}")
    elif result.rows:
        _print(" no rank correlation: the pass predicts no errors, or of fewer than two layers")
    if result.left:
        _print(f" left alone: {counted(len(result.left), 'layer')}" + ("" if verbose else ", `-v` says why"))
    for name, why in result.left if verbose else ():
        _print(f" {name}: {why}", style="dim")
    for row in result.rows if verbose else ():
        if row.curve:
            points = ", ".join(f"{share:.0%} {error:.2g}" for share, error in row.curve.items())
            _print(f" {row.name}: noise in its outputs by what goes of it: {points}", style="dim")
    _print(f" {counted(result.samples, 'sample')} of `{result.source}`, one layer changed at a time", style="dim")


def _is_against(result: Sensitivity, name: str) -> bool:
    return result.metric_types[name].against_original


def _sensitivity_cells(row: LayerSensitivity, result: Sensitivity, task: str | None, *, has_formats: bool) -> list[str]:
    formats = [", ".join(row.stored) or "–"] if has_formats else []
    cells = [row.name, ", ".join(row.operators), *formats, show_count(row.elements) if row.elements else "–"]
    predicted = "–" if row.predicted is None else f"{row.predicted:.3g}"
    if row.standing is None:
        return [*cells, "does not run", *["–"] * (2 if task else 1), predicted]
    worst = min(one["sqnr_db"] for one in row.standing.outputs.values())
    cells += [f"{row.standing.divergence:.3g}", f"{worst:.1f} dB"]
    return [*cells, *([result.metric_types[task].show(row.standing.metrics[task])] if task else []), predicted]


def print_explanation(found: Explanation, *, verbose: bool = False) -> None:
    """Print which operators run in integers and as what, then the others with why, what helps and what they cost."""
    _print(f" {found.target}: " + (_proof(found) if found.proven_by else f"predicted, not run: {found.unproven}"))
    if found.quantizable:
        could = ", ".join(f"{count} {op} → {kernel}" for op, kernel, count in found.quantizable)
        _print(f" nothing is quantized; `--passes quant --target {found.target}` could run {could}")
    elif not found.findings:
        _print(" nothing is quantized, and nothing could be")
    if verbose or not found.quantizable:
        _print_findings(found, verbose)
    for remark, count in Counter(one.remark for one in found.findings if one.remark).items():
        _print(f" {counted(count, 'operator')}: {remark}")
    if found.conversions and found.milliseconds:
        share = (found.conversion_milliseconds or 0) / found.milliseconds
        _print(
            f" QuantizeLinear and DequantizeLinear: {found.conversions} left, "
            f"{found.conversion_milliseconds:.3g} ms of {found.milliseconds:.3g} ms ({share:.0%})"
        )
    if len(found.parts) > 1 or (found.parts and verbose):
        parts = (f"{name} {counted(count, 'kernel')}, {time:.3g} ms" for name, (count, time) in found.parts.items())
        _print(f" ran on: {'; '.join(parts)}")
    if found.in_functions:
        _print(f" not looked at: {counted(found.in_functions, 'operator')} in functions")


def _proof(found: Explanation) -> str:
    right, judged = found.agreement or (0, 0)
    differs = f"; {judged - right} of {judged} not as predicted" if right < judged else ""
    return f"proven by {found.proven_by} on {found.inputs}{differs}"


def _print_findings(found: Explanation, verbose: bool) -> None:
    done = _table("operator", "in integers", "as", "time", right=("in integers", "time"))
    for op in dict.fromkeys(one.op for one in found.findings):
        own = [one for one in found.findings if one.op == op and one.state != "gone"]
        inside = [one for one in own if one.in_integers]
        if own:
            kernels = ", ".join(sorted({one.kernel for one in inside if one.kernel})) or "–"
            done.add_row(op, f"{len(inside)}/{len(own)}", kernels, _milliseconds(inside))
    _print(done)
    left: dict[tuple[str, str, str], list[Finding]] = {}
    for one in found.findings:
        if one.state == "float":
            left.setdefault((one.op, one.why, one.fix), []).append(one)
    if left:
        floats = _table("in float", "why", "what would help", "time", right=("time",))
        for (op, why, fix), ones in sorted(left.items(), key=lambda item: -sum(o.milliseconds or 0 for o in item[1])):
            floats.add_row(f"{len(ones)} {op}", why, fix, _milliseconds(ones))
        _print()
        _print(floats)
    if verbose:
        every = _table("node", "operator", "runs in", "as", "time", "", right=("time",))
        for one in found.findings:
            every.add_row(one.node, one.op, one.state, one.kernel, _milliseconds([one]), one.why or one.remark)
        _print()
        _print(every)


def _milliseconds(findings: Sequence[Finding]) -> str:
    times = [one.milliseconds for one in findings if one.milliseconds is not None]
    return f"{sum(times):.3g} ms" if times else "–"


def print_list(kind: str) -> None:
    """Print everything of one kind with what it is for and, where it has any, its options."""
    table = _table(kind, "")
    for name, text in _LISTERS[kind]():
        table.add_row(name, text)
    _print(table)


def print_rules(entries: Sequence[Entry], *, verbose: bool = False) -> None:
    """Print rules with the equation each rests on, and in full why it holds."""
    shown = [entry for entry in entries if entry.targets is not None]
    columns = ["pass", "rule", "equation"] + ["why it holds"] * verbose + ["only for"] * bool(shown)
    table = _table(*columns)
    for entry in entries:
        why = [entry.why] if verbose else []
        targets = [", ".join(entry.targets or ())] if shown else []
        table.add_row(entry.pass_name, entry.rule, entry.equation, *why, *targets)
    _print(table)


def print_listing(listing: Listing) -> None:
    """Print what an inspection found."""
    for sheet in listing.sheets:
        table = _table(*sheet.columns, right=sheet.numbers)
        for row in sheet.rows:
            table.add_row(*row)
        _print(table)
        _print()
    for remark in listing.remarks:
        _print(f" {remark}")


def _first_line(documented: Any) -> str:
    return (documented.__doc__ or "").strip().partition("\n")[0]


def _list_passes() -> list[tuple[str, str]]:
    rows = []
    for name in sorted(registry.table("PASSES")):
        cls = registry.find("PASSES", name)
        rows.append((name, f"{_first_line(cls)} ({cls.guarantee.value})"))
        rows += _options_of(cls)
    return rows


def _options_of(cls: type) -> list[tuple[str, str]]:
    rows = []
    for option, default, help in options.describe(cls):
        accepted = options.accepted(cls, option)
        text = f"{help} [default: {default or 'none'}]"
        rows.append((f"  {option}", f"{text} ({accepted})" if accepted else text))
    return rows


def _list_presets() -> list[tuple[str, str]]:
    return [(name, f"{preset.help}: {preset.passes}") for name, preset in registry.table("PRESETS").items()]


def _list_backends() -> list[tuple[str, str]]:
    rows = []
    for one in survey_backends():
        rows.append((one.name, one.help + (f" ({one.version})" if one.version is not None else "")))
        rows += [
            (f"  {place.text}", "runs here" if place.runs else f"not here: {place.why}; {place.hint}")
            for place in one.places
        ]
        rows += [("  TROUBLE", f"{trouble.what}; {trouble.fix}") for trouble in one.troubles]
        rows += _options_of(registry.find("BACKENDS", one.name))
    return rows


def _list_targets() -> list[tuple[str, str]]:
    host = registry.host_target()
    rows = []
    for name in sorted(registry.table("TARGETS")):
        target = registry.find("TARGETS", name)
        here = " — this machine" if name == host else ""
        rows.append((name, f"{target.help}{here} ({target.describe()})"))
    return rows


def _list_metrics() -> list[tuple[str, str]]:
    return [(name, metric.help) for name, metric in known_metrics(None).items()]


_LISTERS = {
    "passes": _list_passes,
    "presets": _list_presets,
    "backends": _list_backends,
    "targets": _list_targets,
    "metrics": _list_metrics,
}
