"""The report of a run: a stable JSON document, and the table people read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from graphopt.authoring import Note
from graphopt.metrics import Metric, show_number
from graphopt.rewrite_check import Refusal

# What is said in the place of a figure nobody asked for.
NOT_RUN = "not run"


@dataclass
class Check:
    """How a step was checked.

    Attributes:
        kind: ``equal`` bits, ``equivalent`` within rounding, ``measured`` against the original, or ``none``.
        ok: Whether it passed; None where nothing could be checked.
        max_abs_error: Largest error of any output, or None.
        metrics: Metrics after the step, for lossy steps.
        samples: How many samples were scored.
        why: Why it failed, or why nothing could be checked.
    """

    kind: str
    ok: bool | None
    max_abs_error: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    samples: int = 0
    why: str | None = None


@dataclass
class PassRecord:
    """What one pass of a step did, over all its rounds."""

    name: str
    edits: int = 0
    rounds: int = 0
    notes: list[Note] = field(default_factory=list)


@dataclass
class StepRecord:
    """What one step did; ``reason`` says why it was added where the user did not ask for it."""

    name: str
    spec: str
    guarantee: str
    nodes_before: int
    bytes_before: int
    edits: int = 0
    nodes_after: int = 0
    bytes_after: int = 0
    seconds: float = 0.0
    peak_rss_mb: float = 0.0
    check: Check = field(default_factory=lambda: Check("none", None, why=NOT_RUN))
    reason: str | None = None
    passes: list[PassRecord] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    @property
    def notes(self) -> list[Note]:
        """Every remark about the step."""
        scheduled = [Note(self.name, f"scheduled because {self.reason}")] if self.reason else []
        return scheduled + [note for one in self.passes for note in one.notes]

    def as_dict(self) -> dict[str, Any]:
        """Return the step as JSON values."""
        fields = asdict(self)
        fields["pass"] = fields.pop("name")
        fields["passes"] = [{"pass": one.name, "edits": one.edits, "rounds": one.rounds} for one in self.passes]
        fields["refused"] = [_refusal(one) for one in self.refused]
        fields["notes"] = [
            {"pass": n.pass_name, "text": n.text, "node": n.node, "left": n.left, **n.facts} for n in self.notes
        ]
        return fields


def _refusal(refusal: Refusal) -> dict[str, Any]:
    fields = asdict(refusal)
    return {"pass": fields.pop("pass_name"), **fields}


@dataclass
class Side:
    """The model before, or after.

    Attributes:
        nonzero: How many parameters are not zero, or None where no step could have changed that and nobody asked.
        bytes: Size of the file or files on disk.
        bytes_gzip: Size after gzip, or None where it was not measured: as ``nonzero``, or files over 256 MiB.
        macs: Multiply-accumulates of one run, dynamic dimensions counted as 1, or None where nothing was measured.
        latency_ms: Median of one run at batch 1, or None where it was not measured.
        metrics: Task metrics on the scored samples.
        placement: Which part of the runtime took how many nodes when it was timed, or None where it does not tell.
    """

    nodes: int
    parameters: int
    nonzero: int | None
    bytes: int
    bytes_gzip: int | None
    macs: int | None
    latency_ms: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    placement: dict[str, Any] | None = None


@dataclass
class Report:
    """Everything a run did and measured.

    Attributes:
        ok: Whether every check and the budget held.
        teacher: What the teacher scores, where one was given: the result is measured against it then.
        deployed: How the written file compares with the original, the runtime's optimizations on; None if lossy.
        latency_ratio: Median over paired runs of latency after / before.
        latency_within: Where that ratio is, with 95 % confidence.
        latency_verdict: What can be said by that: ``faster``, ``slower``, ``the same`` or ``cannot tell``.
        latency_batch: Samples in each run that was timed.
        specialised: Sizes the inputs were fixed to, and what that changed of the signature, or None.
        stopped_after_edits: The edit the run was ended at, as asked, or None.
        advice: Another runtime of this machine that runs the written file faster, as `target_advice.Advice` says it.
        warnings: Why figures say less than they seem to.
    """

    graphopt: str
    pipeline: str
    target: str
    backend: str
    seed: int
    steps: list[StepRecord]
    before: Side
    after: Side | None
    ok: bool
    threads: int = 0
    scored: str = ""
    deployed: Check | None = None
    latency_ratio: float | None = None
    latency_within: tuple[float, float] | None = None
    latency_verdict: str | None = None
    latency_batch: int = 1
    advice: dict[str, Any] | None = None
    stopped_after_edits: int | None = None
    specialised: dict[str, Any] | None = None
    failure: str | None = None
    teacher: dict[str, float] | None = None
    warnings: list[str] = field(default_factory=list)
    metric_types: dict[str, type[Metric]] = field(default_factory=dict)

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON values; keys are stable."""
        return {
            "graphopt": self.graphopt,
            "pipeline": self.pipeline,
            "target": self.target,
            "backend": self.backend,
            "seed": self.seed,
            "threads": self.threads,
            "scored": self.scored,
            "steps": [step.as_dict() for step in self.steps],
            "before": asdict(self.before),
            "after": asdict(self.after) if self.after is not None else None,
            "teacher": self.teacher,
            "deployed": asdict(self.deployed) if self.deployed is not None else None,
            "latency_ratio": self.latency_ratio,
            "latency_within": self.latency_within,
            "latency_verdict": self.latency_verdict,
            "latency_batch": self.latency_batch,
            "advice": self.advice,
            "warnings": self.warnings,
            "stopped_after_edits": self.stopped_after_edits,
            "specialised": self.specialised,
            "ok": self.ok,
            "failure": self.failure,
        }

    def to_json(self, findings: Mapping[str, Any] | None = None) -> str:
        """Return the report, and what was found besides, as JSON text; infinities and NaN become null."""
        return json.dumps(finite({**self.as_dict(), "findings": findings}), indent=2) + "\n"


