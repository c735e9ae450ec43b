"""The folder of a reduction: a small model, what it runs on, and all it takes to see its failure again."""

from __future__ import annotations

import os
import shlex
import tempfile
from pathlib import Path
from typing import Any

import tomli_w

from graphopt.debugging.failures import Question, names_of
from graphopt.debugging.reduction_result import Reduction
from graphopt.debugging.user_check import CheckCommand
from graphopt.errors import UsageError
from graphopt.model_io import save
from graphopt.pipeline import Pipeline
from graphopt.regression.stored_arrays import write_feed
from graphopt.reproducer import FACTS, INPUTS
from graphopt.versions import all_versions

REDUCED = "reduced.onnx"
KIND = "reduction"


def check_folder(folder: Path | None) -> None:
    """Check, before any work, that a folder can be written.

    Raises:
        UsageError: Something else is in its place.
    """
    if folder is None:
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"output `{folder}` is there already", hint="name a new folder")
    if not folder.absolute().parent.is_dir():
        raise UsageError(f"there is no folder `{folder.parent}` to write to", hint="create it first")


def write_folder(folder: Path, found: Reduction, question: Question, *, isolated: bool, timeout: float | None) -> None:
    """Write what was found into a folder that appears whole.

    Raises:
        UsageError: It cannot be written.
    """
    try:
        with tempfile.TemporaryDirectory(prefix=".graphopt-", dir=folder.absolute().parent) as staging:
            staged = Path(staging) / folder.name
            staged.mkdir()
            save(found.model, staged / REDUCED)
            write_feed(staged / INPUTS, found.feed)
            facts: dict[str, Any] = {"kind": KIND, "message": found.failure.text, "failure": found.failure.kind}
            facts |= {"isolated": isolated} if timeout is None else {"isolated": isolated, "timeout": timeout}
            facts |= {"question": _facts(question, found)}
            (staged / FACTS).write_text(tomli_w.dumps({**facts, "versions": all_versions()}))
            (staged / "README.md").write_text(_readme(found, question))
            if folder.exists():
                folder.rmdir()
            os.rename(staged, folder)
    except OSError as error:
        raise UsageError(f"cannot write `{folder}`: {error.strerror}", hint="check the path and the disk") from error


def _facts(question: Question, found: Reduction) -> dict[str, Any]:
    said = {
        "pipeline": str(question.passes) if question.passes is not None else None,
        "check": question.check.text if isinstance(question.check, CheckCommand) else None,
        "by_function": True if question.check is not None and not isinstance(question.check, CheckCommand) else None,
        "backend": question.backend,
        "other_backend": question.other_backend,
        "target": question.target,
        "seed": question.seed,
        "threads": question.threads,
        "names": sorted(question.names & names_of(found.model)),
    }
    return {name: value for name, value in said.items() if value is not None}


def question_of(folder: Path, facts: dict[str, Any]) -> Question:
    """Return what was asked of a model, as `write_folder` wrote it down.

    Raises:
        UsageError: It was asked by a function, or the passes are not here any more.
    """
    if "by_function" in facts:
        raise UsageError(f"`{folder}` was checked by a function", hint=f"call it with `{folder / REDUCED}`")
    return Question(
        passes=Pipeline.parse(facts["pipeline"]) if "pipeline" in facts else None,
        check=CheckCommand.parse(facts["check"]) if "check" in facts else None,
        names=frozenset(facts.get("names", ())),
        **{name: facts[name] for name in ("backend", "other_backend", "target", "seed", "threads") if name in facts},
    )


def _readme(found: Reduction, question: Question) -> str:
    lines = ["# A failure, reduced", "", found.failure.text, ""]
    lines += [
        f"Of {found.nodes[0]} nodes, {found.nodes[1]} are left in `{REDUCED}`; `{INPUTS}` is what it runs on.",
        "",
    ]
    lines += ["```bash", *_commands(question), "```", ""]
    lines += ["`graphopt debug replay FOLDER` runs it again and says whether it still fails.", ""]
    return "\n".join(lines)


def _commands(question: Question) -> list[str]:
    if isinstance(question.check, CheckCommand):
        return [question.check.text.replace("{model}", REDUCED).replace("{inputs}", INPUTS)]
    if question.check is not None:
        return [f"# the check was a function; call it with `{REDUCED}`"]
    options = [("--target", question.target), ("--backend", question.backend)]
    words = [word for name, value in options if value is not None for word in (name, value)]
    if question.passes is not None:
        command = ["graphopt", "optimize", REDUCED, "--passes", str(question.passes), "--eval", INPUTS, *words]
    elif question.other_backend is not None:
        words += ["--other-backend", question.other_backend]
        command = ["graphopt", "compare", REDUCED, REDUCED, "--data", INPUTS, *words]
    else:
        command = ["graphopt", "debug", "reduce", REDUCED, "--data", INPUTS, *words]
    return [shlex.join(command)]
