"""The main job: everything a user asks of an optimization, in one call."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.authoring import Pass
from graphopt.choices import ModelLike
from graphopt.errors import GraphoptError, VerificationError
from graphopt.optimization import Result, Run
from graphopt.pipeline import Pipeline
from graphopt.processes import is_main_process
from graphopt.reporting.file import check_reports, write_reports
from graphopt.request import Request, Verify, without_output


def optimize(
    model: ModelLike,
    passes: str | Pipeline | Pass | Sequence[str | Pass],
    *,
    output: str | Path | None = None,
    data: Any = None,
    evaluation: Any = None,
    teacher: ModelLike | None = None,
    labels: str | None = None,
    metric: str | None = None,
    set_dims: Mapping[str, int] | None = None,
    set_shapes: Mapping[str, Sequence[int]] | None = None,
    budget: str | Sequence[str] = (),
    target: str | None = None,
    backend: str | None = None,
    verify: Verify = "each",
    seed: int = 0,
    threads: int = 0,
    keep_failed: bool = False,
    strict: bool = False,
    stop_after_edits: int | None = None,
    reproducers: str | Path | None = None,
    calibration_cache: str | Path | None = None,
    emit_test: str | Path | None = None,
    timed: bool = True,
    report: str | Path | Sequence[str | Path] | None = None,
    detailed: bool = False,
    advise: bool = False,
    progress: bool = False,
) -> Result:
    """Optimize a model and prove the result.

    Args:
        model: A model, which is not changed, or a path to one.
        passes: Pipeline text, or passes and names of passes in a list.
        output: File to write; nothing is written where None.
        data: Samples to calibrate on: a path, ``file.py:function``, a function, a dict of arrays or a list of dicts.
        evaluation: Samples to score; where None, a seeded quarter of ``data`` (at most 1,000) is held back for it.
        teacher: A model of the same inputs and outputs that the result is to be like: what is trained learns from it,
            and the result is scored against it. Where None, that is the model itself.
        labels: Key of the labels in the data; ``labels`` by default.
        metric: Name of a metric, or ``file.py:function``; chosen by the outputs and labels where None.
        set_dims: Sizes to fix dimensions of the inputs to, by name: ``{"batch": 1}``. The result takes no others.
        set_shapes: The same by name of input: ``{"image": (1, 3, 224, 224)}``.
        budget: The most a metric may lose, ``METRIC=DROP``, or several.
        target: Name of the target; this machine's CPU where None.
        backend: Backend text, such as ``onnxruntime:provider=cuda``; the target's own where None.
        verify: When to check: ``off``; ``structure`` only, after each pass; ``final``; ``each`` step; or ``rewrites``
            too, each by itself. With the first two no model is run unless data, a metric or a budget ask for figures.
        seed: Seed of everything random.
        threads: Threads for the backend; 0 leaves it to the runtime.
        keep_failed: Write the result even if a check or the budget failed.
        strict: Stop at a rewrite that is wrong by itself, instead of leaving it out and going on, and at a step whose
            numbers could not be checked.
        stop_after_edits: End the run after this many edits, whatever is left to do.
        reproducers: Folder in which each failure leaves a folder to see it again; None for none.
        calibration_cache: Folder that keeps what was observed on the calibration samples, for later runs, of the same
            model for another target or with other options; None keeps it for this run only.
        emit_test: Test file to write, for pytest, that holds the result to what was measured of it.
        timed: Time the model before and after, and ask the runtime where its nodes went.
        report: File to write the report to, as ``.html``, ``.md`` or ``.json``, or several; written also where a check
            fails.
        detailed: Measure what weights hold and take after gzip also where no step is lossy.
        advise: Time the written file on the other runtimes of this machine, too, and name one that is clearly faster.
        progress: Show a progress bar on stderr.

    Raises:
        GraphoptError: One line that says what is wrong, where, and what to do; `VerificationError` if a check or
            the budget failed, its ``report`` attribute holding the report.
    """
    reports = [report] if isinstance(report, (str, Path)) else report or ()
    request = Request(
        model=model,
        passes=passes,
        output=Path(output) if output is not None else None,
        data=data,
        evaluation=evaluation,
        teacher=Path(teacher) if isinstance(teacher, str) else teacher,
        labels=labels,
        metric=metric,
        set_dims=set_dims or {},
        set_shapes=set_shapes or {},
        budget=[budget] if isinstance(budget, str) else list(budget),
        target=target,
        backend=backend,
        verify=verify,
        seed=seed,
        threads=threads,
        keep_failed=keep_failed,
        strict=strict,
        stop_after_edits=stop_after_edits,
        reproducers=Path(reproducers) if reproducers is not None else None,
        calibration_cache=Path(calibration_cache) if calibration_cache is not None else None,
        emit_test=Path(emit_test) if emit_test is not None else None,
        timed=timed,
        reports=[Path(one) for one in reports],
        detailed=detailed or bool(reports),
        advise=advise,
        progress=progress,
    )
    check_reports(request)
    # Where several processes train together each of them runs the passes, and one of them scores, checks and tells.
    run = Run(request if is_main_process() else without_output(request))
    with run.company.one_outcome():
        try:
            result = run.run()
        except VerificationError as error:
            if error.report is not None:
                try:
                    write_reports(run, error.report, error.output)
                except GraphoptError as unwritten:  # what failed first is what a user has to know
                    error.hint = f"{error.hint}; there is no report: {unwritten.message}"
            raise
        write_reports(run, result.report, result.output)
    return result