def finite(value: Any) -> Any:
    """Return JSON values without the infinities and NaN that JSON lacks: they become null."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value.item() if hasattr(value, "item") else value


def show_bytes(count: int) -> str:
    """Return a number of bytes as people read it."""
    size, units = float(count), ("B", "kB", "MB", "GB", "TB")
    for unit in units:
        if size < 1000 or unit == units[-1]:
            break
        size /= 1000
    return f"{size:.0f} {unit}" if size >= 100 or unit == "B" else f"{size:.1f} {unit}"


def show_count(count: int) -> str:
    """Return a large count as people read it."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= limit:
            return f"{count / limit:.3g} {unit}"
    return str(count)


def show_check(check: Check, metric_types: dict[str, type[Metric]], before: dict[str, float]) -> str:
    """Return one table cell that says how a step was checked and what came out."""
    if check.ok is None:
        return NOT_RUN if check.why == NOT_RUN else "not checked"
    if not check.ok:
        return "FAILED"
    if check.kind == "equal":
        return check.why or "equal, every bit"
    if check.kind == "equivalent":
        return f"equal (max |Δ| {check.max_abs_error:.0e})"
    name = next(iter(check.metrics), None)
    if name is None:
        return f"max |Δ| {check.max_abs_error:.2g}"
    return f"{name} {show_metric(metric_types.get(name), check.metrics[name], before.get(name))}"


def show_metric(metric: type[Metric] | None, value: float, before: float | None) -> str:
    """Return a metric's value and how it moved."""
    shown = metric.show(value) if metric is not None else show_number(value)
    return f"{shown} ({show_change(metric, before, value)})" if before is not None else shown


def show_change(metric: type[Metric] | None, before: float, after: float) -> str:
    """Return a signed difference, in points for shares."""
    difference = after - before
    if metric is not None and metric.percent:
        text = f"{100 * difference:+.1f}"
        text = "±0.0" if float(text) == 0 else text
    else:
        text = ("+" if difference > 0 else "") + show_number(difference) if difference else "±0"
    return text.replace("-", "−")
