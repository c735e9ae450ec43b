"""Arrays of every dtype in a compressed ``.npz`` file, small floats and strings included."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from typing import IO, Any

import ml_dtypes
import numpy as np
import onnx_ir as ir

from graphopt.backend import Array
from graphopt.errors import DataError

# The entry that names the dtypes numpy would not give back, and what else the writer wants to say.
_FACTS = "graphopt.json"
_STRINGS = "object"
# What numpy says of dtypes that other packages add, as bfloat16.
_REGISTERED = 2


def pack(arrays: Mapping[str, Array], facts: Mapping[str, Any] | None = None) -> bytes:
    """Return an ``.npz`` file as bytes; the same arrays give the same bytes.

    Args:
        arrays: Name to array; an array of objects holds strings.
        facts: JSON values to keep beside them.
    """
    plain, dtypes = {}, {}
    for name, array in arrays.items():
        plain[name] = _plain(array)
        if plain[name].dtype != array.dtype:
            dtypes[name] = _STRINGS if array.dtype.kind == "O" else array.dtype.name
    text = json.dumps({"dtypes": dtypes, "facts": dict(facts or {})}, sort_keys=True)
    file = io.BytesIO()
    _write(file, {**plain, _FACTS: np.frombuffer(text.encode(), np.uint8)}, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def write_feed(path: str | os.PathLike[str], feed: Mapping[str, Array]) -> None:
    """Write what a model is fed as an ``.npz`` file that anybody's numpy reads without pickles; strings as such."""
    _write(path, {name: array.astype(str) if array.dtype.kind == "O" else array for name, array in feed.items()})


def read_feed(path: str | os.PathLike[str], model: ir.Model) -> dict[str, Array]:
    """Return what `write_feed` wrote for a model; numpy keeps dtypes it does not know as bytes.

    Raises:
        DataError: It is no such file, or of another model.
    """
    types = {value.name: value.dtype for value in model.graph.inputs if value.dtype is not None}
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: _of_type(file[name], types[name]) for name in file.files}
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError, TypeError) as error:
        raise DataError(f"`{path}` holds no inputs of this model", hint="it was written with the model") from error


def _of_type(array: Array, dtype: ir.DataType) -> Array:
    return array.astype(object) if dtype == ir.DataType.STRING else array.view(dtype.numpy())


def _write(
    file: str | os.PathLike[str] | IO[bytes], arrays: Mapping[str, Array], how: int = zipfile.ZIP_STORED
) -> None:
    """Write arrays; not by numpy's savez, which takes them as arguments by name, and has names of its own."""
    with zipfile.ZipFile(file, "w", how) as archive:
        for name, array in arrays.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)


def unpack(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays and facts of a file made by `pack`.

    Raises:
        DataError: There is no such file, or it is none of these.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        said = json.loads(arrays.pop(_FACTS).tobytes())
        for name, dtype in said["dtypes"].items():
            arrays[name] = arrays[name].astype(object) if dtype == _STRINGS else arrays[name].view(_dtype(dtype))
        return arrays, said["facts"]
    except FileNotFoundError:
        raise DataError(
            f"there is no file `{path}`", hint="it belongs beside the test; check what was committed"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"`{path}` holds no arrays that graphopt stored", hint="write it anew") from error


def _plain(array: Array) -> Array:
    if array.dtype.kind in "OU":
        return array.astype(str)
    if array.dtype.isbuiltin == _REGISTERED:
        return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)
    return array


def _dtype(name: str) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found
