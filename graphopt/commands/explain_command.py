"""The command `explain`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands.cli_options import BackendOption, DataOption, JsonOption, SeedOption, TargetOption, ThreadsOption

_MOST_RUNS = 10_000


def explain(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False, metavar="MODEL")],
    target: TargetOption = None,
    data: DataOption = None,
    backend: BackendOption = None,
    runs: Annotated[int, typer.Option(min=1, max=_MOST_RUNS, help="Runs to average times over.", metavar="N")] = 5,
    seed: SeedOption = 0,
    threads: ThreadsOption = 0,
    as_json: JsonOption = False,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="Also list every operator.")] = False,
) -> None:
    """Say of each operator whether a target runs it in integers, as which kernel, else why not and what would help.

    It is predicted by the target's own fusion rules, for models of any tool. Where the target can run on this machine
    it is proven, too: by the graph the runtime makes of the model, and by its profile of a run.
    """
    from graphopt.commands import tables
    from graphopt.explaining.explanation import explain as run
    from graphopt.report import finite

    found = run(
        model,
        target=target,
        data=data,
        backend=backend,
        threads=threads,
        seed=seed,
        runs=runs,
        progress=not as_json,
    )
    if as_json:
        typer.echo(json.dumps(finite({"model": str(model), **found.as_dict()}), indent=2))
    else:
        tables.print_explanation(found, verbose=verbose)
