"""Arrays of every dtype in a compressed ``.npz`` file, small floats and strings included."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from graphopt.backend import Array
from graphopt.errors import DataError

# The entry that names the dtypes numpy would not give back, and what else the writer wants to say.
_FACTS = "graphopt.json"
_STRINGS = "object"


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
    # Not by numpy's savez: that takes arrays as arguments by name, and some names are its own.
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, array in {**plain, _FACTS: np.frombuffer(text.encode(), np.uint8)}.items():
            with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                np.lib.format.write_array(member, array, allow_pickle=False)
    return file.getvalue()


def unpack(path: str | os.PathLike[str]) -> tuple[dict[str, Array], dict[str, Any]]:
    """Return the arrays and facts of a file made by `pack`.

    Raises:
        DataError: There is no such file, or it is none of these.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        said = json.loads(arrays.pop(_FACTS).tobytes())
    except FileNotFoundError:
        raise DataError(
            f"there is no file `{path}`", hint="it belongs beside the test; check what was committed"
        ) from None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, AttributeError) as error:
        raise DataError(f"`{path}` holds no arrays that graphopt stored", hint="write it anew") from error
    for name, dtype in said["dtypes"].items():
        arrays[name] = arrays[name].astype(object) if dtype == _STRINGS else arrays[name].view(_dtype(dtype))
    return arrays, said["facts"]


def _plain(array: Array) -> Array:
    if array.dtype.kind in "OU":
        return array.astype(str)
    if array.dtype.kind == "V" or not array.dtype.isbuiltin:
        return np.ascontiguousarray(array).view(f"u{array.dtype.itemsize}").reshape(array.shape)
    return array


def _dtype(name: str) -> np.dtype[Any]:
    found: np.dtype[Any] = np.dtype(getattr(ml_dtypes, name))
    return found
