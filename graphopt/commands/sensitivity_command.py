"""The command `sensitivity`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.commands.cli_options import (
    BackendOption,
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

if TYPE_CHECKING:
    from graphopt.layer_sensitivity import LayerSensitivity

_MOST_SAMPLES = 100_000


def sensitivity(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False, metavar="MODEL")],
    passes: PassesOption = None,
    recipe: RecipeOption = None,
    data: DataOption = None,
    evaluation: EvaluationOption = None,
    samples: Annotated[
        int, typer.Option(min=1, max=_MOST_SAMPLES, help="Samples to measure each layer on.", metavar="N")
    ] = 64,
    labels: LabelsOption = None,
    metric: MetricOption = None,
    set_dim: SetDimOption = None,
    set_shape: SetShapeOption = None,
    target: TargetOption = None,
    backend: BackendOption = None,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Apply a lossy pass to one layer at a time and show what each costs, measured and predicted.

    The last pass of the pipeline is looked at; those before it run first. Measured is the KL divergence of outputs
    that are of classes, else the noise, and the task metric; predicted is the share of the layer's own outputs that
    the pass expects to be noise. Layers the pass leaves alone are named with `-v`.
    """
    from graphopt.commands import tables
    from graphopt.layer_sensitivity import sensitivity as run
    from graphopt.report import finite
    from graphopt.specialise import parse_dims, parse_shapes

    result = run(
        model,
        open_pipeline(passes, recipe),
        data=data,
        evaluation=evaluation,
        labels=labels,
        metric=metric,
        samples=samples,
        target=target,
        backend=backend,
        set_dims=parse_dims(set_dim or ()),
        set_shapes=parse_shapes(set_shape or ()),
        seed=seed,
        threads=threads,
        progress=not as_json,
        on_measured=_say_measured if verbose else None,
    )
    if as_json:
        typer.echo(json.dumps(finite(result.as_dict()), indent=2))
    else:
        tables.print_sensitivity(result, verbose=verbose)


def _say_measured(row: LayerSensitivity) -> None:
    typer.echo(f" {row.name}: {row.failure or f'{row.cost:.3g}'}", err=True)
