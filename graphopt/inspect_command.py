"""The command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli_options import JsonOption


def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False)],
    groups: Annotated[
        bool, typer.Option("--groups", help="Show which channels can be removed together, and which not at all.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a model is made of: operators, parameters, bytes, MACs, inputs, outputs, largest layers.

    With `--groups`, show instead which channels can only be removed together, and which cannot be removed and why. The
    model is looked at in canonical form, as the passes that remove channels see it.
    """
    if groups:
        _print_listing("groups", model, as_json)
        return
    from graphopt import tables
    from graphopt.model_io import load, stored_bytes
    from graphopt.report import finite
    from graphopt.summary import summarize

    summary, size = summarize(load(model)), stored_bytes(model)
    if as_json:
        _print_json(finite({"model": str(model), "bytes": size, **tables.as_values(summary)}))
    else:
        tables.print_summary(str(model), summary, size)


def _print_listing(name: str, path: Path, as_json: bool) -> None:
    """Print what an inspection of a plug-in finds."""
    from graphopt import registry, shapes, tables
    from graphopt.driver import optimize
    from graphopt.pipeline import CANONICALIZER

    inspection = registry.find("INSPECTIONS", name)
    model = optimize(path, CANONICALIZER, verify="off").model
    shapes.infer_shapes(model)
    found = inspection(model)
    if as_json:
        _print_json({"model": str(path), **found.values})
    else:
        tables.print_listing(found)


def _print_json(values: Any) -> None:
    typer.echo(json.dumps(values, indent=2))
