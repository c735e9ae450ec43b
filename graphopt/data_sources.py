"""Sources of samples: ``.npz`` files, folders, functions, and what Python hands over, as they come."""

from __future__ import annotations

import functools
import importlib.util
import sys
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx

from graphopt.backend import Array
from graphopt.errors import DataError, GraphoptError, UsageError, did_you_mean, in_words

# A raw source yields (where it is, arrays by name, whether the first axis is known to be samples).
Raw = Iterator[tuple[str, Mapping[str, Any], bool]]
OpenRaw = Callable[[list[str]], Raw]


def open_source(source: Any) -> tuple[OpenRaw, str]:
    """Return what opens a source, and how messages call it.

    Raises:
        DataError: It is none.
    """
    if isinstance(source, Mapping):
        return (lambda _: iter([("data", source, True)])), "data"
    if callable(source):
        return functools.partial(_from_function, source), getattr(source, "__name__", "data")
    if isinstance(source, Sequence) and not isinstance(source, str):
        return functools.partial(_from_function, lambda: source), "data"
    if not isinstance(source, str | Path):
        raise DataError(
            f"data cannot be read from `{type(source).__name__}`",
            hint="a path, a dict of arrays, a list of dicts, or a function that returns an iterator of dicts",
        )
    text = str(source)
    file, colon, function = text.rpartition(":")
    if colon and file.endswith(".py"):
        return functools.partial(_from_function, load_function(file, function)), text
    path = Path(text)
    if path.is_dir():
        return functools.partial(_from_folder, path), text
    if not path.exists():
        raise DataError(f"data `{text}` does not exist", hint="a .npz file, a folder, or file.py:function")
    if path.suffix == ".py":
        raise DataError(f"data `{text}` names no function", hint="write `file.py:function`")
    return functools.partial(_from_npz, path), text


def load_function(file: str, function: str) -> Callable[..., Any]:
    """Return a function of a Python file by name.

    Raises:
        DataError: No such file or function, or the file fails to run.
    """
    path = Path(file)
    if not path.is_file():
        raise DataError(f"`{file}` does not exist", hint="write `file.py:function`")
    return _function_of(_run_file(path), function, file, DataError)


def load_named_function(text: str, *, hint: str) -> Callable[..., Any]:
    """Return the function ``file.py:function`` or ``package.module:function``.

    Modules are found as by ``python -m``: those in the working folder, too.

    Args:
        text: The name.
        hint: What to write instead where there is no such module.

    Raises:
        DataError: No such file or function in it, or the file fails to run.
        UsageError: No such module or function in it.
    """
    place, _, name = text.rpartition(":")
    if place.endswith(".py"):
        return load_function(place, name)
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(place)
    except Exception as error:
        raise UsageError(f"`{text}`: module `{place}` cannot be imported: {in_words(error)}", hint=hint) from error
    return _function_of(module, name, place, UsageError)


def _function_of(module: ModuleType, name: str, place: str, kind: type[GraphoptError]) -> Callable[..., Any]:
    """Return a function of a module; the error of that kind says where it was looked for."""
    found = getattr(module, name, None)
    if not callable(found):
        names = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise kind(f"`{place}` has no function `{name}`", hint=did_you_mean(name, names))
    result: Callable[..., Any] = found
    return result


def _run_file(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise DataError(f"`{path}` is not a Python file", hint="write `file.py:function`")
    module = importlib.util.module_from_spec(spec)
    # As for a script: what lies beside the file can be imported, and the module can be found by its name.
    folder = str(path.resolve().parent)
    if folder not in sys.path:
        sys.path.insert(0, folder)
    sys.modules.setdefault(path.stem, module)
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        if sys.modules.get(path.stem) is module:
            del sys.modules[path.stem]
        raise DataError(f"`{path}` fails to run: {in_words(error)}", hint="run it by itself") from error
    return module


def _from_npz(path: Path, _: list[str]) -> Raw:
    try:
        # Asked first, for NumPy takes anything else for a pickle, and advises to trust it.
        with path.open("rb") as content:
            if not zipfile.is_zipfile(content):
                raise ValueError("not an archive of named arrays")
        with np.load(path, allow_pickle=False) as archive:
            yield str(path), {name: archive[name] for name in archive.files}, True
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise DataError(
            f"cannot read `{path}`: {in_words(error)}",
            hint="write it with numpy.savez(FILE, input_name=array, labels=labels)",
        ) from error


def _from_folder(path: Path, inputs: list[str]) -> Raw:
    files = sorted(path.glob("*.npz"))
    sets = [path] if (path / "input_0.pb").is_file() else sorted(path.glob("test_data_set_*"))
    if not files and not sets:
        raise DataError(f"`{path}` holds no data", hint="put .npz files or test_data_set_* folders there")
    for file in files:
        yield from _from_npz(file, inputs)
    for folder in sets:
        yield str(folder), _test_data_set(folder, inputs), False


def _test_data_set(folder: Path, inputs: list[str]) -> dict[str, Array]:
    arrays = {}
    for index, name in enumerate(inputs):
        file = folder / f"input_{index}.pb"
        try:
            tensor = onnx.TensorProto.FromString(file.read_bytes())
            arrays[tensor.name or name] = onnx.numpy_helper.to_array(tensor)
        except Exception as error:
            raise DataError(
                f"cannot read `{file}` for input `{name}`: {in_words(error)}", hint="one `input_N.pb` tensor per input"
            ) from error
    return arrays


def _from_function(function: Callable[[], Any], _: list[str]) -> Raw:
    where = getattr(function, "__name__", "data")
    try:
        produced = function()
        for index, arrays in enumerate([produced] if isinstance(produced, Mapping) else produced):
            if not isinstance(arrays, Mapping):
                raise DataError(f"`{where}` yields {type(arrays).__name__}", hint="yield dicts: input name to array")
            yield f"{where}, item {index}", arrays, False
    except DataError:
        raise
    except (Exception, SystemExit) as error:
        raise DataError(f"`{where}` fails: {in_words(error)}", hint="run it by itself") from error
