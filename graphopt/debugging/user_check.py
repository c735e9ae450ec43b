"""A user's own check of a model: a command, read as `git bisect run` reads one."""

from __future__ import annotations

import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from graphopt.errors import UsageError

# What a command says of a model by its exit code, as `git bisect run` reads it.
EXIT_SKIP, FIRST_ABORTING_EXIT = 125, 128
# What stands for the files in a command.
MODEL, INPUTS = "{model}", "{inputs}"


@dataclass(frozen=True)
class CheckCommand:
    """A command in which ``{model}`` stands for a model's file, and ``{inputs}`` for what it runs on, where it is run.

    Attributes:
        text: As it was given.
        words: What is run.
    """

    text: str
    words: tuple[str, ...]

    @classmethod
    def parse(cls, text: str) -> Self:
        """Return a command.

        Raises:
            UsageError: It is none, or does not say where the model goes.
        """
        try:
            words = tuple(shlex.split(text))
        except ValueError as error:
            raise UsageError(f"check `{text}` is no command: {error}", hint="check its quotes") from error
        if not any(MODEL in word for word in words):
            raise UsageError(f"check `{text}` does not say where the model goes", hint='e.g. "python test.py {model}"')
        return cls(text, words)

    def run(self, model: Path, inputs: Path | None = None) -> int:
        """Run it on a file and return its exit code; below zero, the number of the signal that ended it.

        Raises:
            UsageError: The program cannot be run.
        """
        files: Mapping[str, Path | None] = {MODEL: model, INPUTS: inputs}
        try:
            # No shell: a model's path is never code. What the command prints is not ours to show as a result.
            done = subprocess.run([_filled(word, files) for word in self.words], stdout=subprocess.DEVNULL)
        except OSError as error:
            raise UsageError(
                f"check `{self.words[0]}` cannot run: {error.strerror}",
                hint="name a program; what only a shell understands goes into sh -c '… {model}'",
            ) from error
        return done.returncode


def _filled(word: str, files: Mapping[str, Path | None]) -> str:
    for name, file in files.items():
        if file is not None:
            word = word.replace(name, str(file))
    return word


def in_words(code: int) -> str:
    """Return how a command ended."""
    return f"was ended by signal {-code}" if code < 0 else f"exits with {code}"
