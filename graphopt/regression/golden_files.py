"""Golden files: values that tests compare with, kept in files that a run can write anew."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.comparison import same_bits
from graphopt.errors import DataError, UsageError, hints_in_tracebacks
from graphopt.model_diff import model_lines
from graphopt.regression.stored_arrays import pack, unpack
from graphopt.staged_files import write_bytes

# Lines of a difference that are shown; the rest is counted.
MOST_LINES = 60
# Elements of an array that are shown where it differs.
MOST_ELEMENTS = 5
_CONTEXT = 2
# The name under which an array by itself is stored.
_ALONE = "value"
# How characters are stored that UTF-8 lacks, as in names of files.
_ODD = "surrogatepass"
# File systems take names of 255 bytes; a hash, a name of the value and a suffix are added.
_LONGEST_STEM = 100
_HASH_DIGITS = 8


@dataclass(repr=False)
class Golden:
    """Compares values with files; call it with a value.

    Args:
        folder: Where the files lie.
        stem: What the file of a value without a name is called.
        update: Whether files are written instead of compared with.
        hint: What writes them anew.

    Attributes:
        written: Files written, in order.
    """

    folder: Path
    stem: str
    update: bool = False
    hint: str = "update the golden files"
    written: list[Path] = field(default_factory=list)
    _used: set[Path] = field(default_factory=set)

    def __call__(
        self,
        value: Any,
        name: str | None = None,
        *,
        file: str | Path | None = None,
        rtol: float = 0.0,
        atol: float = 0.0,
    ) -> None:
        """Compare a value with its file.

        Args:
            value: Text; an array of numbers or strings, or arrays by name; a model of the IR or of onnx, of which the
                graph and the first elements of constants are kept; or JSON values, numbers of numpy included.
            name: Tells several values of one test apart.
            file: The file, instead of one named after the test.
            rtol: How far floats may be off, as a share of the stored ones; equal bits are asked for where both are 0.
            atol: How far floats may be off, absolutely.

        Raises:
            AssertionError: It differs, or there is no file yet.
            UsageError: It is of no such type, or a second value of the test has the same name.
        """
        __tracebackhide__ = True
        value = ir.from_proto(value) if isinstance(value, onnx.ModelProto) else value
        with hints_in_tracebacks():
            kind = _kind_of(value)
            path = Path(file) if file is not None else self._path(name, kind)
            self._claim(path)
        why = kind.difference(path, value, rtol, atol) if path.is_file() else [f"there is no golden file `{path}`"]
        if not why:
            return
        if self.update:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_bytes(path, kind.to_bytes(value))
            self.written.append(path)
            return
        raise AssertionError("\n".join([*_shortened(why), f"hint: {self.hint}"]))

    def _path(self, name: str | None, kind: _Kind) -> Path:
        return self.folder / f"{self.stem}{'' if name is None else f'@{file_stem(name)}'}{kind.suffix}"

    def _claim(self, path: Path) -> None:
        if path in self._used:
            raise UsageError(
                f"golden file `{path}` is used twice in one test", hint="name the values: golden(value, NAME)"
            )
        self._used.add(path)


def file_stem(name: str) -> str:
    """Return a file name for a name, its own for each: where characters or length do not suit, a hash is added."""
    plain = re.sub(r"[^\w.-]+", "_", name).strip("_")[:_LONGEST_STEM]
    return plain if plain == name else f"{plain}-{hashlib.sha256(name.encode()).hexdigest()[:_HASH_DIGITS]}"


class _Kind:
    """How values of one kind are stored and compared."""

    suffix = ""

    def to_bytes(self, value: Any) -> bytes:
        raise NotImplementedError

    def difference(self, path: Path, value: Any, rtol: float, atol: float) -> list[str]:
        """Return how a value differs from its file, in lines; none where it does not."""
        raise NotImplementedError


class _Text(_Kind):
    suffix = ".txt"

    def to_bytes(self, value: str) -> bytes:
        return value.encode(errors=_ODD)

    def difference(self, path: Path, value: str, rtol: float, atol: float) -> list[str]:
        # Line ends are made one on both sides: a checkout may have changed them.
        stored = path.read_text(encoding="utf-8", errors=_ODD)
        return [] if stored == re.sub(r"\r\n?", "\n", value) else _unified(path, stored, value)


class _Model(_Text):
    def to_bytes(self, value: ir.Model) -> bytes:  # type: ignore[override]
        return _model_text(value).encode()

    def difference(self, path: Path, value: ir.Model, rtol: float, atol: float) -> list[str]:  # type: ignore[override]
        return super().difference(path, _model_text(value), rtol, atol)


class _Json(_Kind):
    suffix = ".json"

    def to_bytes(self, value: Any) -> bytes:
        return (_json_text(value)).encode()

    def difference(self, path: Path, value: Any, rtol: float, atol: float) -> list[str]:
        text = path.read_text(encoding="utf-8")
        try:
            stored = json.loads(text)
        except ValueError:
            return [f"`{path}` holds no JSON"]
        now = json.loads(_json_text(value))
        return [] if _alike(stored, now, rtol, atol) else _unified(path, text, _json_text(value))


class _Arrays(_Kind):
    suffix = ".npz"

    def to_bytes(self, value: Any) -> bytes:
        return pack(_by_name(value))

    def difference(self, path: Path, value: Any, rtol: float, atol: float) -> list[str]:
        try:
            stored, _ = unpack(path)
        except DataError as error:
            return [error.message]
        now = _by_name(value)
        lines = [f"  {name}: only stored" for name in stored if name not in now]
        lines += [f"  {name}: only now" for name in now if name not in stored]
        for name, array in now.items():
            if name in stored:
                lines += [f"  {name}: {text}" for text in array_difference(stored[name], array, rtol, atol)]
        return [f"`{path}` differs:", *lines] if lines else []


def _kind_of(value: Any) -> _Kind:
    __tracebackhide__ = True
    if isinstance(value, str):
        return _Text()
    if isinstance(value, ir.Model):
        return _Model()
    arrays = list(value.values()) if isinstance(value, Mapping) else [value]
    if arrays and all(isinstance(one, np.ndarray) for one in arrays):
        if any(one.dtype.kind == "O" and not all(isinstance(each, str) for each in one.flat) for one in arrays):
            raise UsageError("a golden array cannot hold objects", hint="numbers or strings")
        return _Arrays()
    try:
        _json_text(value)
    except TypeError:
        raise UsageError(
            f"a golden value cannot be a `{type(value).__name__}`",
            hint="text, arrays, a model, or values that JSON has",
        ) from None
    return _Json()


def _by_name(value: Any) -> dict[str, Array]:
    return {_ALONE: value} if isinstance(value, np.ndarray) else {str(name): one for name, one in value.items()}


def array_difference(stored: Array, now: Array, rtol: float = 0.0, atol: float = 0.0) -> list[str]:
    """Return how an array differs from a stored one, in lines; none where it does not.

    Args:
        stored: What it is compared with.
        now: The array.
        rtol: How far floats may be off, as a share of the stored ones; equal bits are asked for where both are 0.
        atol: How far floats may be off, absolutely.
    """
    if stored.dtype != now.dtype or stored.shape != now.shape:
        return [f"{stored.dtype}{list(stored.shape)} stored, {now.dtype}{list(now.shape)} now"]
    if stored.dtype.kind in "OSU" or stored.dtype.names is not None:
        unlike = np.asarray(stored != now)
        return _elements(stored, now, unlike) if unlike.any() else []
    if same_bits(stored, now):
        return []
    a, b = (side.astype(np.complex128 if side.dtype.kind == "c" else np.float64) for side in (stored, now))
    if (rtol or atol) and stored.dtype.kind not in "biu":
        apart = ~np.isclose(b, a, rtol=rtol, atol=atol, equal_nan=True)
    else:
        apart = ~(np.asarray(stored == now) | (np.isnan(a) & np.isnan(b))) | (np.signbit(a.real) != np.signbit(b.real))
    if not apart.any():
        return []
    lines = _elements(stored, now, apart)
    error = np.abs(a - b)[apart & np.isfinite(a) & np.isfinite(b)]
    return [f"{lines[0]}, by {error.max():.3g} at most" if error.size else lines[0], *lines[1:]]


def _elements(stored: Array, now: Array, apart: Array) -> list[str]:
    places = np.argwhere(apart)
    lines = [f"{len(places)} of {stored.size} elements differ"]
    for place in places[:MOST_ELEMENTS]:
        at = tuple(place.tolist())
        lines.append(f"at {list(at)}: {stored[at]} stored, {now[at]} now")
    return lines + (["…"] if len(places) > MOST_ELEMENTS else [])


def _alike(stored: Any, now: Any, rtol: float, atol: float) -> bool:
    """Compare JSON values: numbers within tolerance, where one of them is a float; everything else as it is."""
    if isinstance(stored, dict) and isinstance(now, dict):
        return stored.keys() == now.keys() and all(_alike(stored[key], now[key], rtol, atol) for key in stored)
    if isinstance(stored, list) and isinstance(now, list):
        return len(stored) == len(now) and all(_alike(*pair, rtol, atol) for pair in zip(stored, now, strict=True))
    numbers = all(isinstance(one, (int, float)) and not isinstance(one, bool) for one in (stored, now))
    if numbers and (isinstance(stored, float) or isinstance(now, float)):
        return bool(np.isclose(now, stored, rtol=rtol, atol=atol, equal_nan=True))
    return type(stored) is type(now) and bool(stored == now)


def _json_text(value: Any) -> str:
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, Path):
        return value.as_posix()
    raise TypeError(f"JSON has no `{type(value).__name__}`")


def _model_text(model: ir.Model) -> str:
    return "".join(f"{line}\n" for line in model_lines(model))


def _unified(path: Path, stored: str, now: str) -> list[str]:
    sides = (stored.splitlines(), now.splitlines())
    lines = list(difflib.unified_diff(*sides, "stored", "now", lineterm="", n=_CONTEXT))
    return [f"`{path}` differs:", *(lines or ["only in the line ends"])]


def _shortened(lines: Sequence[str]) -> Iterator[str]:
    yield from lines[:MOST_LINES]
    if len(lines) > MOST_LINES:
        yield f"… and {len(lines) - MOST_LINES} more lines"
