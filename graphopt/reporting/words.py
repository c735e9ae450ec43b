"""What a report says in sentences, for pages and Markdown alike."""

from __future__ import annotations

from collections.abc import Sequence

from graphopt.comparing.layer_comparison import LayerComparison, LayerError
from graphopt.comparison import SQNR_CEILING_DB
from graphopt.explaining.explanation import Explanation, Finding
from graphopt.report import NOT_RUN, Report, show_bytes
from graphopt.reporting.findings import LayerCost
from graphopt.reporting.rows import SideRow, counted
from graphopt.reporting.weight_histograms import WeightHistograms

SENSITIVITY_COLUMNS = ("layer", "pass", "noise predicted", "cost measured")

_NO_CHANGE = (None, "", "the same", "cannot tell")


def headline(report: Report, rows: Sequence[SideRow]) -> str:
    """Return what a run comes to in a few words: how much smaller and faster, or that it failed."""
    if not report.ok:
        return "A check failed" if report.failure and not report.failure.startswith("over budget") else "Over budget"
    changes = {row.name: row.change for row in rows}
    told = [changes[name] for name in ("size", "latency") if changes.get(name) not in _NO_CHANGE]
    if told:
        return ", ".join(told)
    edits = sum(step.edits for step in report.steps)
    if not edits:
        return "Nothing to change"
    as_fast = " and as fast" if changes.get("latency") == "the same" else ""
    return f"As large{as_fast} as before, after {counted(edits, 'edit')}"


def verdict(report: Report) -> str:
    """Return in one sentence whether the result can be trusted."""
    if not report.ok:
        return report.failure or "a check failed"
    unchecked = [step for step in report.steps if step.check.ok is None and step.edits]
    if len(unchecked) == len([step for step in report.steps if step.edits]) and unchecked:
        why = unchecked[0].check.why
        return f"nothing was checked: {why}" if why and why != NOT_RUN else "nothing was checked, for no model was run"
    if unchecked:
        return f"checks held, but {counted(len(unchecked), 'step')} could not be checked"
    if report.deployed is not None and report.deployed.ok is None:
        return "the steps' checks held, but the model as deployed could not be checked"
    return "every check and budget held"


def steps_message(report: Report) -> str:
    """Return which step takes most off the model."""
    if not report.steps:
        return ""
    best = min(report.steps, key=lambda step: step.bytes_after - step.bytes_before)
    taken = best.bytes_before - best.bytes_after
    edits = sum(step.edits for step in report.steps)
    start = f"{counted(edits, 'edit')} in {counted(len(report.steps), 'step')}."
    if taken <= 0:
        return f"{start} No step makes the model smaller by itself."
    return f"{start} {best.name} takes most: {show_bytes(best.bytes_before)} → {show_bytes(best.bytes_after)}."


def layers_message(layers: LayerComparison | None) -> str:
    """Return where values begin to differ, and how far they are apart in the end."""
    if layers is None or layers.cannot_run is not None:
        return ""
    if layers.identical:
        return "Both models are the same, node by node and bit by bit."
    source = f"{counted(layers.samples, 'sample')}" + ("" if layers.source is not None else ", made up")
    differing = sum(one.differs for one in layers.layers)
    start = f"{counted(len(layers.layers), 'value')} that both models have, compared on {source}."
    if not differing:
        return f"{start} None differs by more than rounding."
    first = layers.first_diverging
    output = min((one for one in layers.layers if one.is_output), key=lambda one: one.sqnr_db, default=None)
    begins = end = ""
    if output is not None:
        mismatch = output.error.mismatch
        kept = f"Outputs keep {show_decibels(output.sqnr_db)}"
        end = f" {kept}." if mismatch is None else f" Output `{output.name}` cannot be compared: {mismatch}."
    if first is not None:
        begins = f" The first to differ is made by `{first.origin}` ({how_near(first)})."
    verb = "differs" if differing == 1 else "differ"
    return f"{start} {differing} {verb} by more than rounding.{begins}{end}"


def left_message(layers: LayerComparison) -> str:
    """Return what was not compared, counted."""
    told = str(layers.left)
    return f"Values not compared: {told}." if told else ""


def worst_rows(layers: LayerComparison, count: int) -> list[tuple[str, str, str, str, str]]:
    """Return rows of the layers that add most noise: value, operator, SQNR, noise of its own, largest error."""
    return [
        (
            one.name,
            operators(one),
            how_near(one),
            show_share(own_noise(one)),
            f"{one.max_abs_error:.3g}",
        )
        for one in worst_layers(layers, count)
    ]


