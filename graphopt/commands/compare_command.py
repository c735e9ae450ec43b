"""The command `compare`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.commands.cli_options import (
    BackendOption,
    DataOption,
    JsonOption,
    LabelsOption,
    MetricOption,
    SeedOption,
    ThreadsOption,
    names_in,
)
from graphopt.errors import EXIT_CHECK_FAILED, UsageError

_WORST_SHOWN = 10


def compare(
    a: Annotated[Path, typer.Argument(help="Reference model.", show_default=False, metavar="A")],
    b: Annotated[Path, typer.Argument(help="Model to compare with it.", show_default=False, metavar="B")],
    layers: Annotated[
        bool, typer.Option("--layers", help="Compare the values inside, too, and say where the two part.")
    ] = False,
    data: DataOption = None,
    labels: LabelsOption = None,
    metric: MetricOption = None,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest absolute error allowed [default: rounding of the dtype].", metavar="X"),
    ] = None,
    backend: BackendOption = None,
    other_backend: Annotated[
        str | None,
        typer.Option(
            "--other-backend",
            help="Backend of the second model [default: that of the first].",
            metavar="NAME",
            autocompletion=names_in("BACKENDS"),
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(min=1, help="Samples to run at most [default: all; with --layers 32].", metavar="N")
    ] = None,
    worst: Annotated[
        int, typer.Option(min=0, help="How many of the worst layers to show.", metavar="N")
    ] = _WORST_SHOWN,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="With --layers: list every one, in order.")] = False,
) -> None:
    """Compare the outputs of two models, matched by name; exit with 1 where they differ beyond the tolerance.

    With --layers, compare the values inside as well, matched by origin: the first that differs on the way to an output
    that does, the layers in which most error comes in, SQNR by depth, and what is wrong with the second model or
    missing from it that shows without a run. Where the first model by itself differs as much, run in another way, no
    pass is blamed.
    """
    if tolerance is not None and math.isnan(tolerance):
        raise UsageError("option `--tolerance` cannot be `nan`", hint="a number, 0 or more")
    options: dict[str, Any] = {
        "data": data,
        "backend": backend,
        "other_backend": other_backend,
        "seed": seed,
        "threads": threads,
        "progress": not as_json,
    }
    if layers:
        if metric is not None or labels is not None:
            hint = "leave `--layers` out to score outputs, or `--metric` and `--labels` to compare layers"
            raise UsageError("metrics are of outputs, not of layers", hint=hint)
        is_ok = _compare_layers(a, b, options, tolerance, samples, worst, as_json=as_json, verbose=verbose)
    else:
        options |= {"labels": labels, "metric": metric, "samples": samples}
        is_ok = _compare_outputs(a, b, options, tolerance, as_json=as_json)
    if not is_ok:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _compare_outputs(a: Path, b: Path, options: dict[str, Any], tolerance: float | None, *, as_json: bool) -> bool:
    """Show the outputs side by side and return whether they are within the tolerance."""
    from graphopt.commands import tables
    from graphopt.comparing.model_comparison import compare as run

    result = run(a, b, **options)
    if as_json:
        _print_json(
            {
                "within": result.within(tolerance),
                "samples": result.samples,
                "outputs": {name: error.as_dict() for name, error in result.outputs.items()},
                "metrics": result.metrics,
            }
        )
    else:
        tables.print_comparison(result, tolerance)
        if not result.within(tolerance):
            typer.echo(" `--layers` says where the two part")
    return result.within(tolerance)


def _compare_layers(
    a: Path,
    b: Path,
    options: dict[str, Any],
    tolerance: float | None,
    samples: int | None,
    worst: int,
    *,
    as_json: bool,
    verbose: bool,
) -> bool:
    """Show the values inside side by side and return whether nothing is wrong."""
    from graphopt.commands import tables
    from graphopt.commands.layer_tables import listing_of
    from graphopt.comparing.layer_comparison import LAYER_SAMPLES, compare_layers

    found = compare_layers(a, b, tolerance=tolerance, samples=samples or LAYER_SAMPLES, **options)
    if as_json:
        _print_json({"models": [str(a), str(b)], **found.as_dict()})
    else:
        tables.print_listing(listing_of(found, worst, verbose=verbose))
    return found.ok


def _print_json(value: Any) -> None:
    from graphopt.report import finite

    typer.echo(json.dumps(finite(value), indent=2))
