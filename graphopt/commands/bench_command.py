"""The command `bench`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands.cli_options import MOST_THREADS, DataOption, JsonOption, SeedOption, names_in
from graphopt.errors import EXIT_CHECK_FAILED

_MOST_SECONDS = 86400  # a day


def bench(
    models: Annotated[
        list[Path], typer.Argument(help="Models with the same inputs.", show_default=False, metavar="MODELS")
    ],
    data: DataOption = None,
    batch: Annotated[
        str | None,
        typer.Option(help="Samples per run: 1,2,4,8 [default: 1, or the model's fixed batch size].", metavar="SIZES"),
    ] = None,
    sweep: Annotated[
        list[str] | None,
        typer.Option(help="Sizes of a named dimension: sequence=16,64,256; repeatable.", metavar="NAME=SIZES"),
    ] = None,
    seconds: Annotated[
        float,
        typer.Option(
            min=0.1, max=_MOST_SECONDS, help="Time to spend at each size, on all models together.", metavar="X"
        ),
    ] = 5.0,
    backend: Annotated[
        str | None,
        typer.Option(
            help="Backends, such as onnxruntime,openvino [default: this machine's CPU].",
            metavar="NAMES",
            autocompletion=names_in("BACKENDS"),
        ),
    ] = None,
    cold: Annotated[
        bool, typer.Option("--cold", help="Also load and run each in new processes: times and peak memory.")
    ] = False,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also show which operators and nodes take the time.")
    ] = False,
    roofline: Annotated[
        bool, typer.Option("--roofline", help="Also measure this machine's peaks, and how close each node comes.")
    ] = False,
    seed: SeedOption = 0,
    threads: Annotated[
        int,
        typer.Option(
            min=0, max=MOST_THREADS, help="Threads of the backends; 0 for one on each physical core.", metavar="N"
        ),
    ] = 0,
    as_json: JsonOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also list every kernel.")] = False,
) -> None:
    """Time models side by side on the same inputs, their runs interleaved; exit with 1 where one does not run."""
    from graphopt.benchmarking.benchmark import bench as run
    from graphopt.benchmarking.points import parse_sizes, parse_sweeps
    from graphopt.commands import tables
    from graphopt.commands.bench_tables import listing_of
    from graphopt.report import finite

    found = run(
        models,
        data=data,
        batch=parse_sizes(batch, "--batch ") if batch is not None else None,
        sweep=parse_sweeps(sweep or ()),
        backend=backend,
        threads=threads,
        seconds=seconds,
        cold=cold,
        profiled=profile,
        roofline=roofline,
        seed=seed,
        progress=not as_json,
    )
    if as_json:
        typer.echo(json.dumps(finite(found.as_dict()), indent=2))
    else:
        tables.print_listing(listing_of(found, verbose=verbose))
    if not found.complete:
        raise typer.Exit(EXIT_CHECK_FAILED)
