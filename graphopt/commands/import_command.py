"""The command `import`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from graphopt.commands.cli_options import BackendOption, JsonOption
from graphopt.errors import UsageError


def import_(
    source: Annotated[
        str,
        typer.Argument(
            help="What makes the module: package.module:function or file.py:function; or a .pt2 file.",
            show_default=False,
            metavar="SOURCE",
        ),
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="ONNX model to write.", metavar="OUT")],
    arg: Annotated[
        list[str] | None,
        typer.Option("--arg", help="Argument for the function, such as width=64; repeatable.", metavar="NAME=VALUE"),
    ] = None,
    dynamic: Annotated[
        list[str] | None,
        typer.Option(
            "--dynamic", help="Free axes of an input: ids=batch,tokens; - is a fixed one.", metavar="INPUT=AXES"
        ),
    ] = None,
    opset: Annotated[int, typer.Option(help="Version of ONNX's operators.", metavar="N")] = 20,
    inputs: Annotated[
        str | None, typer.Option(help="Names of the inputs [default: as in the module].", metavar="NAMES")
    ] = None,
    outputs: Annotated[
        str | None,
        typer.Option(help="Names of the outputs [default: a dict's keys, else the exporter's].", metavar="NAMES"),
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Do not simplify what torch exports.")] = False,
    tolerance: Annotated[
        float | None,
        typer.Option(min=0, help="Largest absolute error allowed [default: rounding of the dtype].", metavar="X"),
    ] = None,
    backend: BackendOption = None,
    as_json: JsonOption = False,
) -> None:
    """Make an ONNX model of a PyTorch module, and hold it against the module on its example inputs.

    The function returns the module, in evaluation mode, and its example inputs: `return module, args` or
    `return module, args, kwargs`. Nothing is written where the model computes something else; the exit code is 1 then.
    """
    from graphopt.commands import tables
    from graphopt.importing import import_module
    from graphopt.report import finite

    found = import_module(
        source,
        output,
        arguments=arg or (),
        dynamic=dynamic or (),
        opset=opset,
        input_names=_names(inputs, "--inputs"),
        output_names=_names(outputs, "--outputs"),
        raw=raw,
        tolerance=tolerance,
        backend=backend,
        progress=not as_json,
    )
    if as_json:
        typer.echo(json.dumps(finite(found.as_dict()), indent=2))
        return
    tables.print_comparison(found.comparison, tolerance)
    counts = "" if raw else f"   {found.exported_nodes} nodes as exported, {found.nodes} simplified"
    typer.echo(f"wrote {', '.join(str(file) for file in found.files)}{counts}")


def _names(text: str | None, option: str) -> list[str] | None:
    """Return names separated by commas, or None where none are given."""
    if text is None:
        return None
    names = [name.strip() for name in text.split(",")]
    if not all(names) or len(set(names)) < len(names):
        raise UsageError(f"`{option} {text}` holds an empty name, or one twice", hint="`ids,mask`")
    return names
