"""Where results go: checked before any work, made beside the place, and put there whole or not at all."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import onnx_ir as ir

from graphopt.errors import UsageError
from graphopt.model_io import source
from graphopt.staged_files import StagedFiles

_NEVER_CHANGED = "graphopt never changes its input; choose another name"


def check_output(output: Path, model: ir.Model | None, given: Path | None, what: str = "input") -> None:
    """Raise an error, before any work, if a file cannot be written where it is wanted.

    Args:
        output: The file wanted.
        model: The input, loaded, if it comes from files.
        given: The file it was loaded from, if any.
        what: What that is called.

    Raises:
        UsageError: It is the input or its data, no regular file, or in a folder that is missing or not writable.
    """
    if given is not None and is_same_file(output, given):
        raise UsageError(f"output `{output}` is the {what}", hint=_NEVER_CHANGED)
    if output.is_dir():
        raise UsageError(f"output `{output}` is a folder", hint="name a file in it")
    if output.exists() and not output.is_file():
        raise UsageError(f"output `{output}` is no regular file", hint="name a file; it is replaced, not written into")
    if not output.parent.is_dir():
        raise UsageError(f"the folder of output `{output}` does not exist", hint=f"create `{output.parent}` first")
    if model is not None:
        _check_data_files(output, model, what)
    try:
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        hint = "choose another folder"
        raise UsageError(f"cannot write to `{output.parent}`: {error.strerror}", hint=hint) from error


def _check_data_files(output: Path, model: ir.Model, what: str) -> None:
    """Raise an error if writing the output, or the data file beside it, would change data of the input."""
    origin = source(model)
    for path in (output, output.with_name(output.name + ".data")):
        if origin is not None and any(is_same_file(path, Path(file)) for file in origin.data_files):
            raise UsageError(f"output `{path}` holds the data of the {what} `{origin.path}`", hint=_NEVER_CHANGED)


def is_same_file(a: Path, b: Path) -> bool:
    """Return whether two paths lead to one file, links followed, or would if there were one."""
    try:
        return a.samefile(b)
    except OSError:
        return os.path.realpath(a) == os.path.realpath(b)


@contextlib.contextmanager
def staging_folder(output: Path | None) -> Iterator[Path]:
    """Yield a folder that goes away again, on the disk of the output so that files can be renamed into place."""
    parent = output.parent if output is not None else None
    with tempfile.TemporaryDirectory(prefix=".graphopt-", dir=parent) as folder:
        yield Path(folder)


def move_into_place(files: Sequence[Path], output: Path) -> Path:
    """Give staged files, as `save` returns them, the names that are wanted, all or none."""
    staged = StagedFiles()
    for file in reversed(files):  # the model itself last
        staged.adopt(file, output.parent / file.name)
    staged.publish()
    return output