def worst_layers(layers: LayerComparison, count: int) -> list[LayerError]:
    """Return the layers in which most noise comes in, of those that differ by more than rounding."""
    found = [one for one in layers.worst(len(layers.layers)) if one.differs and one.own_sqnr_db < SQNR_CEILING_DB]
    return found[:count]


def own_noise(one: LayerError) -> float:
    """Return the noise that comes in at a layer as a share of its signal, by power; 1 where they cannot be compared."""
    if one.has_other_shape:
        return 1.0
    return 0.0 if one.own_sqnr_db >= SQNR_CEILING_DB else min(1.0, 10 ** (-one.own_sqnr_db / 10))


def how_near(one: LayerError) -> str:
    """Return the signal to noise of a value, or why it cannot be compared."""
    if one.error.mismatch is not None:
        return one.error.mismatch
    return "no error" if one.error.equal else f"{one.sqnr_db:.1f} dB".replace("-", "−")


def operators(one: LayerError) -> str:
    """Return what makes a value before and after."""
    return one.op_type if one.op_type == one.other_op_type else f"{one.op_type} → {one.other_op_type}"


def coverage_message(found: Explanation | None) -> str:
    """Return how much of what could run in integers does."""
    if found is None:
        return ""
    if found.quantizable:
        could = ", ".join(f"{count} {op}" for op, _, count in found.quantizable)
        return f"Nothing is quantized. On {found.target} these could run in integers: {could}."
    if not found.findings:
        return ""
    done = sum(one.in_integers for one in found.findings)
    how = "run" if found.proven_by else "are expected to run"
    which = f"{done} of {len(found.findings)} operators"
    return f"{which} {how} on integers, or on weights in integers, on {found.target}."


def float_rows(found: Explanation) -> list[tuple[str, str, str, str]]:
    """Return operators left in float, those of one kind and reason together, the slowest first."""
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for one in found.findings:
        if one.state == "float":
            groups.setdefault((one.op, one.why, one.fix), []).append(one)
    ordered = sorted(groups.items(), key=lambda item: -sum(one.milliseconds or 0.0 for one in item[1]))
    return [
        (f"{len(ones)} {op}", why, fix, show_time(sum(one.milliseconds or 0.0 for one in ones)))
        for (op, why, fix), ones in ordered
    ]


def weights_message(found: WeightHistograms | None) -> str:
    """Return what the histograms show."""
    if found is None or not found.layers:
        return ""
    more = f" {counted(found.left, 'smaller layer')} not shown." if found.left else ""
    return f"The {len(found.layers)} largest layers, exact zeros counted apart and not drawn.{more}"


def show_time(milliseconds: float) -> str:
    """Return a time as people read it, or a dash."""
    return f"{milliseconds:.3g} ms" if milliseconds else "–"


def show_share(share: float) -> str:
    """Return a share in percent, small ones with two digits that say something."""
    return f"{share:.0%}" if share >= 0.1 else f"{100 * share:.2g}%"


def sensitivity_rows(costs: Sequence[LayerCost]) -> list[tuple[str, str, str, str]]:
    """Return what single layers cost, as `SENSITIVITY_COLUMNS` names it."""
    return [
        (
            one.layer,
            one.pass_name,
            "–" if one.predicted is None else show_share(one.predicted),
            "–" if one.measured is None else f"{one.measured:.3g}",
        )
        for one in costs
    ]


def sensitivity_message(costs: Sequence[LayerCost]) -> str:
    """Return what the figures of single layers mean."""
    if any(one.measured is not None for one in costs):
        return "How far the outputs move with only this layer changed: KL divergence in nats, or noise"
    return "Expected noise as a share of each output of a layer, the mean of all its outputs, weak ones counted as any"


def undecoded_lines(found: WeightHistograms) -> list[str]:
    """Return which layers could not be shown, those of one reason together."""
    reasons: dict[str, list[str]] = {}
    for layer, why in found.undecoded:
        reasons.setdefault(why, []).append(layer)
    return [f"{counted(len(ones), 'layer')} not shown, `{ones[0]}` first: {why}." for why, ones in reasons.items()]


def show_decibels(decibels: float) -> str:
    """Return a whole number of decibels."""
    return f"{decibels:.0f} dB".replace("-0 ", "0 ").replace("-", "−")
