"""The command `inspect`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from graphopt.commands.cli_options import JsonOption
from graphopt.errors import UsageError

_PAGE_SUFFIXES = (".html", ".htm")


def inspect(
    model: Annotated[Path, typer.Argument(help="ONNX model; never changed.", show_default=False, metavar="MODEL")],
    groups: Annotated[
        bool, typer.Option("--groups", help="Show which channels can be removed together, and which not at all.")
    ] = False,
    shared: Annotated[
        bool, typer.Option("--shared", help="Show what is stored twice: in other layouts, signs and scales too.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write the graph here, to be explored in a browser.", metavar="FILE")
    ] = None,
    before: Annotated[
        Path | None,
        typer.Option("--before", help="With --html: the model it was made from, shown beside it.", metavar="MODEL"),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a model is made of: operators, parameters, bytes, MACs, inputs, outputs, largest layers.

    With `--groups`, show instead which channels can only be removed together, and which cannot be removed and why. The
    model is looked at in canonical form, as the passes that remove channels see it.

    With `--shared`, show instead which tensors hold the numbers of others, and which layers are equal. The model is
    looked at as it is stored.

    With `--html`, write its graph as a page instead. With `--before`, the page shows that model beside it, and what was
    kept, changed, removed and added: nodes are matched by their names and the names of values.
    """
    if groups + shared + (html is not None) > 1:
        what = "`--groups` and `--shared`" if html is None else "`--html` and `--groups` or `--shared`"
        raise UsageError(f"{what} do not go together", hint="ask for one after the other")
    if before is not None and html is None:
        raise UsageError("`--before` goes with `--html` only", hint="add `--html FILE`, or see `graphopt compare`")
    if html is not None:
        _write_page(model, before, html, as_json)
        return
    if groups or shared:
        _print_listing("groups" if groups else "shared", model, as_json, canonical=groups)
        return
    from graphopt.commands import tables
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
    from graphopt import registry, shapes
    from graphopt.commands import tables
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


def _write_page(path: Path, before: Path | None, page: Path, as_json: bool) -> None:
    """Write the graph of a model, or of two beside each other, as a page."""
    from graphopt.graph_view.view import graph_page, graph_view
    from graphopt.model_io import load
    from graphopt.output_files import check_output
    from graphopt.staged_files import write_text

    models = {file: load(file) for file in (before, path) if file is not None}
    for file, model in models.items():
        check_output(page, model, file)
    if page.suffix not in _PAGE_SUFFIXES:
        raise UsageError(f"page `{page}` is not named as one", hint=f"name it `{page.stem}.html`")
    view = graph_view(models[before], models[path]) if before is not None else graph_view(models[path])
    title = path.name if before is None else f"{before.name} → {path.name}"
    write_text(page, graph_page(view, title))
    if as_json:
        _print_json({"model": str(path), "before": None if before is None else str(before), "html": str(page)})
    else:
        typer.echo(f"wrote {page}")


def _print_json(values: Any) -> None:
    typer.echo(json.dumps(values, indent=2))
