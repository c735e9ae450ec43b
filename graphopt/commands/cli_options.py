"""Options that several commands share."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.errors import UsageError

if TYPE_CHECKING:
    from graphopt.pipeline import Pipeline

MOST_THREADS = 1024


def names_in(*tables: str) -> Callable[[str], list[str]]:
    """Return what completes the last of several names, separated by commas, that are in tables of plug-ins."""

    def complete(incomplete: str) -> list[str]:
        from graphopt import registry

        before, comma, begun = incomplete.rpartition(",")
        names = sorted(name for table in tables for name in registry.table(table))
        return [f"{before}{comma}{name}" for name in names if name.startswith(begun)]

    return complete


DataOption = Annotated[
    str | None, typer.Option("--data", help="Samples: FILE.npz, a folder of them, or file.py:function.", metavar="DATA")
]
LabelsOption = Annotated[
    str | None, typer.Option(help="Key of the labels in the data [default: labels].", metavar="KEY")
]
MetricOption = Annotated[str | None, typer.Option(help="Metric to score by, or file.py:function.", metavar="NAME")]
BackendOption = Annotated[
    str | None,
    typer.Option(
        help="Backend, such as onnxruntime:provider=cuda [default: the target's].",
        metavar="NAME",
        autocompletion=names_in("BACKENDS"),
    ),
]
ThreadsOption = Annotated[
    int, typer.Option(min=0, max=MOST_THREADS, help="Threads of the backend; 0 leaves it to the runtime.", metavar="N")
]
SeedOption = Annotated[int, typer.Option(min=0, help="Seed of everything random.", metavar="N")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="Also print every remark of the passes.")]
TargetOption = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="What the result runs on [default: this machine's CPU].",
        metavar="NAME",
        autocompletion=names_in("TARGETS"),
    ),
]
BudgetOption = Annotated[
    list[str] | None,
    typer.Option("--budget", help="The most a metric may lose, such as top1=1%.", metavar="METRIC=DROP"),
]
EvaluationOption = Annotated[
    str | None,
    typer.Option("--eval", help="Samples to score; without it a quarter of --data is held back.", metavar="DATA"),
]
TeacherOption = Annotated[
    str | None,
    typer.Option("--teacher", help="Model the result is to be like, and is scored against.", metavar="MODEL"),
]
SetDimOption = Annotated[
    list[str] | None,
    typer.Option("--set-dim", help="Fix named dimensions of the inputs: batch=1,seq=128.", metavar="NAME=SIZE"),
]
SetShapeOption = Annotated[
    list[str] | None,
    typer.Option("--set-shape", help="Fix the shape of an input: image:1x3x224x224.", metavar="INPUT:SHAPE"),
]
CalibrationCacheOption = Annotated[
    Path | None,
    typer.Option(
        "--calibration-cache", help="Keep what is observed on calibration samples here, for later runs.", metavar="DIR"
    ),
]
EmitTestOption = Annotated[
    Path | None,
    typer.Option("--emit-test", help="Write a pytest file here that holds OUT to what was measured.", metavar="FILE"),
]
PassesOption = Annotated[
    str | None,
    typer.Option(
        "--passes",
        help="Pipeline, such as prune:sparsity=0.5,quant; see `graphopt list`.",
        metavar="SPEC",
        autocompletion=names_in("PASSES", "PRESETS"),
    ),
]
RecipeOption = Annotated[
    Path | None, typer.Option("--recipe", help="Pipeline as TOML, instead of --passes.", metavar="FILE")
]


def open_pipeline(passes: str | None, recipe: Path | None) -> Pipeline:
    """Return the pipeline from whichever of the two options was given.

    Raises:
        UsageError: Both were given or neither, or it is none.
    """
    from graphopt.pipeline import Pipeline

    if (passes is None) == (recipe is None):
        given = "neither" if passes is None else "both"
        raise UsageError(f"give either `--passes` or `--recipe`; {given} was given", hint="e.g. `--passes prune,quant`")
    if recipe is None:
        return Pipeline.parse(passes or "")
    try:
        return Pipeline.from_toml(recipe.read_text())
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not text"
        raise UsageError(
            f"cannot read recipe `{recipe}`: {reason}", hint="write one `[[pass]]` table a pass"
        ) from error
