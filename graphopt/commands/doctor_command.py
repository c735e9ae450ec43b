"""The command `doctor`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import typer

from graphopt.commands.cli_options import JsonOption
from graphopt.errors import EXIT_CHECK_FAILED

if TYPE_CHECKING:
    from graphopt.doctor import Diagnosis

_MARKS = {"fact": " ", "ok": "✓", "warning": "!", "error": "✗"}


def doctor(as_json: JsonOption = False) -> None:
    """Look at this machine: versions, processor, target, memory, disk, which runtimes run here, known conflicts.

    Exits with 1 where something stands in the way. Nothing is changed, and nothing is sent anywhere.
    """
    from graphopt.doctor import examine

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        _print(found)
    if not found.ok:
        raise typer.Exit(EXIT_CHECK_FAILED)


def _print(found: Diagnosis) -> None:
    """Print a line for each thing; plainly, since what draws tables may be what cannot be imported."""
    width = max(len(one.subject) for one in found.findings)
    for one in found.findings:
        typer.echo(f" {_MARKS[one.verdict]}  {one.subject:<{width}}  {one.text}")
        if one.hint and one.verdict != "fact":
            typer.echo(f"    {'':<{width}}  → {one.hint}")
    typer.echo()
    typer.echo(" nothing stands in the way" if found.ok else " what is marked ✗ stands in the way")
