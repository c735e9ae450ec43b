"""The command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.cli_options import JsonOption
from graphopt.errors import UsageError


def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False)],
    groups: Annotated[
        bool, typer.Option("--groups", help="Show which channels can be removed together, and which not at all.")
    ] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Show what is stored twice: in other layouts, signs and scales too.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Show what a model is made of: operators, parameters, bytes, MACs, inputs, outputs, largest layers.

    With `--groups`, show instead which channels can only be removed together, and which cannot be removed and why. The
    model is looked at in canonical form, as the passes that remove channels see it.

    With `--shared`, show instead which tensors hold the numbers of others, and which layers are equal. The model is
    looked at as it is stored.
    """
    if groups and shared:
        raise UsageError("`--groups` and `--shared` do not go together", hint="ask for one after the other")
    if groups or shared:
        _print_listing("groups" if groups else "shared", model, as_json, canonical=groups)
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


def _print_listing(name: str, path: Path, as_json: bool, *, canonical: bool) -> None:
    """Print what an inspection of a plug-in finds."""
    from graphopt import registry, shapes, tables
    from graphopt.driver import optimize
    from graphopt.model_io import load
    from graphopt.pipeline import CANONICALIZER

    inspection = registry.find("INSPECTIONS", name)
    model = optimize(path, CANONICALIZER, verify="off").model if canonical else load(path)
    shapes.infer_shapes(model)
    found = inspection(model)
    if as_json:
        _print_json({"model": str(path), **found.values})
    else:
        tables.print_listing(found)


def _print_json(values: Any) -> None:
    typer.echo(json.dumps(values, indent=2))
