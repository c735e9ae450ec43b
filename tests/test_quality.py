"""The lint, the format and the types of the whole repository."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    "command",
    ["ruff check .", "ruff format --check .", "mypy graphopt passes backends"],
)
def test_clean(command: str) -> None:
    tool, *arguments = command.split()
    done = subprocess.run([sys.executable, "-m", tool, *arguments], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"


def test_lint_would_see_a_fault() -> None:
    """The rules of pyproject.toml are those in force: an unused import is one they know."""
    command = [sys.executable, "-m", "ruff", "check", "--stdin-filename", "graphopt/imagined.py", "-"]
    done = subprocess.run(command, cwd=ROOT, input="import os\nprint(1)\n", capture_output=True, text=True)
    assert done.returncode == 1
    assert "F401" in done.stdout
    assert "T201" in done.stdout
