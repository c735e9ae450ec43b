"""The commands that look for faults: `debug bisect`, `debug reduce` and `debug replay`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.commands.cli_options import (
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
    TeacherOption,
    ThreadsOption,
    VerboseOption,
    names_in,
    open_pipeline,
)
from graphopt.errors import EXIT_CHECK_FAILED, EXIT_USAGE, UsageError

if TYPE_CHECKING:
    from graphopt.debugging.bisection import Bisection, Judged
    from graphopt.debugging.reduction_result import Progress, Reduction
    from graphopt.rewriter import Edit

app = typer.Typer(
    rich_markup_mode=None,
)


@app.callback(invoke_without_command=True)
def _group(context: typer.Context) -> None:
    """Find the edit that breaks a model, make a failing model small, see a failure again."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())
        raise typer.Exit(EXIT_USAGE)


@app.command(short_help="Find the edit that breaks a model, or costs it most.")
def bisect(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False, metavar="MODEL")],
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
    teacher: TeacherOption = None,
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

    A state of the model is bad if its outputs are not those of the original by the guarantee of the passes, or if the
    check says so: it exits as for `git bisect run`, with 0 (good), 1-124, 126 or 127 (bad), 125 (cannot be told), or
    128 and above (stop). Of a lossy run, the edits are found that cost most: in the metric of the budget, or in the
    noise of the outputs. Where nothing is wrong, edits are found that change nothing.

    Exit code 0: one edit was found. 1: several are left: what is between cannot be told, or the damage is spread. 2:
    there is nothing to find, or something is wrong.
    """
    from graphopt.debugging.bisection import bisect as run
    from graphopt.report import finite
    from graphopt.specialise import parse_dims, parse_shapes

    found = run(
        model,
        open_pipeline(passes, recipe),
        check=check,
        data=data,
        evaluation=evaluation,
        teacher=teacher,
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
        typer.echo(json.dumps(finite(_as_values(found)), indent=2))
    else:
        _show(found)
    if found.edit is None:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _say_judged(judged: Judged) -> None:
    why = f": {judged.why}" if judged.why else ""
    typer.echo(f" {judged.edits} of {judged.of} edits: {judged.verdict}{why}", err=True)


def _show(found: Bisection) -> None:
    from graphopt.debugging.bisection import describe

    for line in describe(found):
        typer.echo(line)
    if found.files is not None:
        typer.echo(f"wrote {found.files[0]} and {found.files[1]}")
    typer.echo(f"repeat: {found.repeat}")


def _as_values(found: Bisection) -> dict[str, object]:
    return {
        "found": found.edit is not None,
        "kind": found.kind,
        "suspects": [_edit_values(edit) for edit in found.suspects],
        "lost": found.costs.total if found.costs is not None else None,
        "lost_at_worst": found.costs.worst if found.costs is not None else None,
        "measured_by": found.costs.what if found.costs is not None else None,
        "costs": [
            {**_edit_values(one.edit), "cost": one.cost, "share": one.share}
            for one in (found.costs.costs if found.costs is not None else ())
        ],
        "edits": found.total,
        "before": list(found.before),
        "after": list(found.after),
        "judged": [dataclasses.asdict(one) for one in found.judged],
        "files": [str(file) for file in found.files or ()],
        "repeat": found.repeat,
    }


def _edit_values(edit: Edit) -> dict[str, object]:
    return {
        "number": edit.number,
        "pass": edit.pass_name,
        "rule": edit.rule,
        "nodes": list(edit.nodes),
        "origins": sorted(edit.origins),
    }


@app.command(short_help="Find the smallest part of a model that still fails.")
def reduce(
    model: Annotated[
        Path, typer.Argument(help="ONNX model that fails; never changed.", show_default=False, metavar="MODEL")
    ],
    passes: PassesOption = None,
    recipe: RecipeOption = None,
    check: Annotated[
        str | None,
        typer.Option(
            help="Command (no shell) that does not exit with 0 for the model; {inputs} stands for an .npz file.",
            metavar="'CMD {model}'",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("-o", "--output", help="New folder to write [default: MODEL-reduced].", metavar="FOLDER"),
    ] = None,
    data: DataOption = None,
    target: TargetOption = None,
    backend: BackendOption = None,
    other_backend: Annotated[
        str | None,
        typer.Option(
            help="Backend whose outputs differ from those of --backend.",
            metavar="NAME",
            autocompletion=names_in("BACKENDS"),
        ),
    ] = None,
    isolate: Annotated[
        bool, typer.Option("--isolate", help="Try candidates in processes of their own, which may crash.")
    ] = False,
    timeout: Annotated[
        float | None,
        typer.Option(min=0.01, help="Seconds after which an isolated candidate is taken to hang.", metavar="X"),
    ] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.01, help="Take the smallest model found after this many seconds.", metavar="X")
    ] = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Find the smallest part of a model that still shows a failure.

    The failure is the check's, if one is given; else that passes fail or change the model beyond what they promise;
    else that the backend refuses the model, or gives other outputs than --other-backend, or than itself without its
    optimizations. Nodes are left out, what they gave becomes an input or a constant, sizes shrink. What is left is
    written into a folder that `graphopt debug replay` runs again.

    Exit code 0: a smaller model was found and written. 1: time was up before everything was tried. 2: the model shows
    no failure, or something is wrong.
    """
    from graphopt.debugging.reduction import reduce as run

    if timeout is not None and not isolate:
        raise UsageError("`--timeout` is for candidates in processes of their own", hint="add `--isolate`")
    has_passes = passes is not None or recipe is not None
    found = run(
        model,
        open_pipeline(passes, recipe) if has_passes else None,
        check=check,
        data=data,
        backend=backend,
        other_backend=other_backend,
        target=target,
        seed=seed,
        threads=threads,
        isolate=isolate,
        timeout=timeout,
        seconds=seconds,
        output=output if output is not None else Path(f"{model.stem}-reduced"),
        progress=not as_json,
        on_progress=_say_progress,
    )
    if as_json:
        typer.echo(json.dumps(_reduction_values(found), indent=2))
    else:
        _show_reduction(found)
    if not found.complete:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _say_progress(progress: Progress) -> None:
    typer.echo(
        f" {progress.tried} tried: {progress.nodes} nodes, {progress.bytes:,} bytes ({progress.stage})", err=True
    )


