"""The command `doctor`."""

from __future__ import annotations

import json

import typer

from graphopt.cli_options import JsonOption
from graphopt.errors import EXIT_CHECK_FAILED

_MARKS = {"fact": " ", "ok": "✓", "warning": "!", "error": "✗"}


def doctor(as_json: JsonOption = False) -> None:
    """Look at this machine: versions, processor, target, memory, disk, which runtimes run here, known conflicts.

    Exits with 1 where something stands in the way. Nothing is changed, and nothing is sent anywhere.
    """
    from graphopt.doctor import examine
    from graphopt.listing import Listing, Sheet

    found = examine()
    if as_json:
        typer.echo(json.dumps(found.as_dict(), indent=2))
    else:
        from graphopt import tables

        rows = [(_MARKS[one.verdict], one.subject, one.text) for one in found.findings]
        remarks = [
            f"{_MARKS[o.verdict]} {o.subject}: {o.hint}" for o in found.findings if o.hint and o.verdict != "fact"
        ]
        ending = "nothing stands in the way" if found.ok else "what is marked ✗ stands in the way"
        tables.print_listing(Listing([Sheet(("", "what", "found"), rows)], remarks=[*remarks, ending]))
    if not found.ok:
        raise typer.Exit(EXIT_CHECK_FAILED)
