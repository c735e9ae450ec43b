"""Reproducers: folders that failures leave, with all it takes to see them again."""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tomli_w

from graphopt.authoring import Pass
from graphopt.errors import GraphoptError
from graphopt.instruments import Instrument
from graphopt.model_io import save, saved_bytes
from graphopt.pipeline import Pipeline, Step
from graphopt.regression.stored_arrays import write_feed
from graphopt.rewrite_check import Evidence, Proposal
from graphopt.versions import all_versions

FACTS, RECIPE, INPUTS = "reproducer.toml", "recipe.toml", "inputs.npz"
BEFORE, AFTER, ORIGINAL = "before.onnx", "after.onnx", "original.onnx"
# A run leaves this many at most, and none that takes more bytes.
MOST, LARGEST = 10, 256 << 20


@dataclass(frozen=True)
class Asked:
    """How a run was asked for, in words that can be said again.

    Attributes:
        model: The model's file, or None where it was given in memory.
        pipeline: The whole pipeline, as text.
        options: Option of `optimize` to its value, where that is a plain one.
    """

    model: Path | None
    pipeline: str
    options: Mapping[str, Any]


class Reproducers(Instrument):
    """Leaves a folder for each failure of a run; what cannot be written is left out in silence.

    Args:
        folder: Where the folders go.
        asked: How the run was asked for.
        original: Gives the model as it was before the run, where that is in no file.
    """

    def __init__(self, folder: Path, asked: Asked, original: Callable[[], ir.Model]) -> None:
        self._folder = folder
        self._asked = asked
        self._original = original
        self._running: Pass | None = None
        self._edits = 0
        self._left = 0

    def pass_started(self, one: Pass, edits: int) -> None:
        self._running, self._edits = one, edits

    def of_rewrite(self, proposal: Proposal, evidence: Evidence, why: str) -> str | None:
        """Leave both sides of a rewrite that was refused, the inputs they differ on, and return where."""
        if saved_bytes(evidence.before) + saved_bytes(evidence.after) > LARGEST:
            return None

        def write(folder: Path) -> None:
            save(evidence.before, folder / BEFORE)
            save(evidence.after, folder / AFTER)
            write_feed(folder / INPUTS, evidence.feed)
            self._write_facts(folder, "rewrite", why, {"rule": proposal.rule})
            commands = [_command(BEFORE, "--recipe", RECIPE, "--verify", "rewrites", "--strict")]
            text = f"The rule would put `{AFTER}` in the place of `{BEFORE}`; the two differ on `{INPUTS}`."
            (folder / "README.md").write_text(_readme(why, text, commands))

        return self._leave(proposal.pass_name, write)

    def of_failure(self, error: GraphoptError) -> str | None:
        """Leave what it takes to run into a failed check, or a pass that failed, again, and return where."""
        if self._running is None:
            return None
        name = self._running.name

        def write(folder: Path) -> None:
            model = self._asked.model
            if model is None:
                model = Path(ORIGINAL)
                original = self._original()
                if saved_bytes(original) <= LARGEST:
                    save(original, folder / ORIGINAL)
            self._write_facts(folder, "run", error.message, {"model": str(model), **_identity_of(self._asked.model)})
            stop = ("--stop-after-edits", str(self._edits), "--verify", "off", "-o", "before_pass.onnx")
            commands = [
                _command(str(model), "--passes", self._asked.pipeline, *as_arguments(self._asked.options), *stop),
                _command("before_pass.onnx", "--recipe", RECIPE),
            ]
            text = f"The first command makes the model as pass `{name}` met it, the second runs only that pass on it."
            trace = "".join(traceback.format_exception(error.__cause__)) if error.__cause__ is not None else ""
            (folder / "README.md").write_text(_readme(error.message, text, commands, trace))

        return self._leave(name, write)

    def _write_facts(self, folder: Path, kind: str, message: str, facts: Mapping[str, Any]) -> None:
        assert self._running is not None, "nothing fails before the first pass"
        document = {
            "kind": kind,
            "message": message,
            "pass": self._running.name,
            "edits_before_the_pass": self._edits,
            "pipeline": self._asked.pipeline,
            **facts,
            "options": dict(self._asked.options),
            "versions": all_versions(),
        }
        (folder / FACTS).write_text(tomli_w.dumps(document))
        (folder / RECIPE).write_text(Pipeline((Step(self._running.name, (self._running,)),)).to_toml())

    def _leave(self, name: str, write: Callable[[Path], None]) -> str | None:
        """Write a folder under another name, then give it its own: it is never there by half."""
        if self._left >= MOST:
            return None
        base = f"graphopt-reproducer-{re.sub(r'[^A-Za-z0-9_.-]+', '-', name)}"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=".graphopt-", dir=self._folder) as staging:
                staged = Path(staging) / base
                staged.mkdir()
                write(staged)
                place = _free_place(self._folder, base)
                os.rename(staged, place)
        except (OSError, GraphoptError):
            return None
        self._left += 1
        return str(place)


def _free_place(folder: Path, base: str) -> Path:
    number = 1
    while (place := folder / f"{base}-{number}").exists():
        number += 1
    return place


def _identity_of(model: Path | None) -> dict[str, str]:
    """Return where a model lies and what is in it, so that another one is not taken for it."""
    if model is None:
        return {}
    return {"path": str(model.resolve()), "sha256": content_hash(model)}


def content_hash(file: Path) -> str:
    """Return the SHA-256 of a file."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def as_option(name: str) -> str:
    """Return what the command line calls an option of `optimize`."""
    return {"evaluation": "--eval"}.get(name, "--" + name.replace("_", "-"))


def as_arguments(options: Mapping[str, Any]) -> list[str]:
    """Return options as the command line takes them; when to check is for the command to say."""
    arguments: list[str] = []
    for name, value in options.items():
        if name in ("verify", "strict", "keep_failed"):
            continue
        if name == "set_dims":
            arguments += [text for dim, size in value.items() for text in ("--set-dim", f"{dim}={size}")]
        elif name == "set_shapes":
            shapes = {port: "x".join(map(str, shape)) for port, shape in value.items()}
            arguments += [text for port, shape in shapes.items() for text in ("--set-shape", f"{port}:{shape}")]
        elif value is True:
            arguments.append(as_option(name))
        elif isinstance(value, list):
            arguments += [text for item in value for text in (as_option(name), str(item))]
        elif value is not False:
            arguments += [as_option(name), str(value)]
    return arguments


def _command(*arguments: str) -> str:
    return shlex.join(["graphopt", "optimize", *arguments])


def _readme(message: str, text: str, commands: list[str], trace: str = "") -> str:
    lines = ["# A failure of graphopt", "", message, "", text, "", "```bash", *commands, "```", ""]
    lines += ["`graphopt debug replay FOLDER` runs it again and says whether it still fails.", ""]
    if trace:
        lines += ["```text", trace.rstrip(), "```", ""]
    return "\n".join(lines)