def _show_reduction(found: Reduction) -> None:
    before, after = found.nodes
    typer.echo(f"nodes {before} -> {after}, bytes {found.bytes[0]:,} -> {found.bytes[1]:,}")
    typer.echo(f"tried {found.tried} models in {found.seconds:.1f} s" + ("" if found.complete else "; time was up"))
    typer.echo(f"was:  {found.original.text}")
    typer.echo(f"now:  {found.failure.text}")
    for line in found.lines:
        typer.echo(f" {line}")
    typer.echo(f"wrote {found.folder}; `graphopt debug replay {found.folder}` repeats it")


def _reduction_values(found: Reduction) -> dict[str, object]:
    return {
        "nodes": {"before": found.nodes[0], "after": found.nodes[1]},
        "bytes": {"before": found.bytes[0], "after": found.bytes[1]},
        "failure": {"before": found.original.text, "after": found.failure.text, "kind": found.failure.kind},
        "model": list(found.lines),
        "tried": found.tried,
        "seconds": found.seconds,
        "complete": found.complete,
        "folder": str(found.folder),
    }


@app.command(short_help="Run a reproducer again.")
def replay(
    folder: Annotated[
        Path, typer.Argument(help="Folder that a failure or a reduction left.", show_default=False, metavar="FOLDER")
    ],
    as_json: JsonOption = False,
) -> None:
    """Run a reproducer again and say what comes of it; exit with 1 where it still fails."""
    from graphopt.debugging.rerun import replay as run

    result = run(folder)
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(result), indent=2))
    else:
        typer.echo(f"{'still fails' if result.fails else 'fails no more'}: {result.text}")
    if result.fails:
        raise typer.Exit(EXIT_CHECK_FAILED)
