"""The calibration cache: statistics by what they are of, for one run in memory and for later ones in a folder."""

from __future__ import annotations

import contextlib
import hashlib
import secrets
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import numpy as np

from graphopt.backend import Array
from graphopt.errors import UsageError
from graphopt.statistics import Statistic

Result = TypeVar("Result")

# Part of every name: files written by a graphopt that computes or stores anything differently are not found.
_FORMAT = "graphopt calibration 2"
_NAME_BYTES = 16
# Held in memory; second moments of many wide layers may be more, and are then read from the folder or computed again.
MEMORY_LIMIT = 1 << 30
_ABOUT = "about"
_UNREADABLE = (OSError, EOFError, ValueError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error)


def entry_name(value: str, samples: str, statistic: str) -> str:
    """Return the name of a result: a hash of what it is of.

    The backend is no part of it: a value is the same on all runtimes, rounding aside, and so one calibration does for
    all targets.

    Args:
        value: Content key of the value.
        samples: Fingerprint of the samples.
        statistic: Key of the statistic.
    """
    text = "\n".join((_FORMAT, value, samples, statistic))
    return hashlib.blake2b(text.encode(), digest_size=_NAME_BYTES).hexdigest()


class CalibrationCache:
    """Results by name, in memory and, if there is one, in a folder.

    A file that cannot be read, or is about something else, counts as none and is written anew.

    Args:
        folder: The folder, made where it does not exist; None for memory alone.

    Attributes:
        remarks: What was wrong with files, for the report, until they are taken.

    Raises:
        UsageError: There cannot be such a folder.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self.remarks: list[str] = []
        self._memory: dict[str, Mapping[str, Array]] = {}
        self._held = 0
        if folder is not None:
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UsageError(
                    f"calibration cache `{folder}` cannot be used: {error.strerror}", hint="name a folder"
                ) from error

    def get(self, name: str, statistic: Statistic[Result]) -> Result | None:
        """Return a statistic by name, or None where it is not known."""
        arrays = self._memory.get(name)
        if arrays is not None:
            return statistic.result(arrays)
        path = self._path(name)
        if path is None or not path.is_file():
            return None
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {key: archive[key] for key in archive.files}
            if str(arrays.pop(_ABOUT)) != name:
                raise ValueError("it is about something else")
            result = statistic.result(arrays)
        except _UNREADABLE as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            self.remarks.append(f"calibration cache: `{path.name}` is not used, but computed again: {reason}")
            return None
        self._keep(name, arrays)
        return result

    def put(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Keep what an accumulator learned."""
        self._keep(name, arrays)
        path = self._path(name)
        if path is None:
            return
        # No flush to the disk: after a crash of the system, what is half there is found out by its checksum.
        temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
        try:
            with open(temporary, "xb") as file:
                np.savez(file, **{_ABOUT: np.array(name), **arrays})  # type: ignore[arg-type]
            temporary.replace(path)
        except OSError as error:
            self.folder = None
            self.remarks.append(f"calibration cache: `{path.parent}` takes no more files: {error.strerror}")
        finally:  # an interrupt leaves nothing half written either
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def take_remarks(self) -> list[str]:
        """Return the remarks and forget them."""
        remarks, self.remarks = self.remarks, []
        return remarks

    def _path(self, name: str) -> Path | None:
        return self.folder / f"{name}.npz" if self.folder is not None else None

    def _keep(self, name: str, arrays: Mapping[str, Array]) -> None:
        self._forget(name)
        self._memory[name] = arrays
        self._held += _bytes(arrays)
        while self._held > MEMORY_LIMIT and len(self._memory) > 1:
            self._forget(next(iter(self._memory)))

    def _forget(self, name: str) -> None:
        arrays = self._memory.pop(name, None)
        if arrays is not None:
            self._held -= _bytes(arrays)


def _bytes(arrays: Mapping[str, Array]) -> int:
    return sum(array.nbytes for array in arrays.values())
