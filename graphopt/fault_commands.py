"""The commands that look for faults: bisect and replay."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli_options import (
    BackendOption,
    BudgetOption,
    DataOption,
    EvaluationOption,
    JsonOption,
    LabelsOption,
    MetricOption,
    PassesOption,
    RecipeOption,
    SeedOption,
    SetDimOption,
    SetShapeOption,
    TargetOption,
    ThreadsOption,
    VerboseOption,
    open_pipeline,
)
from graphopt.errors import EXIT_CHECK_FAILED

if TYPE_CHECKING:
    from graphopt.bisection import Bisection, Judged


def bisect(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False)],
    passes: PassesOption = None,
    recipe: RecipeOption = None,
    set_dim: SetDimOption = None,
    set_shape: SetShapeOption = None,
    check: Annotated[
        str | None,
        typer.Option(
            help="Command (no shell) that exits with 0 for a good model, 125 to skip it [default: compare outputs].",
            metavar="'CMD {model}'",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the last good and first bad model.", metavar="FOLDER")
    ] = None,
    data: DataOption = None,
    evaluation: EvaluationOption = None,
    labels: LabelsOption = None,
    metric: MetricOption = None,
    budget: BudgetOption = None,
    target: TargetOption = None,
    backend: BackendOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find the one edit of a run that breaks a model, by binary search.

    A state of the model is bad if its outputs are not those of the original by the guarantee of the passes, or if it
    is over a budget, or if the check says so: it exits as for `git bisect run`, with 0 (good), 1-124, 126 or 127 (bad),
    125 (cannot be told), or 128 and above (stop).

    Exit code 0: one edit was found. 1: several are left, for what is between cannot be told. 2: there is nothing to
    find, or something is wrong.
    """
    from graphopt.bisection import bisect as run
    from graphopt.specialise import parse_dims, parse_shapes

    found = run(
        model,
        open_pipeline(passes, recipe),
        check=check,
        data=data,
        evaluation=evaluation,
        labels=labels,
        metric=metric,
        budget=budget or (),
        target=target,
        backend=backend,
        set_dims=parse_dims(set_dim or ()),
        set_shapes=parse_shapes(set_shape or ()),
        seed=seed,
        threads=threads,
        output=output,
        progress=not as_json,
        on_judged=_say_judged,
    )
    if as_json:
        typer.echo(json.dumps(_as_values(found), indent=2))
    else:
        _show(found)
    if found.edit is None:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _say_judged(judged: Judged) -> None:
    why = f": {judged.why}" if judged.why else ""
    typer.echo(f" {judged.edits} of {judged.of} edits: {judged.verdict}{why}", err=True)


def _show(found: Bisection) -> None:
    from graphopt.bisection import describe

    if found.edit is None:
        typer.echo(f"one of {len(found.suspects)} edits breaks the model; what is between them cannot be told")
    for word, line in describe(found):
        typer.echo(f" {word:<8} {line}")
    if found.files is not None:
        typer.echo(f"wrote {found.files[0]} and {found.files[1]}")
    typer.echo(f"repeat: {found.repeat}")


def _as_values(found: Bisection) -> dict[str, object]:
    return {
        "found": found.edit is not None,
        "suspects": [
            {
                "number": edit.number,
                "pass": edit.pass_name,
                "rule": edit.rule,
                "nodes": list(edit.nodes),
                "origins": sorted(edit.origins),
            }
            for edit in found.suspects
        ],
        "edits": found.total,
        "before": list(found.before),
        "after": list(found.after),
        "judged": [dataclasses.asdict(one) for one in found.judged],
        "files": [str(file) for file in found.files or ()],
        "repeat": found.repeat,
    }


def replay(folder: Annotated[Path, typer.Argument(help="Folder that a failure left.", show_default=False)]) -> None:
    """Run a reproducer again and say what comes of it; exit with 1 where it still fails."""
    from graphopt.rerun import replay as run

    result = run(folder)
    typer.echo(f"{'still fails' if result.fails else 'fails no more'}: {result.text}")
    if result.fails:
        raise typer.Exit(EXIT_CHECK_FAILED)
