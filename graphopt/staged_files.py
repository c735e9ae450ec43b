"""Files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

BUFFER_SIZE = 1 << 20


class StagedFiles:
    """Files written under temporary names, which take their real ones together or not at all."""

    def __init__(self) -> None:
        self._files: list[tuple[Path, Path]] = []

    @contextlib.contextmanager
    def open(self, target: Path) -> Iterator[BinaryIO]:
        """Open a new file that is to become `target`, and make sure it is on the disk when done."""
        temporary = _fresh_name(target)
        self._files.append((temporary, target))
        with open(temporary, "xb", buffering=BUFFER_SIZE) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        with contextlib.suppress(FileNotFoundError):
            shutil.copymode(target, temporary)

    def adopt(self, temporary: Path, target: Path) -> None:
        """Take over a finished file that is to become `target`, on the same file system."""
        self._files.append((temporary, target))

    def publish(self) -> list[Path]:
        """Give all files their real names, the last one opened last."""
        done: list[tuple[Path, Path | None]] = []
        try:
            for temporary, target in self._files:
                # The last file needs no second name: if it cannot be replaced, it is as it was.
                if target != self._files[-1][1]:
                    done.append((target, _second_name(target)))
                os.replace(temporary, target)
        except BaseException:
            for target, before in done:
                _put_back(target, before)
            raise
        finally:
            for _, before in done:
                if before is not None:
                    before.unlink(missing_ok=True)
        _sync_folder(self._files[-1][1].parent)
        return [target for _, target in reversed(self._files)]

    def discard(self) -> None:
        """Remove what has no real name yet."""
        for temporary, _ in self._files:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)


def write_text(target: Path, text: str) -> None:
    """Write a text file whole or not at all; see `write_bytes`."""
    write_bytes(target, text.encode())


def write_bytes(target: Path, content: bytes) -> None:
    """Write a file whole or not at all.

    Raises:
        OSError: It cannot be written; what was there before is untouched.
    """
    staged = StagedFiles()
    try:
        with staged.open(target) as file:
            file.write(content)
        staged.publish()
    finally:
        staged.discard()


def _fresh_name(target: Path) -> Path:
    return target.with_name(f".graphopt-{secrets.token_hex(8)}.tmp")


def _second_name(target: Path) -> Path | None:
    """Give a file a second name to be put back from, None if there is no such file."""
    if not os.path.lexists(target):
        return None
    second = _fresh_name(target)
    try:
        os.link(target, second, follow_symlinks=False)
    except OSError:
        # Some file systems have no second names: then it has only this one until the new file is there.
        os.rename(target, second)
    return second


def _put_back(target: Path, before: Path | None) -> None:
    with contextlib.suppress(OSError):
        if before is None:
            target.unlink(missing_ok=True)
        else:
            os.replace(before, target)


def _sync_folder(folder: Path) -> None:
    """Make the new names last, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
